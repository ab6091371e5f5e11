"""Chats whose answers must call a tool or keep to a format, in every format of calls."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest

from tests.system.scripted import ScriptedCluster, say

PLACE = {
    "type": "object",
    "properties": {"place": {"enum": ["Köln", "Ulm"]}},
    "required": ["place"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": PLACE}},
    {"type": "function", "function": {"name": "stop_all"}},
]
SCHEMA = {
    "type": "object",
    "properties": {"mood": {"enum": ["good", "bad"]}, "count": {"type": "integer", "maximum": 9}},
    "required": ["mood", "count"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "mood", "schema": SCHEMA}}


HARMONY = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
"""A model of this format thinks, and only the model can end its thoughts."""


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedCluster]:
    cluster = ScriptedCluster(tmp_path_factory.mktemp("scripted"))
    try:
        yield cluster
    finally:
        cluster.stop()


def chat(cluster: ScriptedCluster, script: str, **body: Any) -> Any:
    """The choice that a chat gets of a model that would say ``script`` if it might."""
    request = {
        "messages": [{"role": "user", "content": say(script)}],
        "temperature": 0,
        "max_tokens": 1500,
        **body,
    }
    url = f"{cluster.url}/v1/chat/completions"
    answer = httpx.post(url, json=request, timeout=60, trust_env=False)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


@pytest.mark.parametrize("kind", ["hermes", "llama", "mistral", "harmony"])
def test_a_call_is_made_whatever_the_model_would_say(scripted: ScriptedCluster, kind: str) -> None:
    scripted.serve(kind)
    for script in ("I would rather talk.", "{", ""):
        for choice, names in (
            ("required", {"weather", "stop_all"}),
            ({"type": "function", "function": {"name": "weather"}}, {"weather"}),
        ):
            says = HARMONY + script if kind == "harmony" else script
            found = chat(scripted, says, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False)
            assert found["finish_reason"] == "tool_calls", found
            (call,) = found["message"]["tool_calls"]
            assert call["function"]["name"] in names
            arguments = json.loads(call["function"]["arguments"])
            if call["function"]["name"] == "weather":
                jsonschema.validate(arguments, PLACE)


@pytest.mark.parametrize("kind", ["hermes", "llama", "mistral", "harmony", "plain"])
def test_an_answer_keeps_to_its_format_with_and_without_tools(
    scripted: ScriptedCluster, kind: str
) -> None:
    scripted.serve(kind)
    offers: list[dict[str, Any]] = [{}] if kind == "plain" else [{}, {"tools": TOOLS}]
    for extra in offers:
        says = HARMONY if kind == "harmony" else "No JSON today."
        found = chat(scripted, says, response_format=FORMAT, **extra)
        if found["finish_reason"] == "tool_calls":
            assert extra
            continue
        assert found["finish_reason"] == "stop", found
        jsonschema.validate(json.loads(found["message"]["content"]), SCHEMA)


def test_thoughts_come_before_a_format(scripted: ScriptedCluster) -> None:
    scripted.serve("hermes")
    answer = '{"mood":"bad","count":3}'
    found = chat(
        scripted, f"<think>\nHm, {{not json}}.\n</think>\n\n{answer}", response_format=FORMAT
    )
    assert found["message"]["content"] == answer
    assert found["message"]["reasoning_content"].strip() == "Hm, {not json}."


def test_the_logprobs_of_a_chat_are_in_openais_form(scripted: ScriptedCluster) -> None:
    scripted.serve("plain")
    found = chat(scripted, "Aé", logprobs=True, top_logprobs=2)
    content = found["logprobs"]["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode("latin-1")
    assert [entry["token"] for entry in content][:1] == ["A"]
    for entry in content:
        assert entry["top_logprobs"][0]["token"] == entry["token"]
        assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] <= 0
        assert len(entry["top_logprobs"]) == 2
    assert chat(scripted, "A")["logprobs"] is None
