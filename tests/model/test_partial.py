"""A transfer that is cut off goes on where it stopped, and damage is never kept."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from model.partial import PartialFile

CONTENT = bytes(range(256)) * 40
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def test_a_transfer_goes_on_where_it_stopped(tmp_path: Path) -> None:
    target = tmp_path / SHA256
    with PartialFile(target, len(CONTENT)) as first:
        first.write(CONTENT[:1000])
    with PartialFile(target, len(CONTENT)) as second:
        assert second.offset == 1000
        second.write(memoryview(CONTENT)[1000:])
        assert second.complete
        assert second.finish()
    assert [path.name for path in tmp_path.iterdir()] == [SHA256]
    assert target.read_bytes() == CONTENT


def test_a_dropped_transfer_begins_again(tmp_path: Path) -> None:
    target = tmp_path / SHA256
    with PartialFile(target, len(CONTENT)) as arriving:
        arriving.write(b"of another file")
        arriving.drop()
        assert arriving.offset == 0
        arriving.write(CONTENT)
        assert arriving.finish()
    assert target.read_bytes() == CONTENT


def test_another_hash_and_what_is_too_long_are_not_kept(tmp_path: Path) -> None:
    target = tmp_path / SHA256
    with PartialFile(target, 5) as wrong:
        wrong.write(b"wrong")
        assert not wrong.finish()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / f"{SHA256}.part").write_bytes(CONTENT + b"!")
    with PartialFile(target, len(CONTENT)) as again:
        assert again.offset == 0


@pytest.mark.parametrize(
    ("offset", "total", "count", "fits"),
    [
        (2, 5, 3, True),
        (2, 5, 1, True),
        (0, 5, 3, False),
        (2, 6, 3, False),
        (2, 5, 0, False),
        (2, 5, 4, False),
    ],
)
def test_only_what_comes_next_fits(
    tmp_path: Path, offset: int, total: int, count: int, fits: bool
) -> None:
    with PartialFile(tmp_path / SHA256, 5) as partial:
        partial.write(b"ab")
        assert partial.fits(offset, total, count) is fits
