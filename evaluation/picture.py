"""Draws the figures of runs as SVG: one panel for each figure, with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from evaluation.bootstrap import Estimate
from evaluation.report import LABELS
from planning.insight.picture import Drawing, clipped

_WIDTH, _TOP, _PANEL, _ROW = 640.0, 44.0, 30.0, 20.0
_LEFT, _RIGHT = 170.0, 110.0
_INK, _GREY, _PALE, _COLOUR = "#1f2937", "#6b7280", "#d1d5db", "#1d4ed8"


def figures_svg(title: str, runs: Sequence[tuple[str, Mapping[str, Estimate]]]) -> str:
    """Draw each figure as a panel with a dot and an interval for each run.

    Those of the original model are left out, because they are equal in all runs.
    """
    names = [
        name
        for name in LABELS
        if not name.startswith("original_") and any(name in found for _, found in runs)
    ]
    height = _TOP + len(names) * (_PANEL + _ROW * len(runs)) + 16
    drawing = Drawing(_WIDTH, height, title)
    drawing.words(20, 26, clipped(title, _WIDTH - 40, 16), size=16, bold=True)
    y = _TOP
    for name in names:
        _panel(drawing, y, name, runs)
        y += _PANEL + _ROW * len(runs)
    return drawing.text()


def _panel(
    drawing: Drawing, top: float, name: str, runs: Sequence[tuple[str, Mapping[str, Estimate]]]
) -> None:
    drawing.words(20, top + 18, LABELS[name], size=12, bold=True)
    shown = [found[name] for _, found in runs if name in found]
    edges = [edge for one in shown for edge in (one.low, one.value, one.high)]
    low, high = min(edges), max(edges)
    room = _WIDTH - _LEFT - _RIGHT
    ends_at = _WIDTH - _RIGHT
    scale = f"from {low:.3g} to {high:.3g}"
    drawing.words(ends_at, top + 18, scale, size=10, anchor="end", fill=_GREY)

    def across(value: float) -> float:
        share = (value - low) / (high - low) if high > low else 0.5
        return _LEFT + room * share if math.isfinite(share) else _LEFT + room

    for row, (run, found) in enumerate(runs):
        y = top + _PANEL + _ROW * row + 4
        drawing.words(20, y + 4, clipped(run, _LEFT - 36, 11), size=11)
        drawing.path([(_LEFT, y), (ends_at, y)], stroke=_PALE, width=1)
        if name in found:
            one = found[name]
            ends = [(across(one.low), y), (across(one.high), y)]
            drawing.path(ends, stroke=_COLOUR, width=3, opacity=0.5)
            drawing.dot(across(one.value), y, _COLOUR)
            drawing.words(ends_at + 12, y + 4, f"{one.value:.4g}", size=11, fill=_INK)
