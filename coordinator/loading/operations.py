"""Takes a model directory to a running deployment: measure, plan, quantize, load, connect.

One operation runs at a time. An operation that ends early leaves no half-loaded stage behind. Its
end may be an error, a lost agent or a user who goes away. Operations report results to
coordinator.loading.models. coordinator.loading.keeper repeats a load after a loss.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

from coordinator.errors import AgentDamaged, Busy, LinkFailed, Moved, NotLoaded
from coordinator.files.artifacts import ArtifactStore
from coordinator.loading.companions import (
    PlannedAgain,
    companions,
    compared_together,
    is_changed,
    lacks_draft,
    plan_again,
)
from coordinator.loading.deployer import Deployer
from coordinator.loading.deployment import (
    Deployment,
    Planned,
    fetch,
    unload,
    unload_forgotten,
)
from coordinator.loading.drafting import load_tokenizer
from coordinator.loading.models import UNLOADED, Models
from coordinator.loading.moving import Mover
from coordinator.loading.paces import slowness_of
from coordinator.loading.plan_maker import (
    PlanMaker,
    check_joined,
    require_idle,
)
from coordinator.loading.rebalance import (
    Choice,
    Verdict,
    choice_of,
    judge_alone,
    revalued,
)
from coordinator.loading.record import DeploymentRecord
from coordinator.loading.recovery import remaining
from coordinator.loading.several import PlannedTogether, SeveralRequest, plan_together
from coordinator.loading.slots import Slots
from coordinator.loading.state import (
    LoadBegan,
    LoadFailed,
    Placed,
    Serving,
    StepBegan,
    Unloaded,
    deployment_of,
)
from coordinator.loading.turns import Turns
from coordinator.quality.measuring import QualityFound, QualityMeter
from coordinator.quality.store import QualityRequest, QualityStore
from coordinator.roster.measurements import (
    Step,
    machines,
    measure_again,
)
from coordinator.roster.members import Member, Roster
from model.checkpoint import Checkpoint
from model.errors import ModelError
from model.families import load_spec
from model.tokenizer import Tokenizer
from planning.errors import RequestInvalid
from planning.joint.problem import not_even_alone
from planning.plan import InfeasiblePlan, Plan, PlanError
from planning.problem import PlanningProblem
from planning.request import LoadRequest, model_name

log = logging.getLogger(__name__)

PLACEMENTS = 6
"""The most plans for one load. Each failed link during a deployment needs another plan."""


@dataclass(frozen=True, slots=True)
class Compared:
    """The best plan by the present figures, and how the present one compares.

    present: the present plan with the present figures.
    slow: how many times longer than measured devices take.
    beside: models that were planned together with this one, and answer, each with the best plan and
    the present one. They go together, and ``choice`` is about all of them.
    """

    planned: Planned
    present: Plan
    choice: Choice
    slow: Mapping[Member, float]
    beside: tuple[tuple[Deployment, Planned, Plan], ...] = ()

    def moves_of(self, deployment: Deployment) -> list[tuple[Deployment, Planned]]:
        """Return the models whose blocks go elsewhere, with their plans. ``deployment`` is the one
        that was compared."""
        both = ((deployment, self.planned), *((one, to) for one, to, _ in self.beside))
        if not self.beside:
            return list(both)
        return [(one, to) for one, to in both if is_changed(one, to)]


class Operations:
    """The operations that users ask for: plan, load, measure, calibrate and unload."""

    def __init__(
        self,
        roster: Roster,
        store: ArtifactStore,
        quality: QualityStore,
        models: Models,
        turns: Turns,
    ) -> None:
        self._roster = roster
        self._models = models
        self._turns = turns
        self._report = turns.report
        self._quality_meter = QualityMeter(store, quality)
        self._maker = PlanMaker(
            roster, store, models, self._quality_meter, self._beside, self._report
        )
        self._deployer = Deployer(roster, store, models, self._report)
        self.mover = Mover(roster, models, self.carry_out, self._deployer.damage)
        self.records: dict[str, DeploymentRecord] = {}
        """Deployments from before a restart whose stages may still be loaded, by model."""
        self._crowded_out: frozenset[str] = frozenset()
        """Broken models that the present attempt leaves no room for."""

    async def plan(self, request: LoadRequest, on_step: Callable[[Step], None]) -> Planned:
        """Measure missing figures, and plan. Raises CoordinatorError, ModelError, PlanError."""
        async with self._turns.asked(on_step):
            # A plan answers what the devices can do, whatever is loaded now.
            alone = replace(self._identified(request), replaces=True)
            return await self._maker.plan(alone, asked=True, weights=False)

    async def load(self, request: LoadRequest, on_step: Callable[[Step], None]) -> Deployment:
        """Plan, then load the model beside the others, or in the place of all of them.

        Raises CoordinatorError, ModelError, PlanError.
        """
        async with self._turns.asked(on_step):
            tokenizer = await _checked_tokenizer(request)
            return await self._load(self._identified(request), tokenizer)

    async def plan_several(
        self, asked: SeveralRequest, on_step: Callable[[Step], None]
    ) -> PlannedTogether:
        """Plan models together. Raises CoordinatorError, ModelError, PlanError."""
        async with self._turns.asked(on_step):
            return await self._plan_several(asked, weights=False)

    async def load_several(
        self, asked: SeveralRequest, on_step: Callable[[Step], None]
    ) -> tuple[PlannedTogether, tuple[Deployment, ...]]:
        """Plan models together and load all of them, or none.

        Raises CoordinatorError, ModelError, PlanError.
        """
        async with self._turns.asked(on_step):
            tokenizers = [await _checked_tokenizer(request) for request in asked.requests]
            for attempt in itertools.count(1):
                together = await self._plan_several(asked, weights=True)
                present = [known for known, _ in self._models.present()]
                ended = self._end_models(present if asked.replaces else asked.names)
                await asyncio.shield(self._unload(ended))
                members = self._roster.members
                try:
                    return together, await self._load_parts(together.parts, tokenizers)
                except LinkFailed as error:
                    self._fail_link(members, error)
                    if attempt == PLACEMENTS:
                        raise
            raise AssertionError("counting ended")

    async def _plan_several(self, asked: SeveralRequest, *, weights: bool) -> PlannedTogether:
        """Plan each model as if the others of ``asked`` were not there, then all of them."""
        self._crowded_out = frozenset(asked.names)
        try:
            parts = [await self._planned_alone(one, asked.names, weights) for one in asked.each()]
        finally:
            self._crowded_out = frozenset()
        parts = [
            replace(part, request=replace(part.request, time_limit_s=own.time_limit_s))
            for part, own in zip(parts, asked.requests, strict=True)
        ]

        async def measured(part: Planned) -> float | None:
            if part.losses.kind != "estimated" or part.problem.quality_budget is None:
                return None
            return await self._quality_meter.loss_of(
                part.request, part.checkpoint, part.plan, self._report
            )

        return await plan_together(asked, parts, measured, self._say_planning)

    async def _planned_alone(
        self, request: LoadRequest, names: Sequence[str], weights: bool
    ) -> Planned:
        """Plan one of the models with these names. Raises as ``plan``."""
        try:
            return await self._maker.plan(self._identified(request), asked=True, weights=weights)
        except InfeasiblePlan as error:
            name = model_name(request.model)
            others = [other for other in names if other != name]
            raise not_even_alone(error, name, others) from error

    async def _load_parts(
        self, parts: Sequence[Planned], tokenizers: Sequence[Tokenizer]
    ) -> tuple[Deployment, ...]:
        """Load planned models one after the other. If one fails, none of them stays."""
        found: list[Deployment] = []
        names = [model_name(part.request.model) for part in parts]
        for name, part in zip(names, parts, strict=True):
            self._models.apply(name, LoadBegan(part.request))
        try:
            for name, part, tokenizer in zip(names, parts, tokenizers, strict=True):
                self._phase(part.request, "quantize")
                files = await self._deployer.files(part, tokenizer)
                self._phase(part.request, "load")
                members = self._roster.members
                found.append(await self._deployer.deploy(part, tokenizer, files, members))
                self._models.apply(name, Placed(found[-1]))
        except BaseException as error:  # Also when cancelled, the state must say so.
            why = str(error) or "the load was stopped"
            for name in names[len(found) :]:
                self._models.apply(name, LoadFailed(NotLoaded(f"{name} was not loaded: {why}")))
            await asyncio.shield(self._unload(self._end_models(names[: len(found)])))
            raise
        return tuple(found)

    async def _load(self, request: LoadRequest, tokenizer: Tokenizer) -> Deployment:
        name = model_name(request.model)
        self._models.apply(name, LoadBegan(request))
        try:
            try:
                deployment = await self._put(request, tokenizer, asked=True)
            except InfeasiblePlan as error:
                raise await self._explained(error, request) from error
        except BaseException as error:  # Also when cancelled, the state must say so.
            why = str(error) or "the load was stopped"
            self._models.apply(name, LoadFailed(NotLoaded(f"{name} was not loaded: {why}")))
            raise
        self._models.apply(name, Placed(deployment))
        return deployment

    async def _explained(self, error: InfeasiblePlan, request: LoadRequest) -> InfeasiblePlan:
        """Return the error with a word on the models that stay loaded, if there are others."""
        present = [known for known, _ in self._models.present()]
        others = [known for known in present if known != model_name(request.model)]
        if request.replaces or not others:
            return error
        stay = f"{' and '.join(others)} {'stays' if len(others) == 1 else 'stay'} loaded"
        try:
            await self._maker.plan(replace(request, replaces=True), asked=False)
        except PlanError:
            return InfeasiblePlan(f"{error} ({stay}, but alone it would not fit either)")
        return InfeasiblePlan(
            f"{error} {stay}. Alone it would fit: `shoal load --replace` ends other models, and "
            "`shoal unload NAME` one of them",
            error.advice,
        )

    async def rebalance(
        self, on_step: Callable[[Step], None], *, moves: bool, name: str | None = None
    ) -> tuple[Deployment, Compared, Verdict]:
        """Plan the model that answers again, by the present figures.

        Devices that run their stage slower than predicted are planned with what they take now.

        moves: move if the other plan is better. Answers go on there.
        name: of the model. None: the first one that answers.
        Raises NotLoaded if no model answers, CoordinatorError, ModelError and PlanError.
        """
        async with self._turns.asked(on_step):
            answering = self._models.all_serving
            deployment = next((one for one in answering if name in (None, one.name)), None)
            if deployment is None:
                who = "no model answers" if name is None else f"{name} does not answer"
                raise NotLoaded(f"{who} now: see `shoal ps`")
            compared = await self.compare(deployment)
            verdict = judge_alone(compared.choice)
            if moves and verdict.moves:
                changes = compared.moves_of(deployment)
                for one, planned in changes:
                    await self.prepare(planned, one)
                await self.mover.move_together(changes, Moved())
            return deployment, compared, verdict

    async def compare(
        self,
        deployment: Deployment,
        slow: Mapping[Member, float] = MappingProxyType({}),
        *,
        measures: bool = True,
        without: Collection[Member] = (),
    ) -> Compared:
        """Compare a deployment with the best plan by the present figures.

        Models that were planned together with it, and answer, are planned with it again. The caller
        holds the turn.

        slow: how many times longer than measured devices took when they ran a stage last.
        measures: measure what is not known yet.
        without: members that the plan must do without.
        Raises CoordinatorError, ModelError and PlanError.
        """
        group = self.answering_with(deployment)
        self._crowded_out = frozenset(one.name for one in group)
        slow_now: dict[Member, float] = {}
        try:
            parts = [
                await self._planned_anew(one, slow, slow_now, measures=measures, without=without)
                for one in group
            ]
        finally:
            self._crowded_out = frozenset()
        planned = parts[0]
        if len(group) == 1:
            choice = choice_of(
                planned.problem,
                deployment.plan,
                planned.plan,
                deployment.load_s,
                is_wished=planned.request.plan is not None
                or _breaks_wishes(deployment, planned.request),
                others=[record.plan for record in self._beside(planned.request)],
                lacks_draft=lacks_draft(deployment, planned),
            )
        else:
            together, choice = await compared_together(group, parts, self._say_planning)
            parts = list(together)
        present, *others = (
            revalued(one.plan, part.problem) for one, part in zip(group, parts, strict=True)
        )
        beside = tuple(zip(group[1:], parts[1:], others, strict=True))
        return Compared(parts[0], present, choice, slow_now, beside)

    def answering_with(self, deployment: Deployment) -> tuple[Deployment, ...]:
        """Return a deployment, and those that answer and were planned together with it.

        A model with a given plan is compared alone.
        """
        names = companions(self._models, deployment.name, Serving)
        others = [one for one in self._models.all_serving if one.name in names]
        group = (deployment, *sorted(others, key=lambda one: one.name))
        return group if all(one.request.plan is None for one in group) else (deployment,)

    async def _planned_anew(
        self,
        deployment: Deployment,
        slow: Mapping[Member, float],
        slow_now: dict[Member, float],
        *,
        measures: bool,
        without: Collection[Member],
    ) -> Planned:
        """Plan a deployment by the present figures. Devices that are slow go to ``slow_now``."""
        here = [member.device for member in self._roster.members]
        request = remaining(deployment.request, here)
        request = replace(
            request, exclude=(*request.exclude, *(member.device for member in without))
        )

        def slowness(problem: PlanningProblem) -> dict[str, float]:
            stages = revalued(deployment.plan, problem).stages
            elsewhere = {one: slow[one] for one in slow if one not in deployment.devices}
            slow_now.update({**elsewhere, **slowness_of(deployment, stages, slow)})
            return {member.name: factor for member, factor in slow_now.items()}

        how = partial(self._maker.plan, asked=False, slowness=slowness, measures=measures)
        try:
            return await how(request)
        except (InfeasiblePlan, ModelError):
            if request.draft is None or deployment.draft is not None:
                raise
            return await how(replace(request, draft=None))

    async def plan_again(self, requests: Sequence[LoadRequest]) -> PlannedAgain:
        """Plan models together again, for the devices that are here. The caller holds the turn.

        Raises CoordinatorError, ModelError, PlanError.
        """
        here = [member.device for member in self._roster.members]
        left = [remaining(request, here) for request in requests]
        if not all(request.plan for request in left):
            left = [replace(request, plan=None) for request in left]
        self._crowded_out = frozenset(model_name(request.model) for request in left)
        try:
            alone = partial(self._maker.plan, asked=False)
            bare = [replace(request, draft=None) for request in left]
            again = None
            try:
                again = await plan_again(left, alone, self._say_planning)
            except ModelError:
                if bare == left:
                    raise
            if again is not None and (bare == left or not again.waiting):
                return again
            # No model waits for room, or for files, that a draft model alone would need.
            without = await plan_again(bare, alone, self._say_planning)
            if again is None or len(without.waiting) < len(again.waiting):
                return without
            return again
        finally:
            self._crowded_out = frozenset()

    def _say_planning(self, what: str) -> None:
        self._step("plan", what, 0, 0, "")

    async def prepare(self, planned: Planned, before: Deployment) -> None:
        """Make the files of a plan for a loaded model, and have its devices fetch them.

        Then answers do not wait for them. The caller holds the turn. Raises CoordinatorError,
        ModelError.
        """
        files = await self._deployer.files(planned, before.tokenizer)
        members = self._roster.members
        await fetch(planned, files.blocks, members, self._report, files.vocabulary)

    async def measure(self, name: str, on_step: Callable[[Step], None]) -> Member:
        """Measure the device ``name`` again, and its links to devices without a stage.

        Raises Busy if the device or its machine has a stage, and CoordinatorError.
        """
        async with self._turns.asked(on_step):
            members = self._roster.require_members()
            device = self._roster.names.device(name) or name
            check_joined((device,), members, self._roster.names)
            (member,) = (member for member in members if member.device == device)
            free: list[Member] = []
            for residents in machines(members):
                taken = [
                    deployment.name
                    for deployment in self._models.all_serving
                    if set(residents) & set(deployment.devices)
                ]
                if not taken:
                    free += residents
                elif member in residents:
                    raise Busy(
                        f"{' and '.join(taken)} is loaded on {name} or its machine, and measuring "
                        "needs the whole machine: run `shoal unload` first"
                    )
            await measure_again(self._roster, member, free, self._report)
            return member

    async def calibrate(
        self, request: QualityRequest, on_step: Callable[[Step], None]
    ) -> QualityFound:
        """Measure a model's sensitivities, on the fastest agent or on ``request.on``.

        Results of earlier runs are kept. Raises CoordinatorError, ModelError.
        """
        async with self._turns.asked(on_step):
            require_idle(self._models)
            everybody = members = self._roster.require_members()
            if request.on is not None:
                device = self._roster.names.device(request.on) or request.on
                check_joined((device,), members, self._roster.names)
                members = tuple(member for member in members if member.device == device)
            return await self._quality_meter.calibrate(request, members, everybody, self._report)

    async def unload(self, name: str | None = None) -> tuple[str, ...]:
        """Unload one model, or all. Returns their names, the one that answered first.

        Raises NotLoaded if the model ``name`` is not there.
        """
        self._turns.require_free()
        present = [known for known, _ in self._models.present()]
        if name is not None and name not in present:
            loaded = " and ".join(present) or "nothing"
            raise NotLoaded(f"the model {name!r} is not loaded; {loaded} is")
        names = tuple(present) if name is None else (name,)
        ended = self._end_models(names)
        async with self._turns.asked(lambda step: None):
            await asyncio.shield(self._unload(ended))
        return names

    def _end_models(self, names: Collection[str]) -> list[Deployment]:
        """End models, and return the deployments whose stages are still loaded."""
        ended: list[Deployment] = []
        for name, state in self._models.present():
            if name in names:
                deployment = deployment_of(state)
                ended += () if deployment is None else (deployment,)
                self._models.apply(name, Unloaded(NotLoaded(UNLOADED)))
        return ended

    async def _unload(self, ended: Iterable[Deployment]) -> None:
        """Unload the stages of deployments, and those that nobody takes over any more."""
        await asyncio.gather(*(unload(one.devices, one.epoch) for one in ended))
        await unload_forgotten(self._roster.members, self._roster.keeps)

    def note_damage(self, epoch: int, error: AgentDamaged) -> None:
        """Note that a stage of ``epoch``, which may not serve yet, was found damaged."""
        if self._turns.is_taken:
            self._deployer.note_damage(epoch, error)

    # ---- steps ----------------------------------------------------------------------------------

    async def _put(self, request: LoadRequest, tokenizer: Tokenizer, *, asked: bool) -> Deployment:
        """Plan and deploy. A link that fails meanwhile is planned around.

        asked: a user wants this model, beside the others or in their place.
        """
        name = model_name(request.model)
        for attempt in itertools.count(1):
            self._phase(request, "plan")
            planned = await self._maker.plan(request, asked=asked)
            self._phase(request, "quantize")
            files = await self._deployer.files(planned, tokenizer)
            if asked:
                # The new stages may need the memory of the old ones.
                present = [known for known, _ in self._models.present()]
                ended = self._end_models(present if request.replaces else (name,))
                await asyncio.shield(self._unload(ended))
                self._models.apply(name, LoadBegan(request))
            self._phase(request, "load")
            members = self._roster.members
            try:
                return await self._deployer.deploy(planned, tokenizer, files, members)
            except LinkFailed as error:
                self._fail_link(members, error)
                if attempt == PLACEMENTS:
                    raise
        raise AssertionError("counting ended")

    def _identified(self, request: LoadRequest) -> LoadRequest:
        """``request`` with ids in place of names. Raises RequestInvalid for unknown devices."""
        names = self._roster.names
        given = request.plan
        if given is not None:
            for name, device in given.devices.items():
                if names.device(device) is None:
                    raise RequestInvalid(
                        f"{given.source}: no device with the id {device}, which was called "
                        f"{name}, has ever joined here: take {name} out of `devices` in the plan "
                        f"to mean whichever device is called {name} now",
                        "plan",
                    )
        return request.identified(names.device)

    # ---- deploying ------------------------------------------------------------------------------

    async def place(self, request: LoadRequest, tokenizer: Tokenizer | None = None) -> Deployment:
        """Deploy an identified ``request``, as far as the living devices can carry it out.

        The caller holds the turn. Raises CoordinatorError, ModelError, PlanError.
        """
        if tokenizer is None:
            tokenizer = await asyncio.to_thread(load_tokenizer, request.model)
        left = remaining(request, [member.device for member in self._roster.members])
        try:
            deployment = await self._put_somehow(left, tokenizer)
        except (InfeasiblePlan, ModelError) as error:
            if left.draft is None:
                raise
            name = model_name(request.model)
            log.warning("%s is placed without its draft model, which does not fit: %s", name, error)
            deployment = await self._put_somehow(replace(left, draft=None), tokenizer)
        # The next recovery begins from the whole request.
        return replace(deployment, request=request)

    async def _put_somehow(self, left: LoadRequest, tokenizer: Tokenizer) -> Deployment:
        """Put a request by its given plan, or else by another one."""
        try:
            return await self._put_in_room(left, tokenizer)
        except (PlanError, LinkFailed):
            if left.plan is None:
                raise
            # The given plan's devices are here, but a link between them is not.
            return await self._put_in_room(replace(left, plan=None), tokenizer)

    async def _put_in_room(self, request: LoadRequest, tokenizer: Tokenizer) -> Deployment:
        """Plan and deploy beside all other models, or else beside those that answer.

        The others have lost devices too. If not all of them fit, the first attempt gets the room.
        """
        try:
            return await self._put(request, tokenizer, asked=False)
        except InfeasiblePlan:
            present = self._models.present()
            broken = {name for name, state in present if not isinstance(state, Serving)}
            self._crowded_out = frozenset(broken - {model_name(request.model)})
            if not self._crowded_out:
                raise
            try:
                return await self._put(request, tokenizer, asked=False)
            finally:
                self._crowded_out = frozenset()

    def _fail_link(self, members: Sequence[Member], error: LinkFailed) -> None:
        """Mark the link as failed over which two of ``members`` could not connect."""
        by_name = {member.name: member for member in members}
        ends = by_name[error.source], by_name[error.target]
        self._roster.fail_link(*ends, error.reason, used=True)

    def _beside(self, request: LoadRequest) -> list[DeploymentRecord]:
        """The deployments of other models that a plan leaves room for."""
        if request.replaces:
            return []
        others = self._crowded_out | {model_name(request.model)}
        found = [record for name, record in self.records.items() if name not in others]
        for name, state in self._models.present():
            deployment = deployment_of(state)
            if deployment is not None and name not in others:
                found.append(DeploymentRecord.of(deployment))
        return found

    async def carry_out(self, planned: Planned, before: Deployment) -> Deployment:
        """Deploy a plan in place of a deployment. The caller holds the turn.

        Raises CoordinatorError, ModelError, PlanError.
        """
        return await self.carry_out_for(before.request, planned, before.tokenizer)

    async def carry_out_for(
        self, request: LoadRequest, planned: Planned, tokenizer: Tokenizer | None = None
    ) -> Deployment:
        """Deploy a plan that was made for a part of a request. Otherwise as ``carry_out``."""
        if tokenizer is None:
            tokenizer = await asyncio.to_thread(load_tokenizer, request.model)
        files = await self._deployer.files(planned, tokenizer)
        members = self._roster.members
        try:
            deployment = await self._deployer.deploy(planned, tokenizer, files, members)
        except LinkFailed as error:
            self._fail_link(members, error)  # Or the next plan would need it again.
            raise
        # The next recovery begins from the whole request.
        return replace(deployment, request=request)

    async def adopt(self, request: LoadRequest, record: DeploymentRecord) -> Deployment:
        """Return the deployment of stages that are still loaded. The caller holds the turn.

        Raises CoordinatorError if a stage is gone or the model's files have changed, and
        ModelError.
        """
        tokenizer = await asyncio.to_thread(load_tokenizer, request.model)
        checkpoint = await asyncio.to_thread(self._maker.opened, Checkpoint.open, request)
        if checkpoint.fingerprint != record.fingerprint:
            raise NotLoaded("the model's files have changed")
        vocabulary = await self._deployer.vocabulary(tokenizer, checkpoint.spec)
        teams = record.teams(self._roster.members)
        if teams is None:
            raise NotLoaded("a device was lost")
        if self.records.get(model_name(request.model)) is not record:  # While files were read.
            raise NotLoaded("a stage was damaged, or has lost its neighbour")
        members = tuple(itertools.chain.from_iterable(teams))
        newest = max(member.kept.pop(record.epoch) for member in members)
        return Deployment(
            request=request,
            spec=checkpoint.spec,
            tokenizer=tokenizer,
            plan=record.plan,
            epoch=record.epoch,
            slots=Slots(request.slots),
            context_tokens=record.context_tokens,
            teams=teams,
            loaded=record.loaded,
            sums=record.sums,
            quality=record.quality,
            weights=record.weights,
            vocabulary=vocabulary,
            draft=record.draft,
            fingerprint=record.fingerprint,
            newest_sequence=newest,
        )

    # ---- progress ------------------------------------------------------------------------------

    def _step(self, phase: str, label: str, done: int, total: int, unit: str) -> None:
        self._turns.report(Step(phase, label, done, total, unit))

    def _phase(self, request: LoadRequest, phase: str) -> None:
        self._models.apply(model_name(request.model), StepBegan(phase))


def _breaks_wishes(deployment: Deployment, request: LoadRequest) -> bool:
    """Whether a block is not on the device that the request wants for it, or a team is missing."""
    teams = [{member.device for member in team} for team in deployment.teams]
    return any(set(wanted) not in teams for wanted in request.teams) or any(
        block in range(stage.first, stage.last) and device not in {one.device for one in team}
        for stage, team in zip(deployment.plan.stages, deployment.teams, strict=True)
        for block, device in request.pins.items()
    )


async def _checked_tokenizer(request: LoadRequest) -> Tokenizer:
    """The tokenizer of a request's model. What is doubtful of it is logged. Raises ModelError."""
    tokenizer = await asyncio.to_thread(load_tokenizer, request.model)
    for doubt in await asyncio.to_thread(_doubts, tokenizer, request.model):
        log.warning("%s", doubt)
    return tokenizer


def _doubts(tokenizer: Tokenizer, model: Path) -> list[str]:
    return list(tokenizer.doubts(load_spec(model).vocab))
