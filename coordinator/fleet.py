"""From a model directory to a running deployment: measure, plan, quantize, load, connect.

One operation at a time. Whatever ends an operation early (an error, a lost agent, the user going
away) leaves no half-loaded stage behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_args

from coordinator.artifacts import ArtifactStore
from coordinator.errors import (
    AgentFailed,
    AgentLost,
    Busy,
    CoordinatorError,
    NotLoaded,
    RequestInvalid,
)
from coordinator.members import Member, OnProgress, Roster
from coordinator.plan import Plan
from coordinator.planner import solve
from coordinator.problem import Objective, ObjectiveKind, build_problem
from model.checkpoint import Checkpoint
from model.quantize import BITS, DEFAULT_GROUP_SIZE, Format, Scheme
from model.spec import ModelSpec
from model.tokenizer import Tokenizer
from wire import limits
from wire.messages import (
    BlockRef,
    ConnectStage,
    Done,
    LinkMeasured,
    LoadStage,
    MeasureLink,
    MeasureModel,
    ModelMeasured,
    Progress,
    StageLoaded,
    UnloadStage,
)
from wire.profile import BlockTiming

log = logging.getLogger(__name__)

DEFAULT_BITS = (4, 8, 16)
DEFAULT_MAX_WEIGHT_ERROR = 1e-3
"""Default bound on max|w - w_b| / 2^b: at this value the paper's model lost nothing measurable
(Source: DILEMMA, Table 1)."""
DEFAULT_CONTEXT_TOKENS = 2048
DEFAULT_TIME_LIMIT_S = 20.0

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What a user asks to be planned. ``max_weight_error`` None means no bound."""

    model: Path
    bits: tuple[int, ...] = DEFAULT_BITS
    scheme: Scheme = "rtn"
    group_size: int = DEFAULT_GROUP_SIZE
    max_weight_error: float | None = DEFAULT_MAX_WEIGHT_ERROR
    context_tokens: int | None = None
    time_limit_s: float = DEFAULT_TIME_LIMIT_S
    objective: Objective = field(default_factory=Objective)
    pins: Mapping[int, str] = field(default_factory=dict)
    """Block -> name of the device that it must be on."""
    exclude: tuple[str, ...] = ()
    sensitivities: tuple[Mapping[int, float], ...] | None = None
    """Per block: bits -> what it adds to the KL divergence."""
    quality_budget: float | None = None

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> PlanRequest:
        """Read a user's JSON. Raises RequestInvalid naming the field."""
        plain = dict(values)
        model = plain.pop("model", None)
        if not isinstance(model, str) or not Path(model).is_absolute():
            raise RequestInvalid("model: the absolute path of a model directory", "model")
        bits = plain.pop("bits", list(DEFAULT_BITS))
        if (
            not isinstance(bits, list)
            or not bits
            or any(type(item) is not int or item not in BITS for item in bits)
        ):
            known = ", ".join(map(str, BITS))
            raise RequestInvalid(f"bits: a list out of {known}", "bits")
        scheme = plain.pop("scheme", "rtn")
        group_size = plain.pop("group_size", DEFAULT_GROUP_SIZE)
        try:
            Format.of(4, scheme, group_size)
        except ValueError as error:
            raise RequestInvalid(str(error), "scheme") from error
        error_bound = plain.pop("max_weight_error", DEFAULT_MAX_WEIGHT_ERROR)
        if error_bound is not None and (
            not isinstance(error_bound, (int, float)) or not error_bound >= 0
        ):
            raise RequestInvalid("max_weight_error: a number >= 0, or null", "max_weight_error")
        context = plain.pop("context_tokens", None)
        if context is not None and (type(context) is not int or context < 1):
            raise RequestInvalid("context_tokens: a positive whole number", "context_tokens")
        limit_s = plain.pop("time_limit_s", DEFAULT_TIME_LIMIT_S)
        if not isinstance(limit_s, (int, float)) or not 0 < limit_s <= 3600:
            raise RequestInvalid("time_limit_s: between 0 and 3600", "time_limit_s")
        wishes = _wishes(plain)
        if plain:
            raise RequestInvalid(f"unknown fields: {', '.join(sorted(plain))}")
        return PlanRequest(
            Path(model),
            tuple(sorted(set(bits))),
            scheme,
            group_size,
            None if error_bound is None else float(error_bound),
            context,
            float(limit_s),
            **wishes,
        )

    def format(self, bits: int) -> Format:
        return Format.of(bits, self.scheme, self.group_size)


@dataclass(frozen=True, slots=True)
class Step:
    """How far an operation is, for a progress bar. ``total`` 0: not known."""

    phase: str
    label: str
    done: int
    total: int
    unit: str


@dataclass(frozen=True, slots=True, eq=False)
class Planned:
    """A plan with what it was made for."""

    request: PlanRequest
    checkpoint: Checkpoint
    context_tokens: int
    plan: Plan


@dataclass(slots=True, eq=False)
class Deployment:
    """A plan in force. ``broken`` says why it no longer is."""

    name: str
    model: Path
    spec: ModelSpec
    tokenizer: Tokenizer
    plan: Plan
    epoch: int
    slots: int
    context_tokens: int
    members: tuple[Member, ...]
    loaded: tuple[StageLoaded, ...]
    broken: CoordinatorError | None = None

    def require(self) -> None:
        """Raise why the deployment is broken, if it is."""
        if self.broken is not None:
            # Raised again and again: its traceback would keep the frames of every time.
            raise self.broken.with_traceback(None)


class Fleet:
    """Plans and deployments over the members of a roster."""

    def __init__(self, roster: Roster, store: ArtifactStore) -> None:
        self._roster = roster
        self._store = store
        self._lock = asyncio.Lock()
        self._epochs = itertools.count(1)
        self.deployment: Deployment | None = None
        self.on_step: Callable[[Step], None] | None = None
        self.on_broken: Callable[[Deployment, CoordinatorError], None] = lambda *_: None
        """Told when a deployment can run nothing any more, and why."""

    def require_deployment(self) -> Deployment:
        """The deployment in force. Raises NotLoaded, or what broke it."""
        if self.deployment is None:
            raise NotLoaded("no model is loaded: run `shoal load MODEL`")
        self.deployment.require()
        return self.deployment

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

    async def unload(self) -> str | None:
        """Stop what is loaded; its name, or None if nothing was."""
        async with self._exclusive(lambda step: None):
            name = self.deployment.name if self.deployment else None
            await self._unload()
            return name

    def lose(self, member: Member, error: CoordinatorError) -> None:
        """Break the deployment if ``member`` is part of it."""
        if self.deployment is not None and member in self.deployment.members:
            self._break(self.deployment, error)

    def close(self) -> None:
        """Break what is loaded, because the coordinator stops."""
        if self.deployment is not None:
            self._break(self.deployment, NotLoaded("the coordinator was stopped"))

    # ---- steps ----------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _exclusive(self, on_step: Callable[[Step], None]) -> AsyncIterator[None]:
        if self._lock.locked():
            raise Busy("another plan, load or unload is under way: wait for it, or stop it")
        async with self._lock:
            self.on_step = on_step
            try:
                yield
            finally:
                self.on_step = None

    async def _plan(self, request: PlanRequest) -> Planned:
        checkpoint = await asyncio.to_thread(Checkpoint.open, request.model)
        spec = checkpoint.spec
        context_tokens = min(request.context_tokens or DEFAULT_CONTEXT_TOKENS, spec.max_context)
        members = self._roster.require_members()
        _check_names(request, members)
        timings = await self._measure(members, spec, request.bits)
        await self._measure_links(members)
        errors: tuple[dict[int, float], ...] = ({},) * spec.block_count
        if request.max_weight_error is not None:
            errors = await self._in_thread(
                "weight errors",
                lambda on_step, cancelled: self._store.weight_errors(
                    checkpoint, map(request.format, request.bits), on_step, cancelled
                ),
            )
        self._step("plan", "solving", 0, 0, "")
        try:
            problem = build_problem(
                spec,
                {member.name: member.profile for member in members},
                timings,
                self._roster.links(),
                weight_errors=errors,
                max_weight_error=request.max_weight_error,
                call_s={member.name: member.profile.call_s for member in members},
                bits=request.bits,
                formats={bits: request.format(bits) for bits in request.bits},
                slots=1,
                context_tokens=context_tokens,
                chunk_tokens=limits.PREFILL_CHUNK_TOKENS,
                sensitivities=request.sensitivities,
                quality_budget=request.quality_budget,
                objective=request.objective,
                pins=request.pins,
                excluded=request.exclude,
            )
        except ValueError as error:
            raise RequestInvalid(str(error)) from error
        plan = await asyncio.to_thread(solve, problem, time_limit_s=request.time_limit_s)
        return Planned(request, checkpoint, context_tokens, plan)

    async def _measure(
        self, members: tuple[Member, ...], spec: ModelSpec, bits: tuple[int, ...]
    ) -> dict[str, tuple[BlockTiming, ...]]:
        """Seconds per block on each member; members on one machine take turns."""
        hosts: dict[str, list[Member]] = defaultdict(list)
        for member in members:
            hosts[member.connection.peer_host].append(member)

        async def one_host(residents: list[Member]) -> None:
            for member in residents:
                known = member.timings.setdefault(spec, {})
                usable = dict(member.profile.container_bits)
                missing = tuple(width for width in bits if width in usable and width not in known)
                if not missing:
                    continue
                answer = await member.request(
                    partial(MeasureModel, spec=spec.to_dict(), bits=missing),
                    ModelMeasured,
                    self._forward("measure", member.name),
                )
                if not all(_is_possible(timing) for timing in answer.timings):
                    raise AgentFailed(member.name, "reported an impossible time")
                for width in missing:
                    known[width] = [timing for timing in answer.timings if timing.bits == width]

        await _together(one_host(residents) for residents in hosts.values())
        return {
            member.name: tuple(
                timing for width in bits for timing in member.timings[spec].get(width, ())
            )
            for member in members
        }

    async def _measure_links(self, members: tuple[Member, ...]) -> None:
        """Measure each ordered pair that has not been, one at a time: none disturbs another.

        A pair that cannot connect stays without a link: the plan will not make them neighbours.
        """
        pairs = [
            (source, target)
            for source in members
            for target in members
            if source is not target and self._roster.link(source, target) is None
        ]
        for done, (source, target) in enumerate(pairs):
            self._step("links", f"{source.name} to {target.name}", done, len(pairs), "steps")
            try:
                measured = await source.request(
                    partial(MeasureLink, device=target.device, endpoints=target.endpoints),
                    LinkMeasured,
                )
            except AgentLost:
                raise
            except AgentFailed as error:
                log.warning("no link from %s to %s: %s", source.name, target.name, error.reason)
                continue
            if not (measured.rtt_s > 0 and measured.bytes_per_s > 0):
                raise AgentFailed(source.name, "reported an impossible link")
            self._roster.set_link(source, target, measured)
        if pairs:
            self._step("links", "", len(pairs), len(pairs), "steps")

    async def _quantize(self, planned: Planned) -> tuple[BlockRef, ...]:
        wanted = [
            (placement.block, planned.request.format(placement.bits))
            for placement in planned.plan.placements
        ]
        return await self._in_thread(
            "quantize",
            lambda on_step, cancelled: self._store.quantize(
                planned.checkpoint, wanted, on_step, cancelled
            ),
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
        slots = 1
        try:
            loaded = await _together(
                member.request(
                    partial(
                        LoadStage,
                        epoch=epoch,
                        spec=spec.to_dict(),
                        blocks=refs[stage.first : stage.last],
                        slots=slots,
                        context_tokens=planned.context_tokens,
                        first=members[0].device,
                    ),
                    StageLoaded,
                    self._forward("load", member.name),
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
            name=model_name(planned.request.model),
            model=planned.request.model,
            spec=spec,
            tokenizer=tokenizer,
            plan=planned.plan,
            epoch=epoch,
            slots=slots,
            context_tokens=planned.context_tokens,
            members=members,
            loaded=loaded,
        )

    async def _unload(self) -> None:
        deployment, self.deployment = self.deployment, None
        if deployment is not None:
            self._break(deployment, NotLoaded("the model was unloaded"))
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
        if self.on_step is not None:
            self.on_step(Step(phase, label, done, total, unit))

    def _forward(self, phase: str, name: str) -> OnProgress:
        def on_progress(progress: Progress) -> None:
            self._step(phase, name, progress.done, progress.total, progress.unit)

        return on_progress

    async def _in_thread(
        self,
        phase: str,
        work: Callable[[Callable[[int, int], None], Callable[[], bool]], Result],
    ) -> Result:
        """Run ``work(on_step, cancelled)`` in a thread; cancelling waits for it to notice."""
        loop = asyncio.get_running_loop()
        cancelled = threading.Event()

        def on_step(done: int, total: int) -> None:
            loop.call_soon_threadsafe(self._step, phase, "", done, total, "blocks")

        thread = asyncio.ensure_future(asyncio.to_thread(work, on_step, cancelled.is_set))
        try:
            return await asyncio.shield(thread)
        except asyncio.CancelledError:
            cancelled.set()
            thread.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
            await asyncio.wait({thread})
            raise


def _is_possible(timing: BlockTiming) -> bool:
    return min(timing.decode_s, timing.prefill_s_per_token) > 0


def _wishes(plain: dict[str, Any]) -> dict[str, Any]:
    """Take what is optional about a plan's aim out of ``plain``. Raises RequestInvalid."""
    wishes: dict[str, Any] = {}
    objective = plain.pop("objective", None)
    if objective is not None:
        try:
            wishes["objective"] = Objective(**objective)
        except (TypeError, ValueError) as error:
            kinds = ", ".join(get_args(ObjectiveKind))
            raise RequestInvalid(
                f"objective: kind ({kinds}), prompt_tokens, output_tokens", "objective"
            ) from error
    pins = plain.pop("pins", {})
    if not isinstance(pins, dict) or not all(
        block.isdecimal() and isinstance(device, str) for block, device in pins.items()
    ):
        raise RequestInvalid("pins: an object of block number to device name", "pins")
    wishes["pins"] = {int(block): device for block, device in pins.items()}
    exclude = plain.pop("exclude", [])
    if not isinstance(exclude, list) or not all(isinstance(name, str) for name in exclude):
        raise RequestInvalid("exclude: a list of device names", "exclude")
    wishes["exclude"] = tuple(exclude)
    budget = plain.pop("quality_budget", None)
    if budget is not None and not (isinstance(budget, (int, float)) and budget >= 0):
        raise RequestInvalid("quality_budget: a number >= 0, or null", "quality_budget")
    wishes["quality_budget"] = budget
    rows = plain.pop("sensitivities", None)
    if rows is None:
        if budget is not None:
            raise RequestInvalid("quality_budget needs sensitivities", "sensitivities")
        return wishes
    try:
        wishes["sensitivities"] = tuple(
            {int(bits): float(kl) for bits, kl in row.items()} for row in rows
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise RequestInvalid(
            "sensitivities: for each block an object of bits to KL divergence", "sensitivities"
        ) from error
    return wishes


def _check_names(request: PlanRequest, members: tuple[Member, ...]) -> None:
    """Raise RequestInvalid for a wish about a device that has not joined."""
    names = [member.name for member in members]
    for name in (*request.exclude, *request.pins.values()):
        if name not in names:
            raise RequestInvalid(f"no device is called {name!r}: {', '.join(names)} have joined")


def model_name(directory: Path) -> str:
    """What a model is called: its directory, or the one above where that is just ``model``."""
    named = directory.parent if directory.name == "model" else directory
    return named.name or "model"


async def _together(work: Iterable[Awaitable[Result]]) -> tuple[Result, ...]:
    """Await all; the first failure cancels the rest and is raised once they have ended."""
    tasks = [asyncio.ensure_future(item) for item in work]
    try:
        return tuple(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
