"""Lets an agent measure a model's sensitivities, and makes plans keep a quality budget."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

from coordinator.errors import AgentFailed, AgentLost
from coordinator.files.artifacts import ArtifactStore
from coordinator.quality.store import MAX_CHECKS, KnownQuality, QualityRequest, QualityStore
from coordinator.roster.measurements import OnStep, Step, forward, in_thread, measure_blocks
from coordinator.roster.members import Member
from model.checkpoint import Checkpoint
from model.spec import ModelSpec
from planning.errors import RequestInvalid
from planning.plan import Plan, PlanError
from planning.planner import solve
from planning.problem import PlanningProblem
from planning.request import LoadRequest, model_name
from planning.sensitivity import (
    ASSUMED_MARGIN,
    Own,
    own_share,
    scaled,
    scaled_own,
    tightened,
    with_lossless,
)
from wire.activations import HOP_BITS, HopBits
from wire.messages import Done, HopMeasured, MeasureQuality, QualityMeasured

log = logging.getLogger(__name__)

MEASURED_HOPS: tuple[HopBits, ...] = tuple(bits for bits in HOP_BITS if bits != 32)
"""32 bits lose nothing."""


@dataclass(frozen=True, slots=True, eq=False)
class QualityFound:
    """The measured sensitivities of one model.

    ``device`` is the one that measured them, or None if the store had all of them.
    """

    request: QualityRequest
    checkpoint: Checkpoint
    known: KnownQuality
    device: str | None


@dataclass(frozen=True, slots=True)
class Missing:
    """The measurements to make: widths of blocks and of boundaries, and whole plans.

    arithmetic: the backend that must compute the blocks, which are layers. Empty means any.
    """

    blocks: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    hops: Mapping[int, tuple[HopBits, ...]] = field(default_factory=dict)
    plans: tuple[tuple[int, ...], ...] = ()
    arithmetic: str = ""

    @staticmethod
    def of(request: QualityRequest, spec: ModelSpec, known: KnownQuality) -> Missing:
        """Return what ``request`` needs and ``known`` lacks. A request needs every boundary."""
        return Missing(
            {
                block: widths
                for block in range(spec.block_count)
                if (widths := tuple(b for b in request.bits if (block, b) not in known.blocks))
            },
            {
                boundary: hops
                for boundary in range(spec.head_block)
                if (hops := tuple(b for b in MEASURED_HOPS if (boundary, b) not in known.hops))
            },
            tuple(plan for plan in request.plans if plan not in known.plans),
        )

    @staticmethod
    def own(arithmetic: str, bits: Iterable[int], spec: ModelSpec, known: KnownQuality) -> Missing:
        """Return what ``known`` lacks of layers at ``bits`` in an arithmetic of its own."""
        layers = range(1, spec.head_block)
        return Missing(
            {
                block: widths
                for block in layers
                if (widths := tuple(b for b in bits if (arithmetic, block, b) not in known.own))
            },
            arithmetic=arithmetic,
        )

    def __bool__(self) -> bool:
        return bool(self.blocks or self.hops or self.plans)

    def keep(self, result: QualityMeasured | HopMeasured, known: KnownQuality) -> None:
        """Add a result to ``known``, unless it is absurd or nobody asked for it."""
        if isinstance(result, HopMeasured):
            if 0 <= result.kl < math.inf and result.bits in self.hops.get(result.boundary, ()):
                known.hops[result.boundary, result.bits] = result.kl
        elif not (0 <= result.kl < math.inf and 0 <= result.weight_error < math.inf):
            return
        elif result.block is None:
            if result.bits in self.plans:
                known.plans[result.bits] = result.kl
        elif set(result.bits) <= set(self.blocks.get(result.block, ())):
            for bits in result.bits:
                values = result.kl, result.weight_error
                if self.arithmetic:
                    known.own[self.arithmetic, result.block, bits] = values
                else:
                    known.blocks[result.block, bits] = values

    def answered(self, known: KnownQuality) -> bool:
        """Whether ``known`` has all of these measurements."""
        own = {place[1:] for place in known.own if place[0] == self.arithmetic}
        found = own if self.arithmetic else known.blocks
        return (
            all((k, bits) in found for k, widths in self.blocks.items() for bits in widths)
            and all((k, bits) in known.hops for k, widths in self.hops.items() for bits in widths)
            and all(plan in known.plans for plan in self.plans)
        )


@dataclass(frozen=True, slots=True, eq=False)
class Losses:
    """The sensitivities as a plan counts them: multiplied by ``margin`` already.

    All are None or empty if nothing is known. ``known`` has this coordinator's measurements.
    """

    margin: float | None
    blocks: tuple[Mapping[int, float], ...] | None
    hops: Mapping[int, float]
    known: KnownQuality | None
    own: Own = field(default_factory=dict)


class QualityMeter:
    """Measures quality on members and keeps the results. The caller holds the turn."""

    def __init__(self, store: ArtifactStore, quality: QualityStore) -> None:
        self._store = store
        self._quality = quality

    def losses(self, checkpoint: Checkpoint, request: LoadRequest) -> Losses:
        """Return the sensitivities for a plan. Raises RequestInvalid if a budget has none."""
        known = self._quality.latest(checkpoint, request.scheme, request.group_size)
        if request.sensitivities is not None:
            margin = request.quality_margin or ASSUMED_MARGIN
            rows = with_lossless(request.sensitivities, checkpoint)
            (hops,) = scaled([request.hop_sensitivities], margin)
            own = scaled_own(request.own_sensitivities, margin)
            return Losses(margin, scaled(rows, margin), hops, known, own)
        if known is None:
            if request.quality_budget is None:
                return Losses(None, None, {}, None)
            raise RequestInvalid(
                f"no sensitivities of {model_name(request.model)} are known "
                f"({request.scheme}, groups of {request.group_size}): run `shoal calibrate "
                f"--quality --on auto --model {request.model}`, or name a file with "
                "--sensitivities",
                "quality_budget",
            )
        margin = request.quality_margin or known.margin
        count = checkpoint.spec.block_count
        rows = with_lossless(known.sensitivities(count), checkpoint)
        (hops,) = scaled([known.worst_hops(count)], margin)
        own = scaled_own(known.own_sensitivities(), margin)
        return Losses(margin, scaled(rows, margin), hops, known, own)

    async def keep_budget(
        self,
        request: LoadRequest,
        checkpoint: Checkpoint,
        members: tuple[Member, ...],
        problem: PlanningProblem,
        plan: Plan,
        known: KnownQuality,
        on_step: OnStep,
    ) -> tuple[Plan, float]:
        """Return a plan whose divergence keeps the budget, and that divergence. Raises PlanError.

        The blocks' part is measured. Hops and the arithmetic of single devices add a predicted
        part, which counts against the budget.
        """
        budget = problem.quality_budget or 0.0  # LoadRequest made sure that there is one.
        member = await self.fastest(members, checkpoint, on_step)
        for _ in range(MAX_CHECKS):
            bits = tuple(placement.bits for placement in plan.placements)
            if bits not in known.plans:
                await self.measure(member, checkpoint, known, Missing(plans=(bits,)), on_step)
            total = (
                known.plans[bits]
                + own_share(problem, plan)
                + sum(
                    problem.hop_sensitivity(stage.hop_bits) or 0.0
                    for stage in plan.stages
                    if stage.hop_bits is not None
                )
            )
            if total <= budget:
                return plan, known.plans[bits]
            if request.plan is not None:
                break
            on_step(Step("plan", "again, with a tighter budget", 0, 0, ""))
            tighter = tightened(problem, plan, total)
            plan = await asyncio.to_thread(solve, tighter, time_limit_s=request.time_limit_s)
        raise PlanError(
            f"the plan's KL divergence is {total:.3g} with its hops, above the budget of "
            f"{budget:g}: raise the budget, or allow more bits"
        )

    async def calibrate(
        self,
        request: QualityRequest,
        members: tuple[Member, ...],
        everybody: tuple[Member, ...],
        on_step: OnStep,
    ) -> QualityFound:
        """Measure on the fastest of ``members`` what the store lacks.

        Then measure each arithmetic that ``everybody`` has, on a device that has it: one of
        ``members`` if there is one. Raises AgentFailed, RequestInvalid, ModelError.
        """
        checkpoint = await asyncio.to_thread(Checkpoint.open, request.model)
        request.check(checkpoint.spec)
        known = self._quality.open(
            checkpoint, request.sequences, request.scheme, request.group_size
        )
        missing = Missing.of(request, checkpoint.spec, known)
        name = None
        if missing:
            member = await self.fastest(members, checkpoint, on_step)
            name = member.name
            await self.measure(member, checkpoint, known, missing, on_step)
        else:
            self._quality.save(checkpoint, known)  # Makes it the latest again.
        for arithmetic in sorted({one.profile.arithmetic for one in everybody} - {""}):
            able = [one for one in everybody if one.profile.arithmetic == arithmetic]
            runs = {bits for one in able for bits, _ in one.profile.container_bits}
            wanted = sorted(runs.intersection(request.bits))
            missing = Missing.own(arithmetic, wanted, checkpoint.spec, known)
            if missing:
                # Each can run the backend of that name. Prefer a device that serves with it.
                member = min(
                    able,
                    key=lambda one: (
                        one not in members,
                        one.profile.backend != one.profile.arithmetic,
                    ),
                )
                name = name or member.name
                await self.measure(member, checkpoint, known, missing, on_step)
        return QualityFound(request, checkpoint, known, name)

    async def fastest(
        self, members: tuple[Member, ...], checkpoint: Checkpoint, on_step: OnStep
    ) -> Member:
        """Return the member with the least measured time per layer and prompt token.

        The layers keep the checkpoint's precision. Raises AgentFailed if no member can run them.
        """
        spec = checkpoint.spec
        bits = max(checkpoint.lossless_format(block).bits for block in range(spec.block_count))
        timings = await measure_blocks(members, spec, (bits,), on_step)
        seconds = {
            member: max(times)
            for member in members
            if (
                times := [
                    timing.prefill_s_per_token
                    for timing in timings[member.name]
                    if timing.kind == "layer"
                ]
            )
        }
        if not seconds:
            raise AgentFailed(members[0].name, f"no agent can run a layer at {bits} bits")
        return min(seconds, key=lambda member: seconds[member])

    async def measure(
        self,
        member: Member,
        checkpoint: Checkpoint,
        known: KnownQuality,
        wanted: Missing,
        on_step: OnStep,
    ) -> None:
        """Let ``member`` measure. Results are kept as soon as they come. Raises AgentFailed."""
        spec = checkpoint.spec
        originals = [(k, checkpoint.lossless_format(k)) for k in range(spec.block_count)]
        refs = await in_thread(
            "quantize",
            lambda on_block, cancelled: self._store.quantize(
                checkpoint, originals, on_block, cancelled
            ),
            on_step,
        )

        def on_result(result: QualityMeasured | HopMeasured) -> None:
            wanted.keep(result, known)
            try:
                self._quality.save(checkpoint, known)
            except OSError as error:
                log.warning("sensitivities cannot be kept: %s", error)

        on_step(Step("quality", member.name, 0, 0, ""))
        try:
            await member.request(
                partial(
                    MeasureQuality,
                    spec=spec.to_dict(),
                    blocks=refs,
                    sequences=known.sequences,
                    wanted=tuple(wanted.blocks.items()),
                    plans=wanted.plans,
                    scheme=known.scheme,
                    group_size=known.group_size,
                    hops=tuple(wanted.hops.items()),
                    backend=wanted.arithmetic,
                ),
                Done,
                forward(on_step, "quality", member.name),
                on_result,
            )
        except AgentLost as error:
            raise AgentFailed(
                member.name,
                "device lost while it measured; its results are kept: run the same command again "
                "to go on, with another agent if this one does not come back",
            ) from error
        if not wanted.answered(known):
            raise AgentFailed(
                member.name, "reported the end of the measurement, but did not send every result"
            )
