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

    ``container_bits`` maps each width that it accepts to the width that its kernels keep in memory
    and compute with (6 -> 8). The planner charges memory by it.
    ``exact_container_bits`` is the same for stages loaded as ``StageOptions.exact``. None: the same
    map. Empty: results are always rounded.
    ``on_chip_bytes`` is how much of a stage's layers an accelerator keeps, at one byte per weight
    of 8 bits. The rest crosses a bus at every call. None: weights are in ordinary memory.
    ``arithmetic`` names the backend that rounds layers in the same way on any CPU. It is set where
    this rounding, exact or not, loses much more than the weights' own; it is then measured apart.
    Empty: it does not.
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
    """What a stage is loaded for.

    slots, context_tokens: how many sequences, each of at most how many tokens.
    exact: products take activations as they are, if the backend can. Otherwise it may round them
    (to 8 bits, say) where that is faster and its documentation states the error.
    prepared_dir: where the backend may keep what it makes of artifacts, to load faster next time. A
    kept file serves only the artifact that it was made from. None: nothing is kept.
    prepared_bytes: the limit for prepared_dir. None: what the disk has room for.
    fast_prompts: prompts may round weights and activations once more, where that is faster and
    memory_bytes leaves room. It has no effect on exact stages.
    memory_bytes: what the stage may take, if that is more than a plan charges for it. The rest may
    hold weights in a faster, larger form. None: only what is charged.
    hashed: artifacts that the caller has compared with their hashes. The backend compares the
    others before it keeps anything made of them.
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
        """Run one row of each of several sequences: row i of ``inputs`` at positions[i] of
        slots[i].

        Slots are distinct. Returns hidden float32 [n, hidden]; a stage with the head returns logits
        float32 [n, vocab]. If several rows fail together, no slot loses its earlier rows: the
        caller finds the faulty row by running each alone. All else is as in ``forward``. This
        default runs one after another.
        """
        calls = zip(slots, positions, range(len(inputs)), strict=True)
        rows = [self.forward(slot, at, inputs[row : row + 1]) for slot, at, row in calls]
        return np.concatenate(rows)

    @property
    @abstractmethod
    def memory_bytes(self) -> int:
        """Bytes that the stage takes: weights as executed, KV cache and compute buffers."""

    @property
    def kept_files(self) -> Mapping[Path, str]:
        """The files of ``prepared_dir`` that the stage runs from and that an earlier load made.

        Each maps to the SHA-256 that it had when it was written. A file with another hash is
        damaged; the backend makes it again once it is removed.
        """
        return {}

    @abstractmethod
    def close(self) -> None:
        """Free everything; the stage must not be used again. Idempotent."""


class Backend(ABC):
    """A kind of hardware with the library that drives it.

    Some hardware runs only files that its maker's tool has made of the blocks, and the tool may not
    run on the device. Such a backend also has ``maker`` and ``make_files``; its ``load`` asks the
    ``supplier``.
    """

    supplier: Supplier | None = None
    """Who gets files made elsewhere; None where nobody does."""

    PREPARED_FACTOR: ClassVar[float] = 0.0
    """Bytes kept in ``StageOptions.prepared_dir`` over those of the artifacts, at most."""

    @classmethod
    @abstractmethod
    def probe(cls) -> Capabilities:
        """Return what is available on this machine. Raises BackendUnavailable."""

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
        """Return the version of the tool that makes this backend's files here; None: no tool or no
        need.

        Files of another version are other files. Raises BackendError where the tool does not run.
        """
        return None

    @classmethod
    def make_files(
        cls, spec: ModelSpec, artifacts: Artifacts, directory: Path, tick: Callable[[], None]
    ) -> Sequence[Path]:
        """Make the files that ``load`` needs beside these blocks, in ``directory``.

        ``artifacts`` may come from a stranger. ``tick`` is called about each second; an error that
        it raises ends the work. Raises BackendError, model.errors.CheckpointError, OSError.
        """
        raise FilesMissing(f"{cls.__name__} needs no files")

    @abstractmethod
    def load(self, spec: ModelSpec, artifacts: Artifacts, options: StageOptions) -> Stage:
        """Load contiguous blocks, given as (block, path of its artifact) in order.

        Temporary files lie in folders whose names begin with a dot, beside the artifacts or in
        ``prepared_dir``. Their owner removes the ones that a killed load has left. Raises
        BackendError where the blocks cannot be run, model.errors.CheckpointError where an artifact
        is not what it says.
        """
