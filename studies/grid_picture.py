"""Draws a grid of plans: what each axis does to the time of a token, and what time costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from evaluation.bootstrap import Estimate
from studies.grid import AXES, Amount, Axis, Cell, Outcome
from studies.pictures import Group, Panel, panels_svg

_MOST_PANELS = 6
_LABELS: Mapping[Axis, str] = {
    "memory": "memory of each device, MiB",
    "links": "speed of each link, Mbit/s",
    "max_weight_error": "delta: bound on weight errors",
    "quality_budget": "budget of KL divergence, nats per token",
}
_FACTORS: Mapping[Axis, str] = {
    "memory": "memory, times each device's own",
    "links": "link speed, times each link's own",
}
_NAMES: Mapping[Axis, str] = {
    "objective": "{}",
    "bits": "bits {}",
    "memory": "{} MiB",
    "links": "{} Mbit/s",
    "max_weight_error": "delta {}",
    "quality_budget": "KL {}",
}
_TIME = "predicted ms per token"


def sweep_svg(
    title: str,
    cells: Sequence[Cell],
    outcomes: Mapping[Cell, Outcome],
    figures: Mapping[Cell, Mapping[str, Estimate]],
) -> str:
    """Draw the cells that have a plan: a panel for each axis of numbers, and for each loss."""
    shown = {
        cell: (one.decode_ms, one.kl)
        for cell in cells
        if (one := outcomes.get(cell)) is not None and one.decode_ms is not None
    }
    varied = [axis for axis in AXES if len({cell.text(axis) for cell in cells}) > 1]
    panels = [*_axes(shown, varied), *_losses(shown, varied, figures)][:_MOST_PANELS]
    note = f"{len(shown)} plans of {len(cells)} cells; times are predicted"
    return panels_svg(title, note, panels)


Shown = Mapping[Cell, tuple[float, float | None]]


def _axes(shown: Shown, varied: Sequence[Axis]) -> Iterator[Panel]:
    """Yield a panel for each axis that has two numbers, with a line for all other values."""
    for axis in varied:
        numbers = {cell.number(axis) for cell in shown} - {None}
        if len(numbers) < 2:
            continue
        others = [one for one in varied if one != axis]
        groups: dict[str, list[tuple[float, float]]] = {}
        for cell, (decode_ms, _) in shown.items():
            at = cell.number(axis)
            if at is not None:
                groups.setdefault(_name(cell, others), []).append((at, decode_ms))
        value = getattr(next(iter(shown)), axis)
        is_factor = isinstance(value, Amount) and value.is_factor
        label = _FACTORS[axis] if is_factor else _LABELS[axis]
        yield Panel(
            f"by {axis.replace('_', ' ')}",
            label,
            _TIME,
            tuple(
                Group(name, tuple(sorted(points)), joined=True) for name, points in groups.items()
            ),
        )


def _losses(
    shown: Shown, varied: Sequence[Axis], figures: Mapping[Cell, Mapping[str, Estimate]]
) -> Iterator[Panel]:
    """Yield a panel of predicted KL, and of each loss that was measured, against the time."""
    predicted: dict[Cell, float] = {cell: kl for cell, (_, kl) in shown.items() if kl is not None}
    if predicted:
        yield _trade_off("predicted KL", "predicted KL, nats", predicted, shown, varied)
    for name, label in (("kl", "measured KL, nats"), ("loss", "measured loss, nats")):
        found = {cell: figures[cell][name].value for cell in shown if name in figures.get(cell, {})}
        if found:
            yield _trade_off(label.partition(",")[0], label, found, shown, varied)


def _trade_off(
    title: str,
    label: str,
    values: Mapping[Cell, float],
    shown: Shown,
    varied: Sequence[Axis],
) -> Panel:
    # Bounds decide where a plan lies on the curve. The rest tells one curve from another.
    others = [axis for axis in varied if axis not in ("max_weight_error", "quality_budget")]
    groups: dict[str, list[tuple[float, float]]] = {}
    for cell, value in values.items():
        groups.setdefault(_name(cell, others), []).append((shown[cell][0], value))
    return Panel(
        title,
        _TIME,
        label,
        tuple(Group(name, tuple(sorted(points))) for name, points in groups.items()),
    )


def _name(cell: Cell, axes: Sequence[Axis]) -> str:
    return ", ".join(_named(cell, axis) for axis in axes) or "all plans"


def _named(cell: Cell, axis: Axis) -> str:
    """Return a cell's value on an axis in words."""
    value, text = getattr(cell, axis), cell.text(axis)
    is_factor = isinstance(value, Amount) and value.is_factor
    return f"{axis} {text}" if is_factor else _NAMES[axis].format(text)
