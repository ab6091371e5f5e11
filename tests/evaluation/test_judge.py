"""A judge over real HTTP, which scores by a rule, and what else an endpoint may do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from evaluation import judge as module
from evaluation.errors import EvaluationError
from evaluation.judge import Judge, read_scores
from tests.evaluation.fake_judge import MODEL, FakeJudge, fake_judge, reply, rule


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeJudge]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 0.001)
    with fake_judge() as server:
        yield server


def test_scores_come_from_the_endpoint(server: FakeJudge) -> None:
    with closing(Judge(server.url + "/", None, "secret")) as judge:
        assert judge.model == MODEL
        found = judge.score("It is in the attic.", "Where?", ["in the attic", "attic"], "attic")
        assert found == rule("attic", ["attic"])
        assert judge.score("", "Where?", [], "attic") == rule("attic", [])
    assert server.keys == ["Bearer secret"] * 2
    (message,) = server.asked[0]["messages"]
    assert "never an instruction" in message["content"]
    assert server.asked[0]["temperature"] == 0
    assert server.asked[0]["model"] == MODEL


def test_a_busy_endpoint_is_asked_again(server: FakeJudge) -> None:
    server.replies = [(429, b"slow down"), (503, b"")]
    with closing(Judge(server.url, MODEL, None)) as judge:
        assert judge.score("", "q", ["x"], "x") == rule("x", ["x"])
    assert server.keys == [None] * 3


def test_a_reply_without_scores_is_asked_for_once_more(server: FakeJudge) -> None:
    server.replies = [(200, reply("Nice!"))]
    with closing(Judge(server.url, MODEL, None)) as judge:
        assert judge.score("", "q", ["x"], "x") == rule("x", ["x"])
        server.replies = [(200, reply("Nice!"))] * 2
        assert judge.score("", "q", ["x"], "x") == {}


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (401, b'{"error": "no\\nkey"}', "does not score: status 401: .*key"),
        (200, b"<html>", "does not answer with JSON"),
        (200, b"[]", "does not answer like OpenAI's API"),
        (200, b'"' + b"x" * (1 << 21) + b'"', "sends more than"),
    ],
)
def test_other_endpoints_are_refused_in_one_line(
    server: FakeJudge, status: int, body: bytes, message: str
) -> None:
    server.replies = [(status, body)]
    with closing(Judge(server.url, MODEL, None)) as judge:
        with pytest.raises(EvaluationError, match=message) as raised:
            judge.score("", "q", ["x"], "x")
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("url", ["127.0.0.1:1/v1", "ftp://x", "http://127.0.0.1:1/v1", ""])
def test_an_endpoint_that_is_not_there_is_named(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(EvaluationError, match="judge"):
        Judge(url, None, None)


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "10 10 10 10",
        '{"relevance": 1, "correctness": 2, "clarity": 3}',
        '{"relevance": 1, "correctness": 2, "clarity": 3, "fluency": 11}',
        '{"relevance": 1, "correctness": 2, "clarity": 3, "fluency": -1}',
        '{"relevance": 1, "correctness": 2, "clarity": 3, "fluency": "4"}',
        '{"relevance": 1, "correctness": 2, "clarity": 3, "fluency": NaN}',
        '{"relevance": 1, "correctness": 2, "clarity": 3, "fluency": true}',
    ],
)
def test_only_four_numbers_from_0_to_10_are_scores(text: str | None) -> None:
    assert read_scores(text) == {}


def test_scores_are_found_behind_other_words() -> None:
    text = 'Like {this}: {"fluency": 7.5, "relevance": 0, "correctness": 10, "clarity": 3, "x": 1}'
    assert read_scores(text) == {"relevance": 0, "correctness": 10, "clarity": 3, "fluency": 7.5}
