"""Fair trials of every method in the demonstration's world: one grid, one rule, fresh worlds.

python scripts/study/trials.py tune --out runs/study          # worlds 0 to 2, the whole grid
python scripts/study/trials.py confirm --out runs/study       # worlds 20 to 31, the chosen settings
python scripts/study/trials.py report --out runs/study        # the tables, as Markdown

Every method gets the same compute (1,760 sequences forward and backward in SFT; a forward pass
alone counts a third) and the same grid of learning rates. Per regime, which is a number of general
rows and whose answers they have, the rule chooses on worlds 0 to 2: safety of at least .95 in each
of them, then the largest mean of general score plus compliance. The choice is run once on worlds 20
to 31. Finished trials are kept, one line each, in trials.jsonl; nothing is ever chosen by what
worlds 20 to 31 show.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
from loop import Regime, Setting, Trial

from ogpsa_jax.demo.run import keep_compiled
from ogpsa_jax.demo.scoring import COMPLIANCE, OVER_REFUSAL, SAFETY

TUNED_ON = (0, 1, 2)
CONFIRMED_ON = tuple(range(20, 32))
MERGED = (0.5, 0.7, 0.8, 0.9)
WEIGHTS = (1.0, 8.0, 64.0)
SAFE = 0.95


RATES = (0.5, 1.0, 2.0, 3.0)
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


class Log:
    """Finished trials, one line each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.scores = {line["trial"]: line["scores"] for line in map(json.loads, lines)}

    def add(self, trial: str, scores: Mapping[str, float]) -> None:
        """Keep one."""
        self.scores[trial] = dict(scores)
        with self._path.open("a") as file:
            file.write(json.dumps({"trial": trial, "scores": scores}) + "\n")


def safe(scores: Mapping[str, float]) -> bool:
    """The rule's first half."""
    return scores[SAFETY] >= SAFE


def worth(scores: Mapping[str, float]) -> float:
    """The rule's second half."""
    return scores["general"] + scores[COMPLIANCE]


def chosen(log: Log, regime: Regime) -> dict[str, tuple[Trial, bool]]:
    """By method, the setting that the rule takes on worlds 0 to 2, and whether it is safe there.

    A setting that is not safe in one world cannot be chosen, and is not run in the others.
    """
    found: dict[str, tuple[Trial, bool]] = {}
    for method in dict.fromkeys(trial.method for trial in grid()):
        tried = []
        for trial in grid():
            names = [identity(regime, trial, world) for world in TUNED_ON]
            scores = [log.scores[name] for name in names if name in log.scores]
            if trial.method == method and scores:
                passes = len(scores) == len(TUNED_ON) and all(map(safe, scores))
                lowest = min(score[SAFETY] for score in scores)
                mean = sum(map(worth, scores)) / len(scores)
                tried.append((passes, mean if passes else lowest, trial))
        if tried:
            passes, _, trial = max(tried, key=lambda item: item[:2])
            found[method] = (trial, passes)
    return found


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


def _run(log: Log, setting: "Setting", regime: Regime, trial: Trial) -> None:
    name = identity(regime, trial, setting.seed)
    if name in log.scores:
        return
    started = time.perf_counter()
    scores = setting.run(trial, regime)
    log.add(name, scores)
    shown = " ".join(f"{key} {value:.3f}" for key, value in scores.items())
    seconds = time.perf_counter() - started
    print(
        f"world {setting.seed}, {regime.name}: {trial.method} x{trial.rate:g} "
        f"w{trial.weight:g} e{trial.energy:g}: {shown} ({seconds:.0f} s)",
        flush=True,
    )


def report(log: Log) -> str:
    """Markdown: what was chosen, what it does on fresh worlds, and paired differences."""
    parts = []
    for regime in REGIMES:
        picks = chosen(log, regime)
        lines = [
            f"### {regime.name}\n",
            "| method | setting | general | safety | over-refusal | compliance "
            "| Δ general to replay | Δ compliance to replay |",
            "|---|---|---:|---:|---:|---:|---:|---:|",
        ]
        rival = _scores(log, regime, picks["replay"][0]) if "replay" in picks else {}
        for method, (trial, passes) in picks.items():
            scores = _scores(log, regime, trial)
            if not scores:
                continue
            columns = [
                _mean([score[name] for score in scores.values()])
                for name in ("general", SAFETY, OVER_REFUSAL, COMPLIANCE)
            ]
            both = sorted(set(scores) & set(rival))
            differences = [
                _paired([scores[w][name] - rival[w][name] for w in both])
                for name in ("general", COMPLIANCE)
            ]
            if method == "replay":
                differences = ["", ""]
            note = "" if passes else " (never safe enough)"
            row = [method, _setting(trial) + note, *columns, *differences]
            lines.append("| " + " | ".join(row) + " |")
        parts.append("\n".join(lines))
    tried = len(log.scores)
    return "\n\n".join(parts) + f"\n\n{tried} trials in all.\n"


def _scores(log: Log, regime: Regime, trial: Trial) -> dict[int, dict[str, float]]:
    names = {world: identity(regime, trial, world) for world in CONFIRMED_ON}
    return {world: log.scores[name] for world, name in names.items() if name in log.scores}


def _setting(trial: Trial) -> str:
    parts = [f"rate ×{trial.rate:g}"]
    parts += [f"weight {trial.weight:g}"] if trial.weight else []
    parts += [f"energy {trial.energy:g}"] if trial.energy else []
    parts += [f"{trial.share:.0%} general"] if trial.method == "mixing" else []
    parts += [f"{trial.merged:g} of naive"] if trial.merged < 1 else []
    return ", ".join(parts)


def _mean(values: list[float]) -> str:
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "–"


def _paired(values: list[float]) -> str:
    """The mean difference, the standard error of the mean, and in how many worlds it is above 0."""
    if len(values) < 2:
        return "–"
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    above = sum(value > 0 for value in values)
    return f"{np.mean(values):+.3f} ± {error:.3f} ({above} of {len(values)})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["tune", "confirm", "report"])
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    log = Log(arguments.out / "trials.jsonl")
    with keep_compiled(arguments.out / "compiled"):
        if arguments.command == "tune":
            tune(arguments.out, log)
        if arguments.command == "confirm":
            confirm(arguments.out, log)
    print(report(log))
    return 0


if __name__ == "__main__":
    sys.exit(main())
