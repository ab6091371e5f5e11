"""A whole backend in one file, on the numpy reference: what a new kind of hardware has to have.

Installed as ``backends/numpy_cpu.py`` with one line in ``backends.registry``; see test_new_backend.
"""

from __future__ import annotations

import numpy as np

from backends.base import (
    Array,
    Artifacts,
    Backend,
    BackendError,
    Capabilities,
    Stage,
    StageOptions,
    Tokens,
)
from backends.checks import check_blocks, check_inputs, check_rows
from model.artifact import read_block
from model.costs import executed_bytes, kv_bytes, stage_buffer_bytes
from model.quantize import BITS
from model.reference import ReferenceModel
from model.spec import ModelSpec

FLOAT_BITS = 32
CHUNK_ROWS = 64
"""Of a prompt, at once."""


class NumpyBackend(Backend):
    """Every width, computed in fp32."""

    @classmethod
    def probe(cls) -> Capabilities:
        widths = dict.fromkeys(BITS, FLOAT_BITS)
        return Capabilities("numpy_cpu", np.__version__, widths, shares=True)

    def load(self, spec: ModelSpec, artifacts: Artifacts, options: StageOptions) -> Stage:
        return NumpyStage(spec, artifacts, options)


class NumpyStage(Stage):
    """A model with a cache of its own for each slot."""

    def __init__(self, spec: ModelSpec, artifacts: Artifacts, options: StageOptions) -> None:
        blocks = [block for block, _ in artifacts]
        check_blocks(spec, blocks, options)
        self._spec, self._options = spec, options
        self._first, self._last = blocks[0], blocks[-1]
        team_sum = options.team_sum or (lambda partial: partial)
        held = [read_block(path, spec, block)[1] for block, path in artifacts]
        self._slots = [
            ReferenceModel(spec, held, first_block=blocks[0], team_sum=team_sum)
            for _ in range(options.slots)
        ]
        self._written = [0] * options.slots
        weights = sum(
            executed_bytes(spec, block, read_block(path, spec, block)[0], FLOAT_BITS)
            for block, path in artifacts
        )
        cache = sum(kv_bytes(spec, block, options.context_tokens) for block in blocks)
        buffers = stage_buffer_bytes(spec, blocks, CHUNK_ROWS, options.context_tokens)
        self._memory_bytes = options.slots * (weights + cache) + buffers

    @property
    def memory_bytes(self) -> int:
        return self._memory_bytes

    def forward(
        self, slot: int, position: int, inputs: Array | Tokens, *, logits: int = 1
    ) -> Array:
        if not self._slots:
            raise BackendError("the stage is closed")
        check_inputs(inputs, self._spec, tokens=self._first == 0)
        options = self._options
        check_rows(slot, position, len(inputs), options.slots, options.context_tokens)
        model = self._slots[slot]
        missing = position - self._written[slot]
        if missing > 0:
            # Nobody wrote these rows: zeros are as good as any.
            model.forward(np.zeros((missing, *inputs.shape[1:]), inputs.dtype), position - missing)
        self._written[slot] = position + len(inputs)
        rows: Array = model.forward(inputs, position)
        if self._last < self._spec.head_block:
            return rows
        return rows[len(rows) - logits :]

    def close(self) -> None:
        self._slots = []
