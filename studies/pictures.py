"""Pictures of studies as SVG: points over two logarithmic axes, and the weights of a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from planning.insight.picture import Drawing, clipped

_INK, _GREY, _PALE = "#1f2937", "#6b7280", "#d1d5db"
COLOURS = ("#1d4ed8", "#ea580c", "#15803d", "#7c3aed", "#b91c1c", "#0891b2", "#a16207", "#be185d")

_PANEL_WIDTH, _PANEL_HEIGHT, _COLUMNS = 400.0, 300.0, 3
_LEFT, _RIGHT, _TOP, _BOTTOM = 78.0, 18.0, 66.0, 74.0
_LEGEND_ROW = 18.0
_SMALLEST = 1e-12
"""Values on a logarithmic axis are at least this."""


@dataclass(frozen=True, slots=True)
class Group:
    """Points with one colour and one name. ``joined`` draws a line through them."""

    label: str
    points: tuple[tuple[float, float], ...]
    joined: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """One diagram of groups of points. ``log_x`` and ``log_y`` choose the axes."""

    title: str
    x_label: str
    y_label: str
    groups: tuple[Group, ...]
    log_x: bool = True
    log_y: bool = True


def panels_svg(title: str, note: str, panels: Sequence[Panel]) -> str:
    """Draw panels in rows of three, with one legend of their groups below them."""
    shown = [panel for panel in panels if any(group.points for group in panel.groups)]
    labels = list(dict.fromkeys(group.label for panel in shown for group in panel.groups))
    columns = min(_COLUMNS, max(1, len(shown)))
    width = columns * _PANEL_WIDTH
    below = _TOP + -(-len(shown) // columns) * _PANEL_HEIGHT
    height = below + _LEGEND_ROW * -(-len(labels) // (2 * columns)) + 16
    drawing = Drawing(width, height, title)
    drawing.words(20, 26, clipped(title, width - 40, 16), size=16, bold=True)
    drawing.words(20, 44, clipped(note, width - 40, 11), size=11, fill=_GREY)
    colours = {label: COLOURS[index % len(COLOURS)] for index, label in enumerate(labels)}
    for index, panel in enumerate(shown):
        row, column = divmod(index, columns)
        corner = column * _PANEL_WIDTH, _TOP + row * _PANEL_HEIGHT
        _panel(drawing, corner, panel, colours)
    room = width / (2 * columns)
    for index, label in enumerate(labels):
        row, column = divmod(index, 2 * columns)
        x, y = 24 + column * room, below + 8 + row * _LEGEND_ROW
        drawing.dot(x, y - 4, colours[label])
        drawing.words(x + 9, y, clipped(label, room - 40, 11), size=11)
    return drawing.text()


def weights_svg(
    title: str, note: str, edges: npt.NDArray[np.float64], counts: npt.NDArray[np.int64]
) -> str:
    """Draw the share of weights in each bin, with a logarithmic height."""
    width, height = 640.0, 360.0
    drawing = Drawing(width, height, title)
    drawing.words(20, 26, clipped(title, width - 40, 16), size=16, bold=True)
    drawing.words(20, 44, clipped(note, width - 40, 11), size=11, fill=_GREY)
    shares = counts / max(1, int(counts.sum()))
    axis = _Axis([share for share in shares.tolist() if share > 0] or [1.0], logarithmic=True)
    bottom, room = height - 44, height - 44 - _TOP
    for mark in axis.marks:
        y = bottom - room * axis.share(mark)
        drawing.path([(_LEFT, y), (width - _RIGHT, y)], stroke=_PALE, width=1)
        drawing.words(_LEFT - 8, y + 4, f"{mark:g}", size=11, anchor="end")
    across = (width - _RIGHT - _LEFT) / (edges[-1] - edges[0])
    for low, high, share in zip(edges[:-1], edges[1:], shares, strict=True):
        if share > 0:
            tall = room * max(axis.share(float(share)), 0.004)
            x = _LEFT + across * (low - edges[0])
            wide = across * (high - low)
            drawing.box(x, bottom - tall, max(wide - 0.5, 0.5), tall, fill=COLOURS[0])
    for mark in np.linspace(edges[0], edges[-1], 5).tolist():
        x = _LEFT + across * (mark - edges[0])
        drawing.words(x, bottom + 18, f"{mark:g}", size=11, anchor="middle")
    drawing.words((_LEFT + width - _RIGHT) / 2, height - 8, "weight", size=12, anchor="middle")
    drawing.words(20, (_TOP + bottom) / 2, "share of weights", anchor="middle", turned=True)
    return drawing.text()


class _Axis:
    """The range of values and its marks, on a logarithmic or a plain axis.

    ``logarithmic`` asks for the former, if the values need it.
    """

    def __init__(self, values: Sequence[float], *, logarithmic: bool) -> None:
        # Within one power of ten, a plain axis shows more.
        self._is_log = logarithmic and max(values) > 10 * max(min(values), _SMALLEST)
        if self._is_log:
            first = math.floor(min(map(_log, values)) + 1e-9)
            last = max(math.ceil(max(map(_log, values)) - 1e-9), first + 1)
            powers = range(first, last + 1, -(-(last - first) // 6))
            self._low, self._high = float(first), float(last)
            self.marks = [10.0**power for power in powers]
            return
        low, high = min(values), max(values)
        step = _round((high - low) / 4 or abs(high) / 4 or 1.0)
        self._low = step * math.floor(low / step + 1e-9)
        self._high = max(step * math.ceil(high / step - 1e-9), self._low + step)
        count = round((self._high - self._low) / step)
        self.marks = [self._low + index * step for index in range(count + 1)]

    def share(self, value: float) -> float:
        """Where a value is between the ends, from 0 to 1."""
        at = _log(value) if self._is_log else value
        return (at - self._low) / (self._high - self._low)


def _panel(
    drawing: Drawing, corner: tuple[float, float], panel: Panel, colours: dict[str, str]
) -> None:
    x = corner[0]
    points = [point for group in panel.groups for point in group.points]
    across = _Axis([point[0] for point in points], logarithmic=panel.log_x)
    up = _Axis([point[1] for point in points], logarithmic=panel.log_y)
    left, right = x + _LEFT, x + _PANEL_WIDTH - _RIGHT
    top, bottom = corner[1] + 18, corner[1] + _PANEL_HEIGHT - _BOTTOM + 18

    def place(point: tuple[float, float]) -> tuple[float, float]:
        return (
            left + across.share(point[0]) * (right - left),
            bottom - up.share(point[1]) * (bottom - top),
        )

    drawing.words(left, top - 12, clipped(panel.title, right - left, 12), size=12, bold=True)
    for mark in up.marks:
        y = bottom - up.share(mark) * (bottom - top)
        drawing.path([(left, y), (right, y)], stroke=_PALE, width=1)
        drawing.words(left - 7, y + 4, f"{mark:.3g}", size=10, anchor="end", fill=_INK)
    for mark in across.marks:
        at = left + across.share(mark) * (right - left)
        drawing.path([(at, bottom), (at, bottom + 4)], stroke=_INK, width=1)
        drawing.words(at, bottom + 16, f"{mark:.3g}", size=10, anchor="middle", fill=_INK)
    drawing.words((left + right) / 2, bottom + 36, panel.x_label, size=11, anchor="middle")
    drawing.words(x + 18, (top + bottom) / 2, panel.y_label, size=11, anchor="middle", turned=True)
    for group in panel.groups:
        places = [place(point) for point in group.points]
        if group.joined and len(places) > 1:
            drawing.path(places, stroke=colours[group.label], width=1.5, opacity=0.7)
        for left_at, up_at in places:
            drawing.dot(left_at, up_at, colours[group.label])


def _log(value: float) -> float:
    return math.log10(max(value, _SMALLEST))


def _round(rough: float) -> float:
    """The next round number from ``rough`` up."""
    power = 10.0 ** math.floor(math.log10(rough))
    return float(next(power * factor for factor in (1, 2, 2.5, 5, 10) if rough <= power * factor))
