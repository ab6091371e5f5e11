"""Results that outlive the program that made them."""

from __future__ import annotations

from pathlib import Path

import pytest

from evaluation.errors import EvaluationError
from evaluation.kept import Kept

SETTINGS = {"model": "m", "data": "d"}


def test_results_are_there_again(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with Kept(path, SETTINGS) as kept:
        kept.put("4 bits", "answer", 3, {"answer": "caf\u00e9\u2028"})
    with Kept(path, SETTINGS) as kept:
        assert kept.get("4 bits", "answer", 3) == {"answer": "caf\u00e9\u2028"}
        assert kept.get("4 bits", "answer", 4) is None
        kept.put("4 bits", "answer", 4, {"answer": None})
    with Kept(path, SETTINGS) as kept:
        assert len(kept) == 2


def test_a_line_that_was_cut_off_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with Kept(path, SETTINGS) as kept:
        kept.put("r", "answer", 1, {"answer": "x"})
        kept.put("r", "answer", 2, {"answer": "y"})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with Kept(path, SETTINGS) as kept:
            for item, answer in ((1, "x"), (2, "y")):
                if kept.get("r", "answer", item) is None:
                    kept.put("r", "answer", item, {"answer": answer})
        assert path.read_bytes() == whole


def test_results_of_something_else_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with Kept(path, SETTINGS):
        pass
    with pytest.raises(EvaluationError, match=r"another data \('d'\)"):
        Kept(path, {**SETTINGS, "data": "e"})


@pytest.mark.parametrize(
    "content", [b"my thesis", b"my\nthesis\n", b'{"a": 1}\n', b"[1]\n", b"\xff\n"]
)
def test_another_file_is_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(content)
    with pytest.raises(EvaluationError, match="not a file of `shoal eval`"):
        Kept(path, SETTINGS)
    assert path.read_bytes() == content


@pytest.mark.parametrize("line", [b"x\n", b'{"run": 1, "kind": "a", "item": 1}\n', b"{}\n"])
def test_a_foreign_line_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "out.jsonl"
    with Kept(path, SETTINGS):
        pass
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(EvaluationError, match=r"out\.jsonl:2: not a result"):
        Kept(path, SETTINGS)


def test_two_evaluations_do_not_write_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with Kept(path, SETTINGS), pytest.raises(EvaluationError, match="another `shoal eval` writes"):
        Kept(path, SETTINGS)
    with Kept(path, SETTINGS):
        pass
