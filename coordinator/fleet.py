"""From a model directory to a running deployment: measure, plan, quantize, load, connect.

One operation at a time. Whatever ends an operation early (an error, a lost agent, the user going
away) leaves no half-loaded stage behind. A deployment that loses a device is placed anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from coordinator.artifacts import ArtifactStore
from coordinator.config import DEFAULT_RECOVERY_WAIT_S
from coordinator.distillation import Distillation, Losses, QualityFound
from coordinator.errors import (
    AgentFailed,
    AgentLost,
    Busy,
    CoordinatorError,
    NotLoaded,
    RequestInvalid,
)
from coordinator.measurements import (
    Step,
    find_held,
    forward,
    in_thread,
    load_rates,
    measure_blocks,
    measure_links,
    together,
)
from coordinator.members import Member, Roster
from coordinator.plan import Plan, Stage
from coordinator.plan_request import DEFAULT_CONTEXT_TOKENS, PlanRequest, model_name
from coordinator.planner import solve
from coordinator.problem import PlanningProblem, build_problem
from coordinator.quality import QualityRequest, QualityStore, choose_hops, own_rows
from coordinator.recovery import recover, remaining
from coordinator.slots import Slots
from model.checkpoint import Checkpoint
from model.spec import ModelSpec
from model.tokenizer import Tokenizer
from wire import limits
from wire.activations import DEFAULT_HOP_BITS, HOP_BITS, HopBits
from wire.messages import (
    BlockRef,
    ConnectStage,
    Done,
    LoadStage,
    StageLoaded,
    UnloadStage,
)

log = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, eq=False)
class Planned:
    """A plan with what it was made for and from.

    ``quality_margin`` is part of the problem's sensitivities; None where there are none.
    ``measured_kl`` is the plan's divergence where it was asked for.
    """

    request: PlanRequest
    checkpoint: Checkpoint
    context_tokens: int
    problem: PlanningProblem
    plan: Plan
    quality_margin: float | None
    measured_kl: float | None


@dataclass(slots=True, eq=False)
class Deployment:
    """A plan in force. ``broken`` says why it no longer is."""

    request: PlanRequest
    spec: ModelSpec
    tokenizer: Tokenizer
    plan: Plan
    epoch: int
    slots: Slots
    context_tokens: int
    members: tuple[Member, ...]
    loaded: tuple[StageLoaded, ...]
    broken: CoordinatorError | None = None
    successor: asyncio.Future[Deployment] | None = None
    """Once a device was lost: what takes this deployment's place, or why nothing does."""

    @property
    def name(self) -> str:
        return model_name(self.request.model)

    @property
    def is_recovering(self) -> bool:
        return self.successor is not None and not self.successor.done()

    async def latest(self) -> Deployment:
        """This deployment or, after devices were lost, the one that took its place; waits for that.

        Raises what broke it for good.
        """
        deployment = self
        while deployment.successor is not None:
            await asyncio.wait([deployment.successor])
            error = deployment.successor.exception()
            if error is not None:
                raise error.with_traceback(None)
            deployment = deployment.successor.result()
        deployment.require()
        return deployment

    def require(self) -> None:
        """Raise why the deployment is broken, if it is."""
        if self.broken is not None:
            # Raised again and again: its traceback would keep the frames of every time.
            raise self.broken.with_traceback(None)


class Fleet:
    """Plans and deployments over the members of a roster."""

    def __init__(
        self,
        roster: Roster,
        store: ArtifactStore,
        quality: QualityStore,
        recovery_wait_s: float = DEFAULT_RECOVERY_WAIT_S,
    ) -> None:
        """``recovery_wait_s``: how long answers wait for a device that no other can replace."""
        self._roster = roster
        self._recovery_wait_s = recovery_wait_s
        self._recovery: asyncio.Task[None] | None = None
        self._placing = False
        """Whether what holds the lock is not a user's, but places a broken deployment anew."""
        self._store = store
        self._distillation = Distillation(store, quality)
        self._lock = asyncio.Lock()
        self._epochs = itertools.count(1)
        self.deployment: Deployment | None = None
        self.on_step: Callable[[Step], None] | None = None
        self.on_broken: Callable[[Deployment, CoordinatorError], None] = lambda *_: None
        """Told when a deployment can run nothing any more, and why."""

    async def require_deployment(self) -> Deployment:
        """The deployment in force, once it is. Raises NotLoaded, or what broke it."""
        if self.deployment is None:
            raise NotLoaded("no model is loaded: run `shoal load MODEL`")
        return await self.deployment.latest()

    async def plan(self, request: PlanRequest, on_step: Callable[[Step], None]) -> Planned:
        """Measure what is missing, and plan. Raises CoordinatorError, ModelError, PlanError."""
        async with self._exclusive(on_step):
            return await self._plan(request)

    async def load(self, request: PlanRequest, on_step: Callable[[Step], None]) -> Deployment:
        """Plan, then replace what is loaded. Raises CoordinatorError, ModelError, PlanError."""
        async with self._exclusive(on_step):
            tokenizer = await asyncio.to_thread(Tokenizer.load, request.model)
            planned = await self._plan(request)
            refs = await self._quantize(planned)
            await self._unload()
            self.deployment = await self._deploy(planned, tokenizer, refs)
            return self.deployment

    async def calibrate(
        self, request: QualityRequest, on_step: Callable[[Step], None]
    ) -> QualityFound:
        """Measure what fewer bits do, on the fastest agent or the one asked for.

        What an earlier run measured is not measured again. Raises CoordinatorError, ModelError.
        """
        async with self._exclusive(on_step):
            self._require_idle()
            everybody = members = self._roster.require_members()
            _check_names((request.on,) if request.on else (), members)
            if request.on is not None:
                members = tuple(member for member in members if member.name == request.on)
            return await self._distillation.calibrate(request, members, everybody, self._report)

    async def unload(self) -> str | None:
        """Stop what is loaded; its name, or None if nothing was."""
        recovery = self._give_up(NotLoaded("the model was unloaded"))
        if recovery is not None:
            await asyncio.wait([recovery])
        async with self._exclusive(lambda step: None):
            name = self.deployment.name if self.deployment else None
            await self._unload()
            return name

    def lose(self, member: Member, error: AgentLost) -> None:
        """Break the deployment if ``member`` is part of it, and place it anew."""
        deployment = self.deployment
        if deployment is None or deployment.broken or member not in deployment.members:
            return
        successor = deployment.successor = asyncio.get_running_loop().create_future()
        # Whoever waits is told; if nobody does, nobody need be.
        successor.add_done_callback(lambda future: future.cancelled() or future.exception())
        self._break(deployment, error)
        self._recovery = asyncio.create_task(self._recover(deployment, error, successor))

    def close(self) -> None:
        """Break what is loaded, because the coordinator stops."""
        stopped = NotLoaded("the coordinator was stopped")
        if self.deployment is not None:
            self._break(self.deployment, stopped)
        self._give_up(stopped)

    # ---- steps ----------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _exclusive(self, on_step: Callable[[Step], None]) -> AsyncIterator[None]:
        if self._lock.locked():
            if not self._placing:
                raise Busy("another plan, load or unload is under way: wait for it, or stop it")
            on_step(Step("wait", "a lost device is being replaced", 0, 0, ""))
        async with self._lock:
            self.on_step = on_step
            try:
                yield
            finally:
                self.on_step = None

    async def _plan(self, request: PlanRequest) -> Planned:
        checkpoint = await asyncio.to_thread(Checkpoint.open, request.model)
        members = self._roster.require_members()
        _check_names((*request.exclude, *request.pins.values()), members)
        losses = self._distillation.losses(checkpoint, request)
        context_tokens = min(
            request.context_tokens or DEFAULT_CONTEXT_TOKENS, checkpoint.spec.max_context
        )
        problem = await self._problem(request, checkpoint, members, context_tokens, losses)
        self._step("plan", "solving", 0, 0, "")
        if request.given is not None:
            plan = request.given.to_plan(problem)
        else:
            plan = await asyncio.to_thread(solve, problem, time_limit_s=request.time_limit_s)
        measured_kl = None
        if request.check_quality:
            self._require_idle()
            if losses.known is None:
                raise RequestInvalid(
                    "check_quality needs what this coordinator measured: run "
                    "`shoal calibrate --quality --on auto` first",
                    "check_quality",
                )
            plan, measured_kl = await self._distillation.keep_budget(
                request, checkpoint, members, problem, plan, losses.known, self._report
            )
        return Planned(
            request, checkpoint, context_tokens, problem, plan, losses.margin, measured_kl
        )

    def _require_idle(self) -> None:
        if self.deployment is not None:
            raise Busy(
                f"{self.deployment.name} is loaded, and measuring quality needs the device for "
                "itself: run `shoal unload` first"
            )

    async def _problem(
        self,
        request: PlanRequest,
        checkpoint: Checkpoint,
        members: tuple[Member, ...],
        context_tokens: int,
        losses: Losses,
    ) -> PlanningProblem:
        """The problem as measured; what is not known yet is measured."""
        spec = checkpoint.spec
        timings = await measure_blocks(members, spec, request.bits, self._report, request.exclude)
        measured = [member for member in members if member.name not in request.exclude]
        await measure_links(self._roster, measured, self._report)
        errors: tuple[dict[int, float], ...] = ({},) * spec.block_count
        if request.max_weight_error is not None:
            errors = await in_thread(
                "weight errors",
                lambda on_step, cancelled: self._store.weight_errors(
                    checkpoint, map(request.format, request.bits), on_step, cancelled
                ),
                self._report,
            )
        held: Mapping[str, Sequence[Collection[int]]] | None = None
        rates: Mapping[str, float] | None = None
        if request.objective.migration_weight > 0:
            artifacts = self._store.known(checkpoint, map(request.format, request.bits))
            held = await find_held(members, artifacts, spec.block_count)
            rates = load_rates(self._roster, members)
        try:
            return build_problem(
                spec,
                {member.name: member.profile for member in members},
                timings,
                self._roster.links(),
                weight_errors=errors,
                max_weight_error=request.max_weight_error,
                call_s={member.name: member.profile.call_s for member in members},
                bits=request.bits,
                formats={bits: request.format(bits) for bits in request.bits},
                slots=request.slots,
                context_tokens=context_tokens,
                chunk_tokens=limits.PREFILL_CHUNK_TOKENS,
                sensitivities=losses.blocks,
                own_sensitivities=own_rows(
                    {member.name: member.profile.arithmetic for member in members},
                    losses.blocks,
                    losses.own,
                ),
                quality_budget=request.quality_budget,
                objective=request.objective,
                pins=request.pins,
                excluded=request.exclude,
                hop_formats=choose_hops(request.hop_bits, losses.hops, request.quality_budget),
                held=held,
                load_bytes_per_s=rates,
                watts={
                    member.name: member.profile.watts
                    for member in members
                    if member.profile.watts is not None
                },
            )
        except ValueError as error:
            raise RequestInvalid(str(error)) from error

    # ---- deploying ------------------------------------------------------------------------------

    async def _quantize(self, planned: Planned) -> tuple[BlockRef, ...]:
        wanted = [
            (placement.block, planned.request.format(placement.bits))
            for placement in planned.plan.placements
        ]
        return await in_thread(
            "quantize",
            lambda on_step, cancelled: self._store.quantize(
                planned.checkpoint, wanted, on_step, cancelled
            ),
            self._report,
        )

    async def _deploy(
        self, planned: Planned, tokenizer: Tokenizer, refs: tuple[BlockRef, ...]
    ) -> Deployment:
        by_name = {member.name: member for member in self._roster.members}
        stages = planned.plan.stages
        for stage in stages:
            if stage.device not in by_name:
                raise AgentLost(stage.device, "it left while the plan was made")
        members = tuple(by_name[stage.device] for stage in stages)
        epoch = next(self._epochs)
        spec = planned.checkpoint.spec
        try:
            loaded = await together(
                member.request(
                    partial(
                        LoadStage,
                        epoch=epoch,
                        spec=spec.to_dict(),
                        blocks=refs[stage.first : stage.last],
                        slots=planned.request.slots,
                        context_tokens=planned.context_tokens,
                        first=members[0].device,
                        hop_bits=_hop_bits(stage),
                    ),
                    StageLoaded,
                    forward(self._report, "load", member.name),
                )
                for member, stage in zip(members, stages, strict=True)
            )
            if len(members) > 1:
                for member, after in zip(members, members[1:] + members[:1], strict=True):
                    await member.request(
                        partial(
                            ConnectStage,
                            epoch=epoch,
                            device=after.device,
                            endpoints=after.endpoints,
                        ),
                        Done,
                    )
            for member in members:  # One that had answered may be gone before all have.
                if member.lost is not None:
                    raise member.lost.with_traceback(None)
        except BaseException:
            await asyncio.shield(self._unload_members(members))
            raise
        return Deployment(
            request=planned.request,
            spec=spec,
            tokenizer=tokenizer,
            plan=planned.plan,
            epoch=epoch,
            slots=Slots(planned.request.slots),
            context_tokens=planned.context_tokens,
            members=members,
            loaded=loaded,
        )

    # ---- lost devices ---------------------------------------------------------------------------

    async def _recover(
        self, broken: Deployment, lost: AgentLost, successor: asyncio.Future[Deployment]
    ) -> None:
        """Replace ``broken``, as soon as the members allow."""

        async def place() -> Deployment:
            async with self._lock:
                self._placing = True
                try:
                    self.deployment = await self._place_anew(broken)
                finally:
                    self._placing = False
                return self.deployment

        def failed(error: AgentLost) -> None:
            broken.broken = error

        log.warning("placing %s on the devices that are left", broken.name)
        try:
            placed = await recover(
                lost, place, failed, self._roster.changed, successor, self._recovery_wait_s
            )
        finally:
            if not successor.done():  # Whatever went wrong, nobody must wait for ever.
                successor.set_exception(lost)
        names = ", ".join(member.name for member in placed.members)
        log.warning("%s is loaded again, on %s", placed.name, names)

    async def _place_anew(self, broken: Deployment) -> Deployment:
        await self._unload_members(broken.members)
        names = [member.name for member in self._roster.members]
        planned = await self._plan(remaining(broken.request, names))
        refs = await self._quantize(planned)
        deployment = await self._deploy(planned, broken.tokenizer, refs)
        # What was asked for, and not what is left of it, counts next time.
        deployment.request = broken.request
        return deployment

    def _give_up(self, why: CoordinatorError) -> asyncio.Task[None] | None:
        """Stop placing a deployment anew; whoever waits for it gets ``why``. The task that ends."""
        task, self._recovery = self._recovery, None
        if task is None or task.done():
            return None
        task.cancel()
        successor = self.deployment.successor if self.deployment is not None else None
        if successor is not None and not successor.done():
            successor.set_exception(why)
        return task

    async def _unload(self) -> None:
        unloaded = NotLoaded("the model was unloaded")
        self._give_up(unloaded)
        deployment, self.deployment = self.deployment, None
        if deployment is not None:
            self._break(deployment, unloaded)
            await asyncio.shield(self._unload_members(deployment.members))

    def _break(self, deployment: Deployment, error: CoordinatorError) -> None:
        if deployment.broken is None:
            deployment.broken = error
            self.on_broken(deployment, error)

    async def _unload_members(self, members: tuple[Member, ...]) -> None:
        async def unload(member: Member) -> None:
            with contextlib.suppress(AgentFailed):
                await member.request(UnloadStage, Done)

        await asyncio.gather(*(unload(member) for member in members))

    # ---- progress and threads -------------------------------------------------------------------

    def _step(self, phase: str, label: str, done: int, total: int, unit: str) -> None:
        self._report(Step(phase, label, done, total, unit))

    def _report(self, step: Step) -> None:
        if self.on_step is not None:
            self.on_step(step)


def _check_names(wanted: Iterable[str], members: tuple[Member, ...]) -> None:
    """Raise RequestInvalid for a wish about a device that has not joined."""
    names = [member.name for member in members]
    for name in wanted:
        if name not in names:
            raise RequestInvalid(f"no device is called {name!r}: {', '.join(names)} have joined")


def _hop_bits(stage: Stage) -> HopBits:
    """Of the hidden values that a stage sends; the last one's token has none."""
    return next((bits for bits in HOP_BITS if bits == stage.hop_bits), DEFAULT_HOP_BITS)
