"""Anthropic's routes: answers, and the tokens of a request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.routing import Route

from api.anthropic.messages import Messages
from api.anthropic.requests import chat_request
from api.openai.jobs import check_model
from api.openai.prompts import chat_prompt, encode
from api.openai.routes import OpenAIRoutes
from api.openai.texts import TextRoutes
from api.openai.tools import read_tools
from coordinator.loading.deployment import Deployment


class AnthropicRoutes:
    """Routes that the handlers of OpenAI's serve in Anthropic's form."""

    def __init__(self, answers: OpenAIRoutes, texts: TextRoutes) -> None:
        self._answers = answers
        self._texts = texts

    def routes(self) -> list[Route]:
        return [
            self._answers.route("/v1/messages", Messages),
            self._texts.route("/v1/messages/count_tokens", count_tokens),
        ]


def count_tokens(deployment: Deployment, body: Mapping[str, Any]) -> dict[str, Any]:
    """The number of tokens of a request to /v1/messages. Raises RequestInvalid."""
    chat = chat_request(body, counts=True)
    check_model(deployment, chat)
    text = chat_prompt(deployment, chat, read_tools(chat)).text
    return {"input_tokens": len(encode(deployment, text, add_special=False))}
