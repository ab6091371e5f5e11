"""Routes about the model and its texts: models, tokens, rendered prompts.

/tokenize and /detokenize take the fields of llama-server and of vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from api.common import model_state, read_json, while_connected
from api.openai.fields import flag
from api.openai.jobs import CHAT_FIELDS, check_fields, check_model
from api.openai.prompts import chat_prompt, encode
from api.openai.routes import OpenAIRoutes
from api.openai.tools import read_tools
from coordinator.errors import CoordinatorError
from coordinator.loading.deployment import Deployment
from coordinator.loading.models import Models
from coordinator.loading.state import State, deployment_of
from planning.errors import RequestInvalid

Work = Callable[[Deployment, Mapping[str, Any]], dict[str, Any]]

CONTENT_FIELDS = frozenset({"content", "add_special", "parse_special", "with_pieces"})
PROMPT_FIELDS = frozenset({"prompt", "add_special_tokens", "return_token_strs"})


class ModelUnknown(CoordinatorError):
    """A client asks about a model that is not here."""

    status = 404
    code = "model_not_found"


class TextRoutes:
    """Handlers that generate nothing."""

    def __init__(self, models: Models, answers: OpenAIRoutes) -> None:
        self._models = models
        self._answers = answers

    def routes(self) -> list[Route]:
        return [
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{model:path}", self.model, methods=["GET"]),
            self.route("/tokenize", tokenize),
            self.route("/detokenize", detokenize),
            self.route("/apply-template", apply_template),
        ]

    async def models(self, request: Request) -> Response:
        present = [_model(name, state) for name, state in self._models.present()]
        return JSONResponse({"object": "list", "data": present})

    async def model(self, request: Request) -> Response:
        asked = request.path_params["model"]
        for name, state in self._models.present():
            if name == asked:
                return JSONResponse(_model(name, state))
        raise ModelUnknown(f"the model {asked[:200]!r} is not loaded")

    def route(self, path: str, work: Work) -> Route:
        """Serve ``work`` in a thread."""

        async def handle(request: Request) -> Response:
            return await self._answer(request, work)

        return Route(path, handle, methods=["POST"])

    async def _answer(self, request: Request, work: Work) -> Response:
        body = await read_json(request)
        name = self._models.named(body.get("model"))
        self._models.require_soon(name)
        deployment = await while_connected(request, self._models.deployment(name))
        found = self._answers.prepare(deployment, lambda: work(deployment, body), is_long=True)
        return JSONResponse(await while_connected(request, found))


def _model(name: str, state: State) -> dict[str, Any]:
    deployment = deployment_of(state)
    context_tokens = None if deployment is None else deployment.context_tokens
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "shoal",
        # OpenAI has no such field. vLLM's clients know the first name, OpenRouter's the second.
        "max_model_len": context_tokens,
        "context_length": context_tokens,
        "shoal": model_state(state),
    }


def tokenize(deployment: Deployment, body: Mapping[str, Any]) -> dict[str, Any]:
    """The tokens of a text, or of a chat. Raises RequestInvalid."""
    check_model(deployment, body)
    kinds = [name for name in ("content", "prompt", "messages") if name in body]
    if len(kinds) != 1:
        raise RequestInvalid("expected one of content, prompt and messages", "content")
    if kinds == ["messages"]:
        check_fields(body, CHAT_FIELDS | {"return_token_strs"})
        text = chat_prompt(deployment, body, read_tools(body)).text
        add_special = False
    else:
        _check_unknown(body, CONTENT_FIELDS if kinds == ["content"] else PROMPT_FIELDS)
        text = body[kinds[0]]
        if not isinstance(text, str):
            raise RequestInvalid(f"{kinds[0]}: expected text", kinds[0])
        if body.get("parse_special") is False:
            raise RequestInvalid("parse_special: special tokens are always read", "parse_special")
        # llama-server adds none unless told to, and vLLM adds them.
        switch = "add_special" if kinds == ["content"] else "add_special_tokens"
        add_special = flag(body, switch) if body.get(switch) is not None else kinds == ["prompt"]
    tokens = encode(deployment, text, add_special=add_special) if text else []
    found: dict[str, Any] = {
        "tokens": tokens,
        "count": len(tokens),
        "max_model_len": deployment.context_tokens,
    }
    if flag(body, "with_pieces") or flag(body, "return_token_strs"):
        pieces = [deployment.tokenizer.decode([token], skip_special=False) for token in tokens]
        if flag(body, "with_pieces"):
            pairs = zip(tokens, pieces, strict=True)
            found["tokens"] = [
                {"id": token, "piece": _piece(deployment, token, text)} for token, text in pairs
            ]
        else:
            found["token_strs"] = pieces
    return found


def _piece(deployment: Deployment, token: int, text: str) -> str | list[int]:
    """Return a token's text, or its bytes if they are no whole characters."""
    vocabulary = deployment.vocabulary
    if "\N{REPLACEMENT CHARACTER}" in text and vocabulary is not None:
        return list(vocabulary.tokens[token])
    return text


def detokenize(deployment: Deployment, body: Mapping[str, Any]) -> dict[str, Any]:
    """The text of tokens. Raises RequestInvalid."""
    check_model(deployment, body)
    _check_unknown(body, frozenset({"tokens"}))
    tokens = body.get("tokens")
    if not isinstance(tokens, list) or any(
        type(token) is not int or not 0 <= token < deployment.spec.vocab for token in tokens
    ):
        raise RequestInvalid("tokens: expected a list of token ids of the vocabulary", "tokens")
    text = deployment.tokenizer.decode(tokens, skip_special=False)
    # llama-server's name, and vLLM's.
    return {"content": text, "prompt": text}


def apply_template(deployment: Deployment, body: Mapping[str, Any]) -> dict[str, Any]:
    """The prompt of a chat as text. Raises RequestInvalid."""
    check_model(deployment, body)
    check_fields(body, CHAT_FIELDS)
    return {"prompt": chat_prompt(deployment, body, read_tools(body)).text}


def _check_unknown(body: Mapping[str, Any], known: frozenset[str]) -> None:
    unknown = body.keys() - known - {"model"}
    if unknown:
        raise RequestInvalid(f"unknown field {min(unknown)!r}", min(unknown))
