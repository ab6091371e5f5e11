"""A checked request, made from the fields of its body."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from api.formats.parts import Parser, PlainText
from api.openai.constraints import constrained
from api.openai.fields import IGNORED, KNOWN, NEUTRAL, flag, number, only
from api.openai.prompts import chat_prompt, completion_prompts, encode, format_of
from api.openai.reading import Reading
from api.openai.sampling import MAX_TOKENS, read_choices, read_sampling, read_stop
from api.openai.tools import read_tools
from coordinator.loading.deployment import Deployment
from coordinator.serving.answer import ALL_SHORTCUTS, Shortcuts, room_for_answer
from coordinator.serving.choices import Run, seed_of
from planning.errors import RequestInvalid
from wire import limits
from wire.messages import Sampling

CHAT_FIELDS = frozenset(
    {
        "messages",
        "top_logprobs",
        "max_completion_tokens",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "reasoning_effort",
        "enable_thinking",
        "reasoning_format",
        "chat_template_kwargs",
    }
)
COMPLETION_FIELDS = frozenset({"prompt", "echo", "best_of"})

REASONING_FORMATS = ("auto", "deepseek", "none")
"""llama-server's names. The last leaves thoughts in the text, the others give them apart."""


@dataclass(frozen=True, slots=True)
class Job:
    """A checked request, ready to run."""

    deployment: Deployment
    chat: bool
    prompts: tuple[tuple[int, ...], ...]
    sampling: Sampling
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    token_ids: bool
    reading: Reading | None = None
    """None: a completion, whose text stays as it is."""
    shortcuts: Shortcuts = ALL_SHORTCUTS
    choices: int = 1
    """The number of answers to each prompt."""
    echoed: tuple[str, ...] = ()
    """The texts of the prompts, if answers begin with them."""
    wants_no_answer: bool = False
    """Whether only the prompts are asked for. One token of an answer is drawn all the same."""
    format_field: str = ""
    """The field that says which format the answer has, if one does."""

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens of the first prompt."""
        return self.prompts[0]

    @property
    def runs(self) -> tuple[Run, ...]:
        """The answers to generate: those to the first prompt, then those to the second."""
        return tuple(
            Run(
                prompt,
                replace(self.sampling, seed=seed_of(self.sampling.seed, choice)),
                self.shortcuts,
            )
            for prompt in self.prompts
            for choice in range(self.choices)
        )

    def echo(self, index: int) -> str:
        """Return the text that answer number ``index`` begins with."""
        return self.echoed[index // self.choices] if self.echoed else ""

    @property
    def markers(self) -> frozenset[str]:
        return frozenset() if self.reading is None else self.reading.markers

    def parser(self) -> Parser:
        """Make the parser of one answer."""
        return PlainText() if self.reading is None else self.reading.parser()


def read_job(deployment: Deployment, body: Mapping[str, Any], *, chat: bool) -> Job:
    check_fields(body, CHAT_FIELDS if chat else COMPLETION_FIELDS)
    check_model(deployment, body)
    options = read_stream_options(body)
    reading, prompts, texts = None, list[list[int]](), list[str]()
    if chat:
        reading, tokens = read_conversation(deployment, body)
        room_for_answer(len(tokens), deployment.context_tokens, deployment.spec)
        prompts.append(tokens)
    else:
        prompts, texts = completion_prompts(deployment, body)
    sampling = read_sampling(deployment, body, chat=chat)
    sampling, format_field = constrained(deployment, body, sampling, reading)
    return Job(
        deployment=deployment,
        chat=chat,
        prompts=tuple(map(tuple, prompts)),
        sampling=sampling,
        stop=read_stop(body),
        stream=flag(body, "stream"),
        include_usage=flag(options, "include_usage"),
        token_ids=flag(body, "return_token_ids"),
        reading=reading,
        shortcuts=read_shortcuts(body),
        choices=read_choices(body, len(prompts)),
        echoed=tuple(texts) if flag(body, "echo") else (),
        wants_no_answer=body.get("max_tokens") == 0,
        format_field=format_field,
    )


def read_stream_options(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the object of ``stream_options``. Raises RequestInvalid."""
    options = body.get("stream_options")
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise RequestInvalid("stream_options: expected an object", "stream_options")
    # No stream is padded here, so there is nothing to obfuscate.
    only(options, ("include_usage", "include_obfuscation"), "stream_options", "stream_options")
    return options


def read_shortcuts(body: Mapping[str, Any]) -> Shortcuts:
    """Read llama-server's fields for the prompt's cache and for guesses. Raises RequestInvalid."""
    most = number(body, "speculative.n_max", limits.DRAFT_TOKENS, 0, MAX_TOKENS, whole=True)
    keeps = body.get("cache_prompt") is None or flag(body, "cache_prompt")
    model = body.get("speculative.draft_model") is None or flag(body, "speculative.draft_model")
    return Shortcuts(keeps, int(most), model)


def read_conversation(deployment: Deployment, body: Mapping[str, Any]) -> tuple[Reading, list[int]]:
    """How the answer of a chat is read, and the tokens of its prompt. Raises RequestInvalid."""
    tools = read_tools(body)
    wish = body.get("reasoning_format")
    if wish is not None and wish not in REASONING_FORMATS:
        raise RequestInvalid(
            f"reasoning_format: expected one of {', '.join(REASONING_FORMATS)}", "reasoning_format"
        )
    prompt = chat_prompt(deployment, body, tools)
    tokens = encode(deployment, prompt.text, add_special=False)
    reading = Reading(format_of(deployment), tools, prompt.opened, split=wish != "none")
    return reading, tokens


def check_fields(body: Mapping[str, Any], own: frozenset[str]) -> None:
    """Refuse a field that cannot be honoured, by its name."""
    for field, value in body.items():
        if field in NEUTRAL:
            if not any(value == allowed for allowed in NEUTRAL[field]):
                raise RequestInvalid(f"{field} is not supported by this server", field)
        elif field not in KNOWN | own | IGNORED:
            raise RequestInvalid(f"unknown field {field!r}", field)


def check_model(deployment: Deployment, body: Mapping[str, Any]) -> None:
    """Refuse a request for another model."""
    model = body.get("model")
    if model is not None and model != deployment.name:
        raise RequestInvalid(
            f"the model {model!r} is not loaded; {deployment.name!r} is", "model", "model_not_found"
        )
