"""The JSON objects of answers: chunks, choices, usage."""

from __future__ import annotations

import secrets
import time
from typing import Any

from coordinator.http.openai.jobs import Job
from coordinator.serving.gateway import Timing


def delta(delta: dict[str, Any], finish: str | None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}


def text_choice(text: str, finish: str | None) -> dict[str, Any]:
    return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}


def envelope(job: Job) -> dict[str, Any]:
    prefix = "chatcmpl" if job.chat else "cmpl"
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": job.kind,
        "created": int(time.time()),
        "model": job.deployment.name,
    }


def usage(job: Job, completion_tokens: int, timing: Timing) -> dict[str, Any]:
    return {
        "prompt_tokens": len(job.prompt),
        "completion_tokens": completion_tokens,
        "total_tokens": len(job.prompt) + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": timing.cached_tokens},
    }


def details(job: Job, tokens: list[int], timing: Timing) -> dict[str, Any]:
    if not job.token_ids:
        return {}
    return {
        "shoal": {
            "prompt_tokens": list(job.prompt),
            "tokens": tokens,
            "prefill_tokens_per_s": timing.prefill_tokens_per_s,
            "decode_tokens_per_s": timing.decode_tokens_per_s,
        }
    }
