"""The tools that a request offers, and which of them an answer may or must call."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from api.openai.fields import flag, only
from planning.errors import RequestInvalid

_NAME = re.compile(r"[\w.-]{1,128}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the client can run."""

    name: str
    description: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """A JSON schema of the arguments. Empty: none are needed."""
    strict: bool = False
    """Whether arguments must fit the schema."""

    def to_json(self) -> dict[str, Any]:
        """Return the tool as chat templates expect it."""
        function: dict[str, Any] = {"name": self.name, "description": self.description}
        function["parameters"] = dict(self.parameters) or {"type": "object", "properties": {}}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class Tools:
    """The offered tools, without those that may not be called."""

    offered: tuple[Tool, ...] = ()
    required: bool = False
    """Whether the answer must call one."""
    parallel: bool = True
    """Whether an answer may have several calls."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(tool.name for tool in self.offered)


def read_tools(body: Mapping[str, Any]) -> Tools:
    """Read ``tools``, ``tool_choice`` and ``parallel_tool_calls``. Raises RequestInvalid."""
    given = body.get("tools")
    if given is None:
        given = []
    if not isinstance(given, list):
        raise RequestInvalid("tools: expected a list", "tools")
    tools = tuple(_tool(item, f"tools[{number}]") for number, item in enumerate(given))
    names = frozenset(tool.name for tool in tools)
    if len(names) < len(tools):
        ((name, _),) = Counter(tool.name for tool in tools).most_common(1)
        raise RequestInvalid(f"tools: two tools have the name {name!r}", "tools")
    wish, allowed = _choice(body.get("tool_choice"), names)
    if wish != "none" and not tools and body.get("tool_choice") not in (None, "auto"):
        raise RequestInvalid("tool_choice: there are no tools to choose from", "tool_choice")
    parallel = body.get("parallel_tool_calls") is None or flag(body, "parallel_tool_calls")
    if wish == "none":
        return Tools(parallel=parallel)
    offered = tuple(tool for tool in tools if tool.name in allowed)
    return Tools(offered, required=wish == "required", parallel=parallel)


def _tool(item: Any, place: str) -> Tool:
    if not isinstance(item, dict) or item.get("type") != "function":
        raise RequestInvalid(f"{place}: only tools of the type function are supported", "tools")
    only(item, ("type", "function"), place, "tools")
    function = item.get("function")
    if not isinstance(function, dict):
        raise RequestInvalid(f"{place}.function: expected an object", "tools")
    name, description = function.get("name"), function.get("description")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestInvalid(
            f"{place}.function.name: expected 1 to 128 letters, digits, underscores, dots, dashes",
            "tools",
        )
    if description is not None and not isinstance(description, str):
        raise RequestInvalid(f"{place}.function.description: expected text", "tools")
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise RequestInvalid(f"{place}.function.parameters: expected a JSON schema", "tools")
    only(function, ("name", "description", "parameters", "strict"), f"{place}.function", "tools")
    return Tool(name, description or "", parameters or {}, flag(function, "strict"))


def _choice(value: Any, names: frozenset[str]) -> tuple[str, frozenset[str]]:
    """Return none, auto or required, and the names that may be called."""
    if value is None or value in ("none", "auto", "required"):
        return value or "auto", names
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "function":
        only(value, ("type", "function"), "tool_choice", "tool_choice")
        return "required", frozenset({_known(value.get("function"), names)})
    if kind == "allowed_tools" and isinstance(value.get("allowed_tools"), dict):
        allowed = value["allowed_tools"]
        only(value, ("type", "allowed_tools"), "tool_choice", "tool_choice")
        only(allowed, ("mode", "tools"), "tool_choice.allowed_tools", "tool_choice")
        listed = allowed.get("tools")
        if allowed.get("mode") in ("auto", "required") and isinstance(listed, list):
            return allowed["mode"], frozenset(
                _known(item.get("function") if isinstance(item, dict) else None, names)
                for item in listed
            )
    raise RequestInvalid(
        "tool_choice: expected none, auto, required, or an object that names a function",
        "tool_choice",
    )


def _known(function: Any, names: frozenset[str]) -> str:
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or name not in names:
        raise RequestInvalid(f"tool_choice: no tool has the name {name!r}", "tool_choice")
    return name
