"""Takes a model directory to a running deployment: measure, plan, quantize, load, connect.

One operation runs at a time. An operation that ends early leaves no half-loaded stage behind. Its
end may be an error, a lost agent or a user who goes away. Operations report results to
coordinator.loading.models. coordinator.loading.keeper repeats a load after a loss.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

from coordinator.errors import Busy, LinkFailed, Moved, NotLoaded
from coordinator.files.artifacts import ArtifactStore
from coordinator.files.vocabulary import Vocabulary, make_vocabulary
from coordinator.loading.beside import use_of
from coordinator.loading.deployment import (
    Deployment,
    Planned,
    deploy,
    fetch,
    unload,
    unload_forgotten,
    wanted_artifacts,
)
from coordinator.loading.models import UNLOADED, Models
from coordinator.loading.moving import Mover
from coordinator.loading.paces import slowness_of
from coordinator.loading.rebalance import (
    Choice,
    Verdict,
    choice_of,
    judge_alone,
    revalued,
    slowed,
)
from coordinator.loading.record import DeploymentRecord
from coordinator.loading.recovery import remaining
from coordinator.loading.several import PlannedTogether, SeveralRequest, plan_together
from coordinator.loading.slots import Slots
from coordinator.loading.state import (
    FilesMended,
    LoadBegan,
    LoadFailed,
    Placed,
    Serving,
    StepBegan,
    Unloaded,
    deployment_of,
)
from coordinator.loading.turns import Turns
from coordinator.quality.measuring import Losses, QualityFound, QualityMeter
from coordinator.quality.store import QualityRequest, QualityStore
from coordinator.roster.measurements import (
    Step,
    find_held,
    in_thread,
    load_rates,
    machines,
    measure_again,
    measure_blocks,
    measure_links,
    try_links,
)
from coordinator.roster.members import Member, Roster
from coordinator.roster.names import NameBook
from model.checkpoint import Checkpoint
from model.families import load_spec
from model.given import require_model
from model.spec import ModelSpec
from model.tokenizer import Tokenizer
from planning.build import DeviceInput, RequestInput, build_problem
from planning.errors import RequestInvalid
from planning.joint.beside import solve_beside
from planning.plan import InfeasiblePlan, Plan, PlanError
from planning.problem import PlanningProblem
from planning.request import DEFAULT_CONTEXT_TOKENS, LoadRequest, model_name
from planning.sensitivity import choose_hops
from wire.messages import BlockRef, StageLoaded

log = logging.getLogger(__name__)

PLACEMENTS = 6
"""The most plans for one load. Each failed link during a deployment needs another plan."""


Slowness: TypeAlias = Callable[[PlanningProblem], Mapping[str, float]]
"""Says how many times longer than in a problem its devices take, by their names."""


def as_measured(problem: PlanningProblem) -> Mapping[str, float]:
    """Say that each device takes what was measured."""
    return {}


@dataclass(frozen=True, slots=True)
class Compared:
    """The best plan by the present figures, and how the present one compares.

    present: the present plan with the present figures.
    slow: how many times longer than measured devices take.
    """

    planned: Planned
    present: Plan
    choice: Choice
    slow: Mapping[Member, float]


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
        self._store = store
        self._quality_meter = QualityMeter(store, quality)
        self.mover = Mover(roster, models, self.carry_out)
        self._vocabularies: list[tuple[Tokenizer, Vocabulary | None]] = []
        """The vocabularies of the loaded models' tokenizers, and of the last one."""
        self.records: dict[str, DeploymentRecord] = {}
        """Deployments from before a restart whose stages may still be loaded, by model."""
        self._crowded_out: frozenset[str] = frozenset()
        """Broken models that the present attempt leaves no room for."""
        self._damaged_epochs: set[int] = set()
        """Epochs that were being loaded when one of their stages was found damaged."""

    async def plan(self, request: LoadRequest, on_step: Callable[[Step], None]) -> Planned:
        """Measure missing figures, and plan. Raises CoordinatorError, ModelError, PlanError."""
        async with self._turns.asked(on_step):
            # A plan answers what the devices can do, whatever is loaded now.
            alone = replace(self._identified(request), replaces=True)
            return await self._plan(alone, asked=True, weights=False)

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
            parts = [
                await self._plan(self._identified(request), asked=True, weights=weights)
                for request in asked.each()
            ]
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

        return await plan_together(
            asked, parts, measured, lambda what: self._step("plan", what, 0, 0, "")
        )

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
                blocks = await self._quantize(part)
                spec = part.checkpoint.spec
                vocabulary = await asyncio.to_thread(self._vocabulary_of, tokenizer, spec)
                self._phase(part.request, "load")
                members = self._roster.members
                found.append(await self._deploy(part, tokenizer, blocks, members, vocabulary))
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
            await self._plan(replace(request, replaces=True), asked=False)
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
                await self.prepare(compared.planned, deployment)
                await self.mover.move(deployment, compared.planned, Moved())
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

        The caller holds the turn.

        slow: how many times longer than measured devices took when they ran a stage last.
        measures: measure what is not known yet.
        without: members that the plan must do without.
        Raises CoordinatorError, ModelError and PlanError.
        """
        here = [member.device for member in self._roster.members]
        request = remaining(deployment.request, here)
        request = replace(
            request, exclude=(*request.exclude, *(member.device for member in without))
        )
        slow_now: dict[Member, float] = {}

        def slowness(problem: PlanningProblem) -> dict[str, float]:
            stages = revalued(deployment.plan, problem).stages
            elsewhere = {one: slow[one] for one in slow if one not in deployment.devices}
            slow_now.clear()
            slow_now.update({**elsewhere, **slowness_of(deployment, stages, slow)})
            return {member.name: factor for member, factor in slow_now.items()}

        planned = await self._plan(request, asked=False, slowness=slowness, measures=measures)
        choice = choice_of(
            planned.problem,
            deployment.plan,
            planned.plan,
            deployment.load_s,
            is_wished=request.plan is not None or _breaks_pins(deployment, request),
            others=[record.plan for record in self._beside(request)],
        )
        present = revalued(deployment.plan, planned.problem)
        return Compared(planned, present, choice, slow_now)

    async def prepare(self, planned: Planned, before: Deployment) -> None:
        """Make the files of a plan for a loaded model, and have its devices fetch them.

        Then answers do not wait for them. The caller holds the turn. Raises CoordinatorError,
        ModelError.
        """
        blocks = await self._quantize(planned)
        vocabulary = await asyncio.to_thread(
            self._vocabulary_of, before.tokenizer, planned.checkpoint.spec
        )
        await fetch(planned, blocks, self._roster.members, self._report, vocabulary)

    async def measure(self, name: str, on_step: Callable[[Step], None]) -> Member:
        """Measure the device ``name`` again, and its links to devices without a stage.

        Raises Busy if the device or its machine has a stage, and CoordinatorError.
        """
        async with self._turns.asked(on_step):
            members = self._roster.require_members()
            device = self._roster.names.device(name) or name
            _check_joined((device,), members, self._roster.names)
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
            self._require_idle()
            everybody = members = self._roster.require_members()
            if request.on is not None:
                device = self._roster.names.device(request.on) or request.on
                _check_joined((device,), members, self._roster.names)
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

    def note_damage(self, epoch: int) -> None:
        """Note that a stage of ``epoch``, which may still be loading, was found damaged."""
        if self._turns.is_taken:
            self._damaged_epochs.add(epoch)

    # ---- steps ----------------------------------------------------------------------------------

    async def _put(self, request: LoadRequest, tokenizer: Tokenizer, *, asked: bool) -> Deployment:
        """Plan and deploy. A link that fails meanwhile is planned around.

        asked: a user wants this model, beside the others or in their place.
        """
        name = model_name(request.model)
        for attempt in itertools.count(1):
            self._phase(request, "plan")
            planned = await self._plan(request, asked=asked)
            self._phase(request, "quantize")
            blocks = await self._quantize(planned)
            vocabulary = await asyncio.to_thread(
                self._vocabulary_of, tokenizer, planned.checkpoint.spec
            )
            if asked:
                # The new stages may need the memory of the old ones.
                present = [known for known, _ in self._models.present()]
                ended = self._end_models(present if request.replaces else (name,))
                await asyncio.shield(self._unload(ended))
                self._models.apply(name, LoadBegan(request))
            self._phase(request, "load")
            members = self._roster.members
            try:
                return await self._deploy(planned, tokenizer, blocks, members, vocabulary)
            except LinkFailed as error:
                self._fail_link(members, error)
                if attempt == PLACEMENTS:
                    raise
        raise AssertionError("counting ended")

    async def _plan(
        self,
        request: LoadRequest,
        *,
        asked: bool,
        weights: bool = True,
        slowness: Slowness = as_measured,
        measures: bool = True,
    ) -> Planned:
        """Plan a request.

        asked: a user waits for the best plan, so more of the failed links are tried again.
        weights: without them, config.json is enough, and losses are assumed.
        slowness: says how many times longer than measured devices take, by their names.
        measures: measure what is not known yet.
        """
        open_model = Checkpoint.open if weights else Checkpoint.open_to_plan
        checkpoint = await asyncio.to_thread(self._opened, open_model, request)
        request = request.for_model(checkpoint.spec)
        members = self._roster.require_members()
        names = self._roster.names
        absent = [device for device in request.exclude if names.device(device) is None]
        sharing = itertools.chain.from_iterable(request.teams)
        _check_joined((*absent, *request.pins.values(), *sharing), members, names)
        losses = await self._quality_meter.losses(
            checkpoint, request, members, self._report, measure=asked
        )
        context_tokens = min(
            request.context_tokens or DEFAULT_CONTEXT_TOKENS, checkpoint.spec.max_context
        )
        failed_before_s = time.monotonic()

        async def make(*, asked: bool) -> PlanningProblem:
            problem = await self._problem(
                request,
                checkpoint,
                members,
                context_tokens,
                losses,
                asked=asked if measures else None,
            )
            return slowed(problem, slowness(problem))

        problem = await make(asked=asked)
        try:
            plan = await self._solve(request, problem)
        except PlanError as error:
            if not measures or not await self._links_back(error, failed_before_s):
                raise
            problem = await make(asked=False)
            plan = await self._solve(request, problem)
        measured_kl = None
        if request.check_quality:
            self._require_idle()
            if losses.known is None:
                raise RequestInvalid(
                    "check_quality needs sensitivities that this coordinator has: run "
                    "`shoal calibrate --quality --on auto` first",
                    "check_quality",
                )
            plan, measured_kl = await self._quality_meter.keep_budget(
                request, checkpoint, members, problem, plan, losses.known, self._report
            )
        elif asked and losses.budget is not None and losses.source.kind == "estimated":
            plan, measured_kl = await self._quality_meter.keep_estimate(
                request, checkpoint, problem, plan, self._report
            )
        return Planned(
            request,
            checkpoint,
            context_tokens,
            problem,
            plan,
            losses.margin,
            measured_kl,
            losses.source,
            {member.name: member.device for member in members},
        )

    def _opened(
        self, open_model: Callable[[Path, str | None], Checkpoint], request: LoadRequest
    ) -> Checkpoint:
        """The model with the codes that the request's scheme chooses. Raises ModelError."""
        checkpoint = open_model(request.model, request.adapter)
        return self._store.prepared(checkpoint, request.scheme, request.scheme_text)

    async def _solve(self, request: LoadRequest, problem: PlanningProblem) -> Plan:
        self._step("plan", "solving", 0, 0, "")
        if request.plan is not None:
            return request.plan.renamed(self._roster.names.name).to_plan(problem)
        others = [record.plan for record in self._beside(request)]
        return await asyncio.to_thread(
            solve_beside, problem, others, time_limit_s=request.time_limit_s
        )

    async def _links_back(self, error: PlanError, failed_before_s: float) -> bool:
        """Try failed links that a plan may have lacked. Returns whether one of them works.

        These are the links that the planner names, or every failed link if it names none.
        """
        pairs = self._roster.links_to_retry(failed_before_s)
        if isinstance(error, InfeasiblePlan):
            wanted = error.advice.missing_links
            pairs = [pair for pair in pairs if (pair[0].name, pair[1].name) in wanted]
        return await try_links(self._roster, pairs, self._report)

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

    def _require_idle(self) -> None:
        for name, state in self._models.present():
            if deployment_of(state) is not None:
                raise Busy(
                    f"{name} is loaded, and measuring quality needs the whole device: "
                    "run `shoal unload` first"
                )

    async def _problem(
        self,
        request: LoadRequest,
        checkpoint: Checkpoint,
        members: tuple[Member, ...],
        context_tokens: int,
        losses: Losses,
        *,
        asked: bool | None,
    ) -> PlanningProblem:
        """Measure what is not known yet, and build the planning problem.

        The devices have the memory and storage that other models leave.

        asked: as of ``_plan``. With None nothing is measured.
        """
        spec = checkpoint.spec
        uses = use_of(self._beside(request))
        names = {member.device: member.name for member in members}
        excluded = [member.name for member in members if member.device in request.exclude]
        timings = await measure_blocks(
            members,
            spec,
            request.bits,
            self._report,
            names.values() if asked is None else excluded,
            rows=request.slots > 1,
            shares=not request.no_teams,
        )
        if asked is not None:
            measured = [member for member in members if member.name not in excluded]
            await measure_links(self._roster, measured, self._report, asked=asked)
        errors: tuple[dict[int, float], ...] = ({},) * spec.block_count
        if request.max_weight_error is not None:
            if not checkpoint.tensors:
                raise RequestInvalid(
                    "max_weight_error compares weights, and the model's are not downloaded yet",
                    "max_weight_error",
                )
            errors = await in_thread(
                "weight errors",
                lambda on_step, cancelled: self._store.weight_errors(
                    checkpoint, map(request.format, request.bits), on_step, cancelled
                ),
                self._report,
            )
        held: Mapping[str, Sequence[Collection[int]]] = {}
        rates: Mapping[str, float] = {}
        if request.objective.migration_weight > 0:
            formats = [request.format(bits) for bits in request.bits]
            artifacts = await asyncio.to_thread(self._store.known, checkpoint, formats)
            held = await find_held(members, artifacts, spec.block_count)
            rates = load_rates(self._roster, members)
        devices = [
            DeviceInput(
                member.name,
                uses[member.device].left_of(member.profile)
                if member.device in uses
                else member.profile,
                timings.get(member.name, ()),
                held.get(member.name, ()),
                rates.get(member.name, math.inf),
            )
            for member in members
        ]
        try:
            wanted = RequestInput(
                spec,
                request.bits,
                context_tokens,
                request.slots,
                formats={bits: request.format(bits) for bits in request.bits},
                native=checkpoint.native_formats(),
                weight_errors=errors,
                max_weight_error=request.max_weight_error,
                sensitivities=losses.blocks,
                own_sensitivities=losses.own,
                quality_budget=losses.budget,
                objective=request.objective,
                pins={block: names[device] for block, device in request.pins.items()},
                excluded=excluded,
                teams=[[names[device] for device in team] for team in request.teams],
                no_teams=request.no_teams,
                hop_formats=choose_hops(request.hop_bits, losses.hops, request.quality_budget),
            )
            no_links = [link for link, _ in self._roster.failed_links()]
            return build_problem(wanted, devices, self._roster.links(), no_links)
        except ValueError as error:
            raise RequestInvalid(str(error)) from error

    # ---- deploying ------------------------------------------------------------------------------

    async def _quantize(self, planned: Planned) -> dict[str, list[BlockRef]]:
        """Make the plan's artifacts, and return those of each device by its name in the plan."""
        names, wanted = zip(*wanted_artifacts(planned), strict=True)
        refs = await in_thread(
            "quantize",
            lambda on_step, cancelled: self._store.quantize(
                planned.checkpoint, wanted, on_step, cancelled
            ),
            self._report,
        )
        blocks: dict[str, list[BlockRef]] = {name: [] for name in names}
        for name, ref in zip(names, refs, strict=True):
            blocks[name].append(ref)
        return blocks

    def _vocabulary_of(self, tokenizer: Tokenizer, spec: ModelSpec) -> Vocabulary | None:
        """The vocabulary of a model, made once for each loaded tokenizer."""
        for known, vocabulary in self._vocabularies:
            if known is tokenizer:
                if vocabulary is not None:
                    self._store.keep(vocabulary.data)
                return vocabulary
        used = [deployment_of(state) for _, state in self._models.present()]
        loaded = [deployment.tokenizer for deployment in used if deployment is not None]
        for known, vocabulary in tuple(self._vocabularies):
            if not any(known is one for one in loaded):
                self._vocabularies.remove((known, vocabulary))
                if vocabulary is not None:
                    vocabulary.close()
        vocabulary = make_vocabulary(tokenizer, spec, self._store)
        self._vocabularies.append((tokenizer, vocabulary))
        return vocabulary

    async def _deploy(
        self,
        planned: Planned,
        tokenizer: Tokenizer,
        blocks: Mapping[str, Sequence[BlockRef]],
        members: Sequence[Member],
        vocabulary: Vocabulary | None = None,
    ) -> Deployment:
        self._damaged_epochs.clear()
        while True:  # This ends, because a device fetches or makes damaged files again.
            epoch = secrets.randbits(62)  # Hard to guess, and not repeated after a restart.
            on_loaded = partial(self._on_loaded, model_name(planned.request.model))
            deployment = await deploy(
                planned,
                tokenizer,
                blocks,
                members,
                epoch,
                self._report,
                on_loaded,
                vocabulary,
                tuple(self._roster.keeps),
            )
            if epoch not in self._damaged_epochs:
                return deployment
            await asyncio.shield(unload(deployment.devices, epoch))

    def _on_loaded(self, name: str, member: Member, loaded: StageLoaded) -> None:
        if loaded.damaged_files:
            self._models.apply(name, FilesMended())
            log.warning(
                "%s: %d damaged files were fetched or made again", member.name, loaded.damaged_files
            )

    async def place(self, request: LoadRequest, tokenizer: Tokenizer | None = None) -> Deployment:
        """Deploy an identified ``request``, as far as the living devices can carry it out.

        The caller holds the turn. Raises CoordinatorError, ModelError, PlanError.
        """
        if tokenizer is None:
            tokenizer = await asyncio.to_thread(_tokenizer, request.model)
        left = remaining(request, [member.device for member in self._roster.members])
        try:
            deployment = await self._put_in_room(left, tokenizer)
        except (PlanError, LinkFailed):
            if left.plan is None:
                raise
            # The given plan's devices are here, but a link between them is not.
            deployment = await self._put_in_room(replace(left, plan=None), tokenizer)
        # The next recovery begins from the whole request.
        return replace(deployment, request=request)

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
        blocks = await self._quantize(planned)
        vocabulary = await asyncio.to_thread(
            self._vocabulary_of, before.tokenizer, planned.checkpoint.spec
        )
        members = self._roster.members
        try:
            deployment = await self._deploy(planned, before.tokenizer, blocks, members, vocabulary)
        except LinkFailed as error:
            self._fail_link(members, error)  # Or the next plan would need it again.
            raise
        # The next recovery begins from the whole request.
        return replace(deployment, request=before.request)

    async def adopt(self, request: LoadRequest, record: DeploymentRecord) -> Deployment:
        """Return the deployment of stages that are still loaded. The caller holds the turn.

        Raises CoordinatorError if a stage is gone or the model's files have changed, and
        ModelError.
        """
        tokenizer = await asyncio.to_thread(_tokenizer, request.model)
        checkpoint = await asyncio.to_thread(self._opened, Checkpoint.open, request)
        if checkpoint.fingerprint != record.fingerprint:
            raise NotLoaded("the model's files have changed")
        vocabulary = await asyncio.to_thread(self._vocabulary_of, tokenizer, checkpoint.spec)
        teams = record.teams(self._roster.members)
        if teams is None:
            raise NotLoaded("a device was lost")
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
            fingerprint=record.fingerprint,
            newest_sequence=newest,
        )

    # ---- progress ------------------------------------------------------------------------------

    def _step(self, phase: str, label: str, done: int, total: int, unit: str) -> None:
        self._turns.report(Step(phase, label, done, total, unit))

    def _phase(self, request: LoadRequest, phase: str) -> None:
        self._models.apply(model_name(request.model), StepBegan(phase))


def _breaks_pins(deployment: Deployment, request: LoadRequest) -> bool:
    """Whether a block is not on the device that the request wants for it."""
    return any(
        block in range(stage.first, stage.last) and device not in {one.device for one in team}
        for stage, team in zip(deployment.plan.stages, deployment.teams, strict=True)
        for block, device in request.pins.items()
    )


def _tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a model's directory. Raises ModelError."""
    require_model(directory)
    return Tokenizer.load(directory)


async def _checked_tokenizer(request: LoadRequest) -> Tokenizer:
    """The tokenizer of a request's model. What is doubtful of it is logged. Raises ModelError."""
    tokenizer = await asyncio.to_thread(_tokenizer, request.model)
    for doubt in await asyncio.to_thread(_doubts, tokenizer, request.model):
        log.warning("%s", doubt)
    return tokenizer


def _doubts(tokenizer: Tokenizer, model: Path) -> list[str]:
    return list(tokenizer.doubts(load_spec(model).vocab))


def _check_joined(wanted: Iterable[str], members: tuple[Member, ...], names: NameBook) -> None:
    """Raise RequestInvalid if a device of ``wanted``, which are ids, is not a member."""
    here = {member.device for member in members}
    joined_now = ", ".join(member.name for member in members)
    for device in wanted:
        if names.device(device) is None:
            raise RequestInvalid(f"no device is called {device!r}: {joined_now} have joined")
        if device not in here:
            raise RequestInvalid(f"{names.name(device)} is not here now: {joined_now} have joined")
