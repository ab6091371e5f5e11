"""Shows the curve of ``shoal compress``: table, JSON, CSV, picture, and the chosen point."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from cli.errors import CommandFailed
from cli.render import Screen, titled_table
from wire.sizes import format_size

if TYPE_CHECKING:
    from compression.points import Point
    from compression.run import Compression
    from model.checkpoint import Checkpoint


def show(
    options: argparse.Namespace,
    screen: Screen,
    checkpoint: Checkpoint,
    done: Compression,
    times: str | None,
) -> None:
    """Write curve.csv and curve.svg, and print the points. Raises CommandFailed, OSError.

    times: names what predicted the times. CommandFailed: no point is as fast as --at-most asks.
    """
    from compression.picture import curve_svg
    from compression.points import best_within, csv_text

    name = checkpoint.directory.name
    points = [
        one for one in done.points.all() if one.size in options.sizes and one.bits in options.bits
    ]
    if times is None:  # Earlier ones are of a lab or shoal that nothing here would name.
        points = [replace(one, latency_ms=None) for one in points]
    chosen = None
    if options.at_most is not None:
        made = [one for one in points if one.size >= 1 or _folder(options, one, done)]
        chosen = best_within(made, options.at_most)
    (options.out / "curve.csv").write_text(csv_text(points), encoding="utf-8")
    title = f"{name}, compressed"
    (options.out / "curve.svg").write_text(curve_svg(title, points, chosen), encoding="utf-8")
    if options.json:
        answer = _answer(options, name, points, chosen, done)
        screen.json({**answer, "times_predicted_for": times})
    else:
        _show_table(screen, f"{name}, compressed on {options.data.name}", points)
        for line in _lines(options, chosen, done, times):
            screen.out.print(escape(line), soft_wrap=True)
    screen.note(f"the curve is in {options.out / 'curve.csv'} and {options.out / 'curve.svg'}")
    if options.at_most is not None and chosen is None:
        found_ms = [one.latency_ms for one in points if one.latency_ms is not None]
        least = f"the fastest takes {min(found_ms):.3g} ms" if found_ms else "none fits there"
        raise CommandFailed(
            f"no size takes at most {options.at_most:g} ms on {times}: {least}; "
            "ask for smaller --sizes or fewer --bits"
        )


def _answer(
    options: argparse.Namespace,
    name: str,
    points: Sequence[Point],
    chosen: Point | None,
    done: Compression,
) -> dict[str, Any]:
    return {
        "model": name,
        "data": str(options.data),
        "eval": None if options.eval is None else str(options.eval),
        "lab": None if options.lab is None else str(options.lab),
        "points": [_values(options, one, done) for one in points],
        "chosen": None if chosen is None else _values(options, chosen, done),
    }


def _values(options: argparse.Namespace, point: Point, done: Compression) -> dict[str, Any]:
    return {**asdict(point), "folder": _folder(options, point, done)}


def _folder(options: argparse.Namespace, point: Point, done: Compression) -> str | None:
    """Where a smaller model is. One that was pruned only is not kept beside a taught one."""
    is_kept = point.size < 1 and (point.distilled or not options.steps)
    return str(done.folder(point.size)) if is_kept else None


def _show_table(screen: Screen, title: str, points: Sequence[Point]) -> None:
    table = titled_table(title)
    table.add_column("size", no_wrap=True)
    for column in ("bits", "layers", "KV heads", "MLP", "stored", "loss", "KL"):
        table.add_column(column, justify="right", no_wrap=True)
    scored = any(one.exact_match is not None for one in points)
    timed = any(one.latency_ms is not None for one in points)
    for column, is_shown in (("exact match", scored), ("F1", scored), ("ms, predicted", timed)):
        if is_shown:
            table.add_column(column, justify="right", no_wrap=True)
    for one in points:
        cells = [one.name, one.bits, one.layers, one.kv_heads, one.ffn]
        row = [*map(str, cells), format_size(one.bytes), f"{one.loss:.4g}", f"{one.kl:.3g}"]
        if scored:
            row += [_percent(one.exact_match), _percent(one.f1)]
        if timed:
            row.append("-" if one.latency_ms is None else f"{one.latency_ms:.3g}")
        table.add_row(*row)
    screen.table(table)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} %"


def _lines(
    options: argparse.Namespace, chosen: Point | None, done: Compression, times: str | None
) -> list[str]:
    """Say how the figures were made, and what was chosen."""
    text = options.data if options.eval is None else options.eval
    lines = [f"losses and answers are measured on {text}, on this machine alone"]
    if times is not None:
        lines.append(f"times of a token are predicted by the best plan for {times}")
    if chosen is not None:
        folder = _folder(options, chosen, done) or str(options.model)
        lines.append(
            f"at most {options.at_most:g} ms: {chosen.name} at {chosen.bits} bits, "
            f"{chosen.latency_ms:.3g} ms predicted: shoal load {folder} --bits {chosen.bits}"
            + _stored_as(options, chosen)
        )
    return lines


def _stored_as(options: argparse.Namespace, chosen: Point) -> str:
    """Return the options that make `shoal load` store the weights as they were measured."""
    from compression.measure import LOSSLESS_BITS
    from model.schemes import DEFAULT_GROUP_SIZE, DEFAULT_SCHEME

    if chosen.bits >= LOSSLESS_BITS:
        return ""
    words = f" --scheme {options.scheme}" if options.scheme != DEFAULT_SCHEME else ""
    if options.scheme_text is not None:
        words += f" --scheme-text {options.scheme_text}"
    if options.group_size != DEFAULT_GROUP_SIZE:
        words += f" --group-size {options.group_size}"
    return words
