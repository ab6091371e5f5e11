"""``shoal chat``, and ``shoal run MODEL`` without a prompt: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from cli.client import Client, Refused
from cli.errors import CommandFailed, UsageError
from cli.render import Screen
from cli.service.signals import Terminated

ABOUT = (
    "Each line is a message, and the model sees the whole conversation. Ctrl-C stops an answer. "
    "Ctrl-D or /bye ends the chat, and /help lists what else can be typed."
)
EXAMPLES = (
    "  shoal chat                   # with the loaded model\n"
    "  shoal chat Qwen/Qwen3-0.6B   # loaded first, if it is not\n"
)
HELP = """\
/system TEXT      begin the conversation with TEXT as its system prompt
/set NAME VALUE   set temperature, top_p, top_k, max_tokens or seed for the next answers
/unset NAME       leave it to the model again
/show             show the settings, and how long the conversation is
/again            answer the last message again
/clear            forget the conversation
/bye              end the chat, as Ctrl-D does
\"\"\"               begins and ends a message of several lines
"""
SETTINGS: dict[str, Callable[[str], float]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "max_tokens": int,
    "seed": int,
}
NO_PLACE = "template_has_no_place"
"""The coordinator's code for messages that the model's chat template leaves out."""

ALONE = "the model's template has no place for earlier messages: it gets each message alone"
PROMPT, MORE = ">>> ", "... "
FENCE = '"""'


@dataclass(slots=True)
class Conversation:
    """The messages so far, and the settings of the next answer."""

    model: str
    settings: dict[str, float] = field(default_factory=dict)
    system: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)
    alone: bool = False
    """Whether the model gets the last message alone, since its template takes no others."""

    def request(self) -> dict[str, Any]:
        """The body of the request for the next answer."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return {
            "model": self.model,
            "messages": [*system, *(self.messages[-1:] if self.alone else self.messages)],
            "stream": True,
            "return_token_ids": True,
            **self.settings,
        }


def require_terminal() -> None:
    """Raise UsageError if there is nobody to chat with."""
    if not sys.stdin.isatty():
        raise UsageError(
            "a chat is held on a terminal: without one, `shoal run MODEL PROMPT` answers"
        )


def chat(client: Client, screen: Screen, conversation: Conversation) -> None:
    """Read messages and show answers, until the user ends the chat. Raises CommandFailed."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() editing and history
    screen.note(f"{conversation.model}: /help lists commands, Ctrl-D ends the chat")
    while True:
        try:
            message = _read(screen)
            if message is None:
                return
            if message.startswith("/"):
                if not _command(client, screen, conversation, message):
                    return
            elif message:
                conversation.messages.append({"role": "user", "content": message})
                _answer(client, screen, conversation)
        except Terminated:
            raise
        except KeyboardInterrupt:  # It gives up a half-typed line.
            screen.text("\n")


def _read(screen: Screen) -> str | None:
    """The next message. None: the user ends the chat."""
    try:
        line = input(PROMPT).strip()
        if not line.startswith(FENCE):
            return line
        lines = [line.removeprefix(FENCE)]
        while not lines[-1].rstrip().endswith(FENCE):
            lines.append(input(MORE))
        return "\n".join(lines).rstrip().removesuffix(FENCE).strip()
    except EOFError:
        screen.text("\n")
        return None


def _command(client: Client, screen: Screen, conversation: Conversation, line: str) -> bool:
    """Carry out a line that begins with a slash. Returns whether the chat goes on."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name in ("/bye", "/exit", "/quit"):
        return False
    if name == "/clear":
        conversation.messages.clear()
        screen.note("the conversation is forgotten")
    elif name == "/system":
        conversation.system = rest
        screen.note("the system prompt is set" if rest else "there is no system prompt")
    elif name == "/set":
        _set(screen, conversation, *rest.partition(" ")[::2])
    elif name == "/unset":
        conversation.settings.pop(rest, None)
        screen.note(f"{rest or 'nothing'} is left to the model")
    elif name == "/show":
        _show(screen, conversation)
    elif name == "/again":
        while conversation.messages and conversation.messages[-1]["role"] != "user":
            conversation.messages.pop()
        if conversation.messages:
            _answer(client, screen, conversation)
    else:
        screen.text(HELP)
    return True


def _set(screen: Screen, conversation: Conversation, name: str, value: str) -> None:
    read = SETTINGS.get(name)
    if read is None:
        screen.error(f"there is no setting {name!r}: set {', '.join(SETTINGS)}")
        return
    try:
        conversation.settings[name] = read(value)
    except ValueError:
        screen.error(f"{name}: {value!r} is not a number")


def _show(screen: Screen, conversation: Conversation) -> None:
    settings = [f"{name} {value:g}" for name, value in conversation.settings.items()]
    screen.note(f"settings: {', '.join(settings) or 'all left to the model'}")
    screen.note(f"system prompt: {conversation.system or 'none'}")
    screen.note(f"messages so far: {len(conversation.messages)}")


def _answer(client: Client, screen: Screen, conversation: Conversation) -> None:
    """Show the answer as it arrives, and keep it. A refused message is taken back."""
    text, shown = "", _Shown(screen)
    began_s = time.monotonic()
    first_s: float | None = None
    details: Mapping[str, Any] = {}
    try:
        events = client.stream("/v1/chat/completions", conversation.request(), screen.note)
        with closing(events):
            for event in events:
                details = event.get("shoal", details)
                for choice in event["choices"]:
                    delta = choice["delta"]
                    thought, piece = delta.get("reasoning_content"), delta.get("content")
                    if (thought or piece) and first_s is None:
                        first_s = time.monotonic() - began_s
                    shown.thought(thought or "")
                    shown.answer(piece or "")
                    text += piece or ""
    except Terminated:
        raise
    except KeyboardInterrupt:
        shown.end("(stopped)")
    except CommandFailed as error:
        if _is_no_place(error) and len(conversation.messages) > 1 and not conversation.alone:
            conversation.alone = True
            screen.note(ALONE)
            _answer(client, screen, conversation)
            return
        shown.end("")
        screen.error(str(error))
        if not text:
            conversation.messages.pop()
            return
    else:
        shown.end("")
    conversation.messages.append({"role": "assistant", "content": text})
    _figures(screen, details, first_s)


def _is_no_place(error: CommandFailed) -> bool:
    return isinstance(error, Refused) and error.code == NO_PLACE


class _Shown:
    """The answer on the screen: the model's thoughts dim, then what it says."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._thinks = False

    def thought(self, text: str) -> None:
        if text:
            self._thinks = True
            self._screen.out.print(text, end="", markup=False, emoji=False, style="dim")

    def answer(self, text: str) -> None:
        if text and self._thinks:
            self._thinks = False
            self._screen.text("\n\n")
        if text:
            self._screen.text(text)

    def end(self, text: str) -> None:
        self._screen.text(f" {text}\n" if text else "\n")


def _figures(screen: Screen, details: Mapping[str, Any], first_s: float | None) -> None:
    """Print what was measured of an answer."""
    parts = []
    if "tokens" in details:
        parts.append(f"{len(details['tokens'])} tokens")
    if first_s is not None:
        parts.append(f"the first after {first_s * 1e3:.0f} ms")
    if details.get("decode_tokens_per_s"):
        parts.append(f"{details['decode_tokens_per_s']:.1f} tokens/s")
    if parts:
        screen.note(", ".join(parts))
