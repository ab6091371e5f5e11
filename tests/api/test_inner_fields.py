"""Fields inside of a request's fields: none is dropped in silence."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from api.anthropic.messages import Messages
from api.anthropic.requests import chat_request as of_anthropic
from api.openai import constraints
from api.openai.api import Api
from api.openai.fields import number
from api.openai.jobs import read_stream_options
from api.openai.prompts import completion_prompts, read_variables
from api.openai.responses import Responses
from api.openai.responses_input import chat_request as of_responses
from api.openai.sampling import read_choices, read_logit_bias, read_sampling
from api.openai.tools import read_tools
from model.checkpoint import Checkpoint
from model.tokenizer import Tokenizer
from planning.errors import RequestInvalid
from tests.api.test_messages import TOOL, USER, call, read
from wire.messages import Sampling

LLAMA = Path(__file__).parents[1] / "fixtures" / "llama"
FORMAT = {"name": "n", "schema": {}}


def of_messages(body: dict[str, Any]) -> Any:
    return read(body["messages"])


def of_format(body: dict[str, Any]) -> Any:
    # What is refused is refused before the model's vocabulary is asked for.
    field = "response_format"
    # These formats are refused before the deployment is asked for anything.
    return constraints._response_format(None, body[field], field)  # type: ignore[arg-type]  # Above.


def blocks(*given: dict[str, Any], role: str = "user") -> dict[str, Any]:
    return {"max_tokens": 1, "messages": [{"role": role, "content": list(given)}]}


def of_variables(body: dict[str, Any]) -> dict[str, Any]:
    template = "{{ enable_thinking }}{{ reasoning_effort }}</think>"
    known = frozenset({"messages", "enable_thinking", "reasoning_effort", "documents"})
    tokenizer = SimpleNamespace(template_variables=known, template_text=template)
    deployment: Any = SimpleNamespace(name="llama", tokenizer=tokenizer)
    return read_variables(deployment, body)


def of_kwargs(variables: dict[str, Any]) -> dict[str, Any]:
    return of_variables({"chat_template_kwargs": variables})


def of_limits(body: dict[str, Any]) -> Sampling:
    defaults = SimpleNamespace(stated=dict)
    spec = SimpleNamespace(eos_tokens=(2,), vocab=9)
    deployment: Any = SimpleNamespace(context_tokens=32, sampling_defaults=defaults, spec=spec)
    return read_sampling(deployment, body, chat=True)


OFF, LITTLE = {"enable_thinking": False}, {"reasoning_effort": "minimal"}
TEXT = {"type": "text", "text": "x"}
CALLING = {"role": "assistant", "tool_calls": [call("a")]}
FUNCTION = call("a")["function"]
HI = {"max_tokens": 1, "messages": [USER]}


@pytest.mark.parametrize(
    ("reader", "body", "words"),
    [
        (read_stream_options, {"stream_options": {"x": 1}}, "stream_options: unknown field 'x'"),
        (read_stream_options, {"stream_options": []}, "stream_options: expected an object"),
        (read_stream_options, {"stream_options": 0}, "stream_options: expected an object"),
        (of_messages, {"messages": [{**USER, "content": [{**TEXT, "x": 1}]}]}, "unknown field 'x'"),
        (
            of_messages,
            {"messages": [{"role": "assistant", "tool_calls": [{**call("a"), "x": 1}]}]},
            r"messages\[0\]\.tool_calls\[0\]: unknown field 'x'",
        ),
        (
            of_messages,
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{**call("a"), "function": {**FUNCTION, "x": 1}}],
                    }
                ]
            },
            r"messages\[0\]\.tool_calls\[0\]\.function: unknown field 'x'",
        ),
        (
            of_messages,
            {"messages": [{**CALLING, "reasoning": "a", "reasoning_content": "b"}]},
            "reasoning_content says something else",
        ),
        (of_messages, {"messages": [{**CALLING, "reasoning": 0}]}, "reasoning_content: expected"),
        (read_tools, {"tools": [{**TOOL, "strict": True}]}, r"tools\[0\]: unknown field 'strict'"),
        (
            read_tools,
            {
                "tools": [TOOL],
                "tool_choice": {"type": "function", "function": {"name": "f"}, "x": 1},
            },
            "tool_choice: unknown field 'x'",
        ),
        (of_format, {"response_format": {"type": "text", "schema": {"a": 1}}}, "field 'schema'"),
        (of_format, {"response_format": {"type": "json_object", "x": 1}}, "unknown field 'x'"),
        (
            of_format,
            {"response_format": {"type": "json_object", "json_schema": FORMAT}},
            "unknown field 'json_schema'",
        ),
        (
            of_format,
            {"response_format": {"type": "json_schema", "json_schema": {**FORMAT, "x": 1}}},
            "response_format.json_schema: unknown field 'x'",
        ),
        (
            of_format,
            {"response_format": {"type": "json_schema", "json_schema": FORMAT, "strict": True}},
            "response_format: unknown field 'strict'",
        ),
        (of_anthropic, {**HI, "messages": [{**USER, "name": "a"}]}, "unknown field 'name'"),
        (of_anthropic, blocks({**TEXT, "x": 1}), r"content\[0\]: unknown field 'x'"),
        (of_anthropic, blocks({"type": "image"}), "only text content is supported, not 'image'"),
        (of_anthropic, blocks({"type": "tool_result", "x": 1}), "unknown field 'x'"),
        (of_anthropic, blocks({"type": "tool_result", "content": 0}), "content: expected text"),
        (of_anthropic, blocks({"type": "tool_result", "is_error": "no"}), "is_error: expected"),
        (
            of_anthropic,
            blocks({"type": "tool_use", "input": {}, "x": 1}, role="assistant"),
            "unknown field 'x'",
        ),
        (
            of_anthropic,
            blocks({"type": "thinking", "thinking": "", "x": 1}, role="assistant"),
            "unknown field 'x'",
        ),
        (of_anthropic, {**HI, "system": 0}, "system: expected text"),
        (of_anthropic, {**HI, "system": [{**TEXT, "x": 1}]}, r"system\[0\]: unknown field 'x'"),
        (of_anthropic, {**HI, "thinking": {"type": "disabled", "x": 1}}, "unknown field 'x'"),
        (of_anthropic, {**HI, "tool_choice": {"type": "auto", "x": 1}}, "unknown field 'x'"),
        (
            of_anthropic,
            {**HI, "tool_choice": {"type": "auto", "disable_parallel_tool_use": "no"}},
            "disable_parallel_tool_use: expected",
        ),
        (of_responses, {"input": "x", "reasoning": {"x": 1}}, "reasoning: unknown field 'x'"),
        (of_responses, {"input": "x", "text": {"x": 1}}, "text: unknown field 'x'"),
        (of_responses, {"input": [{**USER, "name": "a"}]}, r"input\[0\]: unknown field 'name'"),
        (
            of_responses,
            {"input": [{**USER, "content": [{"type": "input_image"}]}]},
            "'input_image'",
        ),
        (
            of_responses,
            {"input": [{**USER, "content": [{"type": "input_text", "text": "a", "x": 1}]}]},
            r"input\[0\]\.content\[0\]: unknown field 'x'",
        ),
        (
            of_responses,
            {"input": [{"type": "function_call", "call_id": "a", "name": "f", "x": 1}]},
            "unknown field 'x'",
        ),
        (
            of_responses,
            {"input": "x", "include": ["message.output_text.logprobs"]},
            "log-probabilities are told by /v1/chat/completions only",
        ),
        (of_responses, {"input": "x", "top_logprobs": 2}, "top_logprobs: log-probabilities are"),
        # Values that no table can be asked for.
        (of_format, {"response_format": {"type": []}}, "response_format.type: expected text"),
        (of_format, {"response_format": {"type": {}}}, "response_format.type: expected text"),
        (of_responses, {"input": [{"type": []}]}, r"input\[0\]: items of the type '\[\]' are not"),
        (
            of_messages,
            {"messages": [{"role": "assistant", "tool_calls": [call("a"), call("a", "f")]}]},
            r"messages\[0\]\.tool_calls\[1\]\.id: 'a' is the id of an earlier call",
        ),
        (
            of_messages,
            {"messages": [CALLING, USER, {"role": "tool", "tool_call_id": "a", "content": "1"}]},
            r"messages\[2\]\.tool_call_id: 'a' is no call of the assistant's message before it",
        ),
        (of_kwargs, {"enable_thinking": "false"}, "enable_thinking: expected true or false"),
        (of_kwargs, {"enable_thinking": 0}, "enable_thinking: expected true or false"),
        (of_kwargs, {"reasoning_effort": ["low"]}, "reasoning_effort: expected text"),
        (of_variables, {"enable_thinking": True, "chat_template_kwargs": OFF}, "enable_thinking"),
        (of_variables, {"reasoning_effort": "low", "chat_template_kwargs": LITTLE}, "effort"),
        (of_limits, {"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens: max_completion_"),
        (of_limits, {"max_tokens": 0, "max_completion_tokens": 2}, "max_tokens: max_completion_"),
        (of_limits, {"max_tokens": "x", "max_completion_tokens": 2}, "max_tokens: max_completion"),
    ],
)
def test_what_would_have_no_effect_is_refused_by_name(
    reader: Any, body: dict[str, Any], words: str
) -> None:
    with pytest.raises(RequestInvalid, match=words):
        reader(body)


def test_what_clients_give_back_and_hints_are_taken() -> None:
    """The index of a streamed call, marks of caches, and empty fields say nothing new."""
    given = {**call("a"), "index": 0, "extra": None}
    part = {**TEXT, "cache_control": {"type": "ephemeral"}, "annotations": []}
    assert read([{"role": "assistant", "tool_calls": [given]}]) == read([CALLING])
    again = {**part, "id": "msg_1", "index": 0}
    assert read([{**USER, "content": [again]}]) == read([{**USER, "content": "x"}])
    assert read_stream_options({"stream_options": {"include_obfuscation": False}})
    hinted = blocks({**part, "citations": None}, {"type": "tool_result", "tool_use_id": "a"})
    assert of_anthropic(hinted)["messages"] == [
        {"role": "tool", "tool_call_id": "a", "content": ""},
        {"role": "user", "content": "x"},
    ]
    earlier = {
        "type": "message",
        "id": "msg_1",
        "status": "completed",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "A", "annotations": [], "logprobs": []}],
    }
    assert of_responses({"input": [earlier], "top_logprobs": 0})["messages"] == [
        {"role": "assistant", "content": "A"}
    ]


@pytest.mark.parametrize(
    ("make", "field", "message", "named"),
    [
        (Responses, "max_completion_tokens", "max_completion_tokens: 0 is", "max_output_tokens"),
        (Responses, "response_format", "response_format.type: expected", "text.format"),
        (Responses, "messages", "messages[0]: expected", "messages"),
        (Messages, "stop", "stop: expected", "stop_sequences"),
        (Messages, "enable_thinking", "enable_thinking: m does not think", "thinking"),
    ],
)
def test_errors_name_the_fields_of_the_clients_api(
    make: type[Api], field: str, message: str, named: str
) -> None:
    with pytest.raises(RequestInvalid) as refused, make({}).naming():
        raise RequestInvalid(message, field, "some_code")
    assert str(refused.value) == message.replace(field, named)
    assert (refused.value.param, refused.value.code) == (named, "some_code")


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (["a", "b" * 99], r"^prompt\[1\]: the prompt has \d+ tokens and the context 32"),
        ([[1], []], r"^prompt\[1\]: the prompt is empty"),
        ([[1], [9999]], r"^prompt\[1\]: token ids outside the vocabulary"),
        (["a", [1.5]], r"^prompt\[1\]: expected a text, or a list of token ids"),
        ([], "^the prompt is empty"),
        ([1, "a"], "^prompt: expected a text, or a list of token ids"),
        (None, "^prompt: expected a text, or a list of token ids"),
    ],
)
def test_the_prompt_that_is_wrong_is_named(prompt: Any, words: str) -> None:
    tokenizer, spec = Tokenizer.load(LLAMA), Checkpoint.open(LLAMA).spec
    deployment: Any = SimpleNamespace(tokenizer=tokenizer, spec=spec, context_tokens=32)
    with pytest.raises(RequestInvalid, match=words) as refused:
        completion_prompts(deployment, {"prompt": prompt})
    assert refused.value.param == "prompt"


def test_many_tools_calls_and_results_take_no_longer_than_few() -> None:
    """Comparing each with each, as was done, would take minutes, and hold up all other requests."""
    count = 60_000
    tools = [{**TOOL, "function": {"name": f"f{number}"}} for number in range(count)]
    chosen = [{"type": "function", "function": tool["function"]} for tool in tools]
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": chosen}}
    assert len(read_tools({"tools": tools, "tool_choice": allowed}).offered) == count
    calls = [call(f"c{number}") for number in range(count)]
    results = [
        {"role": "tool", "tool_call_id": item["id"], "content": item["id"]}
        for item in reversed(calls)
    ]
    messages = read([{"role": "assistant", "tool_calls": calls}, *results])
    assert [message["content"] for message in messages[1:4]] == ["c0", "c1", "c2"]


def test_variables_and_limits_that_agree_are_taken() -> None:
    assert of_variables({"enable_thinking": False, "chat_template_kwargs": OFF}) == OFF
    # As everywhere, null is nothing.
    assert of_kwargs({"enable_thinking": None, "documents": [1]}) == {"documents": [1]}
    assert of_kwargs(LITTLE) == LITTLE
    assert of_limits({"max_tokens": 3, "max_completion_tokens": 3}).max_tokens == 3
    assert of_limits({"max_tokens": 3, "max_completion_tokens": None}).max_tokens == 3


@pytest.mark.parametrize("token", ["05", "0" * 30 + "99999", "00", "+5", " 5", "\u0665"])
def test_a_biased_token_has_one_name(token: str) -> None:
    """Zeros hid how large a number is, and a bias of "5" was lost beside one of "05"."""
    with pytest.raises(RequestInvalid, match="is no token id of this model"):
        read_logit_bias({"logit_bias": {token: 1}}, 307)
    assert read_logit_bias({"logit_bias": {"0": 1, "306": 2}}, 307) == ((0, 1.0), (306, 2.0))


def test_bounds_are_told_exactly_and_values_shortly() -> None:
    with pytest.raises(RequestInvalid, match="seed: 9223372036854775808 is not between -9223372"):
        number({"seed": 1 << 63}, "seed", 0, -(1 << 63), (1 << 63) - 1, whole=True)
    with pytest.raises(RequestInvalid) as refused:
        number({"n": 10**900}, "n", 1, 1, 128, whole=True)
    assert len(str(refused.value)) < 100
    with pytest.raises(RequestInvalid, match=r"3 is not between 0\.1 and 2"):
        number({"x": 3}, "x", 1, 0.1, 2)


def test_best_of_is_a_number() -> None:
    with pytest.raises(RequestInvalid, match="best_of: expected a whole number"):
        read_choices({"best_of": True}, 1)
    assert read_choices({"best_of": 2, "n": 2}, 1) == 2
