"""How tokens are drawn and where answers end, as a request says it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from api.openai.fields import flag, number
from coordinator.loading.deployment import Deployment
from coordinator.serving import requests
from model.generation import (
    MAX_BIAS,
    MAX_PENALTY,
    MAX_REPETITION_PENALTY,
    MAX_TEMPERATURE,
    MAX_TOP_K,
    MIN_REPETITION_PENALTY,
)
from planning.errors import RequestInvalid
from wire.limits import MAX_LOGIT_BIASES
from wire.logprobs import MOST_TOP_LOGPROBS
from wire.messages import Sampling

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for completions. Chat answers may fill the context."""

MAX_STOP_STRINGS = 4
MAX_STOP_CHARACTERS = 256

MAX_CHOICES = 128
"""The most answers to one request, those to all its prompts together."""

MAX_TOKENS = 1 << 31
"""The most tokens that an answer may be asked to have. The context bounds them, too."""

_NEUTRAL_SAMPLING = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}
"""The values that draw from the model's own distribution."""


def read_sampling(deployment: Deployment, body: Mapping[str, Any], *, chat: bool) -> Sampling:
    """Read everything but the format of the answer. Raises RequestInvalid."""
    default = deployment.context_tokens if chat else DEFAULT_COMPLETION_TOKENS
    limit = "max_tokens"
    if chat and body.get("max_completion_tokens") is not None:
        limit = "max_completion_tokens"
        if body.get("max_tokens") not in (None, body[limit]):
            raise RequestInvalid(
                f"max_tokens: {limit} says something else: leave one out", "max_tokens"
            )
    known = {**_NEUTRAL_SAMPLING, **deployment.sampling_defaults.stated()}
    penalties = MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY
    echo = not chat and flag(body, "echo")
    # With echo, a request may want nothing but the prompt.
    tokens = int(number(body, limit, default, 0 if echo else 1, MAX_TOKENS, whole=True))
    top_logprobs = read_logprobs(body, chat=chat)
    seed = number(body, "seed", requests.current().seed, -(1 << 63), (1 << 63) - 1, whole=True)
    return Sampling(
        max_tokens=max(tokens, 1),
        stop_tokens=() if flag(body, "ignore_eos") else deployment.spec.eos_tokens,
        temperature=number(body, "temperature", known["temperature"], 0.0, MAX_TEMPERATURE),
        top_k=int(number(body, "top_k", known["top_k"], 0, MAX_TOP_K, whole=True)),
        top_p=number(body, "top_p", known["top_p"], 0.0, 1.0),
        seed=int(seed) % (1 << 63),
        repetition_penalty=number(
            body, "repetition_penalty", known["repetition_penalty"], *penalties
        ),
        min_p=number(body, "min_p", known["min_p"], 0.0, 1.0),
        presence_penalty=number(body, "presence_penalty", 0.0, -MAX_PENALTY, MAX_PENALTY),
        frequency_penalty=number(body, "frequency_penalty", 0.0, -MAX_PENALTY, MAX_PENALTY),
        logit_bias=read_logit_bias(body, deployment.spec.vocab),
        top_logprobs=top_logprobs,
        prompt_logprobs=echo and top_logprobs >= 0,
    )


def read_logprobs(body: Mapping[str, Any], *, chat: bool) -> int:
    """Return how many likeliest tokens to tell beside each token, or -1 for no log-probabilities.

    Chat completions have a flag and a number, and completions a number only.
    """
    value = body.get("logprobs")
    if not chat:
        if value is False:
            return -1
        return int(number(body, "logprobs", -1, 0, MOST_TOP_LOGPROBS, whole=True))
    top = int(number(body, "top_logprobs", 0, 0, MOST_TOP_LOGPROBS, whole=True))
    if flag(body, "logprobs"):
        return top
    if top:
        raise RequestInvalid("top_logprobs: it needs logprobs to be true", "top_logprobs")
    return -1


def read_logit_bias(body: Mapping[str, Any], vocab: int) -> tuple[tuple[int, float], ...]:
    """Read a map of token ids, as text, to what is added to their logits."""
    value = body.get("logit_bias")
    if value is None:
        return ()
    if not isinstance(value, dict) or len(value) > MAX_LOGIT_BIASES:
        raise RequestInvalid(
            f"logit_bias: expected a map of at most {MAX_LOGIT_BIASES} token ids to numbers",
            "logit_bias",
        )
    found: dict[int, float] = {}
    for token, bias in value.items():
        # No sign, and no zeros before it: "5" and "05" would be two biases of one token.
        is_number = token.isascii() and token.isdecimal() and token == (token.lstrip("0") or "0")
        if not is_number or not int(token[:20]) < vocab:
            raise RequestInvalid(
                f"logit_bias: {token[:20]!r} is no token id of this model, which has {vocab}",
                "logit_bias",
            )
        if type(bias) not in (int, float) or not -MAX_BIAS <= bias <= MAX_BIAS:
            raise RequestInvalid(
                f"logit_bias: the bias of token {token[:20]} is not between -{MAX_BIAS:g} and "
                f"{MAX_BIAS:g}",
                "logit_bias",
            )
        found[int(token)] = float(bias)
    return tuple(found.items())


def read_choices(body: Mapping[str, Any], prompts: int) -> int:
    """Return the number of answers to each of so many prompts."""
    choices = int(number(body, "n", 1, 1, MAX_CHOICES, whole=True))
    if number(body, "best_of", choices, 1, MAX_CHOICES, whole=True) != choices:
        raise RequestInvalid(
            "best_of: answers are not compared here: leave it out, or give the value of n",
            "best_of",
        )
    if choices * prompts > MAX_CHOICES:
        raise RequestInvalid(
            f"n: {prompts} prompts with {choices} answers each are more than the {MAX_CHOICES} "
            "answers of one request: send several requests",
            "n",
        )
    return choices


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
