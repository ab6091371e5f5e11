"""A model that nobody uses falls asleep, and a request loads it again."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from api.openai.routes import OpenAIRoutes
from coordinator.errors import CoordinatorError
from coordinator.loading.deployment import Deployment
from coordinator.loading.state import Asleep, Serving
from planning.plan import Plan
from tests.coordinator.test_teams import (
    BLOCKS,
    MODEL,
    Parts,
    Run,
    Shoal,
    plan_of,
    planned,
    run,
    running,
)
from wire.messages import LoadStage, UnloadStage

__all__ = ["run"]

PARTS: tuple[Parts, ...] = ((("a",), 3), (("d",), BLOCKS))
KEEP_S = 60.0
NAME = MODEL.name


async def load(shoal: Shoal, keep_s: float | None = KEEP_S) -> Deployment:
    shoal.operations.plans = [plan_of(PARTS)]
    request = replace(planned(plan_of(PARTS)).request, keep_s=keep_s)
    return await shoal.operations.load(request, shoal.steps.append)


def look(shoal: Shoal, after_s: float) -> None:
    shoal.keeper._idling.look(time.monotonic() + after_s)


async def asleep(shoal: Shoal) -> Deployment:
    """Load the model and let it fall asleep."""
    deployment = await load(shoal)
    look(shoal, KEEP_S + 1)
    assert isinstance(shoal.models[NAME], Asleep)
    await shoal.until(lambda: len(shoal.of(UnloadStage)) == 2)
    return deployment


def test_an_idle_model_is_unloaded_after_its_time(run: Run) -> None:
    async def test(shoal: Shoal) -> None:
        deployment = await load(shoal)
        look(shoal, KEEP_S / 2)
        assert isinstance(shoal.models[NAME], Serving)
        async with deployment.slots.one():
            look(shoal, 2 * KEEP_S)
            assert isinstance(shoal.models[NAME], Serving)
        look(shoal, KEEP_S / 2)
        assert isinstance(shoal.models[NAME], Serving)
        look(shoal, KEEP_S + 1)
        assert isinstance(shoal.models[NAME], Asleep)
        await shoal.until(lambda: len(shoal.of(UnloadStage)) == 2)
        assert {said.epoch for _, said in shoal.of(UnloadStage)} == {deployment.epoch}
        assert not shoal.roster.keeps
        # Its request stays on the disk, and nobody takes its stages over.
        assert len(shoal.kept.read()) == 1
        assert shoal.kept.record.read() == {}

    run(test)


def test_a_request_that_has_no_slot_yet_keeps_it_loaded(run: Run) -> None:
    async def test(shoal: Shoal) -> None:
        deployment = await load(shoal)
        deployment.slots.used_s -= 2 * KEEP_S
        assert await shoal.models.deployment(NAME) is deployment
        look(shoal, 0)
        assert isinstance(shoal.models[NAME], Serving)

    run(test)


def test_a_request_whose_text_is_read_keeps_it_loaded(run: Run) -> None:
    async def test(shoal: Shoal) -> None:
        deployment = await load(shoal)
        begun, may_go_on = threading.Event(), threading.Event()

        def read() -> bool:
            begun.set()
            return may_go_on.wait(30)

        routes = OpenAIRoutes(shoal.models, shoal.gateway)
        reading = asyncio.ensure_future(routes.prepare(deployment, read, is_long=True))
        assert await asyncio.to_thread(begun.wait, 30)
        look(shoal, 2 * KEEP_S)
        state = shoal.models[NAME]
        may_go_on.set()
        assert await reading
        assert isinstance(state, Serving)
        look(shoal, KEEP_S / 2)  # Its slot comes next.
        assert isinstance(shoal.models[NAME], Serving)
        routes._threads.shutdown()

    run(test)


def test_a_model_without_a_time_stays(run: Run) -> None:
    async def test(shoal: Shoal) -> None:
        await load(shoal, None)
        look(shoal, 1e9)
        assert isinstance(shoal.models[NAME], Serving)

    run(test)


def test_a_request_wakes_it(run: Run) -> None:
    async def test(shoal: Shoal) -> None:
        before = await asleep(shoal)
        shoal.operations.plans = [plan_of(PARTS)]
        shoal.models.require_soon(NAME)  # It is not refused.
        asked = [asyncio.ensure_future(shoal.models.deployment(NAME)) for _ in range(3)]
        after = (await asyncio.gather(*asked))[0]
        assert after.epoch != before.epoch
        assert after.request.keep_s == KEEP_S
        assert len(shoal.of(LoadStage)) == 4
        look(shoal, KEEP_S + 1)
        assert isinstance(shoal.models[NAME], Asleep)

    run(test)


def test_a_request_hears_why_it_cannot_wake_it(run: Run) -> None:
    async def test(shoal: Shoal) -> None:
        await asleep(shoal)
        with pytest.raises(CoordinatorError, match="no plan is left"):
            await shoal.models.deployment(NAME)
        assert isinstance(shoal.models[NAME], Asleep)
        shoal.operations.plans = [plan_of(PARTS)]  # The next request tries again.
        await shoal.models.deployment(NAME)
        assert isinstance(shoal.models[NAME], Serving)

    run(test)


def test_a_sleeping_model_is_unloaded_and_loaded_as_any_other(run: Run) -> None:
    async def test(shoal: Shoal) -> None:
        await asleep(shoal)
        await load(shoal)
        assert isinstance(shoal.models[NAME], Serving)
        look(shoal, KEEP_S + 1)
        assert await shoal.operations.unload(NAME) == (NAME,)
        assert shoal.models.present() == ()
        assert shoal.kept.read() == []

    run(test)


def test_it_sleeps_on_after_a_restart(tmp_path: Path) -> None:
    plans: list[Plan] = [plan_of(PARTS)]

    async def main() -> None:
        async with running(tmp_path) as shoal:
            await shoal.join(*"abcd")
            await asleep(shoal)
        async with running(tmp_path) as shoal:
            shoal.keeper.resume()
            assert isinstance(shoal.models[NAME], Asleep)
            await shoal.join(*"abcd")
            shoal.operations.plans = plans
            await shoal.models.deployment(NAME)

    asyncio.run(asyncio.wait_for(main(), 60))
