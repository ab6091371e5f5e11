"""Tokens per second of a whole model on this device alone, from its shape.

Blocks of random weights are written as real artifacts. They are loaded as an agent loads them, into
one stage from embedding to head. The bytes that a token must read are compared with the memory
bandwidth, which is measured between the rounds. The share of that limit shows how much a faster
kernel could gain.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import psutil

from backends.base import Backend, BackendError, Stage, StageOptions
from calibration.device import memory_read_rate
from calibration.layers import chunk_tokens, random_artifacts
from model.costs import kv_bytes
from model.experts import STACKED
from model.memory import memory_bytes
from model.quantize import Format
from model.spec import QUANTIZED_TENSORS, ModelSpec

Progress = Callable[[int, int], None]

LOAD_SHARE = 0.8
"""The share of free memory that weights and KV cache may take."""


@dataclass(frozen=True, slots=True)
class SpeedOptions:
    """The settings of a measurement.

    contexts: numbers of tokens before the decoded ones.
    cached: load a second time from the prepared weights of the first load.
    fast_prompts: as in StageOptions, with all free memory.
    """

    threads: int
    contexts: tuple[int, ...] = (32, 900)
    prompt_tokens: int = 512
    decode_tokens: int = 16
    rounds: int = 5
    exact: bool = False
    cached: bool = True
    fast_prompts: bool = False


@dataclass(frozen=True, slots=True)
class DecodeSpeed:
    """One token at a time behind ``context`` tokens: the median over rounds.

    read_bytes: weights as executed and cached keys and values that a token reads at least.
    bandwidth_share: those bytes per second over the memory bandwidth of the same round.
    """

    context: int
    tokens_per_s: float
    read_bytes: int
    bandwidth_share: float


@dataclass(frozen=True, slots=True)
class StageSpeed:
    """One model in one format. Seconds and rates are medians, sizes in bytes.

    packed_bytes: codes, fp32 scales and zeros, or plain numbers, of all blocks as stored.
    executed_bytes: the same as executed. Plain numbers replace codes if the backend keeps those
        (exact stages, or 16 bits as 32).
    stated_bytes: memory that the stage reports.
    rss_bytes: memory of the process, libraries included.
    load_s: the first load.
    load_again_s: a load with prepared weights.
    """

    bits: tuple[int, ...]
    group_size: int
    threads: int
    decode: tuple[DecodeSpeed, ...]
    prompt_tokens: int
    prefill_tokens_per_s: float
    load_s: float
    load_again_s: float | None
    artifact_bytes: int
    packed_bytes: int
    executed_bytes: int
    kv_bytes: int
    stated_bytes: int
    rss_bytes: int
    memory_read_bytes_per_s: float


def measure_speed(
    spec: ModelSpec,
    formats: Sequence[Format],
    backend: Backend,
    options: SpeedOptions,
    *,
    directory: Path | None = None,
    progress: Progress | None = None,
) -> StageSpeed:
    """Measure a model whose layers take ``formats`` in turn, embedding and head the first.

    directory: holds the blocks meanwhile; by default the system's for temporary files.
    progress: called with (done, all) steps.

    Raises BackendError if the backend fails or memory does not suffice, CheckpointError if the disk
    is full.
    """
    with prepared_stage(spec, formats, backend, options, directory, progress) as trial:
        for _ in range(options.rounds):
            trial.round()
        return trial.result()


@contextmanager
def prepared_stage(
    spec: ModelSpec,
    formats: Sequence[Format],
    backend: Backend,
    options: SpeedOptions,
    directory: Path | None = None,
    progress: Progress | None = None,
) -> Iterator[Trial]:
    """Yield a trial whose rounds the caller runs, interleaved with the rounds of other trials."""
    most = max((options.prompt_tokens, *options.contexts)) + options.decode_tokens
    if most > spec.max_context:
        raise BackendError(
            f"{most} tokens: the model's context has {spec.max_context}; ask for fewer"
        )
    chosen = [formats[max(block - 1, 0) % len(formats)] for block in range(spec.block_count)]
    chosen[-1] = formats[0]
    executed = executed_formats(backend, chosen, exact=options.exact)
    weights = sum(packed_bytes(spec, block, fmt) for block, fmt in enumerate(executed))
    caches = sum(kv_bytes(spec, block, most) for block in range(spec.block_count))
    available_bytes, _ = memory_bytes()
    if weights + caches > LOAD_SHARE * available_bytes:
        raise BackendError(
            f"the model needs {(weights + caches) / 1e9:.1f} GB, and "
            f"{available_bytes / 1e9:.1f} GB are free: use fewer bits, or a smaller shape"
        )
    steps = _Steps(progress, spec.block_count + 2 + options.rounds)
    with TemporaryDirectory(dir=directory, prefix=".shoal-bench-") as name:
        artifacts = []
        for artifact in random_artifacts(Path(name), spec, range(spec.block_count), chosen):
            artifacts.append(artifact)
            steps.done()
        gc.collect()
        stage_options = StageOptions(
            slots=1,
            context_tokens=most,
            threads=options.threads,
            exact=options.exact,
            prepared_dir=Path(name) / "prepared" if options.cached else None,
            fast_prompts=options.fast_prompts,
            memory_bytes=memory_bytes()[0] if options.fast_prompts else None,
        )
        started_s = time.perf_counter()
        stage = backend.load(spec, artifacts, stage_options)
        load_s, again_s = time.perf_counter() - started_s, None
        steps.done()
        if options.cached:
            stage.close()
            started_s = time.perf_counter()
            stage = backend.load(spec, artifacts, stage_options)
            again_s = time.perf_counter() - started_s
        steps.done()
        with closing(stage):
            artifact_bytes = sum(path.stat().st_size for _, path in artifacts)
            trial = Trial(spec, chosen, executed, backend, stage, options, steps)
            trial.loaded(load_s, again_s, artifact_bytes, caches)
            yield trial


class Trial:
    """A loaded model under measurement."""

    def __init__(
        self,
        spec: ModelSpec,
        formats: Sequence[Format],
        executed: Sequence[Format],
        backend: Backend,
        stage: Stage,
        options: SpeedOptions,
        steps: _Steps,
    ) -> None:
        self._spec = spec
        self._formats = formats
        self._executed = executed
        self._backend = backend
        self._stage = stage
        self._options = options
        self._steps = steps
        self._bandwidths: list[float] = []
        self._prefill_s: list[float] = []
        self._decode_s: dict[int, list[float]] = {context: [] for context in options.contexts}
        self._filled = 0
        self._tokens = np.random.default_rng(0).integers(0, spec.vocab, spec.max_context)

    def loaded(self, load_s: float, again_s: float | None, artifact: int, kv: int) -> None:
        """Record the measurements before the first round."""
        self._load_s, self._again_s = load_s, again_s
        self._artifact_bytes, self._kv_bytes = artifact, kv

    def round(self) -> None:
        """Measure the bandwidth, a prompt, and some tokens at each context."""
        rate = self._backend.memory_read_bytes_per_s()
        self._bandwidths.append(rate or memory_read_rate(self._options.threads)[0])
        self.prefill()
        for context in self._options.contexts:
            self.decode(context)
        self._steps.done()

    def prefill(self) -> float:
        """Return tokens per second of a prompt, in chunks as an agent runs them."""
        seconds = self._fill(0, self._options.prompt_tokens)
        self._prefill_s.append(seconds)
        self._filled = max(self._filled, self._options.prompt_tokens)
        return self._options.prompt_tokens / seconds

    def decode(self, context: int) -> float:
        """Return tokens per second behind ``context`` tokens."""
        if self._filled < context:
            self._fill(self._filled, context)
            self._filled = context
        times_s = []
        for position in range(context, context + self._options.decode_tokens):
            started_s = time.perf_counter()
            logits = self._stage.forward(0, position, self._tokens[position : position + 1])
            logits[0].argmax()
            times_s.append(time.perf_counter() - started_s)
        self._filled = min(self._filled, context)
        self._decode_s[context].append(median(times_s))
        return 1 / median(times_s)

    def latest(self) -> dict[str, float]:
        """Return the tokens per second of the last round, by what was run."""
        rates = {
            f"decode past {context}": 1 / times_s[-1] for context, times_s in self._decode_s.items()
        }
        return {"prefill": self._options.prompt_tokens / self._prefill_s[-1]} | rates

    def _fill(self, begin: int, end: int) -> float:
        chunk = chunk_tokens(self._spec)
        started_s = time.perf_counter()
        for first in range(begin, end, chunk):
            last = min(first + chunk, end)
            self._stage.forward(0, first, self._tokens[first:last], logits=last == end)
        return time.perf_counter() - started_s

    def result(self) -> StageSpeed:
        """Return medians over the rounds so far."""
        bandwidth = median(self._bandwidths)
        decode = []
        for context, times_s in self._decode_s.items():
            read = self._read_bytes(context)
            share = median(
                read / seconds / rate
                for seconds, rate in zip(times_s, self._bandwidths, strict=False)
            )
            decode.append(DecodeSpeed(context, 1 / median(times_s), read, share))
        layers = self._formats[1:-1]
        return StageSpeed(
            bits=tuple(dict.fromkeys(fmt.bits for fmt in layers)),
            group_size=layers[0].group_size,
            threads=self._options.threads,
            decode=tuple(decode),
            prompt_tokens=self._options.prompt_tokens,
            prefill_tokens_per_s=self._options.prompt_tokens / median(self._prefill_s),
            load_s=self._load_s,
            load_again_s=self._again_s,
            artifact_bytes=self._artifact_bytes,
            packed_bytes=self._sum(self._formats),
            executed_bytes=self._sum(self._executed),
            kv_bytes=self._kv_bytes,
            stated_bytes=self._stage.memory_bytes,
            rss_bytes=psutil.Process().memory_info().rss,
            memory_read_bytes_per_s=bandwidth,
        )

    def _read_bytes(self, context: int) -> int:
        blocks = range(1, self._spec.block_count)
        return sum(
            packed_bytes(self._spec, block, self._executed[block], used=True)
            + kv_bytes(self._spec, block, context)
            for block in blocks
        )

    def _sum(self, formats: Sequence[Format], first: int = 0) -> int:
        blocks = range(first, self._spec.block_count)
        return sum(packed_bytes(self._spec, block, formats[block]) for block in blocks)


def executed_formats(
    backend: Backend, formats: Sequence[Format], *, exact: bool
) -> tuple[Format, ...]:
    """Return the format of each block as kernels read it.

    A width that the backend keeps as plain numbers becomes a float format. Packed widths stay, and
    so does the embedding's table (block 0). Raises BackendError for widths that it does not run, or
    not exactly.
    """
    capabilities = backend.probe()
    containers = capabilities.containers(exact=exact)
    missing = sorted({fmt.bits for fmt in formats} - set(containers))
    if missing:
        known = ", ".join(map(str, sorted(containers))) or "none"
        raise BackendError(
            f"{capabilities.backend} does not run {', '.join(map(str, missing))} bits"
            f"{' exactly' if exact else ''}: it runs {known}"
        )
    kept = [containers[fmt.bits] for fmt in formats]
    return tuple(
        Format.of(bits) if block and bits >= 16 else fmt
        for block, (fmt, bits) in enumerate(zip(formats, kept, strict=True))
    )


def packed_bytes(spec: ModelSpec, block: int, fmt: Format, *, used: bool = False) -> int:
    """Return the bytes of a block's codes, fp32 scales and zeros, or of its plain numbers.

    ``used`` counts only as many experts as a token takes.
    """
    total = 0
    experts = spec.layer(block).experts if spec.block_kind(block) == "layer" else None
    for name, shape in spec.block_tensors(block).items():
        if used and experts is not None and name in STACKED:
            shape = (shape[0] // experts.stored * experts.active, *shape[1:])
        if name not in QUANTIZED_TENSORS:
            total += 4 * int(np.prod(shape))
        elif fmt.scheme == "float":
            total += int(np.prod(shape)) * fmt.bits // 8
        else:
            rows, columns = shape
            groups = fmt.groups(columns)
            total += rows * (groups * (fmt.group_size * fmt.bits // 8 + 4))
            total += 0 if fmt.symmetric else rows * -(-groups * fmt.bits // 8)
    return total


class _Steps:
    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, -1
        self.done()

    def done(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(min(self._done, self._total), self._total)
