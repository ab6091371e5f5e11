"""Log-probabilities as OpenAI's API tells them, which differs for chats and for completions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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


def completion_logprobs(
    deployment: Deployment,
    tokens: Iterable[TokenLogprobs],
    *,
    offset_chars: int = 0,
    first: int | None = None,
) -> dict[str, Any]:
    """Return the ``logprobs`` of a completion, or of a chunk of it.

    offset_chars: the length of the text before.
    first: a token before the others that has no log-probability, because it begins the prompt.
    """
    texts: list[str] = []
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    if first is not None:
        texts.append(_text(token_bytes(deployment, first)))
        values.append(None)
        tops.append(None)
        offsets.append(offset_chars)
        offset_chars += text_chars(deployment, [first])
    for told in tokens:
        texts.append(_text(token_bytes(deployment, told.token)))
        values.append(told.logprob)
        tops.append({_text(token_bytes(deployment, token)): value for token, value in told.top})
        offsets.append(offset_chars)
        offset_chars += text_chars(deployment, [told.token])
    return {
        "tokens": texts,
        "token_logprobs": values,
        "top_logprobs": tops,
        "text_offset": offsets,
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


def text_chars(deployment: Deployment, tokens: Sequence[int]) -> int:
    """Return the length of the text of some tokens. Bytes that are no character do not count."""
    return sum(len(token_bytes(deployment, token).decode(errors="ignore")) for token in tokens)
