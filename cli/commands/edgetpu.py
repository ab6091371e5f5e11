"""``shoal edgetpu``: compiles a model for a Coral Edge TPU, and checks the one here."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from cli.commands.model_names import model_here
from cli.errors import CommandFailed, UsageError, failed
from cli.render import Screen
from cli.shared_arguments import add_group_size_argument, add_scheme_argument
from wire.sizes import format_size

if TYPE_CHECKING:
    from backends.edgetpu_compiler import Compiled

ROOT = Path("/")
"""The directory with /sys and /dev."""

ABOUT = (
    "Google's edgetpu_compiler runs on x86-64 only. If it is on a coordinator's or an agent's "
    "PATH, `shoal load` compiles by itself. Otherwise compile on another machine, and copy the "
    "files to the device."
)
EXAMPLES = (
    "  shoal edgetpu check\n"
    "  shoal edgetpu compile ./opt-350m -o compiled\n"
    "  shoal edgetpu compile ./opt-350m --layers 3:8 -o compiled\n"
    "  rsync -a compiled/ pi-3:.cache/shoal/edgetpu/  # the device finds them there\n"
)


def add_edgetpu_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        choices=("check", "compile"),
        help="Run matrix products on the chip, compare them with the CPU and time them (check). "
        "Or make the files for a device without edgetpu_compiler (compile).",
    )
    parser.add_argument(
        "model",
        nargs="?",
        type=Path,
        metavar="MODEL",
        help="The Hugging Face model directory to compile.",
    )
    parser.add_argument(
        "--layers",
        type=_layers,
        action="append",
        default=[],
        metavar="A:B",
        help="Compile layers A to B - 1 as one stage, as `shoal plan` placed them. May be "
        "repeated. Without it, only the files for measuring are made.",
    )
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        metavar="DIR",
        help="Where the files go. Default: ~/.cache/shoal/edgetpu, where agents look.",
    )
    add_scheme_argument(parser)
    add_group_size_argument(parser)


def run_edgetpu(options: argparse.Namespace, screen: Screen) -> None:
    """Carry out the action. Raises CommandFailed."""
    from backends.base import BackendError
    from model.errors import ModelError

    if (options.action == "compile") != (options.model is not None):
        raise UsageError("usage: shoal edgetpu check, or shoal edgetpu compile MODEL")
    if options.model is not None:
        options.model = model_here(options.model, screen)
    try:
        (_compile if options.model else _check)(options, screen)
    except (BackendError, ModelError) as error:
        raise failed(error) from error


def _compile(options: argparse.Namespace, screen: Screen) -> None:
    from backends.edgetpu import BITS, compile_stage
    from backends.edgetpu_bench import CompilingBackend, compile_check
    from backends.edgetpu_compiler import COMPILER, default_directory, find_compiler
    from calibration.layers import measure_call, measure_model
    from calibration.survey import compute_call
    from model.artifact import write_artifact
    from model.checkpoint import Checkpoint
    from model.quantize import Format

    compiler = find_compiler()
    if compiler is None:
        raise CommandFailed(
            f"{COMPILER} is not on PATH: install Google's, for x86-64 Linux, as docs/hardware.md"
            " says"
        )
    directory = options.out or default_directory()
    checkpoint = Checkpoint.open(options.model)
    spec, fmt = checkpoint.spec, Format.of(BITS, options.scheme, options.group_size)
    for first, end in options.layers:
        if end > len(spec.layers):
            raise UsageError(f"--layers {first}:{end}: the model has {len(spec.layers)} layers")
    found: list[tuple[str, Compiled]] = []
    with tempfile.TemporaryDirectory(prefix="shoal-edgetpu-") as name:
        work = Path(name)
        for first, end in options.layers:
            screen.note(f"compiling layers {first} to {end - 1}")
            artifacts = []
            for block in range(first + 1, end + 1):
                own = checkpoint.format_of(block, fmt)
                tensors = checkpoint.block_in(block, own)
                artifacts.append((block, write_artifact(work, block, tensors, own).path))
            compiled = compile_stage(spec, artifacts, compiler, directory)
            found.append((f"layers {first} to {end - 1}", compiled))
        screen.note("compiling what measuring needs")
        backend = CompilingBackend(compiler, directory)
        measure_call(backend, 1, work)
        measure_model(spec, [BITS], backend, threads=1, directory=work)
        with compute_call(backend, BITS, 1, work):
            pass
        found += [(what, compiled) for what, compiled in backend.compiled.items()]
        found += compile_check(compiler, directory)
    _show_compiled(screen, compiler.version, directory, found)


def _show_compiled(
    screen: Screen, version: str, directory: Path, found: Sequence[tuple[str, Compiled]]
) -> None:
    if screen.json_output:
        screen.json(
            {
                "directory": str(directory),
                "compiler": version,
                "stages": [
                    {
                        "stage": what,
                        "files": len(compiled.files),
                        "streamed_bytes": compiled.streamed_bytes,
                    }
                    for what, compiled in found
                ],
            }
        )
        return
    table = Table(title=f"compiled by {version} into {escape(str(directory))}")
    for column in ("stage", "files", "off chip"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for what, compiled in found:
        off_chip = format_size(compiled.streamed_bytes) if compiled.streamed_bytes else "-"
        table.add_row(what, str(len(compiled.files)), off_chip)
    screen.table(table)


def _check(options: argparse.Namespace, screen: Screen) -> None:
    from backends.edgetpu_bench import check_products
    from backends.edgetpu_compiler import find_compiler
    from backends.edgetpu_devices import choose_target, find_devices
    from backends.edgetpu_runtime import find_runtime

    runtime, target, compiler = find_runtime(edge_tpu=True), choose_target(ROOT), find_compiler()
    if not options.json:
        for device in find_devices(ROOT):
            screen.out.print(f"found {device}")
        version = "none" if compiler is None else compiler.version
        screen.out.print(f"runtime {runtime}, library {target.library}, compiler {version}")
    results = check_products(runtime, target, compiler, options.out)
    if options.json:
        screen.json(
            {
                "device": target.device,
                "runtime": str(runtime),
                "library": target.library,
                "products": [
                    {
                        "shape": list(result.shape),
                        "one_row_s": result.one_row_s,
                        "s_per_row": result.s_per_row,
                        "streamed_bytes": result.streamed_bytes,
                    }
                    for result in results
                ],
            }
        )
        return
    table = Table(title=f"Edge TPU {target.device}: equal to the CPU within one code")
    for column in ("product", "ms, 1 row", "ms a row of 64", "off chip"):
        table.add_column(column, justify="right")
    for result in results:
        table.add_row(
            " x ".join(map(str, result.shape)),
            f"{1e3 * result.one_row_s:.3f}",
            f"{1e3 * result.s_per_row:.3f}",
            format_size(result.streamed_bytes) if result.streamed_bytes else "-",
        )
    screen.table(table)


def _layers(text: str) -> tuple[int, int]:
    first, separator, end = text.partition(":")
    if separator and first.isdigit() and end.isdigit() and int(first) < int(end):
        return int(first), int(end)
    raise argparse.ArgumentTypeError(f"{text!r}: expected FIRST:END, such as 3:8")
