"""A checked request, made from the fields of its body."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coordinator.http.formats.parts import Parser, PlainText
from coordinator.http.formats.tool_format import ToolFormat
from coordinator.http.openai.fields import IGNORED, KNOWN, NEUTRAL, flag
from coordinator.http.openai.prompts import chat_prompt, completion_prompt, encode, format_of
from coordinator.http.openai.sampling import read_sampling, read_stop
from coordinator.http.openai.tools import Tools, read_tools
from coordinator.loading.deployment import Deployment
from coordinator.serving.gateway import room_for_answer
from planning.errors import RequestInvalid
from wire.messages import Sampling

CHAT_FIELDS = frozenset(
    {
        "messages",
        "max_completion_tokens",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "reasoning_effort",
        "enable_thinking",
        "reasoning_format",
        "chat_template_kwargs",
    }
)
COMPLETION_FIELDS = frozenset({"prompt"})

REASONING_FORMATS = ("auto", "deepseek", "none")
"""llama-server's names. The last leaves thoughts in the text, the others give them apart."""


@dataclass(frozen=True, slots=True)
class Reading:
    """How the text of a chat's answer is read.

    opened: the answer begins inside of thoughts.
    split: thoughts are told apart from the text.
    """

    format: ToolFormat
    tools: Tools
    opened: bool
    split: bool

    def parser(self) -> Parser:
        return self.format.parser(self.tools.offered, opened=self.opened, split=self.split)

    @property
    def markers(self) -> frozenset[str]:
        """The special tokens that the parser needs."""
        needed = self.tools.offered or self.format.has_thoughts
        return self.format.markers if needed else frozenset()


@dataclass(frozen=True, slots=True)
class Job:
    """A checked request, ready to run."""

    deployment: Deployment
    chat: bool
    prompt: tuple[int, ...]
    sampling: Sampling
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    token_ids: bool
    reading: Reading | None = None
    """None: a completion, whose text stays as it is."""

    @property
    def markers(self) -> frozenset[str]:
        return frozenset() if self.reading is None else self.reading.markers

    def parser(self) -> Parser:
        """Make the parser of one answer."""
        return PlainText() if self.reading is None else self.reading.parser()


def read_job(deployment: Deployment, body: Mapping[str, Any], *, chat: bool) -> Job:
    check_fields(body, CHAT_FIELDS if chat else COMPLETION_FIELDS)
    check_model(deployment, body)
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise RequestInvalid("stream_options must be an object", "stream_options")
    reading, prompt = (
        read_conversation(deployment, body) if chat else (None, completion_prompt(deployment, body))
    )
    room_for_answer(len(prompt), deployment.context_tokens, deployment.spec)
    if reading is not None:
        refuse_forced_calls(reading.tools)
    return Job(
        deployment=deployment,
        chat=chat,
        prompt=tuple(prompt),
        sampling=read_sampling(deployment, body, chat=chat),
        stop=read_stop(body),
        stream=flag(body, "stream"),
        include_usage=flag(options, "include_usage"),
        token_ids=flag(body, "return_token_ids"),
        reading=reading,
    )


def read_conversation(deployment: Deployment, body: Mapping[str, Any]) -> tuple[Reading, list[int]]:
    """How the answer of a chat is read, and the tokens of its prompt. Raises RequestInvalid."""
    tools = read_tools(body)
    wish = body.get("reasoning_format")
    if wish is not None and wish not in REASONING_FORMATS:
        raise RequestInvalid(
            f"reasoning_format: expected one of {', '.join(REASONING_FORMATS)}", "reasoning_format"
        )
    prompt = chat_prompt(deployment, body, tools)
    tokens = encode(deployment, prompt.text, add_special=False)
    reading = Reading(format_of(deployment), tools, prompt.opened, split=wish != "none")
    return reading, tokens


def check_fields(body: Mapping[str, Any], own: frozenset[str]) -> None:
    """Refuse a field that cannot be honoured, by its name."""
    for field, value in body.items():
        if field in NEUTRAL:
            if not any(value == allowed for allowed in NEUTRAL[field]):
                raise RequestInvalid(f"{field} is not supported by this server", field)
        elif field not in KNOWN | own | IGNORED:
            raise RequestInvalid(f"unknown field {field!r}", field)


def check_model(deployment: Deployment, body: Mapping[str, Any]) -> None:
    """Refuse a request for another model."""
    model = body.get("model", deployment.name)
    if model != deployment.name:
        raise RequestInvalid(
            f"the model {model!r} is not loaded; {deployment.name!r} is", "model", "model_not_found"
        )


def refuse_forced_calls(tools: Tools) -> None:
    if tools.required:
        raise RequestInvalid("tool_choice: a call cannot be required here", "tool_choice")
    if any(tool.strict for tool in tools.offered):
        return  # It is honoured as far as the model keeps to the schema.
