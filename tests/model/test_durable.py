"""A file is replaced whole, or stays as it was."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from model.durable import locked, replace_text


def test_a_file_is_replaced_with_its_mode_and_nothing_stays_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    replace_text(path, "old")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    replace_text(path, "new \N{SNOWMAN}", mode=0o644)
    assert path.read_text(encoding="utf-8") == "new \N{SNOWMAN}"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    replace_text(path, "old")

    def refuse(descriptor: int) -> None:
        raise PermissionError

    with pytest.raises(PermissionError):
        replace_text(path, "new", prepare=refuse)
    with pytest.raises(UnicodeEncodeError):
        replace_text(path, "\ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_lock_that_is_a_link_is_refused(tmp_path: Path) -> None:
    """Root locks files in the directory of a service, which may have been taken over."""
    precious, lock = tmp_path / "precious", tmp_path / "x.lock"
    lock.symlink_to(precious)
    with pytest.raises(OSError, match="symbolic links"), locked(lock):
        pass
    assert not precious.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_new_lock_belongs_to_the_owner_of_its_directory(tmp_path: Path) -> None:
    os.chown(tmp_path, 12345, 23456)
    (tmp_path / "old.lock").touch()
    for name in ("old.lock", "new.lock"):
        with locked(tmp_path / name):
            pass
    assert (tmp_path / "new.lock").stat().st_uid == 12345
    assert (tmp_path / "old.lock").stat().st_uid == 0  # It is not root's to give away.
