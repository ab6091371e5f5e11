"""Lets an agent measure what fewer bits do to a model, and has plans keep a budget of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from coordinator.artifacts import ArtifactStore
from coordinator.errors import AgentFailed, AgentLost, RequestInvalid
from coordinator.measurements import OnStep, Step, forward, in_thread, measure_blocks
from coordinator.members import Member
from coordinator.plan import Plan, PlanError
from coordinator.plan_request import PlanRequest, model_name
from coordinator.planner import solve
from coordinator.problem import PlanningProblem
from coordinator.quality import (
    ASSUMED_MARGIN,
    MAX_CHECKS,
    KnownQuality,
    QualityRequest,
    QualityStore,
    scaled,
    tightened,
    with_lossless,
)
from model.checkpoint import Checkpoint
from wire.messages import Done, MeasureQuality, QualityMeasured

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class QualityFound:
    """What is known of a model's sensitivities. ``device`` measured; None: all was known."""

    request: QualityRequest
    checkpoint: Checkpoint
    known: KnownQuality
    device: str | None


class Distillation:
    """Measurements of quality on members, kept in a store. One at a time: the fleet's lock."""

    def __init__(self, store: ArtifactStore, quality: QualityStore) -> None:
        self._store = store
        self._quality = quality

    def sensitivities(
        self, checkpoint: Checkpoint, request: PlanRequest
    ) -> tuple[float | None, tuple[Mapping[int, float], ...] | None, KnownQuality | None]:
        """(margin, sensitivities with it, what they are from) for a plan; None where unknown."""
        known = self._quality.latest(checkpoint, request.scheme, request.group_size)
        if request.sensitivities is not None:
            margin = request.quality_margin or ASSUMED_MARGIN
            rows = with_lossless(request.sensitivities, checkpoint)
            return margin, scaled(rows, margin), known
        if known is None:
            if request.quality_budget is None:
                return None, None, None
            raise RequestInvalid(
                f"nothing is known of what fewer bits do to {model_name(request.model)} "
                f"({request.scheme}, groups of {request.group_size}): run `shoal calibrate "
                f"--quality --on auto --model {request.model}`, or name a file with "
                "--sensitivities",
                "quality_budget",
            )
        margin = request.quality_margin or known.margin
        rows = with_lossless(known.sensitivities(checkpoint.spec.block_count), checkpoint)
        return margin, scaled(rows, margin), known

    async def keep_budget(
        self,
        request: PlanRequest,
        checkpoint: Checkpoint,
        members: tuple[Member, ...],
        problem: PlanningProblem,
        plan: Plan,
        known: KnownQuality,
        on_step: OnStep,
    ) -> tuple[Plan, float]:
        """A plan whose measured divergence keeps the budget, and that. Raises PlanError."""
        budget = problem.quality_budget or 0.0  # There is one: PlanRequest.from_dict saw to it.
        member = await self.fastest(members, checkpoint, on_step)
        for _ in range(MAX_CHECKS):
            bits = tuple(placement.bits for placement in plan.placements)
            if bits not in known.plans:
                await self.measure(member, checkpoint, known, {}, (bits,), on_step)
            if known.plans[bits] <= budget:
                return plan, known.plans[bits]
            if request.given is not None:
                break
            on_step(Step("plan", "again, with a tighter budget", 0, 0, ""))
            tighter = tightened(problem, plan, known.plans[bits])
            plan = await asyncio.to_thread(solve, tighter, time_limit_s=request.time_limit_s)
        raise PlanError(
            f"the plan's measured KL divergence is {known.plans[bits]:.3g}, above the budget of "
            f"{budget:g}: raise the budget, or allow more bits"
        )

    async def calibrate(
        self, request: QualityRequest, members: tuple[Member, ...], on_step: OnStep
    ) -> QualityFound:
        """Measure what is not known yet on the fastest of ``members``.

        Raises AgentFailed, RequestInvalid, ModelError.
        """
        checkpoint = await asyncio.to_thread(Checkpoint.open, request.model)
        request.check(checkpoint.spec)
        known = self._quality.open(
            checkpoint, request.sequences, request.scheme, request.group_size
        )
        wanted = {
            block: missing
            for block in range(checkpoint.spec.block_count)
            if (
                missing := tuple(bits for bits in request.bits if (block, bits) not in known.blocks)
            )
        }
        plans = tuple(plan for plan in request.plans if plan not in known.plans)
        name = None
        if wanted or plans:
            member = await self.fastest(members, checkpoint, on_step)
            name = member.name
            await self.measure(member, checkpoint, known, wanted, plans, on_step)
        else:
            self._quality.save(checkpoint, known)  # It is the latest again.
        return QualityFound(request, checkpoint, known, name)

    async def fastest(
        self, members: tuple[Member, ...], checkpoint: Checkpoint, on_step: OnStep
    ) -> Member:
        """The member with the least measured time per layer and prompt token, weights as they are.

        Raises AgentFailed where none can run them.
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
        wanted: Mapping[int, tuple[int, ...]],
        plans: Sequence[tuple[int, ...]],
        on_step: OnStep,
    ) -> None:
        """Let ``member`` measure; results are kept as soon as they come. Raises AgentFailed."""
        spec = checkpoint.spec
        originals = [(k, checkpoint.lossless_format(k)) for k in range(spec.block_count)]
        refs = await in_thread(
            "quantize",
            lambda on_block, cancelled: self._store.quantize(
                checkpoint, originals, on_block, cancelled
            ),
            on_step,
        )
        asked = {(block, bits) for block, widths in wanted.items() for bits in widths}

        def on_result(result: QualityMeasured) -> None:
            if not (result.kl >= 0 and result.weight_error >= 0):
                return
            if result.block is None and result.bits in plans:
                known.plans[result.bits] = result.kl
            elif result.block is not None and asked.issuperset(
                (result.block, bits) for bits in result.bits
            ):
                for bits in result.bits:
                    known.blocks[result.block, bits] = result.kl, result.weight_error
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
                    wanted=tuple(wanted.items()),
                    plans=tuple(plans),
                    scheme=known.scheme,
                    group_size=known.group_size,
                ),
                Done,
                forward(on_step, "quality", member.name),
                on_result,
            )
        except AgentLost as error:
            raise AgentFailed(
                member.name,
                "device lost while it measured; what it found is kept: run the same command again "
                "to go on, with another agent if this one stays away",
            ) from error
        missing = [place for place in asked if place not in known.blocks]
        if missing or any(plan not in known.plans for plan in plans):
            raise AgentFailed(member.name, "said it had measured everything, and had not")
