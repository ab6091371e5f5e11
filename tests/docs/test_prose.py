"""The prose in the code is readable: docstrings, comments and messages of errors."""

from __future__ import annotations

import statistics

import pytest

from tests.words import (
    PROSE,
    ROOT,
    Prose,
    comments,
    docstrings,
    lengths,
    messages,
    package_lengths,
)

WORDS_ON_AVERAGE = 15.0
LONGEST = 35
NOT_A_SUBJECT = {"What", "Whatever", "Who", "Whoever", "Whose", "Those", "Of", "By"}
"""A docstring that begins with one of these describes its subject instead of naming it."""

COVERED = [
    *("model", "wire", "backends", "calibration", "agent", "paper"),
    *("coordinator", "api", "planning", "testbed", "evaluation", "compression", "studies", "cli"),
    *("benchmarks", "examples"),
]


@pytest.mark.parametrize("prose", PROSE)
@pytest.mark.parametrize("package", COVERED)
def test_prose_has_short_sentences(package: str, prose: Prose) -> None:
    found = package_lengths(package, prose)
    assert [text for count, text in found if count > LONGEST] == []
    assert statistics.fmean(count for count, _ in found) <= WORDS_ON_AVERAGE


@pytest.mark.parametrize("package", COVERED)
def test_docstrings_begin_with_their_subject(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {text.splitlines()[0]}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for text in docstrings(path.read_text(encoding="utf-8"))
        if text.split()[0] in NOT_A_SUBJECT
    ]
    assert wrong == []


def counts(prose: Prose, source: str) -> list[int]:
    """Words of each sentence that is found in a source."""
    return [count for text in prose(source) for count, _ in lengths(text)]


def test_all_docstrings_count_and_fields_are_apart() -> None:
    source = '''"""One two."""
CAP = 1
"""One two three.

    code is left out
"""
class C:
    """One.

    rows: one two
        three
    ``bits``: one
    """
    def f(self):
        """One two. Three."""
        return "not a docstring"
'''
    assert sorted(counts(docstrings, source)) == [1, 1, 2, 2, 2, 3, 4]


def test_lines_of_a_comment_are_one_text() -> None:
    source = """
# One two
# three. Four.
x = 1  # five six
y = "# a string"  # [n, d]
z = 1  # noqa: S101 - seven eight nine
# ten
"""
    assert counts(comments, source) == [3, 1, 2, 3, 1]


def test_a_value_in_a_message_is_one_word() -> None:
    source = """
raise ValueError(f"{path}: one two "
                 "three. Four", 5)
raise Other("one")
"""
    assert counts(messages, source) == [4, 1, 1]
