"""Loads with damaged files: when each is found, and what follows."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import pytest

from agent import integrity
from agent.blocks import CacheError
from agent.integrity import Contents, Watch, load_whole
from backends.base import BackendError, Stage


def write(path: Path, data: bytes) -> dict[Path, str]:
    path.write_bytes(data)
    return {path: hashlib.sha256(data).hexdigest()}


class Loaded:
    """A stage as far as loading knows it."""

    def __init__(self, kept_files: Mapping[Path, str]) -> None:
        self.kept_files = kept_files
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


def as_stage(loaded: Loaded) -> Stage:
    return cast("Stage", loaded)


@pytest.mark.parametrize("place", [0, 1, 999_999])
def test_one_bit_is_found(tmp_path: Path, place: int) -> None:
    path, data = tmp_path / "block", bytearray(os.urandom(1_000_000))
    files = write(path, bytes(data))
    contents = Contents()
    contents.expect(files)
    assert list(contents.find_damaged()) == []
    assert contents.hashed == {path}
    data[place] ^= 1
    path.write_bytes(data)
    contents = Contents()
    contents.expect(files)
    assert list(contents.find_damaged()) == [path]


def test_a_file_that_made_room_is_not_damaged(tmp_path: Path) -> None:
    contents = Contents()
    contents.expect(write(tmp_path / "block", b"data"))
    (tmp_path / "block").unlink()
    assert list(contents.find_damaged()) == []


def test_what_came_in_this_load_is_not_hashed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = Contents()
    contents.expect(write(tmp_path / "old", b"old") | write(tmp_path / "new", b"new"))
    contents.trust([tmp_path / "new"])
    monkeypatch.setattr(integrity, "CHECK_FIRST_BYTES", 2)
    assert contents.is_checked_later
    monkeypatch.setattr(integrity, "CHECK_FIRST_BYTES", 3)
    assert not contents.is_checked_later
    hashed: list[Path] = []
    hash_file = integrity._hash
    monkeypatch.setattr(
        integrity, "_hash", lambda path, stopped: hashed.append(path) or hash_file(path, stopped)
    )
    assert list(contents.find_damaged()) == []
    assert hashed == [tmp_path / "old"]


def test_a_load_that_fails_because_of_damage_is_repeated(tmp_path: Path) -> None:
    path, right = tmp_path / "block", b"right"
    files = write(path, right)
    path.write_bytes(b"wrong")
    contents, stage = Contents(), Loaded({})

    def fetch() -> None:
        contents.expect(files)
        if not path.exists():
            path.write_bytes(right)
            contents.trust([path])

    def load() -> Stage:
        if path.read_bytes() != right:
            raise BackendError("not a block")
        return as_stage(stage)

    assert load_whole(contents, fetch, load, Path.unlink) is as_stage(stage)
    assert contents.damaged_files == 1


def test_a_load_that_fails_for_another_reason_says_so(tmp_path: Path) -> None:
    contents = Contents()
    files = write(tmp_path / "block", b"right")

    def load() -> Stage:
        raise BackendError("too large")

    with pytest.raises(BackendError, match="too large"):
        load_whole(contents, lambda: contents.expect(files), load, Path.unlink)


def test_blocks_and_then_prepared_weights_are_replaced(tmp_path: Path) -> None:
    block, prepared = tmp_path / "block", tmp_path / "weights"
    files, kept = write(block, b"right"), write(prepared, b"made")
    block.write_bytes(b"wrong")
    prepared.write_bytes(b"rot!")
    contents, stages = Contents(), list[Loaded]()

    def fetch() -> None:
        contents.expect(files)
        if not block.exists():
            contents.trust(write(block, b"right"))

    def load() -> Stage:
        if block.read_bytes() != b"right":
            raise BackendError("not a block")
        stages.append(Loaded(dict(kept) if prepared.exists() else {}))
        return as_stage(stages[-1])

    load_whole(contents, fetch, load, Path.unlink)
    assert contents.damaged_files == 2
    assert [stage.is_closed for stage in stages] == [True, False]


def test_a_disk_that_damages_what_is_written_is_named(tmp_path: Path) -> None:
    files = write(tmp_path / "block", b"right")
    contents = Contents()

    def fetch() -> None:
        contents.expect(files)
        (tmp_path / "block").write_bytes(b"wrong")

    with pytest.raises(CacheError, match="disk or memory fails"):
        load_whole(contents, fetch, lambda: as_stage(Loaded({})), Path.unlink)


def test_a_watch_tells_of_the_first_damaged_file(tmp_path: Path) -> None:
    contents, found = Contents(), list[Path]()
    contents.expect(write(tmp_path / "whole", b"whole"))
    damaged = write(tmp_path / "damaged", b"right")
    (tmp_path / "damaged").write_bytes(b"wrong")
    contents.expect(damaged)
    told = threading.Event()

    def tell(path: Path) -> None:
        found.append(path)
        told.set()

    watch = Watch(contents, tell)
    assert told.wait(60)
    watch.close()
    assert found == [tmp_path / "damaged"]


def test_a_watch_that_is_closed_tells_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents, hashing = Contents(), threading.Event()
    contents.expect(write(tmp_path / "block", b"right"))
    (tmp_path / "block").write_bytes(b"wrong")
    hash_file = integrity._hash

    def hash_until_stopped(path: Path, stopped: object) -> str | None:
        hashing.set()
        assert callable(stopped)
        while not stopped():
            threading.Event().wait(0.001)
        return hash_file(path, lambda: True)

    monkeypatch.setattr(integrity, "_hash", hash_until_stopped)
    watch = Watch(contents, lambda path: pytest.fail(f"{path} was reported"))
    assert hashing.wait(60)
    watch.close()
