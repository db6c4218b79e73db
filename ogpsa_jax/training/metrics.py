"""What a run writes while it goes: metrics.jsonl, TensorBoard, and the curves at the end.

``metrics.jsonl`` holds one line per optimizer step and one per evaluation. Lines reach the disk
before the checkpoint of their step does, and a resumed run first drops the lines after its
checkpoint: no gaps, no doubles.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

Line = dict[str, Any]


class MetricsLog:
    """The metrics of one run directory, opened at the step a run resumes from."""

    def __init__(self, run_dir: Path, resume_step: int) -> None:
        self.path = run_dir / "metrics.jsonl"
        self.lines = [line for line in read_metrics(run_dir) if line["step"] <= resume_step]
        if resume_step == 0:
            self.lines = []
        rewritten = self.path.with_suffix(".tmp")
        rewritten.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        rewritten.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1)

    def write(self, line: Line) -> None:
        """Append a line; `line["step"]` counts optimizer steps from 1, 0 is before the first."""
        self.lines.append(line)
        self._file.write(json.dumps(line) + "\n")
        for name, value in line.items():
            if isinstance(value, int | float) and name != "step" and math.isfinite(value):
                self._board.add_scalar(name, value, line["step"])

    def flush(self) -> None:
        """Make everything written so far durable."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._board.flush()

    def close(self) -> None:
        """Flush and close."""
        self.flush()
        self._file.close()
        self._board.close()


def read_metrics(run_dir: Path) -> list[Line]:
    """All complete lines of a run's metrics; a torn last line is left out."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def draw_curves(lines: list[Line], path: Path) -> None:
    """Loss, held-out losses, removed fraction and learning rate over the steps, as a PNG."""
    from matplotlib.figure import Figure

    evaluations = sorted({name for line in lines for name in line if name.startswith("eval/")})
    panels = [
        ("training loss", ["loss"]),
        ("held-out", [name for name in evaluations if name.endswith("loss")]),
        ("squared norm removed", ["removed_fraction"]),
        ("gradient norm", ["grad_norm"]),
    ]
    figure = Figure(figsize=(10, 6), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(2, 2).flat, panels, strict=True):
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
        if drawn > 1:
            axes.legend(fontsize="small")
        elif not drawn:
            axes.text(0.5, 0.5, "not measured in this run", ha="center", transform=axes.transAxes)
    figure.savefig(path, dpi=120)
