"""The interface between the stage runner and a kind of hardware.

A backend computes a whole stage (a contiguous run of blocks) in one call. Loading and running are
separate objects: ``Backend`` says what it can do and loads, ``Stage`` runs. Adding a kind of
hardware is one file with both and one line in ``backends.registry``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from model.spec import ModelSpec

Array = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int64]


class BackendError(Exception):
    """A stage cannot be loaded or run; the message says why and what to do."""


class BackendUnavailable(BackendError):
    """This machine lacks what the backend needs; ``reason`` is one line for the user."""

    def __init__(self, backend: str, reason: str) -> None:
        super().__init__(f"backend {backend} is not available: {reason}")
        self.backend = backend
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend offers on this machine.

    ``container_bits`` maps each width it accepts to the width its kernels keep in memory and
    compute with (6 -> 8): what the planner charges for memory. ``on_chip_bytes`` is what an
    accelerator keeps of a stage's layers (one byte per weight at 8 bits); what is beyond it crosses
    a bus at every call. None where weights are in ordinary memory.
    """

    backend: str
    version: str
    container_bits: Mapping[int, int]
    on_chip_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class StageOptions:
    """What a stage is loaded for. ``slots`` sequences of at most ``context_tokens`` each."""

    slots: int
    context_tokens: int
    threads: int


class Stage(ABC):
    """Loaded blocks [first, last) with their KV cache; one caller at a time."""

    @abstractmethod
    def forward(
        self, slot: int, position: int, inputs: Array | Tokens, *, logits: bool = True
    ) -> Array:
        """Run rows [position, position + n) of the sequence in ``slot``.

        The slot's cached rows below ``position`` must be valid; rows at and above it are
        overwritten, so starting again at 0 starts a new sequence and a smaller position rolls back.

        inputs: token ids int64 [n] where the stage holds the embedding, else hidden float32
        [n, hidden]. Returns hidden float32 [n, hidden]; a stage with the head returns logits
        float32 [1, vocab] of the last row, or [0, vocab] with ``logits=False``.
        Raises BackendError when rows do not fit the context.
        """

    @property
    @abstractmethod
    def memory_bytes(self) -> int:
        """Weights as executed plus KV cache plus compute buffers."""

    @abstractmethod
    def close(self) -> None:
        """Free everything; the stage must not be used again. Idempotent."""


class Backend(ABC):
    """A kind of hardware with the library that drives it."""

    @classmethod
    @abstractmethod
    def probe(cls) -> Capabilities:
        """What is available on this machine. Raises BackendUnavailable."""

    @abstractmethod
    def load(
        self, spec: ModelSpec, artifacts: Sequence[tuple[int, Path]], options: StageOptions
    ) -> Stage:
        """Load contiguous blocks, given as (block, path of its artifact) in order.

        Raises BackendError where the blocks cannot be run, model.errors.CheckpointError where an
        artifact is not what it says.
        """
