"""Runs native code with a model's shapes in a child process, before the agent does.

A kernel that ends its process at some shape would take the agent with it, at each load again. So a
child loads one block of each kind and runs it with random weights. Passed trials are remembered.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

from backends.base import Backend, BackendError, StageOptions
from backends.registry import backend_class
from calibration.layers import Task, chunk_tokens, fits_memory, random_artifacts, random_inputs
from calibration.machine import hardware_id
from calibration.shares import share_models
from calibration.store import CalibrationStore
from model.errors import ModelError
from model.memory import memory_bytes
from model.quantize import Format
from model.spec import ModelSpec
from wire.profile import DeviceProfile

VERSION = 1
"""The version of a trial. Another version tries everything again."""

TICK_S = 0.2

MAX_VOCAB = 1 << 11
"""A larger vocabulary is cut to the same remainder, because kernels treat the last tile apart."""

_CHILD = """
import json, os, sys
settings = json.load(sys.stdin)
sys.path[:] = settings.pop("path")
from calibration.trial import answer_parent
answer_parent(settings)
os._exit(0)  # All is said. To take the modules apart takes as long as to import some of them.
"""


@dataclass(frozen=True, slots=True)
class Trials:
    """Trials with one backend on this device, of stages that are loaded with these options.

    containers: the widths that the backend takes, and those that its kernels compute with.
    directory: holds blocks of random weights meanwhile.
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
        profile: DeviceProfile,
        directory: Path,
        kept: Path | None = None,
        *,
        exact: bool = False,
        fast_prompts: bool = False,
    ) -> Trials:
        """Return trials on the device with this profile. Passed ones are kept in the file ``kept``.

        By default it lies in ``directory``.
        """
        return Trials(
            backend=profile.backend,
            version=profile.backend_version,
            containers=dict(profile.container_bits),
            threads=profile.threads,
            exact=exact,
            fast_prompts=fast_prompts,
            directory=directory,
            store=CalibrationStore(kept or directory / "trials.json"),
        )

    def require_widths(
        self,
        spec: ModelSpec,
        bits: Iterable[int],
        tick: Callable[[], None],
        meanwhile: Callable[[], object] = lambda: None,
    ) -> None:
        """Call ``require`` for every kind of block at each of ``bits`` that the backend takes."""
        formats = [Format.of(width) for width in sorted(bits) if width in self.containers]
        kinds = kinds_of_blocks(spec)
        self.require(spec, [(block, fmt) for fmt in formats for block in kinds], tick, meanwhile)

    def require_shares(
        self, spec: ModelSpec, bits: Iterable[int], tick: Callable[[], None]
    ) -> None:
        """Call ``require`` for the layers of all shares that calibration times."""
        layers = kinds_of_blocks(spec)[1:-1]
        parts: dict[ModelSpec, list[tuple[int, Format]]] = {}
        for width in sorted(set(bits) & set(self.containers)):
            for part in share_models(spec, "layer", width).values():
                parts.setdefault(part, []).extend((block, Format.of(width)) for block in layers)
        for part, blocks in parts.items():
            self.require(part, blocks, tick)

    def require(
        self,
        spec: ModelSpec,
        blocks: Iterable[tuple[int, Format]],
        tick: Callable[[], None],
        meanwhile: Callable[[], object] = lambda: None,
    ) -> None:
        """Try the new kinds of these blocks, each in its format.

        ``tick`` is called now and then, and may raise to end the child. ``meanwhile`` is called
        once, while a child works. Raises BackendError that names block, backend and signal if
        native code ends the child.
        """
        wanted = self._untried(spec, blocks)
        if not wanted:
            return
        # All of a format at once is faster. One by one shows which of them failed.
        stages = list(_by_format(wanted.values()).values())
        _, passed, code = self._run_child(spec, stages, tick, meanwhile)
        if code != 0:
            stages = [[one] for one in wanted.values()]
            begun, passed, code = self._run_child(spec, stages, tick, lambda: None)
        names = {one: key for key, one in wanted.items()}
        for number in passed:
            for one in stages[number]:
                self.store.put({"trial": names[one]}, (1.0,))
        if code == 0:
            return
        what = self.backend
        if begun:
            ((block, fmt),) = stages[begun[-1]]
            what = f"{spec.block_name(block)} at {fmt.bits} bits: {self.backend}"
        raise BackendError(f"{what} {_cause(code)} when a child process tried it")

    def _untried(
        self, spec: ModelSpec, blocks: Iterable[tuple[int, Format]]
    ) -> dict[str, tuple[int, Format]]:
        """Return one block of each kind and format that is not known to pass, by its key."""
        kinds: dict[object, tuple[int, Format]] = {}
        for block, fmt in blocks:
            kind = spec.block_kind(block)
            kinds.setdefault((kind == "layer" and spec.layer(block), kind, fmt), (block, fmt))
        found = {self._key(spec, block, fmt): (block, fmt) for block, fmt in kinds.values()}
        return {key: one for key, one in found.items() if self.store.get({"trial": key}) is None}

    def _run_child(
        self,
        spec: ModelSpec,
        stages: Sequence[Sequence[tuple[int, Format]]],
        tick: Callable[[], None],
        meanwhile: Callable[[], object],
    ) -> tuple[list[int], list[int], int]:
        """Return (numbers of begun stages, numbers of passed stages, exit code).

        The blocks lie in a directory of this process, because a killed child removes nothing.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=self.directory, prefix=".trial-") as scratch:
            return self._child_in(scratch, spec, stages, tick, meanwhile)

    def _child_in(
        self,
        scratch: str,
        spec: ModelSpec,
        stages: Sequence[Sequence[tuple[int, Format]]],
        tick: Callable[[], None],
        meanwhile: Callable[[], object],
    ) -> tuple[list[int], list[int], int]:
        """Run a child whose files lie in ``scratch``; otherwise as ``_run_child``."""
        settings = {
            "path": sys.path,
            "backend": self.backend,
            "spec": spec.to_dict(),
            "stages": [[[block, asdict(fmt)] for block, fmt in stage] for stage in stages],
            "containers": list(self.containers.items()),
            "threads": self.threads,
            "exact": self.exact,
            "fast_prompts": self.fast_prompts,
            "directory": scratch,
        }
        with TemporaryFile("w+") as sent:
            json.dump(settings, sent)
            sent.seek(0)
            child = subprocess.Popen(  # noqa: S603 - this interpreter, with our own settings
                [sys.executable, "-I", "-c", _CHILD],
                stdin=sent,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        with child:
            try:
                meanwhile()
                said = _said(child, tick)
            finally:
                child.kill()
        begun, passed = list[int](), list[int]()
        for line in said.splitlines():
            word, _, number = line.partition(" ")
            if number.isdigit() and int(number) < len(stages):
                {"begun": begun, "passed": passed}.get(word, []).append(int(number))
        return begun, passed, child.returncode

    def _key(self, spec: ModelSpec, block: int, fmt: Format) -> str:
        """Return the key, which covers everything that the outcome depends on."""
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
    """Return the embedding, the first layer of each shape, and the head."""
    layers = {layer: 1 + index for index, layer in reversed(list(enumerate(spec.layers)))}
    return [0, *sorted(layers.values()), spec.head_block]


def _by_format(
    blocks: Iterable[tuple[int, Format]],
) -> dict[Format, list[tuple[int, Format]]]:
    found: dict[Format, list[tuple[int, Format]]] = {}
    for block, fmt in blocks:
        found.setdefault(fmt, []).append((block, fmt))
    return found


def answer_parent(settings: dict[str, Any]) -> None:
    """Run the child's side, and name each stage on stdout when it begins and when it passes."""
    backend = backend_class(settings["backend"])()
    spec = ModelSpec.from_dict(settings["spec"])
    # Compiled files are checked in a child of their own, and random ones would take minutes to
    # make.
    makes_files = type(backend).make_files.__qualname__ != Backend.make_files.__qualname__
    for number, stage in enumerate(settings["stages"]):
        blocks, fmt = sorted(block for block, _ in stage), Format(**stage[0][1])
        sys.stdout.write(f"begun {number}\n")
        sys.stdout.flush()
        with contextlib.suppress(BackendError, ModelError, MemoryError, OSError):
            # The load itself meets these errors again, and reports them.
            if makes_files or all(
                [_try(backend, *part, fmt, settings) for part in _stages(spec, blocks)]
            ):
                sys.stdout.write(f"passed {number}\n")
                sys.stdout.flush()


def _stages(spec: ModelSpec, blocks: Sequence[int]) -> list[tuple[ModelSpec, range]]:
    """Return small models with stages of these blocks: one, or two if the ends are apart."""
    layers = tuple(spec.layer(block) for block in blocks if spec.block_kind(block) == "layer")
    if not layers:
        small = [_small(spec, block) for block in blocks]
        return [(model, range(number, number + 1)) for model, number in small]
    model = replace(_small(spec, blocks[-1])[0], layers=layers)
    first = 0 if blocks[0] == 0 else 1
    return [(model, range(first, model.head_block + (blocks[-1] == spec.head_block)))]


def _try(
    backend: Backend, spec: ModelSpec, blocks: range, fmt: Format, settings: Mapping[str, Any]
) -> bool:
    """Load blocks and run a chunk and a token. False if memory is too short for a trial."""
    chunk, containers = chunk_tokens(spec), dict(settings["containers"])
    task = Task("layer", 0, fmt.bits, containers.get(fmt.bits, fmt.bits), (fmt.bits,))
    if not fits_memory(spec, blocks, task):
        return False
    with TemporaryDirectory(dir=settings["directory"], prefix=".trial-") as name:
        artifacts = list(random_artifacts(Path(name), spec, blocks, [fmt] * len(blocks)))
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
        with contextlib.closing(backend.stage(spec, artifacts, options)) as stage:
            inputs = random_inputs(spec, blocks, chunk)
            stage.forward(0, 0, inputs[: max(chunk - 1, 1)])
            stage.forward(0, max(chunk - 1, 1), inputs[:1])
    return True


def _small(spec: ModelSpec, block: int) -> tuple[ModelSpec, int]:
    """Return a model of one layer around a block's kind, and the block's number in it."""
    vocab = spec.vocab
    if vocab > MAX_VOCAB:
        vocab = MAX_VOCAB // 2 + vocab % (MAX_VOCAB // 2)
    kind = spec.block_kind(block)
    layer = spec.layer(block) if kind == "layer" else spec.layers[-1]
    small = replace(spec, layers=(layer,), vocab=vocab)
    return small, {"embedding": 0, "layer": 1, "head": small.head_block}[kind]


def _said(child: subprocess.Popen[str], tick: Callable[[], None]) -> str:
    """Return the child's output, and call ``tick`` until it ends."""
    while True:
        try:
            said, _ = child.communicate(timeout=TICK_S)
        except subprocess.TimeoutExpired:
            tick()
        else:
            return said


def _cause(code: int) -> str:
    """Describe how a process ended."""
    if code >= 0:
        return f"ended with exit code {code}"
    with contextlib.suppress(ValueError):
        number = signal.Signals(-code)
        said = signal.strsignal(number) or ""
        if number == signal.SIGKILL:
            said = "maybe for lack of memory"
        return f"died by {number.name} ({said.lower()})"
    return f"died by signal {-code}"
