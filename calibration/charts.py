"""Draws measurements as SVG: a roofline, and a heat map of sensitivities."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

_INK, _PALE = "#222", "#ddd"
_COLOURS = {
    2: "#cc79a7",
    3: "#e69f00",
    4: "#0072b2",
    5: "#56b4e9",
    6: "#7a4e2d",
    8: "#d55e00",
    16: "#000000",
    32: "#009e73",
}
"""The colour of each width, the same in every picture.

Colour-blind readers can tell them apart too (mostly Okabe and Ito's).
"""
_OTHER = "#777777"

_WIDTH, _HEIGHT = 760.0, 500.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 70.0, 20.0, 50.0, 55.0


@dataclass(frozen=True, slots=True)
class RooflinePoint:
    """A measured call: its operations, the bytes it moves at least, and its seconds."""

    label: str
    container_bits: int
    flops: int
    moved_bytes: int
    seconds: float
    long_context: bool
    prefill: bool = False
    """Whether it runs many tokens of a prompt at once, instead of one decoded token."""


def roofline_svg(
    title: str,
    read_bytes_per_s: float,
    flops: Mapping[int, float],
    points: Sequence[RooflinePoint],
) -> str:
    """Draw points against the measured ceilings: memory bandwidth, and each width's arithmetic.

    ``flops`` maps an executed width to operations per second of the fastest call. If a point was
    faster, it sets the ceiling of its width. At least one width is needed.
    """
    flops = dict(flops)
    for point in points:
        rate = point.flops / point.seconds
        flops[point.container_bits] = max(flops.get(point.container_bits, 0.0), rate)
    intensities = [point.flops / point.moved_bytes for point in points]
    rates = [point.flops / point.seconds for point in points]
    ridges = [rate / read_bytes_per_s for rate in flops.values()]
    horizontal = _Log(
        (*intensities, *ridges), _LEFT, _WIDTH - _RIGHT, "floating-point operations per byte"
    )
    low = horizontal.low * read_bytes_per_s
    vertical = _Log((*rates, *flops.values(), low), _HEIGHT - _BOTTOM, _TOP, "GFLOP/s")
    legend = [
        (_colour(bits), f"{bits} bits as executed" + f", at best {flops[bits] / 1e9:.1f} GFLOP/s")
        for bits in sorted(flops)
    ]
    kinds = _kinds(points)
    below = 16 * max(len(legend), len(kinds)) + 12
    picture = _Picture(_WIDTH, _HEIGHT + below, _clipped(title))
    for axis, upright in ((horizontal, False), (vertical, True)):
        for value in axis.ticks():
            _tick(picture, axis, value, upright, 1e-9 if upright else 1.0)
    picture.text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 12, horizontal.label, "middle")
    picture.text(14, _TOP - 11, vertical.label, "start")
    top = max(flops.values())
    ridge = min(top / read_bytes_per_s, horizontal.high)
    picture.line(
        [(horizontal.at(x), vertical.at(x * read_bytes_per_s)) for x in (horizontal.low, ridge)],
        _INK,
    )
    # Above the sloped line there can be no point. The right end of the text must not touch the
    # line.
    bandwidth = f"memory read {read_bytes_per_s / 1e9:.1f} GB/s"
    reach = horizontal.value(_LEFT + 14 + 7 * len(bandwidth))
    above = vertical.at(min(reach * read_bytes_per_s, top)) - 8
    picture.text(_LEFT + 8, above if above > _TOP + 12 else _TOP - 8, bandwidth, "start")
    for bits, rate in sorted(flops.items()):
        begin = max(rate / read_bytes_per_s, horizontal.low)
        picture.line(
            [(horizontal.at(x), vertical.at(rate)) for x in (begin, horizontal.high)],
            _colour(bits),
        )
    for point, intensity, rate in zip(points, intensities, rates, strict=True):
        x, y = horizontal.at(intensity), vertical.at(rate)
        colour = _colour(point.container_bits)
        picture.mark(x, y, colour, point.long_context, point.label, square=point.prefill)
    _draw_legend(picture, legend, kinds)
    return picture.svg()


def _draw_legend(
    picture: _Picture, widths: Sequence[tuple[str, str]], kinds: Sequence[tuple[bool, bool, str]]
) -> None:
    """Draw below a roofline: (colour, text) of each width, (square, hollow, text) of each mark."""
    for index, (colour, text) in enumerate(widths):
        y = _HEIGHT + 12 + 16.0 * index
        picture.mark(_LEFT + 4, y - 4, colour, False, text)
        picture.text(_LEFT + 16, y, text, "start")
    for index, (square, hollow, text) in enumerate(kinds):
        y = _HEIGHT + 12 + 16.0 * index
        picture.mark(_WIDTH / 2 + 44, y - 4, _INK, hollow, text, square=square)
        picture.text(_WIDTH / 2 + 56, y, text, "start")


def heatmap_svg(
    title: str, columns: Sequence[str], rows: Sequence[str], values: Mapping[tuple[int, int], float]
) -> str:
    """Draw ``values`` by (row, column), coloured by their logarithm. Missing values stay empty."""
    cell, height, left, top = 62.0, 30.0, 70.0, 70.0
    positive = [value for value in values.values() if value > 0]
    low = math.log10(min(positive, default=1e-9))
    high = max(math.log10(max(positive, default=1.0)), low + 1e-9)
    # The title must fit, too.
    width = max(left + cell * len(columns) + 20, 28 + 8.5 * len(title))
    picture = _Picture(width, top + height * len(rows) + 20, title)
    for column, name in enumerate(columns):
        picture.text(left + cell * (column + 0.5), top - 8, name, "middle", size=11)
    for row, name in enumerate(rows):
        picture.text(left - 8, top + height * (row + 0.5) + 4, name, "end")
        for column in range(len(columns)):
            value = values.get((row, column))
            if value is None:
                continue
            share = (math.log10(value) - low) / (high - low) if value > 0 else 0.0
            x, y = left + cell * column, top + height * row
            picture.box(x, y, cell, height, _heat(share))
            colour = "#fff" if share > 0.55 else _INK
            shown = f"{value:.1e}" if value else "0"
            picture.text(x + cell / 2, y + height / 2 + 4, shown, "middle", colour, 11)
    return picture.svg()


class _Log:
    """A logarithmic axis from pixel to pixel, over the whole decades that hold ``values``."""

    def __init__(self, values: Iterable[float], first: float, last: float, label: str) -> None:
        found = [math.log10(value) for value in values if value > 0]
        self._low, self._high = math.floor(min(found)), math.floor(max(found)) + 1
        self._first, self._last = first, last
        self.label = label

    @property
    def low(self) -> float:
        return 10.0**self._low

    @property
    def high(self) -> float:
        return 10.0**self._high

    def at(self, value: float) -> float:
        share = (math.log10(value) - self._low) / (self._high - self._low)
        return self._first + share * (self._last - self._first)

    def value(self, pixel: float) -> float:
        """Return the value at a pixel. The inverse of ``at``."""
        share = (pixel - self._first) / (self._last - self._first)
        return float(10.0 ** (self._low + share * (self._high - self._low)))

    def ticks(self) -> list[float]:
        return [10.0**power for power in range(self._low, self._high + 1)]


class _Picture:
    """The elements of an SVG file, in the order in which they are drawn."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self._head = (
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width:.0f} {height:.0f}' "
            f"width='{width:.0f}' height='{height:.0f}' role='img'><title>{escape(title)}</title>"
        )
        self._parts: list[str] = []
        self.box(0, 0, width, height, "#fff")
        self.text(14, 22, title, "start", size=14)

    def text(
        self, x: float, y: float, text: str, anchor: str, colour: str = _INK, size: int = 12
    ) -> None:
        self._parts.append(
            f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' fill='{colour}' "
            f"font-family='sans-serif' font-size='{size}'>{escape(text)}</text>"
        )

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float = 2) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self._parts.append(
            f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='{width:g}'/>"
        )

    def box(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        self._parts.append(
            f"<rect x='{x:.1f}' y='{y:.1f}' width='{width:.1f}' height='{height:.1f}' "
            f"fill='{colour}'/>"
        )

    def mark(
        self, x: float, y: float, colour: str, hollow: bool, label: str, *, square: bool = False
    ) -> None:
        look = f"fill='{'#fff' if hollow else colour}' stroke='{colour}' stroke-width='1.5'"
        title = f"<title>{escape(label)}</title>"
        if square:
            shape = f"<rect x='{x - 3.5:.1f}' y='{y - 3.5:.1f}' width='7' height='7' {look}>"
            self._parts.append(f"{shape}{title}</rect>")
        else:
            shape = f"<circle cx='{x:.1f}' cy='{y:.1f}' r='4' {look}>"
            self._parts.append(f"{shape}{title}</circle>")

    def svg(self) -> str:
        return "\n".join([self._head, *self._parts, "</svg>", ""])


def _tick(picture: _Picture, axis: _Log, value: float, upright: bool, unit: float) -> None:
    at = axis.at(value)
    shown = f"{value * unit:g}"
    if upright:
        picture.line([(_LEFT, at), (_WIDTH - _RIGHT, at)], _PALE, 1)
        picture.text(_LEFT - 6, at + 4, shown, "end")
    else:
        picture.line([(at, _TOP), (at, _HEIGHT - _BOTTOM)], _PALE, 1)
        picture.text(at, _HEIGHT - _BOTTOM + 17, shown, "middle")


def _kinds(points: Sequence[RooflinePoint]) -> list[tuple[bool, bool, str]]:
    """Return the marks in use: square, hollow, and their meaning."""
    return [
        (square, hollow, f"{'prefill' if square else 'decode'}, {length} context")
        for square in (False, True)
        for hollow, length in ((False, "short"), (True, "long"))
        if any((point.prefill, point.long_context) == (square, hollow) for point in points)
    ]


def _colour(bits: int) -> str:
    return _COLOURS.get(bits, _OTHER)


def _clipped(title: str) -> str:
    """Shorten a title to the picture's width, at 14 pixels a letter's height."""
    most = int((_WIDTH - 28) / 8.5)
    return title if len(title) <= most else title[: most - 1] + "\u2026"


def _heat(share: float) -> str:
    """Pale yellow over red to dark, by linear interpolation."""
    stops = ((255, 247, 214), (240, 110, 60), (90, 10, 60))
    scaled = min(max(share, 0.0), 1.0) * (len(stops) - 1)
    index = min(int(scaled), len(stops) - 2)
    part = scaled - index
    mixed = (round(a + (b - a) * part) for a, b in zip(stops[index], stops[index + 1], strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)
