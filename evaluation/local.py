"""Answers prompts on this machine alone, with a stage that holds the whole model."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import numpy as np

from backends.base import Backend, Stage, StageOptions
from calibration.quality.students import BlockSource
from model.artifact import Tensor, write_artifact
from model.quantize import Format
from model.row_pieces import RowPieces

IsDone = Callable[[Sequence[int]], bool]


class StoredSource(BlockSource, Protocol):
    """A model whose blocks can be stored as they are; a Checkpoint is one."""

    def block_in(self, block: int, fmt: Format) -> Mapping[str, Tensor | RowPieces]:
        """Return the tensors of a block, those in ``fmt`` as they are."""


@contextmanager
def local_stage(
    checkpoint: StoredSource,
    formats: Sequence[Format | None],
    backend: Backend,
    options: StageOptions,
    directory: Path | None = None,
) -> Iterator[Stage]:
    """Quantize all blocks and load them, for the time of the context.

    formats: None for a block that stays as it is.
    directory: holds the blocks meanwhile. Raises CheckpointError and BackendError.
    """
    with TemporaryDirectory(dir=directory, prefix=".eval-") as name:
        artifacts = []
        for block, wanted in enumerate(formats):
            own = checkpoint.lossless_format(block)
            fmt = own if wanted is None else checkpoint.format_of(block, wanted)
            written = write_artifact(Path(name), block, checkpoint.block_in(block, fmt), fmt)
            artifacts.append((block, written.path))
        with closing(backend.stage(checkpoint.spec, artifacts, options)) as stage:
            yield stage


@dataclass(slots=True)
class _Sequence:
    """One answer that is being made. ``last`` is the token that is not in the cache yet."""

    item: int
    position: int
    last: int
    tokens: list[int] = field(default_factory=list)


def greedy_answers(
    stage: Stage,
    slots: int,
    prompts: Mapping[int, Sequence[int]],
    max_tokens: int,
    end_tokens: Sequence[int],
    is_done: IsDone,
) -> Generator[tuple[int, list[int]], None, None]:
    """Yield the likeliest tokens that follow each prompt, as (item, tokens), in order of their end.

    slots: prompts that are answered at once. An answer ends before a token of ``end_tokens``, after
    ``max_tokens``, or when ``is_done`` says so of its tokens. Prompts with ``max_tokens`` more fit
    the stage's context. Raises BackendError.
    """
    waiting = iter(prompts.items())
    running: dict[int, _Sequence] = {}
    free = list(range(slots))
    while True:
        while free and (following := next(waiting, None)) is not None:
            item, prompt = following
            slot = free.pop()
            logits = stage.forward(slot, 0, np.asarray(prompt, np.int64))
            running[slot] = _Sequence(item, len(prompt), int(logits[0].argmax()))
        if not running:
            return
        for slot, one in [*running.items()]:
            ended = one.last in end_tokens
            if not ended:
                one.tokens.append(one.last)
                ended = len(one.tokens) >= max_tokens or is_done(one.tokens)
            if ended:
                del running[slot]
                free.append(slot)
                yield one.item, one.tokens
        if running:
            rows = np.asarray([one.last for one in running.values()], np.int64)
            positions = [one.position for one in running.values()]
            logits = stage.decode(list(running), positions, rows)
            for one, row in zip(running.values(), logits, strict=True):
                one.position += 1
                one.last = int(row.argmax())
