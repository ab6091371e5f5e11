"""Files of unknown origin are read up to a size."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.bounded import read_bytes, read_json


def test_a_file_that_never_ends_is_read_up_to_the_bound() -> None:
    with pytest.raises(ValueError, match="larger than 1 MiB"):
        read_bytes(Path("/dev/zero"), 1 << 20)


def test_a_file_of_exactly_the_bound_is_read(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    path.write_bytes(b'{"a": [1, 2]}')
    assert read_json(path, path.stat().st_size) == {"a": [1, 2]}
    with pytest.raises(ValueError, match=r"^larger than"):
        read_json(path, path.stat().st_size - 1)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 200_000])
def test_what_is_no_json_is_one_error_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "value.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^not valid JSON: .+$"):
        read_json(path)


def test_an_absent_file_is_the_systems_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "absent.json")
