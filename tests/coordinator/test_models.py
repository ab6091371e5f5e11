"""Requests that wait for a model, watchers of its states, and the story of events."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import httpx
import pytest
from starlette.applications import Starlette

from api.admin import AdminRoutes
from api.common import HANDLERS
from coordinator import story
from coordinator.errors import AgentLost, Busy, CoordinatorError, NotLoaded
from coordinator.files.artifacts import ArtifactStore
from coordinator.loading.deployment import Deployment
from coordinator.loading.models import Models
from coordinator.loading.operations import Operations
from coordinator.loading.recovery import awaited
from coordinator.loading.slots import Slots
from coordinator.loading.state import (
    AttemptFailed,
    EndAnswers,
    LoadBegan,
    LoadFailed,
    Loading,
    Lost,
    Nothing,
    Placed,
    ResumeBegan,
    Serving,
    Unloaded,
    WaitEnded,
)
from coordinator.loading.turns import Turns
from coordinator.quality.store import QualityStore
from coordinator.roster.measurements import Step
from coordinator.roster.members import Roster
from coordinator.story import Story
from coordinator.watching import Signal
from planning.request import LoadRequest

REQUEST = LoadRequest(Path("/models/llama"))
LOSS = AgentLost("pi-2", "silent")


def deployment(epoch: int, request: LoadRequest = REQUEST) -> Deployment:
    name = request.model.name
    key = epoch, 0
    return cast(
        Deployment,
        SimpleNamespace(epoch=epoch, key=key, request=request, where="", name=name, slots=Slots(1)),
    )


def serve(models: Models, placed: Deployment) -> None:
    models.apply(placed.name, LoadBegan(placed.request))
    models.apply(placed.name, Placed(placed))


def run(test: Callable[[Models, Story], Awaitable[None]]) -> None:
    async def main() -> None:
        told = Story()
        await asyncio.wait_for(test(Models(told), told), 30)

    asyncio.run(main())


async def begun(work: Awaitable[Deployment]) -> asyncio.Future[Deployment]:
    """The work, waiting for what it waits for."""
    task = asyncio.ensure_future(work)
    await asyncio.sleep(0)
    assert not task.done()
    return task


def test_no_watcher_takes_the_wake_up_of_another() -> None:
    signal = Signal()
    with signal.watch() as one, signal.watch() as other:
        signal.fire()
        one.clear()
        assert other.is_set()
    signal.fire()
    assert not one.is_set()


def test_requests_wait_for_a_load_and_for_a_resumption() -> None:
    async def test(models: Models, told: Story) -> None:
        for event in (LoadBegan(REQUEST), ResumeBegan(REQUEST, ("pi-1",))):
            models.apply("llama", event)
            waiting = [await begun(models.deployment()) for _ in range(2)]
            placed = deployment(1)
            models.apply("llama", Placed(placed))
            assert [await task for task in waiting] == [placed, placed]
            models.apply("llama", Unloaded(NotLoaded("unloaded")))

    run(test)


def test_requests_end_with_the_reason() -> None:
    async def test(models: Models, told: Story) -> None:
        with pytest.raises(NotLoaded, match="no model is loaded"):
            await models.deployment()
        models.apply("llama", LoadBegan(REQUEST))
        waiting = await begun(models.deployment())
        models.apply("llama", LoadFailed(NotLoaded("memory is short")))
        with pytest.raises(NotLoaded, match="memory is short"):
            await waiting
        serve(models, deployment(1))
        models.apply("llama", Lost(LOSS))
        waiting = await begun(models.deployment())
        models.apply("llama", WaitEnded(LOSS))
        with pytest.raises(AgentLost, match="pi-2"):
            await waiting
        for _ in range(3):
            with pytest.raises(AgentLost) as raised:
                await models.deployment()
            assert len(raised.traceback) == 3

    run(test)


def test_an_answer_follows_replacements_and_no_other_load() -> None:
    async def test(models: Models, told: Story) -> None:
        first, second, third = map(deployment, (1, 2, 3))
        ended: list[tuple[Deployment, CoordinatorError]] = []
        models.carry_out(EndAnswers, lambda end: ended.append((end.deployment, end.error)))
        serve(models, first)
        assert await models.latest(first) is first
        models.require(first)
        models.apply("llama", Lost(LOSS))
        assert ended == [(first, LOSS)]
        assert models.is_replaced(first)
        with pytest.raises(AgentLost):
            models.require(first)
        waiting = await begun(models.latest(first))
        models.apply("llama", Placed(second))
        assert await waiting is await models.latest(first) is second
        with pytest.raises(AgentLost):  # It stood in line while its deployment was replaced.
            models.require(first)
        models.apply("llama", Unloaded(NotLoaded("unloaded")))
        serve(models, third)
        for gone in (first, second):
            assert not models.is_replaced(gone)
            with pytest.raises(NotLoaded, match="unloaded"):
                await models.latest(gone)
            with pytest.raises(NotLoaded, match="unloaded"):
                models.require(gone)

    run(test)


def test_models_have_states_of_their_own() -> None:
    async def test(models: Models, told: Story) -> None:
        serve(models, deployment(1))
        other = LoadRequest(Path("/models/opt"))
        models.apply("opt", LoadBegan(other))
        assert [name for name, _ in models.present()] == ["llama", "opt"]
        assert isinstance(models["opt"], Loading)
        assert isinstance(models.current, Serving)
        models.apply("llama", Unloaded(NotLoaded("unloaded")))
        assert isinstance(models["llama"], Nothing)
        assert isinstance(models.current, Loading)
        assert models.of_epoch(1) is None

    run(test)


def test_the_story_has_each_reason_once_and_forgets_the_oldest() -> None:
    async def test(models: Models, told: Story) -> None:
        serve(models, deployment(1))
        models.apply("llama", Lost(LOSS))
        for why in ("memory is short", "memory is short", "memory is shorter"):
            models.apply("llama", AttemptFailed(why))
        models.apply("llama", Placed(deployment(2)))
        kinds = [event.kind for event in told.after()]
        assert kinds == ["load began", "served", "lost", "not placed", "not placed", "replaced"]
        times = [event.monotonic_s for event in told.after()]
        assert times == sorted(times)
        for number in range(story.MOST_EVENTS):
            told.tell("joined", f"pi-{number}")
        assert len(told.after()) == story.MOST_EVENTS
        assert {event.kind for event in told.after()} == {"joined"}
        newest = told.after()[-1].number
        assert (newest, told.after(newest)) == (story.MOST_EVENTS + 6, ())

    run(test)


def test_one_user_at_a_time_and_users_wait_for_what_nobody_asked_for() -> None:
    async def test(models: Models, told: Story) -> None:
        turns, steps = Turns(), list[Step]()
        async with turns.asked(steps.append):
            assert turns.is_taken
            turns.report(Step("plan", "", 0, 0, ""))
            with pytest.raises(Busy):
                turns.require_free()
        async with turns.unasked("a lost device is being replaced"):
            waiting = asyncio.ensure_future(enter(turns, steps))
            await asyncio.sleep(0)
            assert not waiting.done()
        await waiting
        assert [step.phase for step in steps] == ["plan", "wait"]
        assert steps[1].label == "a lost device is being replaced"
        assert not turns.is_taken

    async def enter(turns: Turns, steps: list[Step]) -> None:
        async with turns.asked(steps.append):
            pass

    run(test)


def test_the_missing_devices_are_told_until_the_wait_is_over() -> None:
    async def test(models: Models, told: Story) -> None:
        assert [names async for names in awaited(Roster("test"), ("b", "a"), 0.01)] == [("b", "a")]
        assert [names async for names in awaited(Roster("test"), (), 60)] == [()]

    run(test)


def test_events_over_http(tmp_path: Path) -> None:
    async def test(models: Models, told: Story) -> None:
        roster = Roster("test", story=told)
        operations = Operations(
            roster, ArtifactStore(tmp_path), QualityStore(tmp_path), models, Turns()
        )
        app = Starlette(
            routes=AdminRoutes("test", roster, operations, models, told).routes(),
            exception_handlers=HANDLERS,
        )
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            models.apply("llama", ResumeBegan(REQUEST, ("pi-1", "pi-2")))
            (event,) = (await client.get("/shoal/v1/events")).json()["events"]
            assert (event["number"], event["kind"], event["subject"]) == (1, "resuming", "llama")
            assert event["text"] == "on pi-1, pi-2"
            known = (await client.get("/shoal/v1/ps")).json()["model"]
            assert (known["state"], known["waiting_for"]) == ("resuming", ["pi-1", "pi-2"])
            for wrong in ("x", "-1", "9" * 16, ""):
                answer = await client.get("/shoal/v1/events", params={"after": wrong})
                assert answer.status_code == 400
            assert (await client.get("/shoal/v1/events?after=0")).json()["events"] == [event]
            for path in ("events?since=0", "events?after=0&after=1", "ps?model=x", "found?name=x"):
                answer = await client.get(f"/shoal/v1/{path}")
                assert answer.status_code == 400, path
            wrong = "unknown parameter 'since': expected after"
            answer = await client.get("/shoal/v1/events?since=0")
            assert answer.json()["error"]["message"] == wrong

    run(test)
