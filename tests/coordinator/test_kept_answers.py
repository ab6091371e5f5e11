"""Greedy answers that identical requests get again, over real control connections."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import replace

import pytest

from coordinator.serving import kept_answers
from coordinator.serving.answer import ALL_SHORTCUTS
from coordinator.serving.gateway import Gateway
from coordinator.serving.kept_answers import KeptAnswers
from coordinator.serving.pieces import Piece, Timing
from tests.coordinator.test_gateway import Cluster, Run, run, text_of
from tests.coordinator.test_gateway_prefix import PROMPT, answered
from wire.messages import Sampling

__all__ = ["run"]  # The fixture of these tests.

SAMPLING = Sampling(2, ())


def caching(cluster: Cluster, limit_bytes: int = 1 << 20) -> None:
    cluster.gateway = Gateway(
        cluster.roster, cluster.models, ALL_SHORTCUTS, KeptAnswers(limit_bytes)
    )


async def again(cluster: Cluster, sampling: Sampling = SAMPLING) -> tuple[list[Piece], Timing]:
    """Ask without any stage's help."""
    timing = Timing()
    deployment = await cluster.models.deployment()
    pieces = cluster.gateway.generate(deployment, PROMPT, sampling, (), timing)
    return [piece async for piece in pieces], timing


def test_an_identical_request_gets_the_answer_without_the_stages(run: Run) -> None:
    async def test(cluster: Cluster) -> None:
        caching(cluster)
        cluster.deploy()
        _, first = await answered(cluster, PROMPT, "ab")
        assert first.kept_tokens == 0
        # A greedy answer does not depend on the seed.
        for sampling in (SAMPLING, replace(SAMPLING, seed=7)):
            pieces, timing = await again(cluster, sampling)
            assert text_of(pieces) == "ab"
            assert [len(piece.tokens) for piece in pieces] == [1, 1]
            assert pieces[-1].finish == "length"
            assert (timing.kept_tokens, timing.cached_tokens) == (2, len(PROMPT))
            assert (timing.prefill_tokens_per_s, timing.decode_tokens_per_s) == (None, None)

    run(test)


def test_other_requests_are_computed(run: Run) -> None:
    async def test(cluster: Cluster) -> None:
        caching(cluster)
        cluster.deploy()
        await answered(cluster, PROMPT, "ab")
        # Another prompt, another length, and one that wants no shortcut.
        await answered(cluster, (*PROMPT, 9), "cd")
        await answered(cluster, PROMPT, "abc")
        await answered(cluster, PROMPT, "ab", replace(ALL_SHORTCUTS, cache_prompt=False))
        # Another deployment of the model may have other widths: its epoch is part of the key.
        assert text_of((await again(cluster))[0]) == "ab"

    run(test)


def test_by_default_nothing_is_kept(run: Run) -> None:
    async def test(cluster: Cluster) -> None:
        cluster.deploy()
        for _ in range(2):
            _, timing = await answered(cluster, PROMPT, "ab")
            assert timing.kept_tokens == 0

    run(test)


@pytest.mark.parametrize(
    "sampling",
    [
        replace(SAMPLING, temperature=0.5),
        replace(SAMPLING, top_logprobs=0),
        replace(SAMPLING, prompt_logprobs=True),
    ],
)
def test_drawn_and_scored_answers_are_not_kept(sampling: Sampling) -> None:
    assert KeptAnswers(1 << 20).key(1, PROMPT, sampling, (), ()) is None


def test_a_key_is_of_everything_that_an_answer_depends_on() -> None:
    kept = KeptAnswers(1 << 20)
    keys = {
        kept.key(1, PROMPT, SAMPLING, (), ()),
        kept.key(2, PROMPT, SAMPLING, (), ()),
        kept.key(1, PROMPT[:-1], SAMPLING, (), ()),
        kept.key(1, PROMPT, replace(SAMPLING, max_tokens=3), (), ()),
        kept.key(1, PROMPT, replace(SAMPLING, grammar=b"x"), (), ()),
        kept.key(1, PROMPT, replace(SAMPLING, logit_bias=((1, 2.0),)), (), ()),
        kept.key(1, PROMPT, SAMPLING, ("x",), ()),
        kept.key(1, PROMPT, SAMPLING, (), ("x",)),
    }
    assert len(keys) == 8
    assert None not in keys


async def record(kept: KeptAnswers, name: bytes, *pieces: Piece) -> None:
    async def given() -> AsyncGenerator[Piece, None]:
        for piece in pieces:
            yield piece

    assert [piece async for piece in kept.record(name, given())] == list(pieces)


def test_answers_used_longest_ago_make_room(run: Run) -> None:
    async def test(cluster: Cluster) -> None:
        last = Piece("x", (1,), "stop")
        kept = KeptAnswers(8 * (kept_answers.PIECE_BYTES + 4))
        for number in range(8):
            await record(kept, bytes([number]), last)
        assert kept.find(b"\0") == (last,)  # The one used longest ago is 1 now.
        await record(kept, b"new", last)
        assert [kept.find(bytes([number])) is not None for number in range(3)] == [
            True,
            False,
            True,
        ]
        assert kept.find(b"new") == (last,)
        # One that would drive out most others is not kept.
        await record(kept, b"long", Piece("y", (2,), ""), last)
        assert kept.find(b"long") is None

    run(test)


def test_pauses_and_what_was_withdrawn_are_left_out(run: Run) -> None:
    async def test(cluster: Cluster) -> None:
        kept, last = KeptAnswers(1 << 20), Piece("x", (1,), "stop")
        wrong, pause = Piece("wrong", (3,), ""), Piece("", (), "", "a device was lost")
        await record(kept, b"a", wrong, Piece("", (), "", withdraws=True), pause, last)
        assert kept.find(b"a") == (last,)
        await record(kept, b"b", wrong)  # It has no end.
        assert kept.find(b"b") is None

    run(test)
