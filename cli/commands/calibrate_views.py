"""The tables and the picture of ``shoal calibrate``: the device's figures and its layers' times."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.table import Table

from cli.render import NOISY, Screen
from wire.conditions import Conditions, worst
from wire.sizes import format_size

if TYPE_CHECKING:
    from calibration.survey import DeviceSurvey
    from calibration.sustain import Sustained
    from calibration.table import LayerTable


def _marked(conditions: Conditions | None) -> str:
    """The mark behind a figure that may be of a busy machine, or ""."""
    return NOISY if conditions is not None and conditions.is_noisy else ""


def show_survey(screen: Screen, survey: DeviceSurvey) -> None:
    table = Table(title=escape(survey.machine), title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("measured", no_wrap=True)
    table.add_column("")
    _add_memory_and_disk(table, survey)
    for backend in survey.backends:
        if backend.reason is not None:
            table.add_row(backend.name, escape(backend.reason))
        else:
            table.add_row(backend.name, escape(backend.version or ""))
        for bits, rate in backend.flops.items():
            table.add_row(
                f"{backend.name}, {bits} bits as executed",
                f"{rate / 1e9:.1f} GFLOP/s (best call {backend.best_flops[bits] / 1e9:.1f})"
                + _marked(backend.conditions.get(bits)),
            )
    _add_sensors(table, survey)
    if survey.sustained is not None:
        _add_sustained(table, survey.sustained)
    screen.table(table)
    if survey.sustained is not None and survey.sustained.cause:
        screen.out.print(f"slower in the end, cause: {survey.sustained.cause}", markup=False)
    conditions = [*survey.conditions.values()]
    for backend in survey.backends:
        conditions += backend.conditions.values()
    _say_noise(screen, conditions)


def _add_memory_and_disk(table: Table, survey: DeviceSurvey) -> None:
    table.add_row("cores, threads used", f"{survey.cores}, {survey.threads}")
    table.add_row(
        "memory available",
        f"{format_size(survey.memory_available_bytes)} of {format_size(survey.memory_total_bytes)}",
    )
    for label, rates in (
        ("memory read", survey.memory_read_bytes_per_s),
        ("memory copy (read + written)", survey.memory_copy_bytes_per_s),
    ):
        for threads, rate in rates.items():
            plural = "thread" if threads == 1 else "threads"
            of = survey.conditions.get(f"{label.partition(' (')[0].replace(' ', '_')} {threads}")
            table.add_row(f"{label}, {threads} {plural}", f"{rate / 1e9:.1f} GB/s{_marked(of)}")
    table.add_row("storage free", format_size(survey.storage_free_bytes))
    written, of_disk = survey.disk_write_bytes_per_s, survey.conditions.get("disk")
    table.add_row("disk written, synchronously", f"{written / 1e6:.0f} MB/s{_marked(of_disk)}")
    read = survey.disk_read_bytes_per_s
    table.add_row(
        "disk read, past the page cache",
        "not possible" if read is None else f"{read / 1e6:.0f} MB/s",
    )


def _add_sensors(table: Table, survey: DeviceSurvey) -> None:
    hottest_c = max(survey.temperatures_c.values(), default=None)
    table.add_row("hottest sensor", "no sensor" if hottest_c is None else f"{hottest_c:.0f} °C")
    if survey.throttling is not None:
        table.add_row("throttling now", ", ".join(survey.throttling.now) or "none")
        table.add_row("throttling since boot", ", ".join(survey.throttling.since_boot) or "none")
    watts = "no sensor; declare it with --watts"
    if survey.watts is not None:
        watts = f"{survey.watts:.1f} W ({survey.watts_source})"
    table.add_row("watts while computing", watts)


def _add_sustained(table: Table, work: Sustained) -> None:
    ratio = work.sustained_flops / work.burst_flops
    table.add_row(
        f"burst against sustained, {work.duration_s:.0f} s",
        f"{work.burst_flops / 1e9:.1f} against {work.sustained_flops / 1e9:.1f} GFLOP/s "
        f"({ratio:.0%})",
    )
    if work.start_c is not None and work.hottest_c is not None:
        table.add_row(
            "hottest sensor meanwhile", f"from {work.start_c:.0f} to {work.hottest_c:.0f} °C"
        )


def _say_noise(screen: Screen, conditions: Iterable[Conditions | None]) -> None:
    """Print one line that explains the marks of a table."""
    noisy = worst(of for of in conditions if of is not None and of.is_noisy)
    if noisy is not None:
        screen.out.print(
            f"{NOISY.strip()} {noisy.text}; run it again with --again when it is quiet",
            markup=False,
            soft_wrap=True,
        )


def show_table(screen: Screen, result: LayerTable, backend: str) -> None:
    """Print the times of layers and of the other blocks, measured with ``backend``."""
    variants = sorted({timing.variant for timing in result.layers})
    for variant in variants:
        name = "one layer" if len(variants) == 1 else f"one layer of shape {variant}"
        _show_layer(screen, result, variant, f"{name}, ms a call by {backend}")
        _show_shares(screen, result, variant, f"shares of {name}, ms")
    _show_others(screen, result)
    _say_noise(
        screen,
        [
            item.conditions
            for timings in (result.layers, result.shares, result.embedding_and_head)
            for item in timings
        ],
    )
    if result.reused:
        screen.note(f"{result.reused} figures are from an earlier run of the same kind")
    if result.left_out:
        screen.note(
            f"{result.left_out} points are missing: no time or no memory was left for them; "
            "run it again for more, or with --full"
        )


def _show_layer(screen: Screen, result: LayerTable, variant: int, title: str) -> None:
    """Print one shape of layer: a line per rows and context, a column per width."""
    timings = [timing for timing in result.layers if timing.variant == variant]
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("rows", justify="right")
    table.add_column("context", no_wrap=True)
    widths = sorted({(timing.container_bits, timing.bits) for timing in timings})
    for container, bits in widths:
        stored = ",".join(map(str, bits))
        table.add_column(f"{stored} bits (runs as {container})", justify="right")
    cells = {
        (timing.context == "long", timing.rows, timing.container_bits): (
            f"{timing.seconds * 1e3:.2f}{_marked(timing.conditions)}"
        )
        for timing in timings
    }
    for is_long, rows in sorted({(is_long, rows) for is_long, rows, _ in cells}):
        found = [cells.get((is_long, rows, container), "-") for container, _ in widths]
        table.add_row(str(rows), "long" if is_long else "short", *found)
    sizes = {
        memory.container_bits: (memory.charged_bytes, memory.taken_bytes)
        for memory in result.memory
        if memory.variant == variant
    }
    for index, label in enumerate(("memory charged", "memory taken")):
        of_widths = [sizes.get(container, (None, None))[index] for container, _ in widths]
        shown = ("-" if size is None else format_size(size) for size in of_widths)
        table.add_row("", label, *shown)
    screen.table(table, keys=2)
    ends = {timing.context: timing.position + timing.rows for timing in timings}
    if "long" in ends:
        screen.out.print(f"long: up to {ends['long']} tokens are seen, which memory includes")


def _show_shares(screen: Screen, result: LayerTable, variant: int, title: str) -> None:
    """Print the times of a team member's shares of a layer: a line per share."""
    timings = [timing for timing in result.shares if timing.variant == variant]
    if not timings:
        return
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("share", no_wrap=True)
    widths = sorted({(timing.container_bits, timing.bits) for timing in timings})
    for container, bits in widths:
        stored = ",".join(map(str, bits))
        table.add_column(f"{stored} bits (runs as {container}), 1 row", justify="right")
        table.add_column("a prompt's row", justify="right")
    cells = {(timing.fraction, timing.container_bits): timing for timing in timings}
    for fraction in sorted({fraction for fraction, _ in cells}):
        row = []
        for container, _ in widths:
            timing = cells.get((fraction, container))
            row += (
                ["-", "-"]
                if timing is None
                else [
                    f"{timing.decode_s * 1e3:.2f}{_marked(timing.conditions)}",
                    f"{timing.prefill_s_per_token * 1e3:.3f}",
                ]
            )
        table.add_row("whole, with cuts" if fraction == 1 else f"{fraction:.0%}", *row)
    screen.table(table, keys=1)


def _show_others(screen: Screen, result: LayerTable) -> None:
    others = Table(title="embedding and head, ms", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("block", "bits"):
        others.add_column(column)
    others.add_column("1 row", justify="right")
    others.add_column("a prompt's row", justify="right")
    for timing in result.embedding_and_head:
        others.add_row(
            timing.kind,
            str(timing.bits),
            f"{timing.decode_s * 1e3:.3f}{_marked(timing.conditions)}",
            f"{timing.prefill_s_per_token * 1e3:.4f}",
        )
    screen.table(others, keys=2)


def roofline(survey: DeviceSurvey, table: LayerTable | None, name: str) -> str:
    from calibration.charts import RooflinePoint, roofline_svg

    points = [
        RooflinePoint(
            f"{'prefill' if timing.rows > 1 else 'decode'}, {timing.rows} rows, {timing.context}"
            f" context, {timing.container_bits} bits: {timing.seconds * 1e3:.2f} ms",
            timing.container_bits,
            timing.flops,
            timing.moved_bytes,
            timing.seconds,
            timing.context == "long",
            timing.rows > 1,
        )
        for timing in (table.layers if table is not None else ())
    ]
    points += [
        RooflinePoint(
            f"decode, {timing.fraction:.0%} of a layer with cuts, {timing.container_bits} bits:"
            f" {timing.decode_s * 1e3:.2f} ms",
            timing.container_bits,
            timing.flops,
            timing.moved_bytes,
            timing.decode_s,
            long_context=False,
        )
        for timing in (table.shares if table is not None else ())
    ]
    (backend,) = (backend for backend in survey.backends if backend.name == name)
    title = f"{survey.machine}, {survey.threads} threads, {name} {backend.version}"
    read = survey.memory_read_bytes_per_s[survey.threads]
    return roofline_svg(title, read, backend.best_flops, points)
