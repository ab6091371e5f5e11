"""The manual is readable and true: short sentences, existing files and functions, working links."""

from __future__ import annotations

import ast
import re
import statistics

import pytest

from tests.words import PACKAGES, ROOT, lengths, package_lengths, pages, sentences

WORDS_ON_AVERAGE = 15.0
LONGEST = 35
DOCSTRING_WORDS_ON_AVERAGE = 15.0

PAGES = [str(path.relative_to(ROOT)) for path in pages()]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_short_sentences(page: str) -> None:
    found = lengths((ROOT / page).read_text(encoding="utf-8"))
    too_long = [text for count, text in found if count > LONGEST]
    assert not too_long
    assert statistics.fmean(count for count, _ in found) <= WORDS_ON_AVERAGE


@pytest.mark.parametrize("package", PACKAGES)
def test_docstrings_have_short_sentences(package: str) -> None:
    average = statistics.fmean(count for count, _ in package_lengths(package))
    assert average <= DOCSTRING_WORDS_ON_AVERAGE


def test_tables_code_and_headings_do_not_count() -> None:
    text = (
        "# Heading\n\nOne two. Three `four five`\nsix.\n\n    code code\n\n| a | b |\n\n- an item\n"
    )
    assert [count for count, _ in lengths(text)] == [2, 3, 2]


def test_a_sentence_ends_at_a_stop_and_not_within_a_number() -> None:
    assert sentences("It takes 2.5 s. `make` runs it! Done") == [
        "It takes 2.5 s.",
        "Code runs it!",
        "Done",
    ]


def defined(path: str) -> set[str]:
    """Names of a file's functions and classes; methods also as ``Class.method``."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {
                f"{node.name}.{item.name}"
                for item in node.body
                if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef))
            }
    return names


def test_the_tour_names_files_and_functions_that_exist() -> None:
    text = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    files = set(re.findall(r"`([\w/]+\.py)`", text))
    assert len(files) > 15
    known = set().union(*map(defined, files))
    threads = set(re.findall(r"^\| `(\w+)`", text, re.MULTILINE))
    others = defined("wire/messages.py") | threads | {"max_tokens", "Relay._busy"}
    for step in re.split(r"\n(?=\d+\. |- |\||#)", text):
        names = re.findall(r"`([^`]+)`", step)
        here = set().union(*(defined(name) for name in names if name in files))
        for name in names:
            if re.fullmatch(r"[A-Za-z_.]+", name) and name not in files | others:
                assert name in (here or known), f"{name}, in: {step}"


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_to_files_and_headings(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        name, _, heading = target.partition("#")
        other = (path.parent / name).resolve() if name else path
        assert other.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)", other.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}
            assert heading in anchors, target
