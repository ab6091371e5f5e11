"""Graphs on disk whose weights are in the kernels' order, to be mapped instead of built.

ONNX Runtime rearranges weights when it makes a session, and holds them twice meanwhile. Here that
is done piece by piece. Each piece is saved with its rearranged weights, and is a session that maps
its file. So the memory beyond the weights is that of one piece, the page cache holds the weights,
and loading again only reads.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import platform
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

from backends import (
    onnx_aligned,
    onnx_experts,
    onnx_graph,
    onnx_matrix,
    onnx_mixture,
    onnx_session,
    onnx_share,
)
from backends.onnx_aligned import align_weights
from backends.onnx_graph import Graph
from backends.onnx_session import (
    ERRORS,
    PROVIDERS,
    release_mapped,
    session_of,
    session_options,
)
from model.artifact import file_sha256
from model.bounded import read_json
from model.errors import CheckpointError

log = logging.getLogger(__name__)

DISK_FACTOR = 2.1
"""Bytes on disk over those of the weights, because the runtime keeps them in both orders."""

_FACTS_FILE = "facts.json"

_INLINE_BYTES = "128"
"""Smaller tensors stay in the graph. The runtime needs such sizes to read the graph at all."""


class Prepared:
    """Graphs under ``directory``, each by its key, which take ``limit_bytes`` at most."""

    def __init__(self, directory: Path, limit_bytes: int | None = None) -> None:
        self._directory = directory
        self._limit_bytes = limit_bytes
        self._used: dict[str, int] = {}
        self._made: set[str] = set()
        self.opened: dict[Path, str] = {}
        """The opened weights of earlier loads, with the SHA-256 at the time of writing."""

    @staticmethod
    def key(content: Mapping[str, Any]) -> str:
        """Return the name of the weights that are made from ``content`` (plain values).

        It covers everything that the bytes depend on: this code, the runtime's version and the kind
        of processor.
        """
        made_by = {"runtime": ort.__version__, "code": _code_sha256(), "processor": _processor()}
        text = json.dumps([content, made_by], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def open(self, key: str, threads: int, *, small: bool = False) -> tuple[list[Any], int] | None:
        """Return (sessions, bytes of weights as executed), or None if missing or damaged.

        ``threads`` and ``small`` are those of ``onnx_session.session_options``.
        """
        home = self._directory / key
        if not home.exists():
            return None
        try:
            facts = _read_facts(home / _FACTS_FILE)
            for name, (size, _) in facts["files"].items():
                if (home / name).stat().st_size != size:
                    raise ValueError(f"{name} is not whole")
            sessions = []
            for name in facts["graphs"]:
                # Graphs are small, and a damaged one could end the process.
                if file_sha256(home / name) != facts["files"][name][1]:
                    raise ValueError(f"{name} is damaged")
                joined = len(facts["graphs"]) == 1
                options = session_options(threads, joined=joined, small=small)
                sessions.append(ort.InferenceSession(home / name, options, PROVIDERS))
            executed_bytes = int(facts["executed_bytes"])
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            CheckpointError,
            *ERRORS,
        ) as error:
            log.warning("%s is damaged: it is made again (%s)", home, error)
            return None
        release_mapped(home.resolve())
        self._used[key] = sum(size for size, _ in facts["files"].values())
        if key not in self._made:
            self.opened |= {home / name: sha256 for name, (_, sha256) in facts["files"].items()}
        return sessions, executed_bytes

    def keep(self, key: str, pieces: Iterable[Graph], needed_bytes: int) -> bool:
        """Save consecutive graphs. False if they do not fit or the disk fails.

        Their weights take ``needed_bytes``.
        """
        needed_bytes = int(DISK_FACTOR * needed_bytes)
        kept_bytes = sum(self._used.values())
        if self._limit_bytes is not None and kept_bytes + needed_bytes > self._limit_bytes:
            return False
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self.drop_others()  # The limit has no room for both, even for a moment.
            # Other files need as much free space again.
            if shutil.disk_usage(self._directory).free < 2 * needed_bytes:
                return False
            with tempfile.TemporaryDirectory(dir=self._directory, prefix=".new-") as name:
                home = Path(name) / key
                home.mkdir()
                _write(home, pieces)
                remove(self._directory / key)
                home.rename(self._directory / key)
                self._made.add(key)
        except (OSError, ValueError, CheckpointError, _Differs, *ERRORS):
            return False
        return True

    def drop_others(self) -> None:
        """Remove the graphs that were not opened through this object."""
        with contextlib.suppress(OSError):
            for path in self._directory.iterdir():
                if path.name not in self._used:
                    remove(path)


def _write(home: Path, pieces: Iterable[Graph]) -> None:
    # One core hashes a piece while another makes the next one.
    with ThreadPoolExecutor(1, "hash") as hashing:
        digests: dict[str, Future[str]] = {}
        models, executed_bytes = _write_pieces(home, pieces, hashing, digests)
        graphs = {f"graph-{number}.onnx": model for number, model in enumerate(models)}
        for name, model in graphs.items():
            (home / name).write_bytes(model.SerializeToString())
            digests[name] = hashing.submit(file_sha256, home / name)
        files = {}
        for path in home.iterdir():
            # After a power cut the file must not have the right size and holes.
            with path.open("rb") as file:
                os.fsync(file.fileno())
            files[path.name] = [path.stat().st_size, digests[path.name].result()]
    facts = {"executed_bytes": executed_bytes, "graphs": list(graphs), "files": files}
    _write_facts(home / _FACTS_FILE, facts)


def _write_pieces(
    home: Path, pieces: Iterable[Graph], hashing: Executor, digests: dict[str, Future[str]]
) -> tuple[list[onnx.ModelProto], int]:
    """Save each piece's weights; return (graphs, bytes as executed). Fills ``digests``."""
    models, executed_bytes = [], 0
    for number, graph in enumerate(pieces):
        executed_bytes += graph.executed_bytes
        part = home / f"part-{number}.onnx"
        options = session_options(1)
        options.optimized_model_filepath = str(part)
        for entry, value in (
            ("session.optimized_model_external_initializers_file_name", f"weights-{number}.bin"),
            ("session.optimized_model_external_initializers_min_size_in_bytes", _INLINE_BYTES),
            ("session.save_external_prepacked_constant_initializers", "1"),
        ):
            options.add_session_config_entry(entry, value)
        made = _output(session_of(graph, options))
        model = align_weights(part)
        read = _output(ort.InferenceSession(part, session_options(1), PROVIDERS))
        if not np.allclose(read, made, rtol=0, atol=1e-3 * float(np.abs(made).max())):
            raise _Differs
        models.append(model)
        part.unlink()
        weights = home / f"weights-{number}.bin"
        if weights.exists():  # The weights of a very small piece are all in its graph.
            digests[weights.name] = hashing.submit(file_sha256, weights)
    return models, executed_bytes


def _write_facts(path: Path, facts: Mapping[str, Any]) -> None:
    text = json.dumps(facts)
    sealed = {"facts": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    path.write_text(json.dumps(sealed), encoding="ascii")


def _read_facts(path: Path) -> Any:
    """Read the facts. Raises OSError, or ValueError, KeyError, TypeError if they are damaged."""
    sealed = read_json(path)
    if hashlib.sha256(sealed["facts"].encode()).hexdigest() != sealed["sha256"]:
        raise ValueError("the facts are damaged")
    return json.loads(sealed["facts"])


def remove(path: Path) -> None:
    """Remove a file or a folder. Leave it if that fails."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _output(session: Any) -> npt.NDArray[np.float32]:
    """Return a session's output for one row without a past.

    This checks the runtime (1.31), which saves some weights wrongly. It reads back other weights
    for matrices with inline scales and for some small matrices of 2 bits.
    """
    values: dict[str, npt.NDArray[Any]] = {}
    for value in session.get_inputs():
        shape = [size if isinstance(size, int) else 1 for size in value.shape]
        dtype = np.int32 if value.type == "tensor(int32)" else np.float32
        values[value.name] = np.full(shape, value.name.startswith(("total", "cos")), dtype)
    hidden = values["hidden"]
    hidden[...] = np.random.default_rng(0).standard_normal(hidden.shape, np.float32)
    (output,) = session.run(["output"], values)
    result: npt.NDArray[np.float32] = output
    return result


class _Differs(Exception):
    """The saved graph computes something else than the graph it was made from."""


@functools.lru_cache(maxsize=1)
def _code_sha256() -> str:
    modules = (
        onnx_aligned,
        onnx_experts,
        onnx_graph,
        onnx_matrix,
        onnx_mixture,
        onnx_session,
        onnx_share,
    )
    sources = [*(Path(str(module.__file__)) for module in modules), Path(__file__)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


@functools.lru_cache(maxsize=1)
def _processor() -> str:
    """Return the instruction sets, which decide the kernels and so the order of weights."""
    lines = {platform.machine()}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.split(":")[0].strip() in ("flags", "Features", "CPU part"):
                lines.add(line)
    return "\n".join(sorted(lines))
