"""What the studies share: finished trials, the rule that chooses, figures and the command line."""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from loop import Trial

from ogpsa_jax.demo.run import keep_compiled

Scores = Mapping[str, float]


class Log:
    """Finished trials, one line each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.scores = {line["trial"]: line["scores"] for line in map(json.loads, lines)}

    def add(self, trial: str, scores: Scores) -> None:
        """Keep one."""
        self.scores[trial] = dict(scores)
        with self._path.open("a") as file:
            file.write(json.dumps({"trial": trial, "scores": scores}) + "\n")

    def run(self, trial: str, shown: str, scores: Callable[[], Scores]) -> None:
        """Run and keep one that is not finished, and print it as `shown`."""
        if trial in self.scores:
            return
        started = time.perf_counter()
        self.add(trial, scores())
        found = " ".join(f"{key} {value:.3f}" for key, value in self.scores[trial].items())
        print(f"{shown}: {found} ({time.perf_counter() - started:.0f} s)", flush=True)


def choose(
    trials: Sequence[Trial],
    tried: Callable[[Trial], Sequence[Scores]],
    *,
    count: int,
    safety: Callable[[Scores], float],
    least: float,
    worth: Callable[[Scores], float],
) -> dict[str, tuple[Trial, bool]]:
    """By method, the setting that the rule takes, and whether it is safe wherever it was tried.

    Args:
      trials: the grid.
      tried: the scores of a trial; fewer than `count` where it was given up as unsafe.
      count: worlds, or draws of the data, that are tuned on.
      safety: of scores; a setting is safe where it is at least `least` in all of them.
      least: see `safety`.
      worth: of scores; of the safe settings that with the largest mean is taken, and where none is
        safe that with the largest lowest safety.
    """
    found: dict[str, tuple[Trial, bool]] = {}
    for method in dict.fromkeys(trial.method for trial in trials):
        ranked = []
        for trial in trials:
            scores = tried(trial) if trial.method == method else ()
            if scores:
                lowest = min(map(safety, scores))
                passes = len(scores) == count and lowest >= least
                mean = sum(map(worth, scores)) / len(scores)
                ranked.append((passes, mean if passes else lowest, trial))
        if ranked:
            passes, _, trial = max(ranked, key=lambda item: item[:2])
            found[method] = (trial, passes)
    return found


def described(trial: Trial) -> str:
    """A setting, in words."""
    parts = [f"rate ×{trial.rate:g}"]
    parts += [f"weight {trial.weight:g}"] if trial.weight else []
    parts += [f"energy {trial.energy:g}"] if trial.energy else []
    parts += [f"{100 * trial.share:g} % general"] if trial.method == "mixing" else []
    parts += [f"{trial.merged:g} of naive"] if trial.merged < 1 else []
    return ", ".join(parts)


def mean(values: Sequence[float]) -> str:
    """The mean and the standard deviation."""
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "–"


def paired(values: Sequence[float]) -> str:
    """The mean difference, the standard error of the mean, and how many differences exceed 0."""
    if len(values) < 2:
        return "–"
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    above = sum(value > 0 for value in values)
    return f"{np.mean(values):+.3f} ± {error:.3f} ({above} of {len(values)})"


def put(path: Path, section: str, content: str) -> None:
    """Replace what stands between the markers of a section in a document."""
    begin, end = (f"<!-- {word} {section} -->" for word in ("BEGIN", "END"))
    before, found, rest = path.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{path}: the markers of {section} are missing; put them back.")
    path.write_text(f"{before}{begin}\n{content.strip()}\n{end}{after}", encoding="utf-8")


def command_line(
    description: str,
    out: str,
    commands: Mapping[str, Callable[[Path, Log], None]],
    reports: Mapping[str, Callable[[Log], str]],
) -> int:
    """Run a command of a study, or print one of its reports; after a command, the first."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("command", choices=[*commands, *reports])
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--write", type=Path, help="document that the report is put into as well")
    parser.add_argument("--section", help="between which of its markers")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    log = Log(arguments.out / "trials.jsonl")
    if arguments.command in commands:
        with keep_compiled(arguments.out / "compiled"):
            commands[arguments.command](arguments.out, log)
    text = reports.get(arguments.command, next(iter(reports.values())))(log)
    print(text)
    if arguments.write:
        put(arguments.write, arguments.section, text)
    return 0
