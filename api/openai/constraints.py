"""The format that an answer must have: a JSON schema, a regular expression or a grammar.

Requests say it in OpenAI's way (response_format), in llama-server's (json_schema, grammar) or in
vLLM's (structured_outputs, guided_json and others). All become a grammar in Lark's notation, as
llguidance reads it. It is compiled here before any device gets it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

from api.formats.json_grammar import json_rule
from api.openai.fields import only
from api.openai.reading import Reading
from coordinator.errors import FormatsUnchecked
from coordinator.files.vocabulary import Vocabulary
from coordinator.loading.deployment import Deployment
from model.grammar_process import LIBRARY, GrammarFailed, GrammarProcessLost, library_version
from planning.errors import RequestInvalid
from wire.limits import MAX_GRAMMAR_BYTES
from wire.messages import Sampling

OPTIONS = '\n%llguidance {"no_forcing": true}\n'
"""The device has no tokenizer, so the model decides how forced text is split into tokens."""

MAX_SCHEMA_NESTING = 100

_NAMED = ("name", "description", "schema", "strict")
"""The fields of a schema with a name. An answer keeps to it, whatever ``strict`` says."""


def constrained(
    deployment: Deployment,
    body: Mapping[str, Any],
    sampling: Sampling,
    reading: Reading | None = None,
) -> tuple[Sampling, str]:
    """Return ``sampling`` with the format that a request wants, and the field that says it, or "".

    reading: how a chat's answer is read, which may have thoughts and calls. Raises RequestInvalid,
    FormatsUnchecked.
    """
    wanted = [field for field in _READERS if body.get(field) is not None]
    grammars = [(field, _READERS[field](deployment, body[field], field)) for field in wanted]
    given = [(field, grammar) for field, grammar in grammars if grammar]
    if len(given) > 1:
        names = " and ".join(field for field, _ in given)
        raise RequestInvalid(f"{names}: an answer has one format: leave one out", given[1][0])
    if reading is not None and reading.tools.required:
        calls = _calls(deployment, reading, "tool_choice")
        return with_grammar(deployment, sampling, calls, "tool_choice")
    if not given:
        if reading is None or not any(tool.strict for tool in reading.tools.offered):
            return sampling, ""
        special = _vocabulary(deployment, "tools").special_ids
        strict = reading.format.strict_grammar(reading.tools.offered, special=special)
        return with_grammar(deployment, sampling, strict, "tools")
    ((field, grammar),) = given
    if reading is not None:
        special = _vocabulary(deployment, field).special_ids
        start, rules = reading.format.thoughts_grammar(special=special, opened=reading.opened)
        grammar = behind_thoughts(start, rules, grammar)
        if reading.tools.offered:
            grammar = either(_calls(deployment, reading, field), grammar)
    return with_grammar(deployment, sampling, grammar, field)


def _calls(deployment: Deployment, reading: Reading, field: str) -> str:
    """The grammar of an answer that calls tools."""
    return reading.format.call_grammar(
        reading.tools.offered,
        reading.tools.names,
        parallel=reading.tools.parallel,
        special=_vocabulary(deployment, field).special_ids,
        opened=reading.opened,
    )


def with_grammar(
    deployment: Deployment, sampling: Sampling, grammar: str, field: str
) -> tuple[Sampling, str]:
    """Return ``sampling`` with a grammar that was compiled, and the ``field`` that wants it.

    Raises RequestInvalid, which says what to do, and FormatsUnchecked.
    """
    if not sampling.stop_tokens:
        raise RequestInvalid(
            f"{field}: such an answer must be able to end: leave out ignore_eos, or use a model "
            "that knows an end of text",
            field,
        )
    vocabulary = _vocabulary(deployment, field)
    if not grammar.startswith("{"):
        grammar += OPTIONS
    if len(grammar.encode(errors="replace")) > MAX_GRAMMAR_BYTES:
        raise RequestInvalid(f"{field}: longer than {MAX_GRAMMAR_BYTES >> 10} KiB", field)
    try:
        vocabulary.check(grammar)
    except GrammarProcessLost as error:
        raise _unchecked(error) from error
    except GrammarFailed as error:
        raise RequestInvalid(f"{field}: no answer can be kept to it: {error}", field) from error
    return replace(sampling, grammar=grammar.encode()), field


def _unchecked(error: GrammarProcessLost) -> FormatsUnchecked:
    return FormatsUnchecked(f"the coordinator cannot check the format: {error}")


def behind_thoughts(start: str, rules: list[str], grammar: str) -> str:
    """Return a grammar of an answer behind thoughts, which begin with ``start``."""
    if not start:
        return grammar
    thoughts = "\n".join([f"start: {start}@answer", *rules]) + OPTIONS
    return _joined(thoughts, {"answer": grammar})


def either(calls: str, answer: str) -> str:
    """Return a grammar of an answer that calls tools, or keeps to a format."""
    return _joined(f"start: @calls | @text{OPTIONS}", {"calls": calls, "text": answer})


def _joined(first: str, others: Mapping[str, str]) -> str:
    """Return several grammars as one, of which the first names the others."""
    parts: list[dict[str, str]] = [{"lark_grammar": first}]
    for name, grammar in others.items():
        if not grammar.startswith("{"):
            parts.append({"name": name, "lark_grammar": grammar})
            continue
        head, *rest = json.loads(grammar)["grammars"]
        parts += [{"name": name, **head}, *rest]
    return json.dumps({"grammars": parts})


# ---- what requests say ---------------------------------------------------------------------------


def _response_format(deployment: Deployment, value: Any, field: str) -> str:
    if not isinstance(value, dict):
        raise RequestInvalid(f"{field}: expected an object", field)
    kind = value.get("type")
    known = {"text": (), "json_object": ("schema",), "json_schema": ("json_schema", *_NAMED)}
    if isinstance(kind, str) and kind in known:
        only(value, ("type", *known[kind]), field, field)
    if kind == "text":
        return ""
    if kind == "json_object":  # llama-server takes a schema here, too.
        return _json(deployment, value.get("schema") or {"type": "object"}, field)
    if kind == "json_schema":
        inner = value.get("json_schema", value)
        if not isinstance(inner, dict) or "schema" not in inner:
            raise RequestInvalid(f"{field}.json_schema: expected an object with a schema", field)
        if inner is not value:
            only(value, ("type", "json_schema"), field, field)
            only(inner, _NAMED, f"{field}.json_schema", field)
        return _json(deployment, inner["schema"], field)
    raise RequestInvalid(f"{field}.type: expected text, json_object or json_schema", field)


def _json(deployment: Deployment, value: Any, field: str) -> str:
    if isinstance(value, str):  # As text, as llama-server and vLLM take it, too.
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RequestInvalid(f"{field}: not a JSON schema: {error}", field) from error
    if not isinstance(value, dict):
        raise RequestInvalid(f"{field}: a JSON schema is an object", field)
    if not _fits(value, MAX_SCHEMA_NESTING):
        raise RequestInvalid(
            f"{field}: the schema is nested deeper than {MAX_SCHEMA_NESTING} levels", field
        )
    return f"start: {json_rule(value)}\n"


def _fits(value: Any, levels: int) -> bool:
    if not isinstance(value, (dict, list)):
        return True
    items = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(_fits(item, levels - 1) for item in items)


def _regex(deployment: Deployment, value: Any, field: str) -> str:
    return _converted(deployment, "regex", value, field)


def _grammar(deployment: Deployment, value: Any, field: str) -> str:
    return _converted(deployment, "grammar", value, field)


def _converted(
    deployment: Deployment, form: Literal["regex", "grammar"], value: Any, field: str
) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_GRAMMAR_BYTES:
        raise RequestInvalid(f"{field}: expected text of 1 to {MAX_GRAMMAR_BYTES >> 10} KiB", field)
    try:
        return _vocabulary(deployment, field).lark(form, value)
    except GrammarProcessLost as error:
        raise _unchecked(error) from error
    except GrammarFailed as error:
        raise RequestInvalid(f"{field}: {error}", field) from error


def _choice(deployment: Deployment, value: Any, field: str) -> str:
    if not isinstance(value, list) or not value or not all(isinstance(x, str) for x in value):
        raise RequestInvalid(f"{field}: expected a list of texts", field)
    return f"start: {' | '.join(json.dumps(text, ensure_ascii=False) for text in value)}\n"


def _structured(deployment: Deployment, value: Any, field: str) -> str:
    readers = {"json": _json, "regex": _regex, "choice": _choice, "grammar": _grammar}
    if not isinstance(value, dict) or len(value) != 1 or not value.keys() <= readers.keys():
        raise RequestInvalid(f"{field}: expected an object with one of {', '.join(readers)}", field)
    ((kind, inner),) = value.items()
    return readers[kind](deployment, inner, f"{field}.{kind}")


_READERS: dict[str, Callable[[Deployment, Any, str], str]] = {
    "response_format": _response_format,
    "json_schema": _json,
    "grammar": _grammar,
    "structured_outputs": _structured,
    "guided_json": _json,
    "guided_regex": _regex,
    "guided_choice": _choice,
    "guided_grammar": _grammar,
}


def _vocabulary(deployment: Deployment, field: str) -> Vocabulary:
    """Return what compiles grammars. Raises RequestInvalid that says what is missing."""
    if not library_version():
        raise RequestInvalid(
            f"{field}: the coordinator lacks {LIBRARY}: install shoal-llm[coordinator] there",
            field,
        )
    if deployment.vocabulary is None:
        raise RequestInvalid(
            f"{field}: the tokens of {deployment.name} have no bytes of their own, or no token "
            "ends an answer, so it cannot be kept to a format",
            field,
        )
    if not deployment.keeps_grammars:
        device = deployment.leads[-1].name
        raise RequestInvalid(
            f"{field}: {device}, which samples, lacks {LIBRARY}: install shoal-llm[agent] there "
            "and load the model again",
            field,
        )
    return deployment.vocabulary
