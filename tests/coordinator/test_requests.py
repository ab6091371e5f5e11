"""Requests in flight: how their states, counts and times follow an answer."""

from __future__ import annotations

import asyncio

import pytest

from coordinator.serving.requests import MOST_ENDED, InFlight, Requests, current


def test_an_answer_passes_through_all_states() -> None:
    requests, request, seen = Requests(), InFlight("a", path="/v1/completions"), list[str]()
    with requests.serve(request):
        seen.append(request.state)
        request.asks("llama", 3)
        request.starts(7, 1)
        request.cached_tokens += 2
        seen.append(request.state)
        for _ in range(2):
            request.answers(1)
        seen.append(request.state)
        assert requests.in_flight == (request,)
    assert [*seen, request.state] == ["waiting", "prompt", "answering", "ended"]
    assert not requests.in_flight
    assert requests.ended == (request,)
    told = request.to_dict()
    assert (told["prompt_tokens"], told["cached_tokens"], told["answer_tokens"]) == (3, 2, 2)
    assert list(request.sequences) == [(7, 1)]
    assert 0 <= told["started_s"] <= told["first_token_s"] <= told["age_s"]
    assert told["token_s"] is not None


def test_the_current_request_is_that_of_the_task() -> None:
    requests = Requests()

    async def deep(expected: InFlight) -> None:
        await asyncio.sleep(0)
        assert current() is expected

    async def one(name: str) -> None:
        with requests.serve(InFlight(name)) as request:
            await asyncio.gather(deep(request), asyncio.create_task(deep(request)))

    async def both() -> None:
        await asyncio.gather(one("a"), one("b"))

    asyncio.run(both())
    assert current() is not current(), "without a request, counts go nowhere"


def test_a_request_that_is_asked_again_with_its_id_draws_the_same() -> None:
    assert InFlight("req-1").seed == InFlight("req-1").seed
    assert InFlight("req-1").seed != InFlight("req-2").seed
    # Whoever asks without HTTP has no id. All these answers must not be alike.
    assert InFlight("").seed != InFlight("").seed


def test_watchers_hear_of_states_and_not_of_tokens() -> None:
    async def check() -> None:
        requests = Requests()
        with requests.changed.watch() as changed, requests.serve(InFlight("a")) as request:
            changed.clear()
            request.starts(1, 1)
            assert changed.is_set()
            changed.clear()
            request.answers(1)
            assert changed.is_set()
            changed.clear()
            request.answers(1)
            assert not changed.is_set()

    asyncio.run(check())


def test_failed_requests_end_too_and_old_ones_are_forgotten() -> None:
    requests, ended = Requests(), list[str]()
    requests.subscribe(lambda request: ended.append(request.id))
    with pytest.raises(ValueError, match="broken"), requests.serve(InFlight("broken")):
        raise ValueError("broken")
    for number in range(MOST_ENDED):
        with requests.serve(InFlight(str(number))):
            pass
    assert ended[0] == "broken"
    assert len(ended) == MOST_ENDED + 1
    assert requests.find("broken") is None
    assert requests.find("7") is not None
    assert len(requests.ended) == MOST_ENDED
