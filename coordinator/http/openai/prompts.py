"""Prompts of requests as tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coordinator.loading.deployment import Deployment
from coordinator.serving.gateway import room_for_answer
from planning.errors import RequestInvalid


def completion_prompt(deployment: Deployment, body: Mapping[str, Any]) -> list[int]:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return encode(deployment, prompt, add_special=True)
    if isinstance(prompt, list) and all(type(token) is int for token in prompt):
        if any(not 0 <= token < deployment.spec.vocab for token in prompt):
            raise RequestInvalid("prompt: token ids outside the vocabulary", "prompt")
        return prompt
    raise RequestInvalid("prompt: expected one string, or one list of token ids", "prompt")


def chat_prompt(deployment: Deployment, body: Mapping[str, Any]) -> list[int]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestInvalid("messages: expected a list with at least one message", "messages")
    plain = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RequestInvalid("messages: each needs a role and content", "messages")
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(_text_part(part) for part in content)
        if not isinstance(content, str):
            raise RequestInvalid("messages: content must be text", "messages")
        plain.append({"role": message["role"], "content": content})
    text = deployment.tokenizer.apply_chat_template(plain)
    return encode(deployment, text, add_special=False)


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


def _text_part(part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        text: str = part["text"]
        return text
    raise RequestInvalid("messages: only text content is supported", "messages")
