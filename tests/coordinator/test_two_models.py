"""Two models on the same devices: the coordinator keeps their stages, states and files apart."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordinator.errors import NotLoaded
from coordinator.loading.beside import Use, use_of
from coordinator.loading.companions import PlannedAgain
from coordinator.loading.deployment import Deployment
from coordinator.loading.paces import token_s
from coordinator.loading.plan_maker import PlanMaker
from coordinator.loading.record import DeploymentRecord
from coordinator.loading.several import PlannedTogether, SeveralRequest
from coordinator.loading.state import Replacing, Serving, State
from coordinator.quality.measuring import Losses, QualityMeter
from coordinator.quality.store import QualityStore
from coordinator.roster.measurements import OnStep
from model.checkpoint import Checkpoint
from model.errors import ModelError
from planning.errors import RequestInvalid
from planning.joint.problem import lessened
from planning.losses import PlanAgain
from planning.plan import InfeasiblePlan, Plan, PlanError
from planning.planner import solve
from planning.problem import PlanningProblem
from planning.request import LoadRequest, model_name
from planning.sensitivity import LossSource
from tests.coordinator.test_teams import (
    BLOCKS,
    CHECKPOINT,
    MODEL,
    PROFILE,
    Parts,
    Run,
    Shoal,
    collect,
    plan_of,
    planned,
    run,
    running,
)
from tests.planning.test_joint import two_models as both_models
from wire.messages import (
    LoadStage,
    StageBeat,
    StageDamaged,
    StartSequence,
    TokenSampled,
    UnloadStage,
)

__all__ = ["run"]

ON_A_AND_D: tuple[Parts, ...] = ((("a",), 3), (("d",), BLOCKS))
ON_B_AND_D: tuple[Parts, ...] = ((("b",), 3), (("d",), BLOCKS))
ON_C: tuple[Parts, ...] = ((("c",), BLOCKS),)
FIRST = MODEL.name


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """The same model by another name."""
    return Path(shutil.copytree(MODEL, tmp_path / "models" / "other"))


async def load(
    shoal: Shoal, model: Path, parts: tuple[Parts, ...], **changes: object
) -> Deployment:
    shoal.operations.plans = [plan_of(parts)]
    request = replace(planned(plan_of(parts)).request, model=model, **changes)  # type: ignore[arg-type]  # Fields by name.
    return await shoal.operations.load(request, shoal.steps.append)


def are_all(shoal: Shoal, kind: type[State]) -> bool:
    """Whether both models are in such a state."""
    return all(isinstance(shoal.models[name], kind) for name in (FIRST, "other"))


def states(shoal: Shoal) -> dict[str, str]:
    return {name: state.word for name, state in shoal.models.present()}


def test_a_load_keeps_the_stages_of_other_models(run: Run, other: Path) -> None:
    async def test(shoal: Shoal) -> None:
        first = await load(shoal, MODEL, ON_A_AND_D)
        second = await load(shoal, other, ON_B_AND_D, weight=2.0)
        assert states(shoal) == {"other": "ready", FIRST: "ready"}
        assert not shoal.of(UnloadStage)
        orders = [order for _, order in shoal.of(LoadStage)]
        assert [order.keeps for order in orders] == [(), (), (first.epoch,), (first.epoch,)]
        assert [order.weight for order in orders] == [1.0, 1.0, 2.0, 2.0]
        assert shoal.roster.keeps == {first.epoch, second.epoch}
        # Without a name, a request is for the model that was loaded last.
        assert await shoal.models.deployment() is second
        assert await shoal.models.deployment(FIRST) is first
        assert await shoal.models.deployment("unheard of") is second
        # The same model takes its own place only.
        again = await load(shoal, MODEL, ON_C)
        told = [(name, message.epoch) for name, message in shoal.of(UnloadStage)]
        assert sorted(told) == [("a", first.epoch), ("d", first.epoch)]
        assert shoal.loads()["c"].keeps == (second.epoch,)
        assert shoal.roster.keeps == {second.epoch, again.epoch}

    run(test)


def test_one_model_or_all_are_unloaded(run: Run, other: Path) -> None:
    async def test(shoal: Shoal) -> None:
        first = await load(shoal, MODEL, ON_A_AND_D)
        await load(shoal, other, ON_B_AND_D)
        with pytest.raises(NotLoaded, match=f"'nobody' is not loaded; other and {FIRST} is"):
            await shoal.operations.unload("nobody")
        assert await shoal.operations.unload(FIRST) == (FIRST,)
        assert {(name, said.epoch) for name, said in shoal.of(UnloadStage)} == {
            ("a", first.epoch),
            ("d", first.epoch),
        }
        assert states(shoal) == {"other": "ready"}
        assert [request.model.name for request, _ in shoal.kept.read()] == ["other"]
        assert list(shoal.kept.record.read()) == ["other"]
        await load(shoal, MODEL, ON_C)
        assert await shoal.operations.unload() == (FIRST, "other")
        assert states(shoal) == {}
        assert shoal.kept.read() == []
        assert not shoal.roster.keeps

    run(test)


def test_a_load_may_take_the_place_of_all_models(run: Run, other: Path) -> None:
    async def test(shoal: Shoal) -> None:
        await load(shoal, MODEL, ON_A_AND_D)
        await load(shoal, other, ON_B_AND_D, replaces=True)
        assert states(shoal) == {"other": "ready"}
        assert {name for name, _ in shoal.of(UnloadStage)} == {"a", "d"}
        assert shoal.loads()["b"].keeps == ()
        # It does not do so again when it is placed anew.
        await load(shoal, MODEL, ON_C)
        shoal.operations.plans = [plan_of(((("a",), BLOCKS),))]
        shoal.kill("b")
        await shoal.until(lambda: isinstance(shoal.models["other"], Replacing))
        await shoal.until(lambda: isinstance(shoal.models["other"], Serving))
        assert states(shoal) == {"other": "ready", FIRST: "ready"}

    run(test)


def test_only_the_models_of_a_lost_device_are_placed_anew(run: Run, other: Path) -> None:
    async def test(shoal: Shoal) -> None:
        first = await load(shoal, MODEL, ON_A_AND_D)
        second = await load(shoal, other, ON_B_AND_D)
        answer = asyncio.ensure_future(collect(shoal))
        await shoal.until(lambda: shoal.of(StartSequence))
        _, start = shoal.of(StartSequence)[0]
        assert start.epoch == second.epoch
        shoal.operations.plans = [plan_of(ON_C)]
        shoal.kill("a")
        await shoal.until(lambda: isinstance(shoal.models[FIRST], Replacing))
        await shoal.until(lambda: isinstance(shoal.models[FIRST], Serving))
        assert await shoal.models.deployment("other") is second
        assert {said.epoch for _, said in shoal.of(UnloadStage)} == {first.epoch}
        assert shoal.loads()["c"].keeps == (second.epoch,)
        # The answer of the other model was not touched.
        await shoal.said("d", TokenSampled(second.epoch, start.sequence, 0, 5, "length"))
        answer.cancel()

    run(test)


def test_both_models_of_a_lost_device_are_placed_anew(run: Run, other: Path) -> None:
    async def test(shoal: Shoal) -> None:
        before = [await load(shoal, MODEL, ON_A_AND_D), await load(shoal, other, ON_B_AND_D)]
        shoal.operations.plans = [plan_of(ON_C), plan_of(ON_C)]
        shoal.kill("d")
        await shoal.until(lambda: are_all(shoal, Replacing))
        await shoal.until(lambda: are_all(shoal, Serving))
        after = {one.epoch for one in shoal.models.all_serving}
        assert not after & {one.epoch for one in before}
        assert shoal.roster.keeps == after
        # The second one leaves the stage of the first one where it is.
        (_, early), (_, late) = shoal.of(LoadStage)[-2:]
        assert early.epoch in late.keeps

    run(test)


def test_damage_of_one_model_does_not_end_the_other(run: Run, other: Path) -> None:
    async def test(shoal: Shoal) -> None:
        first = await load(shoal, MODEL, ON_A_AND_D)
        second = await load(shoal, other, ON_B_AND_D)
        shoal.operations.plans = [plan_of(ON_A_AND_D)]
        await shoal.said("d", StageDamaged(first.epoch, "rot"))
        await shoal.until(lambda: isinstance(shoal.models[FIRST], Replacing))
        await shoal.until(lambda: isinstance(shoal.models[FIRST], Serving))
        assert await shoal.models.deployment("other") is second
        assert shoal.models.is_suspect(first)
        assert not shoal.models.is_suspect(second)

    run(test)


def test_a_device_that_only_lost_its_connection_brings_back_both_stages(
    run: Run, other: Path
) -> None:
    async def test(shoal: Shoal) -> None:
        first = await load(shoal, MODEL, ON_A_AND_D)
        second = await load(shoal, other, ON_B_AND_D)
        shoal.kill("d")
        await shoal.until(lambda: are_all(shoal, Replacing))
        await shoal.join("d", kept=[(first.epoch, 1), (second.epoch, 1)])
        await shoal.until(lambda: are_all(shoal, Serving))
        assert {one.epoch for one in shoal.models.all_serving} == {first.epoch, second.epoch}
        assert not shoal.of(UnloadStage)

    run(test)


def restarted(
    directory: Path, other: Path, test: Callable[[Shoal, list[Deployment]], Awaitable[None]]
) -> None:
    """Load two models, stop the coordinator, and call ``test`` with the next one."""

    async def main() -> None:
        async with running(directory) as shoal:
            await shoal.join(*"abcd")
            before = [await load(shoal, MODEL, ON_A_AND_D), await load(shoal, other, ON_B_AND_D)]
        async with running(directory) as shoal:
            shoal.keeper.resume()
            await asyncio.wait_for(test(shoal, before), 60)

    asyncio.run(main())


def test_a_restarted_coordinator_takes_both_over(tmp_path: Path, other: Path) -> None:
    async def test(shoal: Shoal, before: list[Deployment]) -> None:
        first, second = before
        await shoal.join("a", kept=[(first.epoch, 4)])
        await shoal.join("b", kept=[(second.epoch, 5)])
        await shoal.join("d", kept=[(first.epoch, 6), (second.epoch, 7)])
        await shoal.until(lambda: len(shoal.models.all_serving) == 2)
        found = {one.name: one for one in shoal.models.all_serving}
        assert found[FIRST].epoch == first.epoch
        assert found["other"].epoch == second.epoch
        assert (found[FIRST].newest_sequence, found["other"].newest_sequence) == (6, 7)
        assert not shoal.of(LoadStage)
        assert shoal.roster.keeps == {first.epoch, second.epoch}

    restarted(tmp_path, other, test)


def test_a_restarted_coordinator_loads_one_again_beside_the_other(
    tmp_path: Path, other: Path
) -> None:
    async def test(shoal: Shoal, before: list[Deployment]) -> None:
        first, second = before
        shoal.operations.plans = [plan_of(ON_B_AND_D)]
        await shoal.join("a", kept=[(first.epoch, 4)])
        await shoal.join("b")
        await shoal.join("d", kept=[(first.epoch, 6), (second.epoch, 7)])
        await shoal.until(lambda: len(shoal.models.all_serving) == 2)
        found = {one.name: one for one in shoal.models.all_serving}
        assert found[FIRST].epoch == first.epoch
        assert found["other"].epoch != second.epoch
        assert [(name, said.epoch) for name, said in shoal.of(UnloadStage)] == [("d", second.epoch)]
        assert [order.keeps for _, order in shoal.of(LoadStage)] == [(first.epoch,)] * 2

    restarted(tmp_path, other, test)


def test_the_room_that_deployments_take_is_that_of_plan_or_report(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(shoal: Shoal) -> None:
        deployment = await load(shoal, MODEL, ON_A_AND_D)
        first, last = deployment.plan.stages
        stages = (
            replace(first, memory_bytes=5000, storage_bytes=70),
            replace(last, memory_bytes=10, storage_bytes=80),
        )
        record = DeploymentRecord.of(
            replace(deployment, plan=replace(deployment.plan, stages=stages))
        )
        reported = deployment.loaded[1][0].memory_bytes
        assert reported > 10
        assert use_of([record, record]) == {
            "id-of-a": Use(10000, 140),
            "id-of-d": Use(2 * reported, 160),
        }

    run(test)
    left = Use(1 << 20, 1 << 31).left_of(PROFILE)
    assert (left.memory_bytes, left.storage_bytes) == ((1 << 30) - (1 << 20), 0)
    # What other models take is no memory that shoal might use as well.
    assert left.memory_total_bytes == PROFILE.memory_total_bytes - (1 << 20)


def test_broken_models_give_way_where_not_all_fit(
    run: Run, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan is asked for beside the other lost model first, and then without it."""
    besides: list[list[str]] = []

    async def test(shoal: Shoal) -> None:
        await load(shoal, MODEL, ON_A_AND_D)
        await load(shoal, other, ON_B_AND_D)
        plan = shoal.operations._maker.plan

        async def crowded(request: LoadRequest, **options: Any) -> object:
            beside = [record.epoch for record in shoal.operations._beside(request)]
            besides.append([request.model.name, str(len(beside))])
            if beside:
                raise InfeasiblePlan("too little memory")
            return await plan(request, **options)

        monkeypatch.setattr(shoal.operations._maker, "plan", crowded)
        shoal.operations.plans = [plan_of(ON_C)]
        shoal.kill("d")
        await shoal.until(lambda: shoal.models.all_serving and len(besides) >= 3)
        assert [count for _, count in besides[:3]] == ["1", "0", "1"]
        assert besides[0][0] == besides[1][0] != besides[2][0]

    run(test)


def test_a_model_gets_room_by_others_and_those_that_stay_answer_on(
    run: Run, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    third = Path(shutil.copytree(MODEL, tmp_path / "models" / "third"))
    together = {FIRST: 1.0, "other": 1.0, "third": 1.0}

    async def test(shoal: Shoal) -> None:
        where = {"a": MODEL, "b": other, "d": third}
        _, second, stays = [
            await load(shoal, model, (((name,), BLOCKS),), together=together)
            for name, model in where.items()
        ]

        async def place(request: LoadRequest, *given: object) -> object:
            raise InfeasiblePlan("too little memory")

        async def plan_again(requests: Sequence[LoadRequest]) -> PlannedAgain:
            parts = {
                name: planned(plan_of((((device,), BLOCKS),)), ["a", "b", "c", "d"][1:])
                for name, device in ((FIRST, "b"), ("other", "c"), ("third", "d"))
            }
            known = {model_name(one.model): one for one in requests}
            return PlannedAgain(
                {name: replace(part, request=known[name]) for name, part in parts.items()}, {}
            )

        monkeypatch.setattr(shoal.operations, "place", place)
        monkeypatch.setattr(shoal.operations, "plan_again", plan_again)
        shoal.kill("a")
        await shoal.until(lambda: isinstance(shoal.models[FIRST], Replacing))
        await shoal.until(lambda: len(shoal.models.all_serving) == 3)
        found = {one.name: one for one in shoal.models.all_serving}
        assert {name: one.where for name, one in found.items()} == {
            FIRST: "b", "other": "c", "third": "d",
        }  # fmt: skip
        assert found["third"] is stays
        assert found["other"].epoch != second.epoch
        assert not [one for one in shoal.of(UnloadStage) if one[1].epoch == stays.epoch]

    run(test)


def test_models_that_are_compared_together_do_not_lessen_each_others_room(
    run: Run, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A joint plan has the limits of each model alone, or what one takes would count twice."""
    beside: dict[str, int] = {}

    async def test(shoal: Shoal) -> None:
        together = {FIRST: 1.0, "other": 1.0}
        first = await load(shoal, MODEL, ON_A_AND_D, together=together)
        await load(shoal, other, ON_B_AND_D, together=together)

        async def noted(request: LoadRequest, **options: Any) -> object:
            beside[request.model.name] = len(shoal.operations._beside(request))
            if len(beside) == 2:
                raise PlanError("both were asked for")
            return planned(plan_of(ON_C))

        monkeypatch.setattr(shoal.operations._maker, "plan", noted)
        with pytest.raises(PlanError, match="both were asked for"):
            await shoal.operations.compare(first)
        assert beside == {FIRST: 0, "other": 0}

    run(test)


@pytest.mark.parametrize("error", [InfeasiblePlan("no room"), ModelError("no files")])
def test_no_model_of_several_waits_for_the_room_or_the_files_of_a_draft_model(
    run: Run, other: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    asked: list[LoadRequest] = []

    async def test(shoal: Shoal) -> None:
        async def without(request: LoadRequest, **options: Any) -> object:
            asked.append(request)
            if request.draft is not None:
                raise error
            return replace(planned(plan_of(ON_C)), request=request)

        monkeypatch.setattr(shoal.operations._maker, "plan", without)
        request = LoadRequest(MODEL, draft=other, together={FIRST: 1.0, "other": 1.0})
        again = await shoal.operations.plan_again([request])
        assert not again.waiting
        assert list(again.parts) == [FIRST]
        assert [one.draft for one in asked] == [other, None]

    run(test)


def test_paces_and_counts_of_two_models_are_apart(run: Run, other: Path) -> None:
    async def test(shoal: Shoal) -> None:
        first = await load(shoal, MODEL, ON_A_AND_D)
        second = await load(shoal, other, ON_B_AND_D)
        member = shoal.member("d")
        member.beats = {
            first.epoch: StageBeat(first.epoch, 0.5),
            second.epoch: StageBeat(second.epoch, 0.25),
        }
        assert (token_s(first, member), token_s(second, member)) == (0.5, 0.25)

    run(test)


def test_models_that_are_loaded_together_tell_what_is_doubtful(
    run: Run, other: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = {"chat_template": "{{ nothing.at.all }}"}
    (other / "tokenizer_config.json").write_text(json.dumps(template))

    async def no_plan(asked: SeveralRequest, *, weights: bool) -> PlannedTogether:
        raise PlanError("no plan is left")

    async def test(shoal: Shoal) -> None:
        monkeypatch.setattr(shoal.operations, "_plan_several", no_plan)
        requests = tuple(LoadRequest(model) for model in (MODEL, other))
        with pytest.raises(PlanError):
            await shoal.operations.load_several(
                SeveralRequest(requests, (1.0, 1.0)), shoal.steps.append
            )

    run(test)
    (line,) = [one for one in caplog.messages if "chat completions will fail" in one]
    assert "chat completions will fail, plain ones work" in line


def test_no_more_requests_are_read_than_are_planned_together() -> None:
    with pytest.raises(RequestInvalid, match="models: expected 2 to 8 requests"):
        SeveralRequest.from_dict({"models": [{"colour": "red"}] * 9})


class LossesMore(QualityMeter):
    """Finds that each first plan loses more than estimated, and the next one does not."""

    async def keep_estimate(
        self,
        request: LoadRequest,
        checkpoint: Checkpoint,
        problem: PlanningProblem,
        plan: Plan,
        again: PlanAgain | None,
        on_step: OnStep,
    ) -> tuple[Plan, float | None]:
        assert again is not None
        return await again(problem), 0.0


def test_a_plan_with_a_tighter_budget_keeps_out_of_the_way_of_others_too(run: Run) -> None:
    async def test(shoal: Shoal) -> None:
        problem = both_models(memory=(4_800, 4_800), speeds=(0.010, 0.015)).problems[0]
        record = DeploymentRecord(1, "", solve(problem), 64, {}, (), ())
        left = lessened(problem, [record.plan])
        meter = LossesMore(shoal.store, QualityStore(shoal.directory))
        maker = PlanMaker(
            shoal.roster, shoal.store, shoal.models, meter, lambda _: [record], shoal.steps.append
        )
        alone = solve(left)
        assert [stage.device for stage in alone.stages] == ["d0"]
        losses = Losses(1.0, None, {}, None, budget=1.0, source=LossSource("estimated"))
        request = LoadRequest(MODEL, bits=(4, 8))
        kept, _ = await maker._kept(request, CHECKPOINT, (), left, alone, losses, asked=True)
        assert [stage.device for stage in kept.stages] == ["d1"]

    run(test)
