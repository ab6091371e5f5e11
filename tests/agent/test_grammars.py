"""Answers that are kept to a schema, an expression or a grammar, by a process that may die."""

from __future__ import annotations

import json
import os
import random
import re
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from agent.sampler import Sampler
from backends.base import BackendError
from model import grammar_process
from model.grammar_process import GrammarFailed, GrammarProcess, GrammarProcessLost
from tests.random_schemas import logits, schema, vocabulary
from wire.messages import Sampling

TOKENS = vocabulary()
END = TOKENS.end
OPTIONS = '%llguidance {"no_forcing": true}\n'
PLAIN = Sampling(400, (END,), temperature=1.0)
MOST_TOKENS = 600


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GrammarProcess]:
    path = tmp_path_factory.mktemp("vocabulary") / "tokens"
    path.write_bytes(TOKENS.encode())
    process = GrammarProcess(path)
    path.unlink()  # An evicted file stays readable.
    process.check('start: "a"')  # Its thread starts with the first grammar.
    yield process
    process.close()


def json_grammar(value: dict[str, Any]) -> str:
    guided = {"x-guidance": {"whitespace_pattern": r"[\x20\x0A]{1,3}"}, **value}
    return f"{OPTIONS}start: %json {json.dumps(guided)}\n"


def answer(
    process: GrammarProcess,
    grammar: str,
    sampling: Sampling,
    seed: int,
    begun: tuple[int, ...] = (),
) -> list[int] | None:
    """Return the tokens of an answer without its end, or None if it does not end."""
    generator = np.random.default_rng(seed)
    rows = [logits(TOKENS, generator) for _ in range(MOST_TOKENS)]
    sampler = Sampler(replace(sampling, answer=begun), process.open(grammar, begun))
    tokens = list(begun)
    while len(tokens) < MOST_TOKENS:
        token = sampler.sample(rows[len(tokens)], len(tokens))
        if token == END:
            return tokens
        tokens.append(token)
    return None


def text(tokens: list[int]) -> str:
    return b"".join(TOKENS.tokens[token] for token in tokens).decode()


def test_a_vocabulary_without_the_needed_characters_is_named(tmp_path: Path) -> None:
    """Otherwise the library's own word came, which says nothing to a user."""
    letters = replace(
        TOKENS, tokens=tuple(bytes([97 + at % 26]) for at in range(len(TOKENS.tokens)))
    )
    path = tmp_path / "tokens"
    path.write_bytes(letters.encode())
    process = GrammarProcess(path)
    try:
        with pytest.raises(GrammarFailed, match="no token of this model can begin such an answer"):
            process.check(json_grammar({"type": "object"}))
    finally:
        process.close()


def test_answers_fit_random_schemas_by_another_validator(process: GrammarProcess) -> None:
    """Each schema is one that the library takes; whether the answer fits is jsonschema's word."""
    generator, ended, refused = random.Random(7), 0, list[str]()
    for seed in range(130):
        wanted = schema(generator)
        try:
            tokens = answer(process, json_grammar(wanted), replace(PLAIN, seed=seed), seed)
        except BackendError as error:
            refused.append(str(error))
            continue
        if tokens is None:
            continue
        value = json.loads(text(tokens))
        jsonschema.validate(
            value,
            wanted,
            cls=jsonschema.Draft202012Validator,
            format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER,
        )
        ended += 1
    assert ended >= 100
    assert len(refused) <= 10, refused


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (OPTIONS + r"start: /[a-f]{3}-(yes|no)[0-9]+/", r"[a-f]{3}-(yes|no)[0-9]+"),
        (OPTIONS + 'start: "<" word ">"\nword: /[x-z]{1,4}/ ("," word)?', r"<[x-z,]+>"),
        (OPTIONS + 'start: "red" | "green" | "🦈"', "red|green|🦈"),
    ],
)
def test_answers_keep_to_expressions_and_grammars(
    process: GrammarProcess, grammar: str, pattern: str
) -> None:
    for seed in range(10):
        tokens = answer(process, grammar, replace(PLAIN, seed=seed), seed)
        assert tokens is not None
        assert re.fullmatch(pattern, text(tokens))


def test_regular_expressions_and_gbnf_become_lark(process: GrammarProcess) -> None:
    expression = OPTIONS + process.lark("regex", r"a/b\d{2}\n?")
    assert re.fullmatch(r"a/b\d{2}\n?", text(answer(process, expression, PLAIN, 1) or []))
    gbnf = 'root ::= "[" item ("," item)* "]"\nitem ::= [0-9]+'
    grammar = OPTIONS + process.lark("grammar", gbnf)
    assert re.fullmatch(r"\[\d+(,\d+)*\]", text(answer(process, grammar, PLAIN, 2) or []))
    assert process.lark("grammar", 'start: "a"') == 'start: "a"'
    for wrong in ("root ::= (", "root ::= " + "(" * 5000):
        with pytest.raises(GrammarFailed):
            process.lark("grammar", wrong)


def test_special_tokens_are_named_and_never_text(process: GrammarProcess) -> None:
    grammar = OPTIONS + 'start: /(.|\\n)*/ <|think|> "ok"'
    think = TOKENS.tokens.index(b"<|think|>")
    matcher = process.open(grammar)
    for token in (*b"<|think|>", think):
        matcher.accept(token)
    allowed = np.unpackbits(np.frombuffer(matcher.allowed(), np.uint8), bitorder="little")
    assert np.flatnonzero(allowed).tolist() == [ord("o")]


def test_an_answer_goes_on_equally_in_another_process(
    process: GrammarProcess, tmp_path: Path
) -> None:
    grammar = json_grammar(schema(random.Random(3), 4))
    sampling = replace(PLAIN, seed=11, frequency_penalty=0.1)
    whole = answer(process, grammar, sampling, 5)
    assert whole is not None
    path = tmp_path / "tokens"
    path.write_bytes(TOKENS.encode())
    other = GrammarProcess(path)
    try:
        for cut in (1, len(whole) // 2, len(whole) - 1):
            assert answer(other, grammar, sampling, 5, tuple(whole[:cut])) == whole
    finally:
        other.close()


def test_the_death_of_the_process_ends_one_request_only(process: GrammarProcess) -> None:
    """It dies of a grammar, or of something else. Other answers go on as if nothing had been."""
    grammar = json_grammar({"type": "array", "items": {"type": "boolean"}, "minItems": 3})
    matcher = process.open(grammar)
    matcher.accept(ord("["))
    for _ in range(2):
        assert matcher.allowed()
        os.kill(process.child().pid, signal.SIGSEGV)
        with pytest.raises(GrammarFailed, match="nested deeper"):
            process.check(grammar)
    matcher.accept(ord("\n"))
    matcher.accept(TOKENS.tokens.index(b"true"))
    matcher.accept(ord(","))
    fresh = process.open(grammar, list(b"[true,"))
    assert matcher.allowed() == fresh.allowed()
    fresh.accept(TOKENS.tokens.index(b"true"))
    assert matcher.allowed() != fresh.allowed()


HOSTILE = {
    "nested schema": OPTIONS + "start: %json " + '{"items":' * 20_000 + "{}" + "}" * 20_000,
    "nested rule": OPTIONS + "start: " + "(" * 50_000 + '"a"' + ")" * 50_000,
    "nested expression": OPTIONS + "start: /" + "(" * 50_000 + "a" + ")" * 50_000 + "/",
    "loop": json_grammar({"$ref": "#"}),
    "not a grammar": "\x00{]",
    "surrogate": OPTIONS + 'start: "\ud800"',
    "no such rule": OPTIONS + "start: nothing",
    "no schema": json_grammar({"type": "nonsense"}),
    "unsatisfiable": json_grammar({"type": "integer", "minimum": 3, "maximum": 1}),
    "remote": json_grammar({"$ref": "http://127.0.0.1/x"}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_is_refused_in_one_line(process: GrammarProcess, name: str) -> None:
    with pytest.raises(GrammarFailed) as caught:
        process.check(HOSTILE[name])
    assert not isinstance(caught.value, GrammarProcessLost)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    process.check(json_grammar({"type": "object"}))


def test_a_request_that_takes_too_long_ends_the_process_in_time(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_bytes(TOKENS.encode())
    process = GrammarProcess(path, max_cpu_s=60, max_wall_s=5)
    try:
        matcher = process.open(json_grammar({"type": "object"}))
        matcher.allowed()
        os.kill(process.child().pid, signal.SIGSTOP)
        with pytest.raises(GrammarProcessLost, match=r"did not end within 5 s"):
            process.check(json_grammar({"type": "object"}))
        process.check(json_grammar({"type": "object"}))
        matcher.accept(ord("{"))
        assert matcher.allowed()
    finally:
        process.close()
    with pytest.raises(GrammarProcessLost, match="has ended"):
        process.check(json_grammar({"type": "object"}))


def test_a_file_that_is_no_vocabulary_fails_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_bytes(b"nothing of the kind")
    process = GrammarProcess(path)
    try:
        with pytest.raises(GrammarFailed, match="no valid beginning"):
            process.check(json_grammar({"type": "object"}))
    finally:
        process.close()


def test_no_process_starts_where_memory_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tokens"
    path.write_bytes(TOKENS.encode())
    process = GrammarProcess(path)
    with monkeypatch.context() as patch:
        patch.setattr(grammar_process, "memory_bytes", lambda: (20 << 20, 1 << 30))
        said = r"takes about 24 MiB of memory, and 20 MiB are"
        with pytest.raises(GrammarProcessLost, match=said):
            process.check('start: "a"')
        assert process._child is None
    process.check('start: "a"')  # Memory is free again.
    process.close()


def test_a_machine_without_memory_ends_this_process_first(process: GrammarProcess) -> None:
    process.check('start: "a"')
    child = process._child
    assert child is not None
    score = Path(f"/proc/{child.pid}/oom_score_adj").read_text(encoding="ascii")
    assert int(score) == 1000
