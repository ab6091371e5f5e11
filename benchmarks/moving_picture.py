"""Draws the results of benchmarks/moving.py as SVG: milliseconds per token over time."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from planning.insight.picture import Drawing, clipped

_WIDTH, _HEIGHT = 720.0, 210.0
_LEFT, _RIGHT, _HEAD, _FOOT = 56.0, 20.0, 62.0, 26.0
_TOP = 62.0
_GREY, _LINE = "#6b7280", "#e5e7eb"
_STAYS, _MOVES = "#9ca3af", "#1d4ed8"

BIN_S = 2.0
"""Tokens of so many seconds are one point of a line: their median."""

BREAK_S = 8.0
"""A line is not drawn over a longer time without tokens."""

Point = tuple[float, float]


def moving_svg(result: Mapping[str, Any]) -> str:
    """Draw each scenario as a panel: grey where the model stays, blue where it moves."""
    rows = result["rows"]
    title = "Milliseconds per token while a shoal changes"
    note = f"grey: the model stays as it was; blue: it moves by itself; medians of {BIN_S:g} s"
    where = f"{result['machine']}, {result['date']}, load {result['load']:.1f}"
    drawing = Drawing(_WIDTH, _TOP + len(rows) * _HEIGHT, title)
    drawing.words(20, 28, clipped(title, _WIDTH - 40, 16), size=16, bold=True)
    drawing.words(_WIDTH - _RIGHT, 28, where, size=11, anchor="end", fill=_GREY)
    drawing.words(20, 47, clipped(note, _WIDTH - 40, 11), size=11, fill=_GREY)
    for number, row in enumerate(rows):
        _panel(drawing, _TOP + number * _HEIGHT, row)
    return drawing.text()


def binned(tokens: Sequence[Point]) -> list[Point]:
    """Return the median of each BIN_S seconds that has tokens."""
    found = []
    for number, group in itertools.groupby(tokens, lambda token: int(token[0] // BIN_S)):
        found.append(((number + 0.5) * BIN_S, statistics.median(took for _, took in group)))
    return found


def _panel(drawing: Drawing, top: float, row: Mapping[str, Any]) -> None:
    last_s: float = row["last_s"]
    lines = {
        setting: [point for point in binned(row[setting]["tokens"]) if point[0] <= last_s]
        for setting in ("off", "auto")
    }
    times_ms = [took for line in lines.values() for _, took in line]
    low, high = math.log(min(times_ms) / 1.2), math.log(max(times_ms) * 1.2)

    def x(at_s: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * at_s / last_s

    def y(took_ms: float) -> float:
        share = (math.log(took_ms) - low) / (high - low)
        return top + _HEIGHT - _FOOT - share * (_HEIGHT - _HEAD - _FOOT)

    longest = ", ".join(f"{row[key]['longest_ms']:.0f} ms {key}" for key in ("auto", "off"))
    drawing.words(20, top + 16, row["title"], size=13, bold=True)
    drawing.words(_WIDTH - _RIGHT, top + 16, f"longest pause {longest}", size=11, anchor="end")
    for value in _ticks(math.exp(low), math.exp(high)):
        drawing.path([(_LEFT, y(value)), (_WIDTH - _RIGHT, y(value))], stroke=_LINE, width=1)
        drawing.words(_LEFT - 6, y(value) + 4, f"{value:g} ms", size=10, anchor="end", fill=_GREY)
    for at_s in range(0, int(row["last_s"]) + 1, 60):
        drawing.words(x(at_s), top + _HEIGHT - 8, f"{at_s} s", size=10, anchor="middle", fill=_GREY)
    # Words of moves have a line of their own: a move often comes just before another change.
    marks = [(at, words, _GREY, 31) for at, words in row["auto"]["happened"]]
    moves = [move for move in row["auto"]["moves"] if move[1] in ("moved", "moving")]
    marks += [(at, "moves", _MOVES, 45) for at, _, _ in moves]
    for at, words, colour, below in marks:
        drawing.path(
            [(x(at), top + _HEAD - 12), (x(at), top + _HEIGHT - _FOOT)],
            stroke=colour,
            width=1,
            dashed=True,
        )
        drawing.words(x(at), top + below, words, size=10, anchor="middle", fill=colour)
    for setting, colour in (("off", _STAYS), ("auto", _MOVES)):
        for piece in _pieces(lines[setting]):
            drawing.path([(x(at), y(took)) for at, took in piece], stroke=colour, width=1.5)


def _pieces(line: Sequence[Point]) -> list[list[Point]]:
    """Cut a line where no tokens came for long. A piece has two points or more."""
    pieces: list[list[Point]] = [[]]
    for point in line:
        if pieces[-1] and point[0] - pieces[-1][-1][0] > BREAK_S:
            pieces.append([])
        pieces[-1].append(point)
    return [piece for piece in pieces if len(piece) > 1]


def _ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten within the range."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [step * 10.0**power for power in powers for step in (1, 2, 5)]
    return [value for value in found if low <= value <= high]
