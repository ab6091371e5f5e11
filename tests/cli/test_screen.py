"""What a terminal is shown of texts that others have written."""

from __future__ import annotations

import pytest
from rich.table import Table

from cli.render import Screen

HOSTILE = "a\x1b]52;c;ZXZpbA==\x07\x9b2Jb"
"""It would fill the clipboard, and clear the screen."""


def test_a_terminal_is_shown_no_control_characters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # To rich, a terminal.
    monkeypatch.delenv("NO_COLOR", raising=False)
    screen = Screen(json_output=False)
    assert screen.out.is_terminal
    screen.text(f"{HOSTILE}\n\té \N{ZERO WIDTH JOINER}\n")
    table = Table("[bold]heading[/]")
    table.add_row(HOSTILE)
    screen.out.print(table)
    screen.error(HOSTILE)
    screen.note(HOSTILE)
    out, err = capsys.readouterr()
    for shown in (out, err):
        assert "\x1b[" in shown  # The styles of our own.
        assert not any(code in shown for code in ("\x1b]", "\x07", "\x9b"))
        assert "]52;c;ZXZpbA==" in shown
    assert "é \N{ZERO WIDTH JOINER}\n" in out


def test_a_pipe_gets_an_answer_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    Screen(json_output=False).text(f"{HOSTILE}\n")
    assert "\x1b]52;c;ZXZpbA==" in capsys.readouterr().out
