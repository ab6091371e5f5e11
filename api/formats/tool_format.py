"""The format in which a model thinks and calls tools. Its chat template tells which one it is."""

from __future__ import annotations

import functools
import json
import re
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from api.formats import harmony, hermes, llama, mistral
from api.formats.json_grammar import json_rule
from api.formats.parts import Parser, PlainText
from api.formats.thoughts import ShownThoughts, Thoughts

THINK = ("<think>", "</think>")
BRACKETS = ("[THINK]", "[/THINK]")


class CallableTool(Protocol):
    """A tool, as far as a format needs it."""

    @property
    def name(self) -> str: ...

    @property
    def parameters(self) -> Mapping[str, Any]: ...

    @property
    def strict(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a model writes thoughts and calls.

    name: "hermes", "qwen-coder", "llama", "mistral", "mistral-named", "harmony", or "" if no
        format of calls is known.
    thinks: the marks before and after thoughts, or None if the model has none.
    """

    name: str
    thinks: tuple[str, str] | None

    @property
    def takes_calls(self) -> bool:
        return bool(self.name)

    @property
    def has_thoughts(self) -> bool:
        return self.thinks is not None or self.name == "harmony"

    @property
    def markers(self) -> frozenset[str]:
        """The special tokens whose text the parser needs."""
        return _MARKERS.get(self.name, frozenset()) | frozenset(self.thinks or ())

    def parser(self, tools: Sequence[CallableTool], *, opened: bool, split: bool) -> Parser:
        """Make the parser of one answer.

        tools: the tools that may be called. Without any, calls are text.
        opened: whether the prompt ends with the mark before thoughts.
        split: whether thoughts are parts of their own.
        """
        schemas = {tool.name: tool.parameters for tool in tools}
        if self.name == "harmony":
            return harmony.Harmony(schemas, new_id, split=split)
        make = _PARSERS.get(self.name)
        parser = PlainText() if make is None or not tools else make(schemas, self.new_id)
        if self.thinks is None:
            return parser
        return (Thoughts if split else ShownThoughts)(self.thinks, parser, opened=opened)

    def is_opened(self, prompt: str) -> bool:
        """Whether an answer to this prompt begins inside of thoughts."""
        return self.thinks is not None and prompt.rstrip().endswith(self.thinks[0])

    def new_id(self) -> str:
        """Return an id for a call, of a form that the model's chat template accepts."""
        if self.name.startswith("mistral"):
            return mistral.fitting_id(new_id())
        return new_id()

    def call_grammar(
        self,
        tools: Sequence[CallableTool],
        names: Collection[str],
        *,
        parallel: bool,
        special: Mapping[str, int],
        opened: bool = False,
    ) -> str:
        """Return a Lark grammar, as llguidance reads it, of an answer that calls tools.

        names: the tools of which at least one is called.
        special: the ids of the tokenizer's special tokens by their texts.
        opened: whether the prompt ends with the mark before thoughts.
        """
        called = frozenset(names)
        calls = [tool for tool in tools if tool.name in called]
        return _Grammar(self, special).text(calls, parallel=parallel, opened=opened)

    def strict_grammar(self, tools: Sequence[CallableTool], *, special: Mapping[str, int]) -> str:
        """Return a Lark grammar of an answer that may have calls, and is free otherwise.

        The arguments of strict tools fit their schemas, and other ones are objects. Parameters are
        those of ``call_grammar``.
        """
        return _StrictGrammar(self, special).of(tools)

    def thoughts_grammar(
        self, *, special: Mapping[str, int], opened: bool
    ) -> tuple[str, list[str]]:
        """Return what may come before an answer's text in Lark, and the rules that it needs.

        It is empty, or ends with a space. Parameters are those of ``call_grammar``.
        """
        return _Grammar(self, special).before_text(opened)


class _Grammar:
    """Writes the grammar of calls in one format."""

    def __init__(self, form: ToolFormat, special: Mapping[str, int]) -> None:
        self._form = form
        self._special = special

    def text(self, tools: Sequence[CallableTool], *, parallel: bool, opened: bool) -> str:
        name = self._form.name
        wrapped = [self._wrapped(tool, number) for number, tool in enumerate(tools)]
        rules = [f"call: {' | '.join(f'call_{number}' for number in range(len(tools)))}"]
        rules += [f"call_{number}: {text}" for number, text in enumerate(wrapped)]
        rules += [
            f"arguments_{number}: {json_rule(_schema(tool))}" for number, tool in enumerate(tools)
        ]
        many = parallel and name != "harmony"
        body = f"call ({self._literal(_SEPARATORS[name])} call)*" if many else "call"
        if not _SEPARATORS[name]:
            body = "call+" if many else "call"
        if name == "mistral":
            body = f'{self._literal(mistral.MARK)} "[" {body} "]"'
        start, more = self._thoughts(opened)
        return "\n".join([f"start: {start}{body}", *rules, *more]) + "\n"

    def before_text(self, opened: bool) -> tuple[str, list[str]]:
        start, rules = self._thoughts(opened)
        if self._form.name == "harmony":
            start += self._literal(f"{harmony.CHANNEL}final{harmony.MESSAGE}") + " "
        return start, rules

    def _wrapped(self, tool: CallableTool, number: int) -> str:
        before, after = _WRAPS[self._form.name](json.dumps(tool.name, ensure_ascii=False))
        tail = f" {self._literal(after)}" if after else ""
        return f"{self._literal(before)} arguments_{number}{tail}"

    def _thoughts(self, opened: bool) -> tuple[str, list[str]]:
        """The begin of the answer, and the rules that it needs."""
        if self._form.name == "harmony":
            analysis = self._literal(f"{harmony.CHANNEL}analysis{harmony.MESSAGE}")
            after = self._literal(f"{harmony.END}{harmony.START}assistant")
            return f"({analysis} THOUGHT {after})? ", [r"THOUGHT: /(.|\n)*/"]
        if self._form.thinks is None:
            return "", []
        first, last = map(self._literal, self._form.thinks)
        rules = [r"GAP: /\s{0,8}/"]
        if self._form.thinks[1] in self._special:
            rules += [f"thoughts: THOUGHT {last} GAP", r"THOUGHT: /(.|\n)*/"]
        else:  # The mark is text like that before it, so the first one counts.
            rules += ["thoughts: thought GAP", rf"thought[suffix={last}]: /(.|\n)*/"]
        return ("thoughts " if opened else f"({first} thoughts)? "), rules

    def _literal(self, text: str) -> str:
        """Return a text in Lark's notation. Special tokens in it stand by their ids."""
        parts, plain = [], ""
        while text:
            mark = next((mark for mark in self._special if mark and text.startswith(mark)), None)
            if mark is None:
                plain, text = plain + text[0], text[1:]
                continue
            if plain:
                parts.append(json.dumps(plain, ensure_ascii=False))
            parts.append(f"<[{self._special[mark]}]>")
            plain, text = "", text[len(mark) :]
        if plain or not parts:
            parts.append(json.dumps(plain, ensure_ascii=False))
        return " ".join(parts)


class _StrictGrammar(_Grammar):
    """Writes the grammar of free answers with calls that fit their schemas."""

    def of(self, tools: Sequence[CallableTool]) -> str:
        heads = [_WRAPS[self._form.name](json.dumps(tool.name)) for tool in tools]
        schemas = [_schema(tool) if tool.strict else {"type": "object"} for tool in tools]
        rules = [
            f"arguments_{number}: {json_rule(schema)}" for number, schema in enumerate(schemas)
        ]
        rules.append(r"TEXT: /(.|\n)+/")
        write = {"harmony": self._harmony, "llama": self._llama}.get(self._form.name, self._marked)
        return "\n".join([*write(heads), *rules]) + "\n"

    def _marked(self, heads: Sequence[tuple[str, str]]) -> list[str]:
        """The mark begins a call wherever it is. The text up to a mark is matched lazily."""
        name = self._form.name
        mark = mistral.MARK if name.startswith("mistral") else hermes.OPEN
        calls = [
            f"{self._literal(before.removeprefix(mark))} arguments_{number}"
            + (f" {self._literal(after)}" if after else "")
            for number, (before, after) in enumerate(heads)
        ]
        call = f"({' | '.join(calls)})"
        if name == "mistral":
            call = f'"[" {call} (", " {call})* "]"'
        rules = []
        begin = self._literal(mark)
        if mark not in self._special:
            begin = "trigger"
            rules = [rf"trigger[lazy]: /(.|\n)*{_regex(mark)}/"]
        marks = [self._literal(text) for text in self._form.thinks or () if text in self._special]
        pieces = ["TEXT", *marks, f"{begin} call"]
        return [f"start: ({' | '.join(pieces)})*", f"call: {call}", *rules]

    def _llama(self, heads: Sequence[tuple[str, str]]) -> list[str]:
        """A call is at the answer's begin, or behind the tag, which code may follow, too."""
        rules = [
            rf"head_{number}[lazy]: /\s*{_regex(before)}/"
            for number, (before, _) in enumerate(heads)
        ]
        calls = " | ".join(f'head_{number} arguments_{number} "}}"' for number in range(len(heads)))
        start = "call | TEXT?"
        if llama.TAG in self._special:
            start += f" | TEXT? {self._literal(llama.TAG)} (call | TEXT?)"
        return [f"start: {start}", f"call: ({calls}) (/;? ?/ ({calls}))*", *rules]

    def _harmony(self, heads: Sequence[tuple[str, str]]) -> list[str]:
        """An answer is a row of messages, of which the last one may be a call."""
        begin, ends = self._literal(harmony.CHANNEL), self._literal(harmony.MESSAGE)
        again = self._literal(f"{harmony.END}{harmony.START}assistant")
        calls = []
        for number, (before, _) in enumerate(heads):
            calls.append(f"{self._literal(before)} arguments_{number}")
            # The recipient may also stand before the channel.
            recipient = before.split("commentary")[1].split(" <")[0]
            kind = f'(" json" | {self._literal(f" {harmony.CONSTRAIN}json")})'
            commentary = f'{self._literal(recipient)} {begin} "commentary" {kind}? {ends}'
            calls.append(f"{commentary} arguments_{number}")
        return [
            f"start: (free {again})* (free | {' | '.join(calls)})",
            f"free: {begin} CHANNEL {ends} TEXT?",
            "CHANNEL: /analysis|commentary|final/",
        ]


def _regex(text: str) -> str:
    """Return a regular expression of a text, as it stands between slashes."""
    return re.sub(r"([^\w\s<>\"':,=-])", r"\\\1", text)


@functools.lru_cache(16)
def find_format(template: str) -> ToolFormat:
    """Return the format of the model that has this chat template."""
    thinks = next((marks for marks in (THINK, BRACKETS) if marks[1] in template), None)
    if harmony.CHANNEL in template and "functions." in template:
        return ToolFormat("harmony", None)
    if mistral.MARK in template:
        return ToolFormat("mistral-named" if mistral.ARGS in template else "mistral", thinks)
    if hermes.OPEN in template and hermes.CLOSE in template:
        return ToolFormat("qwen-coder" if "<function=" in template else "hermes", thinks)
    if "ipython" in template and '"parameters": ' in template and "<function=" not in template:
        return ToolFormat("llama", thinks)
    return ToolFormat("", thinks)


def new_id() -> str:
    """Return an id for a call, in OpenAI's form."""
    return f"call_{secrets.token_hex(12)}"


def _schema(tool: CallableTool) -> Mapping[str, Any]:
    """Return the schema of a tool's arguments. Without one, it takes none."""
    return tool.parameters or {"type": "object", "additionalProperties": False}


def _hermes(name: str) -> tuple[str, str]:
    before = f'{hermes.OPEN}\n{{"name": {name}, "arguments": '
    return before, f"}}\n{hermes.CLOSE}"


def _llama(name: str) -> tuple[str, str]:
    return f'{{"name": {name}, "parameters": ', "}"


def _mistral(name: str) -> tuple[str, str]:
    return f'{{"name": {name}, "arguments": ', "}"


def _mistral_named(name: str) -> tuple[str, str]:
    return f"{mistral.MARK}{json.loads(name)}{mistral.ARGS}", ""


def _harmony(name: str) -> tuple[str, str]:
    head = f"{harmony.CHANNEL}commentary to=functions.{json.loads(name)} {harmony.CONSTRAIN}json"
    return head + harmony.MESSAGE, ""  # The model's end token closes the call.


_PARSERS: dict[str, Callable[[Mapping[str, Any], Callable[[], str]], Parser]] = {
    "hermes": hermes.HermesCalls,
    "qwen-coder": hermes.HermesCalls,
    "llama": llama.LlamaCalls,
    "mistral": mistral.MistralCalls,
    "mistral-named": mistral.MistralCalls,
}
_MARKERS = {
    "hermes": frozenset((hermes.OPEN, hermes.CLOSE)),
    "qwen-coder": frozenset((hermes.OPEN, hermes.CLOSE)),
    "llama": frozenset((llama.TAG,)),
    "mistral": frozenset((mistral.MARK,)),
    "mistral-named": frozenset((mistral.MARK, mistral.ARGS, mistral.CALL_ID)),
    "harmony": harmony.MARKS,
}
_WRAPS: dict[str, Callable[[str], tuple[str, str]]] = {
    "hermes": _hermes,
    "qwen-coder": _hermes,
    "llama": _llama,
    "mistral": _mistral,
    "mistral-named": _mistral_named,
    "harmony": _harmony,
}
_SEPARATORS = {
    "hermes": "\n",
    "qwen-coder": "\n",
    "llama": "; ",
    "mistral": ", ",
    "mistral-named": "",
    "harmony": "",
}
