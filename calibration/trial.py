"""What a model's shapes make native code do, tried first in a process of its own.

A kernel that ends its process at some shape would take the agent with it, at each load again. So
one block of each kind is loaded and run with random weights in a child. What passed is remembered.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from backends.base import Backend, BackendError, StageOptions
from backends.registry import backend_class
from calibration.layers import Task, chunk_tokens, fits_memory, random_artifacts, random_inputs
from calibration.machine import hardware_id, memory_bytes
from calibration.store import CalibrationStore
from model.errors import ModelError
from model.quantize import Format
from model.spec import ModelSpec
from wire.profile import DeviceProfile

VERSION = 1
"""Of what a trial does: another version tries everything again."""

TICK_S = 0.2

MAX_VOCAB = 1 << 14
"""A larger vocabulary is cut, to the same remainder: kernels treat the rest of a tile apart."""

_CHILD = """
import json, sys
settings = json.load(sys.stdin)
sys.path[:] = settings.pop("path")
from calibration.trial import answer_parent
answer_parent(settings)
"""


@dataclass(frozen=True, slots=True)
class Trials:
    """Trials with one backend on this device, of stages that are loaded as the options say.

    containers: the widths that the backend takes, and those that its kernels compute with.
    directory: where blocks of random weights are written meanwhile.
    """

    backend: str
    version: str
    containers: Mapping[int, int]
    threads: int
    exact: bool
    fast_prompts: bool
    directory: Path
    store: CalibrationStore

    @staticmethod
    def of(
        profile: DeviceProfile, directory: Path, *, exact: bool = False, fast_prompts: bool = False
    ) -> Trials:
        """Trials on the device with this profile; what passes is kept in ``directory``."""
        return Trials(
            backend=profile.backend,
            version=profile.backend_version,
            containers=dict(profile.container_bits),
            threads=profile.threads,
            exact=exact,
            fast_prompts=fast_prompts,
            directory=directory,
            store=CalibrationStore(directory / "trials.json"),
        )

    def require_widths(
        self, spec: ModelSpec, bits: Iterable[int], tick: Callable[[], None]
    ) -> None:
        """As ``require``, of every kind of block at each of ``bits`` that the backend takes."""
        formats = [Format.of(width) for width in sorted(bits) if width in self.containers]
        kinds = kinds_of_blocks(spec)
        self.require(spec, [(block, fmt) for fmt in formats for block in kinds], tick)

    def require(
        self, spec: ModelSpec, blocks: Iterable[tuple[int, Format]], tick: Callable[[], None]
    ) -> None:
        """Try those kinds of blocks that were not tried before, each in its format.

        ``tick`` is called now and then; what it raises ends the child. Raises BackendError that
        names block, backend and signal where native code ends the child.
        """
        wanted: dict[str, tuple[int, Format]] = {}
        for block, fmt in blocks:
            key = self._key(spec, block, fmt)
            if key not in wanted and self.store.get({"trial": key}) is None:
                wanted[key] = block, fmt
        if not wanted:
            return
        begun, passed, code = self._run_child(spec, list(wanted.values()), tick)
        keys = list(wanted)
        for number in passed:
            self.store.put({"trial": keys[number]}, (1.0,))
        if code == 0:
            return
        what = self.backend
        if begun:
            block, fmt = wanted[keys[begun[-1]]]
            what = f"{spec.block_name(block)} at {fmt.bits} bits: {self.backend}"
        how = _cause(code)
        raise BackendError(f"{what} {how} when it was tried in a process of its own")

    def _run_child(
        self, spec: ModelSpec, blocks: list[tuple[int, Format]], tick: Callable[[], None]
    ) -> tuple[list[int], list[int], int]:
        """(numbers of blocks that were begun, numbers of those that passed, exit code)."""
        settings = {
            "path": sys.path,
            "backend": self.backend,
            "spec": spec.to_dict(),
            "blocks": [[block, asdict(fmt)] for block, fmt in blocks],
            "containers": list(self.containers.items()),
            "threads": self.threads,
            "exact": self.exact,
            "fast_prompts": self.fast_prompts,
            "directory": str(self.directory),
        }
        self.directory.mkdir(parents=True, exist_ok=True)
        child = subprocess.Popen(  # noqa: S603 - this interpreter, with our own settings
            [sys.executable, "-I", "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        with child:
            try:
                said = _said(child, json.dumps(settings), tick)
            finally:
                child.kill()
        begun, passed = list[int](), list[int]()
        for line in said.splitlines():
            word, _, number = line.partition(" ")
            if number.isdigit() and int(number) < len(blocks):
                {"begun": begun, "passed": passed}.get(word, []).append(int(number))
        return begun, passed, child.returncode

    def _key(self, spec: ModelSpec, block: int, fmt: Format) -> str:
        """All that the outcome depends on."""
        small, number = _small(spec, block)
        content = {
            "version": VERSION,
            "hardware": hardware_id(),
            "backend": [self.backend, self.version],
            "options": [self.exact, self.fast_prompts],
            "spec": small.to_dict(),
            "block": number,
            "format": asdict(fmt) | {"bits": self.containers.get(fmt.bits, fmt.bits)},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def kinds_of_blocks(spec: ModelSpec) -> list[int]:
    """The embedding, the first layer of each shape, and the head."""
    layers = {layer: 1 + index for index, layer in reversed(list(enumerate(spec.layers)))}
    return [0, *sorted(layers.values()), spec.head_block]


def answer_parent(settings: dict[str, Any]) -> None:
    """The other process: says on stdout which block it begins, and which one passed."""
    backend = backend_class(settings["backend"])()
    spec, containers = ModelSpec.from_dict(settings["spec"]), dict(settings["containers"])
    for number, (block, fields) in enumerate(settings["blocks"]):
        fmt = Format(**fields)
        sys.stdout.write(f"begun {number}\n")
        sys.stdout.flush()
        with contextlib.suppress(BackendError, ModelError, MemoryError, OSError):
            # The load itself meets these errors again, and says so.
            if _try(backend, *_small(spec, block), fmt, containers, settings):
                sys.stdout.write(f"passed {number}\n")
                sys.stdout.flush()


def _try(
    backend: Backend,
    spec: ModelSpec,
    block: int,
    fmt: Format,
    containers: Mapping[int, int],
    settings: Mapping[str, Any],
) -> bool:
    """Load a block and run a chunk and a token; False where memory is too short for a trial."""
    blocks, chunk = range(block, block + 1), chunk_tokens(spec)
    task = Task("layer", 0, fmt.bits, containers.get(fmt.bits, fmt.bits), (fmt.bits,))
    if not fits_memory(spec, blocks, task):
        return False
    with TemporaryDirectory(dir=settings["directory"], prefix=".trial-") as name:
        artifacts = list(random_artifacts(Path(name), spec, blocks, [fmt]))
        keeps = backend.PREPARED_FACTOR > 0 and not settings["exact"]
        options = StageOptions(
            slots=1,
            context_tokens=min(spec.max_context, 2 * chunk),
            threads=settings["threads"],
            exact=settings["exact"],
            prepared_dir=Path(name) / "prepared" if keeps else None,
            fast_prompts=settings["fast_prompts"],
            memory_bytes=memory_bytes()[0],
            hashed=frozenset(path for _, path in artifacts),
        )
        with contextlib.closing(backend.load(spec, artifacts, options)) as stage:
            inputs = random_inputs(spec, blocks, chunk)
            stage.forward(0, 0, inputs[: max(chunk - 1, 1)])
            stage.forward(0, max(chunk - 1, 1), inputs[:1])
    return True


def _small(spec: ModelSpec, block: int) -> tuple[ModelSpec, int]:
    """A model of one layer around a block's kind, and the block's number in it."""
    vocab = spec.vocab
    if vocab > MAX_VOCAB:
        vocab = MAX_VOCAB // 2 + vocab % (MAX_VOCAB // 2)
    kind = spec.block_kind(block)
    layer = spec.layer(block) if kind == "layer" else spec.layers[-1]
    small = replace(spec, layers=(layer,), vocab=vocab)
    return small, {"embedding": 0, "layer": 1, "head": small.head_block}[kind]


def _said(child: subprocess.Popen[str], sent: str, tick: Callable[[], None]) -> str:
    """What the child says until it ends, while ``tick`` is called."""
    text: str | None = sent
    while True:
        try:
            said, _ = child.communicate(text, timeout=TICK_S)
        except subprocess.TimeoutExpired:
            text = None
            tick()
        else:
            return said


def _cause(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    with contextlib.suppress(ValueError):
        number = signal.Signals(-code)
        said = signal.strsignal(number) or ""
        if number == signal.SIGKILL:
            said = "maybe for want of memory"
        return f"died by {number.name} ({said.lower()})"
    return f"died by signal {-code}"
