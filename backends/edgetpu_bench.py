"""Commands for the owner of an Edge TPU: compile ahead, and check that the chip works."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from backends.base import BackendError, Capabilities, StageOptions
from backends.edgetpu import ON_CHIP_BYTES, Int8Stage, TfliteCpuBackend, compile_stage
from backends.edgetpu_compiler import (
    Compiled,
    Compiler,
    compile_files,
    default_directory,
    find_compiled,
)
from backends.edgetpu_devices import check_in_child
from backends.edgetpu_product import Int8Weights
from backends.edgetpu_runtime import Engine, Runtime, Target
from backends.edgetpu_tflite import fully_connected
from model.spec import ModelSpec

SHAPES = ((512, 512), (2048, 2048), (4096, 4096))
"""A small product, one that fills most of the chip, and one of twice the chip's memory.

The last one's weights cross the bus at every call.
"""

_ROWS = 64
_REPEATS = 20


class CompilingBackend(TfliteCpuBackend):
    """Runs on the CPU, and compiles the loaded blocks for the chip into ``directory``.

    Measuring a model with it makes the files that a device without compiler needs for the same
    measurement, because the random blocks are the same everywhere. ``compiled`` has them by the key
    of the stage.
    """

    def __init__(self, compiler: Compiler, directory: Path) -> None:
        self.compiled: dict[str, Compiled] = {}
        self._compiler = compiler
        self._directory = directory

    @classmethod
    def probe(cls) -> Capabilities:
        # The amount that is timed at once depends on it.
        return replace(super().probe(), on_chip_bytes=ON_CHIP_BYTES)

    def load(
        self, spec: ModelSpec, artifacts: Sequence[tuple[int, Path]], options: StageOptions
    ) -> Int8Stage:
        layers = sum(spec.block_kind(block) == "layer" for block, _ in artifacts)
        if layers:
            what = f"measuring: {layers} of hidden {spec.hidden}, MLP {spec.layers[0].ffn}"
            self.compiled[what] = compile_stage(spec, artifacts, self._compiler, self._directory)
        return super().load(spec, artifacts, options)


@dataclass(frozen=True, slots=True)
class ProductTiming:
    """One product [N, K] on the chip: seconds of a call with one row, and per row of 64."""

    shape: tuple[int, int]
    one_row_s: float
    s_per_row: float
    streamed_bytes: int


def compile_check(compiler: Compiler, directory: Path) -> list[tuple[str, Compiled]]:
    """Compile the products that ``check_products`` runs. Raises BackendError."""
    with tempfile.TemporaryDirectory(prefix="shoal-edgetpu-") as name:
        return [
            (f"check {shape[0]} x {shape[1]}", compile_files(compiler, [path], directory))
            for shape, path in _files(Path(name))
        ]


def check_products(
    runtime: Runtime, target: Target, compiler: Compiler | None, directory: Path | None
) -> list[ProductTiming]:
    """Run each product on the chip, compare it with the CPU in a child process, and time it here.

    ``directory`` has compiled files. Raises BackendError if one is missing, fails or differs.
    """
    directory = directory or default_directory()
    check_in_child(runtime, target)
    timings = []
    with tempfile.TemporaryDirectory(prefix="shoal-edgetpu-") as name:
        for shape, path in _files(Path(name)):
            if compiler is not None:
                found: Compiled | None = compile_files(compiler, [path], directory)
            else:
                found = find_compiled(directory, [path], None)
            if found is None:
                raise BackendError(
                    f"the chip can be opened, but {directory} has no compiled product to run: run"
                    " `shoal edgetpu compile MODEL -o DIR` on an x86-64 machine, and copy the files"
                    " in DIR"
                )
            check_in_child(runtime, target, (found.files[0], path))
            with closing(Engine(runtime, found.files[0], target, 1)) as engine:
                one_row_s, rows_s = _median_s(engine, 1), _median_s(engine, _ROWS)
            timings.append(ProductTiming(shape, one_row_s, rows_s / _ROWS, found.streamed_bytes))
    return timings


def _files(directory: Path) -> list[tuple[tuple[int, int], Path]]:
    """Write the products' .tflite files. Their random weights are the same on every machine."""
    files = []
    for shape in SHAPES:
        random = np.random.default_rng(0)
        weights = Int8Weights.of(random.random(shape, np.float32) - np.float32(0.5))
        path = directory / f"{shape[0]}x{shape[1]}.tflite"
        path.write_bytes(fully_connected(weights.codes, weights.multipliers).content)
        files.append((shape, path))
    return files


def _median_s(engine: Engine, rows: int) -> float:
    codes = np.random.default_rng(0).integers(-127, 128, (rows, engine.width)).astype(np.int8)
    engine.run(codes)
    times_s = []
    for _ in range(_REPEATS):
        before_s = time.perf_counter()
        engine.run(codes)
        times_s.append(time.perf_counter() - before_s)
    return float(np.median(times_s))
