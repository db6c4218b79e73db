"""Fair trials on a real small model: own and foreign references, one grid, one rule, fresh rows.

python scripts/study/real_model.py tune --out runs/real-model      # draws 0 to 2, the whole grid
python scripts/study/real_model.py confirm --out runs/real-model   # draws 20 to 31, the choices
python scripts/study/real_model.py report --out runs/real-model    # the tables, as Markdown

Every method gets the same compute (800 rows of 64 tokens forward and backward; a forward pass alone
counts a third), the same 80 reference rows and the same learning rates. Safety is the share of the
fall in held-out loss on safe answers that naive tuning reaches at its best rate (that with the
lowest mean loss on draws 0 to 2). The rule: at least 90 % of it in each of draws 0 to 2, then the
smallest mean damage, in nats a token: the rise of the loss on held-out stories and, where the
references are general questions, also KL(initial model ‖ now) on held-out general answers.
The choice is run once on draws 20 to 31, whose rows, trained on or held out, are from the half of
each file that draws 0 to 2 never touch. Finished trials are kept, one line each, in trials.jsonl.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from math import inf
from pathlib import Path

from accounts import Log, Scores, choose, command_line, described, mean, paired
from loop import Trial
from real_setting import DRIFT, SAFETY, STORIES, Setting

TUNED_ON = (0, 1, 2)
CONFIRMED_ON = tuple(range(20, 32))
CASES = {"own": "own references: stories", "foreign": "foreign references: general questions"}
RATES = (0.5, 1.0, 2.0, 4.0, 8.0)  # at a quarter naive tuning is not safe
WEIGHTS = (0.25, 1.0, 8.0, 64.0)
SAFE = 0.9
BEFORE = Trial("before", rate=0.0)


def grid() -> list[Trial]:
    """All that is tried, the same in both cases."""
    found: list[Trial] = []
    for rate in RATES:
        one = partial(Trial, rate=rate)
        half = partial(one, share=0.5)
        model = partial(half, target="initial")
        found.append(one("naive"))
        found += [one("merging", merged=weight) for weight in (0.5, 0.7, 0.9)]
        found.append(one("LoRA", lora=True))
        # A tenth of the rows of training for a refresh of the paper's, a quarter for one of ours.
        paper = partial(one, subspace="gradients")
        found.append(paper("OGPSA, paper", every=30, refresh_rows=24))
        found.append(paper("momentum re-projected", every=10, refresh_rows=20, momentum=True))
        found += [one("mixing", share=share) for share in (0.125, 0.25, 0.5)]
        found += [half("replay", weight=weight) for weight in WEIGHTS]
        found += [model("replay of the model", weight=weight) for weight in WEIGHTS]
        span = {"weight": 1.0, "subspace": "gradients"}
        found.append(half("gradient span + replay", **span))
        found.append(model("gradient span + replay of the model", **span))
        for energy in (0.9, 0.95, 0.98):
            inputs = {"subspace": "inputs", "energy": energy}
            found.append(one("inputs alone", **inputs))
            found.append(half("inputs + replay", weight=1.0, **inputs))
            found.append(model("inputs + replay of the model", weight=1.0, **inputs))
            found.append(model("the same, column Adam alone", weight=1.0, column=True, **inputs))
    return found


def identity(case: str, trial: Trial, seed: int) -> str:
    """Of a finished trial; the case counts only where the method looks at references."""
    return json.dumps([case if trial.uses_rows else None, asdict(trial), seed])


def naive(log: Log) -> Trial:
    """Naive tuning at the rate that teaches most safety on draws 0 to 2."""

    def loss(trial: Trial) -> float:
        names = [identity("own", trial, seed) for seed in TUNED_ON]
        return sum(log.scores[name][SAFETY] if name in log.scores else inf for name in names)

    return min((trial for trial in grid() if trial.method == "naive"), key=loss)


def judged(log: Log, case: str, trial: Trial, seed: int) -> Scores | None:
    """Of a finished trial: ``safety``, the share; ``stories`` and ``drift``, the damage in nats."""
    scores, before, best = (
        log.scores.get(identity(case, one, seed)) for one in (trial, BEFORE, naive(log))
    )
    if scores is None or before is None or best is None:
        return None
    return {
        "safety": (before[SAFETY] - scores[SAFETY]) / (before[SAFETY] - best[SAFETY]),
        "stories": scores[STORIES] - before[STORIES],
        "drift": scores[DRIFT],
    }


def damage(case: str, scores: Scores) -> float:
    """What the rule makes small."""
    return scores["stories"] + (scores["drift"] if case == "foreign" else 0.0)


def chosen(log: Log, case: str) -> dict[str, tuple[Trial, bool]]:
    """By method, the setting that the rule takes on draws 0 to 2, and whether it is safe there."""

    def tried(trial: Trial) -> list[Scores]:
        found = [judged(log, case, trial, seed) for seed in TUNED_ON]
        return [scores for scores in found if scores is not None]

    return choose(
        grid(),
        tried,
        count=len(TUNED_ON),
        safety=lambda scores: scores["safety"],
        least=SAFE,
        worth=lambda scores: -damage(case, scores),
    )


def tune(out: Path, log: Log) -> None:
    """The whole grid on draws 0 to 2; naive tuning first, which says what is safe."""
    del out
    settings = {seed: Setting(seed, half=0) for seed in TUNED_ON}
    for setting in settings.values():
        for trial in [BEFORE, *(trial for trial in grid() if trial.method == "naive")]:
            _run(log, setting, "own", trial)
    for seed, setting in settings.items():
        for case in CASES:
            for trial in grid():
                earlier = [judged(log, case, trial, other) for other in TUNED_ON if other < seed]
                # A setting that is not safe in one draw cannot be chosen.
                if all(scores["safety"] >= SAFE for scores in earlier if scores is not None):
                    _run(log, setting, case, trial)


def confirm(out: Path, log: Log) -> None:
    """The chosen settings, once, on rows that nobody has looked at."""
    del out
    picks = {case: chosen(log, case) for case in CASES}
    for seed in CONFIRMED_ON:
        setting = Setting(seed, half=1)
        for trial in (BEFORE, naive(log)):
            _run(log, setting, "own", trial)
        for case, methods in picks.items():
            for trial, _ in methods.values():
                _run(log, setting, case, trial)


def _run(log: Log, setting: Setting, case: str, trial: Trial) -> None:
    shown = f"draw {setting.seed}, {case}: {trial.method}, {described(trial)}"
    log.run(
        identity(case, trial, setting.seed),
        shown,
        lambda: setting.before if trial == BEFORE else setting.run(trial, case),
    )


def report(log: Log) -> str:
    """Markdown: what was chosen, what it does on fresh rows, and paired differences."""
    parts = []
    for case, title in CASES.items():
        picks = chosen(log, case)
        found = {method: _confirmed(log, case, trial) for method, (trial, _) in picks.items()}
        lines = [
            f"### {title}\n",
            "| method | setting | safety | lowest | stories, rise | general answers, KL "
            "| less damage than naive | than replay |",
            "|---|---|---:|---:|---:|---:|---:|---:|",
        ]
        for method, (trial, passes) in picks.items():
            if not found[method]:
                continue
            columns = [
                mean([scores[name] for scores in found[method].values()])
                for name in ("safety", "stories", "drift")
            ]
            columns.insert(1, f"{min(scores['safety'] for scores in found[method].values()):.3f}")
            saved = [
                "" if rival == method else _saved(case, found.get(rival, {}), found[method])
                for rival in ("naive", "replay")
            ]
            note = "" if passes else " (never safe enough)"
            row = [method, described(trial) + note, *columns, *saved]
            lines.append("| " + " | ".join(row) + " |")
        parts.append("\n".join(lines))
    tried = sum(json.loads(name)[1] != asdict(BEFORE) for name in log.scores)
    return "\n\n".join(parts) + f"\n\n{tried} trials in all.\n"


def _confirmed(log: Log, case: str, trial: Trial) -> dict[int, Scores]:
    found = {seed: judged(log, case, trial, seed) for seed in CONFIRMED_ON}
    return {seed: scores for seed, scores in found.items() if scores is not None}


def _saved(case: str, rival: Mapping[int, Scores], ours: Mapping[int, Scores]) -> str:
    both = sorted(set(rival) & set(ours))
    return paired([damage(case, rival[seed]) - damage(case, ours[seed]) for seed in both])


if __name__ == "__main__":
    commands = {"tune": tune, "confirm": confirm}
    sys.exit(command_line(__doc__.splitlines()[0], "runs/real-model", commands, {"report": report}))
