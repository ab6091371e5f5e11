"""Runs one prompt and shows the answer as it arrives, for ``run`` and ``demo``."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import Any

from cli.client import Client
from cli.errors import CommandFailed
from cli.render import Screen


def generate(
    client: Client,
    screen: Screen,
    model: str,
    prompt: str,
    sampling: Mapping[str, float],
    *,
    chat: bool = False,
) -> dict[str, Any]:
    """Stream the answer to the screen.

    ``sampling`` are fields of the API's request: max_tokens, temperature, top_k, top_p, seed.
    Returns {"model", "prompt_tokens", "tokens", "text", "finish_reason", "prefill_tokens_per_s",
    "decode_tokens_per_s"}. The gateway times the prompt, and the last stage the tokens.
    Raises CommandFailed.
    """
    body: dict[str, Any] = {
        "model": model,
        **sampling,
        "stream": True,
        "return_token_ids": True,
    }
    if chat:
        path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": prompt}]
        body["reasoning_format"] = "none"  # Thoughts are a part of the shown text.
    else:
        path, body["prompt"] = "/v1/completions", prompt
    text, result = "", None
    with closing(client.stream(path, body, screen.note)) as events:
        for event in events:
            for choice in event["choices"]:
                piece = choice["delta"].get("content", "") if chat else choice["text"]
                text += piece
                if piece and not screen.json_output:
                    screen.text(piece)
                if choice["finish_reason"]:
                    result = {"finish_reason": choice["finish_reason"], **event["shoal"]}
    if not screen.json_output:
        screen.text("\n")
    if result is None:
        raise CommandFailed("the answer ended before it was complete")
    return {"model": model, "text": text, **result}
