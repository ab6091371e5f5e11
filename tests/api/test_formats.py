"""Answers are read alike wherever their stream is cut."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import llguidance
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.formats.json_call import read_object
from api.formats.parts import Arguments, CallBegins, Parser, Part, Text, Thought
from api.formats.tool_format import THINK, ToolFormat, find_format

WEATHER = {"type": "object", "properties": {"place": {"type": "string"}, "days": {}}}


@dataclass(frozen=True)
class Tool:
    name: str
    parameters: dict[str, Any] = field(default_factory=dict)
    strict: bool = False


TOOLS = (Tool("get_weather", WEATHER), Tool("now"))

Read = list[tuple[str, ...]]


def read(parser: Parser, pieces: Iterable[str]) -> Read:
    """The parts of an answer, with texts that follow each other joined."""
    parts: list[Part] = []
    for piece in pieces:
        parts += parser.feed(piece)
    parts += parser.finish()
    found: list[list[str]] = []
    for part in parts:
        match part:
            case Text(text) | Thought(text):
                assert text
                kind = type(part).__name__
                if found and found[-1][0] == kind:
                    found[-1][1] += text
                else:
                    found.append([kind, text])
            case CallBegins(index, id, name):
                assert id
                found.append(["Call", str(index), name, ""])
            case Arguments(index, text):
                assert found[-1][:2] == ["Call", str(index)]
                found[-1][3] += text
    return [tuple(item) for item in found]


def call(index: int, name: str, arguments: str) -> tuple[str, ...]:
    return ("Call", str(index), name, arguments)


HERMES, THINKING = ToolFormat("hermes", None), ToolFormat("hermes", THINK)
CODER, LLAMA = ToolFormat("qwen-coder", None), ToolFormat("llama", None)
MISTRAL, NAMED = ToolFormat("mistral", None), ToolFormat("mistral-named", None)
HARMONY = ToolFormat("harmony", None)
PARIS = '{"place": "Paris {\\"[]", "days": [1, {"a": "}"}]}'

CASES: dict[str, tuple[ToolFormat, str, Read]] = {
    "only text": (HERMES, " It is <b>4</b>.\n\n", [("Text", " It is <b>4</b>.\n\n")]),
    "nothing": (HERMES, "", []),
    "one call": (
        HERMES,
        f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>',
        [call(0, "get_weather", PARIS)],
    ),
    "text and two calls": (
        HERMES,
        "I look.\n\n"
        f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>\n'
        '<tool_call>{"name":"now","arguments":{}}</tool_call>\n',
        [("Text", "I look."), call(0, "get_weather", PARIS), call(1, "now", "{}")],
    ),
    "text after a call": (
        HERMES,
        '<tool_call>{"name": "now", "arguments": {}}</tool_call>\nDone. ',
        [call(0, "now", "{}"), ("Text", "\nDone.")],
    ),
    "arguments first": (
        HERMES,
        '<tool_call>{"arguments": {"place": "}"}, "name": "get_weather"}</tool_call>',
        [call(0, "get_weather", '{"place": "}"}')],
    ),
    "no arguments, null and a string": (
        HERMES,
        '<tool_call>{"name": "now"}</tool_call><tool_call>{"name": "now", "arguments": null}'
        '</tool_call><tool_call>{"name": "now", "arguments": "{\\"a\\": 1}"}</tool_call>',
        [call(0, "now", "{}"), call(1, "now", "{}"), call(2, "now", '{"a": 1}')],
    ),
    "an unknown tool is text": (
        HERMES,
        'So: <tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        [("Text", 'So: <tool_call>{"name": "rm", "arguments": {}}</tool_call>')],
    ),
    "no JSON is text, and a later call is read": (
        HERMES,
        '<tool_call>now()</tool_call> <tool_call>{"name": "now", "arguments": {}}</tool_call>',
        [("Text", "<tool_call>now()</tool_call>"), call(0, "now", "{}")],
    ),
    "broken JSON is text": (
        HERMES,
        '<tool_call>{"name": "now", arguments: {}}</tool_call>',
        [("Text", '<tool_call>{"name": "now", arguments: {}}</tool_call>')],
    ),
    "an answer that is cut off in its arguments": (
        HERMES,
        '<tool_call>{"name": "get_weather", "arguments": {"place": "Par',
        [call(0, "get_weather", '{"place": "Par')],
    ),
    "an answer that is cut off in a name": (
        HERMES,
        'Hm.\n<tool_call>{"name": "get_wea',
        [("Text", 'Hm.\n<tool_call>{"name": "get_wea')],
    ),
    "an answer that is cut off in a mark": (HERMES, "Hm. <tool_", [("Text", "Hm. <tool_")]),
    "thoughts": (
        THINKING,
        "<think>\nTwo and two.\n\nSo 4.\n</think>\n\n 4 ",
        [("Thought", "Two and two.\n\nSo 4."), ("Text", "4 ")],
    ),
    "thoughts and a call": (
        THINKING,
        '<think>\nLook.</think>\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        [("Thought", "Look."), call(0, "now", "{}")],
    ),
    "empty thoughts": (THINKING, "<think>\n\n</think>\n\nHi", [("Text", "Hi")]),
    "thoughts that are cut off": (THINKING, "<think>\nTwo </th", [("Thought", "Two </th")]),
    "no thoughts": (THINKING, "\nI <think> so.", [("Text", "\nI <think> so.")]),
    "XML": (
        CODER,
        "<tool_call>\n<function=get_weather>\n<parameter=place>\n42\nB</parameter>\n"
        "<parameter=days>\n[1, 2]\n</parameter>\n</function>\n</tool_call>",
        [call(0, "get_weather", '{"place": "42\\nB", "days": [1, 2]}')],
    ),
    "XML of an unknown tool": (
        CODER,
        "<tool_call>\n<function=rm>\n</function>\n</tool_call>",
        [("Text", "<tool_call>\n<function=rm>\n</function>\n</tool_call>")],
    ),
    "llama": (
        LLAMA,
        f'{{"name": "get_weather", "parameters": {PARIS}}}',
        [call(0, "get_weather", PARIS)],
    ),
    "llama with a tag and two calls": (
        LLAMA,
        '<|python_tag|>{"type": "function", "name": "now", "parameters": {}}; '
        '{"name": "now", "parameters": {"a": 1}}',
        [call(0, "now", "{}"), call(1, "now", '{"a": 1}')],
    ),
    "llama answers with other JSON": (LLAMA, ' {"name": 4}', [("Text", ' {"name": 4}')]),
    "llama runs code": (
        LLAMA,
        "See: <|python_tag|>print(1)",
        [("Text", "See: <|python_tag|>print(1)")],
    ),
    "mistral": (
        MISTRAL,
        f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {PARIS}}}, '
        '{"name": "now", "arguments": {}, "id": "abcdef123"}]',
        [call(0, "get_weather", PARIS), call(1, "now", "{}")],
    ),
    "mistral with text": (
        MISTRAL,
        'Hm [1].[TOOL_CALLS] [{"name": "now", "arguments": {}}]',
        [("Text", "Hm [1]."), call(0, "now", "{}")],
    ),
    "mistral with names": (
        NAMED,
        f"[TOOL_CALLS]get_weather[ARGS]{PARIS}"
        '[TOOL_CALLS]now[CALL_ID]abcdef123[ARGS]{"a": 1}[TOOL_CALLS]now{}',
        [call(0, "get_weather", PARIS), call(1, "now", '{"a": 1}'), call(2, "now", "{}")],
    ),
    "mistral with an unknown name": (
        NAMED,
        "[TOOL_CALLS]rm[ARGS]{}",
        [("Text", "[TOOL_CALLS]rm[ARGS]{}")],
    ),
    "harmony": (
        HARMONY,
        "<|channel|>analysis<|message|>Two.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>It is < 4.<|return|>",
        [("Thought", "Two."), ("Text", "It is < 4.")],
    ),
    "harmony with calls": (
        HARMONY,
        "<|channel|>analysis<|message|>Look.<|end|><|start|>assistant<|channel|>commentary"
        "<|message|>I look.<|end|><|start|>assistant<|channel|>commentary "
        f"to=functions.get_weather <|constrain|>json<|message|>{PARIS}<|call|>"
        "<|start|>assistant to=functions.now<|channel|>commentary json<|message|><|call|>",
        [
            ("Thought", "Look."),
            ("Text", "I look."),
            call(0, "get_weather", PARIS),
            call(1, "now", "{}"),
        ],
    ),
    "harmony without channels": (HARMONY, "It is 4.", [("Text", "It is 4.")]),
}


def parser_of(form: ToolFormat, tools: Sequence[Tool] = TOOLS) -> Parser:
    return form.parser(tools, opened=False, split=True)


@pytest.mark.parametrize("name", CASES)
def test_an_answer_is_read_wherever_it_is_cut(name: str) -> None:
    form, text, expected = CASES[name]
    assert read(parser_of(form), [text]) == expected
    assert read(parser_of(form), text) == expected
    for first in range(len(text) + 1):
        assert read(parser_of(form), [text[:first], text[first:]]) == expected, text[:first]
        pieces = [text[:first], *text[first : first + 9], text[first + 9 :]]
        assert read(parser_of(form), pieces) == expected, text[:first]


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(CASES)), cuts=st.lists(st.integers(0, 400), max_size=12))
def test_many_cuts_change_nothing(name: str, cuts: list[int]) -> None:
    form, text, expected = CASES[name]
    ends = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(ends)]
    assert read(parser_of(form), pieces) == expected


MARKUP = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<think>", "</think>", "[TOOL_CALLS]", "[ARGS]", "[", "]"),
        *(
            '{"name": "now", "arguments": ',
            "{}",
            "}",
            '"',
            "\\",
            " ",
            "\n",
            "now",
            "<function=now>",
        ),
        *("<|channel|>", "analysis", "<|message|>", "<|end|>", "<|start|>", "assistant", "a", "<|"),
        *("</function>", "<|python_tag|>", "to=functions.now", "<|call|>", ",", ";", "é"),
    ]
)


@settings(max_examples=150, deadline=None)
@given(
    form=st.sampled_from([HERMES, THINKING, CODER, LLAMA, MISTRAL, NAMED, HARMONY]),
    pieces=st.lists(MARKUP, max_size=14),
)
def test_any_text_is_read_alike_whole_and_by_characters(
    form: ToolFormat, pieces: list[str]
) -> None:
    text = "".join(pieces)
    assert read(parser_of(form), [text]) == read(parser_of(form), text)


ZIPS = {
    "$defs": {"Code": {"type": "string", "enum": ["1", "2"]}, "a/b": {"$ref": "#/$defs/a~1b"}},
    "properties": {
        "optional": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "either": {"type": ["string", "null"]},
        "listed": {"enum": ["1", "2"]},
        "fixed": {"const": "7"},
        "named": {"allOf": [{"$ref": "#/$defs/Code"}]},
        "count": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
        "loop": {"$ref": "#/$defs/a~1b"},
        "outside": {"$ref": "https://example.com/a"},
    },
}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("optional", "12345", "12345"),
        ("optional", "null", None),
        ("optional", '"x"', '"x"'),
        ("either", "true", "true"),
        ("listed", "1", "1"),
        ("fixed", "7", "7"),
        ("named", "2", "2"),
        ("count", "2", 2),
        ("count", "2.5", "2.5"),
        ("loop", "2", 2),
        ("outside", "2", 2),
        ("unknown", "[1]", [1]),
        ("unknown", "NaN", "NaN"),
        ("unknown", "[1e999]", "[1e999]"),
    ],
)
def test_values_in_xml_have_the_types_of_the_schema(name: str, text: str, value: Any) -> None:
    """A text that looks like a number stayed one only where its type is a string and no other."""
    parser = CODER.parser([Tool("f", ZIPS)], opened=False, split=True)
    xml = f"<tool_call><function=f><parameter={name}>\n{text}\n</parameter></function></tool_call>"
    ((*_, arguments),) = read(parser, [xml])
    assert json.loads(arguments) == {name: value}


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (CODER, '<tool_call><function=now><parameter=a>"\\ud83d"</parameter></function>'),
        (HERMES, '<tool_call>{"arguments": {"a": "\\ud83d"}, "name": "now"}</tool_call>'),
        (HERMES, '<tool_call>{"name": "now", "arguments": "{\\"a\\": \\"\\ud83d\\"}"}</tool_call>'),
        (HERMES, '<tool_call>{"name": "now", "arguments": {"a": "\\ud83d"}}</tool_call>'),
    ],
)
def test_half_a_character_in_arguments_can_be_sent(form: ToolFormat, text: str) -> None:
    """Models break characters. An answer that could not be encoded ended with an internal error."""
    ((*_, arguments),) = read(form.parser(TOOLS, opened=False, split=True), [text])
    arguments.encode()
    assert json.loads(arguments) == {"a": "\ud83d"}
    assert read_object(arguments) == {"a": "\N{REPLACEMENT CHARACTER}"}


@pytest.mark.parametrize("text", ["5", "[]", "{", '{"a": NaN}', '{"a": 1e999}', "[" * 100_000])
def test_what_is_no_object_of_json_is_none(text: str) -> None:
    assert read_object(text) is None


def test_arguments_are_streamed_as_they_come() -> None:
    parser = parser_of(HERMES)
    begin, arguments = parser.feed('<tool_call>{"name": "now", "arguments": {"a')
    assert isinstance(begin, CallBegins)
    assert (begin.index, begin.name, arguments) == (0, "now", Arguments(0, '{"a'))
    assert parser.feed('": "b') == [Arguments(0, '": "b')]
    assert parser.calls_ended == 0
    assert parser.feed('"}}') == [Arguments(0, '"}')]
    assert parser.calls_ended == 1


def test_without_tools_calls_are_text() -> None:
    text = '<tool_call>{"name": "now", "arguments": {}}</tool_call> '
    assert read(parser_of(HERMES, ()), text) == [("Text", text)]


def test_a_prompt_may_open_the_thoughts() -> None:
    assert THINKING.is_opened("<|im_start|>assistant\n<think>\n")
    assert not THINKING.is_opened("What is <think>?<|im_end|>\n<|im_start|>assistant\n")
    parser = THINKING.parser((), opened=True, split=True)
    assert read(parser, "So.\n</think>\n\n4") == [("Thought", "So."), ("Text", "4")]


def test_thoughts_may_stay_in_the_text() -> None:
    text = "<think>\nSo.\n</think>\n\n4"
    assert read(THINKING.parser((), opened=False, split=False), text) == [("Text", text)]
    text = "<|channel|>analysis<|message|>So.<|end|>"
    final = "<|start|>assistant<|channel|>final<|message|>4"
    parser = HARMONY.parser((), opened=False, split=False)
    assert read(parser, text + final) == [("Text", text + "4")]


def test_ids_suit_the_template() -> None:
    assert MISTRAL.new_id().isalnum()
    assert len(MISTRAL.new_id()) == 9
    assert HERMES.new_id().startswith("call_")
    assert HERMES.new_id() != HERMES.new_id()


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("<tools>{{ tools }}</tools> <tool_call> {{ x }} </tool_call>", "hermes"),
        ("<tool_call><function=f></function></tool_call>", "qwen-coder"),
        ("[AVAILABLE_TOOLS] [TOOL_CALLS][", "mistral"),
        ("[TOOL_CALLS]f[ARGS]", "mistral-named"),
        ("ipython '\"parameters\": '", "llama"),
        ("to=functions. <|channel|>", "harmony"),
        ("{{ messages }}", ""),
    ],
)
def test_a_template_tells_the_format(template: str, name: str) -> None:
    assert find_format(template).name == name
    assert find_format(template).takes_calls == bool(name)
    assert find_format(template + "</think>").has_thoughts


def test_grammars_write_what_the_parsers_read() -> None:
    special = {"<tool_call>": 7, "[TOOL_CALLS]": 5, "<|message|>": 1}
    for form in (HERMES, THINKING, LLAMA, MISTRAL, NAMED, HARMONY):
        text = form.call_grammar(TOOLS, ["now"], parallel=True, special=special)
        assert "get_weather" not in text
        assert text.startswith("start: ")
        assert '"type": "object", "additionalProperties": false' in text
    text = HERMES.call_grammar(TOOLS, ["now"], parallel=False, special=special)
    assert text.splitlines()[:3] == [
        "start: call",
        "call: call_0",
        r'call_0: <[7]> "\n{\"name\": \"now\", \"arguments\": " arguments_0 "}\n</tool_call>"',
    ]


BAD = '{"plce": "Paris"}'
GOOD = '{"place": "Paris"}'
STRICT = (
    Tool("get_weather", {**WEATHER, "required": ["place"], "additionalProperties": False}, True),
    Tool("now"),
)
WRAPPED = {
    "hermes": 'x\n<tool_call>\n{"name": "get_weather", "arguments": ARGUMENTS}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {"a": 1}}\n</tool_call>\nDone.',
    "llama": '{"name": "get_weather", "parameters": ARGUMENTS}',
    "mistral": '[TOOL_CALLS][{"name": "get_weather", "arguments": ARGUMENTS}, '
    '{"name": "now", "arguments": {}}]',
    "mistral-named": "x[TOOL_CALLS]get_weather[ARGS]ARGUMENTS[TOOL_CALLS]now[ARGS]{}",
}


def admits(grammar: str, text: str) -> bool:
    """Whether a whole answer is one of the grammar's. Each byte is a token."""
    matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), grammar)
    assert not matcher.is_error(), matcher.get_error()
    tokens = list(text.encode())
    return matcher.validate_tokens(tokens) == len(tokens) and (
        matcher.consume_tokens(tokens) and matcher.is_accepting()
    )


@pytest.mark.parametrize("name", WRAPPED)
def test_only_calls_of_strict_tools_are_kept_to_their_schemas(name: str) -> None:
    grammar = ToolFormat(name, None).strict_grammar(STRICT, special={})
    assert admits(grammar, WRAPPED[name].replace("ARGUMENTS", GOOD))
    assert not admits(grammar, WRAPPED[name].replace("ARGUMENTS", BAD))
    for free in ("", "It is 4.\n", ' {"a": [', "<tool_ca", "[1] {}"):
        assert admits(grammar, free)


@given(places=st.lists(st.integers(0, 80), max_size=6), opened=st.booleans())
def test_a_call_within_shown_thoughts_is_none(places: list[int], opened: bool) -> None:
    """The model only thinks of it. Where thoughts are told apart, it is none either."""
    called = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    thoughts = f"{'' if opened else ' <think>'}\nPerhaps {called}?\n</think>"
    text = f"{thoughts}\n\n{called}"
    borders = [0, *sorted(place % len(text) for place in places), len(text)]
    pieces = [text[begin:end] for begin, end in itertools.pairwise(borders)]
    parser = THINKING.parser(TOOLS, opened=opened, split=False)
    assert read(parser, pieces) == [("Text", thoughts), call(0, "now", "{}")]
    for cut in ("", " <thi", " <think>\nPerhaps <tool_call>", "It is 4."):
        parser = THINKING.parser(TOOLS, opened=False, split=False)
        assert read(parser, cut) == ([("Text", cut)] if cut else [])


def test_calls_have_ids_of_their_own() -> None:
    """A model may write one id twice. Then nobody could tell whose a result is."""
    one = "[TOOL_CALLS]now[CALL_ID]abcdef123[ARGS]{}"
    parts = NAMED.parser(TOOLS, opened=False, split=True).feed(
        f"{one}{one}[TOOL_CALLS]now[ARGS]{{}}"
    )
    first, second, third = [part.id for part in parts if isinstance(part, CallBegins)]
    assert first == "abcdef123"
    assert len({first, second, third}) == 3
    assert len(second) == len(third) == 9


ONE_CALL = {
    "hermes": '<tool_call>\n{"name": "get_weather", "arguments": ARGUMENTS}\n</tool_call>',
    "llama": '{"name": "get_weather", "parameters": ARGUMENTS}',
    "mistral": '[TOOL_CALLS][{"name": "get_weather", "arguments": ARGUMENTS}]',
    "mistral-named": "[TOOL_CALLS]get_weather[ARGS]ARGUMENTS",
}


@pytest.mark.parametrize("name", ONE_CALL)
def test_a_required_call_is_one_that_the_parser_reads(name: str) -> None:
    form = ToolFormat(name, None)
    grammar = form.call_grammar(STRICT, ["get_weather"], parallel=False, special={})
    text = ONE_CALL[name].replace("ARGUMENTS", GOOD)
    assert admits(grammar, text)
    assert not admits(grammar, ONE_CALL[name].replace("ARGUMENTS", BAD))
    assert not admits(grammar, "It is 4.")
    found = read(form.parser(STRICT, opened=False, split=True), text)
    assert found == [call(0, "get_weather", GOOD)]
