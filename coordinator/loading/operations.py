"""From a model directory to a running deployment: measure, plan, quantize, load, connect.

One operation at a time. Whatever ends an operation early (an error, a lost agent, the user going
away) leaves no half-loaded stage behind. A deployment that loses a device is placed anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import secrets
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Mapping,
    Sequence,
)
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from coordinator.config import DEFAULT_RECOVERY_WAIT_S
from coordinator.errors import (
    AgentDamaged,
    AgentLost,
    Busy,
    CoordinatorError,
    LinkFailed,
    NotLoaded,
)
from coordinator.files.artifacts import ArtifactStore
from coordinator.loading.deployment import (
    Deployment,
    Planned,
    deploy,
    new_outcome,
    outcome_of,
    unload,
)
from coordinator.loading.recovery import LoadedFile, joined, recover, remaining
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
from model.tokenizer import Tokenizer
from planning.build import DeviceInput, RequestInput, build_problem
from planning.errors import RequestInvalid
from planning.plan import InfeasiblePlan, Plan, PlanError
from planning.planner import solve
from planning.problem import PlanningProblem
from planning.request import DEFAULT_CONTEXT_TOKENS, LoadRequest, model_name
from planning.sensitivity import choose_hops
from wire.messages import BlockRef, StageLoaded

log = logging.getLogger(__name__)

Result = TypeVar("Result")

PLACEMENTS = 6
"""Plans that are made for one load at most, where links fail while each is put in force."""

WATCH_S = 5.0
"""Between two looks at whether a failed link is worth another try."""


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
        self._placing = ""
        """What holds the lock where that is not a user's operation, in words."""
        self._doubts: dict[Member, asyncio.Task[None]] = {}
        """What finds out what became of the hop that a member has lost."""
        self._store = store
        self._quality_meter = QualityMeter(store, quality)
        self._damaged_epochs: set[int] = set()
        """Of what was being loaded when a stage of it was found damaged."""
        self._found_damage = False
        """Whether files of stages were found damaged since the newest deployment broke."""
        self._lock = asyncio.Lock()
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

    async def plan(self, request: LoadRequest, on_step: Callable[[Step], None]) -> Planned:
        """Measure what is missing, and plan. Raises CoordinatorError, ModelError, PlanError."""
        async with self._exclusive(on_step):
            return await self._plan(self._identified(request), asked=True)

    async def load(self, request: LoadRequest, on_step: Callable[[Step], None]) -> Deployment:
        """Plan, then replace what is loaded. Raises CoordinatorError, ModelError, PlanError."""
        async with self._exclusive(on_step):
            tokenizer = await asyncio.to_thread(_tokenizer, request.model)
            request = self._identified(request)
            for doubt in await asyncio.to_thread(_doubts, tokenizer, request.model):
                log.warning("%s", doubt)
            self.deployment = await self._put(request, tokenizer, asked=True)
            ids = {member.name: member.device for member in self.deployment.members}
            self._kept.keep(request, list(ids), ids)
            return self.deployment

    async def measure(self, name: str, on_step: Callable[[Step], None]) -> Member:
        """Measure anew what is known of the device ``name``, and its links to those that are free.

        Raises CoordinatorError.
        """
        async with self._exclusive(on_step):
            members = self._roster.require_members()
            device = self._roster.names.device(name) or name
            _check_joined((device,), members, self._roster.names)
            (member,) = (member for member in members if member.device == device)
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
            if request.on is not None:
                device = self._roster.names.device(request.on) or request.on
                _check_joined((device,), members, self._roster.names)
                members = tuple(member for member in members if member.device == device)
            return await self._quality_meter.calibrate(request, members, everybody, self._report)

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
        if self.deployment is not None and member in self.deployment.members:
            self.place_again(self.deployment, error)

    def lose_hop(self, deployment: Deployment, source: Member, target: Member, reason: str) -> None:
        """Find out whether a hop's device or its link was lost, and place ``deployment`` anew."""

        async def find_out() -> None:
            # A target that is lost, the roster tells by ``lose``.
            if await target.lives() and source.lost is None:
                self._roster.fail_link(source, target, reason, used=True)
                self.place_again(deployment, LinkFailed(source.name, target.name, reason))

        if source not in self._doubts:
            task = self._doubts[source] = asyncio.create_task(find_out())
            task.add_done_callback(lambda _: self._doubts.pop(source))

    def place_again(self, deployment: Deployment, error: CoordinatorError) -> None:
        """Break ``deployment``, unless it is broken or replaced already, and place it anew."""
        if deployment is not self.deployment or deployment.broken:
            return
        deployment.successor = self._outcome = new_outcome()
        self._found_damage = False
        self._break(deployment, error)
        self._recovery = asyncio.create_task(self._recover(deployment, error, self._outcome))

    async def watch_links(self) -> None:
        """Try links that failed again, one at a time while nothing else is done; for ever."""
        while True:
            await asyncio.sleep(WATCH_S)
            due = self._roster.links_to_retry()
            if due and not self._lock.locked() and not self._is_answering():
                with contextlib.suppress(CoordinatorError):
                    async with self._unasked("a link that had failed is tried again"):
                        await try_links(self._roster, due[:1], self._report)

    def stop_damaged(self, member: Member, epoch: int, reason: str) -> None:
        """Place anew what ``member`` found to run from a damaged file; its answers are suspect."""
        error = AgentDamaged(member.name, reason)
        deployment = self.deployment
        if deployment is not None and deployment.epoch == epoch and member in deployment.members:
            deployment.is_suspect = True
            if not deployment.broken:
                self.place_again(deployment, error)  # Which says why.
                return
        else:
            self._found_damage = True
            if self._lock.locked():  # It may be about what is still being loaded.
                self._damaged_epochs.add(epoch)
        log.warning("%s", error)

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
            on_step(Step("wait", self._placing, 0, 0, ""))
        async with self._lock:
            self.on_step = on_step
            try:
                yield
            finally:
                self.on_step = None

    @contextlib.asynccontextmanager
    async def _unasked(self, what: str) -> AsyncIterator[None]:
        """Hold the lock for what no user has asked for; users wait for it, and are told what."""
        async with self._lock:
            self._placing = what
            try:
                yield
            finally:
                self._placing = ""

    def _is_answering(self) -> bool:
        slots = None if self.deployment is None else self.deployment.slots
        return slots is not None and slots.used + slots.waiting > 0

    def _require_free(self) -> None:
        """Raise Busy while an operation of a user's is under way."""
        if self._lock.locked() and not self._placing:
            raise Busy(
                "another plan, load, unload or measurement is under way: wait for it, or stop it"
            )

    async def _put(self, request: LoadRequest, tokenizer: Tokenizer, *, asked: bool) -> Deployment:
        """Plan and deploy. A link that fails meanwhile is planned around.

        ``asked``: by a user, in place of what is loaded.
        """
        for attempt in itertools.count(1):
            planned = await self._plan(request, asked=asked)
            refs = await self._quantize(planned)
            if asked:
                await self._unload()
            members = self._roster.members
            try:
                return await self._deploy(planned, tokenizer, refs, members)
            except LinkFailed as error:
                by_name = {member.name: member for member in members}
                ends = by_name[error.source], by_name[error.target]
                self._roster.fail_link(*ends, error.reason, used=True)
                if attempt == PLACEMENTS:
                    raise
        raise AssertionError("counting ended")

    async def _plan(self, request: LoadRequest, *, asked: bool) -> Planned:
        """``asked``: a user waits for the best plan, so that more links are tried again."""
        checkpoint = await asyncio.to_thread(Checkpoint.open, request.model)
        members = self._roster.require_members()
        names = self._roster.names
        absent = [device for device in request.exclude if names.device(device) is None]
        _check_joined((*absent, *request.pins.values()), members, names)
        losses = self._quality_meter.losses(checkpoint, request)
        context_tokens = min(
            request.context_tokens or DEFAULT_CONTEXT_TOKENS, checkpoint.spec.max_context
        )
        failed_before_s = time.monotonic()
        make = partial(self._problem, request, checkpoint, members, context_tokens, losses)
        problem = await make(asked=asked)
        try:
            plan = await self._solve(request, problem)
        except PlanError as error:
            if not await self._links_back(error, failed_before_s):
                raise
            problem = await make(asked=False)
            plan = await self._solve(request, problem)
        measured_kl = None
        if request.check_quality:
            self._require_idle()
            if losses.known is None:
                raise RequestInvalid(
                    "check_quality needs what this coordinator measured: run "
                    "`shoal calibrate --quality --on auto` first",
                    "check_quality",
                )
            plan, measured_kl = await self._quality_meter.keep_budget(
                request, checkpoint, members, problem, plan, losses.known, self._report
            )
        return Planned(
            request,
            checkpoint,
            context_tokens,
            problem,
            plan,
            losses.margin,
            measured_kl,
            {member.name: member.device for member in members},
        )

    async def _solve(self, request: LoadRequest, problem: PlanningProblem) -> Plan:
        self._step("plan", "solving", 0, 0, "")
        if request.plan is not None:
            return request.plan.renamed(self._roster.names.name).to_plan(problem)
        return await asyncio.to_thread(solve, problem, time_limit_s=request.time_limit_s)

    async def _links_back(self, error: PlanError, failed_before_s: float) -> bool:
        """Whether links that may have been missing in a plan, and were not tried for it, work.

        Those that the planner says would be enough; all that failed where it does not know.
        """
        pairs = self._roster.links_to_retry(failed_before_s)
        if isinstance(error, InfeasiblePlan):
            wanted = error.advice.missing_links
            pairs = [pair for pair in pairs if (pair[0].name, pair[1].name) in wanted]
        return await try_links(self._roster, pairs, self._report)

    def _identified(self, request: LoadRequest) -> LoadRequest:
        """``request`` with ids in place of names. Raises RequestInvalid for a plan of strangers."""
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
        if self.deployment is not None:
            raise Busy(
                f"{self.deployment.name} is loaded, and measuring quality needs the device for "
                "itself: run `shoal unload` first"
            )

    async def _problem(
        self,
        request: LoadRequest,
        checkpoint: Checkpoint,
        members: tuple[Member, ...],
        context_tokens: int,
        losses: Losses,
        *,
        asked: bool,
    ) -> PlanningProblem:
        """The problem as measured; what is not known yet is measured."""
        spec = checkpoint.spec
        names = {member.device: member.name for member in members}
        excluded = [member.name for member in members if member.device in request.exclude]
        timings = await measure_blocks(members, spec, request.bits, self._report, excluded)
        measured = [member for member in members if member.name not in excluded]
        await measure_links(self._roster, measured, self._report, asked=asked)
        errors: tuple[dict[int, float], ...] = ({},) * spec.block_count
        if request.max_weight_error is not None:
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
            artifacts = self._store.known(checkpoint, map(request.format, request.bits))
            held = await find_held(members, artifacts, spec.block_count)
            rates = load_rates(self._roster, members)
        devices = [
            DeviceInput(
                member.name,
                member.profile,
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
                weight_errors=errors,
                max_weight_error=request.max_weight_error,
                sensitivities=losses.blocks,
                own_sensitivities=losses.own,
                quality_budget=request.quality_budget,
                objective=request.objective,
                pins={block: names[device] for block, device in request.pins.items()},
                excluded=excluded,
                hop_formats=choose_hops(request.hop_bits, losses.hops, request.quality_budget),
            )
            no_links = [link for link, _ in self._roster.failed_links()]
            return build_problem(wanted, devices, self._roster.links(), no_links)
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
        self,
        planned: Planned,
        tokenizer: Tokenizer,
        refs: Sequence[BlockRef],
        members: Sequence[Member],
    ) -> Deployment:
        self._damaged_epochs.clear()
        while True:  # A device loads no damaged file twice: it fetches or makes it again.
            epoch = secrets.randbits(62)  # Nobody else can name it, and no restart repeats it.
            deployment = await deploy(
                planned, tokenizer, refs, members, epoch, self._report, self._on_loaded
            )
            if epoch not in self._damaged_epochs:
                return deployment
            await asyncio.shield(unload(deployment.members))

    def _on_loaded(self, member: Member, loaded: StageLoaded) -> None:
        if loaded.damaged_files:
            self._found_damage = True
            log.warning(
                "%s: %d damaged files were fetched or made again", member.name, loaded.damaged_files
            )

    # ---- without being asked --------------------------------------------------------------------

    async def _recover(
        self, broken: Deployment, why: CoordinatorError, successor: asyncio.Future[Deployment]
    ) -> None:
        """Replace ``broken``, as soon as the members allow."""

        async def place() -> Deployment:
            await unload(broken.members)
            placed = await self._place(broken.request, broken.tokenizer)
            if self._found_damage:  # Maybe in an attempt that failed.
                broken.is_suspect = True
            return placed

        def explain(error: Exception) -> CoordinatorError:
            broken.broken = why.unplaced(str(error))
            return broken.broken

        # Of a device that is lost, the roster has told why.
        cause = f"without {why.name}" if isinstance(why, AgentLost) else why
        log.warning("placing %s anew: %s", broken.name, cause)
        await self._until_placed(place, explain, successor, self._recovery_wait_s)

    async def _resume(
        self, request: LoadRequest, devices: Collection[str], outcome: asyncio.Future[Deployment]
    ) -> None:
        """Load what was loaded once its devices have joined, or without those that do not come."""
        name = model_name(request.model)
        names = self._roster.names
        log.warning("%s was loaded: waiting for %s", name, ", ".join(map(names.name, devices)))
        await joined(self._roster, devices, self._recovery_wait_s)

        async def place() -> Deployment:
            # What was kept before devices had ids says names.
            return await self._place(
                request.identified(names.device),
                await asyncio.to_thread(_tokenizer, request.model),
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
            async with self._unasked("a lost device or link is being replaced"):
                self.deployment = await place()
                return self.deployment

        try:
            placed = await recover(alone, explain, self._roster.changed, outcome, wait_s)
        finally:
            if not outcome.done():  # Whatever went wrong, nobody must wait for ever.
                outcome.set_exception(NotLoaded("no model is loaded: run `shoal load MODEL`"))
        names = ", ".join(member.name for member in placed.members)
        log.warning("%s is loaded again, on %s", placed.name, names)

    async def _place(self, request: LoadRequest, tokenizer: Tokenizer) -> Deployment:
        """What is left of ``request``, on who is left."""
        left = remaining(request, [member.device for member in self._roster.members])
        try:
            deployment = await self._put(left, tokenizer, asked=False)
        except (PlanError, LinkFailed):
            if left.plan is None:
                raise
            # Its devices are there, and a link between them is not.
            deployment = await self._put(replace(left, plan=None), tokenizer, asked=False)
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


def _tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a model's folder. Raises ModelError, for a folder that is none first."""
    require_model(directory)
    return Tokenizer.load(directory)


def _doubts(tokenizer: Tokenizer, model: Path) -> list[str]:
    return list(tokenizer.doubts(load_spec(model).vocab))


def _check_joined(wanted: Iterable[str], members: tuple[Member, ...], names: NameBook) -> None:
    """Raise RequestInvalid for a wish about a device (its id) that is not a member."""
    here = {member.device for member in members}
    joined_now = ", ".join(member.name for member in members)
    for device in wanted:
        if names.device(device) is None:
            raise RequestInvalid(f"no device is called {device!r}: {joined_now} have joined")
        if device not in here:
            raise RequestInvalid(f"{names.name(device)} is not here now: {joined_now} have joined")
