"""A request to /v1/responses as the request for a chat that it means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from api.openai.fields import only
from planning.errors import RequestInvalid

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "previous_response_id": (None,),
    "conversation": (None,),
    "background": (None, False),
    "prompt": (None,),
    "truncation": (None, "disabled"),
    "max_tool_calls": (None,),
    "context_management": (None, []),
}
"""Fields that are not supported, with the values that have no effect. Nothing is stored here."""

NAMES = {
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "verbosity": "text.verbosity",
    "reasoning_effort": "reasoning.effort",
}
"""The fields here that say what the others say in a request for a chat."""

NO_LOGPROBS = "log-probabilities are told by /v1/chat/completions only"

SAME = (
    *("model", "temperature", "top_p", "parallel_tool_calls", "stream", "user", "metadata"),
    *("service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("seed", "top_k", "min_p", "repetition_penalty", "cache_prompt", "stop"),
    *("chat_template_kwargs", "enable_thinking", "reasoning_format", "presence_penalty"),
    *("frequency_penalty", "stream_options"),
)
"""The fields that mean the same in a request for a chat."""

OTHER = (
    *("input", "instructions", "max_output_tokens", "tools", "tool_choice", "text", "reasoning"),
    *("store", "include", "top_logprobs"),
)

INCLUDED = ("reasoning.encrypted_content",)
"""These may be wished for beside the text. Thoughts come as they are, so nothing is encrypted."""

_ITEM = ("type", "id", "status")
"""The fields that items have of an earlier response."""


def chat_request(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body of the chat. Raises RequestInvalid that names the field."""
    for field, value in body.items():
        if field in NEUTRAL:
            if value not in NEUTRAL[field]:
                raise RequestInvalid(f"{field} is not supported: nothing is stored here", field)
        elif field not in SAME and field not in OTHER:
            raise RequestInvalid(f"unknown field {field!r}", field)
    if body.get("top_logprobs") not in (None, 0):
        raise RequestInvalid(f"top_logprobs: {NO_LOGPROBS}", "top_logprobs")
    chat = {field: body[field] for field in SAME if field in body}
    chat["messages"] = _messages(body)
    if body.get("max_output_tokens") is not None:
        chat["max_completion_tokens"] = body["max_output_tokens"]
    if body.get("tools") is not None:
        chat["tools"] = _tools(body["tools"])
    if body.get("tool_choice") is not None:
        chat["tool_choice"] = _choice(body["tool_choice"])
    _read_text(body.get("text"), chat)
    reasoning = body.get("reasoning")
    if reasoning is not None:
        if not isinstance(reasoning, dict):
            raise RequestInvalid("reasoning: expected an object", "reasoning")
        # Thoughts are told whole, which is more than any summary.
        only(reasoning, ("effort", "summary", "generate_summary"), "reasoning", "reasoning")
        chat["reasoning_effort"] = reasoning.get("effort")
    include = body.get("include")
    if include is not None and not (
        isinstance(include, list) and all(item in INCLUDED for item in include)
    ):
        names = " and ".join(INCLUDED)
        raise RequestInvalid(f"include: only {names} is known; {NO_LOGPROBS}", "include")
    return chat


def _read_text(text: Any, chat: dict[str, Any]) -> None:
    if text is None:
        return
    if not isinstance(text, dict):
        raise RequestInvalid("text: expected an object", "text")
    only(text, ("format", "verbosity"), "text", "text")
    form = text.get("format")
    if text.get("verbosity") is not None:
        chat["verbosity"] = text["verbosity"]
    if form is None:
        return
    if isinstance(form, dict) and form.get("type") == "json_schema":
        schema = {name: value for name, value in form.items() if name != "type"}
        form = {"type": "json_schema", "json_schema": schema}
    chat["response_format"] = form


def _tools(tools: Any) -> list[dict[str, Any]]:
    """Return the tools in the form of a chat, whose functions are objects of their own."""
    if not isinstance(tools, list):
        raise RequestInvalid("tools: expected a list", "tools")
    found = []
    for number, tool in enumerate(tools):
        if not isinstance(tool, dict) or tool.get("type") != "function":
            kind = str(tool.get("type") if isinstance(tool, dict) else tool)[:40]
            raise RequestInvalid(
                f"tools[{number}]: only tools of the type function are supported, not {kind!r}",
                "tools",
            )
        function = {name: value for name, value in tool.items() if name != "type"}
        found.append({"type": "function", "function": function})
    return found


def _choice(choice: Any) -> Any:
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if choice.get("type") == "allowed_tools" and isinstance(choice.get("tools"), list):
        tools = [{"type": "function", "function": tool} for tool in choice["tools"]]
        allowed = {"mode": choice.get("mode"), "tools": tools}
        return {"type": "allowed_tools", "allowed_tools": allowed}
    return choice


def _messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    given, instructions = body.get("input"), body.get("instructions")
    messages = _Messages()
    if instructions is not None:
        if not isinstance(instructions, str):
            raise RequestInvalid("instructions: expected text", "instructions")
        messages.add({"role": "system", "content": instructions})
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise RequestInvalid("input: expected text, or a list with at least one item", "input")
    for number, item in enumerate(given):
        messages.take(item, f"input[{number}]")
    return messages.found


_FIELDS = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "reasoning": ("content", "summary", "encrypted_content"),
}
"""The fields of each kind of item, beside those of all."""


class _Messages:
    """Gathers items to messages. The assistant's items up to another one are one message."""

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None

    def add(self, message: dict[str, Any]) -> None:
        self._open = None
        self.found.append(message)

    def take(self, item: Any, place: str) -> None:
        if not isinstance(item, dict):
            raise RequestInvalid(f"{place}: expected an object", "input")
        kind = item.get("type", "message")
        if isinstance(kind, str) and kind in _FIELDS:
            only(item, (*_ITEM, *_FIELDS[kind]), place, "input")
        if kind == "message" and item.get("role") == "assistant":
            message = self._assistant()
            if message["content"] is not None:
                self._open = None
                message = self._assistant()
            message["content"] = _text(item.get("content"), f"{place}.content")
        elif kind == "message":
            content = _text(item.get("content"), f"{place}.content")
            self.add({"role": item.get("role"), "content": content})
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            self._assistant().setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            content = _text(item.get("output"), f"{place}.output")
            self.add({"role": "tool", "tool_call_id": item.get("call_id"), "content": content})
        elif kind == "reasoning":
            text = _thoughts(item, place)
            if text:
                self._open = None
                self._assistant()["reasoning_content"] = text
        else:
            raise RequestInvalid(
                f"{place}: items of the type {str(kind)[:40]!r} are not supported", "input"
            )

    def _assistant(self) -> dict[str, Any]:
        if self._open is None:
            message: dict[str, Any] = {"role": "assistant", "content": None}
            self.add(message)
            self._open = message
        return self._open


def _text(content: Any, place: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestInvalid(f"{place}: expected text, or a list of parts of text", "input")
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else None
        if kind not in ("input_text", "output_text", "text") or not isinstance(text, str):
            instead = f", not {str(kind)[:40]!r}" if kind not in (None, "input_text") else ""
            raise RequestInvalid(
                f"{place}[{number}]: only text content is supported{instead}", "input"
            )
        only(part, ("type", "text"), f"{place}[{number}]", "input")
        texts.append(text)
    return "".join(texts)


def _thoughts(item: Mapping[str, Any], place: str) -> str:
    """Return the text of a reasoning item: its content, or its summary if that is all it has."""
    parts = item.get("content") or item.get("summary") or []
    if not isinstance(parts, list) or not all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts
    ):
        raise RequestInvalid(f"{place}: expected parts with text", "input")
    return "".join(part["text"] for part in parts)
