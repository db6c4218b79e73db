"""What a run writes: metrics.jsonl and TensorBoard during training, curves at the end.

``metrics.jsonl`` contains one line per optimizer step and one per evaluation. Lines reach the disk
before the checkpoint of their step does, and a resumed run first drops the lines after its
checkpoint: no gaps, no doubles.
"""

import contextlib
import itertools
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from tensorboardX import SummaryWriter

from ogpsa_jax.config import RunConfig
from ogpsa_jax.config.sections import OgpsaSection
from ogpsa_jax.errors import InputError
from ogpsa_jax.files import write_whole
from ogpsa_jax.runs import Change, RunDir
from ogpsa_jax.training.verdict import (
    judge_first_basis,
    judge_references,
    paired_change,
)

logger = logging.getLogger(__name__)
Line = dict[str, Any]
LEAST_KEPT = 0.9
"""Share of an update, or of its effect, below which a warning reports rounding."""


class MetricsLog:
    """The metrics of one run directory, opened at the step a run resumes from.

    Of several processes the first alone writes, and alone knows the lines of before a resume.

    Args:
      run_dir: the run directory.
      resume_step: lines after this step are dropped; 0: all lines are.

    Raises:
      InputError: the file cannot be written.
    """

    def __init__(self, run_dir: Path, resume_step: int) -> None:
        self.path = RunDir(run_dir).metrics
        self.lines: list[Line] = []
        self._file = self._board = None
        if jax.process_index() > 0:
            return
        if resume_step > 0:
            self.lines = [line for line in read_metrics(run_dir) if line["step"] <= resume_step]
            known = {line["step"] for line in self.lines if "loss" in line}
            if missing := resume_step - len(known):
                logger.warning(
                    "%s lacks %d of the %d steps before the checkpoint; it was changed or torn",
                    *(self.path, missing, resume_step),
                )
        with self._told():
            write_whole(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))
            self._file = self.path.open("a", encoding="utf-8")
            self._board = SummaryWriter(
                str(run_dir / "tensorboard"), purge_step=resume_step + 1 if resume_step else 0
            )

    def write(self, line: Line) -> None:
        """Append a line; `line["step"]` counts optimizer steps from 1, 0 is before the first."""
        self.lines.append(line)
        if self._file is None or self._board is None:
            return
        with self._told():
            self._file.write(json.dumps(line) + "\n")
            for name, value in line.items():
                if isinstance(value, int | float) and name != "step" and math.isfinite(value):
                    self._board.add_scalar(name, value, line["step"])

    def show(self, step: int, values: Line) -> None:
        """Write values to TensorBoard alone."""
        if self._board is None:
            return
        with self._told():
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        """Make everything written so far durable."""
        if self._file is None or self._board is None:
            return
        with self._told():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._board.flush()

    def close(self) -> None:
        """Flush and close."""
        if self._file is None or self._board is None:
            return
        self.flush()
        self._file.close()
        self._board.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"{self.path.parent}: the metrics cannot be written ({error.strerror}); fix this "
                "and run the same command again: it resumes from the newest checkpoint."
            ) from error


def read_metrics(run_dir: Path) -> list[Line]:
    """A run's metrics up to the first line that is not whole, which is left out."""
    path = RunDir(run_dir).metrics
    if not path.exists():
        return []
    lines = []
    for text in path.read_bytes().splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # neither UTF-8 nor JSON
            break
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            break
        lines.append(line)
    return lines


def find_problems(lines: Sequence[Line]) -> dict[str, str]:
    """Silent failures in these steps: kind -> a sentence; empty if there are none."""
    steps = [line for line in lines if "loss" in line]
    problems = {}

    def report(kind: str, bad: list[Line], sentence: str) -> None:
        if bad:
            where = f"step {bad[0]['step']}" + (f" and {len(bad) - 1} more" if bad[1:] else "")
            problems[kind] = f"{where}: {sentence}"

    report(
        "loss",
        [line for line in steps if not math.isfinite(line["loss"])],
        "the loss was not finite; lower optimizer.learning_rate, or look at the data",
    )
    report(
        "rank",
        # Where the model still predicts what the initial model does, there is nothing to protect.
        [
            line
            for line in steps
            if line.get("effective_rank") == 0 and line.get("reference/loss") != 0
        ],
        "the basis was empty, so nothing was projected; the reference gradients are zero or not "
        "finite",
    )
    report(
        "refused",
        [
            line
            for before, line in zip([{}, *steps], steps, strict=False)
            if line.get("refused_refreshes", 0) > before.get("refused_refreshes", 0)
        ],
        "a reference gradient was not finite, so the basis was left as it was",
    )
    return problems


def find_lost_updates(lines: Sequence[Line], config: RunConfig) -> dict[str, str]:
    """The same for updates that rounding kept from the parameters.

    Steps at a tenth of the peak learning rate or less do not count: what they lose is little. What
    float32 parameters lose has no better type: another warning reports too low a rate.
    """
    if config.model.param_dtype == "float32":
        return {}
    peak_rate = config.optimizer.learning_rate
    steps = [
        line
        for line in lines
        if "applied_fraction" in line and line["learning_rate"] > 0.1 * peak_rate
    ]
    whole = sum(line["update_norm"] for line in steps)
    if not math.isfinite(whole) or whole <= 0:
        return {}
    share = sum(line["applied_fraction"] * line["update_norm"] for line in steps) / whole
    if not share < LEAST_KEPT:
        return {}
    return {
        "applied": f"steps {steps[0]['step']} to {steps[-1]['step']}: only {share:.1%} of the "
        "updates reached the parameters, whose type is too coarse for the rest; set "
        "model.param_dtype to float32, or optimizer.stochastic_rounding to true"
    }


def find_capped(lines: Sequence[Line], section: OgpsaSection) -> dict[str, str]:
    """The same for a subspace of inputs whose rank is too small for the energy that was asked."""
    if section.subspace != "inputs" or section.energy is None:
        return {}
    held = [line["least_coverage"] for line in lines if "least_coverage" in line]
    if not held or min(held) >= section.energy - 1e-3:  # a share is known to float32's precision
        return {}
    if min(held) == 0:
        return {
            "capped": "some layer's inputs are zero on all reference rows, so it is not "
            "protected; use other rows if it matters"
        }
    return {
        "capped": f"the subspace covers only {min(held):.1%} of some layer's inputs, less than "
        f"ogpsa.energy ({section.energy:g}), because ogpsa.rank ({section.rank}) caps it; raise "
        "the rank, or lower the energy"
    }


def find_noise(lines: Sequence[Line], config: RunConfig) -> dict[str, str]:
    """The same for a first basis that has little to do with the references; of a run's lines."""
    if not config.projects or config.ogpsa.refresh is None:
        return {}
    refreshes = (line for line in lines if line.get("refreshed"))
    sentence = judge_first_basis(list(itertools.islice(refreshes, 2)), config.ogpsa.refresh.shown)
    return {"noise": sentence} if sentence else {}


def held_out_changes(lines: Sequence[Line]) -> dict[str, tuple[float, Change]]:
    """By held-out set, the loss before the first step and its change to the end of the run.

    Only of sets whose rows were measured both times.
    """
    measured = [line for line in lines if "rows" in line]
    if len(measured) < 2 or measured[0]["step"] != 0:
        return {}
    before, after = measured[0], measured[-1]
    found = {}
    for name, rows in before["rows"].items():
        later = after["rows"].get(name)
        if later is not None and later["weight"] == rows["weight"]:
            change = paired_change(rows["loss"], later["loss"], rows["weight"])
            found[name] = (before[f"eval/{name}/loss"], change)
    return found


def find_foreign_references(lines: Sequence[Line], config: RunConfig) -> list[str]:
    """Which reference sets contain answers that the model would not give, as measured at step 0."""
    in_step = config.references.in_step
    replayed = config.projects and in_step is not None and in_step.replay_weight > 0
    found = []
    for line in lines:
        for number in range(len(config.references.sets)):
            name = f"references.{number}"
            if f"{name}/entropy" in line:
                loss, entropy = line[f"{name}/loss"], line[f"{name}/entropy"]
                found.append(judge_references(name, loss, entropy, replayed))
    return [sentence for sentence in found if sentence]


def draw_curves(lines: list[Line], path: Path) -> None:
    """Losses, removed fraction, gradient norm and what refreshes found over the steps, as a PNG."""
    from matplotlib.figure import Figure

    evaluations = sorted({name for line in lines for name in line if name.startswith("eval/")})
    losses = [name for name in evaluations if name.endswith("/loss")]
    # A set of pairs has a margin; its loss, per pair, is not in nats per token.
    pairs = [name for name in losses if name.removesuffix("loss") + "rewards_margin" in evaluations]
    panels = [
        ("training loss", ["loss"]),
        ("held-out loss, nats per token", [name for name in losses if name not in pairs]),
        ("squared norm removed", ["removed_fraction"]),
        ("gradient norm", ["grad_norm"]),
    ]
    if pairs:
        margins = [name.removesuffix("loss") + "rewards_margin" for name in pairs]
        panels += [("held-out preference loss", pairs), ("held-out reward margin", margins)]
    captured = "reference/captured_fraction"
    if any(captured in line for line in lines):
        names = sorted(
            {n for line in lines for n in line if re.fullmatch(r"references\.\d+/loss", n)}
        )
        of_basis = [captured, "reference/gradient_cosine"]
        panels += [
            ("reference loss, at refreshes", names),
            ("of the basis, at refreshes", of_basis),
        ]
    figure = Figure(figsize=(10, 3 * len(panels) // 2), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(len(panels) // 2, 2).flat, panels, strict=True):
        drawn = 0
        for name in names:
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                axes.plot(
                    *zip(*points, strict=True), marker="." if len(points) < 3 else "", label=name
                )
                drawn += 1
        axes.set_title(title)
        axes.set_xlabel("optimizer step")
        if drawn > 1 or (drawn and names[0].startswith("eval/")):  # sets are named, even one
            axes.legend(fontsize="small")
        elif not drawn:
            axes.text(0.5, 0.5, "not measured in this run", ha="center", transform=axes.transAxes)
    figure.savefig(path, dpi=120)
