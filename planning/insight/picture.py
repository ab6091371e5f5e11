"""Drawings as SVG text: a plan over its devices, and curves of a study.

Written by hand, with nothing but rectangles, lines and words, so that any viewer shows them.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

from model.spec import ModelSpec
from planning.insight.team import layer_fraction
from planning.plan import Plan, Stage
from wire.sizes import format_size

COLOURS = {
    2: "#7f1d1d",
    3: "#b91c1c",
    4: "#ea580c",
    5: "#d97706",
    6: "#ca8a04",
    8: "#15803d",
    16: "#1d4ed8",
    32: "#4c1d95",
}
"""Colours by bits. Warm is coarse, cold is fine."""

_INK, _PALE, _LINE = "#1f2937", "#6b7280", "#d1d5db"
_FONT = "font-family='Helvetica, Arial, sans-serif'"

_BLOCK, _SPACE = 20, 3
_PER_ROW = 8
_BOX_WIDTH = _PER_ROW * (_BLOCK + _SPACE) - _SPACE + 24
_GAP = 92
_COLUMNS = 4
_MEMBER, _SUMS = 25, 16
"""Heights of the lines about one member of a team, and about its sums."""
_MARGIN = 28
_LEGEND = "E embedding, H head, numbers: layers"


class Drawing:
    """An SVG file of elements in order. ``text()`` is its contents."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self._head = (
            f"<svg xmlns='http://www.w3.org/2000/svg' width='{width:g}' height='{height:g}'"
            f" viewBox='0 0 {width:g} {height:g}' role='img'>\n"
            f"<title>{escape(title)}</title>\n"
            "<defs><marker id='tip' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='7'"
            f" markerHeight='7' orient='auto'><path d='M0 0L8 4L0 8z' fill='{_INK}'/></marker>"
            "</defs>\n"
            f"<rect width='{width:g}' height='{height:g}' fill='white'/>\n"
        )
        self._parts: list[str] = []

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        *,
        fill: str = "none",
        stroke: str = "none",
        radius: float = 0,
        hint: str = "",
    ) -> None:
        """Add a rectangle. Viewers show ``hint`` at the pointer."""
        inner = f"<title>{escape(hint)}</title>" if hint else ""
        self._parts.append(
            f"<rect x='{x:.1f}' y='{y:.1f}' width='{width:.1f}' height='{height:.1f}'"
            f" rx='{radius:g}' fill={quoteattr(fill)} stroke={quoteattr(stroke)}>{inner}</rect>"
        )

    def words(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 12,
        anchor: str = "start",
        fill: str = _INK,
        bold: bool = False,
        turned: bool = False,
    ) -> None:
        """Add text with its baseline at (x, y). ``turned`` text runs upwards."""
        weight = " font-weight='bold'" if bold else ""
        turn = f" transform='rotate(-90 {x:.1f} {y:.1f})'" if turned else ""
        self._parts.append(
            f"<text x='{x:.1f}' y='{y:.1f}' {_FONT} font-size='{size:g}' fill='{fill}'"
            f" text-anchor='{anchor}'{weight}{turn}>{escape(text)}</text>"
        )

    def path(
        self,
        points: Sequence[tuple[float, float]],
        *,
        stroke: str = _INK,
        width: float = 1.5,
        fill: str = "none",
        dashed: bool = False,
        tip: bool = False,
        opacity: float = 1.0,
    ) -> None:
        """Add straight lines through ``points``. ``tip`` ends them in an arrow."""
        where = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        extra = (" stroke-dasharray='5 4'" if dashed else "") + (
            " marker-end='url(#tip)'" if tip else ""
        )
        self._parts.append(
            f"<path d='{where}' fill='{fill}' stroke='{stroke}' stroke-width='{width:g}'"
            f" opacity='{opacity:g}'{extra}/>"
        )

    def dot(self, x: float, y: float, colour: str) -> None:
        self._parts.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3' fill='{colour}'/>")

    def text(self) -> str:
        return self._head + "\n".join(self._parts) + "\n</svg>\n"


def plan_svg(plan: Plan, spec: ModelSpec, title: str, unused: Sequence[str] = ()) -> str:
    """A plan as an SVG file: stages in order, each block coloured by its bits, hops with their ms.

    A stage of a team shows its members with their shares.

    ``unused`` names the devices that the plan leaves out. All times are predictions.
    """
    stages = plan.stages
    columns = min(_COLUMNS, len(stages))
    rows = -(-len(stages) // columns)
    box_height = 58 + max(map(_inside_height, stages)) + 26
    widths = sorted({bits for stage in stages for bits in stage.bits})
    width = max(2 * _MARGIN + columns * _BOX_WIDTH + (columns - 1) * _GAP, 560)
    room = width - 2 * _MARGIN
    idle_lines = _wrapped("not used: ", unused, room, 11)
    legend_wide = 72 * len(widths) + text_width(_LEGEND, 11) > room
    top = 74
    bottom = top + rows * (box_height + 52)
    below = bottom + 34 + 18 * legend_wide
    height = below + (18 * len(idle_lines) + 10 if unused else 0)
    drawing = Drawing(width, height, title)
    drawing.words(_MARGIN, 32, clipped(title, room, 17), size=17, bold=True)
    drawing.words(_MARGIN, 52, clipped(_summary(plan), room, 12), fill=_PALE)
    corners = [_corner(index, columns, box_height, top) for index in range(len(stages))]
    for stage, corner in zip(stages, corners, strict=True):
        _draw_stage(drawing, stage, corner, box_height, spec)
    for index, hop in enumerate(plan.hops):
        labels = f"{1e3 * hop.seconds:.2f} ms", f"{stages[index].hop_bits} bit"
        _draw_hop(drawing, corners[index], corners[index + 1], box_height, labels)
    if plan.hops:
        _draw_return(drawing, corners, box_height, plan.return_s)
    x = float(_MARGIN)
    for bits in widths:
        drawing.box(x, bottom, 14, 14, fill=COLOURS[bits], radius=2)
        drawing.words(x + 19, bottom + 11, f"{bits} bit", size=11)
        x += 72
    legend_at = (_MARGIN, bottom + 29) if legend_wide else (x, bottom + 11)
    drawing.words(legend_at[0], legend_at[1], _LEGEND, size=11, fill=_PALE)
    for index, line in enumerate(idle_lines if unused else ()):
        drawing.words(_MARGIN, below + 6 + 18 * index, line, size=11, fill=_PALE)
    return drawing.text()


def _summary(plan: Plan) -> str:
    text = f"predicted: {1e3 * plan.decode_s:.2f} ms per token"
    if plan.hops:
        way_s = math.fsum(hop.seconds for hop in plan.hops) + plan.return_s
        text += f", of which {1e3 * way_s:.2f} ms on links"
    return text


def _corner(index: int, columns: int, box_height: float, top: float) -> tuple[float, float]:
    """The left top of a stage's box. Rows run to and fro, so that hops lead to neighbours."""
    row, column = divmod(index, columns)
    if row % 2:
        column = columns - 1 - column
    return _MARGIN + column * (_BOX_WIDTH + _GAP), top + row * (box_height + 52)


def _inside_height(stage: Stage) -> float:
    """The height of a stage's blocks and of the lines about its team."""
    return _team_height(stage) + -(-len(stage.bits) // _PER_ROW) * (_BLOCK + _SPACE)


def _team_height(stage: Stage) -> float:
    """The height that a team takes beyond that of a device alone."""
    return (len(stage.members) - 1) * _MEMBER + _SUMS if stage.members else 0.0


def _draw_stage(
    drawing: Drawing,
    stage: Stage,
    corner: tuple[float, float],
    box_height: float,
    spec: ModelSpec,
) -> None:
    x, y = corner
    drawing.box(x, y, _BOX_WIDTH, box_height, fill="#f9fafb", stroke=_LINE, radius=8)
    time = f"{1e3 * stage.compute_s:.2f} ms"
    room = _BOX_WIDTH - 32 - text_width(time, 12)
    title = f"team of {len(stage.members)}" if stage.members else stage.device
    drawing.words(x + 12, y + 21, clipped(title, room, 14), size=14, bold=True)
    drawing.words(x + _BOX_WIDTH - 12, y + 21, time, anchor="end", bold=True)
    if stage.members:
        _draw_members(drawing, stage, x, y, spec)
    else:
        used, limit = stage.memory_bytes, stage.memory_limit_bytes
        words = f"memory {format_size(used)} of {format_size(limit)}"
        _draw_memory(drawing, (x, y), words, used, limit)
    inside = y + 60 + _team_height(stage)
    for offset, bits in enumerate(stage.bits):
        block = stage.first + offset
        kind = spec.block_kind(block)
        row, column = divmod(offset, _PER_ROW)
        left = x + 12 + column * (_BLOCK + _SPACE)
        above = inside + row * (_BLOCK + _SPACE)
        name = spec.block_name(block)
        drawing.box(
            left, above, _BLOCK, _BLOCK, fill=COLOURS[bits], radius=3, hint=f"{name}: {bits} bit"
        )
        label = {"embedding": "E", "head": "H"}.get(kind, str(block - 1))
        size = 10 if len(label) < 4 else 8
        drawing.words(
            left + _BLOCK / 2,
            above + 14,
            label,
            size=size,
            anchor="middle",
            fill=ink_on(COLOURS[bits]),
        )
    drawing.words(x + 12, y + box_height - 10, _range(stage, spec), size=11, fill=_PALE)


def _draw_memory(
    drawing: Drawing, corner: tuple[float, float], words: str, used: int, limit: int
) -> None:
    """Draw a bar for the part of the memory in use, and a line of words below it."""
    x, y = corner
    bar = _BOX_WIDTH - 24
    drawing.box(x + 12, y + 30, bar, 5, fill="#e5e7eb", radius=2)
    drawing.box(x + 12, y + 30, bar * min(used / limit, 1.0), 5, fill="#64748b", radius=2)
    drawing.words(x + 12, y + 49, words, size=11, fill=_PALE)


def _draw_members(drawing: Drawing, stage: Stage, x: float, y: float, spec: ModelSpec) -> None:
    """Draw each member with its share and memory, then the part of the sums."""
    for index, member in enumerate(stage.members):
        sizes = member.memory_bytes, member.memory_limit_bytes
        share = f" {layer_fraction(spec, member.share):.0%}: {format_size(sizes[0])}"
        name = clipped(member.device, _BOX_WIDTH - 24 - text_width(share, 11), 11)
        _draw_memory(drawing, (x, y + index * _MEMBER), name + share, *sizes)
    words = f"sums {1e3 * stage.sums_s:.2f} ms at {stage.sum_bits} bit"
    drawing.words(x + 12, y + 49 + _team_height(stage), words, size=11, fill=_PALE)


def _range(stage: Stage, spec: ModelSpec) -> str:
    first = spec.block_name(stage.first)
    last = spec.block_name(stage.last - 1)
    return first if stage.last == stage.first + 1 else f"{first} to {last}"


def _draw_hop(
    drawing: Drawing,
    source: tuple[float, float],
    target: tuple[float, float],
    box_height: float,
    labels: tuple[str, str],
) -> None:
    """Draw an arrow with one label above it and one below, or both beside it."""
    if source[1] == target[1]:
        y = source[1] + 30
        right = target[0] > source[0]
        begin = source[0] + (_BOX_WIDTH if right else 0)
        end = target[0] + (0 if right else _BOX_WIDTH)
        drawing.path([(begin + (4 if right else -4), y), (end + (-4 if right else 4), y)], tip=True)
        drawing.words((begin + end) / 2, y - 8, labels[0], size=11, anchor="middle")
        drawing.words((begin + end) / 2, y + 17, labels[1], size=11, anchor="middle", fill=_PALE)
    else:
        x = source[0] + _BOX_WIDTH / 2
        drawing.path([(x, source[1] + box_height + 3), (x, target[1] - 4)], tip=True)
        drawing.words(x + 8, target[1] - 28, labels[0], size=11)
        drawing.words(x + 8, target[1] - 13, labels[1], size=11, fill=_PALE)


def _draw_return(
    drawing: Drawing, corners: Sequence[tuple[float, float]], box_height: float, seconds: float
) -> None:
    """Draw the token's way back to the first stage: below a single row, else left of all rows."""
    first, last = corners[0], corners[-1]
    label = f"token back {1e3 * seconds:.2f} ms"
    below = last[1] + box_height + 20
    begin = (last[0] + _BOX_WIDTH * 0.35, last[1] + box_height + 3)
    if first[1] == last[1]:
        x = first[0] + _BOX_WIDTH / 2
        points = [begin, (begin[0], below), (x, below), (x, first[1] + box_height + 4)]
        words_at = ((begin[0] + x) / 2, below + 14)
    else:
        side = _MARGIN / 2
        y = first[1] + box_height / 2
        points = [begin, (begin[0], below), (side, below), (side, y), (first[0] - 3, y)]
        words_at = (max((begin[0] + side) / 2, side + 70), below + 14)
    drawing.path(points, stroke=_PALE, dashed=True, tip=True)
    drawing.words(*words_at, label, size=11, anchor="middle", fill=_PALE)


def text_width(text: str, size: float) -> float:
    """About the width of a line in pixels. It is generous, because viewers have other fonts."""
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    large = sum(0.4 if letter in "MWmw%@" else 0.15 * letter.isupper() for letter in text)
    return size * (0.6 * len(text) + 0.5 * wide + large)


def clipped(text: str, room: float, size: float) -> str:
    """The text, or its beginning and an ellipsis, within ``room`` pixels."""
    if text_width(text, size) <= room:
        return text
    while text and text_width(text + "\u2026", size) > room:
        text = text[:-1]
    return text + "\u2026"


def ink_on(colour: str) -> str:
    """White or the ink: the one that stands out better from the background."""
    red, green, blue = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    light = sum(
        share * (part / 12.92 if part <= 0.04 else ((part + 0.055) / 1.055) ** 2.4)
        for share, part in ((0.2126, red), (0.7152, green), (0.0722, blue))
    )
    # White and black have the same contrast at (1.05 x 0.05)^0.5. The ink is lighter than black.
    return "#ffffff" if light + 0.05 < 1.05**0.5 * 0.05**0.5 * 1.15 else _INK


def _wrapped(lead: str, names: Sequence[str], room: float, size: float) -> list[str]:
    """Names in lines of at most ``room`` pixels. The first name follows ``lead``."""
    lines = [lead]
    for index, name in enumerate(names):
        end = "," if index + 1 < len(names) else ""
        piece = clipped(name, room - text_width(lead, size), size) + end
        space = "" if lines[-1] in (lead, "") else " "
        if text_width(lines[-1] + space + piece, size) > room:
            lines.append(piece)
        else:
            lines[-1] += space + piece
    return lines


# ---- curves ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Curve:
    """Points by rising x. ``spread`` has a low and a high value for each, or is empty."""

    label: str
    points: tuple[tuple[float, float], ...]
    spread: tuple[tuple[float, float], ...] = ()


_CURVE_COLOURS = ("#1d4ed8", "#ea580c", "#15803d", "#7c3aed")


def curves_svg(
    curves: Sequence[Curve],
    *,
    title: str,
    note: str,
    x_label: str,
    y_label: str,
    from_zero: bool = True,
) -> str:
    """Curves over a logarithmic x axis, with all x above 0.

    y begins at 0, or the picture says that it does not.
    """
    axes = _Axes.of(curves, from_zero=from_zero)
    drawing = Drawing(_CURVES_WIDTH, _CURVES_HEIGHT, title)
    drawing.words(20, 28, clipped(title, _CURVES_WIDTH - 40, 16), size=16, bold=True)
    drawing.words(20, 47, clipped(note, _CURVES_WIDTH - 40, 11), size=11, fill=_PALE)
    if axes.floor > 0:
        y_label += " (axis not from 0)"
    _draw_axes(drawing, axes, {x for curve in curves for x, _ in curve.points}, x_label, y_label)
    for index, curve in enumerate(curves):
        _draw_curve(drawing, axes, curve, index)
    return drawing.text()


_CURVES_WIDTH, _CURVES_HEIGHT = 640, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, _CURVES_WIDTH - 20, 66, _CURVES_HEIGHT - 58
"""Where the area of the curves ends, in the picture's units."""


@dataclass(frozen=True, slots=True)
class _Axes:
    """The ranges of a picture of curves.

    low, high: the decimal logarithms of the least and the greatest x.
    floor, ceiling: the least and the greatest y.
    step: between marks on the y axis.
    """

    low: float
    high: float
    floor: float
    ceiling: float
    step: float

    @staticmethod
    def of(curves: Sequence[Curve], *, from_zero: bool) -> _Axes:
        low = math.log10(min(x for curve in curves for x, _ in curve.points))
        high = math.log10(max(x for curve in curves for x, _ in curve.points))
        heights = [y for curve in curves for _, y in curve.points]
        heights += [edge for curve in curves for edges in curve.spread for edge in edges]
        base = 0.0 if from_zero else min(heights)
        step = _tick(max(heights) - base)
        floor = step * math.floor(base / step + 1e-9)
        ceiling = step * max(math.ceil(max(heights) / step - 1e-9), round(floor / step) + 1)
        return _Axes(low, high, floor, ceiling, step)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Return the point of the picture that shows (x, y)."""
        across = (math.log10(x) - self.low) / ((self.high - self.low) or 1.0)
        up = (y - self.floor) / (self.ceiling - self.floor)
        return _LEFT + across * (_RIGHT - _LEFT), _BOTTOM - up * (_BOTTOM - _TOP)


def _draw_axes(
    drawing: Drawing, axes: _Axes, points: Collection[float], x_label: str, y_label: str
) -> None:
    """Draw lines across at marks of y, and ticks at powers of ten, or at ``points`` if few."""
    for count in range(round((axes.ceiling - axes.floor) / axes.step) + 1):
        mark = axes.floor + count * axes.step
        y = axes.place(10**axes.low, mark)[1]
        drawing.path([(_LEFT, y), (_RIGHT, y)], stroke=_LINE, width=1)
        drawing.words(_LEFT - 8, y + 4, f"{mark:g}", size=11, anchor="end")
    powers = range(math.ceil(axes.low - 1e-9), math.floor(axes.high + 1e-9) + 1)
    ticks = [10.0**power for power in powers] if len(powers) > 2 else sorted(points)
    for tick in ticks:
        x = axes.place(tick, axes.floor)[0]
        drawing.path([(x, _BOTTOM), (x, _BOTTOM + 5)], stroke=_INK, width=1)
        drawing.words(x, _BOTTOM + 19, f"{tick:g}", size=11, anchor="middle")
    drawing.words((_LEFT + _RIGHT) / 2, _CURVES_HEIGHT - 16, x_label, size=12, anchor="middle")
    drawing.words(20, (_TOP + _BOTTOM) / 2, y_label, anchor="middle", turned=True)


def _draw_curve(drawing: Drawing, axes: _Axes, curve: Curve, index: int) -> None:
    """Draw a curve with its spread, and its label as number ``index`` of the legend."""
    colour = _CURVE_COLOURS[index % len(_CURVE_COLOURS)]
    xs = [x for x, _ in curve.points]
    if curve.spread:
        upper = [axes.place(x, edge) for x, (_, edge) in zip(xs, curve.spread, strict=True)]
        lower = [axes.place(x, edge) for x, (edge, _) in zip(xs, curve.spread, strict=True)]
        drawing.path([*upper, *reversed(lower)], stroke="none", fill=colour, opacity=0.15, width=0)
    line = [axes.place(x, y) for x, y in curve.points]
    drawing.path(line, stroke=colour, width=2)
    for x, y in line:
        drawing.dot(x, y, colour)
    across = _RIGHT - 190
    drawing.box(across, _TOP + 6 + 18 * index, 12, 4, fill=colour)
    label = clipped(curve.label, _RIGHT - across - 18, 11)
    drawing.words(across + 18, _TOP + 12 + 18 * index, label, size=11)


def _tick(peak: float) -> float:
    """A round distance between marks, with about five marks from 0 to ``peak``."""
    rough = (peak or 1.0) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    return float(next(power * factor for factor in (1, 2, 2.5, 5, 10) if rough <= power * factor))
