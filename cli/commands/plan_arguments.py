"""The arguments of the planning commands, and the requests made from them."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli import argument_types
from cli.argument_types import argument, at_least_0, between
from cli.commands.bench import SHAPE_HELP
from cli.errors import CommandFailed, UsageError
from cli.render import Screen
from cli.shared_arguments import (
    adapter_of,
    add_adapter_argument,
    add_group_size_argument,
    add_scheme_argument,
    add_scheme_text_argument,
    scheme_text_of,
)
from model.quantize import BITS
from planning.problem import Objective
from planning.request import (
    DEFAULT_CONTEXT_TOKENS,
    DEFAULT_DRAFT_BITS,
    DEFAULT_TIME_LIMIT_S,
    THROUGHPUT_SLOTS,
)
from planning.request_fields import WEIGHT_EXPECTED, is_weight
from planning.sensitivity import DEFAULT_QUALITY_BUDGET, PAPER_MAX_WEIGHT_ERROR
from wire.activations import DEFAULT_HOP_BITS, HOP_BITS

if TYPE_CHECKING:
    from model.spec import ModelSpec
    from planning.labs.sensitivity_file import Sensitivities
    from planning.request import LoadRequest
    from planning.saved import SavedPlan

_PIN = re.compile(r"(embedding|head|layers?=(\d{1,4})(?:-(\d{1,4}))?):(.+)", re.ASCII)

_REPAIRS = ("2c", "2d", "2e", "2f", "cm")

_weight = argument(at_least_0, "a number >= 0")
_bound = argument(
    lambda text: math.inf if text == "none" else at_least_0(text), "a number >= 0, or none"
)
_seconds = argument(between(0.01, 3600), "seconds between 0.01 and 3600")


def add_planning_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``shoal plan`` that ``shoal load`` does not have."""
    parser.add_argument(
        "--devices",
        type=Path,
        metavar="LAB.yaml",
        help="Plan for the devices that this lab file describes. No coordinator is asked.",
    )
    parser.add_argument(
        "--shape",
        action="append",
        metavar="NAME",
        help=f"Plan a model without any files of it, for --devices. May be repeated. {SHAPE_HELP}",
    )
    parser.add_argument(
        "--explain",
        action="store_true",
        help="Show where the time goes, and what each change would give.",
    )
    parser.add_argument(
        "--plot", type=argument_types.svg_file, metavar="FILE.svg", help="Draw the plan."
    )
    parser.add_argument(
        "--save",
        type=argument_types.new_file,
        metavar="FILE",
        help="Write the plan to a file for --plan.",
    )
    parser.add_argument(
        "--simulate",
        type=argument_types.count,
        metavar="N",
        help="Draw the speeds of all links at random N times, and show how the plan's time varies.",
    )
    parser.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="The seed of --simulate. Default: 0.",
    )
    parser.add_argument(
        "--formulation",
        choices=("shoal", "dilemma"),
        default="shoal",
        help="The integer program to solve: shoal's, or the DILEMMA paper's. The paper's needs "
        "--devices. Default: %(default)s.",
    )
    parser.add_argument(
        "--repair",
        type=_repairs,
        metavar=",".join(_REPAIRS),
        help="Which faults of the paper's program to repair, or none. Default: all.",
    )


def require_used(options: argparse.Namespace) -> None:
    """Raise UsageError for an option of ``shoal plan`` that would change nothing."""
    if options.repair is not None and options.formulation != "dilemma":
        raise UsageError("--repair goes with --formulation dilemma")
    if options.seed is not None and options.simulate is None:
        raise UsageError("--seed goes with --simulate N")


def repairs_of(options: argparse.Namespace) -> tuple[str, ...]:
    """The faults of the paper's program to repair."""
    return _REPAIRS if options.repair is None else tuple(options.repair)


def add_objective_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the objective and the wishes about the plan."""
    parser.add_argument(
        "--objective",
        choices=("latency", "throughput", "request", "energy"),
        help="What to minimise. request: the time of a prompt and its answer. latency: the time of "
        "a token. throughput: the slowest stage's time. energy: the joules of a token. "
        "Default: request.",
    )
    parser.add_argument(
        "--slots",
        type=argument_types.count,
        metavar="N",
        help="How many sequences run at once. Each takes a KV cache of --context tokens. Default: "
        f"as --plan says, else 1, or {THROUGHPUT_SLOTS} for the objective throughput.",
    )
    parser.add_argument(
        "--prompt-tokens",
        type=argument_types.count,
        default=Objective().prompt_tokens,
        metavar="N",
        help="The length of the prompt for the objective request, and of the prompt whose time is "
        "shown. Default: %(default)s.",
    )
    parser.add_argument(
        "--output-tokens",
        type=argument_types.count,
        default=Objective().output_tokens,
        metavar="N",
        help="The length of the answer for the objective request. Default: %(default)s.",
    )
    _add_placement_arguments(parser)


def _add_placement_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options about what is decided already, and what a plan must keep."""
    parser.add_argument(
        "--pin",
        type=_pin,
        action="append",
        default=[],
        metavar="layers=0-5:NAME",
        help="Put these layers on this device, or on its --team. embedding:NAME and head:NAME work "
        "too. May be repeated.",
    )
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="NAME",
        help="Plan without this device. May be repeated.",
    )
    add_team_arguments(parser)
    _add_draft_arguments(parser)
    parser.add_argument(
        "--migration-weight",
        type=_weight,
        default=0.0,
        metavar="W",
        help="Count each second of loading new blocks as W seconds of the objective. "
        "Default: %(default)g.",
    )
    parser.add_argument(
        "--plan",
        type=Path,
        metavar="FILE",
        help="Use the plan in this file, which --save wrote, after checking it.",
    )
    parser.add_argument(
        "--quality-budget",
        type=_bound,
        metavar="KL",
        help="The largest KL divergence from the original model that a plan may have, in nats per "
        "token, or none. It is measured when a model is first planned. "
        f"Default: {DEFAULT_QUALITY_BUDGET:g}.",
    )
    parser.add_argument(
        "--sensitivities",
        type=Path,
        metavar="FILE",
        help="What `shoal calibrate --quality --json` printed for the model. Default: what "
        "`shoal calibrate --quality --on` left at the coordinator.",
    )
    parser.add_argument(
        "--check-quality",
        action="store_true",
        help="Measure the plan's divergence, and plan again until it keeps --quality-budget, which "
        "must be given.",
    )


def _add_draft_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the draft model."""
    parser.add_argument(
        "--draft",
        metavar="MODEL",
        help="A small model with the same vocabulary, given as MODEL is. It lies whole on the "
        "first stage's device and guesses tokens, which the shoal checks together. Answers stay "
        "the same. Default: as --plan says, else none.",
    )
    parser.add_argument(
        "--draft-bits",
        type=argument(_width, f"one of {', '.join(map(str, BITS))}"),
        metavar="N",
        help=f"The bits per weight of --draft. Default: as --plan says, else {DEFAULT_DRAFT_BITS}.",
    )


def _width(text: str) -> int:
    if int(text) not in BITS:
        raise ValueError(text)
    return int(text)


def draft_of(options: argparse.Namespace, given: SavedPlan | None) -> tuple[Path | None, int]:
    """The draft model and its bits as asked for, else those of the plan. Raises UsageError."""
    saved = None if given is None else given.draft
    if options.draft is None and options.draft_bits is not None and saved is None:
        raise UsageError("--draft-bits needs --draft MODEL")
    path, bits = saved or (None, DEFAULT_DRAFT_BITS)
    if options.draft is not None:
        path, bits = str(absolute_model(options.draft)), DEFAULT_DRAFT_BITS
    return None if path is None else Path(path), options.draft_bits or bits


def add_quality_arguments(parser: argparse.ArgumentParser, *, with_plan: bool) -> None:
    """Add the options about stored weights, context and the solver's time."""
    parser.add_argument(
        "--max-weight-error",
        type=_bound,
        metavar="DELTA",
        help="Bound the weight error max|w - w_b| / 2^bits of each block, as the DILEMMA paper "
        "does, in place of the KL divergence of all blocks. none bounds neither.",
    )
    add_adapter_argument(parser)
    add_scheme_argument(parser)
    add_scheme_text_argument(parser)
    add_group_size_argument(parser)
    parser.add_argument(
        "--context",
        type=argument_types.count,
        metavar="TOKENS",
        help="The most tokens of a prompt and its answer together. Default: "
        f"{'as --plan says, else ' if with_plan else ''}what the model can, but not more than "
        f"{DEFAULT_CONTEXT_TOKENS}.",
    )
    parser.add_argument(
        "--time-limit",
        type=_seconds,
        default=DEFAULT_TIME_LIMIT_S,
        metavar="S",
        help="The most seconds that the solver takes. It ends early once a plan is proved optimal, "
        "or nearly so if the problem is large. Default: %(default)g.",
    )


def add_hop_argument(parser: argparse._ActionsContainer, *, with_budget: bool) -> None:
    """Add --hop-bits. ``with_budget`` says that the command has --quality-budget."""
    unless = " With --quality-budget: all whose divergence is known." if with_budget else ""
    parser.add_argument(
        "--hop-bits",
        type=_hop_bits,
        metavar="32|16|8[,...]",
        help="The bits per hidden value that a hop between devices may have. 32 is exact. "
        f"Default: {DEFAULT_HOP_BITS}.{unless}",
    )


def add_team_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the wishes about teams: devices that share layers."""
    parser.add_argument(
        "--team",
        type=_team,
        action="append",
        default=[],
        metavar="A,B[,...]",
        help="Let these devices share layers. May be repeated, with other devices. Default: the "
        "planner chooses teams where sharing is faster.",
    )
    parser.add_argument(
        "--no-teams", action="store_true", help="Plan with each layer on one device."
    )


def add_weights_argument(parser: argparse.ArgumentParser) -> None:
    """Add --weights, for several models."""
    parser.add_argument(
        "--weights",
        type=argument(_weights, f"{WEIGHT_EXPECTED} for each model, such as 2,1"),
        metavar="2,1",
        help="How many requests go to each of several MODELs, in any unit. The mean time of a "
        "request is minimised. Default: the same to all.",
    )


def _weights(text: str) -> tuple[float, ...]:
    weights = tuple(map(float, text.split(",")))
    if not all(map(is_weight, weights)):
        raise ValueError(text)
    return weights


def add_diff_arguments(parser: argparse.ArgumentParser) -> None:
    saved = "which `shoal plan --save` wrote."
    parser.add_argument("before", type=Path, metavar="A.json", help=f"The first plan, {saved}")
    parser.add_argument("after", type=Path, metavar="B.json", help=f"The second plan, {saved}")


def note_other_model(screen: Screen, saved: SavedPlan | None, name: str) -> None:
    """Tell the user if the plan of --plan was saved for a model of another name."""
    if saved is not None and saved.model != name:
        screen.note(f"{saved.source} was saved for {saved.model}, and is used for {name}")


def objective_of(options: argparse.Namespace) -> Objective:
    """The planner's objective that the arguments ask for. Raises UsageError."""
    kind = options.objective or Objective().kind
    tokens = options.prompt_tokens, options.output_tokens
    try:
        return Objective(kind, *tokens, options.migration_weight)
    except ValueError as error:
        raise UsageError(f"--objective {kind}: {error}") from error


def context_of(options: argparse.Namespace, given: SavedPlan | None) -> int | None:
    """The context as asked for, else that of the plan of --plan, else None."""
    asked: int | None = options.context
    return asked or (given.context_tokens if given is not None else None)


def slots_of(options: argparse.Namespace, given: SavedPlan | None) -> int:
    """The slots as asked for, else those of the plan, else the default. Raises UsageError."""
    from planning.request import MAX_SLOTS, default_slots

    saved = given.slots if given is not None else None
    slots: int = options.slots or saved or default_slots(objective_of(options).kind)
    if slots > MAX_SLOTS:
        raise UsageError(f"--slots {slots}: at most {MAX_SLOTS}")
    return slots


def request_of(
    options: argparse.Namespace, *, with_problem: bool = False, saved: SavedPlan | None = None
) -> LoadRequest:
    """The request for a live plan or load. Raises UsageError, CommandFailed.

    with_problem: the answer must have the planning problem too.
    saved: the plan to use. None: that of --plan, if it is given.
    """
    from model.errors import ModelError
    from planning.errors import RequestInvalid
    from planning.labs.sensitivity_file import SensitivityError
    from planning.plan import PlanError
    from planning.request import LoadRequest
    from planning.saved import read_plan

    if options.check_quality and options.quality_budget in (None, math.inf):
        raise UsageError("--check-quality needs --quality-budget KL to compare with")
    try:
        if saved is None and options.plan is not None:
            saved = read_plan(options.plan)
        draft, draft_bits = draft_of(options, saved)
        return LoadRequest(
            model=absolute_model(options.model),
            adapter=adapter_of(options),
            scheme=options.scheme,
            scheme_text=scheme_text_of(options),
            group_size=options.group_size,
            **bounds_of(options),
            context_tokens=context_of(options, saved),
            time_limit_s=options.time_limit,
            slots=slots_of(options, saved),
            objective=objective_of(options),
            exclude=tuple(options.exclude),
            **teams_of(options),
            check_quality=options.check_quality,
            draft=draft,
            draft_bits=draft_bits,
            plan=saved,
            with_problem=with_problem,
            **_widths(options, saved),
            **_of_model(options),
        )
    except RequestInvalid as error:
        raise UsageError(str(error)) from error
    except (ModelError, PlanError, SensitivityError) as error:
        raise CommandFailed(str(error)) from error


def teams_of(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of a request about teams; empty without such a wish."""
    wishes: dict[str, Any] = {}
    if options.team:
        wishes["teams"] = tuple(options.team)
    if options.no_teams:
        wishes["no_teams"] = True
    return wishes


def check_teams(options: argparse.Namespace) -> None:
    """Raise UsageError if the teams that are asked for contradict another wish."""
    from planning.errors import RequestInvalid
    from planning.request_fields import require_teams

    excluded = getattr(options, "exclude", ())
    try:
        require_teams(options.team, excluded, no_teams=options.no_teams)
    except RequestInvalid as error:
        raise UsageError(str(error)) from error


def bounds_of(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of a request that bound what a plan loses. An option's infinity says "none"."""
    delta = options.max_weight_error
    if delta is None and getattr(options, "formulation", "") == "dilemma":
        delta = PAPER_MAX_WEIGHT_ERROR
    budget = getattr(options, "quality_budget", None)
    return {
        "max_weight_error": None if delta == math.inf else delta,
        "quality_budget": None if budget == math.inf else budget,
        "unbounded": budget == math.inf or (budget is None and delta == math.inf),
    }


def _widths(options: argparse.Namespace, saved: SavedPlan | None) -> dict[str, Any]:
    """The bits of weights and hops as asked for, else the defaults and those of the plan."""
    from planning.problem import DEFAULT_HOPS
    from planning.request import DEFAULT_BITS

    bits, hop_bits = options.bits, options.hop_bits
    if saved is not None and bits is None:
        bits = {width for _, width in saved.placements}.union(DEFAULT_BITS)
    if saved is not None and hop_bits is None and options.quality_budget is None:
        sums = {team.sum_bits for team in saved.teams if team is not None}
        sent = {width for width in saved.hop_bits if width is not None} | sums
        # Members sum at 32 bits only where nothing narrower may be sent.
        hop_bits = {32} if 32 in sums else sent.union(form.bits for form in DEFAULT_HOPS)
    return {
        "bits": DEFAULT_BITS if bits is None else tuple(bits),
        "hop_bits": None if hop_bits is None else tuple(hop_bits),
    }


def _of_model(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of the request that need the model's shape: pins and sensitivities."""
    from model.families import load_spec
    from model.hub import named_model, resolved

    if not options.pin and options.sensitivities is None:
        return {}
    if named_model(options.model) is not None:
        return {}  # Its path is not known yet, and this request is only a first check.
    spec = load_spec(getattr(options, "shape_from", None) or resolved(Path(options.model)))
    known = sensitivities_of(options, spec)
    found: dict[str, Any] = {"pins": pins_of(options, spec)}
    if known is not None:
        found |= {
            "quality_margin": known.margin,
            "sensitivities": known.kl,
            "hop_sensitivities": known.hops,
            "own_sensitivities": known.own,
        }
    return found


def absolute_model(given: str) -> Path:
    """The absolute path of a model for the coordinator, which may be on another machine.

    An absolute path may exist only there, so it is not checked here. Raises CommandFailed if a
    relative path does not exist here. A hub's name stays as it is.
    """
    from model.errors import ModelError
    from model.given import require_model
    from model.hub import named_model

    path, name = Path(given), named_model(given)
    if name is not None:
        return Path(str(name))
    if not path.is_absolute() and not path.exists():
        try:
            require_model(path)
        except ModelError as error:
            raise CommandFailed(str(error)) from error
    return path.absolute()


def pins_of(options: argparse.Namespace, spec: ModelSpec) -> dict[int, str]:
    """The pinned device of each block. Raises UsageError for layers that do not exist."""
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
                raise UsageError(
                    f"--pin: {spec.block_name(block)} is pinned to two devices,"
                    f" {pins[block]} and {device}: drop one"
                )
    return pins


def sensitivities_of(options: argparse.Namespace, spec: ModelSpec) -> Sensitivities | None:
    from planning.labs.sensitivity_file import read_sensitivities

    if options.sensitivities is None:
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


def _hop_bits(text: str) -> list[int]:
    known = {str(bits): bits for bits in HOP_BITS}
    parts = set(text.split(","))
    if not parts <= set(known):
        raise argparse.ArgumentTypeError(f"{text!r}: expected some of {','.join(known)}")
    return sorted(known[part] for part in parts)


def _pin(text: str) -> tuple[int | str, int, str]:
    """Parse a pin into the first and last layer, or a block's name and 0, and the device."""
    match = _PIN.fullmatch(text)
    if match is None or (match[3] is not None and int(match[3]) < int(match[2])):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected layers=0-5:NAME, embedding:NAME or head:NAME"
        )
    if match[2] is None:
        return match[1], 0, match[4]
    return int(match[2]), int(match[3] or match[2]), match[4]


def _team(text: str) -> tuple[str, ...]:
    """Parse names with commas between them. ``require_teams`` checks them."""
    return tuple(name.strip() for name in text.split(","))


def _repairs(text: str) -> tuple[str, ...]:
    parts = () if text == "none" else tuple(text.split(","))
    if any(part not in _REPAIRS for part in parts):
        some = ",".join(_REPAIRS)
        raise argparse.ArgumentTypeError(f"{text!r}: expected some of {some}, or none")
    return parts
