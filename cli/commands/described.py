"""Reads a lab file and a model into a planning problem, for commands that need no coordinator."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cli.commands.plan_arguments import (
    bounds_of,
    check_teams,
    context_of,
    objective_of,
    pins_of,
    sensitivities_of,
    slots_of,
    teams_of,
)
from cli.commands.plan_losses import DescribedLosses, described_losses
from cli.render import Screen
from cli.shared_arguments import adapter_of, with_scheme

if TYPE_CHECKING:
    from model.checkpoint import Checkpoint
    from model.quantize import Format
    from model.spec import ModelSpec
    from planning.labs.lab import Lab
    from planning.labs.sensitivity_file import Sensitivities
    from planning.problem import HopFormat, PlanningProblem
    from planning.saved import SavedPlan


@dataclass(frozen=True, slots=True)
class Described:
    """The problem of splitting a model over described devices, and what it was made of.

    checkpoint: None if the model's folder has no weights.
    given: the plan of --plan, or None.
    """

    lab: Lab
    spec: ModelSpec
    problem: PlanningProblem
    losses: DescribedLosses
    checkpoint: Checkpoint | None
    given: SavedPlan | None
    context_tokens: int
    slots: int


def read_described(options: argparse.Namespace, screen: Screen) -> Described:
    """Read --devices and the model in ``options.model``, and measure what their problem needs.

    Raises LabError, ModelError, PlanError, SensitivityError, ValueError, UsageError.
    """
    from model.families import load_spec
    from model.quantize import Format
    from planning.build import RequestInput
    from planning.labs.lab import lab_problem
    from planning.labs.lab_file import read_lab
    from planning.request import DEFAULT_CONTEXT_TOKENS, ENCODER_BITS
    from planning.saved import read_plan

    model = Path(options.model)
    lab = read_lab(options.devices)
    spec = load_spec(model)
    if spec.encodes and not options.bits and not options.plan:
        options.bits = [bits for bits in ENCODER_BITS if bits in lab.bits]
    formats = {
        bits: Format.of(bits, options.scheme, options.group_size)
        for bits in sorted({*lab.bits, *(options.bits or ())})
    }
    known_kl = sensitivities_of(options, spec)
    checkpoint = _checkpoint(options, model)
    losses = described_losses(options, screen, spec, lab, known_kl, checkpoint)
    bound = bounds_of(options)["max_weight_error"]
    if known_kl is not None:
        errors: Sequence[Mapping[int, float]] | None = known_kl.weight_errors
        _note_unknown_arithmetics(options, screen, lab, known_kl)
    else:
        errors, bound = _weight_errors(options, checkpoint, formats, screen)
    given = read_plan(options.plan) if options.plan else None
    wanted_tokens = context_of(options, given) or DEFAULT_CONTEXT_TOKENS
    context_tokens = min(wanted_tokens, spec.max_context)
    slots = slots_of(options, given)
    check_teams(options)
    request = RequestInput(
        spec,
        options.bits or lab.bits,
        context_tokens,
        slots,
        formats=formats,
        native=checkpoint.native_formats() if checkpoint else {},
        weight_errors=errors,
        max_weight_error=bound,
        objective=objective_of(options),
        pins=pins_of(options, spec),
        excluded=options.exclude,
        **teams_of(options),
        hop_formats=hop_formats(
            options, lab, losses, quality_budget=bounds_of(options)["quality_budget"]
        ),
        **losses.fields,
    )
    problem = lab_problem(lab, request)
    return Described(lab, spec, problem, losses, checkpoint, given, context_tokens, slots)


def _note_unknown_arithmetics(
    options: argparse.Namespace, screen: Screen, lab: Lab, known: Sensitivities
) -> None:
    unknown = [
        device.name
        for device in lab.devices
        if device.arithmetic and not (device.layer_kl or device.arithmetic in known.own)
    ]
    if unknown:
        screen.note(
            f"{options.sensitivities} has no sensitivities for the arithmetic of"
            f" {', '.join(unknown)}: see docs/calibration.md"
        )


def hop_formats(
    options: argparse.Namespace,
    lab: Lab,
    losses: DescribedLosses,
    *,
    quality_budget: float | None,
) -> tuple[HopFormat, ...]:
    """Return the widths of --hop-bits, else of the lab. The model's own losses come first."""
    from planning.sensitivity import choose_hops

    declared = {
        form.bits: form.sensitivity for form in lab.hop_formats if form.sensitivity is not None
    }
    if losses.raw is not None and losses.raw.source.kind == "given":
        declared |= losses.hops
    else:
        declared = {**losses.hops, **declared}
    asked = options.hop_bits or [form.bits for form in lab.hop_formats] or None
    return choose_hops(asked, declared, quality_budget)


def _checkpoint(options: argparse.Namespace, model: Path) -> Checkpoint | None:
    """Return the model's checkpoint, or None if its folder has no weights. Raises ModelError."""
    from model.checkpoint import Checkpoint
    from model.given import gguf_of

    has_weights = gguf_of(model) is not None or any(model.glob("*.safetensors"))
    if not has_weights:
        return None
    return with_scheme(options, Checkpoint.open(model, adapter_of(options)))


def _weight_errors(
    options: argparse.Namespace,
    checkpoint: Checkpoint | None,
    formats: Mapping[int, Format],
    screen: Screen,
) -> tuple[Sequence[Mapping[int, float]] | None, float | None]:
    """The weight errors of each block and their bound, or None without weights to measure."""
    from model.weight_errors import weight_errors
    from wire.service import default_state_dir

    bound = bounds_of(options)["max_weight_error"]
    if bound is None:
        return None, None
    if checkpoint is None:
        screen.note(
            f"{options.model} has no weights: their errors are not known, and --max-weight-error"
            f" {bound:g} is not applied"
        )
        return None, None
    with screen.progress() as on_step:

        def report(done: int, total: int) -> None:
            step = {"phase": "weight errors", "label": "", "unit": "steps"}
            on_step({**step, "done": done, "total": total})

        errors = weight_errors(
            checkpoint, formats.values(), default_state_dir("coordinator"), report
        )
    return errors, bound
