"""Short labels beside points: none on another, none on a point, and on no line if need be."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_AWAY = (13.0, 20.0, 28.0, 38.0, 50.0, 64.0)  # of a label's middle from its point, in points
_ANGLES = 16
_WIDTH, _HEIGHT = 0.68, 1.05  # of a character, in font sizes
_MARKER = 5.0  # half of a marker's width, in points
OVERHANG = 5.0  # how far a label may stand out of the axes at the top, in points
_HIDES = 20  # how much worse it is to hide a label or a point than a bit of a line
_PARTS = 60  # of every piece of a line


@dataclass(frozen=True)
class Label:
    """A text that belongs to a point.

    Attributes:
      text: short.
      x: of the point, in data.
      y: of the point, in data.
      colour: of the line to the point.
    """

    text: str
    x: float
    y: float
    colour: str


@dataclass(frozen=True)
class _Box:
    x: float
    y: float
    half_width: float
    half_height: float

    def meets(self, other: "_Box") -> bool:
        return (
            abs(self.x - other.x) < self.half_width + other.half_width
            and abs(self.y - other.y) < self.half_height + other.half_height
        )

    def inside(self, width: float, height: float) -> bool:
        return (
            self.half_width <= self.x <= width - self.half_width
            and self.half_height <= self.y <= height - self.half_height + OVERHANG
        )


def place_labels(axes: Any, labels: Sequence[Label], size: float) -> None:
    """Write the labels on axes whose limits are final, each as near to its point as there is room.

    A label that had to go further away, or whose point lies on another, is tied to its point by a
    line.

    Args:
      axes: of matplotlib.
      labels: of all points on them.
      size: of the letters, in points.
    """
    axes.figure.draw_without_rendering()  # the layout decides how long the axes are
    frame, scale = axes.get_window_extent(), 72 / axes.figure.dpi
    width, height = frame.width * scale, frame.height * scale

    def in_points(pixels: Any) -> list[tuple[float, float]]:
        return [((x - frame.x0) * scale, (y - frame.y0) * scale) for x, y in pixels]

    points = in_points(axes.transData.transform([(label.x, label.y) for label in labels]))
    markers = [_Box(x, y, _MARKER, _MARKER) for x, y in points]
    on_lines = [_Box(x, y, 1, 1) for x, y in in_points(_along_lines(axes))]
    taken = list(markers)
    for label, marker, (x, y) in zip(labels, markers, points, strict=True):
        half = (len(label.text) * _WIDTH * size / 2, _HEIGHT * size / 2)
        boxes = [_Box(x + dx, y + dy, *half) for dx, dy in _offsets()]
        allowed = [box for box in boxes if box.inside(width, height)] or boxes
        chosen = min(
            allowed,
            key=lambda box: _HIDES * sum(map(box.meets, taken)) + sum(map(box.meets, on_lines)),
        )
        taken.append(chosen)
        offset = (chosen.x - x, chosen.y - y)
        tied = math.hypot(*offset) > _AWAY[0] + 1 or sum(map(marker.meets, markers)) > 1
        _write(axes, label, offset, size, tied)


def _along_lines(axes: Any) -> list[tuple[float, float]]:
    """Points close to each other on every line of the axes, in pixels."""
    drawn = [line for line in axes.lines if line.get_linestyle() != "None"]
    paths = [line.get_transform().transform_path(line.get_path()) for line in drawn]
    return [tuple(point) for path in paths for point in path.interpolated(_PARTS).vertices]


def _write(axes: Any, label: Label, offset: tuple[float, float], size: float, tied: bool) -> None:
    line = {"arrowstyle": "-", "color": label.colour, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
    note = axes.annotate(
        label.text,
        (label.x, label.y),
        xytext=offset,
        textcoords="offset points",
        ha="center",
        va="center",
        fontsize=size,
        arrowprops=line if tied else None,
        zorder=5,
        parse_math=False,
    )
    note.set_in_layout(False)


def _offsets() -> Iterator[tuple[float, float]]:
    """Where a label may stand, from its point: near places first, above before below."""
    order = sorted(range(_ANGLES), key=lambda i: (min(i, _ANGLES - i), i))
    for away in _AWAY:
        for step in order:
            angle = math.pi / 2 + 2 * math.pi * step / _ANGLES
            yield away * math.cos(angle), away * math.sin(angle)
