"""Lets an agent measure a model's sensitivities, and makes plans keep a quality budget."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

from coordinator.errors import AgentFailed, AgentLost
from coordinator.files.artifacts import ArtifactStore, Wanted
from coordinator.quality.store import KnownQuality, QualityRequest, QualityStore
from coordinator.roster.measurements import OnStep, Step, forward, in_thread, measure_blocks
from coordinator.roster.members import Member
from model.checkpoint import Checkpoint
from model.experts import ExpertCounts
from model.loss_estimate import LossUnknown
from model.loss_store import Form
from model.spec import ModelSpec
from planning.errors import RequestInvalid
from planning.losses import PlanAgain, RawLosses, assumed, estimated, keep_measured
from planning.plan import Plan
from planning.problem import PlanningProblem
from planning.request import LoadRequest, model_name
from planning.sensitivity import (
    ASSUMED_MARGIN,
    LossSource,
    Own,
    scaled,
    scaled_own,
    with_assumed_arithmetic,
    with_lossless,
)
from wire.activations import HOP_BITS, HopBits
from wire.messages import BlockRef, Done, HopMeasured, MeasureQuality, QualityMeasured

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

    All are None or empty if nothing is known. ``known`` has this coordinator's calibration.
    ``budget`` is what the plan may lose. ``source`` says from what that is counted. ``experts``:
    how often rows took each expert, if that was measured.
    """

    margin: float | None
    blocks: tuple[Mapping[int, float], ...] | None
    hops: Mapping[int, float]
    known: KnownQuality | None
    own: Own = field(default_factory=dict)
    budget: float | None = None
    source: LossSource = field(default_factory=lambda: LossSource("unknown"))
    experts: ExpertCounts | None = None


class QualityMeter:
    """Measures quality on members and keeps the results. The caller holds the turn."""

    def __init__(self, store: ArtifactStore, quality: QualityStore) -> None:
        self._store = store
        self._quality = quality

    async def losses(
        self,
        checkpoint: Checkpoint,
        request: LoadRequest,
        members: tuple[Member, ...],
        on_step: OnStep,
        *,
        measure: bool = True,
    ) -> Losses:
        """Return the sensitivities for a plan, and the budget that applies.

        What ``shoal calibrate`` measured comes first. Where a budget needs more, the model is
        measured here if ``measure`` says so. Raises RequestInvalid where a budget that was asked
        for has none; the default budget takes assumed ones.
        """
        if checkpoint.spec.encodes:
            if request.quality_budget is not None:
                raise RequestInvalid(
                    f"a quality budget bounds the divergence of next tokens, and "
                    f"{model_name(request.model)} encodes texts: choose widths with --bits",
                    "quality_budget",
                )
            return Losses(None, None, {}, None)
        known = self._quality.latest(checkpoint, request.scheme, request.group_size)
        count = checkpoint.spec.block_count
        if request.sensitivities is not None:
            own, hops = request.own_sensitivities, request.hop_sensitivities
            source, rows = LossSource("given"), request.sensitivities
            raw = RawLosses(rows, hops, own, ASSUMED_MARGIN, source)
        elif known is not None and _covers(known, request.bits, count):
            source = LossSource("calibrated", sum(map(len, known.sequences)))
            hops, own = known.worst_hops(count), known.own_sensitivities()
            raw = RawLosses(known.sensitivities(count), hops, own, known.margin, source)
        else:
            decided = request.loss_budget is None
            raw = await self._estimated(
                checkpoint, request, members, on_step, measure=measure and not decided
            )
            if decided and raw.source.kind == "assumed":
                return Losses(None, None, {}, known)
        own = raw.own
        if request.quality_budget is None:  # The default one keeps no device out.
            arithmetics = [member.profile.arithmetic for member in members]
            own = with_assumed_arithmetic(own, raw.rows, arithmetics)
        margin = request.quality_margin or raw.margin
        (hops,) = scaled([raw.hops], margin)
        return Losses(
            margin,
            scaled(with_lossless(raw.rows, checkpoint), margin),
            hops,
            known,
            scaled_own(own, margin),
            request.loss_budget,
            raw.source,
            raw.experts,
        )

    async def _estimated(
        self,
        checkpoint: Checkpoint,
        request: LoadRequest,
        members: tuple[Member, ...],
        on_step: OnStep,
        *,
        measure: bool,
    ) -> RawLosses:
        """Return losses measured here, or assumed ones for the default budget if need be."""
        form = Form(checkpoint, request.scheme, request.group_size)
        arithmetics = [member.profile.arithmetic for member in members]
        try:
            if not checkpoint.tensors:
                raise LossUnknown("its weights are not downloaded yet")
            if measure:
                work = partial(self._quality.losses.losses, form)
                return estimated(await in_thread("quality", work, on_step), arithmetics)
            found = await asyncio.to_thread(self._quality.losses.known, form)
            if found is not None:
                return estimated(found, arithmetics)
            why = "there was no time to measure"
        except LossUnknown as error:
            why = str(error)
        if request.quality_budget is None:
            if request.loss_budget is not None:
                log.warning("%s: loss not measured (%s): assumed", model_name(request.model), why)
            return assumed(checkpoint.spec, why, arithmetics)
        raise RequestInvalid(
            f"no sensitivities of {model_name(request.model)} are known "
            f"({request.scheme}, groups of {request.group_size}; {why}): run `shoal calibrate "
            f"--quality --on auto --model {request.model}`, or name a file with "
            "--sensitivities",
            "quality_budget",
        )

    async def keep_estimate(
        self,
        request: LoadRequest,
        checkpoint: Checkpoint,
        problem: PlanningProblem,
        plan: Plan,
        again: PlanAgain | None,
        on_step: OnStep,
    ) -> tuple[Plan, float | None]:
        """As ``keep_budget``, measured here as the estimate was. None: it cannot be measured."""
        form = Form(checkpoint, request.scheme, request.group_size)

        async def measured(bits: tuple[int, ...]) -> float:
            def work(report: Callable[[int, int], None], cancelled: Callable[[], bool]) -> float:
                return self._quality.losses.plan_loss(form, bits, report, cancelled)

            return await in_thread("check", work, on_step)

        try:
            return await keep_measured(problem, plan, measured, again)
        except LossUnknown as error:
            log.warning("the plan's loss is not measured: %s", error)
            return plan, None

    async def loss_of(
        self, request: LoadRequest, checkpoint: Checkpoint, plan: Plan, on_step: OnStep
    ) -> float | None:
        """A plan's loss by its bits, measured as the estimate was. None: it cannot be."""
        form = Form(checkpoint, request.scheme, request.group_size)
        bits = tuple(placement.bits for placement in plan.placements)

        def work(report: Callable[[int, int], None], cancelled: Callable[[], bool]) -> float:
            return self._quality.losses.plan_loss(form, bits, report, cancelled)

        try:
            return await in_thread("check", work, on_step)
        except LossUnknown as error:
            log.warning("the plan's loss is not measured: %s", error)
            return None

    async def keep_budget(
        self,
        checkpoint: Checkpoint,
        members: tuple[Member, ...],
        problem: PlanningProblem,
        plan: Plan,
        known: KnownQuality,
        again: PlanAgain | None,
        on_step: OnStep,
    ) -> tuple[Plan, float]:
        """Return a plan whose divergence keeps the budget, and that divergence. Raises PlanError.

        again: as of planning.losses.keep_measured. None: the user gave the plan.
        The blocks' part is measured. Hops and the arithmetic of single devices add a predicted
        part, which counts against the budget.
        """
        member = await self.fastest(members, checkpoint, on_step)

        async def measured(bits: tuple[int, ...]) -> float:
            if bits not in known.plans:
                await self.measure(member, checkpoint, known, Missing(plans=(bits,)), on_step)
            return known.plans[bits]

        return await keep_measured(problem, plan, measured, again)

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
        checkpoint = await asyncio.to_thread(self._opened, request)
        if checkpoint.spec.encodes:
            raise RequestInvalid(
                "quality is the divergence of next tokens, and this model encodes texts: compare "
                "widths with `shoal eval --bits`",
                "model",
            )
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

    def _opened(self, request: QualityRequest) -> Checkpoint:
        checkpoint = Checkpoint.open(request.model, request.adapter)
        return self._store.prepared(checkpoint, request.scheme, request.scheme_text)

    async def fastest(
        self, members: tuple[Member, ...], checkpoint: Checkpoint, on_step: OnStep
    ) -> Member:
        """Return the member with the least measured time per layer and prompt token.

        The layers keep the checkpoint's precision. Raises AgentFailed if no member can run them.
        """
        spec = checkpoint.spec
        bits = max(checkpoint.lossless_format(block).bits for block in range(1, spec.head_block))
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
        originals = [Wanted(k, checkpoint.lossless_format(k)) for k in range(spec.block_count)]
        refs = await in_thread(
            "quantize",
            lambda on_block, cancelled: self._store.quantize(
                checkpoint, originals, on_block, cancelled
            ),
            on_step,
        )

        prepared = await self._prepared(checkpoint, known, wanted, on_step)

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
                    scheme=Form(checkpoint, known.scheme, known.group_size).stored_scheme,
                    group_size=known.group_size,
                    hops=tuple(wanted.hops.items()),
                    backend=wanted.arithmetic,
                    prepared=prepared,
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

    async def _prepared(
        self, checkpoint: Checkpoint, known: KnownQuality, wanted: Missing, on_step: OnStep
    ) -> tuple[tuple[int, BlockRef], ...]:
        """Make the codes that a quantizer chooses for all that is measured, with their bits.

        An agent rounds other schemes by itself.
        """
        if checkpoint.prepared is None:
            return ()
        places = {(k, bits) for k, widths in wanted.blocks.items() for bits in widths}
        places |= {place for plan in wanted.plans for place in enumerate(plan)}
        form = Form(checkpoint, known.scheme, known.group_size)
        needed = [
            (bits, Wanted(k, form.format(k, bits)))
            for k, bits in sorted(places)
            if checkpoint.is_prepared(k, form.format(k, bits))
        ]
        refs = await in_thread(
            "quantize",
            lambda on_block, cancelled: self._store.quantize(
                checkpoint, [one for _, one in needed], on_block, cancelled, keep=True
            ),
            on_step,
        )
        return tuple((bits, ref) for (bits, _), ref in zip(needed, refs, strict=True))


def _covers(known: KnownQuality, bits: Iterable[int], block_count: int) -> bool:
    """Whether every block has a known loss at one of the widths at least."""
    widths = set(bits)
    return all(widths & row.keys() for row in known.sensitivities(block_count))
