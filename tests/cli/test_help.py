"""Help texts of every command: plain sentences that fit a terminal, and an example to copy."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator

import pytest

from cli.main import _parser
from cli.parser import Parser
from tests.words import sentences, words

LONGEST_WORDS = 30
COLUMNS = 80


def commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """``parser`` and the parsers of all its sub-commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from commands(sub)


def texts(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    """Each text of a command's help with a name for it, as the user reads it."""
    formatter = parser.formatter_class(prog=parser.prog)
    for number, paragraph in enumerate((parser.description or "").split("\n\n")):
        yield f"description, paragraph {number}", paragraph
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from ((choice.dest, choice.help or "") for choice in action._choices_actions)
        elif action.help != argparse.SUPPRESS:
            yield name_of(action), formatter._expand_help(action) if action.help else ""


def name_of(action: argparse.Action) -> str:
    return "/".join(action.option_strings) or str(action.metavar or action.dest)


def silent_defaults(parser: argparse.ArgumentParser) -> list[str]:
    """The options that take a value and have a default, which their help does not name."""
    return [
        name_of(action)
        for action in parser._actions
        if action.nargs != 0 and action.help not in (None, argparse.SUPPRESS)
        if action.default not in (None, [], (), argparse.SUPPRESS)
        if "Default: " not in str(action.help)
    ]


def faults(text: str) -> list[str]:
    """What is wrong with one help text."""
    if not text:
        return ["is missing"]
    found = [
        f"has a sentence of {words(sentence)} words"
        for sentence in sentences(text)
        if words(sentence) > LONGEST_WORDS
    ]
    if not text.endswith("."):
        found.append("does not end with a full stop")
    if not (text[0].isupper() or text.startswith("`")):
        found.append("does not begin with a capital")
    if ";" in text:
        found.append("has a semicolon: make two sentences")
    return found


PARSERS = {parser.prog: parser for parser in commands(_parser())}


@pytest.mark.parametrize("command", PARSERS)
def test_help_is_made_of_short_whole_sentences(command: str) -> None:
    assert [
        f"{name}: {text!r} {fault}"
        for name, text in texts(PARSERS[command])
        for fault in faults(text)
    ] == []


@pytest.mark.parametrize("command", PARSERS)
def test_help_names_each_default(command: str) -> None:
    assert silent_defaults(PARSERS[command]) == []


@pytest.mark.parametrize("command", PARSERS)
def test_help_has_an_example_of_its_command(command: str) -> None:
    example = re.search(
        r"^examples:\n  (?:sudo )?(.*)", PARSERS[command].epilog or "", re.MULTILINE
    )
    assert example is not None
    assert re.sub(r"SHOAL_TOKEN=\S+ ", "", example[1]).startswith(command)


@pytest.mark.parametrize("command", PARSERS)
def test_help_fits_a_terminal(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    assert [
        line for line in PARSERS[command].format_help().splitlines() if len(line) > COLUMNS
    ] == []


def test_what_is_wrong_with_a_help_text_is_found() -> None:
    parser = Parser(prog="x", description="fine up to here")
    parser.add_argument("--a", help="One word " + "more " * LONGEST_WORDS + "is too much.")
    parser.add_argument("--b")
    parser.add_argument("--c", default=3, help="Takes N; default %(default)s")
    assert [(name, fault) for name, text in texts(parser) for fault in faults(text)] == [
        ("description, paragraph 0", "does not end with a full stop"),
        ("description, paragraph 0", "does not begin with a capital"),
        ("--a", f"has a sentence of {LONGEST_WORDS + 5} words"),
        ("--b", "is missing"),
        ("--c", "does not end with a full stop"),
        ("--c", "has a semicolon: make two sentences"),
    ]
    parser.add_argument("--d", default=3, help="Takes N.")
    assert silent_defaults(parser) == ["--c", "--d"]


def test_paragraphs_are_wrapped_and_examples_are_not() -> None:
    parser = Parser(prog="x", description="one\ntwo\n\nthree", epilog=f"examples:\n  {'a ' * 99}\n")
    shown = parser.format_help()
    assert "one two\n\nthree\n" in shown
    assert f"examples:\n  {'a ' * 99}" in shown
