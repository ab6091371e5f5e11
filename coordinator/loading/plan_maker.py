"""Makes the plan of a request: open the model, measure what is not known yet, build, solve.

The planner itself is pure, in planning/. This file brings it the figures of the devices here.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol, TypeAlias

from coordinator.errors import Busy
from coordinator.files.artifacts import ArtifactStore
from coordinator.loading.beside import use_of
from coordinator.loading.deployment import Planned
from coordinator.loading.drafting import PlannedDraft, check_vocabulary, open_draft
from coordinator.loading.models import Models
from coordinator.loading.rebalance import slowed
from coordinator.loading.record import DeploymentRecord
from coordinator.loading.state import deployment_of
from coordinator.quality.measuring import Losses, QualityMeter
from coordinator.roster.measurements import (
    Step,
    find_held,
    in_thread,
    load_rates,
    measure_blocks,
    measure_links,
    try_links,
)
from coordinator.roster.members import Member, Roster
from coordinator.roster.names import NameBook
from model.checkpoint import Checkpoint
from planning.build import DeviceInput, RequestInput, build_problem
from planning.draft import missing_bytes, places_of, with_draft
from planning.errors import RequestInvalid
from planning.joint.beside import solve_beside
from planning.losses import PlanAgain, with_assumed
from planning.plan import InfeasiblePlan, Plan, PlanError
from planning.problem import PlanningProblem
from planning.request import DEFAULT_CONTEXT_TOKENS, LoadRequest
from planning.sensitivity import choose_hops
from wire.profile import BlockTiming
from wire.sizes import format_size

Slowness: TypeAlias = Callable[[PlanningProblem], Mapping[str, float]]
"""Says how many times longer than in a problem its devices take, by their names."""


def as_measured(problem: PlanningProblem) -> Mapping[str, float]:
    """Say that each device takes what was measured."""
    return {}


class MakeProblem(Protocol):
    """Makes the problem of a request. asked: as of ``PlanMaker.plan``."""

    async def __call__(self, *, asked: bool) -> PlanningProblem: ...


class PlanMaker:
    """Makes plans for the devices that have joined. The caller holds the turn."""

    def __init__(
        self,
        roster: Roster,
        store: ArtifactStore,
        models: Models,
        quality_meter: QualityMeter,
        beside: Callable[[LoadRequest], Sequence[DeploymentRecord]],
        report: Callable[[Step], None],
    ) -> None:
        """``beside`` says which deployments of other models a plan leaves room for."""
        self._roster = roster
        self._store = store
        self._models = models
        self._quality_meter = quality_meter
        self._beside = beside
        self._report = report

    async def plan(
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
        Raises CoordinatorError, ModelError, PlanError. If a user waits, InfeasiblePlan says what a
        draft model lacks.
        """
        how = partial(self._plan, weights=weights, slowness=slowness, measures=measures)
        try:
            return await how(request, asked=asked)
        except PlanError as error:
            if request.draft is None or not asked:
                raise
            try:
                without = await how(replace(request, draft=None), asked=False)
            except PlanError:
                raise error from None
            advice = error.advice if isinstance(error, InfeasiblePlan) else None
            raise InfeasiblePlan(await self._lacking(request, without), advice) from error

    async def _plan(
        self,
        request: LoadRequest,
        *,
        asked: bool,
        weights: bool,
        slowness: Slowness,
        measures: bool,
    ) -> Planned:
        """Plan a request, as ``plan`` does."""
        open_model = Checkpoint.open if weights else Checkpoint.open_to_plan
        checkpoint = await asyncio.to_thread(self.opened, open_model, request)
        request = request.for_model(checkpoint.spec)
        members = self._roster.require_members()
        names = self._roster.names
        absent = [device for device in request.exclude if names.device(device) is None]
        sharing = itertools.chain.from_iterable(request.teams)
        check_joined((*absent, *request.pins.values(), *sharing), members, names)
        losses = await self._quality_meter.losses(
            checkpoint, request, members, self._report, measure=asked
        )
        context_tokens = min(
            request.context_tokens or DEFAULT_CONTEXT_TOKENS, checkpoint.spec.max_context
        )
        draft = await self._draft(
            request, context_tokens, members, weights=weights, asked=asked if measures else None
        )

        async def make(*, asked: bool) -> PlanningProblem:
            problem = await self._problem(
                request,
                checkpoint,
                members,
                context_tokens,
                losses,
                asked=asked if measures else None,
            )
            problem = slowed(problem, slowness(problem))
            return problem if draft is None else with_draft(problem, draft.given, draft.places)

        try:
            problem, plan = await self._solved(request, make, asked=asked, retries=measures)
        except InfeasiblePlan as error:
            raise with_assumed(error, [losses.source]) from None
        plan, measured_kl = await self._kept(
            request, checkpoint, members, problem, plan, losses, asked=asked
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
            draft,
        )

    async def _solved(
        self, request: LoadRequest, make: MakeProblem, *, asked: bool, retries: bool
    ) -> tuple[PlanningProblem, Plan]:
        """Solve a problem, and once more if links are back that it may have lacked."""
        failed_before_s = time.monotonic()
        problem = await make(asked=asked)
        try:
            return problem, await self._solve(request, problem)
        except PlanError as error:
            if not retries or not await self._links_back(error, failed_before_s):
                raise
        problem = await make(asked=False)
        return problem, await self._solve(request, problem)

    async def _draft(
        self,
        request: LoadRequest,
        context_tokens: int,
        members: tuple[Member, ...],
        *,
        weights: bool,
        asked: bool | None,
    ) -> PlannedDraft | None:
        """The draft model of a request, and what it takes on each device. None for none.

        weights, asked: as of ``plan`` and ``_problem``. Raises RequestInvalid, ModelError.
        """
        if request.draft is None:
            return None
        if asked:
            await asyncio.to_thread(check_vocabulary, request, weights=weights)
        open_model = Checkpoint.open if weights else Checkpoint.open_to_plan
        checkpoint = await asyncio.to_thread(open_model, request.draft, None)
        draft = open_draft(request, checkpoint, context_tokens)
        excluded = [
            member.name for member in members if asked is None or member.device in request.exclude
        ]
        timings = await measure_blocks(
            members, checkpoint.spec, (request.draft_bits,), self._report, excluded
        )
        devices = [
            DeviceInput(member.name, member.profile, timings.get(member.name, ()))
            for member in members
        ]
        return replace(draft, places=places_of(draft.given, devices))

    async def _lacking(self, request: LoadRequest, without: Planned) -> str:
        """Say why a draft model does not fit beside the stages of a plan that was made without."""
        members = self._roster.require_members()
        draft = await self._draft(
            request, without.context_tokens, members, weights=False, asked=None
        )
        if draft is None:
            raise ValueError("the request names no draft model")
        device = without.plan.stages[0].device
        lacks = missing_bytes(without.plan, draft.given, draft.places)
        kinds = () if lacks is None else zip(("memory", "storage"), lacks, strict=True)
        short = " and ".join(f"{format_size(size)} of {kind}" for kind, size in kinds if size)
        why = f"{device}, which would run the first stage, " + (
            f"lacks {short}" if short else "cannot run it"
        )
        lacking = (
            f"no device has room for the first stage and the draft model {draft.model} beside it"
        )
        if request.plan is not None:
            lacking = f"{request.plan.source} has no room for the draft model {draft.model}"
        return (
            f"{lacking}: {why}. Name a smaller --draft or fewer --draft-bits, or load without one"
        )

    def opened(
        self, open_model: Callable[[Path, str | None], Checkpoint], request: LoadRequest
    ) -> Checkpoint:
        """Return the model with the codes that the request's scheme chooses. Raises ModelError."""
        checkpoint = open_model(request.model, request.adapter)
        return self._store.prepared(checkpoint, request.scheme, request.scheme_text)

    async def _solve(
        self, request: LoadRequest, problem: PlanningProblem, *, step: str = "solving"
    ) -> Plan:
        self._report(Step("plan", step, 0, 0, ""))
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

        asked: as of ``plan``. With None nothing is measured.
        """
        spec = checkpoint.spec
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
        errors = await self._weight_errors(request, checkpoint)
        devices = await self._devices(request, checkpoint, members, timings)
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
                experts=losses.experts,
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

    async def _weight_errors(
        self, request: LoadRequest, checkpoint: Checkpoint
    ) -> tuple[dict[int, float], ...]:
        """Measure what each block's weights lose, where the request bounds that."""
        if request.max_weight_error is None:
            return ({},) * checkpoint.spec.block_count
        if not checkpoint.tensors:
            raise RequestInvalid(
                "max_weight_error compares weights, and the model's are not downloaded yet",
                "max_weight_error",
            )
        return await in_thread(
            "weight errors",
            lambda on_step, cancelled: self._store.weight_errors(
                checkpoint, map(request.format, request.bits), on_step, cancelled
            ),
            self._report,
        )

    async def _devices(
        self,
        request: LoadRequest,
        checkpoint: Checkpoint,
        members: Sequence[Member],
        timings: Mapping[str, Sequence[BlockTiming]],
    ) -> list[DeviceInput]:
        """Describe the devices with what other models leave of them.

        Where the objective counts loading, also with what they hold and how fast they load.
        """
        held: Mapping[str, Sequence[Collection[int]]] = {}
        rates: Mapping[str, float] = {}
        if request.objective.migration_weight > 0:
            formats = [request.format(bits) for bits in request.bits]
            artifacts = await asyncio.to_thread(self._store.known, checkpoint, formats)
            held = await find_held(members, artifacts, checkpoint.spec.block_count)
            rates = load_rates(self._roster, members)
        uses = use_of(self._beside(request))
        return [
            DeviceInput(
                one.name,
                uses[one.device].left_of(one.profile) if one.device in uses else one.profile,
                timings.get(one.name, ()),
                held.get(one.name, ()),
                rates.get(one.name, math.inf),
            )
            for one in members
        ]

    async def _kept(
        self,
        request: LoadRequest,
        checkpoint: Checkpoint,
        members: tuple[Member, ...],
        problem: PlanningProblem,
        plan: Plan,
        losses: Losses,
        *,
        asked: bool,
    ) -> tuple[Plan, float | None]:
        """Return a plan that keeps its quality budget by measurement, and its divergence.

        The plan is not measured unless the request says so, or its losses are estimates.
        """
        again: PlanAgain | None = None
        if request.plan is None:
            again = partial(self._solve, request, step="again, with a tighter budget")
        if request.check_quality:
            require_idle(self._models)
            if losses.known is None:
                raise RequestInvalid(
                    "check_quality needs sensitivities that this coordinator has: run "
                    "`shoal calibrate --quality --on auto` first",
                    "check_quality",
                )
            return await self._quality_meter.keep_budget(
                checkpoint, members, problem, plan, losses.known, again, self._report
            )
        if asked and losses.budget is not None and losses.source.kind == "estimated":
            return await self._quality_meter.keep_estimate(
                request, checkpoint, problem, plan, again, self._report
            )
        return plan, None


def require_idle(models: Models) -> None:
    """Raise Busy if a model is loaded."""
    for name, state in models.present():
        if deployment_of(state) is not None:
            raise Busy(
                f"{name} is loaded, and measuring quality needs the whole device: "
                "run `shoal unload` first"
            )


def check_joined(wanted: Iterable[str], members: tuple[Member, ...], names: NameBook) -> None:
    """Raise RequestInvalid if a device of ``wanted``, which are ids, is not a member."""
    here = {member.device for member in members}
    present = f"devices here now: {', '.join(member.name for member in members) or 'none'}"
    for device in wanted:
        if names.device(device) is None:
            raise RequestInvalid(f"no device is called {device!r}; {present}")
        if device not in here:
            raise RequestInvalid(f"{names.name(device)} is not here now; {present}")
