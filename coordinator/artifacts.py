"""Quantized blocks on the coordinator's disk: made once per checkpoint, block and format.

Layout under the state directory: ``artifacts/<sha256>`` (what agents fetch) and
``checkpoints/<fingerprint>.json`` (which hash is which block in which format, and the weight
errors measured on the way). Losing the index costs time, never correctness.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from model.artifact import write_artifact
from model.checkpoint import Checkpoint
from model.quantize import Format, weight_error
from model.spec import QUANTIZED_TENSORS
from wire.messages import BlockRef

log = logging.getLogger(__name__)

INDEX_VERSION = 1
OnStep = Callable[[int, int], None]


class Cancelled(Exception):
    """The user went away; raised between two blocks."""


class ArtifactStore:
    """Artifacts and their index. One thread at a time."""

    def __init__(self, state_dir: Path) -> None:
        self._artifacts = state_dir / "artifacts"
        self._indices = state_dir / "checkpoints"

    def prepare(self) -> None:
        """Make the directories. Raises OSError."""
        self._artifacts.mkdir(parents=True, exist_ok=True)
        self._indices.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path | None:
        """The artifact with this hash, if there is one. ``sha256`` may come from anyone."""
        if len(sha256) != 64 or not all(digit in "0123456789abcdef" for digit in sha256):
            return None
        path = self._artifacts / sha256
        return path if path.is_file() else None

    def quantize(
        self,
        checkpoint: Checkpoint,
        wanted: Sequence[tuple[int, Format]],
        on_step: OnStep,
        cancelled: Callable[[], bool],
    ) -> tuple[BlockRef, ...]:
        """The artifact of each (block, format), made where it does not exist yet.

        Raises model.errors.ModelError (damaged weights, disk full), OSError, Cancelled.
        """
        index = self._load(checkpoint)
        refs: list[BlockRef] = []
        for done, (block, fmt) in enumerate(wanted):
            if cancelled():
                raise Cancelled
            key = f"{block}/{_key(fmt)}"
            entry = index["artifacts"].get(key)
            if entry is None or self.path(entry[0]) is None:
                artifact = write_artifact(self._artifacts, block, checkpoint.block(block), fmt)
                entry = [artifact.sha256, artifact.size_bytes]
                index["artifacts"][key] = entry
                self._save(checkpoint, index)
            refs.append(BlockRef(block, entry[0], entry[1]))
            on_step(done + 1, len(wanted))
        return tuple(refs)

    def weight_errors(
        self,
        checkpoint: Checkpoint,
        formats: Iterable[Format],
        on_step: OnStep,
        cancelled: Callable[[], bool],
    ) -> tuple[dict[int, float], ...]:
        """For each block: bits -> largest |w - w_b| / 2^b over its matrices.

        Source: DILEMMA, constraint (2g) and "Environment Setup".
        Raises model.errors.ModelError, OSError, Cancelled.
        """
        formats = tuple(formats)
        index = self._load(checkpoint)
        errors: list[dict[int, float]] = []
        count = checkpoint.spec.block_count
        for block in range(count):
            if cancelled():
                raise Cancelled
            known = index["errors"].setdefault(str(block), {})
            missing = [fmt for fmt in formats if _key(fmt) not in known]
            if missing:
                tensors = checkpoint.block(block)
                for fmt in missing:
                    known[_key(fmt)] = max(
                        weight_error(tensor, fmt, normalized=True)
                        for name, tensor in tensors.items()
                        if name in QUANTIZED_TENSORS
                    )
                self._save(checkpoint, index)
            errors.append({fmt.bits: known[_key(fmt)] for fmt in formats})
            on_step(block + 1, count)
        return tuple(errors)

    def _load(self, checkpoint: Checkpoint) -> dict[str, Any]:
        path = self._index_path(checkpoint)
        with contextlib.suppress(OSError, ValueError):
            index = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(index, dict) and index.get("version") == INDEX_VERSION:
                return index
            log.warning("%s is of another version and is made again", path)
        return {"version": INDEX_VERSION, "artifacts": {}, "errors": {}}

    def _save(self, checkpoint: Checkpoint, index: dict[str, Any]) -> None:
        path = self._index_path(checkpoint)
        descriptor, temporary = tempfile.mkstemp(dir=self._indices)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(index, file)
            Path(temporary).replace(path)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise

    def _index_path(self, checkpoint: Checkpoint) -> Path:
        return self._indices / f"{checkpoint.fingerprint}.json"


def _key(fmt: Format) -> str:
    kind = "sym" if fmt.symmetric else "asym"
    return f"{fmt.bits}/{fmt.scheme}/{fmt.group_size}/{kind}"
