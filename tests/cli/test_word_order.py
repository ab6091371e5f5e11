"""Words and options of a command in any order."""

from __future__ import annotations

import argparse

import pytest

from cli.main import _parser, main
from tests.cli.test_help import PARSERS


@pytest.mark.parametrize(
    "words",
    [
        ["tiny-opt", "Where is it?", "--chat", "--temperature", "0"],
        ["tiny-opt", "--chat", "--temperature", "0", "Where is it?"],
        ["--chat", "tiny-opt", "--temperature=0", "Where is it?"],
        ["--chat", "--temperature=0", "tiny-opt", "Where is it?"],
    ],
)
def test_a_prompt_stands_before_or_behind_options(words: list[str]) -> None:
    options = _parser("run").parse_args(["run", *words])
    assert (options.model, options.prompt) == ("tiny-opt", "Where is it?")
    assert options.chat


@pytest.mark.parametrize("rest", [["one", "two"], ["--caht"], ["one", "--caht"]])
def test_words_too_many_are_still_refused(
    rest: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        _parser("run").parse_args(["run", "tiny-opt", "--chat", *rest])
    assert "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["agent", "--cache-dir", "/x"], ["--cache-dir", "/x", "agent"]])
def test_an_unknown_option_is_named_and_not_its_value(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert "unrecognized arguments: --cache-dir" in capsys.readouterr().err


@pytest.mark.parametrize("command", PARSERS)
def test_an_option_before_an_action_keeps_its_value(command: str) -> None:
    """argparse copies all values of the action's parser, also its defaults, over those before."""
    own = {name: one for one in PARSERS[command]._actions for name in one.option_strings}
    lost = [
        f"{sub.prog} {name}"
        for action in PARSERS[command]._actions
        if isinstance(action, argparse._SubParsersAction)
        for sub in action.choices.values()
        for one in sub._actions
        for name in one.option_strings
        if name in own and own[name].dest == one.dest and one.default is not argparse.SUPPRESS
    ]
    assert lost == []
