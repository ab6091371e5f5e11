"""Prompts of requests as tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from api.formats.tool_format import ToolFormat, find_format
from api.openai.fields import flag
from api.openai.messages import TemplateTraits, read_messages, with_texts_apart
from api.openai.sampling import MAX_CHOICES
from api.openai.tools import Tools
from coordinator.loading.deployment import Deployment
from coordinator.serving.answer import room_for_answer
from model.errors import FieldsUnused, TemplateRefused
from model.template_values import WatchedMessage
from planning.errors import RequestInvalid

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")
THINKING_SWITCHES = ("enable_thinking", "thinking")
"""The variables by which templates turn thoughts on and off."""

_OWN_VARIABLES = frozenset({"messages", "tools", "add_generation_prompt"})

NO_PLACE = "template_has_no_place"
"""The code of the error for messages that a chat template leaves out."""


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """The text of a conversation. ``opened``: the answer begins inside of thoughts."""

    text: str
    opened: bool


def format_of(deployment: Deployment) -> ToolFormat:
    """The format in which the model thinks and calls tools."""
    return find_format(deployment.tokenizer.template_text)


def completion_prompts(
    deployment: Deployment, body: Mapping[str, Any]
) -> tuple[list[list[int]], list[str]]:
    """The tokens and texts of the prompts, which are one text or token list, or a list of them."""
    value = body.get("prompt")
    several = isinstance(value, list) and value and isinstance(value[0], (str, list))
    prompts: list[Any] = value if several and isinstance(value, list) else [value]
    if len(prompts) > MAX_CHOICES:
        raise RequestInvalid(f"prompt: at most {MAX_CHOICES} in one request", "prompt")
    found = []
    for number, prompt in enumerate(prompts):
        try:
            found.append(_completion_prompt(deployment, prompt))
        except RequestInvalid as error:
            message = str(error)
            if several:
                message = f"prompt[{number}]: {message.removeprefix('prompt: ')}"
            raise RequestInvalid(message, "prompt", error.code) from error
    return [tokens for tokens, _ in found], [text for _, text in found]


def _completion_prompt(deployment: Deployment, prompt: Any) -> tuple[list[int], str]:
    if isinstance(prompt, str):
        tokens, text = encode(deployment, prompt, add_special=True), prompt
    elif isinstance(prompt, list) and all(type(token) is int for token in prompt):
        if any(not 0 <= token < deployment.spec.vocab for token in prompt):
            raise RequestInvalid("prompt: token ids outside the vocabulary", "prompt")
        tokens, text = prompt, deployment.tokenizer.decode(prompt)
    else:
        raise RequestInvalid("prompt: expected a text, or a list of token ids", "prompt")
    room_for_answer(len(tokens), deployment.context_tokens, deployment.spec)
    return tokens, text


def chat_prompt(deployment: Deployment, body: Mapping[str, Any], tools: Tools) -> ChatPrompt:
    """Run the chat template. Raises RequestInvalid that names what the template cannot take."""
    tokenizer, form = deployment.tokenizer, format_of(deployment)
    if tools.offered:
        _check_tools(deployment, form)
    messages = read_messages(body.get("messages"), TemplateTraits(form, tokenizer.template_text))
    variables = read_variables(deployment, body)
    if tools.offered:
        variables["tools"] = [tool.to_json() for tool in tools.offered]
    try:
        text = _rendered(deployment, messages, variables)
    except FieldsUnused as error:
        place = error.fields[0][:100]
        raise RequestInvalid(
            f"{place}: the chat template of {deployment.name} has no place for it: leave it out",
            "messages",
            NO_PLACE,
        ) from error
    except TemplateRefused as error:
        raise RequestInvalid(f"messages: {error}", "messages") from error
    return ChatPrompt(text, form.is_opened(text))


def _rendered(
    deployment: Deployment, messages: list[WatchedMessage], variables: dict[str, Any]
) -> str:
    """Run the template. If it leaves out text beside calls, the text gets a message of its own.

    Raises FieldsUnused, TemplateRefused.
    """
    tokenizer = deployment.tokenizer
    try:
        return tokenizer.apply_chat_template(messages, **variables)
    except FieldsUnused as error:
        apart = with_texts_apart(messages, error.fields)
        if apart is None:
            raise
        try:
            return tokenizer.apply_chat_template(apart, **variables)
        except TemplateRefused:
            raise error from None


def _check_tools(deployment: Deployment, form: ToolFormat) -> None:
    if "tools" not in deployment.tokenizer.template_variables:
        raise RequestInvalid(
            f"tools: the chat template of {deployment.name} takes none: use a model that was "
            "trained to call tools",
            "tools",
        )
    if not form.takes_calls:
        raise RequestInvalid(
            f"tools: it is not known how {deployment.name} writes its calls", "tools"
        )


def read_variables(deployment: Deployment, body: Mapping[str, Any]) -> dict[str, Any]:
    """The variables for the chat template that a request gives. Raises RequestInvalid."""
    given = body.get("chat_template_kwargs")
    if given is None:
        given = {}
    if not isinstance(given, dict):
        raise RequestInvalid("chat_template_kwargs: expected an object", "chat_template_kwargs")
    known = deployment.tokenizer.template_variables
    wanted = _thinking(deployment, body)
    for name, value in given.items():
        if name in _OWN_VARIABLES or name not in known:
            raise RequestInvalid(
                f"chat_template_kwargs: the chat template of {deployment.name} has no variable "
                f"{name[:60]!r}",
                "chat_template_kwargs",
            )
        if value is None:
            continue
        _check_variable(name, value)
        if wanted.setdefault(name, value) != value:
            raise RequestInvalid(
                f"chat_template_kwargs.{name}: another field of the request says something else: "
                "leave one out",
                "chat_template_kwargs",
            )
    return wanted


def _check_variable(name: str, value: Any) -> None:
    """Refuse values that a template would take for something else, such as "false" for true."""
    place = f"chat_template_kwargs.{name}"
    if name in THINKING_SWITCHES and not isinstance(value, bool):
        raise RequestInvalid(f"{place}: expected true or false", "chat_template_kwargs")
    if name == "reasoning_effort" and not isinstance(value, str):
        raise RequestInvalid(f"{place}: expected text", "chat_template_kwargs")


def _thinking(deployment: Deployment, body: Mapping[str, Any]) -> dict[str, Any]:
    """The variables for reasoning_effort and enable_thinking."""
    known = deployment.tokenizer.template_variables
    switch = next((name for name in THINKING_SWITCHES if name in known), None)
    thinks = format_of(deployment).has_thoughts
    found: dict[str, Any] = {}
    effort = body.get("reasoning_effort")
    if effort is not None:
        if effort not in EFFORTS:
            raise RequestInvalid(
                f"reasoning_effort: expected one of {', '.join(EFFORTS)}", "reasoning_effort"
            )
        if "reasoning_effort" in known:
            found["reasoning_effort"] = effort
        elif switch is not None:
            found[switch] = effort != "none"
        elif thinks or effort != "none":
            raise RequestInvalid(
                f"reasoning_effort: {deployment.name} cannot be told how much to think",
                "reasoning_effort",
            )
    if body.get("enable_thinking") is not None:
        wish = flag(body, "enable_thinking")
        if switch is not None:
            found[switch] = wish
        elif wish != thinks:
            does = "cannot be told not to think" if thinks else "does not think"
            raise RequestInvalid(f"enable_thinking: {deployment.name} {does}", "enable_thinking")
    return found


def encode(deployment: Deployment, text: str, *, add_special: bool) -> list[int]:
    """The tokens of a prompt. A prompt that is far too long is refused before tokenizing."""
    least_tokens = deployment.tokenizer.least_tokens(text)
    if least_tokens:
        room_for_answer(least_tokens, deployment.context_tokens, deployment.spec, at_least=True)
    tokens = deployment.tokenizer.encode(text, add_special=add_special)
    vocab = deployment.spec.vocab
    if max(tokens, default=0) >= vocab:
        raise RequestInvalid(
            f"the prompt has the token {max(tokens)}, the model only {vocab} tokens:"
            " its tokenizer and its weights do not belong together",
            "prompt",
        )
    return tokens
