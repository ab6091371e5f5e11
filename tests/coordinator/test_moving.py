"""A model moves from a deployment that works to a better plan, and its answers go on there."""

from __future__ import annotations

import asyncio
import gc
from dataclasses import replace
from typing import Any

import pytest

from coordinator.errors import AgentDamaged, AgentLost, LinkFailed, Moved
from coordinator.loading import moving, recovery
from coordinator.loading.deployment import Deployment, Planned
from coordinator.loading.state import Broken, MoveBegan
from tests.coordinator.test_teams import (
    ALONE,
    BLOCKS,
    Run,
    Shoal,
    collect,
    plan_of,
    planned,
    run,
)
from wire.messages import LoadStage, StageDamaged, StartSequence, TokenSampled, UnloadStage

__all__ = ["run"]


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


def test_a_move_over_a_link_that_fails_is_not_planned_again(run: Run) -> None:
    async def test(shoal: Shoal) -> None:
        first = await shoal.load(plan_of(ALONE))
        shoal.refused.add(("b", "c"))
        wanted = planned(plan_of(((("b",), 3), (("c",), BLOCKS))))
        with pytest.raises(LinkFailed):
            await shoal.operations.mover.move(first, wanted, Moved())
        assert shoal.models.serving is first
        failed = [(link.source, link.target) for link, _ in shoal.roster.failed_links()]
        assert failed == [("b", "c")]

    run(test)


def test_a_bug_while_a_model_is_placed_is_reported(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(shoal: Shoal) -> None:
        told: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: told.set_result(context["exception"])
        )
        first = await shoal.load(plan_of(ALONE))

        async def fails(*_: object) -> None:
            raise RuntimeError("a bug")

        monkeypatch.setattr(shoal.operations, "carry_out", fails)
        wanted = planned(plan_of(((("c",), BLOCKS),)))
        shoal.models.apply(first.name, MoveBegan(Moved(), wanted))
        await shoal.until(lambda: isinstance(shoal.models[first.name], Broken))
        for _ in range(3):  # The task ends, and nothing refers to it any more.
            await asyncio.sleep(0)
        gc.collect()
        assert told.done()
        assert str(told.result()) == "a bug"

    run(test)


# ---- new stages beside the old ones ------------------------------------------------------------


async def begin(shoal: Shoal, tokens: tuple[int, ...]) -> tuple[Deployment, asyncio.Task[Any]]:
    """Load the model on two devices, and begin an answer that has these tokens so far."""
    first = await shoal.load(plan_of(ALONE))
    shoal.operations.mover.warm = shoal.gateway.warm
    answer = asyncio.ensure_future(collect(shoal, 4))
    await shoal.until(lambda: shoal.of(StartSequence))
    number = shoal.of(StartSequence)[0][1].sequence
    for index, token in enumerate(tokens):
        await shoal.said("d", TokenSampled(first.epoch, number, index, token, ""))
    await shoal.member("d").lives()
    shoal.told.clear()
    return first, answer


def test_an_answer_goes_over_to_stages_that_know_it(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moving, "SOON_S", 60.0)  # What came meanwhile does not run ahead, too.

    async def test(shoal: Shoal) -> None:
        first, answer = await begin(shoal, (5, 6))
        wanted = planned(plan_of(((("c",), BLOCKS),)))
        going = asyncio.ensure_future(shoal.operations.mover.move(first, wanted, Moved()))
        await shoal.until(lambda: shoal.of(StartSequence))
        # The new stages are loaded beside the old ones, which answer.
        ((name, load),) = shoal.of(LoadStage)
        assert (name, load.keeps) == ("c", (first.epoch,))
        assert shoal.models.serving is first
        assert not shoal.of(UnloadStage)
        # What the answer has so far runs there. Meanwhile the next token comes.
        ((name, ahead),) = shoal.of(StartSequence)
        assert (name, ahead.epoch, ahead.prompt) == ("c", load.epoch, (1, 2, 5, 6))
        assert ahead.sampling.max_tokens == 1
        number = shoal.gateway._newest - 1
        await shoal.said("d", TokenSampled(first.epoch, number, 2, 7, ""))
        await shoal.member("d").lives()
        await shoal.said("c", TokenSampled(load.epoch, ahead.sequence, 0, 9, "length"))
        await going
        second = shoal.models.serving
        assert second is not None
        assert (second.where, second.epoch, second.request) == ("c", load.epoch, first.request)
        await shoal.until(lambda: len(shoal.of(StartSequence)) == 2)
        _, start = shoal.of(StartSequence)[1]
        assert (start.prompt, start.cached) == ((1, 2, 5, 6, 7), 4)
        await shoal.said("c", TokenSampled(second.epoch, start.sequence, 0, 8, "length"))
        pieces = await answer
        assert [token for piece in pieces for token in piece.tokens] == [5, 6, 7, 8]
        await shoal.until(lambda: len(shoal.of(UnloadStage)) == 2)
        assert {(name, one.epoch) for name, one in shoal.of(UnloadStage)} == {
            ("a", first.epoch),
            ("d", first.epoch),
        }
        kinds = [event.kind for event in shoal.story.after()]
        assert "moved" in kinds
        assert "moving" not in kinds

    run(test)


async def move(shoal: Shoal, deployment: Deployment, wanted: Planned) -> None:
    async with shoal.turns.unasked("a move"):
        await shoal.operations.mover.move(deployment, wanted, Moved())


def test_a_move_ends_if_the_present_stages_are_lost(run: Run) -> None:
    async def test(shoal: Shoal) -> None:
        first, answer = await begin(shoal, (5,))
        shoal.operations.plans = [plan_of(((("b",), BLOCKS),))]
        wanted = planned(plan_of(((("c",), BLOCKS),)))
        going = asyncio.ensure_future(move(shoal, first, wanted))
        await shoal.until(lambda: shoal.of(StartSequence))
        shoal.kill("d")
        await shoal.until(lambda: shoal.models.serving is None)
        epoch, ahead = shoal.of(LoadStage)[0][1].epoch, shoal.of(StartSequence)[0][1].sequence
        await shoal.said("c", TokenSampled(epoch, ahead, 0, 9, "length"))
        with pytest.raises(AgentLost):
            await going
        assert ("c", epoch) in [(name, one.epoch) for name, one in shoal.of(UnloadStage)]
        await shoal.until(lambda: shoal.models.serving is not None)
        assert shoal.models.serving is not None
        assert shoal.models.serving.where == "b"
        answer.cancel()

    run(test)


@pytest.mark.parametrize("lost", ["c", "d"])
def test_a_loss_ends_a_move_while_tokens_run_ahead(run: Run, lost: str) -> None:
    """The lost device is one of the new stages, or of the old ones."""

    async def test(shoal: Shoal) -> None:
        first, answer = await begin(shoal, (5, 6))
        shoal.operations.plans = [plan_of(((("b",), BLOCKS),))]
        wanted = planned(plan_of(((("c",), BLOCKS),)))
        going = asyncio.ensure_future(shoal.operations.mover.move(first, wanted, Moved()))
        await shoal.until(lambda: shoal.of(StartSequence))
        shoal.kill(lost)
        with pytest.raises(AgentLost, match=f"^{lost}: device lost"):
            await going
        answer.cancel()

    run(test)


def test_without_room_the_old_stages_are_unloaded_first(run: Run) -> None:
    async def test(shoal: Shoal) -> None:
        first = await shoal.load(plan_of(ALONE))
        small = shoal.member("a")
        small.profile = replace(small.profile, memory_bytes=1000 + ord("a") + 99)
        plan = plan_of(((("a",), BLOCKS),))
        plan = replace(plan, stages=(replace(plan.stages[0], memory_bytes=100),))
        await shoal.operations.mover.move(first, planned(plan), Moved())
        await shoal.until(lambda: shoal.models.serving not in (None, first))
        kinds = [event.kind for event in shoal.story.after()]
        assert kinds[-2:] == ["moving", "replaced"]
        small.profile = replace(small.profile, memory_bytes=2000)
        second = shoal.models.serving
        assert second is not None
        await shoal.operations.mover.move(second, planned(plan), Moved())
        assert shoal.story.after()[-1].kind == "moved"

    run(test)


def test_damage_of_the_new_stages_ends_a_move(run: Run) -> None:
    """The damaged stage has dropped the rows that ran ahead, and refuses all others."""

    async def test(shoal: Shoal) -> None:
        first, answer = await begin(shoal, (5, 6))
        wanted = planned(plan_of(((("c",), BLOCKS),)))
        going = asyncio.ensure_future(move(shoal, first, wanted))
        await shoal.until(lambda: shoal.of(StartSequence))
        ((_, load),) = shoal.of(LoadStage)
        await shoal.said("c", StageDamaged(load.epoch, "a file was damaged"))
        with pytest.raises(AgentDamaged, match=r"^c: a file was damaged$"):
            await going
        assert shoal.models.serving is first
        assert ("c", load.epoch) in [(name, one.epoch) for name, one in shoal.of(UnloadStage)]
        answer.cancel()

    run(test)
