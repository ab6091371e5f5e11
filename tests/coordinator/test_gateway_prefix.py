"""Requests whose prompts begin with what a slot keeps, over real control connections."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest

from coordinator.errors import AgentFailed, AgentLost
from coordinator.loading.state import Lost, Place
from coordinator.serving.answer import ALL_SHORTCUTS, Shortcuts
from coordinator.serving.gateway import Gateway
from coordinator.serving.pieces import Piece, Timing
from coordinator.serving.requests import InFlight, Requests
from model.tokenizer import Tokenizer
from tests.coordinator.test_gateway import (
    EPOCH,
    LLAMA,
    Cluster,
    Run,
    collect,
    ended,
    next_begun,
    run,
    text_of,
)
from wire.messages import Sampling, SequenceFailed, StartSequence, TokenSampled

__all__ = ["run"]  # The fixture of these tests.

PROMPT = (1, 2, 3, 4)
TWO = Sampling(2, ())


def letters(text: str) -> tuple[int, ...]:
    return tuple(Tokenizer.load(LLAMA).encode(text, add_special=False))


async def answered(
    cluster: Cluster,
    prompt: tuple[int, ...],
    text: str = "ab",
    shortcuts: Shortcuts = ALL_SHORTCUTS,
) -> tuple[StartSequence, Timing]:
    """Ask, answer by ``text``, and return what the first stage was told, and the timing."""
    timing = Timing()
    deployment = await cluster.models.deployment()
    pieces = cluster.gateway.generate(
        deployment, prompt, Sampling(len(text), ()), (), timing, shortcuts=shortcuts
    )

    async def collected() -> list[Piece]:
        return [piece async for piece in pieces]

    task = asyncio.ensure_future(collected())
    begun = await cluster.begun()
    await cluster.sample(begun.sequence, text, "length")
    assert text_of(await task) == text
    await ended(cluster, begun.sequence)
    return begun, timing


def test_the_next_turn_runs_only_what_is_new(run: Run) -> None:
    async def test(cluster: Cluster) -> None:
        cluster.deploy()
        begun, timing = await answered(cluster, PROMPT)
        assert (begun.cached, timing.cached_tokens) == (0, 0)
        longer = (*PROMPT, *letters("ab"), 9)
        begun, timing = await answered(cluster, longer)
        # The row of the last token of an answer has never run.
        assert (begun.prompt, begun.cached) == (longer, len(PROMPT) + 1)
        assert (timing.prompt_tokens, timing.cached_tokens) == (len(longer), len(PROMPT) + 1)
        begun, _ = await answered(cluster, longer, shortcuts=Shortcuts(cache_prompt=False))
        assert begun.cached == 0
        begun, _ = await answered(cluster, longer)
        assert begun.cached == len(longer) - 1

    run(test)


def test_chunks_are_chosen_for_the_rows_that_run(run: Run) -> None:
    async def test(cluster: Cluster) -> None:
        cluster.deploy()
        long = tuple(range(1, 30))
        begun, _ = await answered(cluster, long)
        assert begun.chunk_tokens == 16
        begun, _ = await answered(cluster, (*long[:28], 7))
        assert begun.cached == 28
        # One row is a chunk by itself, in any size.
        assert begun.chunk_tokens == 64

    run(test)


def test_a_coordinator_may_keep_no_prefix(run: Run) -> None:
    async def test(cluster: Cluster) -> None:
        cluster.gateway = Gateway(cluster.roster, cluster.models, Shortcuts(cache_prompt=False))
        cluster.deploy()
        for _ in range(2):
            begun, timing = await answered(cluster, PROMPT)
            assert (begun.cached, timing.cached_tokens) == (0, 0)

    run(test)


def test_a_cancelled_answer_keeps_the_rows_before_its_last_token(run: Run) -> None:
    async def test(cluster: Cluster) -> None:
        deployment = cluster.deploy()
        async with aclosing(cluster.gateway.generate(deployment, PROMPT, Sampling(9, ()))) as one:
            task = asyncio.ensure_future(anext(one))
            begun = await cluster.begun()
            await cluster.sample(begun.sequence, "abc")
            await task
            await anext(one)
            await anext(one)
        await ended(cluster, begun.sequence)
        begun, _ = await answered(cluster, (*PROMPT, *letters("abcd")))
        assert begun.cached == len(PROMPT) + 2

    run(test)


def test_a_failed_sequence_keeps_nothing(run: Run) -> None:
    async def test(cluster: Cluster) -> None:
        cluster.deploy()
        await answered(cluster, PROMPT)
        task = asyncio.ensure_future(collect(cluster, (*PROMPT, 9)))
        begun = await cluster.begun()
        assert begun.cached == len(PROMPT)
        failure = SequenceFailed(EPOCH, begun.sequence, "no memory")
        await cluster.agents[0].send(failure)
        with pytest.raises(AgentFailed, match="no memory"):
            await task
        await ended(cluster, begun.sequence)
        begun, _ = await answered(cluster, (*PROMPT, 9))
        assert begun.cached == 0

    run(test)


def test_a_stage_that_lacks_the_rows_gets_the_whole_prompt(run: Run) -> None:
    async def test(cluster: Cluster) -> None:
        cluster.deploy()
        await answered(cluster, PROMPT)
        timing = Timing()
        task = asyncio.ensure_future(collect(cluster, (*PROMPT, 9), TWO, timing=timing))
        begun = await cluster.begun()
        assert begun.cached == len(PROMPT)
        lost = SequenceFailed(EPOCH, begun.sequence, "not kept", prefix_lost=True)
        await cluster.agents[1].send(lost)
        await ended(cluster, begun.sequence)
        again = await cluster.begun()
        assert again == replace(begun, sequence=again.sequence, cached=0)
        assert again.sequence > begun.sequence
        await cluster.sample(again.sequence, "ab", "length")
        assert text_of(await task) == "ab"
        assert timing.cached_tokens == 0

    run(test)


def test_kept_rows_count_once_they_have_served(run: Run) -> None:
    """A count that goes down again would look to Prometheus like a new start."""

    async def test(cluster: Cluster) -> None:
        cluster.deploy()
        await answered(cluster, PROMPT)
        with Requests().serve(InFlight("one")) as request:
            task = asyncio.ensure_future(collect(cluster, (*PROMPT, 9), TWO))
            begun = await cluster.begun()
            assert (begun.cached, request.cached_tokens) == (len(PROMPT), 0)
            lost = SequenceFailed(EPOCH, begun.sequence, "not kept", prefix_lost=True)
            await cluster.agents[1].send(lost)
            await ended(cluster, begun.sequence)
            again = await cluster.begun()
            await cluster.sample(again.sequence, "ab", "length")
            await task
            assert request.cached_tokens == 0
        await ended(cluster, again.sequence)
        with Requests().serve(InFlight("two")) as request:
            await answered(cluster, (*PROMPT, 9))
            assert request.cached_tokens == len(PROMPT)

    run(test)


def test_a_stage_that_complains_for_ever_ends_the_answer(run: Run) -> None:
    async def test(cluster: Cluster) -> None:
        cluster.deploy()
        await answered(cluster, PROMPT)
        task = asyncio.ensure_future(collect(cluster, (*PROMPT, 9), TWO))
        for _ in range(2):
            begun = await cluster.begun()
            lost = SequenceFailed(EPOCH, begun.sequence, "not kept", prefix_lost=True)
            await cluster.agents[1].send(lost)
            await ended(cluster, begun.sequence)
        with pytest.raises(AgentFailed, match="last: not kept"):
            await task

    run(test)


def test_another_deployment_keeps_nothing_of_the_last_one(run: Run) -> None:
    async def test(cluster: Cluster) -> None:
        broken = cluster.deploy()
        await answered(cluster, PROMPT)
        timing = Timing()
        pieces = cluster.gateway.generate(broken, (*PROMPT, 9), TWO, (), timing)
        first = asyncio.ensure_future(anext(pieces))
        begun = await next_begun(cluster)
        assert begun.cached == len(PROMPT)
        await cluster.sample(begun.sequence, "a")
        await first
        cluster.models.carry_out(Place, lambda action: None)
        cluster.models.apply("llama", Lost(AgentLost("last", "gone")))

        async def rest() -> list[Piece]:
            return [piece async for piece in pieces]

        task = asyncio.ensure_future(rest())
        cluster.deploy(epoch=EPOCH + 1)
        again = await next_begun(cluster)
        assert (again.epoch, again.cached) == (EPOCH + 1, 0)
        assert again.prompt == (*PROMPT, 9, *letters("a"))
        await cluster.sample(again.sequence, "b", "length", epoch=EPOCH + 1)
        assert text_of(await task) == "b"
        # The usage tells what the request itself began with.
        assert timing.cached_tokens == len(PROMPT)

    run(test)


def test_speeds_of_prompts_count_the_rows_that_ran() -> None:
    timing = Timing(prompt_tokens=10, cached_tokens=6, started_s=1.0, first_s=3.0)
    assert timing.prefill_tokens_per_s == 2.0


# ---- guesses ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("allowed", "wanted", "told"), [(14, 14, 14), (14, 3, 3), (5, 9, 5), (0, 9, 0)]
)
def test_a_request_gets_as_many_guesses_as_both_allow(
    run: Run, allowed: int, wanted: int, told: int
) -> None:
    async def test(cluster: Cluster) -> None:
        cluster.gateway = Gateway(cluster.roster, cluster.models, Shortcuts(drafts=allowed))
        cluster.deploy()
        begun, _ = await answered(cluster, PROMPT, shortcuts=Shortcuts(drafts=wanted))
        assert begun.drafts == told

    run(test)


def test_the_guesses_of_an_answer_are_counted(run: Run) -> None:
    async def test(cluster: Cluster) -> None:
        cluster.deploy()
        timing = Timing()
        task = asyncio.ensure_future(collect(cluster, PROMPT, Sampling(3, ()), timing=timing))
        begun = await cluster.begun()
        first, second, third = letters("abc")
        for sampled in (
            TokenSampled(EPOCH, begun.sequence, 0, first, ""),
            TokenSampled(EPOCH, begun.sequence, 1, second, "", 500),
            TokenSampled(EPOCH, begun.sequence, 2, third, "length", 500, drafted=7, accepted=1),
        ):
            await cluster.agents[1].send(sampled)
        assert text_of(await task) == "abc"
        assert (timing.drafted_tokens, timing.accepted_tokens) == (7, 1)
        assert timing.decode_tokens_per_s == 2000.0

    run(test)
