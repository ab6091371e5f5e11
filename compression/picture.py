"""Draws the curve: what smaller models are worth, against the time of a token or their bytes."""

from __future__ import annotations

from collections.abc import Sequence

from compression.points import Point
from planning.insight.picture import Drawing, clipped

_WIDTH, _HEIGHT = 720.0, 440.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 70.0, 190.0, 50.0, 56.0
_GREY, _PALE = "#6b7280", "#e5e7eb"
_COLOURS = ("#1d4ed8", "#b45309", "#047857", "#7c3aed", "#be123c", "#0e7490")
_TICKS = 5


def curve_svg(
    title: str, points: Sequence[Point], chosen: Point | None = None, chosen_bits: str = ""
) -> str:
    """Draw a line for each width, solid for taught models and dashed for pruned ones.

    Upwards is exact match, or without questions the divergence, on an axis that falls. To the right
    is the predicted time of a token, or without a lab the size.

    chosen_bits: those of the chosen point, in words.
    """
    timed = all(point.latency_ms is not None for point in points)
    scored = all(point.exact_match is not None for point in points)
    drawing = Drawing(_WIDTH, _HEIGHT, title)
    drawing.words(20, 26, clipped(title, _WIDTH - 40, 16), size=16, bold=True)

    def across(point: Point) -> float:
        return (point.latency_ms or 0.0) if timed else point.bytes / 1e6

    def upward(point: Point) -> float:
        return (point.exact_match or 0.0) if scored else -point.kl

    shown = [*points, *([] if chosen is None else [chosen])]
    xs, ys = [across(point) for point in shown], [upward(point) for point in shown]
    x_range, y_range = _range(xs, floor=0.0), _range(ys, floor=0.0 if scored else None)
    labels = (
        "time of a token, ms, predicted" if timed else "stored, MB",
        "exact match, %" if scored else "KL to the original, nats per token",
    )
    _axes(drawing, x_range, y_range, labels, falls=not scored)

    def at(point: Point) -> tuple[float, float]:
        return _place(across(point), x_range, horizontal=True), _place(
            upward(point), y_range, horizontal=False
        )

    widths = sorted({point.bits for point in points}, reverse=True)
    row = _TOP + 12
    for number, bits in enumerate(widths):
        colour = _COLOURS[number % len(_COLOURS)]
        for distilled in (True, False):
            line = [
                one
                for one in points
                if one.bits == bits and (one.size >= 1 or one.distilled == distilled)
            ]
            if not any(one.size < 1 for one in line):
                continue
            line.sort(key=lambda one: -one.size)
            drawing.path([at(one) for one in line], stroke=colour, dashed=not distilled)
            for one in line:
                drawing.dot(*at(one), colour)
            x = _WIDTH - _RIGHT + 16
            drawing.path([(x, row - 4), (x + 26, row - 4)], stroke=colour, dashed=not distilled)
            how = "taught" if distilled else "pruned only"
            drawing.words(x + 34, row, f"{bits} bits, {how}", size=11)
            row += 18
    if chosen is not None:
        x, y = at(chosen)
        drawing.box(x - 7, y - 7, 14, 14, stroke="#be123c", radius=7, hint="chosen")
        drawing.words(_WIDTH - _RIGHT + 16, row + 8, f"chosen: {chosen.name},", size=11, bold=True)
        drawing.words(_WIDTH - _RIGHT + 16, row + 24, f"{chosen_bits} bits", size=11, bold=True)
    return drawing.text()


def _range(values: Sequence[float], floor: float | None) -> tuple[float, float]:
    low, high = min(values), max(values)
    if floor is not None:
        low = floor
    return (low, high) if high > low else (low, low + 1.0)


def _place(value: float, bounds: tuple[float, float], *, horizontal: bool) -> float:
    share = (value - bounds[0]) / (bounds[1] - bounds[0])
    if horizontal:
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)
    return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def _axes(
    drawing: Drawing,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    labels: tuple[str, str],
    *,
    falls: bool,
) -> None:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    for tick in range(_TICKS + 1):
        x = x_range[0] + (x_range[1] - x_range[0]) * tick / _TICKS
        y = y_range[0] + (y_range[1] - y_range[0]) * tick / _TICKS
        at_x, at_y = _place(x, x_range, horizontal=True), _place(y, y_range, horizontal=False)
        drawing.path([(at_x, _TOP), (at_x, bottom)], stroke=_PALE, width=1)
        drawing.path([(_LEFT, at_y), (right, at_y)], stroke=_PALE, width=1)
        drawing.words(at_x, bottom + 16, f"{x:.3g}", size=10, anchor="middle", fill=_GREY)
        shown = abs(y) if falls else y
        drawing.words(_LEFT - 8, at_y + 4, f"{shown:.3g}", size=10, anchor="end", fill=_GREY)
    drawing.words((_LEFT + right) / 2, _HEIGHT - 16, labels[0], size=12, anchor="middle")
    drawing.words(22, (_TOP + bottom) / 2, labels[1], size=12, anchor="middle", turned=True)
