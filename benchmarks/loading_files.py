"""Time and memory of quantizing one model from each kind of file that people have.

    python -m benchmarks.loading_files              # Llama 3.2 1B's shape, to 4 bits, groups of 64
    python -m benchmarks.loading_files --files gguf-q4_k gptq --bits 8 --json

The files hold random weights and are made first, in a folder that needs 5 GB. A process of its own
then quantizes each, as a load does it: block by block, each written to the disk. Seconds are
wall-clock, with the file in the page cache. `own` is the largest anonymous memory of the process
beyond what it has after its imports, looked at every 5 ms. Pages of the mapped file do not count,
because the system takes them back when it needs memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.gguf import write_llama
from calibration.shapes import SHAPES, shape_spec
from model.artifact import write_artifact
from model.checkpoint import Checkpoint
from model.families import tensor_sources
from model.families.config import Config
from model.quantize import Format, QuantizedMatrix
from model.safetensors import write_safetensors
from model.spec import QUANTIZED_TENSORS, ModelSpec

FILES = ("safetensors", "gguf-q8_0", "gguf-q4_0", "gguf-q4_k", "gptq")
CONTEXT_TOKENS = 2048
GPTQ_GROUP = 128
MIB = 1 << 20


def main() -> None:
    options = _arguments()
    if options.child is not None:
        print(json.dumps(_measure(options.child, options.bits, options.group_size)))
        return
    with TemporaryDirectory(prefix="shoal-files-", dir=options.directory) as folder:
        results = [
            _of_kind(kind, Path(folder), options.shape, options.bits, options.group_size)
            for kind in options.files
        ]
    if options.json:
        print(json.dumps({"shape": options.shape, "bits": options.bits, "results": results}))
        return
    print(f"{'file':<12} {'size MB':>8} {'open s':>7} {'load s':>7} {'own MiB':>8} {'kept':>5}")
    for row in results:
        print(
            f"{row['kind']:<12} {row['file_bytes'] / 1e6:>8.0f} {row['open_s']:>7.2f}"
            f" {row['load_s']:>7.1f} {row['own_bytes'] / MIB:>8.0f} {row['kept']:>5}"
        )
    print(
        f"largest block: {results[0]['block_bytes'] / MIB:.0f} MiB as float32;"
        " kept: matrices whose codes are the file's own"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--files", nargs="+", choices=FILES, default=list(FILES))
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-1b")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--directory", type=Path, help="Where the files are made.")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _of_kind(kind: str, folder: Path, shape: str, bits: int, group_size: int) -> dict[str, Any]:
    """Make a file, quantize it in another process, and remove it."""
    model = make_file(kind, folder / kind, shape)
    files = [model] if model.is_file() else [path for path in model.iterdir() if path.is_file()]
    command = [sys.executable, "-m", "benchmarks.loading_files", f"--child={model}"]
    command += [f"--bits={bits}", f"--group-size={group_size}"]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 - itself
    for path in files:
        path.unlink()
    row: dict[str, Any] = json.loads(answer.stdout)
    return row | {"kind": kind, "file_bytes": row["file_bytes"]}


# ---- files -------------------------------------------------------------------------------------


def make_file(kind: str, folder: Path, shape: str) -> Path:
    """Write a model of random weights, and return what a user would give."""
    folder.mkdir()
    spec = shape_spec(shape)
    if kind.startswith("gguf-"):
        write_llama(folder / "model.gguf", spec, kind.removeprefix("gguf-"), CONTEXT_TOKENS)
        return folder / "model.gguf"
    config = dict(SHAPES[shape]) | {"max_position_embeddings": CONTEXT_TOKENS}
    random = np.random.default_rng(0)
    tensors: dict[str, Any] = {}
    if kind == "gptq":
        config["quantization_config"] = {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": GPTQ_GROUP,
            "sym": True,
            "desc_act": False,
        }
    for name, size in _names(shape, spec).items():
        if kind == "gptq" and len(size) == 2 and name.startswith("model.layers."):
            tensors |= _gptq(name.removesuffix("weight"), size, random)
        else:
            tensors[name] = _half(size, random)
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


def _names(shape: str, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The tensors of a plain checkpoint, and their shapes."""
    config = Config(Path(shape), SHAPES[shape])
    names: dict[str, tuple[int, ...]] = {}
    for block in range(spec.block_count):
        shapes = spec.block_tensors(block)
        for canonical, source in tensor_sources(config, spec, block, ()).items():
            names[source[0].name] = shapes[canonical]
    return names


def _half(size: tuple[int, ...], random: np.random.Generator) -> Any:
    if len(size) == 1:
        return np.ones(size, np.float16)
    values = random.random(size, np.float32)
    values -= 0.5
    values *= np.float32(2 / size[1] ** 0.5)
    return values.astype(np.float16)


def _gptq(prefix: str, size: tuple[int, ...], random: np.random.Generator) -> dict[str, Any]:
    """Codes of 4 bits along the inputs, zeros of 7 (8 less one) and scales, transposed."""
    rows, columns = size
    groups = columns // GPTQ_GROUP
    words = random.integers(0, 256, (columns // 8, rows, 4), np.uint8).view(np.int32)[..., 0]
    return {
        f"{prefix}qweight": words,
        f"{prefix}qzeros": np.full((groups, rows // 8), 0x77777777, np.int32),
        f"{prefix}scales": np.full((groups, rows), 1 / (8 * columns**0.5), np.float16),
        f"{prefix}g_idx": (np.arange(columns) // GPTQ_GROUP).astype(np.int32),
    }


# ---- measuring ---------------------------------------------------------------------------------


def _measure(model: Path, bits: int, group_size: int) -> dict[str, Any]:
    """Quantize a model as a load does, in this process, which does nothing else."""
    files = [model] if model.is_file() else list(model.glob("*.safetensors"))
    file_bytes = 0
    for path in files:  # Into the page cache, so that the disk is not what is measured.
        with path.open("rb") as file:
            while piece := file.read(1 << 24):
                file_bytes += len(piece)
    del piece
    fmt, kept, largest = Format.of(bits, group_size=group_size), 0, 0
    with _PeakMemory() as peak, TemporaryDirectory(dir=model.parent) as target:
        begin = time.perf_counter()
        checkpoint = Checkpoint.open(model)
        opened = time.perf_counter()
        for block in range(checkpoint.spec.block_count):
            shapes = checkpoint.spec.block_tensors(block).values()
            largest = max(largest, sum(4 * int(np.prod(shape)) for shape in shapes))
            own = checkpoint.format_of(block, fmt)
            tensors = checkpoint.block_in(block, own)
            kept += sum(
                isinstance(tensor, QuantizedMatrix)
                for name, tensor in tensors.items()
                if name in QUANTIZED_TENSORS
            )
            write_artifact(Path(target), block, tensors, own).path.unlink()
            del tensors
        done = time.perf_counter()
    return {
        "open_s": opened - begin,
        "load_s": done - begin,
        "own_bytes": peak.bytes,
        "block_bytes": largest,
        "file_bytes": file_bytes,
        "kept": kept,
    }


class _PeakMemory:
    """The largest anonymous memory of this process beyond that at the start."""

    def __init__(self) -> None:
        self.bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(_anonymous_bytes(),))

    def __enter__(self) -> _PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self, before: int) -> None:
        read: Callable[[], int] = _anonymous_bytes
        while not self._stop.wait(0.005):
            self.bytes = max(self.bytes, read() - before)


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("this kernel does not tell a process's anonymous memory")


if __name__ == "__main__":
    main()
