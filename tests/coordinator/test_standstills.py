"""Answers whose rows were lost between two stages run again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest

from coordinator.errors import RowsLost
from coordinator.loading.deployment import Deployment
from coordinator.loading.state import Lost
from coordinator.serving import gateway, standstills
from coordinator.serving.standstills import LEAST_BEATS, Standstills
from tests.coordinator.test_teams import (
    ALONE,
    Run,
    Shoal,
    collect,
    plan_of,
    run,
)
from wire.messages import Heartbeat, StageBeat, StageCounts, StartSequence, TokenSampled

__all__ = ["run"]

COUNTS = StageCounts(1, 1, 1, 1, 1, 1, 1, 1, 1, 1)
Counts = Callable[[int], StageCounts]
"""The counts of a stage at its n-th heartbeat."""


def idle(_: int) -> StageCounts:
    return COUNTS


async def beat(shoal: Shoal, deployment: Deployment, *, first: Counts = idle) -> None:
    """Let both leads send enough heartbeats, the first stage with these counts."""
    for number in range(LEAST_BEATS + 1):
        await shoal.said(
            "a", Heartbeat(1, stages=(StageBeat(deployment.epoch, 0.0, first(number)),))
        )
        await shoal.said("d", Heartbeat(1, stages=(StageBeat(deployment.epoch, 0.0, COUNTS),)))
    await asyncio.gather(*(shoal.member(name).lives() for name in "ad"))


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standstills, "STANDSTILL_S", 0.0)


def starts(shoal: Shoal) -> list[StartSequence]:
    """The sequences that the first stages were told to start."""
    return [start for _, start in shoal.of(StartSequence) if start.prompt]


def test_an_answer_runs_again_then_elsewhere_and_then_fails(run: Run) -> None:
    async def test(shoal: Shoal) -> None:
        Standstills(shoal.roster, shoal.models, shoal.gateway)
        first = await shoal.load(plan_of(ALONE))
        shoal.operations.plans = [plan_of(ALONE)]
        answer = asyncio.ensure_future(collect(shoal))
        await shoal.until(lambda: len(starts(shoal)) == 1)
        await shoal.said("d", TokenSampled(first.epoch, starts(shoal)[0].sequence, 0, 5, ""))
        await beat(shoal, first)
        await shoal.until(lambda: len(starts(shoal)) == 2)
        again = starts(shoal)[1]
        assert (again.epoch, again.prompt, again.cached) == (first.epoch, (1, 2, 5), 0)
        assert shoal.models.serving is first
        await beat(shoal, first)
        await shoal.until(lambda: len(starts(shoal)) == 3)
        second = shoal.models.serving
        assert second is not None
        assert starts(shoal)[2].epoch == second.epoch != first.epoch
        await beat(shoal, second)
        with pytest.raises(RowsLost, match="no token comes although all devices are well"):
            await answer
        assert shoal.models.serving is second

    run(test)


def _runs(number: int) -> StageCounts:
    return replace(COUNTS, passes=number)


def _sends(number: int) -> StageCounts:
    return replace(COUNTS, frames=number)


def _is_busy(number: int) -> StageCounts:
    return replace(COUNTS, busy=True)


@pytest.mark.parametrize("first", [_runs, _sends, _is_busy])
def test_a_stage_with_work_is_no_standstill(run: Run, first: Counts) -> None:
    async def test(shoal: Shoal) -> None:
        Standstills(shoal.roster, shoal.models, shoal.gateway)
        deployment = await shoal.load(plan_of(ALONE))
        answer = asyncio.ensure_future(collect(shoal))
        await shoal.until(lambda: starts(shoal))
        await beat(shoal, deployment, first=first)
        assert len(starts(shoal)) == 1
        answer.cancel()

    run(test)


def test_a_shoal_that_waits_for_nobody_is_no_standstill(run: Run) -> None:
    async def test(shoal: Shoal) -> None:
        Standstills(shoal.roster, shoal.models, shoal.gateway)
        deployment = await shoal.load(plan_of(ALONE))
        await beat(shoal, deployment)
        answer = asyncio.ensure_future(collect(shoal))
        await shoal.until(lambda: starts(shoal))
        await shoal.said("a", Heartbeat(1, stages=(StageBeat(deployment.epoch, 0.0, COUNTS),)))
        await shoal.member("a").lives()
        assert len(starts(shoal)) == 1
        answer.cancel()

    run(test)


def test_an_answer_that_the_others_pass_runs_again(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standstills, "STANDSTILL_S", 1e9)
    monkeypatch.setattr(gateway, "PASSED_TOKENS", 2)

    async def test(shoal: Shoal) -> None:
        Standstills(shoal.roster, shoal.models, shoal.gateway)
        deployment = await shoal.load(plan_of(ALONE))
        answers = [asyncio.ensure_future(collect(shoal, 9)) for _ in range(2)]
        await shoal.until(lambda: len(starts(shoal)) == 2)
        slow, fast = (start.sequence for start in starts(shoal))
        for index in range(3):
            await shoal.said("d", TokenSampled(deployment.epoch, fast, index, 5, ""))
            await shoal.member("d").lives()
            assert len(starts(shoal)) == 2
        await shoal.said("a", Heartbeat(1, stages=(StageBeat(deployment.epoch, 0.0, COUNTS),)))
        await shoal.until(lambda: len(starts(shoal)) == 3)
        assert starts(shoal)[2].sequence > fast > slow
        for answer in answers:
            answer.cancel()

    run(test)


async def served_after(shoal: Shoal, before: Deployment) -> Deployment:
    await shoal.until(lambda: shoal.models.serving not in (None, before))
    after = shoal.models.serving
    assert after is not None
    return after


def test_nothing_is_remembered_of_deployments_that_have_ended(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each one ends while an answer waits."""
    monkeypatch.setattr(standstills, "STANDSTILL_S", 60.0)

    async def test(shoal: Shoal) -> None:
        watch = Standstills(shoal.roster, shoal.models, shoal.gateway)
        deployment = await shoal.load(plan_of(ALONE))
        answer = asyncio.ensure_future(collect(shoal))
        for _ in range(3):
            await shoal.until(partial(shoal.gateway.waits, deployment))
            await beat(shoal, deployment)
            assert list(watch._quiet) == [deployment.epoch]
            shoal.operations.plans = [plan_of(ALONE)]
            shoal.models.apply(deployment.name, Lost(RowsLost()))
            deployment = await served_after(shoal, deployment)
        answer.cancel()

    run(test)
