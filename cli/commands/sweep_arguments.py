"""The arguments of ``shoal sweep``, and the grid that they ask for."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli import argument_types
from cli.argument_types import argument, at_least_0, between
from cli.commands.bench import SHAPE_HELP
from cli.commands.evaluate_arguments import (
    add_compute_arguments,
    add_data_arguments,
    add_prompt_arguments,
    metrics_argument,
)
from cli.commands.plan_arguments import add_hop_argument, add_team_arguments
from cli.errors import UsageError
from cli.parser import add_url_argument
from cli.shared_arguments import (
    add_adapter_argument,
    add_group_size_argument,
    add_scheme_argument,
    add_scheme_text_argument,
)
from planning.problem import Objective
from wire.sizes import parse_size

if TYPE_CHECKING:
    from studies.grid import Axis

OBJECTIVES = ("latency", "throughput", "request", "energy")
TIME_LIMIT_S = 10.0
_FACTORS, _AMOUNTS = (1e-6, 1e6), (1e-6, 1e18)
"""With numbers outside of these, times or their sums may be no numbers."""


def _list(convert: Callable[[str], Any], expected: str) -> Callable[[str], Any]:
    return argument(lambda text: tuple(map(convert, text.split(","))), expected)


def _bound(text: str) -> float | None:
    return None if text == "none" else at_least_0(text)


def _objective(text: str) -> str:
    if text not in OBJECTIVES:
        raise ValueError(text)
    return text


def _amount(unit: Callable[[str], float]) -> Callable[[str], Any]:
    """A converter of x2 (twice a device's own) and of absolute amounts."""

    def convert(text: str) -> Any:
        from studies.grid import Amount

        is_factor = text.startswith("x")
        value = float(text[1:]) if is_factor else unit(text)
        least, most = _FACTORS if is_factor else _AMOUNTS
        if not least <= value <= most:
            raise ValueError(text)
        return Amount(value, is_factor)

    return convert


def _memory(text: str) -> float:
    return float(parse_size(text))


def _mbit(text: str) -> float:
    return float(text) * 1e6 / 8


def add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="A model's folder or GGUF file, or its name on the hub as ORG/NAME.",
    )
    _add_grid_arguments(parser.add_argument_group("the grid"))
    _add_planning_arguments(parser.add_argument_group("planning"))
    evaluation = parser.add_argument_group("evaluation")
    evaluation.add_argument(
        "--eval",
        action="store_true",
        help="Evaluate every plan on --data too, on this machine alone. Plans of equal bits are "
        "evaluated once.",
    )
    add_data_arguments(evaluation, required=False)
    metrics_argument(evaluation)
    add_compute_arguments(evaluation)
    evaluation.add_argument(
        "--exact",
        action="store_true",
        help="Answer with activations that are not rounded. Losses never round them.",
    )
    add_prompt_arguments(parser.add_argument_group("prompts"))
    results = parser.add_argument_group("results")
    results.add_argument(
        "--out",
        type=Path,
        default=Path("sweep"),
        metavar="DIR",
        help="The directory of sweep.csv and sweep.svg, which grow with every plan. The same "
        "command goes on where it stopped. Default: %(default)s.",
    )


def _add_grid_arguments(grid: argparse._ActionsContainer) -> None:
    grid.add_argument(
        "--max-weight-error",
        type=_list(_bound, "numbers from 0 up, or none, with commas between them"),
        metavar="1e-4,1e-3,...",
        help="The DILEMMA paper's bounds on weight errors, or none. Default: none.",
    )
    grid.add_argument(
        "--quality-budget",
        type=_list(_bound, "numbers from 0 up, or none, with commas between them"),
        metavar="0.01,0.03,...",
        help="Bounds on the KL divergence of a plan in nats per token, or none. Default: as "
        "`shoal plan`, or none beside --max-weight-error.",
    )
    grid.add_argument(
        "--bits",
        type=argument_types.bits,
        action="append",
        metavar="4,8,16",
        help="The bits per weight that a block may have. Each time the option is given is one "
        "value of the grid. Default: all that devices have.",
    )
    grid.add_argument(
        "--links",
        type=_list(_amount(_mbit), "Mbit/s such as 10,100, or factors such as x0.5,x2"),
        metavar="10,100,... or x0.5,x1,...",
        help="Speeds of all links in Mbit/s, or so many times each link's own. Default: their own.",
    )
    grid.add_argument(
        "--memory",
        type=_list(_amount(_memory), "sizes such as 1G,512M, or factors such as x0.5,x2"),
        metavar="1G,2G,... or x0.5,x1,...",
        help="The memory of every device, or so many times its own. Default: their own.",
    )
    grid.add_argument(
        "--objective",
        type=_list(_objective, "some of " + ",".join(OBJECTIVES)),
        default=(Objective().kind,),
        metavar="LIST",
        help=f"What to minimise, out of {', '.join(OBJECTIVES)}. Default: {Objective().kind}.",
    )


def _add_planning_arguments(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--devices",
        type=Path,
        metavar="LAB.yaml",
        help="Plan for the devices of this lab file. Default: those of the coordinator.",
    )
    group.add_argument(
        "--shape",
        metavar="NAME",
        help=f"Plan a model without any files of it, for --devices. {SHAPE_HELP}",
    )
    group.add_argument(
        "--slots",
        type=argument_types.count,
        default=1,
        metavar="N",
        help="How many sequences run at once, in every plan. Default: %(default)s.",
    )
    group.add_argument(
        "--prompt-tokens",
        type=argument_types.count,
        default=Objective().prompt_tokens,
        metavar="N",
        help="The length of the prompt for the objective request. Default: %(default)s.",
    )
    group.add_argument(
        "--output-tokens",
        type=argument_types.count,
        default=Objective().output_tokens,
        metavar="N",
        help="The length of the answer for the objective request. Default: %(default)s.",
    )
    group.add_argument(
        "--context",
        type=argument_types.count,
        metavar="TOKENS",
        help="The most tokens of a prompt and its answer together. Default: as `shoal plan`.",
    )
    group.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="NAME",
        help="Plan without this device. May be repeated.",
    )
    add_team_arguments(group)
    add_hop_argument(group, with_budget=True)
    group.add_argument(
        "--sensitivities",
        type=Path,
        metavar="FILE",
        help="What `shoal calibrate --quality --json` printed for the model.",
    )
    add_adapter_argument(group)
    add_scheme_argument(group)
    add_scheme_text_argument(group)
    add_group_size_argument(group)
    group.add_argument(
        "--time-limit",
        type=argument(between(0.01, 3600), "seconds between 0.01 and 3600"),
        default=TIME_LIMIT_S,
        metavar="S",
        help="The most seconds for each plan. Default: %(default)g.",
    )
    add_url_argument(group)


def grid_of(options: argparse.Namespace, bits: Sequence[int]) -> dict[Axis, Sequence[Any]]:
    """Return the values of every axis. ``bits`` are all widths, for a grid that names none.

    Raises UsageError for links or memory both absolute and as factors.
    """
    from studies.grid import OWN

    for name in ("links", "memory"):
        values = getattr(options, name) or ()
        if len({value.is_factor for value in values}) > 1:
            raise UsageError(f"--{name}: give amounts, or factors such as x2, but not both")
    widths = [tuple(sorted(set(some))) for some in options.bits or [bits]]
    return {
        "objective": _once(options.objective),
        "bits": _once(widths),
        "memory": _once(options.memory or (OWN,)),
        "links": _once(options.links or (OWN,)),
        "max_weight_error": _once(options.max_weight_error or (None,)),
        "quality_budget": _once(options.quality_budget or (None,)),
    }


def _once(values: Sequence[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
