"""Where a token and a prompt spend their time on a GPU: the kernels, and what the host adds.

    python -m benchmarks.gpu_profile --shape llama-1b --bits 4
    python -m benchmarks.gpu_profile --shape llama-1b --bits 4 8 16 --json > profile.json

One stage holds the whole model in random weights. Wall times are medians without the profiler: of a
prompt in chunks, and of tokens one at a time. Then torch's profiler counts the kernels of some
tokens and of one prompt, and adds up their time on the GPU. `--backend torch_cpu --bits 16` tries
this script without a GPU; it lists torch's operators instead.

The log names the kernel of each product with the time by which it was chosen.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from backends.base import Array, Backend, BackendError, Stage, StageOptions
from backends.registry import backend_class
from calibration.layers import random_artifacts
from calibration.shapes import shape_spec
from model.errors import ModelError
from model.quantize import Format
from model.spec import ModelSpec

SHORT = 32
"""The position of the first measured token. Others are past ``--context``."""

PROFILED_TOKENS = 8
TIMED_TOKENS = 20
CHUNK = 64
PROFILED_CHUNKS = 2


@dataclass(frozen=True, slots=True)
class Kernel:
    """All launches of one kernel in a token or a prompt."""

    name: str
    launches: float
    gpu_us: float


@dataclass(frozen=True, slots=True)
class Profile:
    """The kernels of one token or of one prompt, the longest first."""

    wall_ms: float
    launches: float
    gpu_ms: float
    kernels: tuple[Kernel, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """The times of one width. Wall times are medians without the profiler, but for profiles."""

    shape: str
    bits: int
    device: str
    load_s: float
    token_ms: float
    late_token_ms: float
    prompt_ms: float
    prompt_tokens: int
    token: Profile
    prompt: Profile


class Model:
    """A loaded stage with the tokens that it is fed."""

    def __init__(self, spec: ModelSpec, stage: Stage, count: int) -> None:
        self._stage = stage
        self._tokens = np.random.default_rng(0).integers(0, spec.vocab, count)

    def token(self, position: int) -> Array:
        return self._stage.forward(0, position, self._tokens[position : position + 1])

    def prompt(self, count: int) -> None:
        """Run a prompt in chunks as an agent does, and wait for its last row."""
        for first in range(0, count, CHUNK):
            last = min(first + CHUNK, count)
            self._stage.forward(0, first, self._tokens[first:last], logits=last == count)


@contextmanager
def loaded(
    spec: ModelSpec, bits: int, backend: Backend, options: StageOptions
) -> Iterator[tuple[Stage, float]]:
    """Yield a stage of random weights, and the seconds of its load."""
    formats = [Format.of(bits)] * spec.block_count
    with TemporaryDirectory(prefix=".shoal-bench-") as name:
        artifacts = list(random_artifacts(Path(name), spec, range(spec.block_count), formats))
        started_s = time.perf_counter()
        with closing(backend.load(spec, artifacts, options)) as stage:
            yield stage, time.perf_counter() - started_s


def measure(shape: str, bits: int, asked: argparse.Namespace) -> Report:
    spec, backend = shape_spec(shape), backend_class(asked.backend)()
    count = max(asked.context + TIMED_TOKENS, PROFILED_CHUNKS * CHUNK)
    options = StageOptions(2, count, asked.threads)
    with loaded(spec, bits, backend, options) as (stage, load_s):
        model = Model(spec, stage, count)

        def token_ms(past: int) -> float:
            return median(timed(partial(model.token, past + at)) for at in range(TIMED_TOKENS))

        prompt_tokens = asked.context - asked.context % CHUNK
        model.prompt(prompt_tokens)  # The first pass of each length captures its graph.
        return Report(
            shape,
            bits,
            backend.probe().version,
            load_s,
            token_ms(SHORT),
            token_ms(asked.context),
            median(timed(lambda: model.prompt(prompt_tokens)) for _ in range(asked.rounds)),
            prompt_tokens,
            profiled(lambda: decode(model, PROFILED_TOKENS), PROFILED_TOKENS),
            profiled(lambda: model.prompt(PROFILED_CHUNKS * CHUNK), 1),
        )


def decode(model: Model, count: int) -> None:
    for at in range(count):
        model.token(SHORT + at)


def timed(call: Callable[[], object]) -> float:
    """Return the milliseconds of a call, which waits for its result."""
    started_s = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - started_s)


def profiled(call: Callable[[], object], parts: int) -> Profile:
    """Return what a call ran, divided by ``parts``."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as run:
        wall_ms = timed(call)
    totals: dict[str, list[float]] = {}
    for event in run.events():
        if on_gpu and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        total = totals.setdefault(event.name, [0, 0.0])
        total[0] += 1 / parts
        total[1] += microseconds(event, on_gpu) / parts
    kernels = [Kernel(name, *total) for name, total in totals.items()]
    kernels.sort(key=lambda kernel: -kernel.gpu_us)
    return Profile(
        wall_ms / parts,
        sum(kernel.launches for kernel in kernels),
        sum(kernel.gpu_us for kernel in kernels) / 1e3,
        tuple(kernels),
    )


def microseconds(event: Any, on_gpu: bool) -> float:
    """Return an event's own time. torch 2.4 and later versions name it differently."""
    on_device = ("device_time_total", "cuda_time_total")
    for name in on_device if on_gpu else ("self_cpu_time_total",):
        if hasattr(event, name):
            return float(getattr(event, name))
    return 0.0


def print_report(report: Report, console: Console, context: int, rows: int) -> None:
    console.print(f"{report.shape} at {report.bits} bits on {report.device}")
    console.print(
        f"load {report.load_s:.1f} s, a token past {SHORT} {report.token_ms:.3f} ms, "
        f"past {context} {report.late_token_ms:.3f} ms, a prompt of {report.prompt_tokens} "
        f"{report.prompt_ms:.1f} ms ({1e3 * report.prompt_tokens / report.prompt_ms:.0f} tokens/s)"
    )
    prompt = f"a prompt of {PROFILED_CHUNKS * CHUNK}"
    for what, profile in (("a token", report.token), (prompt, report.prompt)):
        table = Table(
            title=f"{what}: {profile.launches:.0f} kernels, {profile.gpu_ms:.3f} ms on the GPU, "
            f"{profile.wall_ms:.3f} ms of wall time with the profiler",
        )
        for title in ("launches", "us each", "us"):
            table.add_column(title, justify="right")
        table.add_column("kernel", no_wrap=True)
        for kernel in profile.kernels[:rows]:
            each = kernel.gpu_us / kernel.launches
            table.add_row(
                f"{kernel.launches:.1f}", f"{each:.2f}", f"{kernel.gpu_us:.1f}", kernel.name[:90]
            )
        console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="llama-1b")
    parser.add_argument("--bits", type=int, nargs="+", default=[4])
    parser.add_argument("--backend", default="torch_cuda")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--context", type=int, default=900, help="the prompt, and late tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=25, help="kernels that are listed")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--verbose", action="store_true", help="log the times of all kernels")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("backends").setLevel(logging.DEBUG if options.verbose else logging.INFO)
    try:
        reports = [measure(options.shape, bits, options) for bits in options.bits]
    except (ModelError, BackendError) as error:
        raise SystemExit(f"error: {error}") from error
    if options.json:
        print(json.dumps([asdict(report) for report in reports], indent=2))
        return
    console = Console(width=140)
    for report in reports:
        print_report(report, console, options.context, options.rows)


if __name__ == "__main__":
    main()
