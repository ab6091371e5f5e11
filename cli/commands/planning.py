"""``shoal plan`` and ``diff``.

A plan is for the measured shoal or for described devices. Both ways lead to a planning problem. The
same functions make explanations, drawings, files and simulations from it. Figures for described
devices are predictions from their lab file, and are labelled so.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from cli.commands.described import read_described
from cli.commands.model_names import locate
from cli.commands.plan_arguments import note_other_model, repairs_of, request_of
from cli.commands.plan_losses import keep_described
from cli.commands.plan_views import (
    show_difference,
    show_dilemma,
    show_divergence,
    show_explanation,
    show_simulation,
    show_weights,
)
from cli.errors import CommandFailed, UsageError
from cli.render import Screen

if TYPE_CHECKING:
    from cli.client import Client
    from model.spec import ModelSpec
    from paper.study import Simulation
    from planning.insight.explain import Explanation
    from planning.plan import Plan
    from planning.problem import PlanningProblem
    from planning.saved import SavedPlan
    from planning.sensitivity import LossSource

EXPLAIN_LIMIT_S = 60.0
"""The time for all trials of an explanation together."""
SOLVE_AGAIN_LIMIT_S = 5.0


def run_offline_plan(options: argparse.Namespace, screen: Screen) -> None:
    """Run ``shoal plan MODEL --devices LAB.yaml``, without a coordinator. Raises CommandFailed."""
    from model.errors import ModelError
    from model.kept import weight_notes
    from planning.insight.view import describe_plan
    from planning.labs.lab import LabError, times_of
    from planning.labs.sensitivity_file import SensitivityError
    from planning.plan import PlanError
    from planning.request import model_name

    if options.check_quality:
        raise UsageError("--check-quality measures on the shoal's agents: drop --devices")
    if options.migration_weight:
        raise UsageError("--migration-weight needs agents: described devices hold nothing")
    if options.draft is not None or options.draft_bits is not None:
        raise UsageError("--draft is planned for the shoal's agents: drop --devices")
    model = Path(options.model)
    try:
        described = read_described(options, screen)
        lab, spec, problem = described.lab, described.spec, described.problem
        losses, checkpoint, given = described.losses, described.checkpoint, described.given
        context_tokens, slots = described.context_tokens, described.slots
        if options.formulation == "dilemma":
            _run_dilemma(options, screen, problem, asdict(times_of(lab, spec)))
        else:
            name = model_name(model.absolute())
            note_other_model(screen, given, name)
            if given is not None and given.draft is not None:
                screen.note(
                    f"{given.source} has a draft model, which is planned for the shoal's agents:"
                    " it is left out here"
                )
            plan = _given_or_best(options, screen, problem, given, losses.sources)
            plan, measured_kl = keep_described(
                options, screen, losses, problem, plan, partial(_solve, options, screen)
            )
            members = [one.device for stage in plan.stages for one in stage.members]
            wording = _Wording(
                f"plan for {name}, predicted from {options.devices}",
                f"{name} on {options.devices.name}",
                {
                    "devices": str(options.devices),
                    "figures": "predicted from described devices",
                    "times": asdict(times_of(lab, spec, members)),
                },
            )
            found = _Found(name, context_tokens, describe_plan(spec, plan, slots), wording)
            found.quality = losses.quality(measured_kl)
            if checkpoint is not None:
                bits = [width for stage in plan.stages for width in stage.bits]
                found.weights = weight_notes(checkpoint, bits)
            _show_plan(options, screen, plan, problem, found)
    except (LabError, ModelError, PlanError, SensitivityError, ValueError) as error:
        raise CommandFailed(str(error)) from error


def run_live_plan(options: argparse.Namespace, screen: Screen, client: Client) -> None:
    """Run ``shoal plan MODEL`` with the coordinator's measurements. Raises CommandFailed."""
    from planning.plan import Plan, PlanError, verify
    from planning.problem import PlanningProblem
    from planning.request import model_name

    if options.formulation == "dilemma":
        raise UsageError("--formulation dilemma needs --devices LAB.yaml")
    asked = (options.explain, options.plot, options.save, options.plan, options.simulate)
    request_of(options)  # Wrong arguments are told before a model is fetched.
    locate(options, client, screen, weights=False)
    wanted = request_of(options, with_problem=any(asked))
    note_other_model(screen, wanted.plan, model_name(wanted.model))
    request = wanted.to_dict()
    with screen.progress() as on_step:
        answer = client.operate("/shoal/v1/plan", request, on_step)
    wording = _Wording(
        f"predicted plan for {answer['model']}",
        f"{answer['model']} on this shoal",
        {"figures": "predicted from measured devices"},
    )
    found = _Found(answer["model"], answer["context_tokens"], answer["plan"], wording)
    found.devices = answer.get("devices")
    found.noise = answer.get("noise", ())
    found.quality, found.weights = answer.get("quality"), answer.get("weights", ())
    found.draft = answer.get("draft")
    if request["draft"] is not None:
        found.saved_draft = request["draft"], request["draft_bits"]
    if not any(asked):
        _show_found(options, screen, found)
        return
    try:
        problem = PlanningProblem.from_dict(answer["problem"])
        plan = Plan.from_dict({item.name: answer["plan"][item.name] for item in fields(Plan)})
        verify(plan, problem)
        _show_plan(options, screen, _compared(options, screen, plan, problem), problem, found)
    except (PlanError, ValueError) as error:
        raise CommandFailed(str(error)) from error


def run_plan_diff(options: argparse.Namespace, screen: Screen) -> None:
    """Compare two saved plans. Raises CommandFailed."""
    from planning.plan import PlanError
    from planning.saved import difference, hop_difference, read_plan

    try:
        before, after = read_plan(options.before), read_plan(options.after)
        changes, hops = difference(before, after), hop_difference(before, after)
    except PlanError as error:
        raise CommandFailed(str(error)) from error
    if options.json:
        screen.json(
            {
                "changes": [
                    {
                        "first": change.first,
                        "last": change.last,
                        "before": {"device": change.before[0], "bits": change.before[1]},
                        "after": {"device": change.after[0], "bits": change.after[1]},
                    }
                    for change in changes
                ],
                "hops": [
                    {"behind": hop.block, "before": hop.before, "after": hop.after} for hop in hops
                ],
                "predicted": {"before": dict(before.predicted), "after": dict(after.predicted)},
            }
        )
    else:
        show_difference(screen, before, after, changes, hops)


def write_plot(path: Path, plan: Plan, spec: ModelSpec, title: str, devices: Sequence[str]) -> None:
    """Draw a plan over the named devices. Raises OSError."""
    from planning.insight.picture import plan_svg

    used = {name for stage in plan.stages for name in stage.devices}
    unused = [name for name in devices if name not in used]
    path.write_text(plan_svg(plan, spec, title, unused), encoding="utf-8")


def save_plan(path: Path, plan: Plan, found: _Found) -> None:
    """Write a plan to edit, compare and load. Raises OSError."""
    from planning.saved import plan_text

    text = plan_text(
        plan,
        found.model,
        slots=found.plan["slots"],
        context_tokens=found.context_tokens,
        devices=found.devices,
        draft=found.saved_draft,
    )
    path.write_text(text, encoding="utf-8")


# ---- steps -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Wording:
    """The words that differ between a live plan and one for described devices."""

    title: str
    picture: str
    labels: Mapping[str, Any]
    """Fields of the JSON answer that name the source of its figures."""


@dataclass(slots=True)
class _Found:
    """A plan as JSON, with its context for showing it."""

    model: str
    context_tokens: int
    plan: Mapping[str, Any]
    wording: _Wording
    quality: Mapping[str, Any] | None = None
    """The known figures of the plan's loss."""
    weights: Sequence[str] = ()
    """Lines about codes that are kept from the model's files, or quantized again."""
    devices: Mapping[str, str] | None = None
    """Ids of devices by name, or None for described devices."""
    draft: Mapping[str, Any] | None = None
    """The draft model with its figures, if there is one."""
    saved_draft: tuple[str, int] | None = None
    """Its path and bits, for a saved plan."""
    noise: Sequence[Mapping[str, Any]] = ()
    """Entries about noisy figures (coordinator.roster.noise)."""


def _show_plan(
    options: argparse.Namespace,
    screen: Screen,
    plan: Plan,
    problem: PlanningProblem,
    found: _Found,
) -> None:
    """Explain, simulate, save and draw a plan as asked, then show it."""
    from paper.study import simulate
    from planning.insight.explain import explain
    from planning.insight.unused import idle_reasons
    from planning.insight.view import describe_plan

    if options.simulate and options.objective == "energy":
        raise UsageError(
            "--simulate draws link speeds, but energy does not depend on them: drop one"
        )
    explanation: Explanation | None = None
    simulation: Simulation | None = None
    with screen.progress() as on_step:
        if options.explain:
            explanation = explain(
                plan,
                problem,
                time_limit_s=EXPLAIN_LIMIT_S,
                solve_limit_s=SOLVE_AGAIN_LIMIT_S,
                on_trial=lambda what, done, total: on_step(
                    _step("trying changes", what, done, total)
                ),
            )
        if options.simulate:
            simulation = simulate(
                plan,
                problem,
                options.simulate,
                seed=options.seed or 0,
                solve_limit_s=SOLVE_AGAIN_LIMIT_S,
                on_run=lambda done, total: on_step(_step("drawing links", "", done, total)),
            )
    if options.save:
        save_plan(options.save, plan, found)
        screen.note(f"saved to {options.save}")
    if options.plot:
        names = [device.name for device in problem.devices]
        write_plot(options.plot, plan, problem.spec, found.wording.picture, names)
        screen.note(f"drawn to {options.plot}")
    found.plan = describe_plan(problem.spec, plan, found.plan["slots"])
    idle = () if explanation is None else idle_reasons(plan, problem)
    _show_found(options, screen, found, explanation, idle, simulation)


def _show_found(
    options: argparse.Namespace,
    screen: Screen,
    found: _Found,
    explanation: Explanation | None = None,
    idle: Sequence[str] = (),
    simulation: Simulation | None = None,
) -> None:
    """Show a plan as JSON or as tables. ``idle`` has the reasons for unused devices."""
    if options.json:
        answer: dict[str, Any] = {
            "model": found.model,
            **found.wording.labels,
            "context_tokens": found.context_tokens,
            "plan": found.plan,
        }
        if found.quality is not None:
            answer["quality"] = found.quality
        if found.weights:
            answer["weights"] = list(found.weights)
        if found.draft is not None:
            answer["draft"] = dict(found.draft)
        if "devices" not in found.wording.labels:
            answer["noise"] = list(found.noise)
        if explanation is not None:
            answer["explanation"] = explanation.to_dict()
            answer["idle"] = list(idle)
        if simulation is not None:
            answer["simulation"] = simulation.to_dict()
        screen.json(answer)
        return
    times = found.wording.labels.get("times")
    screen.plan(found.plan, found.wording.title, times=times, noise=found.noise)
    show_weights(screen, {"weights": found.weights})
    show_divergence(screen, found.plan, found.quality)
    screen.draft({"draft": found.draft})
    if found.plan["energy_j"] is not None:
        energy_j = found.plan["energy_j"]
        screen.out.print(f"predicted energy of computing: {energy_j:.3g} J per token")
    if explanation is not None:
        show_explanation(screen, explanation)
        for line in idle:
            screen.out.print(escape(line))
    if simulation is not None:
        show_simulation(screen, simulation)


def _run_dilemma(
    options: argparse.Namespace,
    screen: Screen,
    problem: PlanningProblem,
    times: Mapping[str, Any],
) -> None:
    """Solve the paper's program for the described costs. Its layers are the blocks."""
    from paper import dilemma

    for name, asked in (
        ("--explain", options.explain),
        ("--plot", options.plot),
        ("--save", options.save),
        ("--plan", options.plan),
        ("--simulate", options.simulate),
        ("--pin", options.pin),
        ("--exclude", options.exclude),
        ("--team", options.team),
        ("--objective", options.objective not in (None, "latency")),
    ):
        if asked:
            raise UsageError(f"{name} does not go with --formulation dilemma: drop one of them")
    instance = dilemma.measured_instance(problem)
    repairs = dilemma.Repairs.of(repairs_of(options))
    with screen.progress() as on_step:
        on_step(_step("plan", "", 0, 0))
        solution = dilemma.solve(instance, repairs, time_limit_s=options.time_limit)
    if options.json:
        screen.json(
            {
                "formulation": "dilemma",
                "repairs": list(repairs_of(options)),
                "figures": "predicted from described devices",
                "times": times,
                "objective_ms": solution.objective_s * 1e3,
                "with_every_transfer_ms": (
                    None if solution.honest_s is None else solution.honest_s * 1e3
                ),
                "proven_optimal": solution.proven_optimal,
                "solver": solution.solver,
                "choices": [
                    {
                        "block": choice.layer,
                        "name": problem.spec.block_name(choice.layer),
                        "device": instance.devices[choice.device],
                        "bits": choice.bits,
                    }
                    for choice in solution.choices
                ],
            }
        )
    else:
        show_dilemma(screen, problem.spec, instance, solution, repairs_of(options), times)


def _given_or_best(
    options: argparse.Namespace,
    screen: Screen,
    problem: PlanningProblem,
    given: SavedPlan | None,
    sources: Sequence[LossSource],
) -> Plan:
    """The plan of --plan, else the best one. ``sources``: where the losses come from."""
    from planning.losses import with_assumed
    from planning.plan import InfeasiblePlan

    if given is not None:
        return _compared(options, screen, given.to_plan(problem), problem)
    try:
        return _solve(options, screen, problem)
    except InfeasiblePlan as error:
        raise with_assumed(error, sources) from None


def _compared(
    options: argparse.Namespace, screen: Screen, plan: Plan, problem: PlanningProblem
) -> Plan:
    """Tell the user how far a plan of --plan is from the best. Other plans stay as they are."""
    from planning.plan import PlanError

    if not options.plan:
        return plan
    try:
        best = _solve(options, screen, problem)
    except PlanError:
        return plan
    screen.note(
        f"{options.plan} fits; its predicted objective is {plan.value_text},"
        f" the best plan found has {best.value_text}"
    )
    return replace(plan, proof=best.proof)


def _solve(options: argparse.Namespace, screen: Screen, problem: PlanningProblem) -> Plan:
    from planning.planner import solve

    with screen.progress() as on_step:
        on_step(_step("plan", "", 0, 0))
        return solve(problem, time_limit_s=options.time_limit)


def _step(phase: str, label: str, done: int, total: int) -> dict[str, Any]:
    return {"phase": phase, "label": label, "done": done, "total": total, "unit": "steps"}
