"""Draws the results of benchmarks/serve.py as bars, as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from planning.insight.picture import Drawing, clipped

_WIDTH = 640.0
_LEFT, _RIGHT = 150.0, 80.0
_BAR, _GAP, _HEAD = 11.0, 8.0, 44.0
_INK, _GREY = "#1f2937", "#6b7280"
_BEFORE, _AFTER = "#9ca3af", "#1d4ed8"

Group = tuple[str, Sequence[tuple[float, str]]]
"""A label, and the values of its bars with their colours."""


def serving_svg(result: Mapping[str, Any]) -> str:
    """Draw turns of a chat, speeds with and without guesses, and times beside a long prompt."""
    chat = result["chat_first_s"]
    pairs = zip(chat["whole"], chat["kept"], strict=True)
    speeds = result["speeds"] | {f"{n} at once": one for n, one in result["together"].items()}
    beside = result["beside"]
    panels: list[tuple[str, str, list[Group]]] = [
        (
            "Seconds until the first token of a turn",
            "grey: the whole prompt runs; blue: a slot keeps the turns before",
            [
                (f"turn {turn}", [(whole, _BEFORE), (kept, _AFTER)])
                for turn, (whole, kept) in enumerate(pairs, 1)
            ],
        ),
        (
            "Tokens per second",
            "grey: no guesses; blue: guesses that are checked in one pass",
            [
                (name, [(one["plain_per_s"], _BEFORE), (one["guessed_per_s"], _AFTER)])
                for name, one in speeds.items()
            ],
        ),
        (
            "Milliseconds between tokens of running streams",
            "grey: undisturbed; blue: while a prompt of 1000 tokens enters",
            [
                ("median", [(beside["before_median_ms"], _BEFORE), (beside["median_ms"], _AFTER)]),
                (
                    "99th percentile",
                    [(beside["before_p99_ms"], _BEFORE), (beside["p99_ms"], _AFTER)],
                ),
            ],
        ),
    ]
    title = "Chats, repeated text and a long prompt over three hosts"
    note = (
        f"{result['delay_ms']:g} ms from host to host; medians of {result['rounds']} rounds; "
        f"{result['machine']}, {result['date']}, load {result['load']:.1f}"
    )
    height = 62.0 + sum(_height(groups) for _, _, groups in panels)
    drawing = Drawing(_WIDTH, height, title)
    drawing.words(20, 28, clipped(title, _WIDTH - 40, 16), size=16, bold=True)
    drawing.words(20, 47, clipped(note, _WIDTH - 40, 11), size=11, fill=_GREY)
    top = 62.0
    for panel in panels:
        _panel(drawing, top, *panel)
        top += _height(panel[2])
    return drawing.text()


def _height(groups: Sequence[Group]) -> float:
    return _HEAD + sum(len(bars) * _BAR + _GAP for _, bars in groups)


def _panel(drawing: Drawing, top: float, title: str, note: str, groups: Sequence[Group]) -> None:
    drawing.words(20, top + 16, title, size=13, bold=True)
    drawing.words(20, top + 32, note, size=11, fill=_GREY)
    peak = max(value for _, bars in groups for value, _ in bars)
    y = top + _HEAD
    for label, bars in groups:
        drawing.words(20, y + len(bars) * _BAR / 2 + 4, clipped(label, _LEFT - 30, 11), size=11)
        for value, colour in bars:
            length = (_WIDTH - _LEFT - _RIGHT) * value / peak
            drawing.box(_LEFT, y, max(length, 1.0), _BAR - 2, fill=colour)
            drawing.words(_LEFT + length + 6, y + _BAR - 2, f"{value:.3g}", size=10, fill=_INK)
            y += _BAR
        y += _GAP
