"""Log-probabilities as OpenAI's API tells them, which differs for chats and for completions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from coordinator.loading.deployment import Deployment
from wire.logprobs import TokenLogprobs


def chat_logprobs(deployment: Deployment, tokens: Iterable[TokenLogprobs]) -> dict[str, Any]:
    """Return the ``logprobs`` of a choice of a chat, or of a chunk of it."""
    content = [
        {
            **_entry(deployment, told.token, told.logprob),
            "top_logprobs": [_entry(deployment, *likely) for likely in told.top],
        }
        for told in tokens
    ]
    return {"content": content, "refusal": None}


class Offsets:
    """Tells where each token of a text begins in it. Tokens of one character begin at its place."""

    def __init__(self, deployment: Deployment, chars: int = 0) -> None:
        """``chars`` is the length of the text before the tokens."""
        self._decoder = deployment.tokenizer.stream()
        self._chars = chars

    def of(self, token: int) -> int:
        """Return the place of the next token, in characters."""
        place = self._chars
        self._chars += len(self._decoder.push(token))
        return place


def completion_logprobs(
    deployment: Deployment,
    tokens: Iterable[TokenLogprobs],
    offsets: Offsets,
    *,
    first: int | None = None,
) -> dict[str, Any]:
    """Return the ``logprobs`` of a completion, or of a chunk of it.

    first: a token before the others that has no log-probability, because it begins the prompt.
    """
    texts: list[str] = []
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    places: list[int] = []
    if first is not None:
        texts.append(_text(token_bytes(deployment, first)))
        values.append(None)
        tops.append(None)
        places.append(offsets.of(first))
    for told in tokens:
        texts.append(_text(token_bytes(deployment, told.token)))
        values.append(told.logprob)
        tops.append({_text(token_bytes(deployment, token)): value for token, value in told.top})
        places.append(offsets.of(told.token))
    return {
        "tokens": texts,
        "token_logprobs": values,
        "top_logprobs": tops,
        "text_offset": places,
    }


def token_bytes(deployment: Deployment, token: int) -> bytes:
    """Return the bytes of a token. A special token's are its name."""
    if deployment.vocabulary is not None:
        return deployment.vocabulary.tokens[token]
    return deployment.tokenizer.decode([token], skip_special=False).encode()


def _entry(deployment: Deployment, token: int, logprob: float) -> dict[str, Any]:
    data = token_bytes(deployment, token)
    text = data.decode(errors="backslashreplace")
    return {"token": text, "logprob": logprob, "bytes": list(data)}


def _text(data: bytes) -> str:
    """Return a token's text. Bytes that are no character stand as OpenAI writes them."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
