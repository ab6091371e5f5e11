"""A file is replaced whole, or stays as it was."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from model.durable import replace_text


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
