"""Requests made from the OpenAPI document, and answers held against it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from api.anthropic import requests
from api.document import CHAT, COMMON, COMPLETION, MESSAGES, RESPONSE, document
from api.openai import responses_input
from api.openai.fields import IGNORED, KNOWN, NEUTRAL
from api.openai.jobs import CHAT_FIELDS, COMPLETION_FIELDS
from api.openai.texts import CONTENT_FIELDS, PROMPT_FIELDS
from tests.system.scripted import ScriptedCluster

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    unsupported_method,
]


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedCluster]:
    cluster = ScriptedCluster(tmp_path_factory.mktemp("scripted"))
    try:
        cluster.serve("hermes")
        yield cluster
    finally:
        cluster.stop()


SCHEMA = schemathesis.openapi.from_dict(document())
OPERATIONS = [(path, method) for path, item in document()["paths"].items() for method in item]


def test_the_document_is_served(scripted: ScriptedCluster) -> None:
    assert scripted.get("/openapi.json") == document()


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_answers_are_as_the_document_says(
    scripted: ScriptedCluster, path: str, method: str
) -> None:
    @settings(
        max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(case=SCHEMA[path][method.upper()].as_strategy())
    def check(case: Any) -> None:
        if isinstance(case.body, dict):
            case.body.pop("model", None)  # Nearly all would name another model.
        answer = case.call(base_url=scripted.url, timeout=60)
        case.validate_response(answer, checks=CHECKS)

    check()


@pytest.mark.parametrize(
    ("path", "prompt"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/completions", {"prompt": "a"}),
    ],
)
def test_a_stream_is_as_the_document_says(
    scripted: ScriptedCluster, path: str, prompt: dict[str, Any]
) -> None:
    body = {**prompt, "max_tokens": 2, "stream": True}
    case = SCHEMA[path]["POST"].Case(body=body, media_type="application/json")
    answer = case.call(base_url=scripted.url, timeout=60)
    assert answer.headers["content-type"][0].startswith("text/event-stream")
    case.validate_response(answer, checks=CHECKS)


@pytest.mark.parametrize(
    ("path", "body", "needs"),
    [
        ("/v1/embeddings", {"input": "a"}, "load a model that gives vectors"),
        ("/v1/classify", {"input": "a"}, "load a model that classifies"),
        ("/v1/answers", {"question": "a", "context": "b"}, "load a model for questions"),
    ],
)
def test_a_model_that_generates_encodes_nothing(
    scripted: ScriptedCluster, path: str, body: dict[str, str], needs: str
) -> None:
    answer = httpx.post(scripted.url + path, json=body, timeout=60)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "model_lacks_output"
    assert f"hermes generates text: {needs}" in error["message"]


def test_the_document_has_every_field() -> None:
    shared = KNOWN | NEUTRAL.keys() | IGNORED
    for own, table in ((CHAT_FIELDS, CHAT), (COMPLETION_FIELDS, COMPLETION)):
        documented = COMMON.keys() | table.keys()
        assert shared | own == documented
    assert RESPONSE.keys() == {*responses_input.SAME, *responses_input.OTHER} | set(
        responses_input.NEUTRAL
    )
    assert MESSAGES.keys() == {*requests.SAME, *requests.OTHER} | set(requests.NEUTRAL)
    schemas = document()["components"]["schemas"]
    for name in ("EmbeddingRequest", "ClassifyRequest", "AnswersRequest"):
        assert schemas[name]["properties"].keys() >= IGNORED
    assert schemas["TokenizeRequest"]["properties"].keys() >= CONTENT_FIELDS | PROMPT_FIELDS


def bounded() -> Iterator[Any]:
    """Every field of OpenAI's that is a number: its route, its name and its schema."""
    for path, table in (("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)):
        for field, schema in {**COMMON, **table}.items():
            for one in schema.get("anyOf", ()):
                for form in one.get("anyOf", [one]):
                    if form.get("type") in ("integer", "number"):
                        yield pytest.param(path, field, form, id=f"{path}-{field}")


@pytest.mark.parametrize(("path", "field", "schema"), list(bounded()))
def test_the_largest_number_in_the_document_is_the_largest_that_is_read(
    scripted: ScriptedCluster, path: str, field: str, schema: dict[str, Any]
) -> None:
    def status(value: float) -> tuple[int, str]:
        body: dict[str, Any] = {"prompt": "a"}
        if "chat" in path:
            body = {"messages": [{"role": "user", "content": "a"}]}
            body["logprobs"] = field == "top_logprobs"
        limit = "max_completion_tokens" if field == "max_completion_tokens" else "max_tokens"
        body |= {limit: 1, field: value}
        if field == "best_of":
            body["n"] = value
        answer = httpx.post(scripted.url + path, json=body, timeout=60)
        return answer.status_code, answer.text

    assert status(schema["maximum"])[0] == 200
    code, text = status(schema["maximum"] + 1)
    assert code == 400
    assert ("n" if field == "best_of" else field) in text
