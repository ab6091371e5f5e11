"""Makes quantized blocks once per checkpoint, block and format, and keeps them on disk.

In the state directory, ``artifacts/<sha256>`` are the files that agents fetch. The index
``checkpoints/<fingerprint>.json`` has the hash of each block and format, and of each share of it,
with those of its experts.
Losing an artifact or the index costs time, never correctness.

A share is cut out of the whole block's artifact. So all members of a team have the same quantized
numbers as a device that runs the block alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from coordinator.errors import MakingFailed, StorageFull
from model.aging import by_use
from model.artifact import SHA256, Tensor, file_sha256, read_block, store_block, write_artifact
from model.bounded import read_json
from model.checkpoint import Checkpoint
from model.costs import stored_bytes
from model.durable import remove, replace_bytes, replace_text
from model.errors import Cancelled, CheckpointError, UnsupportedModelError
from model.expert_parts import HASH_BYTES, expert_hashes, expert_parts
from model.partial import PartialFile
from model.quantize import Format, Quantizer
from model.quantizers.prepared import quantized
from model.safetensors import read_safetensors
from model.share import Share, share_spec, share_tensors
from model.spec import ModelSpec
from model.weight_errors import weight_errors
from wire.messages import BlockRef, FileRef
from wire.sizes import format_size

log = logging.getLogger(__name__)

INDEX_VERSION = 1

FREE_SHARE = 0.1
"""Without a limit, this share of the disk space for artifacts stays free."""

HEADER_BYTES = 4096
"""The most bytes of an artifact's file beside its tensors."""

OnStep = Callable[[int, int], None]

_HEX = re.compile(r"([0-9a-f]{2})*")


@dataclass(frozen=True, slots=True)
class Wanted:
    """An artifact: a block in a format, whole or the share of a team's member."""

    block: int
    fmt: Format
    share: Share | None = None

    def key(self, spec: ModelSpec) -> str:
        """The artifact's key in the index. It names the parts of the share that the block has."""
        whole = f"{self.block}/{self.fmt.key}"
        if self.share is None:
            return whole
        if self.block == spec.head_block:
            return f"{whole}/v{_text(self.share.vocab)}"
        return f"{whole}/h{_text(self.share.kv_heads)},c{_text(self.share.columns)}"

    def stored_bytes(self, spec: ModelSpec) -> int:
        """Bytes of the tensors on disk. Raises UnsupportedModelError for an impossible share."""
        own = spec if self.share is None else share_spec(spec, self.share)
        return stored_bytes(own, self.block, self.fmt)


def _is_entry(entry: Any) -> bool:
    """Whether this is a hash, a size and the hashes of experts, which an older index lacks."""
    if not isinstance(entry, list) or not 2 <= len(entry) <= 3:
        return False
    sha256, size_bytes, *experts = entry
    return (
        isinstance(sha256, str)
        and type(size_bytes) is int
        and all(isinstance(one, str) and _HEX.fullmatch(one) for one in experts)
    )


def _text(span: tuple[int, int]) -> str:
    return f"{span[0]}-{span[1]}"


class ArtifactStore:
    """Artifacts on disk and their index, for one thread at a time.

    Before a block is made, the artifacts that were used longest ago make room for it.
    """

    def __init__(self, state_dir: Path, limit_bytes: int | None = None) -> None:
        """Use ``state_dir`` for up to ``limit_bytes``. None leaves FREE_SHARE of the disk free."""
        self._state_dir = state_dir
        self._artifacts = state_dir / "artifacts"
        self._indices = state_dir / "checkpoints"
        self._limit_bytes = limit_bytes
        self._in_use: set[str] = set()
        """Hashes of the artifacts quantized last. Agents may be fetching them."""
        self._sources: dict[str, tuple[Checkpoint, Wanted]] = {}
        """Hash -> the source of each artifact of the last checkpoint."""
        self._kept: dict[str, bytes] = {}
        """Hash -> the content of each file of ``keep`` for the last checkpoint."""
        self._cut: tuple[str, Mapping[str, Tensor]] | None = None
        """The hash and the tensors of the whole block that shares were cut from last."""
        self._making = threading.RLock()

    def prepare(self) -> None:
        """Make the directories. Raises OSError."""
        self._artifacts.mkdir(parents=True, exist_ok=True)
        self._indices.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path | None:
        """The artifact with this hash, or None. ``sha256`` may come from anyone."""
        if not SHA256.fullmatch(sha256):
            return None
        path = self._artifacts / sha256
        return path if path.is_file() else None

    def prepared(
        self, checkpoint: Checkpoint, quantizer: Quantizer, text: str | None
    ) -> Checkpoint:
        """Return the checkpoint with codes by a quantizer, which are made when they are needed.

        They are kept in the state directory. Raises as ``model.quantizers.prepared.quantized``.
        """
        return quantized(checkpoint, quantizer, self._state_dir, text)

    def quantize(
        self,
        checkpoint: Checkpoint,
        wanted: Sequence[Wanted],
        on_step: OnStep,
        cancelled: Callable[[], bool],
        *,
        keep: bool = False,
    ) -> tuple[BlockRef, ...]:
        """Make the missing artifacts of ``wanted``, and return all.

        keep: also those of the call before stay on disk, and can be repaired.

        Raises model.errors.ModelError (damaged weights, disk full), OSError, StorageFull,
        Cancelled.
        """
        index = self._load(checkpoint)
        refs: list[BlockRef] = []
        if not keep:
            self._in_use.clear()
            self._kept.clear()
        same = checkpoint.fingerprint
        self._sources = {
            sha256: source
            for sha256, source in self._sources.items()
            if keep or source[0].fingerprint == same
        }
        try:
            for done, item in enumerate(wanted):
                if cancelled():
                    raise Cancelled
                ref = self._obtain(checkpoint, item, index)
                self._sources[ref.sha256] = (checkpoint, item)
                refs.append(ref)
                self._in_use.add(ref.sha256)
                on_step(done + 1, len(wanted))
        finally:
            self._cut = None
        return tuple(refs)

    def _obtain(self, checkpoint: Checkpoint, wanted: Wanted, index: dict[str, Any]) -> BlockRef:
        """Return an artifact, which is made if it is missing. Raises as ``_make``."""
        key = wanted.key(checkpoint.spec)
        entry = index["artifacts"].get(key)
        if entry is not None and self._has(*entry[:2]):
            return BlockRef(entry[0], entry[1], wanted.block, bytes.fromhex("".join(entry[2:])))
        made = self._make(checkpoint, wanted, index)
        index["artifacts"][key] = [made.sha256, made.size_bytes, made.experts.hex()]
        self._save(checkpoint, index)
        return made

    def _has(self, sha256: str, size_bytes: int) -> bool:
        """Whether an artifact of this size is here. Asking counts as using it."""
        path = self._artifacts / sha256
        if not SHA256.fullmatch(sha256) or not path.exists():
            return False
        if not path.is_file() or path.stat().st_size != size_bytes or not os.access(path, os.R_OK):
            log.warning("%s is damaged: it is made again", path)
            remove(path)
            return False
        os.utime(path)
        return True

    def can_make(self, sha256: str) -> bool:
        """Whether ``repair`` knows the source of this file."""
        return sha256 in self._sources or sha256 in self._kept

    def _make(self, checkpoint: Checkpoint, wanted: Wanted, index: dict[str, Any]) -> BlockRef:
        """Write an artifact. Raises ModelError, OSError, StorageFull."""
        spec, block, fmt = checkpoint.spec, wanted.block, wanted.fmt
        with self._making:
            needed_bytes = wanted.stored_bytes(spec) + HEADER_BYTES
            if wanted.share is None:
                self._make_room(needed_bytes, set())
                artifact = write_artifact(
                    self._artifacts, block, checkpoint.block_in(block, fmt), fmt
                )
                experts = _expert_hashes(spec, block, artifact.path)
            else:
                tensors = self._whole_block(checkpoint, wanted, index)
                try:
                    cut = share_tensors(spec, block, tensors, wanted.share)
                except ValueError as error:
                    raise UnsupportedModelError(
                        f"{spec.block_name(block)} cannot be shared like this: {error}"
                    ) from error
                self._make_room(needed_bytes, set())
                artifact = store_block(self._artifacts, block, cut, fmt)
                whole = index["artifacts"][replace(wanted, share=None).key(spec)]
                first, end = (HASH_BYTES * expert for expert in wanted.share.columns)
                experts = bytes.fromhex("".join(whole[2:]))[first:end]
            return BlockRef(artifact.sha256, artifact.size_bytes, block, experts)

    def _whole_block(
        self, checkpoint: Checkpoint, wanted: Wanted, index: dict[str, Any]
    ) -> Mapping[str, Tensor]:
        """The tensors of the whole block, from a file that was just compared with its hash.

        A share of a damaged file would have a valid hash of its own. Raises as ``_make``.
        """
        whole = replace(wanted, share=None)
        entry = index["artifacts"].get(whole.key(checkpoint.spec))
        if entry is not None and self._cut is not None and self._cut[0] == entry[0]:
            return self._cut[1]
        for _ in range(2):
            sha256 = self._obtain(checkpoint, whole, index).sha256
            if self.is_whole(sha256):
                path = self._artifacts / sha256
                self._cut = sha256, read_block(path, checkpoint.spec, wanted.block)[1]
                return self._cut[1]
        raise CheckpointError(f"{self._artifacts / sha256}: is damaged again: check the disk")

    def is_whole(self, sha256: str) -> bool:
        """Whether the file of this hash is here and undamaged. A damaged one is removed.

        It is hashed each time. Any thread may call it. Raises OSError.
        """
        path = self.path(sha256)
        if path is None:
            return False
        with contextlib.suppress(CheckpointError):  # An unreadable file is damaged too.
            if file_sha256(path) == sha256:
                return True
        log.warning("%s is damaged: it is removed", path)
        remove(path)
        return False

    def repair(self, sha256: str) -> None:
        """Make a missing or damaged file again, from its checkpoint or from what was kept.

        Any thread may call it. Raises ModelError, OSError, StorageFull, and MakingFailed if the
        checkpoint is not known or gives other bytes.
        """
        if self.is_whole(sha256):
            return
        kept = self._kept.get(sha256)
        if kept is not None:
            with self._making:
                self._write(sha256, kept)
            return
        source = self._sources.get(sha256)
        if source is None:
            raise MakingFailed("the coordinator's own file is damaged and was removed: load again")
        checkpoint, wanted = source
        with self._making:
            self._cut = None
            made = self._make(checkpoint, wanted, self._load(checkpoint))
            self._cut = None
        if made.sha256 != sha256:
            raise MakingFailed(
                "the coordinator's own file was damaged, and the checkpoint has changed since it "
                "was made: load again"
            )
        name = checkpoint.spec.block_name(wanted.block)
        log.warning("%s was damaged here and is made again from the checkpoint", name)

    def adopt(self, path: Path, keep: set[str]) -> tuple[str, int]:
        """Move a finished file here, and return its hash and size. The files ``keep`` stay.

        Raises CheckpointError, OSError, StorageFull.
        """
        sha256, size_bytes = file_sha256(path), path.stat().st_size
        self._make_room(size_bytes, keep)
        path.replace(self._artifacts / sha256)
        return sha256, size_bytes

    def place(self, sha256: str) -> Path:
        """Return where the file of a known hash is or would be."""
        return self._artifacts / sha256

    def keep(self, data: bytes) -> FileRef:
        """Have a file with these bytes here until the next checkpoint is quantized.

        Raises OSError, StorageFull.
        """
        ref = FileRef(hashlib.sha256(data).hexdigest(), len(data))
        if not (self._has(ref.sha256, len(data)) and self.is_whole(ref.sha256)):
            self._write(ref.sha256, data)
        self._in_use.add(ref.sha256)
        self._kept[ref.sha256] = data
        return ref

    def _write(self, sha256: str, data: bytes) -> None:
        self._make_room(len(data), set())
        replace_bytes(self.place(sha256), data)

    def begin(self, sha256: str, size_bytes: int, keep: set[str]) -> PartialFile:
        """Begin to receive a file, or go on where an earlier attempt was cut off.

        Raises OSError, StorageFull, and MakingFailed if the hash or size is impossible.
        """
        if not SHA256.fullmatch(sha256) or size_bytes <= 0:
            raise MakingFailed("a file has no valid address")
        self._make_room(size_bytes, {*keep, f"{sha256}.part"})
        return PartialFile(self._artifacts / sha256, size_bytes)

    def _make_room(self, size_bytes: int, keep: set[str]) -> None:
        """Delete the files used longest ago until ``size_bytes`` more fit.

        Files in use and those in ``keep`` stay. Raises StorageFull if they leave too little room.
        """
        sizes = {path: path.stat().st_size for path in self._artifacts.iterdir()}
        total = sum(sizes.values())
        limit_bytes = self._limit_bytes
        if limit_bytes is None:
            limit_bytes = int((total + shutil.disk_usage(self._artifacts).free) * (1 - FREE_SHARE))
        for path in by_use(sizes):
            if total + size_bytes <= limit_bytes:
                return
            if path.name not in keep and path.name not in self._in_use:
                remove(path)
                total -= sizes[path]
        if total + size_bytes > limit_bytes:
            raise StorageFull(
                f"the blocks need more than the {format_size(limit_bytes)} that the coordinator "
                f"may keep in {self._artifacts}: start it with a larger --storage"
            )

    def known(
        self, checkpoint: Checkpoint, formats: Iterable[Format]
    ) -> dict[tuple[int, int], str]:
        """The hashes of artifacts in these formats that were ever made, by (block, bits)."""
        index = self._load(checkpoint)["artifacts"]
        return {
            (block, fmt.bits): index[key][0]
            for fmt in formats
            for block in range(checkpoint.spec.block_count)
            if (key := f"{block}/{checkpoint.format_of(block, fmt).key}") in index
        }

    def weight_errors(
        self,
        checkpoint: Checkpoint,
        formats: Iterable[Format],
        on_step: OnStep,
        cancelled: Callable[[], bool],
    ) -> tuple[dict[int, float], ...]:
        """Call ``model.weight_errors``, which keeps its results here. Raises Cancelled, too."""

        def step(done: int, total: int) -> None:
            if cancelled():
                raise Cancelled
            on_step(done, total)

        return weight_errors(checkpoint, formats, self._state_dir, step)

    def _load(self, checkpoint: Checkpoint) -> dict[str, Any]:
        path = self._index_path(checkpoint)
        try:
            index: dict[str, Any] = read_json(path)
            entries = index["artifacts"].values()
            if index["version"] == INDEX_VERSION and all(map(_is_entry, entries)):
                return index
        except FileNotFoundError:
            return {"version": INDEX_VERSION, "artifacts": {}}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # An index that cannot be read is no more worth than a damaged one.
        log.warning("%s is damaged or of another version: blocks are made again", path)
        return {"version": INDEX_VERSION, "artifacts": {}}

    def _save(self, checkpoint: Checkpoint, index: dict[str, Any]) -> None:
        replace_text(self._index_path(checkpoint), json.dumps(index))

    def _index_path(self, checkpoint: Checkpoint) -> Path:
        return self._indices / f"{checkpoint.fingerprint}.json"


def _expert_hashes(spec: ModelSpec, block: int, path: Path) -> bytes:
    """Return the hashes of a whole block's experts. Empty if it has none that can be told apart."""
    experts = spec.layer(block).experts if spec.block_kind(block) == "layer" else None
    if experts is None:
        return b""
    try:
        return b"".join(expert_hashes(path, expert_parts(read_safetensors(path), experts.count)))
    except CheckpointError:
        return b""  # Files without them are only sent whole.
