"""Fair trials of every method in the demonstration's world: one grid, one rule, fresh worlds.

python scripts/study/trials.py tune --out runs/study          # worlds 0 to 2, the whole grid
python scripts/study/trials.py confirm --out runs/study       # worlds 20 to 31, the chosen settings
python scripts/study/trials.py report --out runs/study        # the tables, as Markdown
python scripts/study/trials.py tried --out runs/study         # every setting on worlds 0 to 2
python scripts/study/trials.py draw --out runs/study          # the figure, trials.png

Every method gets the same compute (1,760 sequences forward and backward in SFT; a forward pass
alone counts a third) and the same grid of learning rates. Per regime, which is a number of general
rows and whose answers they have, the rule chooses on worlds 0 to 2: safety of at least .95 in each
of them, then the largest mean of general score plus compliance. The choice is run once on worlds 20
to 31. Finished trials are kept, one line each, in trials.jsonl; nothing is ever chosen by what
worlds 20 to 31 show.
"""

import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
from accounts import Log, Scores, choose, command_line, described, mean, paired
from loop import Regime, Setting, Trial

from ogpsa_jax.demo.scoring import COMPLIANCE, OVER_REFUSAL, SAFETY

TUNED_ON = (0, 1, 2)
CONFIRMED_ON = tuple(range(20, 32))
MERGED = (0.5, 0.7, 0.8, 0.9)
RIVALS = ("replay", "mixing")
WEIGHTS = (1.0, 8.0, 64.0)
SAFE = 0.95


# Up to 3 what projects on inputs took the highest rate in every regime, so that all got one more.
RATES = (0.5, 1.0, 2.0, 3.0, 4.0)
REGIMES = (Regime(400), Regime(80), Regime(80, foreign=True))


def grid() -> list[Trial]:
    """All that is tried, the same in every regime; rivals no less than ours."""
    found: list[Trial] = []
    for rate in RATES:
        one = partial(Trial, rate=rate)
        half = partial(one, share=0.5)
        model = partial(half, target="initial")
        found.append(one("naive"))
        found += [one("merging", merged=weight) for weight in MERGED]
        found.append(one("LoRA", lora=True))
        paper = partial(one, subspace="gradients")
        found.append(paper("OGPSA, paper", every=30, refresh_rows=48))
        found.append(paper("momentum re-projected", every=10, refresh_rows=40, momentum=True))
        found += [one("mixing", share=share) for share in (0.5, 0.75)]
        found += [half("replay", weight=weight) for weight in WEIGHTS]
        found += [model("replay of the model", weight=weight) for weight in WEIGHTS]
        span = partial(half, weight=8.0, subspace="gradients")
        found.append(span("gradient span + replay"))
        found.append(span("gradient span of a window + replay", window=64))
        found.append(model("gradient span + replay of the model", weight=8.0, subspace="gradients"))
        for energy, weight in ((0.95, 1.0), (0.95, 8.0), (0.98, 8.0)):
            inputs = {"subspace": "inputs", "energy": energy}
            if weight == 8.0:
                found.append(one("inputs alone", **inputs))
            found.append(half("inputs + replay", weight=weight, **inputs))
            found.append(model("inputs + replay of the model", weight=weight, **inputs))
            found.append(model("the same, column Adam alone", weight=weight, column=True, **inputs))
    return found


def identity(regime: Regime, trial: Trial, world: int) -> str:
    """Of a finished trial; the regime counts only where the method looks at general rows."""
    return json.dumps([asdict(regime) if trial.uses_rows else None, asdict(trial), world])


def safe(scores: Scores) -> bool:
    """The rule's first half."""
    return scores[SAFETY] >= SAFE


def worth(scores: Scores) -> float:
    """The rule's second half."""
    return scores["general"] + scores[COMPLIANCE]


def chosen(log: Log, regime: Regime) -> dict[str, tuple[Trial, bool]]:
    """By method, the setting that the rule takes on worlds 0 to 2, and whether it is safe there.

    A setting that is not safe in one world cannot be chosen, and is not run in the others.
    """

    def tried(trial: Trial) -> list[Scores]:
        names = [identity(regime, trial, world) for world in TUNED_ON]
        return [log.scores[name] for name in names if name in log.scores]

    return choose(
        grid(),
        tried,
        count=len(TUNED_ON),
        safety=lambda scores: scores[SAFETY],
        least=SAFE,
        worth=worth,
    )


def tune(out: Path, log: Log) -> None:
    """The whole grid on worlds 0 to 2."""
    for world in TUNED_ON:
        setting = Setting(out, world)
        for regime in REGIMES:
            for trial in grid():
                earlier = [identity(regime, trial, w) for w in TUNED_ON if w < world]
                if all(safe(log.scores[name]) for name in earlier if name in log.scores):
                    _run(log, setting, regime, trial)


def confirm(out: Path, log: Log) -> None:
    """The chosen settings, once, on worlds that nobody has looked at."""
    picks = {regime: chosen(log, regime) for regime in REGIMES}
    for world in CONFIRMED_ON:
        setting = Setting(out, world)
        for regime, methods in picks.items():
            for trial, _ in methods.values():
                _run(log, setting, regime, trial)


def _run(log: Log, setting: Setting, regime: Regime, trial: Trial) -> None:
    shown = (
        f"world {setting.seed}, {regime.name}: {trial.method} x{trial.rate:g} "
        f"w{trial.weight:g} e{trial.energy:g}"
    )
    log.run(identity(regime, trial, setting.seed), shown, lambda: setting.run(trial, regime))


def report(log: Log) -> str:
    """Markdown: what was chosen, what it does on fresh worlds, and paired differences."""
    parts = []
    for regime in REGIMES:
        picks = chosen(log, regime)
        found = {method: _scores(log, regime, trial) for method, (trial, _) in picks.items()}
        lines = [
            f"### {regime.name}\n",
            "| method | setting | general | safety | lowest | over-refusal | compliance "
            + "".join(f"| general, less {r}'s | compliance, less {r}'s " for r in RIVALS)
            + "|",
            "|---|---|" + "---:|" * (5 + 2 * len(RIVALS)),
        ]
        for method, (trial, passes) in picks.items():
            scores = found[method]
            if not scores:
                continue
            columns = [
                mean([score[name] for score in scores.values()])
                for name in ("general", SAFETY, OVER_REFUSAL, COMPLIANCE)
            ]
            columns.insert(2, f"{min(score[SAFETY] for score in scores.values()):.3f}")
            for rival in RIVALS:
                both = sorted(set(scores) & set(found.get(rival, {})))
                columns += [
                    paired([scores[w][name] - found[rival][w][name] for w in both])
                    if method != rival
                    else ""
                    for name in ("general", COMPLIANCE)
                ]
            note = "" if passes else " (never safe enough)"
            lines.append("| " + " | ".join([method, described(trial) + note, *columns]) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + f"\n\n{len(log.scores)} trials in all.\n"


def tried(log: Log) -> str:
    """Markdown: every setting on worlds 0 to 2."""
    parts = []
    for regime in REGIMES:
        picks = [trial for trial, _ in chosen(log, regime).values()]
        lines = [
            f"### {regime.name}\n",
            "| method | setting | worlds | lowest safety | general | compliance | |",
            "|---|---|---:|---:|---:|---:|---|",
        ]
        for trial in sorted(grid(), key=lambda trial: trial.method):
            names = (identity(regime, trial, world) for world in TUNED_ON)
            scores = [log.scores[name] for name in names if name in log.scores]
            if scores:
                means = (np.mean([s[name] for s in scores]) for name in ("general", COMPLIANCE))
                lines.append(
                    f"| {trial.method} | {described(trial)} | {len(scores)} "
                    f"| {min(s[SAFETY] for s in scores):.3f} | "
                    + " | ".join(f"{value:.3f}" for value in means)
                    + f" | {'chosen' if trial in picks else ''} |"
                )
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def draw(out: Path, log: Log) -> None:
    """``trials.png``: general score and compliance of every method on the fresh worlds."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    panels = figure.subplots(1, len(REGIMES), sharex=True, sharey=True)
    for panel, regime in zip(panels, REGIMES, strict=True):
        for number, (method, (trial, _)) in enumerate(chosen(log, regime).items()):
            scores = list(_scores(log, regime, trial).values())
            if len(scores) < 2:
                continue
            values = np.array([[score["general"], score[COMPLIANCE]] for score in scores])
            x, y = values.mean(axis=0)
            dx, dy = values.std(axis=0, ddof=1) / np.sqrt(len(values))
            inputs = method.startswith(("inputs", "the same"))
            panel.errorbar(
                *(x, y, dy, dx),
                fmt="o" if inputs else "s",
                color=colormaps["tab20"](number),
                markerfacecolor=None if inputs else "white",
                label=f"{method} (recommended)" if method == "inputs alone" else method,
            )
        panel.set_title(regime.name, fontsize=9)
        panel.set_xlabel("general score")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("harmless requests answered")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(out / "trials.png", dpi=110)


def _scores(log: Log, regime: Regime, trial: Trial) -> dict[int, dict[str, float]]:
    names = {world: identity(regime, trial, world) for world in CONFIRMED_ON}
    return {world: log.scores[name] for world, name in names.items() if name in log.scores}


if __name__ == "__main__":
    commands = {"tune": tune, "confirm": confirm, "draw": draw}
    reports = {"report": report, "tried": tried}
    sys.exit(command_line(__doc__.splitlines()[0], "runs/study", commands, reports))
