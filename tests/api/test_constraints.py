"""Formats of answers: what is refused before any device hears of it, and why."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from api.openai import constraints
from api.openai.constraints import behind_thoughts, constrained, either
from coordinator.errors import FormatsUnchecked
from model.grammar_process import GrammarProcessLost
from planning.errors import RequestInvalid
from wire.messages import Sampling

SAMPLING = Sampling(9, (2,))
CHOICE = {"guided_choice": ["a", "b"]}


def deployment(**changes: Any) -> Any:
    """As much of a deployment as is looked at."""
    known: dict[str, Any] = {
        "name": "llama",
        "vocabulary": SimpleNamespace(check=lambda grammar: None),
        "keeps_grammars": True,
        "leads": (SimpleNamespace(name="pi-1"), SimpleNamespace(name="pi-2")),
    }
    return SimpleNamespace(**{**known, **changes})


def test_a_device_without_the_library_is_named_with_what_to_install() -> None:
    with pytest.raises(RequestInvalid, match=r"pi-2.*lacks llguidance: install shoal-llm\[agent\]"):
        constrained(deployment(keeps_grammars=False), CHOICE, SAMPLING)


def test_a_coordinator_without_the_library_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraints, "library_version", lambda: "")
    with pytest.raises(RequestInvalid, match=r"install shoal-llm\[coordinator\] there"):
        constrained(deployment(), CHOICE, SAMPLING)


def test_a_model_without_bytes_of_tokens_says_so() -> None:
    with pytest.raises(RequestInvalid, match="no bytes of their own"):
        constrained(deployment(vocabulary=None), CHOICE, SAMPLING)


def test_a_coordinator_that_cannot_check_a_format_blames_no_request() -> None:
    def check(grammar: str) -> None:
        raise GrammarProcessLost("20 MiB are free")

    vocabulary = SimpleNamespace(check=check)
    with pytest.raises(FormatsUnchecked, match="coordinator cannot check the format: 20 MiB") as no:
        constrained(deployment(vocabulary=vocabulary), CHOICE, SAMPLING)
    assert no.value.status == 503


def test_a_request_without_a_format_needs_no_library() -> None:
    lacking = deployment(vocabulary=None, keeps_grammars=False)
    for body in ({}, {"response_format": {"type": "text"}}, {"grammar": None}):
        assert constrained(lacking, body, SAMPLING) == (SAMPLING, "")


def test_grammars_are_joined_by_their_names() -> None:
    thought = behind_thoughts("thoughts ", ["thoughts: /x/"], 'start: "a"\n')
    first, second = json.loads(thought)["grammars"]
    assert first["lark_grammar"].startswith("start: thoughts @answer\nthoughts: /x/\n")
    assert second == {"name": "answer", "lark_grammar": 'start: "a"\n'}
    assert behind_thoughts("", [], 'start: "a"\n') == 'start: "a"\n'
    names = [part.get("name") for part in json.loads(either('start: "c"\n', thought))["grammars"]]
    assert names == [None, "calls", "text", "answer"]


def test_a_schema_may_be_text_and_has_bounds() -> None:
    kept, field = constrained(deployment(), {"json_schema": '{"type": "integer"}'}, SAMPLING)
    assert field == "json_schema"
    assert b"%json" in kept.grammar
    assert b"no_forcing" in kept.grammar
    deep: dict[str, Any] = {}
    for _ in range(200):
        deep = {"items": deep}
    with pytest.raises(RequestInvalid, match="nested deeper than 100"):
        constrained(deployment(), {"json_schema": deep}, SAMPLING)
    with pytest.raises(RequestInvalid, match="not a JSON schema"):
        constrained(deployment(), {"json_schema": "{" * 100_000}, SAMPLING)
    large = {"enum": ["x" * 1000] * 300}
    with pytest.raises(RequestInvalid, match="longer than 256 KiB"):
        constrained(deployment(), {"json_schema": large}, SAMPLING)
