"""The interface between the stage runner and a kind of hardware.

A backend computes a whole stage (a contiguous run of blocks) in one call. Loading and running are
separate objects: ``Backend`` says what it can do and loads, ``Stage`` runs. Adding a kind of
hardware is one file with both and one line in ``backends.registry``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

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


class FilesMissing(BackendError):
    """A stage needs files made of its blocks, which nobody at hand can make."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend offers on this machine.

    ``container_bits`` maps each width it accepts to the width its kernels keep in memory and
    compute with (6 -> 8): what the planner charges for memory. ``exact_container_bits`` is that of
    stages loaded as ``StageOptions.exact``: None where it is the same, empty where results are
    rounded all the same. ``on_chip_bytes`` is what an accelerator keeps of a stage's layers (one
    byte per weight at 8 bits); what is beyond it crosses a bus at every call. None where weights
    are in ordinary memory. ``arithmetic`` names the backend that computes layers with the same
    rounding on any CPU, where that rounding, exact or not, loses much more than the weights' own
    does; it is measured apart. Empty: it does not.
    """

    backend: str
    version: str
    container_bits: Mapping[int, int]
    on_chip_bytes: int | None = None
    exact_container_bits: Mapping[int, int] | None = None
    arithmetic: str = ""

    def containers(self, *, exact: bool) -> Mapping[int, int]:
        """``container_bits`` of stages that are, or are not, loaded as exact."""
        own = self.exact_container_bits
        return self.container_bits if own is None or not exact else own


@dataclass(frozen=True, slots=True)
class StageOptions:
    """What a stage is loaded for. ``slots`` sequences of at most ``context_tokens`` each.

    exact: every product takes its activations as they are, on a backend that can; else it may round
    them (to 8 bits, say) where that is faster and its documentation states the error.
    prepared_dir: where the backend may keep what it makes of artifacts, to load them faster the
    next time; None keeps nothing. What lies there is used only for what it was made from.
    prepared_bytes: what may lie there at most; None: as much as the disk has room for.
    fast_prompts: prompts may round weights and activations once more where that is faster and
    memory_bytes leaves room for it. Has no effect on exact stages.
    memory_bytes: what the stage may take, where that is more than a plan charges for it: room to
    keep weights in a form that is faster and larger. None: nothing beyond what is charged.
    hashed: artifacts that the caller has compared with the hashes that name them. The backend
    compares the others itself before it makes something of them that is kept.
    """

    slots: int
    context_tokens: int
    threads: int
    exact: bool = False
    prepared_dir: Path | None = None
    prepared_bytes: int | None = None
    fast_prompts: bool = False
    memory_bytes: int | None = None
    hashed: frozenset[Path] = frozenset()


Artifacts = Sequence[tuple[int, Path]]
"""(block, path of its artifact), in order."""

Supplier = Callable[[ModelSpec, Artifacts], Sequence[Path]]
"""Has ``Backend.make_files`` run on another machine. Raises FilesMissing where none can, or
whatever else the way there and back raises."""


class Stage(ABC):
    """Loaded blocks [first, last) with their KV cache; one caller at a time."""

    @abstractmethod
    def forward(
        self, slot: int, position: int, inputs: Array | Tokens, *, logits: bool = True
    ) -> Array:
        """Run rows [position, position + n) of the sequence in ``slot``.

        The slot's cached rows below ``position`` must be valid for the result to be; where they
        never were written, as when calls are timed, any result will do. Rows at and above it are
        overwritten, so starting again at 0 starts a new sequence and a smaller position rolls back.

        inputs: token ids int64 [n] where the stage holds the embedding, else hidden float32
        [n, hidden]. Returns hidden float32 [n, hidden]; a stage with the head returns logits
        float32 [1, vocab] of the last row, or [0, vocab] with ``logits=False``.
        Raises BackendError when rows do not fit the context.
        """

    def decode(
        self, slots: Sequence[int], positions: Sequence[int], inputs: Array | Tokens
    ) -> Array:
        """One row of each of several sequences: row i of ``inputs`` at positions[i] of slots[i].

        Slots are distinct. As ``forward`` in all else; returns hidden float32 [n, hidden], or
        logits float32 [n, vocab] of a stage with the head. Where several rows fail together, no
        slot's earlier rows are lost: whoever runs each alone finds out which one it is. This
        default runs one after another.
        """
        calls = zip(slots, positions, range(len(inputs)), strict=True)
        rows = [self.forward(slot, at, inputs[row : row + 1]) for slot, at, row in calls]
        return np.concatenate(rows)

    @property
    @abstractmethod
    def memory_bytes(self) -> int:
        """Weights as executed plus KV cache plus compute buffers."""

    @property
    def kept_files(self) -> Mapping[Path, str]:
        """Files of ``prepared_dir`` that the stage runs from and an earlier load made.

        Each has the SHA-256 that it had when it was written. A file that has another one now is
        damaged; the backend makes it again once it is removed.
        """
        return {}

    @abstractmethod
    def close(self) -> None:
        """Free everything; the stage must not be used again. Idempotent."""


class Backend(ABC):
    """A kind of hardware with the library that drives it.

    Hardware that runs only what a tool of its maker's has made of the blocks, which may not run on
    the device itself, has ``maker`` and ``make_files`` too; ``load`` asks the ``supplier``.
    """

    supplier: Supplier | None = None
    """Who gets files made elsewhere; None where nobody does."""

    PREPARED_FACTOR: ClassVar[float] = 0.0
    """Bytes kept in ``StageOptions.prepared_dir`` over those of the artifacts, at most."""

    @classmethod
    @abstractmethod
    def probe(cls) -> Capabilities:
        """What is available on this machine. Raises BackendUnavailable."""

    @classmethod
    def memory_bytes(cls) -> tuple[int, int] | None:
        """(free, total) bytes of the memory that stages live in; None: it is the machine's own."""
        return None

    @classmethod
    def memory_read_bytes_per_s(cls) -> float | None:
        """Measure how fast kernels read the stages' memory; None: it is the machine's own.

        Raises BackendUnavailable.
        """
        return None

    @classmethod
    def maker(cls) -> str | None:
        """The version of what makes this backend's files here; None without it, or the need.

        Files of another version are other files. Raises BackendError where it does not run.
        """
        return None

    @classmethod
    def make_files(
        cls, spec: ModelSpec, artifacts: Artifacts, directory: Path, tick: Callable[[], None]
    ) -> Sequence[Path]:
        """Make, in ``directory``, the files that ``load`` needs beside these blocks.

        ``artifacts`` may be a stranger's. ``tick`` is called each second or so; what it raises ends
        the work. Raises BackendError, model.errors.CheckpointError, OSError.
        """
        raise FilesMissing(f"{cls.__name__} needs no files")

    @abstractmethod
    def load(self, spec: ModelSpec, artifacts: Artifacts, options: StageOptions) -> Stage:
        """Load contiguous blocks, given as (block, path of its artifact) in order.

        What has to lie on the disk meanwhile is in folders whose names begin with a dot, beside the
        artifacts or in ``prepared_dir``: their owner removes those of a load that was killed.
        Raises BackendError where the blocks cannot be run, model.errors.CheckpointError where an
        artifact is not what it says.
        """
