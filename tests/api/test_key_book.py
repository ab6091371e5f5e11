"""The file of API keys, as other versions, hands and power cuts leave it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from api.key_book import FILE, BadKey, KeyBook

ALICE = {"name": "alice", "sha256": "0" * 64, "created_s": 1.0, "urgency": "bulk"}


def written(directory: Path, content: dict[str, Any]) -> KeyBook:
    (directory / FILE).write_text(json.dumps(content))
    return KeyBook(directory)


def test_a_file_of_an_older_version_is_read_and_keeps_its_keys(tmp_path: Path) -> None:
    older = {name: value for name, value in ALICE.items() if name != "urgency"}
    book = written(tmp_path, {"keys": [older]})
    book.create("bob")
    assert [(key.name, key.urgency) for key in book.listed()] == [("alice", ""), ("bob", "")]


@pytest.mark.parametrize(
    "newer", [{"version": 2, "keys": []}, {"keys": [ALICE | {"tokens_a_day": 1000}]}]
)
def test_a_file_of_a_newer_version_is_left_as_it_is(newer: dict[str, Any], tmp_path: Path) -> None:
    """This version would give a key without its limit, and write the file without it."""
    book = written(tmp_path, newer)
    with pytest.raises(BadKey, match=r"api-keys\.json was written by a newer version of shoal"):
        book.create("bob")
    assert book.known("anything") is None
    assert json.loads((tmp_path / FILE).read_text()) == newer


@pytest.mark.parametrize(
    "content",
    [
        "",
        "\0" * 300,
        "[]",
        '{"keys": ["alice"]}',
        json.dumps({"keys": [ALICE | {"created_s": 1e300}]}),
        json.dumps({"keys": [ALICE | {"urgency": "soon"}]}),
    ],
)
def test_a_damaged_file_is_named_at_the_start(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise the first client is told before the one who can mend it."""
    (tmp_path / FILE).write_text(content)
    KeyBook(tmp_path).make_local()
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith("no API key is accepted: ")
    assert "api-keys.json is damaged: remove it, and make the keys again" in said


def test_a_file_that_comes_back_from_a_backup_is_read_again(tmp_path: Path) -> None:
    book = KeyBook(tmp_path)
    key = book.create("alice")
    assert book.known(key) is not None
    (tmp_path / FILE).rename(tmp_path / "backup")
    (tmp_path / FILE).write_text("[]")
    assert book.known(key) is None
    (tmp_path / "backup").rename(tmp_path / FILE)  # With the time, size and inode that it had.
    assert book.known(key) is not None
