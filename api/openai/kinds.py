"""The purpose of a model: it generates text, or it encodes texts in one of several ways."""

from __future__ import annotations

from coordinator.loading.deployment import Deployment
from planning.errors import RequestInvalid

_ROUTES = {
    "vector": "/v1/embeddings",
    "class": "/v1/classify",
    "tokens": "/v1/classify",
    "span": "/v1/answers",
}
_NEEDS = {
    "vector": "a model that gives vectors, such as a sentence encoder",
    "class": "a model that classifies texts or tokens",
    "tokens": "a model that classifies texts or tokens",
    "span": "a model for questions about a text (ForQuestionAnswering)",
}


def require_generates(deployment: Deployment) -> None:
    """Refuse a prompt for a model that encodes. Raises RequestInvalid that says what it can do."""
    output = deployment.spec.output
    if output is not None:
        raise RequestInvalid(
            f"{deployment.name} encodes texts and generates none: ask {_ROUTES[output.kind]}, or "
            "load a model that generates",
            "model",
            "model_encodes",
        )


def require_kind(deployment: Deployment, *kinds: str) -> str:
    """Return the kind of output, if it is one of ``kinds``. Raises RequestInvalid."""
    output = deployment.spec.output
    if output is None or output.kind not in kinds:
        does = "generates text" if output is None else f"answers {_ROUTES[output.kind]}"
        raise RequestInvalid(
            f"{deployment.name} {does}: load {_NEEDS[kinds[0]]} for this route",
            "model",
            "model_lacks_output",
        )
    return output.kind
