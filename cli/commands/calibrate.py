"""``shoal calibrate``: measures this device, without a coordinator.

With a model or a shape it adds the table of layer times. With ``--quality`` it measures instead the
model's sensitivities, here or with ``--on`` on an agent of the shoal.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.table import Table

from cli import argument_types
from cli.argument_types import argument, between, whole
from cli.commands.bench import SHAPE_HELP
from cli.commands.calibrate_agent import Target, measure_for_agent, target_of
from cli.commands.calibrate_quality import QUALITY_BITS, quality_here, quality_on_agent
from cli.errors import CommandFailed, UsageError
from cli.parser import add_url_argument
from cli.render import NOISY, Screen
from cli.shared_arguments import (
    add_group_size_argument,
    add_scheme_argument,
    add_threads_argument,
    add_watts_argument,
    core_count,
)
from wire.conditions import Conditions, worst
from wire.service import default_state_dir
from wire.sizes import format_size

if TYPE_CHECKING:
    from calibration.survey import DeviceSurvey
    from calibration.table import LayerTable
    from model.spec import ModelSpec

ABOUT = (
    "It measures arithmetic, memory and disk. With --model or --shape it also measures the time of "
    "a layer. With --quality it measures instead what fewer bits do to the model's predictions. "
    "Agents and `shoal plan` use the results."
)
EXAMPLES = (
    "  shoal calibrate\n"
    "  shoal calibrate --sustain 60s --watts 6.5  # is it as fast when it is hot?\n"
    "  shoal calibrate --shape llama-1b --plot roof.svg\n"
    "  shoal calibrate --quality --model ./opt-350m --bits 3,4,8 --plot heat.svg\n"
    "  shoal calibrate --quality --model ./opt-350m --on auto  # on the fastest agent\n"
)

DEFAULT_BITS = (4, 8, 16)
DEFAULT_CHECKED_PLANS = 8

_sustained_s = argument(between(1, 3600, "s"), "seconds between 1 and 3600, such as 60s")
_plans = argument(whole, "a whole number, 0 for none")


def add_calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--model", type=Path, metavar="DIR", help="Measure the layers of this model too."
    )
    what.add_argument(
        "--shape",
        metavar="NAME",
        help=f"Measure the layers of a model whose weights are not here. {SHAPE_HELP}",
    )
    parser.add_argument(
        "--bits",
        type=argument_types.bits,
        metavar="4,8,16",
        help=f"Bits per weight to measure. Default: {','.join(map(str, DEFAULT_BITS))}, or "
        f"{','.join(map(str, QUALITY_BITS))} with --quality.",
    )
    parser.add_argument(
        "--backend",
        metavar="NAME",
        help="The backend to measure. Default: every backend that runs here.",
    )
    add_threads_argument(parser, of_service=True)
    parser.add_argument(
        "--sustain",
        type=_sustained_s,
        default=0.0,
        metavar="60s",
        help="Compute for so long, and compare the speed at the end with the first. "
        "Default: not at all.",
    )
    add_watts_argument(parser, "Default: what a sensor says.")
    parser.add_argument(
        "--full",
        action="store_true",
        help="Measure every point of the layer table, however long it takes.",
    )
    parser.add_argument(
        "--again",
        action="store_true",
        help="Measure again what is stored already, for this machine's agent too.",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE.svg",
        help="Draw a roofline, or with --quality a heat map.",
    )
    parser.add_argument(
        "--state-dir",
        type=Path,
        metavar="DIR",
        help="Where results are kept. Default: where this machine's agent keeps them.",
    )
    _add_quality_arguments(parser.add_argument_group("sensitivity to fewer bits"))


def _add_quality_arguments(quality: argparse._ActionsContainer) -> None:
    quality.add_argument(
        "--quality",
        action="store_true",
        help="Measure the sensitivity of each block. It needs --model.",
    )
    quality.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="A calibration text in UTF-8, with blank lines between passages. Default: a built-in "
        "English text.",
    )
    add_scheme_argument(quality)
    add_group_size_argument(quality)
    quality.add_argument(
        "--max-tokens",
        type=argument_types.count,
        default=1024,
        metavar="N",
        help="Use the first N tokens of the text. Default: %(default)s.",
    )
    quality.add_argument(
        "--check-plans",
        type=_plans,
        default=DEFAULT_CHECKED_PLANS,
        metavar="N",
        help="Measure N random mixed plans too, and compare each with the sum over its blocks. "
        "The largest ratio is the margin that plans keep. Default: %(default)s.",
    )
    quality.add_argument(
        "--on",
        metavar="NAME",
        help="Measure on this agent of the shoal, or with auto on the fastest. The coordinator "
        "keeps the results for --quality-budget. If it is stopped, ask again: it goes on where it "
        "was.",
    )
    add_url_argument(quality)


def run_calibrate(options: argparse.Namespace, screen: Screen) -> None:
    """Measure, show the results, and keep those that an agent can use.

    Raises CommandFailed.
    """
    from backends.base import BackendError
    from model.errors import ModelError

    if options.plot is not None and options.plot.suffix.lower() != ".svg":
        raise UsageError(f"--plot {options.plot}: only SVG is drawn; end the name in .svg")
    if options.on is not None and not options.quality:
        raise UsageError("--on NAME goes with --quality: a device measures itself when it joins")
    try:
        if options.quality:
            options.threads = options.threads or core_count()
        if options.quality and options.on is not None:
            quality_on_agent(options, screen)
        elif options.quality:
            quality_here(options, screen, options.state_dir or default_state_dir("agent"))
        else:
            target = target_of(options.state_dir)
            if target.unreachable is not None:
                screen.note(
                    f"the agent service here keeps its own figures, in {target.unreachable}: "
                    "`sudo shoal calibrate --again` measures those"
                )
            _device(options, screen, target)
    except (BackendError, ModelError) as error:
        raise CommandFailed(str(error)) from error


# ---- the device and its layers -----------------------------------------------------------------


def _device(options: argparse.Namespace, screen: Screen, target: Target) -> None:
    from backends.registry import backend_class
    from calibration.shapes import shape_spec
    from calibration.store import CalibrationStore
    from calibration.survey import slower_than_before, survey_device
    from calibration.table import measure_table
    from model.families import load_spec

    spec: ModelSpec | None = None
    if options.model is not None:
        spec = load_spec(options.model)
    elif options.shape is not None:
        spec = shape_spec(options.shape)
    options.threads = options.threads or target.threads
    store = CalibrationStore(target.state_dir / "calibration.json")
    with screen.counting("measuring the device") as on_step:
        survey = survey_device(
            target.state_dir,
            options.threads,
            backends=None if options.backend is None else [options.backend],
            sustain_s=options.sustain,
            declared_watts=options.watts,
            progress=on_step,
        )
    slower = slower_than_before(survey, store, again=options.again)
    usable = [backend.name for backend in survey.backends if backend.reason is None]
    name = target.backend if target.backend in usable and not options.backend else usable[0]
    table = None
    if spec is not None:
        with screen.counting("measuring layers") as on_step:
            table = measure_table(
                spec,
                options.bits or DEFAULT_BITS,
                backend_class(name)(),
                threads=options.threads,
                store=store,
                full=options.full,
                again=options.again,
                progress=on_step,
            )
    agent = measure_for_agent(target, options.threads, store, screen) if options.again else None
    if options.json:
        answer = {"device": asdict(survey), "layers": None if table is None else asdict(table)}
        screen.json({**answer, "slower_than_before": slower, "agent": agent})
    else:
        _show_survey(screen, survey)
        for line in slower:
            screen.out.print(f"slower than before: {line}", markup=False, soft_wrap=True)
        if spec is not None and table is not None:
            _show_table(screen, spec, table, name)
    if options.plot is not None:
        options.plot.write_text(_roofline(survey, table, name), encoding="utf-8")
        screen.note(f"drawn to {options.plot}")


def marked(conditions: Conditions | None) -> str:
    """The mark behind a figure that may be of a busy machine, or ""."""
    return NOISY if conditions is not None and conditions.is_noisy else ""


def _show_survey(screen: Screen, survey: DeviceSurvey) -> None:
    table = Table(title=escape(survey.machine), title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("measured", no_wrap=True)
    table.add_column("")
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
            table.add_row(f"{label}, {threads} {plural}", f"{rate / 1e9:.1f} GB/s{marked(of)}")
    table.add_row("storage free", format_size(survey.storage_free_bytes))
    written, of_disk = survey.disk_write_bytes_per_s, survey.conditions.get("disk")
    table.add_row("disk written, synchronously", f"{written / 1e6:.0f} MB/s{marked(of_disk)}")
    read = survey.disk_read_bytes_per_s
    table.add_row(
        "disk read, past the page cache",
        "not possible" if read is None else f"{read / 1e6:.0f} MB/s",
    )
    for backend in survey.backends:
        if backend.reason is not None:
            table.add_row(backend.name, escape(backend.reason))
        for bits, rate in backend.flops.items():
            table.add_row(
                f"{backend.name} {backend.version}, {bits} bits as executed",
                f"{rate / 1e9:.1f} GFLOP/s (best call {backend.best_flops[bits] / 1e9:.1f})"
                + marked(backend.conditions.get(bits)),
            )
    hottest_c = max(survey.temperatures_c.values(), default=None)
    table.add_row("hottest sensor", "no sensor" if hottest_c is None else f"{hottest_c:.0f} °C")
    if survey.throttling is not None:
        table.add_row("throttling now", ", ".join(survey.throttling.now) or "none")
        table.add_row("throttling since boot", ", ".join(survey.throttling.since_boot) or "none")
    watts = "no sensor; declare it with --watts"
    if survey.watts is not None:
        watts = f"{survey.watts:.1f} W ({survey.watts_source})"
    table.add_row("watts while computing", watts)
    if survey.sustained is not None:
        work = survey.sustained
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
    screen.table(table)
    if survey.sustained is not None and survey.sustained.cause:
        screen.out.print(f"slower in the end, cause: {survey.sustained.cause}", markup=False)
    conditions = [*survey.conditions.values()]
    for backend in survey.backends:
        conditions += backend.conditions.values()
    _say_noise(screen, conditions)


def _say_noise(screen: Screen, conditions: Iterable[Conditions | None]) -> None:
    """Print one line that explains the marks of a table."""
    noisy = worst(of for of in conditions if of is not None and of.is_noisy)
    if noisy is not None:
        screen.out.print(
            f"{NOISY.strip()} {noisy.text}; run it again with --again when it is quiet",
            markup=False,
            soft_wrap=True,
        )


def _show_table(screen: Screen, spec: ModelSpec, result: LayerTable, backend: str) -> None:
    variants = sorted({timing.variant for timing in result.layers})
    for variant in variants:
        timings = [timing for timing in result.layers if timing.variant == variant]
        columns = sorted({(timing.context == "long", timing.rows) for timing in timings})
        name = "one layer" if len(variants) == 1 else f"one layer of shape {variant}"
        ends = {timing.context: timing.position + timing.rows for timing in timings}
        table = Table(
            title=f"{name}, ms a call by {backend}",
            title_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        table.add_column("rows", justify="right")
        table.add_column("context", no_wrap=True)
        widths = sorted({(timing.container_bits, timing.bits) for timing in timings})
        for container, bits in widths:
            stored = ",".join(map(str, bits))
            table.add_column(f"{stored} bits (runs as {container})", justify="right")
        for long_context, rows in columns:
            cells = []
            for container, _ in widths:
                found = [
                    f"{timing.seconds * 1e3:.2f}{marked(timing.conditions)}"
                    for timing in timings
                    if (timing.context == "long", timing.rows, timing.container_bits)
                    == (long_context, rows, container)
                ]
                cells.append(found[0] if found else "-")
            table.add_row(str(rows), "long" if long_context else "short", *cells)
        for label, field in (("memory charged", "charged_bytes"), ("memory taken", "taken_bytes")):
            cells = []
            for container, _ in widths:
                sizes = [
                    getattr(memory, field)
                    for memory in result.memory
                    if (memory.variant, memory.container_bits) == (variant, container)
                ]
                cells.append(format_size(sizes[0]) if sizes and sizes[0] is not None else "-")
            table.add_row("", label, *cells)
        screen.table(table, keys=2)
        if "long" in ends:
            screen.out.print(f"long: up to {ends['long']} tokens are seen, which memory includes")
    others = Table(title="embedding and head, ms", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("block", "bits"):
        others.add_column(column)
    others.add_column("1 row", justify="right")
    others.add_column("a prompt's row", justify="right")
    for timing in result.embedding_and_head:
        others.add_row(
            timing.kind,
            str(timing.bits),
            f"{timing.decode_s * 1e3:.3f}{marked(timing.conditions)}",
            f"{timing.prefill_s_per_token * 1e3:.4f}",
        )
    screen.table(others, keys=2)
    _say_noise(
        screen,
        [
            item.conditions
            for timings in (result.layers, result.embedding_and_head)
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


def _roofline(survey: DeviceSurvey, table: LayerTable | None, name: str) -> str:
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
    (backend,) = (backend for backend in survey.backends if backend.name == name)
    title = f"{survey.machine}, {survey.threads} threads, {name} {backend.version}"
    read = survey.memory_read_bytes_per_s[survey.threads]
    return roofline_svg(title, read, backend.best_flops, points)
