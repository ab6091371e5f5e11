"""A device that is alive while a pass of its stage does not end is replaced."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from coordinator.loading.stalls import (
    FIRST_STALL_S,
    STALL_FACTOR,
    STALL_S,
    Stalls,
    pass_s,
    stall_s,
)
from coordinator.loading.state import Serving
from tests.coordinator.test_teams import (
    ALONE,
    BLOCKS,
    RING,
    Run,
    Shoal,
    collect,
    plan_of,
    run,
)
from wire.messages import Heartbeat, LoadStage, StageBeat, StageCounts, StartSequence, TokenSampled

__all__ = ["run"]

COUNTS = StageCounts(1, 1, 1, 1, 1, 1, 1, 1, 1, 1)


def beat(epoch: int, running_s: float, rows: int = 1, passes: int = 1) -> Heartbeat:
    counts = replace(COUNTS, passes=passes, running_us=round(1e6 * running_s), running_rows=rows)
    return Heartbeat(1, stages=(StageBeat(epoch, counts=counts),))


def test_a_pass_may_take_a_few_times_the_predicted_time() -> None:
    (stage, _) = plan_of(ALONE).stages
    stage = replace(stage, compute_s=0.5, prefill_s_per_token=0.1)
    assert pass_s(stage, 1) == 0.5
    assert pass_s(stage, 64) == 32.0
    assert stall_s(stage, replace(COUNTS, running_rows=1)) == STALL_S
    assert stall_s(stage, replace(COUNTS, running_rows=64)) == STALL_FACTOR * 32
    assert stall_s(stage, replace(COUNTS, passes=0, running_rows=1)) == FIRST_STALL_S


def test_a_stalled_device_is_replaced_and_welcomed_back(run: Run) -> None:
    async def test(shoal: Shoal) -> None:
        Stalls(shoal.roster, shoal.models)
        first = await shoal.load(plan_of(ALONE))
        shoal.operations.plans = [plan_of(((("a",), BLOCKS),))]
        answer = asyncio.ensure_future(collect(shoal))
        await shoal.until(lambda: shoal.of(StartSequence))
        number = shoal.of(StartSequence)[0][1].sequence
        await shoal.said("d", TokenSampled(first.epoch, number, 0, 5, ""))
        # A long pass is no stall, nor is one of another deployment.
        limit_s = STALL_FACTOR * 64
        for message in (beat(first.epoch, limit_s - 1, 64), beat(first.epoch + 1, 1e6)):
            await shoal.said("d", message)
        await shoal.member("d").lives()
        assert shoal.models.serving is first
        stalled = shoal.member("d")
        await shoal.said("d", beat(first.epoch, limit_s + 1, 64))
        await shoal.until(lambda: shoal.models.serving not in (None, first))
        assert "alive, but a pass of its stage has computed for" in str(stalled.lost)
        assert [name for name, _ in shoal.of(LoadStage)][2:] == ["a"]
        second = shoal.models.serving
        assert second is not None
        await shoal.until(lambda: len(shoal.of(StartSequence)) == 3)
        name, start = shoal.of(StartSequence)[2]
        assert (name, start.epoch, start.prompt) == ("a", second.epoch, (1, 2, 5))
        await shoal.said("a", TokenSampled(second.epoch, start.sequence, 0, 6, "length"))
        pieces = await answer
        assert [token for piece in pieces for token in piece.tokens] == [5, 6]
        await shoal.join("d")
        assert isinstance(shoal.models.current, Serving)
        assert shoal.models.serving is second

    run(test)


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_member_of_a_team_is_left_to_its_team(run: Run, name: str) -> None:
    async def test(shoal: Shoal) -> None:
        Stalls(shoal.roster, shoal.models)
        deployment = await shoal.load(plan_of(RING))
        await shoal.said(name, beat(deployment.epoch, 1e6))
        assert await shoal.member(name).lives()
        assert shoal.models.serving is deployment

    run(test)


def test_a_pass_of_texts_is_predicted_by_its_rows() -> None:
    (stage, _) = plan_of(ALONE).stages
    stage = replace(stage, compute_s=2.0, prefill_s_per_token=0.004)
    assert pass_s(stage, 500, encodes=True) == pytest.approx(2.0)
    assert pass_s(stage, 500) == pytest.approx(1000.0)
