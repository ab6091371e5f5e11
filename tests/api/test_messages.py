"""Messages go to the chat template whole, or are refused by the name of what it leaves out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from api.formats.tool_format import find_format
from api.openai.messages import TemplateTraits, read_messages, with_texts_apart
from api.openai.responses_input import chat_request as of_responses
from api.openai.tools import read_tools
from model.errors import FieldsUnused
from model.template_values import WatchedMessage
from model.tokenizer import ChatTemplate
from planning.errors import RequestInvalid
from tests.compare_templates import TEMPLATES

PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
CALLING = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<{{ c.function | tojson }}>{% endfor %}{% endfor %}"
    "{# <tool_call></tool_call> #}"
)


def call(call_id: str, name: str = "now", arguments: Any = "{}") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def read(messages: Any, template: str = PLAIN) -> list[WatchedMessage]:
    return read_messages(messages, TemplateTraits(find_format(template), template))


def render(messages: Any, template: str = PLAIN, **variables: Any) -> str:
    values: Mapping[str, Any] = {"messages": read(messages, template), **variables}
    return ChatTemplate(template, Path("t")).render(values)


USER = {"role": "user", "content": "Hi"}


def test_parts_of_text_are_joined_and_null_is_empty() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert render([{"role": "user", "content": parts}, {"role": "assistant", "content": None}]) == (
        "[user]ab[assistant]"
    )


@pytest.mark.parametrize(
    ("message", "place"),
    [
        ({"role": "user", "content": "Hi", "name": "Ann"}, "messages[1].name"),
        ({"role": "assistant", "content": "", "tool_calls": [call("a")]}, "messages[1].tool_calls"),
        ({"role": "assistant", "content": "x", "reasoning_content": "y"}, "messages[1].reasoning"),
        ({"role": "assistant", "content": "x", "refusal": "No."}, "messages[1].refusal"),
        ({"role": "user", "content": "Hi", "surprise": 1}, "messages[1].surprise"),
    ],
)
def test_what_the_template_does_not_read_is_named(message: dict[str, Any], place: str) -> None:
    with pytest.raises(FieldsUnused) as refused:
        render([USER, message])
    assert refused.value.fields[0].startswith(place)
    assert place in str(refused.value)


def test_a_role_that_the_template_leaves_out_is_named() -> None:
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    assert render([USER], template) == "Hi"
    with pytest.raises(FieldsUnused, match=r"messages\[1\]\.content"):
        render([USER, {"role": "critic", "content": "Bad."}], template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | tojson }}",
        "{{ messages }}",
        "{% for m in messages %}{% for k, v in m.items() %}{{ k }}{{ v }}{% endfor %}{% endfor %}",
        "{% for m in messages %}{{ m | tojson(indent=2) }}{% endfor %}",
        "{% for m in messages %}{{ m['content'] }}{{ m.get('name') }}{% endfor %}",
        "{{ messages | map(attribute='content') | join }}{{ messages[0].name }}",
        "{{ dict(messages[0], role='x') }}",
        "{% for m in messages %}{{ m.copy()['content'] ~ m.copy().name }}{% endfor %}",
        "{{ messages[0] | string }}{{ '%s' % messages[0] }}",
    ],
)
def test_a_template_may_read_in_any_way(template: str) -> None:
    assert "Ann" in render([{"role": "user", "content": "Hi", "name": "Ann"}], template)


def test_fields_without_a_value_say_nothing() -> None:
    empty: dict[str, Any] = {
        "name": None,
        "refusal": None,
        "tool_calls": [],
        "audio": None,
        "annotations": [],
    }
    assert render([{**USER, **empty}]) == "[user]Hi"


def test_calls_have_objects_as_arguments() -> None:
    messages = [
        {"role": "assistant", "tool_calls": [call("a", "f", '{"x": "ü"}'), call("b", "f", "{")]},
        {"role": "tool", "tool_call_id": "a", "content": "1"},
        {"role": "tool", "tool_call_id": "b", "name": "f", "content": "2"},
    ]
    assert render(messages, CALLING) == (
        '[assistant]<{"name": "f", "arguments": {"x": "ü"}}><{"name": "f", "arguments": "{"}>'
        "[tool]1[tool]2"
    )


def test_half_a_character_in_a_models_call_ends_no_conversation() -> None:
    """A client gives back what it got. No template may write text that no tokenizer takes."""
    calls = [call("a", "f", '{"x": "\\ud83d"}')]
    result = {"role": "tool", "tool_call_id": "a", "content": "1"}
    text = render([USER, {"role": "assistant", "tool_calls": calls}, result], CALLING)
    assert '{"x": "\N{REPLACEMENT CHARACTER}"}' in text


def test_results_come_in_the_order_of_their_calls() -> None:
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [call("a"), call("b"), call("c")]},
        {"role": "tool", "tool_call_id": "c", "content": "3"},
        {"role": "tool", "tool_call_id": "a", "content": "1"},
        {"role": "tool", "tool_call_id": "b", "content": "2"},
        USER,
    ]
    assert [message["content"] for message in read(messages, CALLING)[1:]] == ["1", "2", "3", "Hi"]


def test_formats_with_single_calls_get_one_call_a_message() -> None:
    template = "ipython '\"parameters\": '"
    messages = [
        {"role": "assistant", "content": "Both.", "tool_calls": [call("a"), call("b")]},
        {"role": "tool", "tool_call_id": "b", "content": "2"},
        {"role": "tool", "tool_call_id": "a", "content": "1"},
    ]
    shown = [
        message.get("content") or [item["id"] for item in message["tool_calls"]]
        for message in read(messages, template)
    ]
    assert shown == ["Both.", ["a"], "1", ["b"], "2"]


def test_ids_become_those_that_mistrals_templates_demand() -> None:
    messages = [
        {"role": "assistant", "tool_calls": [call("call_of_another_model"), call("abcdef123")]},
        {"role": "tool", "tool_call_id": "abcdef123", "content": "2"},
        {"role": "tool", "tool_call_id": "call_of_another_model", "content": "1"},
    ]
    assistant, first, second = read(messages, "[TOOL_CALLS][")
    ids = [item["id"] for item in assistant["tool_calls"]]
    assert ids == [first["tool_call_id"], second["tool_call_id"]]
    assert (first["content"], second["content"], ids[1]) == ("1", "2", "abcdef123")
    assert all(len(found) == 9 and found.isalnum() for found in ids)


def test_text_that_a_template_leaves_out_beside_calls_gets_a_message() -> None:
    template = (
        "{% for m in messages %}{% if m.tool_calls %}<{{ m.tool_calls | length }}>"
        "{% else %}[{{ m.content }}]{% endif %}{% endfor %}"
    )
    message = {"role": "assistant", "content": "I look.", "tool_calls": [call("a"), call("b")]}
    with pytest.raises(FieldsUnused) as unused:
        render([USER, message], template)
    apart = with_texts_apart(read([USER, message], template), unused.value.fields)
    assert ChatTemplate(template, Path("t")).render({"messages": apart}) == "[Hi][I look.]<2>"
    named = read([{**USER, "name": "Ann"}], template)
    assert with_texts_apart(named, ["messages[0].name"]) is None


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (None, "at least one message"),
        ([], "at least one message"),
        ([{"content": "x"}], r"messages\[0\]: each of the messages needs a role"),
        ([{"role": "user"}], r"messages\[0\]: it needs content"),
        ([{"role": "user", "content": 3}], r"messages\[0\]\.content: expected text"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            r"messages\[0\]\.content\[0\]: only text content is supported, not 'image_url'",
        ),
        ([{"role": "user", "content": "", "tool_calls": [call("a")]}], "only the assistant calls"),
        ([{"role": "assistant", "tool_calls": [{"id": "a"}]}], r"tool_calls\[0\]: expected a call"),
        ([{"role": "tool", "content": "x"}], r"messages\[0\]\.tool_call_id: 'None' is no call"),
        (
            [
                {"role": "assistant", "tool_calls": [call("a")]},
                {"role": "tool", "tool_call_id": "a", "name": "other", "content": "x"},
            ],
            r"messages\[1\]\.name: the call 'a' is of 'now'",
        ),
    ],
)
def test_malformed_messages_are_refused_by_their_place(messages: Any, words: str) -> None:
    with pytest.raises(RequestInvalid, match=words):
        read(messages)


def test_old_thoughts_go_where_the_template_takes_them() -> None:
    message = {"role": "assistant", "content": "4", "reasoning_content": "So."}
    assert read([message], "reasoning_content </think>")[0]["reasoning_content"] == "So."
    assert read([message], "<think></think>")[0]["content"] == "<think>\nSo.\n</think>\n\n4"
    harmony = "<|channel|> functions. thinking"
    assert read([message], harmony)[0]["thinking"] == "So."
    calling = {**message, "tool_calls": [call("a")]}
    (only,) = read([calling], harmony)
    assert (only["thinking"], only["content"]) == ("So.\n\n4", "")


def test_developers_are_the_system_where_the_template_knows_none() -> None:
    message = {"role": "developer", "content": "x"}
    assert render([message]) == "[system]x"
    assert render([message], PLAIN + "{# developer #}") == "[developer]x"


def test_real_styles_of_templates_take_whole_conversations() -> None:
    """The project's own templates, in the styles of well-known models."""
    conversation = [
        {"role": "system", "content": "Use tools."},
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": None, "tool_calls": [call("abcdef123")]},
        {"role": "tool", "tool_call_id": "abcdef123", "content": "noon"},
    ]
    text = (TEMPLATES / "thinking.jinja").read_text()
    prompt = render(conversation, text, tools=None, add_generation_prompt=True)
    assert '<tool_call>\n{"name": "now", "arguments": {}}' in prompt
    assert "noon" in prompt


# ---- tools --------------------------------------------------------------------------------------

FUNCTION = {"name": "f", "parameters": {"type": "object"}, "strict": True}
TOOL = {"type": "function", "function": FUNCTION}


def test_tools_are_read_and_chosen() -> None:
    other = {"type": "function", "function": {"name": "g"}}
    body = {"tools": [TOOL, other]}
    assert read_tools(body).names == ("f", "g")
    assert read_tools(body).offered[0].strict
    assert "strict" not in json.dumps(read_tools(body).offered[0].to_json())
    assert read_tools({**body, "tool_choice": "none"}).names == ()
    assert read_tools({**body, "tool_choice": "required"}).required
    named = read_tools({**body, "tool_choice": {"type": "function", "function": {"name": "g"}}})
    assert (named.names, named.required) == (("g",), True)
    allowed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "f"}}]}
    some = read_tools({**body, "tool_choice": {"type": "allowed_tools", "allowed_tools": allowed}})
    assert (some.names, some.required) == (("f",), False)
    assert not read_tools({**body, "parallel_tool_calls": False}).parallel


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"tools": {}}, "tools: expected a list"),
        ({"tools": [{"type": "web_search"}]}, "only tools of the type function"),
        ({"tools": [{"type": "function"}]}, r"tools\[0\]\.function: expected an object"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "name: expected"),
        ({"tools": [{"type": "function", "function": {**FUNCTION, "x": 1}}]}, "unknown field 'x'"),
        ({"tools": [TOOL, TOOL]}, "two tools have the name 'f'"),
        ({"tool_choice": "required"}, "no tools to choose from"),
        ({"tools": [TOOL], "tool_choice": "some"}, "tool_choice: expected none, auto"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "no tool has the name 'g'",
        ),
    ],
)
def test_malformed_tools_are_refused(body: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestInvalid, match=words):
        read_tools(body)


# ---- responses ----------------------------------------------------------------------------------


def test_items_of_a_response_are_the_messages_of_a_chat() -> None:
    items: Sequence[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "input_text", "text": "Time?"}]},
        {"type": "reasoning", "id": "r", "summary": [], "content": [{"text": "Hm."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "A"}]},
        {"type": "function_call", "call_id": "a", "name": "now", "arguments": "{}", "id": "fc"},
        {"type": "function_call_output", "call_id": "a", "output": "noon"},
    ]
    chat = of_responses({"input": items, "instructions": "Be brief."})
    assistant = {"role": "assistant", "content": "A", "reasoning_content": "Hm."}
    assert chat["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Time?"},
        {**assistant, "tool_calls": [call("a")]},
        {"role": "tool", "tool_call_id": "a", "content": "noon"},
    ]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"input": "x", "previous_response_id": "resp_1"}, "previous_response_id is not supported"),
        ({"input": []}, "input: expected text"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "'item_reference' are not supported"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "not 'web_search'"),
        ({"input": "x", "include": ["file_search_call.results"]}, "include: only"),
        ({"input": "x", "surprise": 1}, "unknown field 'surprise'"),
    ],
)
def test_a_response_that_needs_what_is_not_here_is_refused(body: Any, words: str) -> None:
    with pytest.raises(RequestInvalid, match=words):
        of_responses(body)
