"""The interface between the stage runner and a kind of hardware.

A backend computes a whole stage (a contiguous run of blocks) in one call. Loading and running are
separate objects. ``Backend`` describes its abilities and loads, and ``Stage`` runs. A new kind of
hardware is one file with both, and one line in ``backends.registry``.
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
from model.texts import Texts

Array = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int64]


TeamSum = Callable[[Array], Array]
"""Adds up the partial rows float32 [n, hidden] of all members of a team, and returns the sum.

A stage of a share calls it twice per layer, in order: with the rows of ``o`` and with those of
``down``, both without bias. Each call has all rows of the pass, in the order of its inputs, also if
no logits are wanted. All members get equal sums. The rows that were passed in may not be used
afterwards, and the sum is valid until the next call. It is called in ``forward`` and ``decode``
only, because members are connected after loading. It raises whatever ends the pass, and the stage
lets it through.
"""


ALL_LOGITS = -1
"""In ``Stage.candidates``: the caller needs the logits of the whole vocabulary."""


class BackendError(Exception):
    """A stage cannot be loaded or run. The message says why and what to do."""


class BackendUnavailable(BackendError):
    """This machine lacks something that the backend needs. ``reason`` is one line for the user."""

    def __init__(self, backend: str, reason: str) -> None:
        super().__init__(f"backend {backend} is not available: {reason}")
        self.backend = backend
        self.reason = reason


class HardwareAbsent(BackendUnavailable):
    """... and it may come, such as a device on USB, or a GPU whose driver loads late at boot."""


class FilesMissing(BackendError):
    """A stage needs files made from its blocks, and no machine at hand can make them."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The abilities of a backend on this machine.

    container_bits: maps each accepted width to the width that kernels keep in memory and compute
        with (6 -> 8). The planner charges memory by it.
    exact_container_bits: the same map for exact stages (``StageOptions.exact``). None: the same
        widths. Empty: results are always rounded.
    on_chip_bytes: bytes of a stage's layers that an accelerator keeps, at one byte per weight of 8
        bits. The other layers cross a bus at every call. None: weights are in ordinary memory.
    arithmetic: names the backend that rounds layers in the same way on any CPU. It is set if this
        rounding loses much more than the weights' own, even in exact stages. It is then measured
        apart.
    shares: whether it loads shares (``StageOptions.team_sum``).
    experts: whether it runs layers with a mixture of experts.
    """

    backend: str
    version: str
    container_bits: Mapping[int, int]
    on_chip_bytes: int | None = None
    exact_container_bits: Mapping[int, int] | None = None
    arithmetic: str = ""
    shares: bool = False
    experts: bool = True

    def containers(self, *, exact: bool) -> Mapping[int, int]:
        """Return ``container_bits`` of exact or other stages."""
        own = self.exact_container_bits
        return self.container_bits if own is None or not exact else own


@dataclass(frozen=True, slots=True)
class StageOptions:
    """The conditions for which a stage is loaded.

    slots, context_tokens: the number of sequences, and the most tokens of each.
    exact: products take activations unrounded, if the backend can. Otherwise it may round them (to
        8 bits, say) if that is faster and its documentation states the error.
    prepared_dir: a folder for files that the backend makes of artifacts, to load faster next time.
        A kept file serves only the artifact that it was made from. None: nothing is kept.
    prepared_bytes: the limit for prepared_dir. None: the free space of the disk.
    fast_prompts: prompts may round weights and activations once more, if that is faster and
        memory_bytes leaves room. It has no effect on exact stages.
    memory_bytes: memory for the stage, if that is more than a plan charges for it. The excess may
        hold weights in a faster, larger form, and be taken while weights are brought into it. None:
        stages hold only the charged memory.
    hashed: artifacts that the caller has compared with their hashes. The backend compares the
        others before it keeps anything made of them.
    team_sum: set for a share of layers (model/share.py). ``spec`` is then the share's, and the
        artifacts are its slices. None: whole layers.
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
    team_sum: TeamSum | None = None


Artifacts = Sequence[tuple[int, Path]]
"""Pairs of a block and the path of its artifact, in order."""

Supplier = Callable[[ModelSpec, Artifacts], Sequence[Path]]
"""Has another machine run ``Backend.make_files``, and returns the files.

Raises FilesMissing if no machine can, and the errors of the network.
"""


class Stage(ABC):
    """Loaded blocks [first, last) with their KV cache. One caller at a time."""

    candidates: int = ALL_LOGITS
    """How many of a row's highest logits the caller needs. It sets this before a call.

    A stage may return -inf for the others, if it saves time.
    """

    between: Callable[[], float] | None = None
    """Called between layers of a pass, to let stages of other models compute meanwhile.

    It returns the seconds for which they did. The caller sets it. It raises nothing. A stage that
    cannot stop there, as on an accelerator, need not call it. A share of a team may not, because
    the other members would wait, too.
    """

    @abstractmethod
    def forward(
        self, slot: int, position: int, inputs: Array | Tokens, *, logits: int = 1
    ) -> Array:
        """Run rows [position, position + n) of the sequence in ``slot``.

        The result is valid only if the slot's cached rows below ``position`` are. If they were
        never written, as in timing runs, the result is arbitrary. Rows at and above ``position``
        are overwritten. So position 0 starts a new sequence, and a smaller position rolls back.

        inputs: token ids int64 [n] if the stage holds the embedding, else hidden float32 [n,
            hidden].

        logits: the number of last rows whose logits are wanted, at most n.

        Returns hidden float32 [n, hidden]. A stage with the head returns logits float32
        [logits, vocab] of the last rows. Raises BackendError if rows do not fit the context.
        """

    def decode(
        self, slots: Sequence[int], positions: Sequence[int], inputs: Array | Tokens
    ) -> Array:
        """Run row i of ``inputs`` at positions[i] of slots[i], for each of several sequences.

        Slots are distinct. Returns hidden float32 [n, hidden]. A stage with the head returns logits
        float32 [n, vocab]. If several rows fail together, no slot loses its earlier rows, so the
        caller can find the faulty row by running each alone. Otherwise it is like ``forward``. This
        default runs the rows one after another.
        """
        calls = zip(slots, positions, range(len(inputs)), strict=True)
        rows = [self.forward(slot, at, inputs[row : row + 1]) for slot, at, row in calls]
        return np.concatenate(rows)

    def encode(self, inputs: Array | Tokens, texts: Texts) -> Array:
        """Run whole texts through the blocks of an encoder (``ModelSpec.encodes``).

        inputs: token ids int64 [n] of all texts, one behind the other, if the stage holds the
            embedding, else hidden float32 [n, hidden].

        Returns hidden float32 [n, hidden]. A stage with the head returns float32 [texts,
        output_width], or [n, output_width] if each token has a result. Raises BackendError.
        """
        raise BackendError("this backend runs no encoders")

    @property
    @abstractmethod
    def memory_bytes(self) -> int:
        """The memory of the stage: weights as executed, KV cache and compute buffers."""

    @property
    def kept_files(self) -> Mapping[Path, str]:
        """The files of ``prepared_dir`` that the stage runs from and that an earlier load made.

        Each maps to the SHA-256 that it had when it was written. A file with another hash is
        damaged. The backend makes it again once it is removed.
        """
        return {}

    @abstractmethod
    def close(self) -> None:
        """Free everything. The stage must not be used again. Idempotent."""


class Backend(ABC):
    """A kind of hardware with the library that drives it.

    Some hardware runs only files that its maker's tool has made of the blocks, and the tool may not
    run on the device. Such a backend also has ``maker`` and ``make_files``. Its ``load`` asks the
    ``supplier`` for missing files.
    """

    supplier: Supplier | None = None
    """Gets files that another machine makes. None: no other machine is asked."""

    PREPARED_FACTOR: ClassVar[float] = 0.0
    """The most bytes in ``StageOptions.prepared_dir``, as a multiple of the artifacts' bytes."""

    @classmethod
    @abstractmethod
    def probe(cls) -> Capabilities:
        """Return what is available on this machine. Raises BackendUnavailable."""

    @classmethod
    def memory_bytes(cls) -> tuple[int, int] | None:
        """Return (free, total) bytes of the stages' memory, or None if it is the machine's own."""
        return None

    @classmethod
    def memory_read_bytes_per_s(cls) -> float | None:
        """Measure how fast kernels read the stages' memory. None: it is the machine's own.

        Raises BackendUnavailable.
        """
        return None

    @classmethod
    def maker(cls) -> str | None:
        """Return the version of the tool that makes this backend's files, or None without a tool.

        Files of another version are other files. Raises BackendError if the tool does not run.
        """
        return None

    @classmethod
    def make_files(
        cls, spec: ModelSpec, artifacts: Artifacts, directory: Path, tick: Callable[[], None]
    ) -> Sequence[Path]:
        """Make the files that ``load`` needs beside these blocks, in ``directory``.

        ``artifacts`` may come from a stranger. ``tick`` is called about each second, and may raise
        to end the work. Raises BackendError, model.errors.CheckpointError, OSError.
        """
        raise FilesMissing(f"{cls.__name__} needs no files")

    @abstractmethod
    def load(self, spec: ModelSpec, artifacts: Artifacts, options: StageOptions) -> Stage:
        """Load contiguous blocks, given as (block, path of its artifact) in order.

        Temporary files are in folders whose names begin with a dot, beside the artifacts or in
        ``prepared_dir``. The owner of these folders removes those of killed loads. Raises
        BackendError if the blocks cannot be run, and model.errors.CheckpointError if an artifact is
        damaged.
        """

    def load_encoder(self, spec: ModelSpec, artifacts: Artifacts, options: StageOptions) -> Stage:
        """As ``load``, of a model that encodes whole texts. The stage has ``encode``."""
        raise BackendError(f"{type(self).__name__} runs no encoders: use another backend")

    def stage(self, spec: ModelSpec, artifacts: Artifacts, options: StageOptions) -> Stage:
        """Load blocks of any model: by ``load_encoder`` if it encodes, else by ``load``."""
        load = self.load_encoder if spec.encodes else self.load
        return load(spec, artifacts, options)
