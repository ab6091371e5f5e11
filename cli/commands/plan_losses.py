"""The budget and the losses of a plan for described devices.

The coordinator finds the same for a live plan (coordinator.quality.measuring). Both measure with
the same store, so that what one of them measured the other need not.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.commands.plan_arguments import bounds_of
from cli.errors import UsageError
from cli.render import Screen

if TYPE_CHECKING:
    from model.checkpoint import Checkpoint
    from model.loss_store import Form
    from model.spec import ModelSpec
    from planning.labs.lab import Lab
    from planning.labs.sensitivity_file import Sensitivities
    from planning.losses import RawLosses
    from planning.plan import Plan
    from planning.problem import PlanningProblem
    from planning.sensitivity import LossSource


@dataclass(frozen=True, slots=True)
class DescribedLosses:
    """The losses that a plan for described devices counts, and the budget that it keeps.

    ``raw`` None: nothing is known. ``form`` is there where plans can be measured.
    """

    raw: RawLosses | None
    budget: float | None
    form: Form | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of RequestInput."""
        from planning.sensitivity import scaled, scaled_own

        if self.raw is None:
            return {"quality_budget": self.budget}
        return {
            "quality_budget": self.budget,
            "sensitivities": scaled(self.raw.rows, self.raw.margin),
            "own_sensitivities": scaled_own(self.raw.own, self.raw.margin),
            "experts": self.raw.experts,
        }

    @property
    def sources(self) -> tuple[LossSource, ...]:
        """Where the losses come from; empty if nothing is known."""
        return () if self.raw is None else (self.raw.source,)

    @property
    def hops(self) -> Mapping[int, float]:
        """Bits -> what a hop loses, with the margin."""
        from planning.sensitivity import scaled

        return {} if self.raw is None else scaled([self.raw.hops], self.raw.margin)[0]

    def quality(self, measured_kl: float | None) -> dict[str, Any] | None:
        """The plan's loss for the answer; None if nothing is known."""
        if self.raw is None:
            return None
        kept = {"margin": self.raw.margin, "measured_kl": measured_kl, "budget": self.budget}
        return kept | asdict(self.raw.source)


def described_losses(
    options: argparse.Namespace,
    screen: Screen,
    spec: ModelSpec,
    lab: Lab,
    known: Sensitivities | None,
    checkpoint: Checkpoint | None,
) -> DescribedLosses:
    """From the user's file, measured, or a typical model's. Raises UsageError, ModelError.

    checkpoint: None if there are no weights.
    """
    from model.loss_estimate import LossUnknown
    from model.loss_store import Form
    from planning.losses import RawLosses, assumed
    from planning.request import model_name
    from planning.sensitivity import (
        LossSource,
        applying_budget,
        with_assumed_arithmetic,
        with_lossless,
    )

    bounds = bounds_of(options)
    if spec.encodes:
        if bounds["quality_budget"] is not None:
            raise UsageError(
                "--quality-budget bounds the divergence of next tokens, and this model encodes "
                "texts: choose widths with --bits"
            )
        return DescribedLosses(None, None)
    decided = bool(options.plan) or len(set(options.bits or lab.bits)) == 1
    arithmetics = [device.arithmetic for device in lab.devices if device.layer_kl is None]
    budget = applying_budget(**bounds, decided=decided)
    if known is not None:
        own = known.own
        if bounds["quality_budget"] is None:  # The default one keeps no device out.
            own = with_assumed_arithmetic(own, known.kl, arithmetics)
        raw = RawLosses(known.kl, known.hops, own, known.margin, LossSource("given"))
        return DescribedLosses(raw, budget)
    if checkpoint is None:
        why = f"{model_name(Path(options.model).absolute())} has no weights here"
    else:
        try:
            form = Form(checkpoint, options.scheme, options.group_size)
            return _estimated(screen, form, arithmetics, budget)
        except LossUnknown as error:
            why = str(error)
    if bounds["quality_budget"] is not None:
        raise UsageError(
            f"--quality-budget needs --sensitivities FILE: {why}: run `shoal calibrate"
            " --quality` where the weights are"
        )
    if budget is None:
        return DescribedLosses(None, None)
    raw = assumed(spec, why, arithmetics)
    if checkpoint is not None:
        raw = replace(raw, rows=with_lossless(raw.rows, checkpoint))
    return DescribedLosses(raw, budget)


def _estimated(
    screen: Screen, form: Form, arithmetics: Sequence[str], budget: float | None
) -> DescribedLosses:
    """Return the losses that are measured on the weights, at once or before.

    Without a budget they are worth telling, and not worth measuring. Raises LossUnknown.
    """
    from model.loss_store import LossStore
    from planning.losses import estimated
    from wire.service import default_state_dir

    store = LossStore(default_state_dir("coordinator"))
    if budget is None:
        kept = store.known(form)
        return DescribedLosses(None if kept is None else estimated(kept, arithmetics), None)
    with screen.progress() as on_step:
        found = store.losses(form, _reporter(on_step, "quality"), lambda: False)
    return DescribedLosses(estimated(found, arithmetics), budget, form)


def keep_described(
    options: argparse.Namespace,
    screen: Screen,
    losses: DescribedLosses,
    problem: PlanningProblem,
    plan: Plan,
    solve: Callable[[PlanningProblem], Plan],
) -> tuple[Plan, float | None]:
    """Measure the plan, and plan again while it loses more than the budget. Raises PlanError.

    The divergence is None where it cannot be measured.
    """
    from model.loss_estimate import LossUnknown
    from model.loss_store import LossStore
    from planning.losses import keep_measured
    from wire.service import default_state_dir

    if losses.form is None or losses.budget is None:
        return plan, None
    store, form = LossStore(default_state_dir("coordinator")), losses.form

    async def measured(bits: tuple[int, ...]) -> float:
        with screen.progress() as on_step:
            return store.plan_loss(form, bits, _reporter(on_step, "check"), lambda: False)

    async def again(tighter: PlanningProblem) -> Plan:
        return solve(tighter)

    try:
        return asyncio.run(keep_measured(problem, plan, measured, None if options.plan else again))
    except LossUnknown as error:
        screen.note(f"the plan's loss is not measured: {error}")
        return plan, None


def measured_loss(screen: Screen, losses: DescribedLosses, plan: Plan) -> float | None:
    """The loss of a plan's blocks, measured; None where it cannot be, or nothing bounds it."""
    from model.loss_estimate import LossUnknown
    from model.loss_store import LossStore
    from wire.service import default_state_dir

    if losses.form is None or losses.budget is None:
        return None
    store = LossStore(default_state_dir("coordinator"))
    bits = tuple(placement.bits for placement in plan.placements)
    try:
        with screen.progress() as on_step:
            return store.plan_loss(losses.form, bits, _reporter(on_step, "check"), lambda: False)
    except LossUnknown as error:
        screen.note(f"the plan's loss is not measured: {error}")
        return None


def _reporter(
    on_step: Callable[[Mapping[str, Any]], None], phase: str
) -> Callable[[int, int], None]:
    def report(done: int, total: int) -> None:
        step = {"phase": phase, "label": "", "done": done, "total": total, "unit": "blocks"}
        on_step(step)

    return report
