"""``shoal bench``: tokens per second of a whole model on this device alone, from its shape."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.table import Table

from cli.errors import CommandFailed, UsageError
from cli.render import Screen
from wire.sizes import format_size, parse_size

if TYPE_CHECKING:
    from calibration.speed import StageSpeed

EXAMPLES = (
    "  shoal bench                                         llama-1b at 4 bits\n"
    "  shoal bench --shape qwen2.5-0.5b --bits 8 --threads 4\n"
    "  shoal bench --shape ./config.json --context 32,4000 --json\n"
    "  shoal bench --memory 8G                             with room for a copy for prompts\n"
    "  shoal bench --bits 4,8 --mixed                      layers at 4 and 8 bits in turn\n"
)
"""For the command's help."""

_BITS = (2, 3, 4, 5, 6, 8, 16, 32)


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything but ``--json``, which all commands share."""
    parser.add_argument(
        "--shape",
        default="llama-1b",
        metavar="NAME",
        help="llama-1b, opt-350m, tinyllama, qwen2.5-0.5b, or a config.json; default llama-1b",
    )
    parser.add_argument("--backend", default="onnx_cpu", metavar="NAME", help="default: onnx_cpu")
    parser.add_argument(
        "--bits", type=_numbers, default=[4], metavar="4", help="one run each; default 4"
    )
    parser.add_argument(
        "--group-size", type=int, choices=(32, 64, 128), default=64, help="default 64"
    )
    parser.add_argument("--threads", type=_count, default=len(os.sched_getaffinity(0)), metavar="N")
    parser.add_argument(
        "--context",
        type=_numbers,
        default=[32, 900],
        metavar="N",
        help="tokens behind the decoded ones; default 32,900",
    )
    parser.add_argument("--prompt", type=_count, default=512, metavar="N", help="default 512")
    parser.add_argument("--rounds", type=_count, default=5, metavar="N", help="default 5")
    parser.add_argument(
        "--mixed", action="store_true", help="one run, whose layers take the widths in turn"
    )
    parser.add_argument(
        "--exact", action="store_true", help="fp32 activations, as results are compared with"
    )
    parser.add_argument(
        "--memory", type=_size, metavar="SIZE", help="that a stage may take, as an agent's: 8G"
    )
    parser.add_argument(
        "--directory", type=Path, metavar="DIR", help="for the weights meanwhile; default: /tmp"
    )


def run_bench(options: argparse.Namespace, screen: Screen) -> None:
    """Measure each width and show it. Raises CommandFailed."""
    from backends.base import BackendError
    from backends.registry import backend_class
    from calibration.machine import processor_name
    from calibration.shapes import shape_spec
    from calibration.speed import SpeedOptions, measure_speed
    from model.errors import ModelError
    from model.quantize import Format

    if not set(options.bits) <= set(_BITS):
        raise UsageError(f"--bits {options.bits}: only {', '.join(map(str, _BITS))} exist")
    formats = [Format.of(width, "rtn", options.group_size) for width in options.bits]
    runs = [formats] if options.mixed else [[fmt] for fmt in formats]
    speed_options = SpeedOptions(
        threads=options.threads,
        contexts=tuple(options.context),
        prompt_tokens=options.prompt,
        rounds=options.rounds,
        exact=options.exact,
        memory_bytes=options.memory,
    )
    results = []
    try:
        spec = shape_spec(options.shape)
        backend = backend_class(options.backend)()
        for run in runs:
            label = f"{options.shape}, {','.join(str(fmt.bits) for fmt in run)} bits"
            with screen.progress() as on_step:

                def on_progress(done: int, total: int, label: str = label) -> None:
                    on_step(
                        {"phase": label, "label": "", "done": done, "total": total, "unit": "steps"}
                    )

                results.append(
                    measure_speed(
                        spec,
                        run,
                        backend,
                        speed_options,
                        directory=options.directory,
                        progress=on_progress,
                    )
                )
    except (BackendError, ModelError) as error:
        raise CommandFailed(str(error)) from error
    processor = processor_name()
    if options.json:
        head = {"processor": processor, "shape": options.shape, "backend": options.backend}
        screen.json(head | {"exact": options.exact, "runs": [asdict(item) for item in results]})
        return
    for result in results:
        _show(screen, f"{options.shape} on {processor}", result)


def _show(screen: Screen, title: str, result: StageSpeed) -> None:
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("measured", no_wrap=True, min_width=18)
    table.add_column("", no_wrap=True)
    bits = ",".join(map(str, result.bits))
    group = f", groups of {result.group_size}" if result.group_size else ""
    table.add_row("weights", f"{bits} bits{group}; {format_size(result.packed_bytes)} packed")
    table.add_row("threads", str(result.threads))
    for decode in result.decode:
        table.add_row(
            f"decode past {decode.context}",
            f"{decode.tokens_per_s:.1f} tokens/s, {decode.bandwidth_share:.0%} of what "
            f"{result.memory_read_bytes_per_s / 1e9:.1f} GB/s allow",
        )
    table.add_row(
        f"prompt of {result.prompt_tokens}", f"{result.prefill_tokens_per_s:.0f} tokens/s"
    )
    again = ""
    if result.load_again_s is not None:
        rate = result.packed_bytes / result.load_again_s / 1e6
        again = f", then {result.load_again_s:.2f} s ({rate:.0f} MB/s)"
    table.add_row("load", f"{result.load_s:.2f} s{again}")
    table.add_row(
        "memory",
        f"{format_size(result.rss_bytes)} resident; stated {format_size(result.stated_bytes)}, "
        f"of which KV cache {format_size(result.kv_bytes)}",
    )
    screen.out.print(table)


def _count(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number above 0")
    return value


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _numbers(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]
