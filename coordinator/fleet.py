"""From a model directory to a running deployment: measure, plan, quantize, load, connect.

One operation at a time. Whatever ends an operation early (an error, a lost agent, the user going
away) leaves no half-loaded stage behind. A deployment that loses a device is placed anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Mapping,
    Sequence,
)
from typing import TypeVar

from coordinator.artifacts import ArtifactStore
from coordinator.config import DEFAULT_RECOVERY_WAIT_S
from coordinator.deployment import (
    Deployment,
    Planned,
    deploy,
    new_outcome,
    outcome_of,
    unload,
)
from coordinator.distillation import Distillation, Losses, QualityFound
from coordinator.errors import (
    AgentLost,
    Busy,
    CoordinatorError,
    NotLoaded,
    RequestInvalid,
)
from coordinator.measurements import (
    Step,
    find_held,
    in_thread,
    load_rates,
    machines,
    measure_again,
    measure_blocks,
    measure_links,
)
from coordinator.members import Member, Roster
from coordinator.plan_request import DEFAULT_CONTEXT_TOKENS, PlanRequest, model_name
from coordinator.planner import solve
from coordinator.problem import PlanningProblem, build_problem
from coordinator.quality import QualityRequest, QualityStore, choose_hops, own_rows
from coordinator.recovery import LoadedFile, joined, recover, remaining
from model.checkpoint import Checkpoint
from model.tokenizer import Tokenizer
from wire import limits
from wire.messages import BlockRef

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class Fleet:
    """Plans and deployments over the members of a roster."""

    def __init__(
        self,
        roster: Roster,
        store: ArtifactStore,
        quality: QualityStore,
        kept: LoadedFile,
        recovery_wait_s: float = DEFAULT_RECOVERY_WAIT_S,
    ) -> None:
        """``recovery_wait_s``: how long answers wait for a device that no other can replace."""
        self._roster = roster
        self._kept = kept
        self._recovery_wait_s = recovery_wait_s
        self._outcome: asyncio.Future[Deployment] | None = None
        """Of ``_recovery``: what it loads, or why nothing."""
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
        if self.deployment is not None:
            return await self.deployment.latest()
        if self._recovery is not None and self._outcome is not None:
            return await outcome_of(self._outcome)
        raise NotLoaded("no model is loaded: run `shoal load MODEL`")

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
            self._kept.keep(request, [member.name for member in self.deployment.members])
            return self.deployment

    async def measure(self, name: str, on_step: Callable[[Step], None]) -> Member:
        """Measure anew what is known of the device ``name``, and its links to those that are free.

        Raises CoordinatorError.
        """
        async with self._exclusive(on_step):
            members = self._roster.require_members()
            _check_names((name,), members)
            (member,) = (member for member in members if member.name == name)
            deployment = self.deployment
            serving = () if deployment is None or deployment.broken else deployment.members
            free: list[Member] = []
            for residents in machines(members):
                if not any(resident in serving for resident in residents):
                    free += residents
            if member not in free and deployment is not None:
                raise Busy(
                    f"{deployment.name} is loaded on {name} or its machine, which measuring needs "
                    "for itself: run `shoal unload` first"
                )
            await measure_again(self._roster, member, free, self._report)
            return member

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
        self._require_free()
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
        deployment.successor = self._outcome = new_outcome()
        self._break(deployment, error)
        self._recovery = asyncio.create_task(self._recover(deployment, error, self._outcome))

    def resume(self) -> None:
        """Load what was loaded when the coordinator was stopped, as soon as its devices join."""
        kept = self._kept.read()
        if kept is not None:
            self._outcome = new_outcome()
            self._recovery = asyncio.create_task(self._resume(*kept, self._outcome))

    def close(self) -> None:
        """Break what is loaded, because the coordinator stops."""
        stopped = NotLoaded("the coordinator was stopped")
        if self.deployment is not None:
            self._break(self.deployment, stopped)
        self._give_up(stopped)

    # ---- steps ----------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _exclusive(self, on_step: Callable[[Step], None]) -> AsyncIterator[None]:
        self._require_free()
        if self._placing:
            on_step(Step("wait", "a lost device is being replaced", 0, 0, ""))
        async with self._lock:
            self.on_step = on_step
            try:
                yield
            finally:
                self.on_step = None

    def _require_free(self) -> None:
        """Raise Busy while an operation of a user's is under way."""
        if self._lock.locked() and not self._placing:
            raise Busy("another plan, load or unload is under way: wait for it, or stop it")

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
        self, planned: Planned, tokenizer: Tokenizer, refs: Sequence[BlockRef]
    ) -> Deployment:
        epoch = next(self._epochs)
        return await deploy(planned, tokenizer, refs, self._roster.members, epoch, self._report)

    # ---- without being asked --------------------------------------------------------------------

    async def _recover(
        self, broken: Deployment, lost: AgentLost, successor: asyncio.Future[Deployment]
    ) -> None:
        """Replace ``broken``, as soon as the members allow."""

        async def place() -> Deployment:
            await unload(broken.members)
            return await self._place(broken.request, broken.tokenizer)

        def explain(error: Exception) -> CoordinatorError:
            broken.broken = AgentLost(lost.name, lost.cause, str(error))
            return broken.broken

        log.warning("placing %s on the devices that are left", broken.name)
        await self._until_placed(place, explain, successor, self._recovery_wait_s)

    async def _resume(
        self, request: PlanRequest, names: Collection[str], outcome: asyncio.Future[Deployment]
    ) -> None:
        """Load what was loaded once its devices have joined, or without those that do not come."""
        name = model_name(request.model)
        log.warning("%s was loaded: waiting for %s", name, ", ".join(names))
        await joined(self._roster, names, self._recovery_wait_s)

        async def place() -> Deployment:
            return await self._place(
                request, await asyncio.to_thread(Tokenizer.load, request.model)
            )

        def explain(error: Exception) -> CoordinatorError:
            return NotLoaded(f"{name} cannot be loaded again yet: {error}")

        await self._until_placed(place, explain, outcome, 0)

    async def _until_placed(
        self,
        place: Callable[[], Awaitable[Deployment]],
        explain: Callable[[Exception], CoordinatorError],
        outcome: asyncio.Future[Deployment],
        wait_s: float,
    ) -> None:
        async def alone() -> Deployment:
            async with self._lock:
                self._placing = True
                try:
                    self.deployment = await place()
                finally:
                    self._placing = False
                return self.deployment

        try:
            placed = await recover(alone, explain, self._roster.changed, outcome, wait_s)
        finally:
            if not outcome.done():  # Whatever went wrong, nobody must wait for ever.
                outcome.set_exception(NotLoaded("no model is loaded: run `shoal load MODEL`"))
        names = ", ".join(member.name for member in placed.members)
        log.warning("%s is loaded again, on %s", placed.name, names)

    async def _place(self, request: PlanRequest, tokenizer: Tokenizer) -> Deployment:
        """What is left of ``request``, on who is left."""
        names = [member.name for member in self._roster.members]
        planned = await self._plan(remaining(request, names))
        refs = await self._quantize(planned)
        deployment = await self._deploy(planned, tokenizer, refs)
        # What was asked for, and not what is left of it, counts next time.
        deployment.request = request
        return deployment

    def _give_up(self, why: CoordinatorError) -> asyncio.Task[None] | None:
        """End what happens without being asked; whoever waits gets ``why``. The task that ends."""
        task, self._recovery = self._recovery, None
        if task is None or task.done():
            return None
        task.cancel()
        if self._outcome is not None and not self._outcome.done():
            self._outcome.set_exception(why)
        return task

    async def _unload(self) -> None:
        unloaded = NotLoaded("the model was unloaded")
        self._give_up(unloaded)
        self._kept.forget()
        deployment, self.deployment = self.deployment, None
        if deployment is not None:
            self._break(deployment, unloaded)
            await asyncio.shield(unload(deployment.members))

    def _break(self, deployment: Deployment, error: CoordinatorError) -> None:
        if deployment.broken is None:
            deployment.broken = error
            self.on_broken(deployment, error)

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
