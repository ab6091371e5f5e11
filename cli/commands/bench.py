"""``shoal bench``: measures tokens per second of a whole model on this device, from its shape."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from cli import argument_types
from cli.errors import UsageError, failed
from cli.render import Screen, titled_table
from cli.shared_arguments import add_group_size_argument, add_threads_argument
from wire.sizes import format_size

if TYPE_CHECKING:
    from calibration.speed import StageSpeed

ABOUT = (
    "A shape is a model without its weights: random ones take their place. The whole model runs on "
    "this device, without a coordinator. The command shows tokens per second of decoding and of a "
    "prompt, the load time and the memory."
)
EXAMPLES = (
    "  shoal bench\n"
    "  shoal bench --shape qwen2.5-0.5b --bits 8 --threads 4\n"
    "  shoal bench --shape ./config.json --context 32,4000 --json\n"
    "  shoal bench --bits 4,8          # two runs\n"
    "  shoal bench --bits 4,8 --mixed  # one run, with layers at 4 and 8 bits in turn\n"
)
SHAPE_HELP = (
    "A name like llama-1b, gemma3-1b or olmo2-1b (a wrong one lists all), or the path of a "
    "config.json."
)


def _numbers(text: str) -> list[int]:
    return [argument_types.count(part) for part in text.split(",")]


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shape",
        default="llama-1b",
        metavar="NAME",
        help=f"{SHAPE_HELP} Default: %(default)s.",
    )
    parser.add_argument(
        "--backend",
        type=argument_types.backend,
        default="onnx_cpu",
        metavar="NAME",
        help="The backend to run. `shoal agent --list-backends` shows all. Default: %(default)s.",
    )
    parser.add_argument(
        "--bits",
        type=_numbers,
        default="4",
        metavar="4,8",
        help="Bits per weight, with one run for each width. Default: %(default)s.",
    )
    add_group_size_argument(parser)
    add_threads_argument(parser)
    parser.add_argument(
        "--context",
        type=_numbers,
        default="32,900",
        metavar="N,N",
        help="Context lengths at which decoding is measured, in tokens. Default: %(default)s.",
    )
    parser.add_argument(
        "--prompt",
        type=argument_types.count,
        default=512,
        metavar="N",
        help="Length of the measured prompt, in tokens. Default: %(default)s.",
    )
    parser.add_argument(
        "--rounds",
        type=argument_types.count,
        default=5,
        metavar="N",
        help="How often each measurement is repeated. Default: %(default)s.",
    )
    parser.add_argument(
        "--mixed",
        action="store_true",
        help="Make one run in which the layers take the widths of --bits in turn.",
    )
    parser.add_argument(
        "--exact",
        action="store_true",
        help="Compute with activations that are not rounded. This is slower.",
    )
    parser.add_argument(
        "--fast-prompts",
        action="store_true",
        help="Run prompts through a second copy of the layers, as `shoal agent` does with this "
        "option.",
    )
    parser.add_argument(
        "--directory",
        type=Path,
        metavar="DIR",
        help="Where the weights are written during the run. Default: the directory for temporary "
        "files.",
    )


def run_bench(options: argparse.Namespace, screen: Screen) -> None:
    """Measure each width and show it. Raises CommandFailed."""
    from backends.base import BackendError
    from backends.registry import backend_class
    from calibration.machine import processor_name
    from calibration.shapes import shape_spec
    from calibration.speed import SpeedOptions, measure_speed
    from model.errors import ModelError
    from model.quantize import BITS, Format

    if not set(options.bits) <= set(BITS):
        raise UsageError(f"--bits {options.bits}: only {', '.join(map(str, BITS))} exist")
    formats = [Format.of(width, "rtn", options.group_size) for width in options.bits]
    runs = [formats] if options.mixed else [[fmt] for fmt in formats]
    speed_options = SpeedOptions(
        threads=options.threads,
        contexts=tuple(options.context),
        prompt_tokens=options.prompt,
        rounds=options.rounds,
        exact=options.exact,
        fast_prompts=options.fast_prompts,
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
        raise failed(error) from error
    processor = processor_name()
    if options.json:
        head = {"processor": processor, "shape": options.shape, "backend": options.backend}
        screen.json(head | {"exact": options.exact, "runs": [asdict(item) for item in results]})
        return
    for result in results:
        _show(screen, f"{options.shape} on {processor}", result)


def _show(screen: Screen, title: str, result: StageSpeed) -> None:
    table = titled_table(title)
    table.add_column("measured", no_wrap=True, min_width=18)
    table.add_column("")
    bits = ",".join(map(str, result.bits))
    group = f", groups of {result.group_size}" if result.group_size else ""
    weights = f"{bits} bits{group}; {format_size(result.packed_bytes)} packed"
    if result.executed_bytes != result.packed_bytes:
        weights += f", {format_size(result.executed_bytes)} as executed"
    table.add_row("weights", weights)
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
        rate = result.executed_bytes / result.load_again_s / 1e6
        again = f", then {result.load_again_s:.2f} s ({rate:.0f} MB/s)"
    table.add_row("load", f"{result.load_s:.2f} s{again}")
    table.add_row(
        "memory",
        f"{format_size(result.rss_bytes)} resident; stated {format_size(result.stated_bytes)}, "
        f"of which KV cache {format_size(result.kv_bytes)}",
    )
    screen.table(table)
