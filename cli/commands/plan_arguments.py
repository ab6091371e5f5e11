"""What the planning commands take, and the requests and wishes that it makes."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli import argument_types
from cli.argument_types import argument, at_least_0, between
from cli.errors import CommandFailed, UsageError
from model.quantize import DEFAULT_GROUP_SIZE
from planning.problem import Objective
from planning.request import DEFAULT_MAX_WEIGHT_ERROR, DEFAULT_TIME_LIMIT_S
from wire.activations import HOP_BITS

if TYPE_CHECKING:
    from model.spec import ModelSpec
    from planning.labs.sensitivity_file import Sensitivities
    from planning.request import LoadRequest
    from planning.saved import SavedPlan

_PIN = re.compile(r"(embedding|head|layers?=(\d{1,4})(?:-(\d{1,4}))?):(.+)", re.ASCII)

_budget = argument(at_least_0, "a number >= 0")
_error_bound = argument(
    lambda text: None if text == "none" else at_least_0(text), "a number >= 0, or none"
)
_seconds = argument(between(0.01, 3600), "seconds between 0.01 and 3600")


def add_planning_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``shoal plan`` beyond those that ``shoal load`` shares."""
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
    parser.add_argument(
        "--simulate",
        type=argument_types.count,
        metavar="N",
        help="draw the links' speeds anew N times",
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
        "--objective",
        choices=("latency", "throughput", "request", "energy"),
        help="what to minimise; request (the default): a prompt and its answer; latency: one token;"
        " throughput: tokens of many sequences; energy: joules computing one token, on devices of"
        " known watts",
    )
    parser.add_argument(
        "--slots",
        type=argument_types.count,
        metavar="N",
        help="sequences at once, each with a KV cache of --context tokens; default: as --plan says,"
        " else 1, with --objective throughput 4",
    )
    parser.add_argument(
        "--prompt-tokens",
        type=argument_types.count,
        default=Objective().prompt_tokens,
        metavar="N",
        help="of the prompt of --objective request, and of the one whose time is shown;"
        " default %(default)s",
    )
    parser.add_argument(
        "--output-tokens",
        type=argument_types.count,
        default=Objective().output_tokens,
        metavar="N",
        help="of the answer of --objective request; default %(default)s",
    )
    _add_placement_arguments(parser)


def _add_placement_arguments(parser: argparse.ArgumentParser) -> None:
    """What the user has decided already, and what a plan must keep."""
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
        "--migration-weight",
        type=_budget,
        default=0.0,
        metavar="W",
        help="add W seconds to the objective per second of loading what devices do not hold",
    )
    parser.add_argument(
        "--plan", type=Path, metavar="FILE", help="take the plan of this file, verified"
    )
    parser.add_argument(
        "--quality-budget",
        type=_budget,
        metavar="KL",
        help="bound on the plan's KL divergence from the original model, nats per token",
    )
    parser.add_argument(
        "--sensitivities",
        type=Path,
        metavar="FILE",
        help="what calibrate printed for the model with --json; default: what the coordinator "
        "has from `shoal calibrate --quality --on`",
    )
    parser.add_argument(
        "--check-quality",
        action="store_true",
        help="measure the plan's divergence, and plan anew until it keeps --quality-budget",
    )


def add_quality_arguments(parser: argparse.ArgumentParser) -> None:
    """How weights are stored, what they may lose, and for how long a plan is sought."""
    parser.add_argument(
        "--max-weight-error",
        type=_error_bound,
        default=DEFAULT_MAX_WEIGHT_ERROR,
        metavar="DELTA",
        help="bound on max|w - w_b| / 2^bits of each block, or 'none'; default 0.001",
    )
    parser.add_argument(
        "--scheme",
        choices=("rtn", "truncate"),
        default="rtn",
        help="round to nearest (the default), or as the DILEMMA paper does",
    )
    parser.add_argument(
        "--group-size",
        type=int,
        choices=(32, 64, 128),
        default=DEFAULT_GROUP_SIZE,
        help="weights per scale, of rtn; default 64",
    )
    parser.add_argument(
        "--context",
        type=argument_types.count,
        metavar="TOKENS",
        help="default: as --plan says, else the model's, at most 2048",
    )
    parser.add_argument(
        "--time-limit",
        type=_seconds,
        default=DEFAULT_TIME_LIMIT_S,
        metavar="S",
        help="for the solver, which ends early on a plan proved optimal, of large problems one"
        " within 0.5%% of that; default 20",
    )


def add_hop_argument(parser: argparse.ArgumentParser, *, with_budget: bool) -> None:
    """At how many bits hidden values may cross a link. ``with_budget``: the command has one."""
    unless = ", or with --quality-budget every width of known divergence" if with_budget else ""
    parser.add_argument(
        "--hop-bits",
        type=_hop_bits,
        metavar="32|16|8[,...]",
        help="bits of a hidden value between devices, to choose from; 32 is exact; default: 16"
        + unless,
    )


def add_diff_arguments(parser: argparse.ArgumentParser) -> None:
    """The two files of a comparison."""
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")


def add_study_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``shoal study dilemma`` takes."""
    parser.add_argument("study", choices=("dilemma",))
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("dilemma-study"),
        metavar="DIR",
        help="for the figures as SVG, and for results as they come: the same command goes on after"
        " a stop (default: dilemma-study)",
    )
    parser.add_argument(
        "--runs", type=argument_types.count, default=100, metavar="N", help="default 100"
    )
    parser.add_argument("--seed", type=int, default=0, help="default 0")


def objective_of(options: argparse.Namespace) -> Objective:
    """The planner's objective that the arguments ask for. Raises UsageError."""
    kind = options.objective or Objective().kind
    tokens = options.prompt_tokens, options.output_tokens
    try:
        return Objective(kind, *tokens, options.migration_weight)
    except ValueError as error:
        raise UsageError(f"--objective {kind}: {error}") from error


def context_of(options: argparse.Namespace, given: SavedPlan | None) -> int | None:
    """Tokens of a sequence, as asked for or as the plan of --plan was made for; None: neither."""
    asked: int | None = options.context
    return asked or (given.context_tokens if given is not None else None)


def slots_of(options: argparse.Namespace, given: SavedPlan | None) -> int:
    """How many sequences at once, as ``context_of`` or by default. Raises UsageError."""
    from planning.request import MAX_SLOTS, default_slots

    saved = given.slots if given is not None else None
    slots: int = options.slots or saved or default_slots(objective_of(options).kind)
    if slots > MAX_SLOTS:
        raise UsageError(f"--slots {slots}: at most {MAX_SLOTS}")
    return slots


def request_of(options: argparse.Namespace, *, with_problem: bool = False) -> LoadRequest:
    """The live plan or load that the arguments ask for. Raises UsageError, CommandFailed.

    ``with_problem``: the answer must have the planning problem too.
    """
    from model.errors import ModelError
    from planning.errors import RequestInvalid
    from planning.labs.sensitivity_file import SensitivityError
    from planning.plan import PlanError
    from planning.request import LoadRequest
    from planning.saved import read_plan

    if options.check_quality and options.quality_budget is None:
        raise UsageError("--check-quality needs --quality-budget KL to compare with")
    try:
        saved = read_plan(options.plan) if options.plan is not None else None
        return LoadRequest(
            model=absolute_model(options.model),
            scheme=options.scheme,
            group_size=options.group_size,
            max_weight_error=options.max_weight_error,
            context_tokens=context_of(options, saved),
            time_limit_s=options.time_limit,
            slots=slots_of(options, saved),
            objective=objective_of(options),
            exclude=tuple(options.exclude),
            quality_budget=options.quality_budget,
            check_quality=options.check_quality,
            plan=saved,
            with_problem=with_problem,
            **_widths(options, saved),
            **_of_model(options),
        )
    except RequestInvalid as error:
        raise UsageError(str(error)) from error
    except (ModelError, PlanError, SensitivityError) as error:
        raise CommandFailed(str(error)) from error


def _widths(options: argparse.Namespace, saved: SavedPlan | None) -> dict[str, Any]:
    """Bits of weights and of hops: as asked for, else the defaults and what the plan uses."""
    from planning.problem import DEFAULT_HOPS
    from planning.request import DEFAULT_BITS

    bits, hop_bits = options.bits, options.hop_bits
    if saved is not None and bits is None:
        bits = {width for _, width in saved.placements}.union(DEFAULT_BITS)
    if saved is not None and hop_bits is None and options.quality_budget is None:
        sent = {width for width in saved.hop_bits if width is not None}
        hop_bits = sent.union(form.bits for form in DEFAULT_HOPS)
    return {
        "bits": DEFAULT_BITS if bits is None else tuple(bits),
        "hop_bits": None if hop_bits is None else tuple(hop_bits),
    }


def _of_model(options: argparse.Namespace) -> dict[str, Any]:
    """Fields of the request that need the model's shape: pins and sensitivities."""
    from model.families import load_spec

    if not options.pin and options.sensitivities is None:
        return {}
    spec = load_spec(Path(options.model))
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
    """The path to tell the coordinator, which may be on another machine and judges it.

    Only an absolute path can be one there alone. Raises CommandFailed for another that is nothing
    here: the name of a model on a hub, or a wrong path.
    """
    from model.errors import ModelError
    from model.given import require_model

    path = Path(given)
    if not path.is_absolute() and not path.exists():
        try:
            require_model(path)
        except ModelError as error:
            raise CommandFailed(str(error)) from error
    return path.absolute()


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
