"""Recovery: when a model is placed anew, and which wishes of the request still count."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.errors import AgentLost
from coordinator.loading import recovery
from coordinator.loading.recovery import (
    AMORTIZED_TOKENS,
    TIME_LIMIT_S,
    LoadedFile,
    recover,
    remaining,
)
from model.share import Share
from planning.plan import PlanError
from planning.problem import Objective
from planning.request import LoadRequest
from planning.saved import SavedPlan
from planning.saved_team import SavedTeam

LLAMA = Path(__file__).parents[1] / "fixtures" / "llama"
LOST = AgentLost("pi-2", "silent")


class Shoal:
    """Placing works once ``enough`` is set; every attempt is announced."""

    def __init__(self) -> None:
        self.enough = False
        self.reason = "memory is short"
        self.joined = asyncio.Event()
        self.outcome: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.attempts: asyncio.Queue[int] = asyncio.Queue()
        self.failures: list[AgentLost] = []

    async def place(self) -> str:
        self.attempts.put_nowait(1)
        if not self.enough:
            raise PlanError(self.reason)
        return "placed"

    async def recover(self, wait_s: float) -> str:
        def explain(error: Exception) -> AgentLost:
            self.failures.append(AgentLost(LOST.name, LOST.cause, str(error)))
            return self.failures[-1]

        placed = await recover(self.place, explain, self.joined, self.outcome.set_exception, wait_s)
        if not self.outcome.done():
            self.outcome.set_result(placed)
        return placed


def run(test: Callable[[Shoal], Awaitable[None]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(test(Shoal()), 30)

    asyncio.run(main())


def test_the_rest_takes_over_at_once() -> None:
    async def test(shoal: Shoal) -> None:
        shoal.enough = True
        assert await shoal.recover(0) == "placed"
        assert await shoal.outcome == "placed"
        assert shoal.failures == []

    run(test)


def test_whoever_waits_goes_on_when_a_device_joins_in_time() -> None:
    async def test(shoal: Shoal) -> None:
        task = asyncio.ensure_future(shoal.recover(60))
        await shoal.attempts.get()
        shoal.enough = True
        shoal.joined.set()
        assert await shoal.outcome == "placed"
        assert await task == "placed"
        assert [str(error) for error in shoal.failures] == [
            "pi-2: device lost (silent); check its power, network and agent; the others cannot "
            "take its place: memory is short"
        ]

    run(test)


def test_who_waited_long_enough_is_told_and_a_later_join_still_helps() -> None:
    async def test(shoal: Shoal) -> None:
        task = asyncio.ensure_future(shoal.recover(0))
        with pytest.raises(AgentLost, match=r"pi-2: device lost .* memory is short"):
            await shoal.outcome
        await shoal.attempts.get()
        shoal.joined.set()
        await shoal.attempts.get()
        shoal.enough = True
        shoal.joined.set()
        assert await task == "placed"

    run(test)


def test_the_same_devices_are_tried_again_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "RETRY_S", 0.01)

    async def test(shoal: Shoal) -> None:
        task = asyncio.ensure_future(shoal.recover(60))
        for _ in range(3):
            await shoal.attempts.get()
        shoal.enough = True
        assert await task == "placed"

    run(test)


def test_an_attempt_that_fails_as_the_last_one_is_not_told_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recovery, "RETRY_S", 0.01)

    async def test(shoal: Shoal) -> None:
        task = asyncio.ensure_future(shoal.recover(60))
        for _ in range(5):
            await shoal.attempts.get()
        shoal.reason = "memory is shorter"
        while len(shoal.failures) < 10:
            await shoal.attempts.get()
        shoal.enough = True
        assert await task == "placed"

    run(test)
    told = [record.getMessage() for record in caplog.records]
    assert [text.rpartition(": ")[2] for text in told] == ["memory is short", "memory is shorter"]


def test_what_is_loaded_is_kept_until_it_is_unloaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = LoadedFile(tmp_path)
    assert kept.read() == []
    asked = {"model": str(LLAMA), "bits": [4, 8], "slots": 2, "pins": {"0": "pi-1"}}
    request = LoadRequest.from_dict(asked)
    kept.keep(request, ["pi-1", "pi-2"])
    assert LoadedFile(tmp_path).read() == [(request, ("pi-1", "pi-2"))]
    for damaged in (b"", b"{}", b"[1]", b'{"request": {"model": 3}, "devices": []}', b"\xff"):
        (tmp_path / "loaded.json").write_bytes(damaged)
        assert LoadedFile(tmp_path).read() == []
    assert caplog.text.count("cannot be used") == 5
    kept.forget("llama")
    kept.forget("llama")
    assert LoadedFile(tmp_path).read() == []
    assert caplog.text.count("cannot be used") == 5


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (b"", "it is empty or damaged"),
        (bytes(300), "it is empty or damaged"),
        (b'{"models"', "it is empty or damaged"),
        (b"{}", "it has no models"),
        (b"[1]", "it is of another form"),
    ],
)
def test_a_damaged_file_of_requests_is_put_aside_with_its_pins(
    damage: bytes, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "loaded.json").write_bytes(damage)
    kept = LoadedFile(tmp_path)
    assert kept.read() == []
    (said,) = (record.getMessage() for record in caplog.records)
    assert f"loaded.json cannot be used ({words}): it is kept as loaded.damaged" in said
    assert said.endswith("no model is loaded: run `shoal load`")
    kept.keep(LoadRequest(LLAMA), ["pi"])
    assert (tmp_path / "loaded.damaged").read_bytes() == damage


def test_a_request_of_a_newer_version_stays_for_that_version(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An older one that is tried in between does not lose its pins."""
    newer = {"request": {"model": "/new", "pins": {"0": "pi"}, "fancy": 1}, "devices": ["pi"]}
    (tmp_path / "loaded.json").write_text(json.dumps({"models": {"new": newer}}))
    kept = LoadedFile(tmp_path)
    assert kept.read() == []
    assert "new cannot be used (unknown fields: fancy): run `shoal load`" in caplog.text
    kept.keep(LoadRequest(LLAMA), ["pi"])
    assert json.loads((tmp_path / "loaded.json").read_text())["models"]["new"] == newer
    kept.forget("new")
    assert [request.model for request, _ in LoadedFile(tmp_path).read()] == [LLAMA]


def test_what_still_counts_of_a_request() -> None:
    asked = LoadRequest(
        Path("/model"),
        bits=(4, 8),
        pins={0: "pi-1", 1: "pi-2"},
        exclude=("pi-2", "pi-3"),
        check_quality=True,
        quality_budget=0.1,
        slots=4,
    )
    given = SavedPlan("plan.json", "model", (("pi-1", (8,)), ("pi-3", (8,))), {}, (None,))
    assert remaining(replace(asked, plan=given), {"pi-1"}).plan is None
    assert remaining(replace(asked, plan=given), {"pi-1", "pi-3"}).plan is given
    left = remaining(asked, {"pi-1", "pi-3"})
    assert left.pins == {0: "pi-1"}
    assert left.exclude == ("pi-3",)
    assert not left.check_quality
    assert (left.bits, left.quality_budget, left.slots) == ((4, 8), 0.1, 4)
    # A request of the default answers with 128 tokens.
    assert left.objective == Objective(migration_weight=128 / AMORTIZED_TOKENS)
    assert left.time_limit_s == TIME_LIMIT_S
    frugal = LoadRequest(Path("/model"), objective=Objective("energy"), time_limit_s=1)
    assert remaining(frugal, ()).objective == Objective("energy")
    assert remaining(frugal, ()).time_limit_s == 1


def test_teams_count_while_all_their_members_are_here(tmp_path: Path) -> None:
    asked = LoadRequest(Path("/model"), teams=(("pi-1", "pi-2"), ("pi-3", "pi-4")))
    assert remaining(asked, {"pi-1", "pi-2", "pi-3"}).teams == (("pi-1", "pi-2"),)
    assert remaining(replace(asked, teams=(), no_teams=True), ()).no_teams
    shares = (Share((0, 1), (0, 32), (0, 9)), Share((1, 2), (32, 48), (9, 10)))
    team = SavedTeam(tuple(zip(("pi-1", "pi-2"), shares, strict=True)), 16)
    given = SavedPlan("p", "model", (("pi-1", (8,)),), {}, (), teams=(team,))
    asked = replace(asked, plan=given, teams=())
    assert remaining(asked, {"pi-1"}).plan is None
    assert remaining(asked, {"pi-1", "pi-2"}).plan is given
    # A restarted coordinator loads the same shares.
    LoadedFile(tmp_path).keep(asked, ["pi-1", "pi-2"])
    assert LoadedFile(tmp_path).read() == [(asked, ("pi-1", "pi-2"))]


def test_what_is_kept_means_the_devices_that_it_was_asked_for(tmp_path: Path) -> None:
    """Names may have moved on when the coordinator is started again."""
    given = {"source": "p", "model": "m", "stages": [{"device": "pi", "bits": [8]}]}
    asked = {
        "model": str(LLAMA),
        "pins": {"0": "pi-2"},
        "exclude": ["pi-3", "3" * 16],
        "plan": {**given, "devices": {"pi": "9" * 16}},
    }
    ids = {"pi": "1" * 16, "pi-2": "2" * 16, "pi-3": "3" * 16}
    request = LoadRequest.from_dict(asked).identified(
        lambda text: text if text in ids.values() else ids.get(text)
    )
    assert request.pins == {0: "2" * 16}
    assert request.exclude == ("3" * 16, "3" * 16)
    assert request.plan is not None
    # The plan was saved when another device was called pi.
    assert request.plan.stages == (("9" * 16, (8,)),)
    LoadedFile(tmp_path).keep(request, ["pi-2"], {"pi-2": "2" * 16})
    kept = LoadedFile(tmp_path).read()
    assert kept == [(request, ("2" * 16,))]


def test_a_kept_request_from_before_devices_had_ids_is_still_read(tmp_path: Path) -> None:
    asked = {"model": str(LLAMA), "pins": {"0": "pi"}}
    text = json.dumps({"request": asked, "devices": ["pi", "pi-2"]})
    (tmp_path / "loaded.json").write_text(text)
    assert LoadedFile(tmp_path).read() == [(LoadRequest.from_dict(asked), ("pi", "pi-2"))]


def test_a_kept_request_that_has_names_with_their_ids_is_still_read(tmp_path: Path) -> None:
    asked = {"model": str(LLAMA), "bits": [8, 4], "pins": {"0": "pi"}, "slots": None}
    text = json.dumps({"request": asked, "devices": ["pi"], "ids": {"pi": "1" * 16}})
    (tmp_path / "loaded.json").write_text(text)
    kept = LoadedFile(tmp_path).read()
    assert kept == [(LoadRequest(LLAMA, bits=(4, 8), pins={0: "1" * 16}), ("1" * 16,))]
