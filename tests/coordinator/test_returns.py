"""A device that only lost its connection to the coordinator comes back with its stage."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from coordinator.errors import AgentLost
from coordinator.loading import returns
from coordinator.loading.deployment import Deployment
from coordinator.loading.state import Lost, Replacing, error_of
from tests.coordinator.test_teams import (
    ALONE,
    BLOCKS,
    RING,
    Parts,
    Run,
    Shoal,
    collect,
    plan_of,
    run,
)
from wire.messages import (
    LoadStage,
    PeerLost,
    Sampling,
    StartSequence,
    TokenSampled,
    UnloadStage,
)

__all__ = ["run"]

ELSEWHERE: tuple[Parts, ...] = ((("c",), BLOCKS),)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here depends on how long the coordinator waits."""
    monkeypatch.setattr(returns, "RETURN_S", 60.0)


async def lose(shoal: Shoal, name: str) -> None:
    member = shoal.member(name)
    shoal.kill(name)
    assert not await member.lives()


async def serving_after(shoal: Shoal, before: Deployment) -> Deployment:
    await shoal.until(lambda: shoal.models.serving not in (None, before))
    after = shoal.models.serving
    assert after is not None
    return after


@pytest.mark.parametrize("parts", [ALONE, RING], ids=["alone", "team"])
@pytest.mark.parametrize("name", ["a", "d"])
def test_nothing_is_loaded_again_and_the_answer_goes_on(
    run: Run, name: str, parts: tuple[Parts, ...]
) -> None:
    async def test(shoal: Shoal) -> None:
        before = await shoal.load(plan_of(parts))
        answer = asyncio.ensure_future(collect(shoal))
        await shoal.until(lambda: shoal.of(StartSequence))
        number = shoal.of(StartSequence)[0][1].sequence
        await shoal.said("d", TokenSampled(before.epoch, number, 0, 5, ""))
        await shoal.member("d").lives()
        loads = len(shoal.of(LoadStage))
        for lost in (name, name, "d"):  # It may happen again.
            last = shoal.models.serving
            assert last is not None
            await lose(shoal, lost)
            shoal.told.clear()
            await shoal.join(lost, kept=[(before.epoch, number)])
            after = await serving_after(shoal, last)
            await shoal.until(lambda: len(shoal.of(StartSequence)) == len(parts))
        assert (after.epoch, after.where, after.plan) == (before.epoch, before.where, before.plan)
        assert loads == len(before.devices)
        assert not shoal.of(LoadStage)
        assert not shoal.of(UnloadStage)
        start = next(one for _, one in shoal.of(StartSequence) if one.prompt)
        assert (start.prompt, start.cached) == ((1, 2, 5), 0)
        await shoal.said("d", TokenSampled(after.epoch, start.sequence, 0, 6, "length"))
        pieces = await answer
        assert [token for piece in pieces for token in piece.tokens] == [5, 6]
        told = [event.kind for event in shoal.story.after()]
        assert told.count("adopted") == 3
        assert "replaced" not in told
        assert not any(member.kept for member in shoal.roster.members)

    run(test)


Gone = Callable[[Shoal, Deployment], Awaitable[None]]


async def _is_torn(shoal: Shoal, before: Deployment) -> None:
    await shoal.said("a", PeerLost(before.epoch, "id-of-d", "its end"))
    await shoal.member("a").lives()
    await lose(shoal, "d")


async def _is_torn_later(shoal: Shoal, before: Deployment) -> None:
    await lose(shoal, "d")
    await shoal.said("a", PeerLost(before.epoch, "id-of-d", "its end"))


async def _is_empty(shoal: Shoal, before: Deployment) -> None:
    await lose(shoal, "d")
    await shoal.join("d")


async def _is_dropped(shoal: Shoal, before: Deployment) -> None:
    shoal.roster.drop(shoal.member("d"), "a pass hangs")


@pytest.mark.parametrize("goes", [_is_torn, _is_torn_later, _is_empty, _is_dropped])
def test_a_device_whose_stage_is_gone_is_not_awaited(run: Run, goes: Gone) -> None:
    async def test(shoal: Shoal) -> None:
        before = await shoal.load(plan_of(ALONE))
        shoal.operations.plans = [plan_of(ELSEWHERE)]
        await goes(shoal, before)
        after = await serving_after(shoal, before)
        assert after.where == "c"
        # Whoever is late with its stage unloads it.
        await shoal.join("b", kept=[(before.epoch, 1)])
        assert not shoal.member("b").kept

    run(test)


def test_a_device_that_is_late_does_not_keep_its_stage(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(returns, "RETURN_S", 0.05)

    async def test(shoal: Shoal) -> None:
        before = await shoal.load(plan_of(ALONE))
        shoal.operations.plans = [plan_of(ELSEWHERE)]
        await lose(shoal, "a")
        assert (await serving_after(shoal, before)).where == "c"

    run(test)


def test_stages_that_are_back_are_unloaded_if_another_one_stays_away(run: Run) -> None:
    async def test(shoal: Shoal) -> None:
        before = await shoal.load(plan_of(ALONE))
        shoal.operations.plans = [plan_of(ELSEWHERE)]
        await lose(shoal, "a")
        await lose(shoal, "d")
        await shoal.join("a", kept=[(before.epoch, 1)])
        assert isinstance(shoal.models.current, Replacing)
        await shoal.join("d")
        assert (await serving_after(shoal, before)).where == "c"
        assert [name for name, _ in shoal.of(UnloadStage)] == ["a"]

    run(test)


def test_an_unload_ends_the_waiting(run: Run, tmp_path: Path) -> None:
    async def test(shoal: Shoal) -> None:
        before = await shoal.load(plan_of(ALONE))
        await lose(shoal, "d")
        await shoal.operations.unload()
        await shoal.join("d", kept=[(before.epoch, 1)])
        assert not shoal.member("d").kept
        assert shoal.models.serving is None

    run(test)


def test_a_model_that_was_unloaded_as_a_device_joined_is_placed_no_more(run: Run) -> None:
    """Before Python 3.12, ``asyncio.wait_for`` loses a cancellation that comes at that moment."""

    async def test(shoal: Shoal) -> None:
        before = await shoal.load(plan_of(ALONE))
        cause = AgentLost("a", "its power failed")
        shoal.models.apply(before.name, Lost(cause))
        await shoal.until(lambda: error_of(shoal.models[before.name]) not in (None, cause))
        shoal.roster.changed.fire()
        await shoal.operations.unload(before.name)
        after = await shoal.load(plan_of(ALONE))
        shoal.told.clear()
        shoal.roster.changed.fire()
        for _ in range(20):  # Whoever waited for a device runs.
            await asyncio.sleep(0)
        async with shoal.turns.unasked("what comes after it"):
            assert shoal.models.serving is after
            assert not shoal.of(UnloadStage)

    run(test)


def test_a_slow_reader_of_before_does_not_reset_the_counts_of_now(run: Run) -> None:
    """The stages are taken over, so both have one epoch. It tells whose rows are lost."""

    async def test(shoal: Shoal) -> None:
        before = await shoal.load(plan_of(ALONE))
        slow = shoal.gateway.generate(before, (1, 2), Sampling(4, ()))
        first = asyncio.ensure_future(anext(slow))
        await shoal.until(lambda: shoal.of(StartSequence))
        number = shoal.of(StartSequence)[0][1].sequence
        await shoal.said("d", TokenSampled(before.epoch, number, 0, 5, ""))
        await first  # Nobody takes the rest for now.
        await lose(shoal, "d")
        await shoal.join("d", kept=[(before.epoch, number)])
        after = await serving_after(shoal, before)
        shoal.told.clear()
        quick = shoal.gateway.generate(after, (3, 4), Sampling(4, ()))
        first = asyncio.ensure_future(anext(quick))
        await shoal.until(lambda: shoal.of(StartSequence))
        number = shoal.of(StartSequence)[0][1].sequence
        await shoal.said("d", TokenSampled(after.epoch, number, 0, 5, ""))
        await first
        told = shoal.gateway._told[after.epoch]
        await slow.aclose()
        assert (after.epoch, shoal.gateway._told[after.epoch]) == (before.epoch, told)
        assert told > 0
        await quick.aclose()
        assert after.epoch not in shoal.gateway._told

    run(test)
