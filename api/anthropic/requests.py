"""A request to /v1/messages as the request for a chat that it means."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from api.openai.fields import SAYS_NOTHING, flag, only
from planning.errors import RequestInvalid

SAME = (
    *("model", "temperature", "top_p", "top_k", "stream", "metadata", "service_tier"),
    *("cache_prompt", "chat_template_kwargs", "seed", "min_p"),
)
"""The fields that mean the same in a request for a chat."""

OTHER = (
    *("messages", "system", "max_tokens", "stop_sequences", "tools", "tool_choice", "thinking"),
    "cache_control",
)
"""``cache_control`` is a hint, here and in blocks: prompts are kept without it."""

_COMMON = ("type", "cache_control")
"""The fields that every block may have."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "container": (None,),
    "mcp_servers": (None, []),
    "context_management": (None,),
}


def chat_request(body: Mapping[str, Any], *, counts: bool = False) -> dict[str, Any]:
    """Return the body of the chat. Raises RequestInvalid that names the field.

    counts: the request only counts tokens, and needs no max_tokens.
    """
    for field, value in body.items():
        if field in NEUTRAL:
            if value not in NEUTRAL[field]:
                raise RequestInvalid(f"{field} is not supported by this server", field)
        elif field not in SAME and field not in OTHER:
            raise RequestInvalid(f"unknown field {field!r}", field)
    chat = {field: body[field] for field in SAME if field in body}
    if not counts:
        if type(body.get("max_tokens")) is not int:
            raise RequestInvalid("max_tokens: expected a whole number", "max_tokens")
        chat["max_tokens"] = body["max_tokens"]
    chat["messages"] = _messages(body)
    if body.get("stop_sequences") not in (None, []):
        chat["stop"] = body["stop_sequences"]
    if body.get("tools") is not None:
        chat["tools"] = _tools(body["tools"])
    _read_choice(body.get("tool_choice"), chat)
    _read_thinking(body.get("thinking"), chat)
    return chat


def _read_choice(choice: Any, chat: dict[str, Any]) -> None:
    if choice is None:
        return
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind == "tool":
        chat["tool_choice"] = {"type": "function", "function": {"name": choice.get("name")}}
    elif kind in ("auto", "any", "none"):
        chat["tool_choice"] = "required" if kind == "any" else kind
    else:
        raise RequestInvalid(
            "tool_choice: expected an object of the type auto, any, tool or none", "tool_choice"
        )
    only(choice, ("type", "name", "disable_parallel_tool_use"), "tool_choice", "tool_choice")
    if flag(choice, "disable_parallel_tool_use"):
        chat["parallel_tool_calls"] = False


def _read_thinking(thinking: Any, chat: dict[str, Any]) -> None:
    """Thoughts cannot be bounded in tokens, so a budget only says that there may be some."""
    if thinking is None:
        return
    kind = thinking.get("type") if isinstance(thinking, dict) else None
    if kind not in ("enabled", "disabled", "adaptive"):
        raise RequestInvalid(
            "thinking: expected an object of the type enabled, disabled or adaptive", "thinking"
        )
    only(thinking, ("type", "budget_tokens", "display"), "thinking", "thinking")
    if kind != "adaptive":
        chat["enable_thinking"] = kind == "enabled"


def _tools(tools: Any) -> list[dict[str, Any]]:
    if not isinstance(tools, list):
        raise RequestInvalid("tools: expected a list", "tools")
    found = []
    for number, tool in enumerate(tools):
        if not isinstance(tool, dict) or tool.get("type", "custom") not in ("custom", None):
            kind = str(tool.get("type") if isinstance(tool, dict) else tool)[:40]
            raise RequestInvalid(f"tools[{number}]: {kind!r} is not supported", "tools")
        function = {
            name: value
            for name, value in tool.items()
            if name not in ("type", "input_schema", "cache_control")
        }
        function["parameters"] = tool.get("input_schema")
        found.append({"type": "function", "function": function})
    return found


def _messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    given = body.get("messages")
    if not isinstance(given, list) or not given:
        raise RequestInvalid("messages: expected a list with at least one message", "messages")
    messages: list[dict[str, Any]] = []
    system = body.get("system")
    if system not in (None, "", []):
        messages.append({"role": "system", "content": _text(system, "system")})
    for number, message in enumerate(given):
        place = f"messages[{number}]"
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("user", "assistant", "system"):
            raise RequestInvalid(f"{place}.role: expected user or assistant", "messages")
        only(message, ("role", "content"), place, "messages")
        content = message.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list):
            raise RequestInvalid(f"{place}.content: expected text, or a list of blocks", "messages")
        read = _assistant if role == "assistant" else _user
        messages += read(role, content, f"{place}.content")
    return messages


def _user(role: str, blocks: list[Any], place: str) -> list[dict[str, Any]]:
    """Return the results of tools in a message, then the message of its texts."""
    found: list[dict[str, Any]] = []
    texts = ""
    for number, block in enumerate(blocks):
        at = f"{place}[{number}]"
        if isinstance(block, dict) and block.get("type") == "tool_result":
            only(block, ("tool_use_id", "content", "is_error", *_COMMON), at, "messages")
            given = block.get("content")
            content = _text("" if given in SAYS_NOTHING else given, f"{at}.content")
            if flag(block, "is_error"):
                content = f"Error: {content}"
            result = {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": content}
            found.append(result)
        else:
            texts += _block_text(block, at)
    return [*found, {"role": role, "content": texts}] if texts or not found else found


def _assistant(role: str, blocks: list[Any], place: str) -> list[dict[str, Any]]:
    message: dict[str, Any] = {"role": role, "content": ""}
    for number, block in enumerate(blocks):
        at = f"{place}[{number}]"
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "tool_use":
            only(block, ("id", "name", "input", *_COMMON), at, "messages")
            arguments = block.get("input")
            if not isinstance(arguments, dict):
                raise RequestInvalid(f"{at}.input: expected an object", "messages")
            function = {"name": block.get("name"), "arguments": json.dumps(arguments)}
            call = {"id": block.get("id"), "type": "function", "function": function}
            message.setdefault("tool_calls", []).append(call)
        elif kind == "thinking" and isinstance(block.get("thinking"), str):
            only(block, ("thinking", "signature", *_COMMON), at, "messages")
            thoughts = message.get("reasoning_content", "")
            message["reasoning_content"] = thoughts + block["thinking"]
        else:
            message["content"] += _block_text(block, at)
    return [message]


def _text(content: Any, place: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestInvalid(f"{place}: expected text, or a list of blocks of text", "messages")
    return "".join(_block_text(block, f"{place}[{number}]") for number, block in enumerate(content))


def _block_text(block: Any, place: str) -> str:
    if isinstance(block, dict) and block.get("type") == "text":
        text = block.get("text")
        if isinstance(text, str):
            only(block, ("text", *_COMMON), place, "messages")
            return text
    kind = block.get("type") if isinstance(block, dict) else None
    instead = f", not {str(kind)[:40]!r}" if kind not in (None, "text") else ""
    raise RequestInvalid(f"{place}: only text content is supported{instead}", "messages")
