"""The messages of a chat, as a chat template takes them.

Nothing inside of a message is dropped in silence: a field that the template does not read is an
error that names it. Only what says nothing new may be left unread, such as the ids of calls.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from api.formats import mistral
from api.formats.json_call import read_object
from api.formats.tool_format import ToolFormat
from api.openai.fields import SAYS_NOTHING, only
from model.template_values import WatchedMessage
from planning.errors import RequestInvalid

_OF_TEXT = ("type", "text", "cache_control", "id", "index", "annotations")
"""The fields of a part. Prompts are kept without the hint, and clients give back the last three."""

_ONE_CALL_EACH = ("llama", "harmony")
"""The formats whose templates take a single call in a message."""


@dataclass(frozen=True, slots=True)
class TemplateTraits:
    """The text of a chat template tells which messages it takes."""

    format: ToolFormat
    text: str

    def takes(self, field: str) -> bool:
        return field in self.text


def read_messages(value: Any, traits: TemplateTraits) -> list[WatchedMessage]:
    """Check messages in OpenAI's form. Raises RequestInvalid that names the place."""
    if not isinstance(value, list) or not value:
        raise RequestInvalid("messages: expected a list with at least one message", "messages")
    found: list[dict[str, Any]] = []
    calls: dict[str, str] = {}
    for number, message in enumerate(value):
        place = f"messages[{number}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RequestInvalid(f"{place}: each of the messages needs a role", "messages")
        read = _message(message, place)
        if read["role"] == "tool":
            _check_result(read, calls, place)
        else:
            calls = {call["id"]: call["function"]["name"] for call in read.get("tool_calls", ())}
        found.append(_fitted(read, traits))
    ordered = _in_order_of_calls(found)
    if traits.format.name in _ONE_CALL_EACH:
        ordered = _one_call_each(ordered)
    return [WatchedMessage(message, _may_ignore(message, traits)) for message in ordered]


def with_texts_apart(
    messages: Sequence[WatchedMessage], unused: Sequence[str]
) -> list[WatchedMessage] | None:
    """Divide the messages whose text the template leaves out beside calls into text and calls.

    unused: the fields that the template left out. Returns None if they include others.
    """
    apart: list[WatchedMessage] = []
    left = set(unused)
    for number, message in enumerate(messages):
        fresh = message.again()
        if f"messages[{number}].content" in left and "tool_calls" in fresh:
            left.remove(f"messages[{number}].content")
            apart.append(message.again(without=("tool_calls",)))
            fresh = message.again(without=("content", "reasoning_content"), content="")
        apart.append(fresh)
    return None if left else apart


def _message(message: Mapping[str, Any], place: str) -> dict[str, Any]:
    role = message["role"]
    read = {"role": role, "content": _content(message.get("content"), place)}
    calls = message.get("tool_calls")
    if calls not in SAYS_NOTHING:
        if role != "assistant":
            raise _wrong(f"{place}.tool_calls: only the assistant calls tools")
        if not isinstance(calls, list):
            raise _wrong(f"{place}.tool_calls: expected a list")
        read["tool_calls"] = _calls(calls, f"{place}.tool_calls")
    elif message.get("content") is None and role != "assistant":
        raise _wrong(f"{place}: it needs content")
    # `reasoning` is the name that vLLM and OpenRouter give to it.
    both = [message.get(name) for name in ("reasoning_content", "reasoning")]
    thoughts = next((value for value in both if value not in SAYS_NOTHING), None)
    if any(value not in (thoughts, *SAYS_NOTHING) for value in both):
        raise _wrong(f"{place}.reasoning: reasoning_content says something else: leave one out")
    if thoughts not in SAYS_NOTHING:
        if not isinstance(thoughts, str):
            raise _wrong(f"{place}.reasoning_content: expected text")
        read["reasoning_content"] = thoughts
    done = {"role", "content", "tool_calls", "reasoning_content", "reasoning"}
    for name, field in message.items():
        if name not in done and field not in SAYS_NOTHING:
            read[name] = field
    return read


def _content(content: Any, place: str) -> str:
    """Return the text of a message. Parts of text are joined."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _wrong(f"{place}.content: expected text, or a list of parts of text")
    return "".join(_part(part, f"{place}.content[{number}]") for number, part in enumerate(content))


def _part(part: Any, place: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        only(part, _OF_TEXT, place, "messages")
        text: str = part["text"]
        return text
    kind = part.get("type") if isinstance(part, dict) else None
    instead = f", not {str(kind)[:40]!r}" if kind not in (None, "text") else ""
    raise _wrong(f"{place}: only text content is supported{instead}")


def _calls(calls: list[Any], place: str) -> list[dict[str, Any]]:
    """Read the calls of a message. Of two with one id, nobody could tell whose a result is."""
    found: dict[str, dict[str, Any]] = {}
    for number, call in enumerate(calls):
        read = _call(call, f"{place}[{number}]")
        if read["id"] in found:
            raise _wrong(f"{place}[{number}].id: {read['id'][:60]!r} is the id of an earlier call")
        found[read["id"]] = read
    return list(found.values())


def _call(call: Any, place: str) -> dict[str, Any]:
    """Read a call of a tool. Its arguments become an object, as templates expect."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or call.get("type", "function") != "function":
        raise _wrong(f"{place}: expected a call of the type function, with a function")
    # Clients give back the `index` that a call had in a stream.
    only(call, ("id", "type", "function", "index"), place, "messages")
    only(function, ("name", "arguments"), f"{place}.function", "messages")
    name, arguments, call_id = function.get("name"), function.get("arguments"), call.get("id")
    if not isinstance(name, str) or not name:
        raise _wrong(f"{place}.function.name: expected text")
    if not isinstance(call_id, str) or not call_id:
        raise _wrong(f"{place}.id: expected text")
    if arguments is None or arguments == "":
        arguments = {}
    if isinstance(arguments, str):
        # A model may have written broken JSON. The template then shows that text.
        found = read_object(arguments)
        arguments = arguments if found is None else found
    elif not isinstance(arguments, dict):
        raise _wrong(f"{place}.function.arguments: expected JSON as text")
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _check_result(message: dict[str, Any], calls: Mapping[str, str], place: str) -> None:
    """Check that a tool's result belongs to a call before it, and add the tool's name."""
    call_id = message.get("tool_call_id")
    if not isinstance(call_id, str) or call_id not in calls:
        raise _wrong(
            f"{place}.tool_call_id: {str(call_id)[:60]!r} is no call of the assistant's message "
            "before it"
        )
    name = message.setdefault("name", calls[call_id])
    if name != calls[call_id]:
        raise _wrong(f"{place}.name: the call {call_id!r} is of {calls[call_id]!r}")


def _fitted(message: dict[str, Any], traits: TemplateTraits) -> dict[str, Any]:
    """Put a message into the form that the template takes."""
    if traits.format.name.startswith("mistral"):
        for call in message.get("tool_calls", ()):
            call["id"] = mistral.fitting_id(call["id"])
        if "tool_call_id" in message:
            message["tool_call_id"] = mistral.fitting_id(message["tool_call_id"])
    if message["role"] == "developer" and not traits.takes("developer"):
        message["role"] = "system"
    thoughts = message.get("reasoning_content")
    if thoughts is None or traits.takes("reasoning_content"):
        return message
    if traits.takes("thinking") and traits.format.name == "harmony":
        # This template takes thoughts, or text, beside calls.
        if message["content"] and "tool_calls" in message:
            thoughts, message["content"] = f"{thoughts}\n\n{message['content']}", ""
        message["thinking"] = thoughts
        del message["reasoning_content"]
    elif traits.format.thinks is not None:
        first, last = traits.format.thinks
        message["content"] = f"{first}\n{thoughts}\n{last}\n\n{message['content']}"
        del message["reasoning_content"]
    return message


def _in_order_of_calls(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the results of tools into the order of their calls.

    Many templates leave out the ids, so that only the order tells which result is whose.
    """
    ordered: list[dict[str, Any]] = []
    places: dict[str, int] = {}
    for are_results, group in itertools.groupby(messages, lambda item: item["role"] == "tool"):
        if are_results:
            ordered += sorted(group, key=lambda item: places[item["tool_call_id"]])
        else:
            ordered += group
            calls = ordered[-1].get("tool_calls", ())
            places = {call["id"]: place for place, call in enumerate(calls)}
    return ordered


def _one_call_each(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Divide messages with several calls, or with text beside a call, into one of each."""
    divided: list[dict[str, Any]] = []
    at = 0
    while at < len(messages):
        message, at = messages[at], at + 1
        calls = message.get("tool_calls", ())
        if len(calls) < 2 and not (calls and message["content"]):
            divided.append(message)
            continue
        if message["content"]:
            divided.append({key: value for key, value in message.items() if key != "tool_calls"})
        for call in calls:
            divided.append({"role": message["role"], "content": "", "tool_calls": [call]})
            while at < len(messages) and messages[at].get("tool_call_id") == call["id"]:
                divided.append(messages[at])
                at += 1
    return divided


def _may_ignore(message: Mapping[str, Any], traits: TemplateTraits) -> tuple[str, ...]:
    """The fields that say nothing new, or that templates leave out on purpose."""
    if message["role"] == "tool":
        return "role", "tool_call_id", "name"
    # Templates drop old thoughts, some by their place alone.
    thoughts = ("reasoning_content",) if traits.takes("reasoning_content") else ()
    return "role", "thinking", *thoughts


def _wrong(text: str) -> RequestInvalid:
    return RequestInvalid(text, "messages")
