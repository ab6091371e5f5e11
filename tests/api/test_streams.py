"""A stream adds up to the answer that is not streamed: each API, each format, any pieces."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.anthropic.messages import Messages, _input
from api.formats import tool_format
from api.formats.tool_format import ToolFormat
from api.openai.answers import ChatCompletions, Completions
from api.openai.api import Api
from api.openai.events import Outcome, events
from api.openai.jobs import Job
from api.openai.reading import Reading
from api.openai.responses import Responses
from api.openai.tools import Tool, Tools
from coordinator.errors import FormatFailed
from coordinator.serving.gateway import Gateway
from coordinator.serving.pieces import Piece
from planning.errors import RequestInvalid
from tests.api.test_formats import CASES, HERMES, WEATHER
from wire.messages import FinishReason, Sampling

TOOLS = (Tool("get_weather", "", WEATHER), Tool("now", ""))
DEPLOYMENT: Any = SimpleNamespace(name="m", slots=SimpleNamespace(total=4))
TEXTS = {
    **{name: (form, text) for name, (form, text, _) in CASES.items()},
    "only thoughts": (ToolFormat("hermes", tool_format.THINK), "<think>Hm"),
    "text between calls": (
        ToolFormat("hermes", tool_format.THINK),
        "<think>\nHm.\n</think>\nFirst.\n"
        '<tool_call>{"name": "now", "arguments": {}}</tool_call>\nThen.\n'
        '<tool_call>{"name": "now", "arguments": {"a": 1}}</tool_call>\nDone.',
    ),
    "thoughts between texts": (
        ToolFormat("harmony", None),
        "<|channel|>analysis<|message|>One.<|end|><|start|>assistant<|channel|>commentary<|message|>"
        "Two.<|end|><|start|>assistant<|channel|>analysis<|message|>Three.<|end|><|start|>assistant"
        "<|channel|>final<|message|>Four.",
    ),
}


@dataclass
class Said:
    """Stands for the gateway: it gives each answer in these pieces, which a test chooses."""

    pieces: Sequence[Piece]

    async def generate(self, *given: Any, **options: Any) -> AsyncGenerator[Piece, None]:
        for piece in self.pieces:
            yield piece


def job(form: ToolFormat, *, chat: bool, parallel: bool) -> Job:
    reading = Reading(form, Tools(TOOLS, parallel=parallel), opened=False, split=True)
    return Job(
        deployment=DEPLOYMENT,
        chat=chat,
        prompts=((1, 2),),
        sampling=Sampling(99, (2,)),
        stop=(),
        stream=True,
        include_usage=True,
        token_ids=False,
        reading=reading if chat else None,
    )


def answered(
    make: type[Api], job: Job, pieces: Sequence[Piece]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The whole answer, and the events of its stream."""

    async def both() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        gateway = cast(Gateway, Said(pieces))
        ids = itertools.count()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tool_format, "new_id", lambda: f"id{next(ids)}")
            outcome, api = Outcome(), make({})
            async for _ in events(gateway, job, [outcome], withdrawable=True):
                pass
            whole = api.whole(job, [outcome])
            ids = itertools.count()
            outcome, api = Outcome(), make({"stream": True})
            stream = list(api.begin(job, [outcome]))
            async for event in events(gateway, job, [outcome]):
                stream += api.add(event)
            stream += api.end()
            return whole, stream

    return asyncio.run(both())


def of_chat(stream: list[dict[str, Any]]) -> dict[str, Any]:
    """Add up the chunks of a chat as OpenAI's clients do."""
    message: dict[str, Any] = {"role": "assistant", "content": "", "refusal": None}
    finish = ""
    for chunk in stream[:-1]:
        (choice,) = chunk["choices"]
        assert not finish
        finish = choice["finish_reason"] or ""
        delta = choice["delta"]
        message["content"] += delta.get("content", "")
        if "reasoning_content" in delta:
            thoughts = message.get("reasoning_content", "") + delta["reasoning_content"]
            message["reasoning_content"] = thoughts
        for call in delta.get("tool_calls", ()):
            calls = message.setdefault("tool_calls", [])
            if "id" in call:
                assert call["index"] == len(calls)
                calls.append({key: call[key] for key in ("id", "type", "function")})
            else:
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    if "tool_calls" in message and not message["content"]:
        message["content"] = None
    return {"message": message, "finish": finish, "usage": stream[-1]["usage"]}


def of_completions(stream: list[dict[str, Any]]) -> dict[str, Any]:
    choices = [chunk["choices"][0] for chunk in stream[:-1]]
    text = "".join(choice["text"] for choice in choices)
    return {"text": text, "finish": choices[-1]["finish_reason"], "usage": stream[-1]["usage"]}


def of_messages(stream: list[dict[str, Any]]) -> dict[str, Any]:
    """Add up the events of a message as Anthropic's clients do."""
    content: list[dict[str, Any]] = []
    for event in stream:
        if event["type"] == "content_block_start":
            assert event["index"] == len(content)
            content.append({**event["content_block"], "json": ""})
        elif event["type"] == "content_block_delta":
            block, delta = content[event["index"]], event["delta"]
            for name in ("text", "thinking", "signature"):
                if name in delta:
                    block[name] += delta[name]
            block["json"] += delta.get("partial_json", "")
        elif event["type"] == "content_block_stop":
            block = content[event["index"]]
            arguments = block.pop("json")
            if block["type"] == "tool_use":
                block["input"] = arguments
    last = stream[-2]
    assert last["type"] == "message_delta"
    return {"content": content, "usage": last["usage"], **last["delta"]}


def of_responses(stream: list[dict[str, Any]]) -> dict[str, Any]:
    """The last event's response. Its items must be those that the events have built."""
    items: dict[int, str] = {}
    done: list[dict[str, Any]] = []
    for event in stream:
        if event["type"] == "response.output_item.added":
            items[event["output_index"]] = ""
        elif event["type"].endswith(".delta"):
            items[event["output_index"]] += event["delta"]
        elif event["type"] == "response.output_item.done":
            done.append(event["item"])
    response: dict[str, Any] = stream[-1]["response"]
    assert response["output"] == done
    assert [shown(item) for item in done] == list(items.values())
    return response


def shown(item: dict[str, Any]) -> str:
    return str(item["arguments"] if "arguments" in item else item["content"][0]["text"])


def without_ids(response: dict[str, Any]) -> dict[str, Any]:
    output = [{**item, "id": ""} for item in response["output"]]
    return {**response, "output": output, "id": "", "created_at": 0}


def test_each_of_several_answers_tells_its_own_tokens() -> None:
    """Only the first one did, and streams told the first prompt beside each answer."""
    one = job(HERMES, chat=False, parallel=True)
    one = replace(one, prompts=((1, 2), (3,)), choices=2, token_ids=True)
    pieces = [Piece("a", (7,), ""), Piece("b", (8,), "length")]
    prompts = [[1, 2], [1, 2], [3], [3]]

    async def run() -> None:
        gateway = cast(Gateway, Said(pieces))
        outcomes, api = [Outcome() for _ in one.runs], Completions({"stream": True})
        chunks = list(api.begin(one, outcomes))
        async for event in events(gateway, one, outcomes):
            chunks += api.add(event)
        told = {
            chunk["choices"][0]["index"]: chunk["shoal"] for chunk in chunks if "shoal" in chunk
        }
        whole = Completions({}).whole(one, outcomes)
        assert whole["shoal"] == told[0]
        for index, choice in enumerate(whole["choices"]):
            assert choice["shoal"] == told[index]
            assert (told[index]["prompt_tokens"], told[index]["tokens"]) == (prompts[index], [7, 8])

    asyncio.run(run())


def test_an_error_in_the_stream_of_a_response_has_the_next_number() -> None:
    """The schema wants one, and clients sort by it."""
    one, outcome = job(HERMES, chat=True, parallel=True), Outcome()
    api = Responses({"stream": True})
    begun = list(api.begin(one, [outcome]))
    name, data, *_ = api.form.error(RequestInvalid("no", "input")).splitlines()
    assert name == "event: error"
    event = json.loads(data.removeprefix("data: "))
    assert event == {
        "type": "error",
        "sequence_number": len(begun),
        "code": event["code"],
        "message": "no",
        "param": "input",
    }


FAILED = "the answer's format allows no token here"


@pytest.mark.parametrize(
    ("make", "field", "named"),
    [
        (ChatCompletions, "response_format", "response_format"),
        (Responses, "response_format", "text.format"),
        (Responses, "tools", "tools"),
        (Messages, "tool_choice", "tool_choice"),
    ],
)
def test_a_format_that_fails_in_the_middle_is_named_by_its_field(
    make: type[Api], field: str, named: str
) -> None:
    class Failing(Said):
        async def generate(self, *given: Any, **options: Any) -> AsyncGenerator[Piece, None]:
            async for piece in super().generate():
                yield piece
            raise FormatFailed(FAILED)

    async def run() -> None:
        gateway = cast(Gateway, Failing([Piece("{", (7,), "")]))
        one = replace(job(HERMES, chat=True, parallel=True), format_field=field)
        one = make({}).named(one)
        async for event in events(gateway, one, [Outcome()]):
            assert event.piece.text == "{"

    with pytest.raises(RequestInvalid) as refused:
        asyncio.run(run())
    error = refused.value
    assert (str(error), error.param, error.code) == (f"{named}: {FAILED}", named, "format_failed")


def cut(text: str, places: Sequence[int], finish: FinishReason) -> list[Piece]:
    """The text in pieces of one token. The end of a text is no token, and a limit is met by one."""
    borders = [0, *sorted({place % (len(text) + 1) for place in places}), len(text)]
    parts = [text[begin:end] for begin, end in itertools.pairwise(borders)]
    pieces = [Piece(part, (7,), "") for part in parts]
    return [*pieces, Piece("", () if finish == "stop" else (7,), finish)]


def check(form: ToolFormat, pieces: Sequence[Piece], *, parallel: bool = True) -> None:
    chat = job(form, chat=True, parallel=parallel)
    whole, stream = answered(ChatCompletions, chat, pieces)
    (choice,) = whole["choices"]
    told = {"message": choice["message"], "finish": choice["finish_reason"]}
    assert of_chat(stream) == {**told, "usage": whole["usage"]}
    whole, stream = answered(Responses, chat, pieces)
    assert without_ids(of_responses(stream)) == without_ids(whole)
    whole, stream = answered(Messages, chat, pieces)
    found = of_messages(stream)
    uses = [block for block in found["content"] if block["type"] == "tool_use"]
    for block in uses:
        block["input"] = _input(block["input"])
    assert found == {key: whole[key] for key in found}
    plain = job(form, chat=False, parallel=True)
    whole, stream = answered(Completions, plain, pieces)
    (choice,) = whole["choices"]
    text = {"text": choice["text"], "finish": choice["finish_reason"]}
    assert of_completions(stream) == {**text, "usage": whole["usage"]}


@pytest.mark.parametrize("name", TEXTS)
def test_a_streams_characters_add_up_to_the_whole_answer(name: str) -> None:
    form, text = TEXTS[name]
    check(form, cut(text, range(len(text)), "stop"))


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(TEXTS)),
    st.integers(0, 400),
    st.lists(st.integers(0, 400), max_size=8),
    st.sampled_from(["stop", "length"]),
    st.booleans(),
)
def test_a_stream_that_ends_anywhere_adds_up_to_the_whole_answer(
    name: str, end: int, places: list[int], finish: FinishReason, parallel: bool
) -> None:
    form, text = TEXTS[name]
    check(form, cut(text[:end], places, finish), parallel=parallel)
