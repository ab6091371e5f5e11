"""A checked request, ready to run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coordinator.http.openai.fields import IGNORED, KNOWN, NEUTRAL, flag, number
from coordinator.http.openai.prompts import chat_prompt, completion_prompt
from coordinator.http.openai.sampling import read_sampling, read_stop
from coordinator.loading.deployment import Deployment
from coordinator.serving.gateway import room_for_answer
from planning.errors import RequestInvalid
from wire import limits
from wire.messages import Sampling


@dataclass(frozen=True, slots=True)
class Job:
    """A checked request, ready to run."""

    deployment: Deployment
    chat: bool
    prompt: tuple[int, ...]
    sampling: Sampling
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    token_ids: bool
    cache_prompt: bool = True
    drafts: int = limits.DRAFT_TOKENS
    """Both as in ``Gateway.generate``."""

    @property
    def kind(self) -> str:
        if not self.chat:
            return "text_completion"
        return "chat.completion.chunk" if self.stream else "chat.completion"


def read_job(deployment: Deployment, body: Mapping[str, Any], *, chat: bool) -> Job:
    own = {"messages", "max_completion_tokens"} if chat else {"prompt"}
    for field, value in body.items():
        if field in NEUTRAL:
            if not any(value == allowed for allowed in NEUTRAL[field]):
                raise RequestInvalid(f"{field} is not supported by this server", field)
        elif field not in KNOWN | own | IGNORED:
            raise RequestInvalid(f"unknown field {field!r}", field)
    model = body.get("model", deployment.name)
    if model != deployment.name:
        raise RequestInvalid(
            f"the model {model!r} is not loaded; {deployment.name!r} is", "model", "model_not_found"
        )
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise RequestInvalid("stream_options must be an object", "stream_options")
    prompt = chat_prompt(deployment, body) if chat else completion_prompt(deployment, body)
    room_for_answer(len(prompt), deployment.context_tokens, deployment.spec)
    return Job(
        deployment=deployment,
        chat=chat,
        prompt=tuple(prompt),
        sampling=read_sampling(deployment, body, chat=chat),
        stop=read_stop(body),
        stream=flag(body, "stream"),
        include_usage=flag(options, "include_usage"),
        token_ids=flag(body, "return_token_ids"),
        cache_prompt=body.get("cache_prompt") is None or flag(body, "cache_prompt"),
        drafts=int(number(body, "speculative.n_max", limits.DRAFT_TOKENS, 0, 1 << 31, whole=True)),
    )
