"""The checks of every backend: blocks must form a stage, and rows must fit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from backends.base import Array, BackendError, StageOptions, Tokens
from model.spec import ModelSpec


def check_blocks(spec: ModelSpec, blocks: Sequence[int], options: StageOptions) -> None:
    """Raise BackendError unless ``blocks`` are a contiguous run that fits the options."""
    if not blocks or list(blocks) != list(range(blocks[0], blocks[0] + len(blocks))):
        raise BackendError(f"a stage is a contiguous run of blocks, not {list(blocks)}")
    if blocks[0] < 0 or blocks[-1] >= spec.block_count:
        raise BackendError(f"the model has {spec.block_count} blocks, not {list(blocks)}")
    if options.slots < 1 or options.threads < 1:
        raise BackendError("a stage needs at least one slot and one thread")
    if not 0 < options.context_tokens <= spec.max_context:
        raise BackendError(
            f"context of {options.context_tokens} tokens: the model has 1 to {spec.max_context}"
        )


def check_rows(slot: int, position: int, rows: int, slots: int, context_tokens: int) -> None:
    """Raise BackendError unless rows [position, position + rows) fit a slot of the stage."""
    if not 0 <= slot < slots:
        raise BackendError(f"the stage has {slots} slots, but no slot {slot}")
    if rows < 1 or position < 0 or position + rows > context_tokens:
        raise BackendError(
            f"rows [{position}, {position + rows}) do not fit the context of "
            f"{context_tokens} tokens"
        )


def check_inputs(inputs: Array | Tokens, spec: ModelSpec, *, tokens: bool) -> None:
    """Raise BackendError unless ``inputs`` are token ids [n], or hidden rows [n, hidden]."""
    if not tokens:
        if inputs.ndim != 2 or inputs.shape[1] != spec.hidden:
            raise BackendError(f"hidden rows are {inputs.shape}, not [n, {spec.hidden}]")
    elif inputs.ndim != 1 or not np.issubdtype(inputs.dtype, np.integer):
        raise BackendError(f"token ids are {inputs.dtype} {inputs.shape}, not integers [n]")
    elif inputs.size and (inputs.min() < 0 or inputs.max() >= spec.vocab):
        raise BackendError(f"token ids must be within [0, {spec.vocab})")
