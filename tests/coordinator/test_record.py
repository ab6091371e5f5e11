"""A restarted coordinator takes over stages that agents have kept."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from coordinator.loading import operations
from coordinator.loading.deployment import Deployment
from coordinator.loading.drafting import load_tokenizer
from coordinator.loading.record import DeploymentRecord, RecordFile
from coordinator.loading.state import Resuming, Serving
from model.tokenizer import Tokenizer
from planning.json_codec import to_plain
from tests.coordinator.test_teams import (
    ALONE,
    BLOCKS,
    NAMES,
    RING,
    Parts,
    Shoal,
    collect,
    plan_of,
    running,
)
from wire.messages import LoadStage, PeerLost, StageDamaged, StartSequence, UnloadStage

Test = Callable[[Shoal, Deployment], Awaitable[None]]


def restarted(directory: Path, parts: tuple[Parts, ...], test: Test) -> None:
    """Load a model, then let ``test`` see a new coordinator with the same directory.

    ``test`` gets the deployment before the restart.
    """

    async def main() -> None:
        async with running(directory) as before:
            await before.join(*NAMES)
            deployment = await before.load(plan_of(parts))
        async with running(directory) as after:
            after.keeper.resume()
            await asyncio.wait_for(test(after, deployment), 60)

    asyncio.run(main())


def is_serving(shoal: Shoal) -> bool:
    return isinstance(shoal.models.current, Serving)


@pytest.mark.parametrize("parts", [ALONE, RING], ids=["alone", "team"])
def test_stages_that_are_still_loaded_are_taken_over(
    tmp_path: Path, parts: tuple[Parts, ...]
) -> None:
    async def test(shoal: Shoal, before: Deployment) -> None:
        for member in reversed(before.devices):
            assert not is_serving(shoal)
            await shoal.join(member.name, kept=[(before.epoch, ord(member.name))])
        await shoal.until(lambda: is_serving(shoal))
        after = shoal.models.serving
        assert after is not None
        assert (after.epoch, after.plan, after.spec) == (before.epoch, before.plan, before.spec)
        assert (after.where, after.loaded, after.sums) == (before.where, before.loaded, before.sums)
        assert not shoal.of(LoadStage)
        told = [event for event in shoal.story.after() if event.kind == "adopted"]
        assert [event.text for event in told] == [f"still loaded on {before.where}"]
        assert not any(member.kept for member in shoal.roster.members)
        # Numbers of sequences are above all that any stage knows.
        answer = asyncio.ensure_future(collect(shoal))
        await shoal.until(lambda: shoal.of(StartSequence))
        _, start = shoal.of(StartSequence)[0]
        newest = max(ord(member.name) for member in after.devices)
        assert (start.epoch, start.sequence, start.cached) == (before.epoch, newest + 1, 0)
        answer.cancel()

    restarted(tmp_path, parts, test)


def test_devices_without_a_stage_are_not_awaited(tmp_path: Path) -> None:
    async def test(shoal: Shoal, before: Deployment) -> None:
        await shoal.join("d", "a", kept=[(before.epoch, 1)])
        await shoal.until(lambda: is_serving(shoal))

    restarted(tmp_path, ALONE, test)


def test_a_missing_stage_means_that_all_are_loaded_again(tmp_path: Path) -> None:
    async def test(shoal: Shoal, before: Deployment) -> None:
        shoal.operations.plans = [plan_of(((("d",), BLOCKS),))]
        await shoal.join("a", kept=[(before.epoch, 1)])
        await shoal.join("d")
        await shoal.until(lambda: is_serving(shoal))
        assert [name for name, _ in shoal.of(UnloadStage)] == ["a"]
        assert [name for name, _ in shoal.of(LoadStage)] == ["d"]
        assert shoal.models.serving is not None
        assert shoal.models.serving.epoch != before.epoch
        # Whoever is late with such a stage is told to unload it.
        await shoal.join("c", kept=[(before.epoch, 1)])
        assert not shoal.member("c").kept

    restarted(tmp_path, ALONE, test)


def test_a_stage_that_lost_its_neighbour_is_loaded_again(tmp_path: Path) -> None:
    async def test(shoal: Shoal, before: Deployment) -> None:
        shoal.operations.plans = [plan_of(ALONE)]
        await shoal.join("a", kept=[(before.epoch, 1)])
        await shoal.said("a", PeerLost(before.epoch, "id-of-d", "gone"))
        await shoal.member("a").lives()
        await shoal.join("d", kept=[(before.epoch, 1)])
        await shoal.until(lambda: is_serving(shoal))
        assert [name for name, _ in shoal.of(LoadStage)] == ["a", "d"]

    restarted(tmp_path, ALONE, test)


def test_an_unload_while_stages_are_awaited_reaches_the_kept_ones(tmp_path: Path) -> None:
    async def test(shoal: Shoal, before: Deployment) -> None:
        await shoal.join("a", kept=[(before.epoch, 1)])
        assert isinstance(shoal.models.current, Resuming)
        await shoal.operations.unload()
        assert [name for name, _ in shoal.of(UnloadStage)] == ["a"]
        await shoal.join("d", kept=[(before.epoch, 1)])
        assert not shoal.member("d").kept

    restarted(tmp_path, ALONE, test)
    assert RecordFile(tmp_path).read() == {}


def test_a_record_that_cannot_be_used_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(shoal: Shoal, before: Deployment) -> None:
        written = to_plain(DeploymentRecord.of(before))
        assert json.loads((tmp_path / "deployment.json").read_text()) == {before.name: written}
        changes: tuple[dict[str, object], ...] = (
            {"version": 2},
            {"epoch": 0},
            {"devices": {"a": "id-of-a"}},
            {"loaded": []},
            {"sums": []},
            {"plan": 3},
            {"unheard": 1},
        )
        for change in changes:
            records = {"bad": {**written, **change}, "good": written}
            (tmp_path / "deployment.json").write_text(json.dumps(records))
            assert list(RecordFile(tmp_path).read()) == ["good"]
        assert caplog.text.count("bad cannot be taken over") == 7
        for damaged in ("[1]", "{", ""):
            (tmp_path / "deployment.json").write_text(damaged)
            assert RecordFile(tmp_path).read() == {}
        assert caplog.text.count("models are loaded again") == 3

    restarted(tmp_path, RING, test)


def test_a_stage_that_is_damaged_while_all_are_taken_over_is_loaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_go_on = threading.Event(), threading.Event()

    def slowly(directory: Path) -> Tokenizer:
        begun.set()
        assert may_go_on.wait(30)
        return load_tokenizer(directory)

    async def test(shoal: Shoal, before: Deployment) -> None:
        monkeypatch.setattr(operations, "load_tokenizer", slowly)
        shoal.operations.plans = [plan_of(ALONE)]
        await shoal.join("a", "d", kept=[(before.epoch, 1)])
        assert await asyncio.to_thread(begun.wait, 30)
        await shoal.said("a", StageDamaged(before.epoch, "rot"))
        await shoal.member("a").lives()
        may_go_on.set()
        await shoal.until(lambda: is_serving(shoal))
        assert shoal.models.serving is not None
        assert shoal.models.serving.epoch != before.epoch
        assert [name for name, _ in shoal.of(LoadStage)] == ["a", "d"]

    restarted(tmp_path, ALONE, test)
