"""Shows what an encoder says of a text, for ``run``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape

from cli.client import Client
from cli.errors import CommandFailed, UsageError
from cli.render import Screen

SHOWN = 6
"""The values of a vector that are shown."""


def encode(
    client: Client, screen: Screen, model: str, kind: str, text: str | None, question: str | None
) -> None:
    """Ask the model about ``text``, and show the answer. Raises CommandFailed, UsageError."""
    if text is None:
        raise UsageError(f"{model} encodes texts and holds no conversation: give a text")
    if kind == "span":
        if question is None:
            raise UsageError(f"{model} answers questions about a text: ask one with --question")
        answer = client.post(
            "/v1/answers", {"model": model, "question": question, "context": text, "top": 3}
        )
        lines = [f"{one['answer']}  ({one['score']:.0%})" for one in answer["data"]]
    elif question is not None:
        raise UsageError(f"--question: {model} answers none; it is no model for questions")
    elif kind == "vector":
        answer = client.post("/v1/embeddings", {"model": model, "input": text})
        vector = answer["data"][0]["embedding"]
        begin = ", ".join(f"{value:.4f}" for value in vector[:SHOWN])
        lines = [f"{len(vector)} values: {begin}{', ...' if len(vector) > SHOWN else ''}"]
    else:
        answer = client.post("/v1/classify", {"model": model, "input": text})
        lines = _classes(answer["data"][0], text)
    if screen.json_output:
        screen.json(answer)
        return
    for line in lines:
        screen.out.print(escape(line), soft_wrap=True)


def _classes(found: Mapping[str, Any], text: str) -> list[str]:
    if "entities" in found:
        return [
            f"{one['label']}: {text[one['start'] : one['end']]}  ({one['score']:.0%})"
            for one in found["entities"]
        ] or ["nothing found"]
    best = max(found["probs"])
    # A model that was trained for values gives one, which is no probability.
    shown = f"({best:.0%})" if 0 <= best <= 1 else f"{best:.4g}"
    return [f"{found['label']}  {shown}"]


def require_generates(model: str, kind: str | None) -> None:
    """Raise CommandFailed for a conversation with a model that encodes."""
    if kind is not None:
        raise CommandFailed(
            f"{model} encodes texts and generates none: ask it with `shoal run {model} TEXT`, or "
            "load a model that generates"
        )
