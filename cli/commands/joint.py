"""``shoal plan A B``: plans of several models on the same devices."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.commands.described import Described, read_described
from cli.commands.joint_views import show_joint, show_joint_explanation
from cli.commands.model_names import locate, model_to_plan
from cli.commands.plan_arguments import request_of
from cli.commands.plan_losses import measured_loss
from cli.commands.plan_views import loss_text, show_weights
from cli.errors import CommandFailed, UsageError
from cli.render import Screen

if TYPE_CHECKING:
    from cli.client import Client
    from planning.joint.compare import JointExplanation, Turn
    from planning.joint.plan import JointPlan
    from planning.joint.problem import JointProblem
    from planning.plan import Plan

EXPLAIN_LIMIT_S = 60.0
MOST_MODELS = 8
MAX_CHECKS = 8
"""The most joint plans that are measured to keep the models' budgets."""


def weights_of(options: argparse.Namespace, count: int) -> tuple[float, ...]:
    """The weights of --weights, one for each model. Raises UsageError."""
    weights: tuple[float, ...] = options.weights or (1.0,) * count
    if len(weights) != count:
        raise UsageError(f"--weights has {len(weights)} numbers for {count} models")
    return weights


def run_offline_joint(options: argparse.Namespace, screen: Screen) -> None:
    """Run ``shoal plan A B --devices LAB.yaml``, without a coordinator. Raises CommandFailed."""
    from model.errors import ModelError
    from planning.labs.lab import LabError, times_of
    from planning.plan import PlanError
    from planning.request import model_name

    _check(options)
    try:
        with _several(options, screen) as each:
            described = [read_described(one, screen) for one in each]
            names = [model_name(Path(one.model).absolute()) for one in each]
        problem = _problem(options, names, described)
        plan = _best(options, screen, problem, described)
        explanation = None
        if options.explain:
            plan, explanation = _explained(screen, problem, plan)
        members = [one.device for own in plan.plans for s in own.stages for one in s.members]
        shown = Shown(
            problem,
            plan,
            [one.slots for one in described],
            [one.context_tokens for one in described],
            [asdict(times_of(one.lab, one.spec, members)) for one in described],
            [
                one.losses.quality(kl)
                for one, kl in zip(described, _measured(screen, described, plan), strict=True)
            ],
        )
        write_files(options, screen, shown)
        answer = shown.answer() | {
            "devices_file": str(options.devices),
            "figures": "predicted from described devices",
        }
        if explanation is not None:
            answer["explanation"] = explanation.to_dict()
        if options.json:
            screen.json(answer)
            return
        show_joint(
            screen, answer, f"plans for {' and '.join(names)}, predicted from {options.devices}"
        )
        for name, total, quality in zip(names, shown.losses(), shown.qualities, strict=True):
            if quality is not None and total is not None:
                screen.out.print(
                    f"{name}: {loss_text(total, quality)}", soft_wrap=True, markup=False
                )
        if explanation is not None:
            show_joint_explanation(screen, names, explanation, plan)
    except (LabError, ModelError, PlanError, ValueError) as error:
        raise CommandFailed(str(error)) from error


def _explained(
    screen: Screen, problem: JointProblem, plan: JointPlan
) -> tuple[JointPlan, JointExplanation]:
    """Compare with plans made one after the other. Return the better plan, and what is shared."""
    from planning.joint.compare import JointExplanation, better_of, shared_devices

    turns = _turns(screen, problem)
    plan = better_of(plan, turns)
    return plan, JointExplanation(shared_devices(problem, plan), turns)


def run_live_joint(options: argparse.Namespace, screen: Screen, client: Client) -> None:
    """Run ``shoal plan A B`` with the coordinator's measurements. Raises CommandFailed."""
    from planning.joint.compare import JointExplanation, shared_devices
    from planning.plan import PlanError

    asked = bool(options.explain or options.plot or options.save)
    request = _live_request(options, screen, client, weights=False, with_problem=asked)
    with screen.progress() as on_step:
        answer = client.operate("/shoal/v1/plan", request, on_step)
    explanation = None
    if asked:
        problems = [entry.pop("problem") for entry in answer["models"]]
        try:
            problem, plan = _read_joint(answer, problems, request["weights"])
            slots = [entry["plan"]["slots"] for entry in answer["models"]]
            contexts = [entry["context_tokens"] for entry in answer["models"]]
            if options.explain:
                turns = _turns(screen, problem)
                explanation = JointExplanation(shared_devices(problem, plan), turns)
            write_files(
                options, screen, Shown(problem, plan, slots, contexts, ids=answer.get("ids"))
            )
        except (PlanError, ValueError) as error:
            raise CommandFailed(str(error)) from error
        if explanation is not None:
            answer["explanation"] = explanation.to_dict()
    _show_live(options, screen, answer, "predicted plans for")
    if explanation is not None and not options.json:
        show_joint_explanation(screen, plan.names, explanation, plan)


def _read_joint(
    answer: Mapping[str, Any], problems: Sequence[Any], weights: Sequence[float]
) -> tuple[JointProblem, JointPlan]:
    """The coordinator's problem and plan, verified. Raises PlanError, ValueError."""
    from planning.joint.plan import assess_joint, verify_joint
    from planning.joint.problem import JointProblem
    from planning.plan import Plan, Proof
    from planning.problem import PlanningProblem

    entries = answer["models"]
    problem = JointProblem(
        tuple(entry["model"] for entry in entries),
        tuple(map(PlanningProblem.from_dict, problems)),
        tuple(weights),
    )
    names = [item.name for item in fields(Plan)]
    plans = [Plan.from_dict({name: entry["plan"][name] for name in names}) for entry in entries]
    bound = answer["planned_mean_s"] * (1 - answer["gap"])
    plan = assess_joint(problem, plans, Proof(answer["solver"], answer["solve_s"], bound))
    verify_joint(plan, problem)
    return problem, plan


def _turns(screen: Screen, problem: JointProblem) -> tuple[Turn, ...]:
    """The plans that loading the models one after the other would give, by order."""
    from planning.joint.compare import one_after_the_other

    with screen.progress() as on_step:
        return one_after_the_other(
            problem,
            time_limit_s=EXPLAIN_LIMIT_S,
            on_trial=lambda what, done, total: on_step(_step("trying orders", what, done, total)),
        )


def run_live_load(options: argparse.Namespace, screen: Screen, client: Client) -> None:
    """Run ``shoal load A B``: plan the models together and load all of them."""
    request = _live_request(options, screen, client, weights=True)
    request["replaces"] = options.replace
    for one in request["models"]:
        one["weight"] = options.weight
        one["keep_s"] = options.keep
        one["generation_defaults"] = options.generation_defaults
    with screen.progress() as on_step:
        answer = client.operate("/shoal/v1/load", request, on_step)
    _show_live(options, screen, answer, "loaded:")


def _live_request(
    options: argparse.Namespace,
    screen: Screen,
    client: Client,
    *,
    weights: bool,
    with_problem: bool = False,
) -> dict[str, Any]:
    """The request for all models, with their plans in --plan. Raises UsageError, CommandFailed."""
    from planning.plan import PlanError
    from planning.request import model_name

    if options.draft is not None or options.draft_bits is not None:
        raise UsageError("--draft is for one model: load the models one by one, each with its own")
    _check(options)
    try:
        saved = {} if options.plan is None else _saved(options.plan)
        if options.plan is not None and options.weights is None:
            options.weights = _saved_weights(options.plan)
    except PlanError as error:
        raise CommandFailed(str(error)) from error
    several = []
    names = []
    for model in options.models:
        own = argparse.Namespace(**{**vars(options), "model": model, "shape": None, "plan": None})
        request_of(own)  # Wrong arguments are told before a model is fetched.
        locate(own, client, screen, weights=weights)
        names.append(model_name(request_of(own).model))
        request = request_of(own, with_problem=with_problem, saved=saved.get(names[-1]))
        several.append(request.to_dict())
    if saved and sorted(saved) != sorted(names):
        raise UsageError(
            f"{options.plan} has plans of {', '.join(saved)}, not of {', '.join(names)}"
        )
    given = weights_of(options, len(several))
    if saved and options.weights is not None and list(saved) != names:
        given = tuple(dict(zip(saved, given, strict=True))[name] for name in names)
    return {"models": several, "weights": list(given)}


def _show_live(
    options: argparse.Namespace, screen: Screen, answer: Mapping[str, Any], words: str
) -> None:
    if options.json:
        screen.json(answer)
        return
    names = [entry["model"] for entry in answer["models"]]
    show_joint(screen, answer, f"{words} {' and '.join(names)}")
    for entry in answer["models"]:
        show_weights(screen, entry)
        total, quality = entry["plan"]["total_sensitivity"], entry.get("quality")
        if quality is not None and total is not None:
            line = f"{entry['model']}: {loss_text(total, quality)}"
            screen.out.print(line, soft_wrap=True, markup=False)


@dataclass(frozen=True, slots=True)
class Shown:
    """A joint plan with what is needed to show it. Rows are one per model."""

    problem: JointProblem
    plan: JointPlan
    slots: Sequence[int]
    context_tokens: Sequence[int]
    times: Sequence[Mapping[str, Any]] = ()
    qualities: Sequence[Mapping[str, Any] | None] = ()
    ids: Mapping[str, str] | None = None

    def losses(self) -> list[float | None]:
        return [plan.total_sensitivity for plan in self.plan.plans]

    def answer(self) -> dict[str, Any]:
        """The plan as JSON."""
        from planning.joint.view import describe_joint

        answer = describe_joint(self.problem, self.plan, self.slots)
        for at, entry in enumerate(answer["models"]):
            entry["context_tokens"] = self.context_tokens[at]
            if self.times:
                entry["times"] = self.times[at]
            if self.qualities and self.qualities[at] is not None:
                entry["quality"] = self.qualities[at]
        return answer


def write_files(options: argparse.Namespace, screen: Screen, shown: Shown) -> None:
    """Save and draw the plan as asked. Raises OSError."""
    from planning.joint.problem import device_names
    from planning.joint.saved import plans_text
    from planning.joint.view import joint_svg

    plan, problem = shown.plan, shown.problem
    if options.save:
        text = plans_text(
            plan,
            problem.weights,
            slots=shown.slots,
            context_tokens=shown.context_tokens,
            devices=shown.ids,
        )
        options.save.write_text(text, encoding="utf-8")
        screen.note(f"saved to {options.save}")
    if options.plot:
        title = "this shoal" if options.devices is None else options.devices.name
        specs = [one.spec for one in problem.problems]
        picture = joint_svg(plan, specs, title, device_names(problem.problems[0]))
        options.plot.write_text(picture, encoding="utf-8")
        screen.note(f"drawn to {options.plot}")


def _check(options: argparse.Namespace) -> None:
    """Raise UsageError for options that are for one model."""
    count = len(_given(options))
    if count > MOST_MODELS:
        raise UsageError(f"{count} models: at most {MOST_MODELS} are planned together")
    weights_of(options, count)
    for name, asked in (
        ("--simulate", getattr(options, "simulate", None)),
        ("--formulation dilemma", getattr(options, "formulation", "") == "dilemma"),
        ("--pin", options.pin),
        ("--sensitivities", options.sensitivities),
        ("--check-quality", options.check_quality),
        ("--adapter", getattr(options, "adapter", None)),
        ("--migration-weight", options.migration_weight),
    ):
        if asked:
            raise UsageError(f"{name} is for one model: drop it, or plan one model")


def _given(options: argparse.Namespace) -> list[tuple[str | None, str | None]]:
    """(model, shape) of each model, as the user gave them."""
    shapes = getattr(options, "shape", None) or ()
    return [(model, None) for model in options.models] + [(None, shape) for shape in shapes]


@contextmanager
def _several(options: argparse.Namespace, screen: Screen) -> Iterator[list[argparse.Namespace]]:
    """Options of each model alone, with the path of its folder, for the block's time."""
    with ExitStack() as stack:
        found = []
        for model, shape in _given(options):
            # A plan of --plan is one of all models, or of some that stay as they are.
            own = argparse.Namespace(
                **{**vars(options), "model": model, "shape": shape, "plan": None}
            )
            stack.enter_context(model_to_plan(own, screen))
            found.append(own)
        yield found


def _problem(
    options: argparse.Namespace, names: Sequence[str], described: Sequence[Described]
) -> JointProblem:
    """The problem of all models. Those with a plan in --plan stay as it says. Raises PlanError."""
    from planning.joint.problem import JointProblem

    problems = tuple(one.problem for one in described)
    fixed: list[Plan | None] = [None] * len(names)
    if options.plan is not None:
        known = _saved(options.plan)
        strange = sorted(set(known) - set(names))
        if strange:
            raise CommandFailed(
                f"{options.plan} has a plan of {strange[0]}: it is planned with {', '.join(names)}"
            )
        fixed = [
            known[name].to_plan(one) if name in known else None
            for name, one in zip(names, problems, strict=True)
        ]
    return JointProblem(tuple(names), problems, weights_of(options, len(names)), tuple(fixed))


def _saved(path: Path) -> dict[str, Any]:
    """Plans of a file by model, whether it is of one model or of several. Raises PlanError."""
    from planning.joint.saved import holds_several, read_plans
    from planning.saved import read_plan

    plans = read_plans(path).plans if holds_several(path) else (read_plan(path),)
    return {plan.model: plan for plan in plans}


def _saved_weights(path: Path) -> tuple[float, ...] | None:
    """The weights of a file of several plans, in its order. Raises PlanError."""
    from planning.joint.saved import holds_several, read_plans

    return read_plans(path).weights if holds_several(path) else None


def _best(
    options: argparse.Namespace,
    screen: Screen,
    problem: JointProblem,
    described: Sequence[Described],
) -> JointPlan:
    """The best joint plan whose models lose no more than they may, where that can be measured."""
    from planning.joint.planner import solve_joint
    from planning.losses import with_assumed
    from planning.plan import InfeasiblePlan, PlanError
    from planning.sensitivity import tightened, whole_loss

    for attempt in range(MAX_CHECKS):
        try:
            with screen.progress() as on_step:
                plan = solve_joint(
                    problem,
                    time_limit_s=options.time_limit,
                    on_progress=lambda what: on_step(_step("plan", what, 0, 0)),
                )
        except InfeasiblePlan as error:
            if attempt:  # Its advice is about tighter budgets, which nobody gave.
                break
            sources = [source for one in described for source in one.losses.sources]
            raise with_assumed(error, sources) from None
        problems = list(problem.problems)
        for m, kl in enumerate(_measured(screen, described, plan)):
            own, budget = described[m].problem, described[m].problem.quality_budget
            if kl is None or budget is None:
                continue
            total = whole_loss(own, plan.plans[m], kl)
            if total > budget:
                if problem.fixed[m] is not None:
                    raise PlanError(
                        f"{problem.names[m]} loses {total:.3g} nats as it is, above {budget:g}"
                    )
                problems[m] = tightened(own, plan.plans[m], total)
        if tuple(problems) == problem.problems:
            return plan
        problem = replace(problem, problems=tuple(problems))
    raise PlanError("the plans lose more than their budgets: raise them, or allow more bits")


def _measured(
    screen: Screen, described: Sequence[Described], plan: JointPlan
) -> list[float | None]:
    """Each plan's loss, measured; None where it cannot be, or where nothing bounds it."""
    return [
        measured_loss(screen, one.losses, own)
        for one, own in zip(described, plan.plans, strict=True)
    ]


def _step(phase: str, label: str, done: int, total: int) -> dict[str, Any]:
    return {"phase": phase, "label": label, "done": done, "total": total, "unit": "steps"}
