"""Losses of expected tokens, and how far the model's next-token predictions are from the original.

It runs one block after another, with one block in memory at a time, in several students at once:
the original, and the model in each set of formats. So neither agents nor the memory for a whole
model are needed. Activations are not rounded.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from backends.base import BackendError
from calibration.quality.students import NOT_FINITE, BlockSource, Options, Rows, Run, students_of
from model.divergence import divergences
from model.quantize import Format

CHUNK_TOKENS = 8192
"""Tokens that go through the blocks together. Each chunk quantizes every block again."""
_CHUNK_BYTES = 256 << 20
_LOGITS = 1 << 23

Formats = Sequence[Format | None]
OnStep = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Target:
    """Tokens of one sequence. Those from ``first`` on are expected, each after all before it."""

    tokens: tuple[int, ...]
    first: int

    def __post_init__(self) -> None:
        if not 0 < self.first < len(self.tokens):
            raise ValueError("at least one token before the first expected one is needed")


@dataclass(frozen=True, slots=True)
class Loss:
    """Sums over the expected tokens of one target, in nats.

    nats: -log of the chances that the model gives them.
    kl: KL(original || model) of the predictions, and original_nats as ``nats`` of the original.
        Both are None if the original did not run.
    """

    tokens: int
    nats: float
    kl: float | None = None
    original_nats: float | None = None


def measure_losses(
    source: BlockSource,
    runs: Mapping[str, Formats],
    targets: Mapping[int, Target],
    options: Options,
    on_step: OnStep,
    *,
    with_original: bool,
    sources: Mapping[str, BlockSource] | None = None,
    directory: Path | None = None,
) -> Iterator[dict[str, dict[int, Loss]]]:
    """Yield the losses by run and target, chunk by chunk.

    runs: the format of every block by the run's name. A block that is None stays as it is.
    targets: by any number. Each has at most the model's context of tokens.
    on_step: gets (passes through blocks that are done, all).
    sources: the blocks of a run, by its name. Runs that are not named have those of ``source``.

    Raises CheckpointError for unreadable weights and a full disk, and BackendError.
    """
    chunks = list(_chunks(targets, source.spec.hidden, len(runs) + 1))
    passes = source.spec.head_block * (len(runs) + with_original) * len(chunks)
    counter = itertools.count(1)
    on_step(0, passes)
    # Each original block runs once, so none is worth its memory until then.
    told = replace(options, progress=lambda *_: on_step(next(counter), passes), kept_bytes=0)
    for chunk in chunks:
        sequences = [target.tokens for target in chunk.values()]
        with students_of(source, sequences, told, directory) as students:
            places, wanted = _places(chunk)
            expected = students.teach()[places] if with_original else None
            found: dict[str, dict[int, Loss]] = {}
            for name, formats in runs.items():
                with ExitStack() as stack:
                    changed = students
                    if sources is not None and name in sources:
                        own = students_of(sources[name], sequences, told, directory)
                        changed = stack.enter_context(own)
                    rows = changed.head_input(formats)[places]
                    head = stack.enter_context(changed.block(source.spec.head_block, formats[-1]))
                    original = stack.enter_context(students.block(source.spec.head_block, None))
                    columns = _columns(
                        source.spec.vocab, wanted, (head, rows), (original, expected)
                    )
                found[name] = _by_target(chunk, columns, original=with_original)
        yield found


def _columns(
    vocab: int,
    wanted: npt.NDArray[np.int64],
    model: tuple[Run, Rows],
    original: tuple[Run, Rows | None],
) -> npt.NDArray[np.float64]:
    """Return nats, divergence and the original's nats [tokens, 3] of the wanted tokens.

    Raises BackendError if one is not finite.
    """
    head, rows = model
    teacher, before = original
    columns = np.zeros((len(wanted), 3))
    step = max(1, _LOGITS // vocab)
    for begin in range(0, len(wanted), step):
        part = slice(begin, begin + step)
        logits = head(rows[part])
        columns[part, 0] = nats(logits, wanted[part])
        if before is not None:
            expected = teacher(before[part])
            columns[part, 1] = divergences(expected, logits)
            columns[part, 2] = nats(expected, wanted[part])
    if not np.isfinite(columns).all():
        raise BackendError(NOT_FINITE)
    return columns


def nats(logits: Rows, wanted: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return -log of the chance of one wanted token for each row of logits fp32 [n, vocab]."""
    highest = logits.max(axis=1, keepdims=True)
    total = np.exp(logits - highest).sum(axis=1, dtype=np.float64)
    chosen = np.take_along_axis(logits, wanted[:, None], axis=1) - highest
    result: npt.NDArray[np.float64] = np.log(total) - chosen[:, 0].astype(np.float64)
    return result


def _chunks(
    targets: Mapping[int, Target], hidden: int, students: int
) -> Iterator[dict[int, Target]]:
    """Yield the targets in order, in parts whose hidden rows fit in memory."""
    most = max(1, min(CHUNK_TOKENS, _CHUNK_BYTES // (4 * hidden * students)))
    chunk: dict[int, Target] = {}
    count = 0
    for number, target in targets.items():
        if chunk and count + len(target.tokens) > most:
            yield chunk
            chunk, count = {}, 0
        chunk[number] = target
        count += len(target.tokens)
    if chunk:
        yield chunk


def _places(chunk: Mapping[int, Target]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the rows that predict expected tokens, over all sequences, and these tokens."""
    places: list[int] = []
    wanted: list[int] = []
    begin = 0
    for target in chunk.values():
        places += range(begin + target.first - 1, begin + len(target.tokens) - 1)
        wanted += target.tokens[target.first :]
        begin += len(target.tokens)
    return np.asarray(places), np.asarray(wanted)


def _by_target(
    chunk: Mapping[int, Target], columns: npt.NDArray[np.float64], *, original: bool
) -> dict[int, Loss]:
    found: dict[int, Loss] = {}
    begin = 0
    for number, target in chunk.items():
        end = begin + len(target.tokens) - target.first
        sums = [float(value) for value in columns[begin:end].sum(axis=0)]
        known = (sums[1], sums[2]) if original else (None, None)
        found[number] = Loss(end - begin, sums[0], *known)
        begin = end
    return found
