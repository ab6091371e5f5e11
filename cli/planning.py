"""What ``shoal plan`` does beyond asking a coordinator: described testbeds, files, explanations.

``add_planning_arguments`` and ``run_offline_plan`` are wired up in cli.main. Figures made from a
described testbed are predictions from what its file says, and are labelled so.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.markup import escape
from rich.table import Table

from cli.errors import CommandFailed, UsageError
from cli.render import Screen
from wire.sizes import format_size

if TYPE_CHECKING:
    from coordinator.dilemma import Instance, Solution
    from coordinator.explain import Explanation, Kind
    from coordinator.lab import Lab, Sensitivities
    from coordinator.plan import Plan
    from coordinator.plan_file import Change, SavedPlan
    from coordinator.problem import Objective, PlanningProblem
    from coordinator.study import DilemmaStudy, Simulation
    from model.quantize import Format
    from model.spec import ModelSpec

EXPLAIN_LIMIT_S = 60.0
"""What all trials of an explanation may take together."""
SOLVE_AGAIN_LIMIT_S = 5.0

_PIN = re.compile(r"(embedding|head|layers?=(\d{1,4})(?:-(\d{1,4}))?):(.+)", re.ASCII)


# ---- arguments ---------------------------------------------------------------------------------


def add_planning_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``shoal plan`` that need no coordinator."""
    parser.add_argument(
        "--devices",
        type=Path,
        metavar="LAB.yaml",
        help="plan for described devices, without agents",
    )
    parser.add_argument(
        "--explain", action="store_true", help="where the time goes and what each change would give"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw the plan")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the plan, to edit or load")
    parser.add_argument("--plan", type=Path, metavar="FILE", help="take this plan, verified")
    parser.add_argument(
        "--simulate", type=_count, metavar="N", help="draw the links' speeds anew N times"
    )
    parser.add_argument("--seed", type=int, default=0, help="of --simulate; default 0")
    parser.add_argument(
        "--formulation",
        choices=("shoal", "dilemma"),
        default="shoal",
        help="dilemma: the paper's integer program (with --devices)",
    )
    parser.add_argument(
        "--repair",
        type=_repairs,
        default=("2c", "2d", "2e", "2f", "cm"),
        metavar="2c,2d,2e,2f,cm",
        help="what to repair in the paper's program, or 'none'; default: all",
    )


def add_objective_arguments(parser: argparse.ArgumentParser) -> None:
    """What to minimise, and what the user has decided already."""
    parser.add_argument(
        "--objective", choices=("latency", "throughput", "request"), default="latency"
    )
    parser.add_argument(
        "--prompt-tokens", type=_count, default=256, metavar="N", help="of --objective request"
    )
    parser.add_argument(
        "--output-tokens", type=_count, default=128, metavar="N", help="of --objective request"
    )
    parser.add_argument(
        "--pin",
        type=_pin,
        action="append",
        default=[],
        metavar="layers=0-5:NAME",
        help="these blocks on this device; also embedding:NAME, head:NAME",
    )
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="NAME", help="plan without this device"
    )
    parser.add_argument(
        "--quality-budget",
        type=_budget,
        metavar="KL",
        help="bound on the sum of all blocks' KL divergence, nats per token",
    )
    parser.add_argument(
        "--sensitivities",
        type=Path,
        metavar="FILE",
        help="what calibrate printed for the model with --json",
    )


def add_diff_arguments(parser: argparse.ArgumentParser) -> None:
    """The two files of a comparison."""
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")


def add_study_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``shoal study dilemma`` takes."""
    parser.add_argument("study", choices=("dilemma",))
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the figures there as SVG")
    parser.add_argument("--runs", type=_count, default=100, metavar="N", help="default 100")
    parser.add_argument("--seed", type=int, default=0, help="default 0")


def objective_of(options: argparse.Namespace) -> Objective:
    """The planner's objective that the arguments ask for."""
    from coordinator.problem import Objective

    if options.objective == "request":
        return Objective("request", options.prompt_tokens, options.output_tokens)
    return Objective(options.objective)


def wishes_of(options: argparse.Namespace) -> dict[str, Any]:
    """What the arguments ask of a live plan, as the coordinator's API takes it.

    Raises UsageError, CommandFailed.
    """
    wishes: dict[str, Any] = {
        "objective": asdict(objective_of(options)),
        "exclude": options.exclude,
        "quality_budget": options.quality_budget,
    }
    if not options.pin and options.quality_budget is None and options.sensitivities is None:
        return wishes
    from coordinator.lab import LabError
    from model.errors import ModelError
    from model.families import load_spec

    try:
        spec = load_spec(Path(options.model))
        wishes["pins"] = {str(block): name for block, name in pins_of(options, spec).items()}
        known_kl = _sensitivities(options, spec)
    except (LabError, ModelError) as error:
        raise CommandFailed(str(error)) from error
    if known_kl is not None:
        wishes["sensitivities"] = [
            {str(bits): kl for bits, kl in row.items()} for row in known_kl.kl
        ]
    return wishes


def pins_of(options: argparse.Namespace, spec: ModelSpec) -> dict[int, str]:
    """Block to device name. Raises UsageError for layers that the model does not have."""
    pins: dict[int, str] = {}
    for first, last, device in options.pin:
        if isinstance(first, str):
            blocks = range(1) if first == "embedding" else range(spec.head_block, spec.block_count)
        else:
            if last >= len(spec.layers):
                raise UsageError(f"--pin: the model has layers 0 to {len(spec.layers) - 1}")
            blocks = range(first + 1, last + 2)
        for block in blocks:
            if pins.setdefault(block, device) != device:
                raise UsageError(f"--pin: {spec.block_name(block)} is pinned to two devices")
    return pins


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number above 0")
    return int(text)


def _budget(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number >= 0")
    return value


def _pin(text: str) -> tuple[int | str, int, str]:
    """First and last layer, or the name of another block, and the device."""
    match = _PIN.fullmatch(text)
    if match is None or (match[3] is not None and int(match[3]) < int(match[2])):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected layers=0-5:NAME, embedding:NAME or head:NAME"
        )
    if match[2] is None:
        return match[1], 0, match[4]
    return int(match[2]), int(match[3] or match[2]), match[4]


def _repairs(text: str) -> tuple[str, ...]:
    known = ("2c", "2d", "2e", "2f", "cm")
    parts = () if text == "none" else tuple(text.split(","))
    if any(part not in known for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: expected some of {','.join(known)}, or none")
    return parts


# ---- commands ----------------------------------------------------------------------------------


def run_offline_plan(options: argparse.Namespace, screen: Screen) -> None:
    """``shoal plan MODEL --devices LAB.yaml``: no coordinator, no agent. Raises CommandFailed."""
    from coordinator.fleet import DEFAULT_CONTEXT_TOKENS
    from coordinator.lab import LabError, lab_problem, read_lab
    from coordinator.plan import PlanError
    from model.errors import ModelError
    from model.families import load_spec
    from model.quantize import Format

    model = Path(options.model)
    try:
        lab = read_lab(options.devices)
        spec = load_spec(model)
        known = {width for device in lab.devices for width in device.bits}
        formats = {
            bits: Format.of(bits, options.scheme, options.group_size)
            for bits in sorted(known | set(options.bits or ()))
        }
        errors: Sequence[Mapping[int, float]] | None
        known_kl = _sensitivities(options, spec)
        if known_kl is not None:
            errors, bound = known_kl.weight_errors, options.max_weight_error
            rounding = [device.name for device in lab.devices if device.on_chip_bytes is not None]
            if rounding:
                screen.note(
                    f"{', '.join(rounding)} rounds activations too: {options.sensitivities} must"
                    " come from `shoal calibrate --quality --backend tflite_cpu`"
                )
        else:
            errors, bound = _weight_errors(options, model, formats, screen)
        context_tokens = min(options.context or DEFAULT_CONTEXT_TOKENS, spec.max_context)
        problem = lab_problem(
            lab,
            spec,
            bits=options.bits,
            formats=formats,
            context_tokens=context_tokens,
            weight_errors=errors,
            max_weight_error=bound,
            sensitivities=None if known_kl is None else known_kl.kl,
            quality_budget=options.quality_budget,
            objective=objective_of(options),
            pins=pins_of(options, spec),
            excluded=options.exclude,
        )
        if options.formulation == "dilemma":
            _run_dilemma(options, screen, problem)
        else:
            _run_plan(options, screen, lab, problem, context_tokens)
    except (LabError, ModelError, PlanError, ValueError) as error:
        raise CommandFailed(str(error)) from error


def require_devices(options: argparse.Namespace) -> None:
    """Refuse options that only work on described devices. Raises UsageError."""
    for name, asked in (
        ("--explain", options.explain),
        ("--plot", options.plot),
        ("--save", options.save),
        ("--plan", options.plan),
        ("--simulate", options.simulate),
        ("--formulation dilemma", options.formulation == "dilemma"),
    ):
        if asked and options.devices is None:
            raise UsageError(f"{name} needs --devices LAB.yaml")


def run_plan_diff(options: argparse.Namespace, screen: Screen) -> None:
    """Compare two saved plans. Raises CommandFailed."""
    from coordinator.plan import PlanError
    from coordinator.plan_file import difference, read_plan

    try:
        before, after = read_plan(options.before), read_plan(options.after)
        changes = difference(before, after)
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
                "predicted": {"before": dict(before.predicted), "after": dict(after.predicted)},
            }
        )
    else:
        _show_difference(screen, before, after, changes)


def run_study(options: argparse.Namespace, screen: Screen) -> None:
    """``shoal study dilemma``: Table 1 and figures 3, 5, 6 of the paper. Raises CommandFailed."""
    from coordinator.plan import PlanError
    from coordinator.study import study_dilemma

    try:
        with screen.progress() as on_step:
            study = study_dilemma(
                runs=options.runs,
                seed=options.seed,
                on_step=lambda what, done, total: on_step(_step(what, "", done, total)),
            )
    except PlanError as error:
        raise CommandFailed(str(error)) from error
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        for name, text in study.figures().items():
            (options.out / name).write_text(text, encoding="utf-8")
            screen.note(f"drawn to {options.out / name}")
    if options.json:
        screen.json(study.to_dict())
    else:
        show_study(screen, study)


def write_plot(path: Path, plan: Plan, spec: ModelSpec, title: str, devices: Sequence[str]) -> None:
    """Draw a plan over the named devices. Raises OSError."""
    from coordinator.picture import plan_svg

    used = {stage.device for stage in plan.stages}
    unused = [name for name in devices if name not in used]
    path.write_text(plan_svg(plan, spec, title, unused), encoding="utf-8")


def save_plan(path: Path, plan: Plan, model: str) -> None:
    """Write a plan to edit, compare and load. Raises OSError."""
    from coordinator.plan_file import plan_text

    path.write_text(plan_text(plan, model), encoding="utf-8")


# ---- steps -------------------------------------------------------------------------------------


def _sensitivities(options: argparse.Namespace, spec: ModelSpec) -> Sensitivities | None:
    from coordinator.lab import read_sensitivities

    if options.sensitivities is None:
        if options.quality_budget is not None:
            raise UsageError("--quality-budget needs --sensitivities FILE: run calibrate first")
        return None
    found = read_sensitivities(options.sensitivities, spec)
    asked = {"scheme": options.scheme, "group_size": options.group_size}
    for key, value in found.form.items():
        if value != asked[key]:
            raise UsageError(
                f"{options.sensitivities} was measured with {key} {value}:"
                f" plan with --{key.replace('_', '-')} {value}, or calibrate anew"
            )
    return found


def _weight_errors(
    options: argparse.Namespace, model: Path, formats: Mapping[int, Format], screen: Screen
) -> tuple[Sequence[Mapping[int, float]] | None, float | None]:
    """Errors of each block and their bound; none where there are no weights to measure."""
    from coordinator.artifacts import ArtifactStore
    from coordinator.config import default_state_dir
    from model.checkpoint import Checkpoint

    if options.max_weight_error is None:
        return None, None
    if not any(model.glob("*.safetensors")):
        screen.note(
            f"{model} has no weights: their errors are not known, and --max-weight-error"
            f" {options.max_weight_error:g} is not applied"
        )
        return None, None
    store = ArtifactStore(default_state_dir())
    store.prepare()
    with screen.progress() as on_step:
        errors = store.weight_errors(
            Checkpoint.open(model),
            formats.values(),
            lambda done, total: on_step(_step("weight errors", "", done, total)),
            lambda: False,
        )
    return errors, options.max_weight_error


def _run_plan(
    options: argparse.Namespace,
    screen: Screen,
    lab: Lab,
    problem: PlanningProblem,
    context_tokens: int,
) -> None:
    from coordinator.admin_api import describe_plan
    from coordinator.explain import explain
    from coordinator.idle import idle_reasons
    from coordinator.study import simulate

    model = Path(options.model).absolute().name
    plan = _given_or_best(options, screen, problem)
    explanation: Explanation | None = None
    simulation: Simulation | None = None
    with screen.progress() as on_step:
        if options.explain:
            explanation = explain(
                plan,
                problem,
                watts=lab.watts,
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
                seed=options.seed,
                solve_limit_s=SOLVE_AGAIN_LIMIT_S,
                on_run=lambda done, total: on_step(_step("drawing links", "", done, total)),
            )
    if options.save:
        save_plan(options.save, plan, model)
        screen.note(f"saved to {options.save}")
    if options.plot:
        names = [device.name for device in problem.devices]
        write_plot(options.plot, plan, problem.spec, f"{model} on {options.devices.name}", names)
        screen.note(f"drawn to {options.plot}")
    described = describe_plan(problem.spec, plan)
    if options.json:
        answer: dict[str, Any] = {
            "model": model,
            "devices": str(options.devices),
            "figures": "predicted from described devices",
            "context_tokens": context_tokens,
            "plan": described,
        }
        if explanation is not None:
            answer["explanation"] = explanation.to_dict()
            answer["idle"] = idle_reasons(plan, problem)
        if simulation is not None:
            answer["simulation"] = simulation.to_dict()
        screen.json(answer)
        return
    screen.plan(described, f"plan for {model}, predicted from {options.devices}")
    if plan.total_sensitivity is not None:
        screen.out.print(f"predicted KL divergence: {plan.total_sensitivity:.3g} nats per token")
    if explanation is not None:
        show_explanation(screen, explanation)
        for line in idle_reasons(plan, problem):
            screen.out.print(escape(line))
    if simulation is not None:
        show_simulation(screen, simulation)


def _run_dilemma(options: argparse.Namespace, screen: Screen, problem: PlanningProblem) -> None:
    """The paper's program on the described costs: blocks are its layers."""
    from coordinator import dilemma

    for name, asked in (
        ("--explain", options.explain),
        ("--plot", options.plot),
        ("--save", options.save),
        ("--plan", options.plan),
        ("--simulate", options.simulate),
        ("--pin", options.pin),
        ("--exclude", options.exclude),
        ("--objective", options.objective != "latency"),
    ):
        if asked:
            raise UsageError(f"{name} does not go with --formulation dilemma: drop one of them")
    instance = dilemma.measured_instance(problem)
    repairs = dilemma.Repairs.of(options.repair)
    with screen.progress() as on_step:
        on_step(_step("plan", "", 0, 0))
        solution = dilemma.solve(instance, repairs, time_limit_s=options.time_limit)
    if options.json:
        screen.json(
            {
                "formulation": "dilemma",
                "repairs": list(options.repair),
                "figures": "predicted from described devices",
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
        _show_dilemma(screen, problem.spec, instance, solution, options.repair)


def _given_or_best(options: argparse.Namespace, screen: Screen, problem: PlanningProblem) -> Plan:
    """The plan of --plan, else the best; a given one is told how far from the best it is."""
    from coordinator.plan import PlanError
    from coordinator.plan_file import read_plan
    from coordinator.planner import solve

    given = read_plan(options.plan).to_plan(problem) if options.plan else None
    try:
        with screen.progress() as on_step:
            on_step(_step("plan", "", 0, 0))
            best = solve(problem, time_limit_s=options.time_limit)
    except PlanError:
        if given is None:
            raise
        return given
    if given is None:
        return best
    screen.note(
        f"{options.plan} fits; its predicted objective is {given.value_s * 1e3:.2f} ms,"
        f" the best plan found has {best.value_s * 1e3:.2f} ms"
    )
    return replace(given, proof=best.proof)


def _step(phase: str, label: str, done: int, total: int) -> dict[str, Any]:
    return {"phase": phase, "label": label, "done": done, "total": total, "unit": "steps"}


# ---- tables ------------------------------------------------------------------------------------


def show_explanation(screen: Screen, explanation: Explanation) -> None:
    """Where a token's time goes, then one line per change that was tried."""
    from coordinator.explain import change_text
    from coordinator.plan_file import bits_text

    table = _table("where a token's predicted time goes")
    table.add_column("device", no_wrap=True)
    table.add_column("bits", overflow="fold", min_width=6)
    columns = ["compute ms", "hop ms", "share", "memory"]
    optional = [
        ("worst error", "1e", [stage.worst_weight_error for stage in explanation.stages]),
        ("KL", "3g", [stage.sensitivity for stage in explanation.stages]),
        ("J", "2f", [stage.energy_j for stage in explanation.stages]),
    ]
    # What is known of no stage takes no room.
    known = [column for column in optional if any(value is not None for value in column[2])]
    for name in [*columns, *(name for name, _, _ in known)]:
        table.add_column(name, justify="right", no_wrap=True)
    for index, stage in enumerate(explanation.stages):
        used = stage.memory_bytes / stage.memory_limit_bytes
        table.add_row(
            escape(stage.device),
            bits_text(stage.bits),
            f"{stage.compute_s * 1e3:.2f}",
            f"{stage.hop_s * 1e3:.2f}",
            f"{stage.share:.0%}",
            f"{format_size(stage.memory_bytes)} ({used:.0%})",
            *(
                "-" if values[index] is None else format(values[index], f".{style}")
                for _, style, values in known
            ),
        )
    screen.out.print(table)
    screen.out.print(f"bottleneck: {escape(explanation.bottleneck)}")
    screen.out.print(f"pipelined: {escape(explanation.pipeline_bottleneck)}")
    screen.out.print("\nsolved again with one thing changed:")
    telling = [item for item in explanation.marginals if item.change != 0.0]
    for item in telling:
        screen.out.print(f"  {escape(str(item))}")
    # What makes no difference takes one line per kind, however many there are.
    same: dict[tuple[Kind, str], list[str]] = {}
    for item in explanation.marginals:
        if item.change == 0.0:
            same.setdefault((item.kind, item.nothing), []).append(item.subject)
    for (kind, verdict), subjects in same.items():
        subject = subjects[0] if len(subjects) == 1 else f"any one of {', '.join(subjects)}"
        screen.out.print(f"  {escape(change_text(kind, subject))}: {verdict}")
    if not explanation.complete:
        screen.out.print("  (time ended before all changes were tried)")


def show_simulation(screen: Screen, simulation: Simulation) -> None:
    """The spread over drawn link speeds."""
    table = _table(f"{simulation.kept.runs} draws of link speeds, predicted ms")
    table.add_column("plan")
    for column in ("lowest", "10 %", "median", "90 %", "highest"):
        table.add_column(column, justify="right", no_wrap=True)
    rows = [("this one, kept", simulation.kept), ("planned anew", simulation.replanned)]
    for label, spread in rows:
        if spread is not None:
            values = (spread.low, spread.tenth, spread.median, spread.ninetieth, spread.high)
            table.add_row(label, *(f"{value * 1e3:.2f}" for value in values))
    screen.out.print(table)
    screen.out.print(f"{simulation.distinct} different plans were best for some draw")
    if simulation.unproven:
        screen.out.print(f"{simulation.unproven} of them may not be the best: time ended")
    if simulation.unsolved:
        screen.out.print(f"{simulation.unsolved} draws found no plan within the time limit")


def _show_difference(
    screen: Screen, before: SavedPlan, after: SavedPlan, changes: Sequence[Change]
) -> None:
    if not changes:
        screen.out.print("the two plans place every block alike")
    else:
        table = _table(f"from {before.source} to {after.source}")
        for column in ("blocks", "before", "after"):
            table.add_column(column, no_wrap=True)
        for change in changes:
            one = change.last == change.first + 1
            table.add_row(
                str(change.first) if one else f"{change.first}-{change.last - 1}",
                escape(f"{change.before[0]} {change.before[1]} bit"),
                escape(f"{change.after[0]} {change.after[1]} bit"),
            )
        screen.out.print(table)
    old = before.predicted.get("ms_per_token")
    new = after.predicted.get("ms_per_token")
    if old and new:
        screen.out.print(
            f"as predicted when they were saved: {old:.2f} -> {new:.2f} ms per token"
            f" ({new / old - 1:+.1%})"
        )


def _show_dilemma(
    screen: Screen,
    spec: ModelSpec,
    instance: Instance,
    solution: Solution,
    repairs: Sequence[str],
) -> None:
    table = _table(f"the paper's program, repaired: {', '.join(repairs) or 'nothing'}")
    for column in ("blocks", "device", "bits"):
        table.add_column(column, no_wrap=True)
    runs = itertools.groupby(solution.choices, key=lambda choice: (choice.device, choice.bits))
    for (device, bits), run in runs:
        names = [spec.block_name(choice.layer) for choice in run]
        table.add_row(
            names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}",
            escape(instance.devices[device]),
            str(bits),
        )
    screen.out.print(table)
    proven = "optimal" if solution.proven_optimal else "not proven optimal"
    screen.out.print(
        f"objective: {solution.objective_s * 1e3:.2f} ms per token predicted, {proven},"
        f" by {solution.solver}"
    )
    if solution.honest_s is None:
        screen.out.print("this places some layers twice or never: no model runs like that")
    elif solution.honest_s > solution.objective_s * (1 + 1e-9):
        screen.out.print(
            f"with every transfer charged: {solution.honest_s * 1e3:.2f} ms"
            " (the objective leaves some out; repair 2f)"
        )


def show_study(screen: Screen, study: DilemmaStudy) -> None:
    """The bits of Table 1, then the figures' points."""
    table = _table("Table 1 with synthetic weights: computed, not measured")
    for column in ("delta", "bits", "paper", "ratio", "T, s"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in study.table:
        table.add_row(
            f"{row.delta:g}",
            ", ".join(map(str, row.bits)),
            str(row.paper_bits),
            f"{row.quantization_ratio:.2%}",
            f"{row.objective_s:.2f}",
        )
    screen.out.print(table)
    oddities = _table("one repair left out: four layers, four servers")
    for column in ("left out", "T, s", "with every transfer", "bits", "servers", "verdict"):
        oddities.add_column(column, overflow="fold")
    for oddity in study.oddities:
        figures = [
            "-" if value is None else f"{value:.2f}"
            for value in (oddity.objective_s, oddity.honest_s)
        ]
        bits = " ".join(map(str, oddity.bits))
        oddities.add_row(
            oddity.left_out, *figures, bits, str(oddity.servers or "-"), oddity.verdict
        )
    screen.out.print(oddities)
    for title, label, sweep, unit in (
        ("figure 5", "least Mbit/s", study.links, 1e6),
        ("figure 6", "clock GHz", study.clocks, 1e9),
    ):
        points = _table(f"{title}: T in s over {study.runs} runs")
        for column in (label, "10 %", "median", "90 %"):
            points.add_column(column, justify="right", no_wrap=True)
        for value, spread in zip(sweep.values, sweep.spreads, strict=True):
            drawn = (spread.tenth, spread.median, spread.ninetieth)
            points.add_row(f"{value / unit:g}", *(f"{figure:.2f}" for figure in drawn))
        screen.out.print(points)
    unproven = study.links.unproven + study.clocks.unproven
    verdict = "all proven optimal" if not unproven else f"{unproven} not proven optimal"
    screen.out.print(f"{verdict}, by {study.solver}")


def _table(title: str) -> Table:
    return Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
