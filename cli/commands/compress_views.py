"""Shows the curve of ``shoal compress``: table, JSON, CSV, picture, and the chosen point."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from cli.commands.compress_times import is_choosing
from cli.errors import CommandFailed
from cli.render import Screen, titled_table
from planning.plan import bits_text
from planning.saved import plan_text
from wire.sizes import format_size

if TYPE_CHECKING:
    from cli.commands.compress_times import Times
    from compression.points import Point
    from compression.run import Chosen, Compression
    from model.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Shown:
    """The points of a curve, what was chosen, and what predicted the times."""

    points: Sequence[Point]
    chosen: Chosen | None
    times: Times | None


def show(
    options: argparse.Namespace,
    screen: Screen,
    checkpoint: Checkpoint,
    done: Compression,
    shown: Shown,
) -> None:
    """Write the curve and the plan, and print the points. Raises CommandFailed and OSError.

    CommandFailed: nothing keeps the bound that was asked for.
    """
    from compression.picture import curve_svg
    from compression.points import csv_text

    name = checkpoint.directory.name
    points, chosen, times = shown.points, shown.chosen, shown.times
    if times is None:  # Earlier ones are of a lab or shoal that nothing here would name.
        points = [replace(one, latency_ms=None) for one in points]
    (options.out / "curve.csv").write_text(csv_text(points), encoding="utf-8")
    title = f"{name}, compressed"
    marked = (None, "") if chosen is None else (chosen.point, bits_text(chosen.bits))
    (options.out / "curve.svg").write_text(curve_svg(title, points, *marked), encoding="utf-8")
    if chosen is not None and times is not None:
        text = plan_text(
            chosen.plan,
            done.kept_folder(chosen.point).name,
            slots=1,
            context_tokens=min(options.context, done.spec_of(chosen.point).max_context),
            devices=times.devices,
        )
        (options.out / "plan.json").write_text(text, encoding="utf-8")
    if options.json:
        screen.json(_answer(options, name, replace(shown, points=points), done))
    else:
        _show_table(screen, f"{name}, compressed on {options.data.name}", points)
        for line in _lines(options, done, shown):
            screen.out.print(escape(line), soft_wrap=True)
    screen.note(f"the curve is in {options.out / 'curve.csv'} and {options.out / 'curve.svg'}")
    if is_choosing(options) and times is not None and chosen is None:
        raise CommandFailed(_none(options, points, times))


def _none(options: argparse.Namespace, points: Sequence[Point], times: Times) -> str:
    """Say that nothing keeps the bound, and what comes nearest."""
    if options.at_most is None:
        least = min((one.kl for one in points), default=0.0)
        return (
            f"no size that fits on {times.source} loses at most {options.quality_budget:g} nats: "
            f"the least on the curve is {least:.3g}; ask for larger --sizes or more --bits"
        )
    found_ms = [one.latency_ms for one in points if one.latency_ms is not None]
    least_ms = f"the fastest takes {min(found_ms):.3g} ms" if found_ms else "none fits there"
    return (
        f"no size takes at most {options.at_most:g} ms on {times.source}: {least_ms}; "
        "ask for smaller --sizes or fewer --bits"
    )


def _answer(
    options: argparse.Namespace, name: str, shown: Shown, done: Compression
) -> dict[str, Any]:
    chosen = shown.chosen
    return {
        "model": name,
        "data": str(options.data),
        "eval": None if options.eval is None else str(options.eval),
        "lab": None if options.lab is None else str(options.lab),
        "points": [_values(options, one, done) for one in shown.points],
        "chosen": None
        if chosen is None
        else _values(options, chosen.point, done)
        | {
            "bits": list(chosen.bits),
            "predicted_kl": chosen.predicted_kl,
            "bound": chosen.bound,
            "plan": str(options.out / "plan.json"),
        },
        "times_predicted_for": None if shown.times is None else shown.times.source,
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


def _lines(options: argparse.Namespace, done: Compression, shown: Shown) -> list[str]:
    """Say how the figures were made, and what was chosen."""
    text = options.data if options.eval is None else options.eval
    lines = [f"losses and answers are measured on {text}, on this machine alone"]
    if shown.times is not None:
        lines.append(f"times of a token are predicted by the best plan for {shown.times.source}")
    if shown.chosen is not None:
        lines += _chosen_lines(options, done, shown.chosen)
    return lines


def _chosen_lines(options: argparse.Namespace, done: Compression, chosen: Chosen) -> list[str]:
    """Name the chosen model, its figures, how much better another could be, and how to load it."""
    point = chosen.point
    by_time = options.at_most is not None
    asked = f"{options.at_most:g} ms" if by_time else f"{options.quality_budget:g} nats"
    exact = "" if point.exact_match is None else f", exact match {_percent(point.exact_match)}"
    lines = [
        f"at most {asked}: {point.name} at {bits_text(chosen.bits)} bits, "
        f"{point.latency_ms:.3g} ms predicted, KL {point.kl:.3g} measured{exact}"
    ]
    if chosen.predicted_kl is not None and chosen.bound is not None:
        other = f"lose less than {chosen.bound:.3g}"
        if not by_time:
            other = f"take less than {1e3 * chosen.bound:.3g} ms"
        lines.append(
            f"its KL was predicted as {chosen.predicted_kl:.3g}; no other choice of size, bits and "
            f"devices is predicted to {other}"
        )
    folder = done.kept_folder(point) if point.size < 1 else options.model
    lines.append(
        f"shoal load {folder} --plan {options.out / 'plan.json'}" + _stored_as(options, chosen.bits)
    )
    return lines


def _stored_as(options: argparse.Namespace, bits: Sequence[int]) -> str:
    """Return the options that make `shoal load` store the weights as they were measured."""
    from compression.measure import LOSSLESS_BITS
    from model.schemes import DEFAULT_GROUP_SIZE, DEFAULT_SCHEME

    if min(bits) >= LOSSLESS_BITS:
        return ""
    words = f" --scheme {options.scheme}" if options.scheme != DEFAULT_SCHEME else ""
    if options.scheme_text is not None:
        words += f" --scheme-text {options.scheme_text}"
    if options.group_size != DEFAULT_GROUP_SIZE:
        words += f" --group-size {options.group_size}"
    return words
