"""Tools, thoughts and the other APIs, through real processes and a model that plays a script."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.system.scripted import CONTEXT_TOKENS, ScriptedCluster, say

SCHEMA = {"type": "object", "properties": {"place": {"type": "string"}}}
WEATHER = {
    "name": "get_weather",
    "description": "The weather of a place.",
    "parameters": SCHEMA,
}
TOOLS: list[Any] = [{"type": "function", "function": WEATHER}]
ARGUMENTS = '{"place": "Köln"}'
HERMES = f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
THOUGHTS = "<think>\nHm.\n</think>\n\n"
CALLS = {
    "hermes": HERMES,
    "llama": f'<|python_tag|>{{"name": "get_weather", "parameters": {ARGUMENTS}}}',
    "mistral": f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {ARGUMENTS}}}]',
    "harmony": (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary "
        f"to=functions.get_weather <|constrain|>json<|message|>{ARGUMENTS}<|call|>"
    ),
}


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedCluster]:
    cluster = ScriptedCluster(tmp_path_factory.mktemp("scripted"))
    try:
        cluster.serve("hermes")
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def client(scripted: ScriptedCluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{scripted.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def user(*steps: str) -> Any:
    return {"role": "user", "content": say(*steps)}


def post(cluster: ScriptedCluster, path: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(cluster.url + path, json=body, timeout=60, trust_env=False)


def events(cluster: ScriptedCluster, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The data of a stream's events. Each must have its type in the line before."""
    found, kind = [], ""
    with httpx.stream("POST", cluster.url + path, json=body, timeout=60, trust_env=False) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith("event: "):
                kind = line.removeprefix("event: ")
            if line.startswith("data: "):
                found.append(json.loads(line.removeprefix("data: ")))
                assert found[-1]["type"] == kind
    return found


def test_a_tool_is_called_and_its_result_goes_back(client: openai.OpenAI) -> None:
    messages: list[Any] = [user(f"{THOUGHTS}I look.\n{HERMES}", "It is sunny.")]
    first = client.chat.completions.create(model="hermes", messages=messages, tools=TOOLS)
    choice = first.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look."
    assert choice.message.model_extra == {"reasoning_content": "Hm."}
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert (call.function.name, call.function.arguments) == ("get_weather", ARGUMENTS)
    assert first.usage is not None
    assert first.usage.completion_tokens_details is not None
    assert first.usage.completion_tokens_details.reasoning_tokens
    messages += [
        choice.message.model_dump(),
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    second = client.chat.completions.create(model="hermes", messages=messages, tools=TOOLS)
    assert second.choices[0].message.content == "It is sunny."
    assert second.choices[0].finish_reason == "stop"


def test_a_streamed_call_adds_up_to_the_whole_one(client: openai.OpenAI) -> None:
    text, thoughts, arguments, names, finish = "", "", "", [], None
    for chunk in client.chat.completions.create(
        model="hermes",
        messages=[user(f"{THOUGHTS}I look.\n{HERMES}")],
        tools=TOOLS,
        stream=True,
    ):
        (choice,) = chunk.choices
        text += choice.delta.content or ""
        thoughts += (choice.delta.model_extra or {}).get("reasoning_content") or ""
        for call in choice.delta.tool_calls or []:
            assert call.index == 0
            assert call.function is not None
            names += [call.function.name] if call.function.name else []
            arguments += call.function.arguments or ""
        finish = choice.finish_reason or finish
    assert (text, thoughts, names) == ("I look.", "Hm.", ["get_weather"])
    assert (arguments, finish) == (ARGUMENTS, "tool_calls")


def test_without_parallel_calls_the_first_call_ends_the_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="hermes",
        messages=[user(f"{HERMES}\n{HERMES}")],
        tools=TOOLS,
        parallel_tool_calls=False,
    )
    assert len(answer.choices[0].message.tool_calls or []) == 1
    assert answer.choices[0].finish_reason == "tool_calls"
    both = client.chat.completions.create(
        model="hermes", messages=[user(f"{HERMES}\n{HERMES}")], tools=TOOLS
    )
    assert len(both.choices[0].message.tool_calls or []) == 2
    assert answer.usage is not None
    assert both.usage is not None
    assert answer.usage.completion_tokens < both.usage.completion_tokens


def test_strict_tools_leave_thoughts_and_text_free(client: openai.OpenAI) -> None:
    closed = {**SCHEMA, "additionalProperties": False}
    strict: Any = {**WEATHER, "strict": True, "parameters": closed}
    wrong = HERMES.replace("place", "plac3")
    answer = client.chat.completions.create(
        model="hermes",
        messages=[user(f"{THOUGHTS}I look {{.\n{HERMES}\n{wrong}", "It is sunny {.")],
        tools=[{"type": "function", "function": strict}],
    )
    message = answer.choices[0].message
    assert (message.content, message.model_extra) == ("I look {.", {"reasoning_content": "Hm."})
    first, second = message.tool_calls or []
    assert first.type == second.type == "function"
    assert first.function.arguments == ARGUMENTS
    assert json.loads(second.function.arguments).keys() <= {"place"}


def test_a_model_can_be_told_not_to_think(scripted: ScriptedCluster) -> None:
    chat = {"messages": [{"role": "user", "content": "Hi"}]}

    def prompt(**fields: Any) -> str:
        answer = post(scripted, "/apply-template", {**chat, **fields})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["prompt"])

    assert "<think>" not in prompt()
    for off in (
        {"enable_thinking": False},
        {"reasoning_effort": "none"},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ):
        assert prompt(**off).endswith("<think>\n\n</think>\n\n")
    refused = post(scripted, "/apply-template", {**chat, "chat_template_kwargs": {"mood": 1}})
    assert refused.status_code == 400
    assert "no variable 'mood'" in refused.json()["error"]["message"]


def test_thoughts_may_stay_in_the_text(scripted: ScriptedCluster) -> None:
    body = {"messages": [user(f"{THOUGHTS}4")], "reasoning_format": "none"}
    answer = post(scripted, "/v1/chat/completions", body).json()
    assert answer["choices"][0]["message"]["content"] == f"{THOUGHTS}4"


def test_fields_that_are_left_out_are_refused_by_name(scripted: ScriptedCluster) -> None:
    body = {"messages": [{"role": "user", "content": "Hi", "name": "Ann"}]}
    answer = post(scripted, "/v1/chat/completions", body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["message"].startswith("messages[0].name: the chat template of hermes has no place")
    assert (error["type"], error["param"]) == ("invalid_request_error", "messages")


# ---- /v1/responses ------------------------------------------------------------------------------


def test_responses_have_items(client: openai.OpenAI) -> None:
    tools: list[Any] = [{"type": "function", "strict": None, **WEATHER}]
    ask = say(f"{THOUGHTS}I look.\n{HERMES}", "It is sunny.")
    first = client.responses.create(model="hermes", input=ask, tools=tools)
    assert first.status == "completed"
    assert [item.type for item in first.output] == ["reasoning", "message", "function_call"]
    assert first.output_text == "I look."
    call = first.output[2]
    assert call.type == "function_call"
    assert (call.name, call.arguments) == ("get_weather", ARGUMENTS)
    given: list[Any] = [
        {"role": "user", "content": ask},
        *[item.model_dump() for item in first.output],
        {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"},
    ]
    second = client.responses.create(model="hermes", input=given, tools=tools, instructions="Hm.")
    assert second.output_text == "It is sunny."
    assert second.usage is not None
    assert second.usage.output_tokens == len("It is sunny.")


def test_a_streamed_response_ends_with_the_whole_one(client: openai.OpenAI) -> None:
    tools: list[Any] = [{"type": "function", "strict": None, **WEATHER}]
    ask = say(f"{THOUGHTS}I look.\n{HERMES}")
    with client.responses.stream(model="hermes", input=ask, tools=tools) as stream:
        seen = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    assert final.output_text == "I look."
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
    arguments = [e.delta for e in seen if e.type == "response.function_call_arguments.delta"]
    assert "".join(arguments) == ARGUMENTS


def test_a_response_that_is_cut_off_is_incomplete(client: openai.OpenAI) -> None:
    answer = client.responses.create(
        model="hermes", input=say("A long answer"), max_output_tokens=4
    )
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.output_text == "A lo"


# ---- /v1/messages -------------------------------------------------------------------------------


ANTHROPIC_TOOLS = [
    {
        "name": "get_weather",
        "description": "The weather of a place.",
        "input_schema": WEATHER["parameters"],
    }
]


def test_messages_have_blocks(scripted: ScriptedCluster) -> None:
    ask: dict[str, Any] = {
        "model": "hermes",
        "max_tokens": 500,
        "system": [{"type": "text", "text": "Be brief."}],
        "tools": ANTHROPIC_TOOLS,
        "messages": [user(f"{THOUGHTS}I look.\n{HERMES}", "It is sunny.")],
    }
    first = post(scripted, "/v1/messages", ask).json()
    assert first["stop_reason"] == "tool_use"
    thinking, text, use = first["content"]
    assert thinking["thinking"] == "Hm."
    assert text == {"type": "text", "text": "I look."}
    assert (use["type"], use["name"], use["input"]) == (
        "tool_use",
        "get_weather",
        {"place": "Köln"},
    )
    result = {"type": "tool_result", "tool_use_id": use["id"], "content": "sunny"}
    ask["messages"] += [
        {"role": "assistant", "content": first["content"]},
        {"role": "user", "content": [result]},
    ]
    second = post(scripted, "/v1/messages", ask).json()
    assert second["content"] == [{"type": "text", "text": "It is sunny."}]
    assert second["stop_reason"] == "end_turn"
    counted = post(
        scripted, "/v1/messages/count_tokens", {k: v for k, v in ask.items() if k != "max_tokens"}
    )
    usage = second["usage"]
    cached = usage["cache_read_input_tokens"]
    assert counted.json() == {"input_tokens": usage["input_tokens"] + cached}
    assert cached > first["usage"]["input_tokens"] / 2


def test_streamed_messages_add_up_to_the_whole_one(scripted: ScriptedCluster) -> None:
    ask = {
        "model": "hermes",
        "max_tokens": 500,
        "stream": True,
        "tools": ANTHROPIC_TOOLS,
        "messages": [user(f"{THOUGHTS}I look.\n{HERMES}")],
    }
    found = events(scripted, "/v1/messages", ask)
    assert found[0]["type"] == "message_start"
    assert [event["type"] for event in found[-2:]] == ["message_delta", "message_stop"]
    assert found[-2]["delta"]["stop_reason"] == "tool_use"
    starts = [event for event in found if event["type"] == "content_block_start"]
    assert [event["content_block"]["type"] for event in starts] == ["thinking", "text", "tool_use"]
    assert [event["index"] for event in starts] == [0, 1, 2]
    deltas = [event["delta"] for event in found if event["type"] == "content_block_delta"]
    assert "".join(delta.get("partial_json", "") for delta in deltas) == ARGUMENTS
    assert "".join(delta.get("text", "") for delta in deltas) == "I look."


def test_errors_of_messages_are_anthropics(scripted: ScriptedCluster) -> None:
    answer = post(scripted, "/v1/messages", {"model": "hermes", "messages": [user("x")]})
    assert answer.status_code == 400
    assert answer.json() == {
        "type": "error",
        "error": {
            "type": "invalid_request_error",
            "message": "max_tokens: expected a whole number",
        },
    }


def test_a_stop_sequence_is_told(scripted: ScriptedCluster) -> None:
    ask = {"model": "hermes", "max_tokens": 50, "messages": [user("one two three")]}
    answer = post(scripted, "/v1/messages", {**ask, "stop_sequences": [" two"]}).json()
    assert answer["content"] == [{"type": "text", "text": "one"}]
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", " two")
    several = post(
        scripted, "/v1/messages", {**ask, "stop_sequences": ["x", "two", "one t"]}
    ).json()
    assert several["content"] == [{"type": "text", "text": ""}]
    assert (several["stop_reason"], several["stop_sequence"]) == ("stop_sequence", "one t")


# ---- texts --------------------------------------------------------------------------------------


def test_texts_become_tokens_and_back(scripted: ScriptedCluster) -> None:
    tokens = post(scripted, "/tokenize", {"content": "Hé"}).json()["tokens"]
    assert tokens == list("Hé".encode())
    assert post(scripted, "/detokenize", {"tokens": tokens}).json()["content"] == "Hé"
    with_bos = post(scripted, "/tokenize", {"prompt": "Hé", "return_token_strs": True}).json()
    assert with_bos["tokens"] == [256, *tokens]
    assert with_bos["token_strs"][:2] == ["<s>", "H"]
    pieces = post(scripted, "/tokenize", {"content": "Hi", "with_pieces": True}).json()["tokens"]
    assert pieces[0] == {"id": 72, "piece": "H"}
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    # Each of <s> and </s> is one token.
    counted = post(scripted, "/tokenize", chat).json()["count"]
    assert counted == len("[user\nHi]\n[assistant\n")


def test_a_model_tells_its_context(client: openai.OpenAI) -> None:
    model = client.models.retrieve("hermes")
    assert model.id == "hermes"
    assert (model.model_extra or {})["context_length"] == CONTEXT_TOKENS
    with pytest.raises(openai.NotFoundError, match="'other' is not loaded"):
        client.models.retrieve("other")


def test_a_model_that_generates_gives_no_embeddings(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="hermes generates text: load a model that"):
        client.embeddings.create(model="hermes", input="x")


# ---- other formats: these load other models, so they come last ----------------------------------


@pytest.mark.parametrize("kind", ["llama", "mistral", "harmony"])
def test_each_format_of_calls_is_read(
    scripted: ScriptedCluster, client: openai.OpenAI, kind: str
) -> None:
    scripted.serve(kind)
    answer = client.chat.completions.create(model=kind, messages=[user(CALLS[kind])], tools=TOOLS)
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert (call.function.name, call.function.arguments) == ("get_weather", ARGUMENTS)
    thought = (answer.choices[0].message.model_extra or {}).get("reasoning_content")
    assert thought == ("Hm." if kind == "harmony" else None)
    # Required calls have no tag before them, and this model ends by its own token.
    said = CALLS[kind].removeprefix("<|python_tag|>").removesuffix("<|call|>")
    required = client.chat.completions.create(
        model=kind, messages=[user(said)], tools=TOOLS, tool_choice="required"
    )
    (call,) = required.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert (call.function.name, call.function.arguments) == ("get_weather", ARGUMENTS)

    # A strict tool's arguments fit its schema, whatever the model would say.
    strict: Any = {
        **WEATHER,
        "strict": True,
        "parameters": {**SCHEMA, "additionalProperties": False},
    }
    kept = client.chat.completions.create(
        model=kind,
        messages=[user(said.replace("place", "plac3"))],
        tools=[{"type": "function", "function": strict}],
    )
    (call,) = kept.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert json.loads(call.function.arguments).keys() <= {"place"}


def test_a_template_without_tools_takes_none(
    scripted: ScriptedCluster, client: openai.OpenAI
) -> None:
    scripted.serve("plain")
    with pytest.raises(openai.BadRequestError, match="the chat template of plain takes none"):
        client.chat.completions.create(model="plain", messages=[user("x")], tools=TOOLS)
    with pytest.raises(openai.BadRequestError, match="plain does not think"):
        client.chat.completions.create(
            model="plain", messages=[user("x")], extra_body={"enable_thinking": True}
        )
    quiet = client.chat.completions.create(
        model="plain", messages=[user("4")], extra_body={"enable_thinking": False}
    )
    assert quiet.choices[0].message.content == "4"
