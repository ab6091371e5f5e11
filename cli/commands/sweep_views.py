"""Writes and shows the grid of ``shoal sweep``: CSV, picture, table and JSON."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from cli.render import Screen, titled_table
from model.durable import replace_text

if TYPE_CHECKING:
    from cli.commands.sweep import Swept

_HEADS = {
    "objective": "objective",
    "bits": "bits",
    "memory": "memory, MiB",
    "links": "Mbit/s",
    "max_weight_error": "delta",
    "quality_budget": "KL budget",
}
_FIGURES = {"loss": "loss", "kl": "KL", "exact_match": "EM, %"}


def write_sweep(options: argparse.Namespace, swept: Swept) -> None:
    """Write the grid as far as it is planned and evaluated, as CSV and as a picture."""
    from studies.grid import sweep_csv
    from studies.grid_picture import sweep_svg

    parts = swept.cells, swept.outcomes, swept.figures
    replace_text(options.out / "sweep.csv", sweep_csv(*parts))
    title = f"{swept.subject.name} on {swept.subject.devices}"
    replace_text(options.out / "sweep.svg", sweep_svg(title, *parts))


def show_sweep(options: argparse.Namespace, screen: Screen, swept: Swept) -> None:
    """Print the grid, as JSON or as a table of the axes that vary."""
    if options.json:
        screen.json(_answer(options, swept))
        return
    from studies.grid import AXES

    varied = [axis for axis in AXES if len({cell.text(axis) for cell in swept.cells}) > 1]
    measured = [name for name in _FIGURES if any(name in one for one in swept.figures.values())]
    table = titled_table(
        f"{len(swept.cells)} plans of {escape(swept.subject.name)}, predicted for "
        f"{escape(swept.subject.devices)}"
    )
    for axis in varied or AXES[:1]:
        table.add_column(_HEADS[axis], justify="right", no_wrap=True)
    for column in ("objective, s or J", "ms per token", "stages", "bits/weight", "KL", "gap"):
        table.add_column(column, justify="right", no_wrap=True)
    for name in measured:
        table.add_column(f"measured {_FIGURES[name]}", justify="right", no_wrap=True)
    for cell in swept.cells:
        one = swept.outcomes[cell]
        row = [cell.text(axis) for axis in varied or AXES[:1]]
        if one.decode_ms is None:
            table.add_row(*row, one.status)
            continue
        found = swept.figures.get(cell, {})
        table.add_row(
            *row,
            f"{one.value:.4g}",
            f"{one.decode_ms:.4g}",
            str(one.stages),
            f"{one.bits_per_weight:.3g}",
            "" if one.kl is None else f"{one.kl:.3g}",
            f"{one.gap:.2%}",
            *(f"{found[name].value:.4g}" if name in found else "" for name in measured),
        )
    screen.table(table, keys=len(varied or AXES[:1]))
    for cell in swept.cells:
        one = swept.outcomes[cell]
        if one.why:
            words = ", ".join(f"{_HEADS[axis]} {cell.text(axis)}" for axis in varied)
            screen.out.print(escape(f"{words or 'no plan'}: {one.why}"), soft_wrap=True)


def _answer(options: argparse.Namespace, swept: Swept) -> dict[str, Any]:
    from evaluation.report import plain
    from studies.grid import AXES

    return {
        "model": swept.subject.name,
        "devices": swept.subject.devices,
        "figures": "predicted, apart from measured ones",
        "slots": options.slots,
        "cells": [
            {
                "cell": {axis: cell.text(axis) for axis in AXES},
                "plan": asdict(swept.outcomes[cell]),
                "measured": plain(swept.figures[cell]) if cell in swept.figures else None,
            }
            for cell in swept.cells
        ],
    }
