"""Requests made from the OpenAPI document, and answers held against it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from coordinator.http.document import CHAT, COMMON, COMPLETION, document
from coordinator.http.openai.fields import IGNORED, KNOWN, NEUTRAL
from coordinator.http.openai.jobs import CHAT_FIELDS, COMPLETION_FIELDS
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


@pytest.fixture(scope="module")
def schema(scripted: ScriptedCluster) -> Any:
    served = scripted.get("/openapi.json")
    assert served == document()
    served.update(servers=[{"url": scripted.url}])
    return schemathesis.openapi.from_dict(served)


from_document = schemathesis.pytest.from_fixture("schema")


@from_document.parametrize()
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_answers_are_as_the_document_says(case: schemathesis.Case) -> None:
    answer = case.call(timeout=60)
    if answer.status_code == 501:  # It is the documented answer of /v1/embeddings.
        assert case.path == "/v1/embeddings"
        return
    case.validate_response(answer, checks=CHECKS)


def test_the_document_has_every_field() -> None:
    shared = KNOWN | NEUTRAL.keys() | IGNORED
    for own, table in ((CHAT_FIELDS, CHAT), (COMPLETION_FIELDS, COMPLETION)):
        documented = COMMON.keys() | table.keys()
        assert shared | own <= documented
