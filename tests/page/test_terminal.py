"""``shoal chat``, ``shoal run`` without a prompt and ``shoal top``, on a terminal."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.page.shoals import GivenShoal
from tests.system.cluster import COMMAND, ROOT
from tests.system.cluster import shoal as run_shoal

WAIT_S = 60.0


class Terminal:
    """A command on a terminal of its own, 100 columns wide."""

    def __init__(self, *arguments: str) -> None:
        self._ours, theirs = pty.openpty()
        environment = {**os.environ, "COLUMNS": "100", "LINES": "40", "TERM": "xterm"}
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: _own_terminal(theirs),
        )
        os.close(theirs)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def until(self, text: str) -> str:
        """Wait until ``text`` is shown after what was waited for before. Returns all up to it."""
        deadline = time.monotonic() + WAIT_S
        while text not in self.shown:
            assert time.monotonic() < deadline, f"{text!r} was not shown, but {self.shown!r}"
            if select.select([self._ours], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):  # The command has ended.
                    self.shown += os.read(self._ours, 1 << 16).decode(errors="replace")
            assert self.process.poll() is None or text in self.shown, self.shown
        before, _, self.shown = self.shown.partition(text)
        return before + text

    def ends(self) -> int:
        return self.process.wait(WAIT_S)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._ours)


def _own_terminal(descriptor: int) -> None:
    """Make the terminal the one whose Ctrl-C reaches the process."""
    import fcntl
    import termios

    fcntl.ioctl(descriptor, termios.TIOCSCTTY, 0)


@pytest.fixture
def shoal(tmp_path: Path) -> Iterator[GivenShoal]:
    with GivenShoal(tmp_path).serving() as given:
        yield given


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def open_terminal(*arguments: str) -> Terminal:
        opened.append(Terminal(*arguments))
        return opened[-1]

    yield open_terminal
    for one in opened:
        one.close()


def test_a_chat_remembers_what_was_said(
    shoal: GivenShoal, terminal: Callable[..., Terminal]
) -> None:
    shoal.pieces = ({"reasoning_content": "hm"}, "in the ", "attic")
    chat = terminal("chat", f"--url={shoal.url}")
    chat.until("Ctrl-D ends the chat")
    chat.until(">>> ")
    chat.type("Where is the lamp?\r")
    assert "hm" in chat.until("in the attic")
    chat.until("12.5 tokens/s")
    chat.type("/set temperature 0.5\r/set heat 3\r")
    chat.until("no setting 'heat'")
    chat.type("/system Be brief.\r")
    chat.until("system prompt is set")
    chat.type('"""Sure?\rReally?"""\r')
    chat.until("in the attic")
    chat.until(">>> ")
    chat.type("\x04")
    assert chat.ends() == 0
    first, second = shoal.asked
    assert first["messages"] == [{"role": "user", "content": "Where is the lamp?"}]
    assert [(one["role"], one["content"]) for one in second["messages"]] == [
        ("system", "Be brief."),
        ("user", "Where is the lamp?"),
        ("assistant", "in the attic"),
        ("user", "Sure?\nReally?"),
    ]
    assert second["temperature"] == 0.5


def test_a_model_without_a_memory_gets_each_message_alone(
    shoal: GivenShoal, terminal: Callable[..., Terminal]
) -> None:
    shoal.remembers, shoal.pieces = False, ("yes",)
    chat = terminal("chat", f"--url={shoal.url}")
    for question, told in (("One?", "yes"), ("Two?", "gets each message alone"), ("Three?", "yes")):
        chat.until(">>> ")
        chat.type(f"{question}\r")
        chat.until(told)
    chat.until(">>> ")
    chat.type("\x04")
    assert chat.ends() == 0
    alone = [[one["content"] for one in asked["messages"]] for asked in shoal.asked]
    assert alone == [["One?"], ["One?", "yes", "Two?"], ["Two?"], ["Three?"]]


def test_ctrl_c_stops_the_answer_and_not_the_chat(
    shoal: GivenShoal, terminal: Callable[..., Terminal]
) -> None:
    shoal.pieces = ("the beginning",)
    shoal.hold.clear()
    chat = terminal("run", "llama-3.2-1b", f"--url={shoal.url}", "--temperature=0.2")
    chat.until(">>> ")
    chat.type("Tell me more\r")
    chat.until("the beginning")
    chat.type("\x03")
    chat.until("(stopped)")
    chat.until(">>> ")
    shoal.hold.set()
    chat.type("half a line\x03")
    chat.until(">>> ")
    chat.type("/bye\r")
    assert chat.ends() == 0
    assert [one["temperature"] for one in shoal.asked] == [0.2]


def test_a_refused_message_is_taken_back(
    shoal: GivenShoal, terminal: Callable[..., Terminal]
) -> None:
    chat = terminal("chat", f"--url={shoal.url}")
    chat.until(">>> ")
    shoal.key = "needed from now on"
    chat.type("Hello\r")
    chat.until("an API key is needed")
    chat.until(">>> ")
    shoal.key = ""
    shoal.pieces = ("yes",)
    chat.type("Again\r")
    chat.until("yes")
    chat.until(">>> ")
    chat.process.send_signal(signal.SIGTERM)
    assert chat.ends() == 128 + signal.SIGTERM
    assert shoal.asked[-1]["messages"] == [{"role": "user", "content": "Again"}]


def test_without_a_terminal_a_prompt_is_needed(shoal: GivenShoal) -> None:
    for command in (("run", "llama-3.2-1b"), ("chat",)):
        ended = run_shoal(*command, f"--url={shoal.url}")
        assert ended.returncode == 2
        assert "on a terminal" in ended.stderr


def test_top_follows_the_shoal_over_a_restart(
    shoal: GivenShoal, terminal: Callable[..., Terminal]
) -> None:
    top = terminal("top", f"--url={shoal.url}")
    top.until("kitchen-pi")
    top.until("77")
    top.until("old-laptop")
    shoal.given["events"] = [{**shoal.given["events"][0], "subject": "newest-pi"}]
    top.until("newest-pi")
    shoal.close()
    top.until("trying again")
    shoal.reopen()
    shoal.given["models"] = []
    top.until("no model is loaded")
    top.type("\x03")
    assert top.ends() == 0


def test_top_without_a_terminal_prints_once(shoal: GivenShoal) -> None:
    shown = run_shoal("top", f"--url={shoal.url}").stdout
    for text in ("llama-3.2-1b: ready", "69.", "1.40", "1.60", "answering", "it was silent"):
        assert text in shown
