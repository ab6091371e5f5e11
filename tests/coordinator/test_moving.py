"""A model moves from a deployment that works to a better plan, and its answers go on there."""

from __future__ import annotations

import asyncio

import pytest

from coordinator.errors import Moved
from coordinator.loading import recovery
from coordinator.loading.state import MoveBegan
from tests.coordinator.test_teams import (
    BLOCKS,
    Parts,
    Run,
    Shoal,
    collect,
    plan_of,
    planned,
    run,
)
from wire.messages import LoadStage, StartSequence, TokenSampled, UnloadStage

__all__ = ["run"]

ALONE: tuple[Parts, ...] = ((("a",), 3), (("d",), BLOCKS))


def test_an_answer_goes_on_where_the_model_moves(run: Run) -> None:
    async def test(shoal: Shoal) -> None:
        first = await shoal.load(plan_of(ALONE))
        answer = asyncio.ensure_future(collect(shoal))
        await shoal.until(lambda: shoal.of(StartSequence))
        number = shoal.of(StartSequence)[0][1].sequence
        await shoal.said("d", TokenSampled(first.epoch, number, 0, 5, ""))
        await shoal.member("d").lives()
        wanted = planned(plan_of(((("c",), BLOCKS),)))
        shoal.models.apply(first.name, MoveBegan(Moved(), wanted))
        await shoal.until(lambda: shoal.models.serving not in (None, first))
        second = shoal.models.serving
        assert second is not None
        assert (second.where, second.request) == ("c", first.request)
        assert {name for name, _ in shoal.of(UnloadStage)} == {"a", "d"}
        assert [name for name, _ in shoal.of(LoadStage)][2:] == ["c"]
        await shoal.until(lambda: len(shoal.of(StartSequence)) == 3)
        name, start = shoal.of(StartSequence)[2]
        assert (name, start.epoch, start.prompt) == ("c", second.epoch, (1, 2, 5))
        await shoal.said("c", TokenSampled(second.epoch, start.sequence, 0, 6, "length"))
        pieces = await answer
        assert [token for piece in pieces for token in piece.tokens] == [5, 6]
        assert any("moves to a better plan" in piece.notice for piece in pieces)
        told = [event.kind for event in shoal.story.after()]
        assert told[told.index("moving") :][:2] == ["moving", "replaced"]

    run(test)


def test_a_move_that_cannot_be_is_planned_anew(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "RETRY_S", 0.01)

    async def test(shoal: Shoal) -> None:
        first = await shoal.load(plan_of(ALONE))
        shoal.operations.plans = [plan_of(ALONE)]
        wanted = planned(plan_of(((("c",), BLOCKS),)))
        lost = shoal.member("c")
        shoal.kill("c")
        assert not await lost.lives()
        shoal.models.apply(first.name, MoveBegan(Moved(), wanted))
        await shoal.until(lambda: shoal.models.serving not in (None, first))
        assert shoal.models.serving is not None
        assert shoal.models.serving.where == first.where

    run(test)
