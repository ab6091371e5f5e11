"""Runs the same text through a model (the teacher) and through changed copies (its students).

The teacher runs once and leaves the inputs of blocks on disk. A student starts from the input of
its first changed block, with one block in memory at a time. ``calibration.quality.blocks`` changes
blocks, ``calibration.quality.hops`` changes the rows between them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from backends.base import Backend, BackendError, StageOptions
from model.artifact import Tensor, read_block, write_artifact
from model.checkpoint import Checkpoint
from model.divergence import divergences
from model.memory import memory_bytes
from model.quantize import Format, QuantizedMatrix
from model.reference import ReferenceModel
from model.spec import ModelSpec

_LOGITS = 1 << 23
"""The logits of one student that are in memory at once. Several copies of them exist."""

_KEPT_SHARE = 0.4
"""The share of free memory for blocks that are kept instead of read again."""

_ERROR_WEIGHTS = 1 << 20

NOT_FINITE = (
    "the model's predictions are not finite numbers: its weights are damaged, or leave the range "
    "of 32 bits on this text"
)

Rows = npt.NDArray[Any]
Run = Callable[[Rows], Rows]
"""Runs one block: takes token ids or hidden rows, returns hidden rows or logits."""
Sequences = Sequence[Sequence[int]]
Progress = Callable[[int, int], None]
Width = TypeVar("Width", bound=int)


class BlockSource(Protocol):
    """A model that gives its original blocks one at a time; a Checkpoint is one."""

    @property
    def spec(self) -> ModelSpec: ...

    def block(self, block: int) -> Mapping[str, npt.NDArray[np.float32]]:
        """Return the canonical tensors of one block as float32."""

    def kept(self, block: int, fmt: Format) -> Mapping[str, Tensor]:
        """Return the tensors of a block that need no more rounding to have this format."""

    def format_of(self, block: int, fmt: Format) -> Format:
        """Return the format that a block has at the bits of ``fmt``: its own, or ``fmt``."""

    def lossless_format(self, block: int) -> Format:
        """Return the narrowest format that keeps the weights of a block as they are."""


@dataclass(frozen=True, slots=True)
class Options:
    """The settings of teacher and students.

    backend: runs decoder layers; None: the reference, which always runs embedding and head.
    plain: runs layers at widths that ``backend`` lacks, often the original's; None: the reference.
    progress: called with (done, all) passes.
    kept_bytes: bounds the fp32 blocks that are kept between passes; None: a share of free memory.
    """

    backend: Backend | None = None
    threads: int = 1
    progress: Progress | None = None
    kept_bytes: int | None = None
    plain: Backend | None = None


BY_REFERENCE = Options()
"""The reference runs everything."""


def check_text(spec: ModelSpec, sequences: Sequences) -> None:
    """Raise ValueError for sequences, or a kind of model, that nothing can be measured with."""
    if spec.encodes:
        raise ValueError(
            "quality is the divergence of next tokens, and this model encodes texts: compare "
            "widths with `shoal eval --bits`"
        )
    if not sequences:
        raise ValueError("no calibration text: at least one sequence of two tokens is needed")
    for sequence in sequences:
        if not 0 < len(sequence) <= spec.max_context:
            raise ValueError(
                f"a sequence of {len(sequence)} tokens: the model takes 1 to {spec.max_context}"
            )
        if not all(0 <= token < spec.vocab for token in sequence):
            raise ValueError(f"token ids must be within [0, {spec.vocab})")


def text_key(checkpoint: Checkpoint, sequences: Sequences) -> dict[str, Any]:
    plain = json.dumps([[int(token) for token in sequence] for sequence in sequences])
    return {
        "kind": "quality",
        "checkpoint": checkpoint.fingerprint,
        "text": hashlib.sha256(plain.encode()).hexdigest(),
    }


@contextmanager
def students_of(
    source: BlockSource, sequences: Sequences, options: Options, directory: Path | None
) -> Iterator[Students]:
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
    with (
        TemporaryDirectory(dir=directory, prefix=".quality-") as name,
        Students(source, sequences, options, Path(name)) as students,
    ):
        yield students


class Students:
    """Runs blocks of one model, as they are or in a format, over all sequences.

    ``progress`` counts passes through blocks; ``expect`` says how many there will be.
    """

    def __init__(
        self, source: BlockSource, sequences: Sequences, options: Options, directory: Path
    ) -> None:
        self.spec = source.spec
        self.tokens = _joined(sequences)
        self._source = source
        self._bounds = _bounds(sequences)
        self._backends = [one for one in (options.backend, options.plain) if one is not None]
        self._progress = options.progress
        self._directory = directory
        longest = max(len(sequence) for sequence in sequences)
        self._stage_options = StageOptions(1, longest, options.threads, exact=True)
        self._resources = ExitStack()
        self._kept: dict[int, Run] = {}
        if options.kept_bytes is None:
            self._free_bytes = int(memory_bytes()[0] * _KEPT_SHARE)
        else:
            self._free_bytes = options.kept_bytes
        self._done = self._total = 0

    def __enter__(self) -> Students:
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def expect(self, passes: int) -> None:
        self._done, self._total = -1, passes
        self.step()

    def step(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)

    def teach(self, wanted: Container[int] = ()) -> Rows:
        """Run the teacher and return its head's input; keep the inputs of the wanted blocks."""
        rows = self.tokens
        for block in range(self.spec.head_block):
            if block in wanted:
                np.save(self._input(block), rows)
            with self._original(block) as run:
                rows = run(rows)
            self.step()
        return rows

    def changed(
        self, block: int, formats: Sequence[Format], final: Rows
    ) -> dict[int, tuple[float, float]]:
        """Return (kl, weight error) by width of the students with one block in a format."""
        head = self.spec.head_block
        rows = final if block == head else np.load(self._input(block))
        tensors = self._source.block(block)
        errors: dict[int, float] = {}
        hidden: dict[int, Rows] = {}
        results: dict[int, tuple[float, float]] = {}
        for fmt in formats:
            with self._quantized(block, tensors, fmt) as (run, error):
                errors[fmt.bits] = error
                results[fmt.bits] = (0.0, error)
                if error == 0:
                    continue  # Equal weights give equal predictions.
                if block == head:
                    (kl,) = self._head_kls(final, [(run, rows)])
                    results[fmt.bits] = (kl, error)
                else:
                    hidden[fmt.bits] = run(rows)
        self.step()
        for later in range(block + 1, head):
            if hidden:
                with self._original(later) as run:
                    hidden = {width: run(it) for width, it in hidden.items()}
            self.step()
        kls = self._head_kls(final, [(None, it) for it in hidden.values()])
        results |= {width: (kl, errors[width]) for width, kl in zip(hidden, kls, strict=True)}
        if block != head:
            self.step()
            self._input(block).unlink()
        return results

    def rounded(self, block: int, changes: Mapping[Width, Run], final: Rows) -> dict[Width, float]:
        """Return the KL by width of the students whose hidden rows before a block are changed."""
        head = self.spec.head_block
        rows = final if block == head else np.load(self._input(block))
        hidden = {width: change(rows) for width, change in changes.items()}
        found = self._behind(block, hidden, final)
        if block != head:
            self._input(block).unlink()
        return found

    def replaced(
        self, layer: int, others: Iterable[tuple[Width, Mapping[str, Tensor]]], final: Rows
    ) -> dict[Width, float]:
        """Return the KL by width of the students with other fp32 tensors in one layer's block."""
        rows = np.load(self._input(layer))
        hidden: dict[Width, Rows] = {}
        for width, tensors in others:
            with self._loaded(layer, tensors, Format.of(32)) as (run, _):
                hidden[width] = run(rows)
        self.step()
        found = self._behind(layer + 1, hidden, final)
        self._input(layer).unlink()
        return found

    def _behind(self, block: int, hidden: Mapping[Width, Rows], final: Rows) -> dict[Width, float]:
        """Return the KL by width of the students that reach ``block`` with these hidden rows."""
        for later in range(block, self.spec.head_block):
            with self._original(later) as run:
                hidden = {width: run(it) for width, it in hidden.items()}
            self.step()
        kls = self._head_kls(final, [(None, it) for it in hidden.values()])
        self.step()
        return dict(zip(hidden, kls, strict=True))

    def plan_kl(self, formats: Sequence[Format | None], final: Rows) -> float:
        """Return the divergence of a student that has every block in its format."""
        rows = self.head_input(formats)
        with self.block(self.spec.head_block, formats[-1]) as run:
            (kl,) = self._head_kls(final, [(run, rows)])
        self.step()
        return kl

    def head_input(self, formats: Sequence[Format | None]) -> Rows:
        """Return the hidden rows before the head, with every block in its format."""
        rows = self.tokens
        for block, fmt in enumerate(formats[: self.spec.head_block]):
            with self.block(block, fmt) as run:
                rows = run(rows)
            self.step()
        return rows

    def _head_kls(self, final: Rows, students: Sequence[tuple[Run | None, Rows]]) -> list[float]:
        """Return the mean KL of each student: (its head, or None for the teacher's, its input).

        Raises BackendError if one is not finite.
        """
        sums = [0.0] * len(students)
        count = max(1, _LOGITS // self.spec.vocab)
        with self._original(self.spec.head_block) as teacher:
            for begin in range(0, len(final), count):
                part = slice(begin, begin + count)
                expected = teacher(final[part])
                for index, (head, rows) in enumerate(students):
                    got = (head or teacher)(rows[part])
                    with np.errstate(over="ignore", invalid="ignore"):  # Refused in one line.
                        sums[index] += float(divergences(expected, got).sum())
        if not all(map(math.isfinite, sums)):
            raise BackendError(NOT_FINITE)
        return [total / len(final) for total in sums]

    @contextmanager
    def block(self, block: int, fmt: Format | None) -> Iterator[Run]:
        """Load a block in a format, or None as it is, for the time of the context."""
        if fmt is None:
            with self._original(block) as run:
                yield run
        else:
            with self._quantized(block, self._source.block(block), fmt) as (run, _):
                yield run

    @contextmanager
    def _original(self, block: int) -> Iterator[Run]:
        """Load one block of the teacher, and keep it while there is memory."""
        if block in self._kept:
            yield self._kept[block]
            return
        tensors = self._source.block(block)
        size_bytes = 4 * sum(tensor.size for tensor in tensors.values())
        fmt = self._source.lossless_format(block)
        kept = self._source.kept(block, fmt)
        loading = self._loaded(block, {**tensors, **kept}, fmt)
        if size_bytes > self._free_bytes:
            with loading as (run, _):
                yield run
            return
        self._free_bytes -= size_bytes
        self._kept[block], _ = self._resources.enter_context(loading)
        yield self._kept[block]

    @contextmanager
    def _quantized(
        self, block: int, tensors: Mapping[str, npt.NDArray[np.float32]], fmt: Format
    ) -> Iterator[tuple[Run, float]]:
        """Load a block in a format, and yield it with max|w - w_b| over its matrices.

        At the bits of the file's own codes, the block has those.
        """
        fmt = self._source.format_of(block, fmt)
        kept = self._source.kept(block, fmt)
        with self._loaded(block, {**tensors, **kept}, fmt) as (run, stored):
            worst = 0.0
            for name, matrix in stored.items():
                if isinstance(matrix, QuantizedMatrix):
                    step = max(1, _ERROR_WEIGHTS // matrix.shape[1])
                    for begin in range(0, matrix.shape[0], step):
                        part = slice(begin, begin + step)
                        error = np.abs(matrix.dequantize(part) - tensors[name][part])
                        worst = max(worst, float(error.max(initial=0.0)))
            yield run, worst

    @contextmanager
    def _loaded(
        self, block: int, tensors: Mapping[str, Tensor], fmt: Format
    ) -> Iterator[tuple[Run, Mapping[str, Tensor]]]:
        path = write_artifact(self._directory, block, tensors, fmt).path
        try:
            _, stored = read_block(path, self.spec, block)
            kind = self.spec.block_kind(block)
            able = (one for one in self._backends if fmt.bits in one.probe().container_bits)
            if kind == "layer" and (backend := next(able, None)) is not None:
                with closing(
                    backend.load(self.spec, [(block, path)], self._stage_options)
                ) as stage:
                    yield partial(self._sequences, partial(stage.forward, 0, 0)), stored
                return
            model = ReferenceModel(self.spec, [stored], first_block=block)
            if kind == "head":
                yield model.forward, stored
            else:
                yield partial(self._sequences, model.forward), stored
        finally:
            # Equal blocks share a file, so another one may have removed it.
            path.unlink(missing_ok=True)

    def _sequences(self, run: Run, rows: Rows) -> Rows:
        """Run all sequences through one block. ``rows`` holds them one after the other."""
        return np.concatenate([run(rows[begin:end]) for begin, end in self._bounds])

    def _input(self, block: int) -> Path:
        return self._directory / f"{block}.npy"


def _joined(sequences: Sequences) -> Rows:
    return np.concatenate([np.asarray(sequence, np.int64) for sequence in sequences])


def _bounds(sequences: Sequences) -> list[tuple[int, int]]:
    ends = np.cumsum([len(sequence) for sequence in sequences]).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))
