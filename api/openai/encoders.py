"""The routes of models that encode texts: vectors, classes, and spans that answer a question.

/v1/embeddings takes OpenAI's fields, and /v1/classify those of vLLM. /v1/answers takes a question
and a text, and returns the parts of the text that answer it best. Beyond that:

- ``prompt_name`` puts one of the model's own prompts before each text (``query``, ``document``).
- ``truncate`` cuts texts that are too long, which are refused otherwise.
- ``may_lack`` lets an empty answer compete, where the text may not have one.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from api.common import read_json, while_connected
from api.openai.fields import IGNORED, flag, number
from api.openai.jobs import check_model
from api.openai.kinds import require_kind
from api.openai.routes import OpenAIRoutes
from coordinator.loading.deployment import Deployment
from coordinator.loading.models import Models
from coordinator.serving.encoding import Encoders, Result, TextTokens
from model.encoder_files import Classes, classes_of, prompts_of
from model.spans import Span, best_spans, entities, windows
from model.tokenizer import EncodedText
from planning.errors import RequestInvalid

MOST_TEXTS = 2048
"""The most texts of a request, as of OpenAI's."""

MOST_ANSWERS = 20

_Work = Callable[[Deployment, Mapping[str, Any]], Awaitable[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Texts:
    """The texts of a request, as the model takes them."""

    deployment: Deployment
    encoded: list[EncodedText]

    @property
    def tokens(self) -> list[TextTokens]:
        return [TextTokens(text.tokens, text.second) for text in self.encoded]

    @property
    def usage(self) -> dict[str, int]:
        count = sum(len(text.tokens) for text in self.encoded)
        return {"prompt_tokens": count, "total_tokens": count}


class EncoderRoutes:
    """Handlers that answer with an encoder."""

    def __init__(self, models: Models, answers: OpenAIRoutes, encoders: Encoders) -> None:
        self._models = models
        self._answers = answers
        self._encoders = encoders

    def routes(self) -> list[Route]:
        return [
            self._route("/v1/embeddings", self._embeddings, "vector"),
            self._route("/v1/classify", self._classify, "class", "tokens"),
            self._route("/classify", self._classify, "class", "tokens"),
            self._route("/v1/answers", self._answer_spans, "span"),
        ]

    def _route(self, path: str, answer: _Work, *kinds: str) -> Route:
        async def handle(request: Request) -> Response:
            body = await read_json(request)
            name = self._models.named(body.get("model"), *kinds)
            self._models.require_soon(name)
            deployment = await while_connected(request, self._models.deployment(name))
            check_model(deployment, body)
            return JSONResponse(await while_connected(request, answer(deployment, body)))

        return Route(path, handle, methods=["POST"])

    async def _prepared(self, deployment: Deployment, work: Callable[[], Texts]) -> Texts:
        return await self._answers.prepare(deployment, work, is_long=True)

    async def _embeddings(self, deployment: Deployment, body: Mapping[str, Any]) -> dict[str, Any]:
        require_kind(deployment, "vector")
        check(body, {"input", "encoding_format", "dimensions", "prompt_name", "truncate"})
        form = "float" if body.get("encoding_format") is None else body["encoding_format"]
        if form not in ("float", "base64"):
            raise RequestInvalid("encoding_format: expected float or base64", "encoding_format")
        width = deployment.spec.output_width
        if body.get("dimensions") not in (None, width):
            raise RequestInvalid(
                f"dimensions: {deployment.name} gives {width}: leave it out", "dimensions"
            )
        texts = await self._prepared(deployment, lambda: read_texts(deployment, body))
        vectors = await self._encoders.encode(deployment, texts.tokens)
        data = [
            {"object": "embedding", "index": index, "embedding": _written(vector, form)}
            for index, vector in enumerate(vectors)
        ]
        return {"object": "list", "data": data, "model": deployment.name, "usage": texts.usage}

    async def _classify(self, deployment: Deployment, body: Mapping[str, Any]) -> dict[str, Any]:
        kind = require_kind(deployment, "class", "tokens")
        check(body, {"input", "truncate"})
        classes = classes_of(deployment.request.model)
        texts = await self._prepared(
            deployment, lambda: read_texts(deployment, body, pairs=kind == "class")
        )
        scores = await self._encoders.encode(deployment, texts.tokens)
        data = []
        for index, (text, rows) in enumerate(zip(texts.encoded, scores, strict=True)):
            if kind == "class":
                data.append({"index": index, **classified(rows, classes)})
            else:
                found = entities(text, softmax(rows), classes.names)
                data.append({"index": index, "entities": [entity.to_json() for entity in found]})
        return {"object": "list", "data": data, "model": deployment.name, "usage": texts.usage}

    async def _answer_spans(
        self, deployment: Deployment, body: Mapping[str, Any]
    ) -> dict[str, Any]:
        require_kind(deployment, "span")
        check(body, {"question", "context", "top", "may_lack"})
        question, context = (_text(body, name) for name in ("question", "context"))
        top = int(number(body, "top", 1, 1, MOST_ANSWERS, whole=True))
        read = await self._prepared(deployment, lambda: _windows(deployment, question, context))
        scores = await self._encoders.encode(deployment, read.tokens)
        lacks = flag(body, "may_lack")
        found = best_spans(context, read.encoded, scores, top, may_lack=lacks)
        answers = [_answer(span) for span in found]
        return {"object": "list", "data": answers, "model": deployment.name, "usage": read.usage}


def check(body: Mapping[str, Any], own: set[str]) -> None:
    """Refuse a field that this route does not have."""
    for field in body:
        if field not in own | IGNORED | {"model"}:
            raise RequestInvalid(f"unknown field {field!r}", field)


def read_texts(deployment: Deployment, body: Mapping[str, Any], *, pairs: bool = False) -> Texts:
    """Read ``input``: a text, a list of texts, tokens, or lists of tokens.

    pairs: a list of two texts inside the list is a pair. Raises RequestInvalid.
    """
    value = body.get("input")
    plain = isinstance(value, list) and bool(value) and all(type(item) is int for item in value)
    items = value if isinstance(value, list) and not plain else [value]
    if not 0 < len(items) <= MOST_TEXTS:
        raise RequestInvalid(f"input: expected 1 to {MOST_TEXTS} texts", "input")
    prompt, truncate = _prompt(deployment, body), flag(body, "truncate")
    encoded = []
    for index, item in enumerate(items):
        place = f"input[{index}]" if items is value else "input"
        if isinstance(item, str):
            text = deployment.tokenizer.encode_text(prompt + item)
        elif pairs and _is_pair(item):
            text = deployment.tokenizer.encode_text(item[0], item[1])
        elif _is_tokens(item):
            nothing = ((0, 0),) * len(item)
            text = EncodedText(tuple(item), len(item), (-1,) * len(item), nothing)
        else:
            raise RequestInvalid(f"{place}: expected a text, or a list of token ids", "input")
        encoded.append(fitting(deployment, text, place, truncate=truncate))
    return Texts(deployment, encoded)


def fitting(
    deployment: Deployment, text: EncodedText, place: str, *, truncate: bool
) -> EncodedText:
    """Return a text that fits the model. Raises RequestInvalid with its ``place`` otherwise.

    A text that is cut keeps its last token, which ends it.
    """
    most, spec = deployment.context_tokens, deployment.spec
    if not text.tokens:
        raise RequestInvalid(f"{place}: it is empty", "input")
    if min(text.tokens) < 0 or max(text.tokens) >= spec.vocab:
        raise RequestInvalid(f"{place}: token ids outside the vocabulary", "input")
    if len(text.tokens) <= most:
        return text
    if not truncate:
        larger = most < spec.max_context
        raise RequestInvalid(
            f"{place}: it has {len(text.tokens)} tokens and the context {most}: shorten it, send "
            "`truncate`" + (", or load the model with a larger --context" if larger else ""),
            "input",
            "context_length_exceeded",
        )
    kept = [*range(most - 1), len(text.tokens) - 1]
    return EncodedText(
        tuple(text.tokens[index] for index in kept),
        min(text.second, most),
        tuple(text.parts[index] for index in kept),
        tuple(text.offsets[index] for index in kept),
    )


def classified(scores: Result, classes: Classes) -> dict[str, Any]:
    """Describe a text's class as vLLM does."""
    best, names = int(scores.argmax()), classes.names
    probs = _probabilities(scores, classes.problem_type).tolist()
    return {"label": names[best], "probs": probs, "num_classes": len(names)}


def _probabilities(scores: Result, problem_type: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return a probability for each score, as transformers' pipeline does. A regression has none.

    Classes of which a text may have several are independent, and so is a class alone.
    """
    exact = scores.astype(np.float64)
    if problem_type == "regression":
        return exact
    if problem_type == "multi_label_classification" or len(scores) == 1:
        return 0.5 + 0.5 * np.tanh(0.5 * exact)  # The sigmoid, which does not overflow so.
    return softmax(scores)


def softmax(scores: Result) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return probabilities over the last axis."""
    exact = scores.astype(np.float64)
    raised = np.exp(exact - exact.max(axis=-1, keepdims=True))
    shares: np.ndarray[Any, np.dtype[np.float64]] = raised / raised.sum(axis=-1, keepdims=True)
    return shares


def _windows(deployment: Deployment, question: str, context: str) -> Texts:
    """Return the question with each part of the text that fits beside it."""
    encode, most = deployment.tokenizer.encode_text, deployment.context_tokens
    try:
        found = windows(encode, question, context, most)
    except ValueError as error:
        raise RequestInvalid(f"question: {error}", "question") from error
    return Texts(
        deployment, [fitting(deployment, text, "question", truncate=False) for text in found]
    )


def _answer(span: Span) -> dict[str, Any]:
    return {"answer": span.text, "score": span.score, "start": span.start, "end": span.end}


def _written(vector: Result, form: str) -> list[float] | str:
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(value) for value in vector]


def _prompt(deployment: Deployment, body: Mapping[str, Any]) -> str:
    """Return the text that the model's files put before each text, if the request names one."""
    known, default = _prompts(deployment.request.model)
    name = body.get("prompt_name")
    if name is None:
        return known.get(default, "")
    if not isinstance(name, str) or name not in known:
        raise RequestInvalid(
            f"prompt_name: {deployment.name} has {', '.join(known) or 'no prompts'}", "prompt_name"
        )
    return known[name]


@functools.lru_cache(maxsize=16)
def _prompts(model: Path) -> tuple[dict[str, str], str]:
    return prompts_of(model)


def _text(body: Mapping[str, Any], field: str) -> str:
    value = body.get(field)
    if not isinstance(value, str) or not value.strip():
        raise RequestInvalid(f"{field}: expected a text", field)
    return value


def _is_pair(item: Any) -> TypeGuard[list[str]]:
    return isinstance(item, list) and len(item) == 2 and all(isinstance(one, str) for one in item)


def _is_tokens(item: Any) -> TypeGuard[list[int]]:
    return isinstance(item, list) and bool(item) and all(type(token) is int for token in item)
