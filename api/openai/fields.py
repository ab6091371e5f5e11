"""The fields of requests: which are known, and readers of single values."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from planning.errors import RequestInvalid

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": (None, ""),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
}
"""OpenAI's fields that are not supported, with the values that have no effect."""

IGNORED = frozenset(
    {
        "user",
        "store",
        "metadata",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
    }
)
"""Fields that do not change the answer."""

KNOWN = frozenset(
    {
        "model",
        "stream",
        "stream_options",
        "stop",
        "seed",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "logprobs",
        "n",
        "max_tokens",
        "ignore_eos",
        "return_token_ids",
        "cache_prompt",
        "speculative.n_max",
        "speculative.draft_model",
        "response_format",
        "json_schema",
        "grammar",
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
        "structured_outputs",
    }
)


SAYS_NOTHING: tuple[Any, ...] = (None, "", [], {})
"""The values of a field that asks for nothing."""

MOST_SHOWN_CHARS = 40
"""So much of a client's value is in an error."""


def only(value: Mapping[str, Any], known: Collection[str], place: str, field: str) -> None:
    """Refuse what an object at ``place`` of ``field`` has beside ``known``, unless it is empty."""
    for name, inner in value.items():
        if name not in known and inner not in SAYS_NOTHING:
            raise RequestInvalid(f"{place}: unknown field {name[:MOST_SHOWN_CHARS]!r}", field)


def number(
    body: Mapping[str, Any],
    field: str,
    default: float,
    low: float,
    high: float,
    *,
    whole: bool = False,
) -> float:
    value = body.get(field)
    if value is None:
        return default
    if type(value) is not int and (whole or type(value) is not float):
        raise RequestInvalid(f"{field}: expected a {'whole ' if whole else ''}number", field)
    if not low <= value <= high:
        shown = str(value)[:MOST_SHOWN_CHARS]
        low, high = (int(bound) if bound == int(bound) else bound for bound in (low, high))
        raise RequestInvalid(f"{field}: {shown} is not between {low} and {high}", field)
    return float(value) if not whole else value


def flag(body: Mapping[str, Any], field: str) -> bool:
    value = body.get(field)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise RequestInvalid(f"{field}: expected true or false", field)
