"""How tokens are drawn and where answers end, as a request says it."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from coordinator.http.openai.fields import flag, number
from coordinator.loading.deployment import Deployment
from model.generation import (
    MAX_REPETITION_PENALTY,
    MAX_TEMPERATURE,
    MAX_TOP_K,
    MIN_REPETITION_PENALTY,
)
from planning.errors import RequestInvalid
from wire.messages import Sampling

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for completions. Chat answers may fill the context."""

MAX_STOP_STRINGS = 4
MAX_STOP_CHARACTERS = 256

_NEUTRAL_SAMPLING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
"""The values that draw from the model's own distribution."""


def read_sampling(deployment: Deployment, body: Mapping[str, Any], *, chat: bool) -> Sampling:
    default = deployment.context_tokens if chat else DEFAULT_COMPLETION_TOKENS
    newer = chat and body.get("max_completion_tokens") is not None
    limit = "max_completion_tokens" if newer else "max_tokens"
    known = {**_NEUTRAL_SAMPLING, **deployment.sampling_defaults.stated()}
    penalties = MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY
    return Sampling(
        max_tokens=int(number(body, limit, default, 1, 1 << 31, whole=True)),
        stop_tokens=() if flag(body, "ignore_eos") else deployment.spec.eos_tokens,
        temperature=number(body, "temperature", known["temperature"], 0.0, MAX_TEMPERATURE),
        top_k=int(number(body, "top_k", known["top_k"], 0, MAX_TOP_K, whole=True)),
        top_p=number(body, "top_p", known["top_p"], 0.0, 1.0),
        seed=int(number(body, "seed", secrets.randbits(32), -(1 << 63), (1 << 63) - 1, whole=True))
        % (1 << 63),
        repetition_penalty=number(
            body, "repetition_penalty", known["repetition_penalty"], *penalties
        ),
    )


def read_stop(body: Mapping[str, Any]) -> tuple[str, ...]:
    stop = body.get("stop")
    if stop is None:
        return ()
    strings = [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(strings, list)
        or len(strings) > MAX_STOP_STRINGS
        or not all(
            isinstance(item, str) and 0 < len(item) <= MAX_STOP_CHARACTERS for item in strings
        )
    ):
        raise RequestInvalid(
            f"stop: expected a string, or a list of up to {MAX_STOP_STRINGS}, each of 1 to "
            f"{MAX_STOP_CHARACTERS} characters",
            "stop",
        )
    return tuple(strings)
