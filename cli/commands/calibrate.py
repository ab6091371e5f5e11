"""``shoal calibrate``: measures this device, without a coordinator.

With a model or a shape it adds the table of layer times. With ``--quality`` it measures instead the
model's sensitivities, here or with ``--on`` on an agent of the shoal.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from cli import argument_types
from cli.argument_types import argument, between, whole
from cli.commands.bench import SHAPE_HELP
from cli.commands.calibrate_agent import Target, measure_for_agent, target_of
from cli.commands.calibrate_quality import QUALITY_BITS, quality_here, quality_on_agent
from cli.commands.calibrate_views import roofline, show_survey, show_table
from cli.commands.model_names import config_here, model_here
from cli.errors import UsageError, failed
from cli.parser import add_url_argument
from cli.render import Screen
from cli.shared_arguments import (
    add_adapter_argument,
    add_group_size_argument,
    add_scheme_argument,
    add_scheme_text_argument,
    add_threads_argument,
    add_watts_argument,
    core_count,
)
from wire.service import default_state_dir

if TYPE_CHECKING:
    from model.spec import ModelSpec

ABOUT = (
    "It measures arithmetic, memory and disk. With --model or --shape it also measures the time of "
    "a layer. With --quality it measures instead what fewer bits do to the model's predictions. "
    "Agents and `shoal plan` use the results."
)
EXAMPLES = (
    "  shoal calibrate\n"
    "  shoal calibrate --sustain 60s --watts 6.5  # is it as fast when it is hot?\n"
    "  shoal calibrate --shape llama-1b --plot roof.svg\n"
    "  shoal calibrate --quality --model ./opt-350m --bits 3,4,8 --plot heat.svg\n"
    "  shoal calibrate --quality --model ./opt-350m --on auto  # on the fastest agent\n"
)

DEFAULT_BITS = (4, 8, 16)
DEFAULT_CHECKED_PLANS = 8

_OF_QUALITY = (
    *("text", "adapter", "scheme", "scheme_text", "group_size", "max_tokens", "check_plans"),
    "url",
)
_OF_DEVICE = ("sustain", "watts", "full", "again")
_OF_LAYERS = ("bits", "full")
_OF_COORDINATOR = ("url",)
_HERE = ("backend", "threads", "state_dir")
"""Options that change nothing in another mode."""

_sustained_s = argument(between(1, 3600, "s"), "seconds between 1 and 3600, such as 60s")
_plans = argument(whole, "a whole number, 0 for none")


def add_calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--model",
        type=Path,
        metavar="MODEL",
        help="Measure the layers of this model too. It may be a name on the hub.",
    )
    what.add_argument(
        "--shape",
        metavar="NAME",
        help=f"Measure the layers of a model whose weights are not here. {SHAPE_HELP}",
    )
    parser.add_argument(
        "--bits",
        type=argument_types.bits,
        metavar="4,8,16",
        help=f"Bits per weight to measure. Default: {','.join(map(str, DEFAULT_BITS))}, or "
        f"{','.join(map(str, QUALITY_BITS))} with --quality.",
    )
    parser.add_argument(
        "--backend",
        type=argument_types.backend,
        metavar="NAME",
        help="The backend to measure. Default: every backend that runs here.",
    )
    add_threads_argument(parser, of_service=True)
    parser.add_argument(
        "--sustain",
        type=_sustained_s,
        default=0.0,
        metavar="60s",
        help="Compute for so long, and compare the speed at the end with the first. "
        "Default: not at all.",
    )
    add_watts_argument(parser, "Default: what a sensor says.")
    parser.add_argument(
        "--full",
        action="store_true",
        help="Measure every point of the layer table, however long it takes.",
    )
    parser.add_argument(
        "--again",
        action="store_true",
        help="Measure again what is stored already, for this machine's agent too.",
    )
    parser.add_argument(
        "--plot",
        type=argument_types.svg_file,
        metavar="FILE.svg",
        help="Draw a roofline, or with --quality a heat map.",
    )
    parser.add_argument(
        "--state-dir",
        type=Path,
        metavar="DIR",
        help="Where results are kept. Default: where this machine's agent keeps them.",
    )
    _add_quality_arguments(parser.add_argument_group("sensitivity to fewer bits"))
    parser.set_defaults(parser=parser)


def _add_quality_arguments(quality: argparse._ActionsContainer) -> None:
    quality.add_argument(
        "--quality",
        action="store_true",
        help="Measure the sensitivity of each block. It needs --model.",
    )
    quality.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="A calibration text in UTF-8, with blank lines between passages. Default: a built-in "
        "English text.",
    )
    add_adapter_argument(quality)
    add_scheme_argument(quality)
    add_scheme_text_argument(quality)
    add_group_size_argument(quality)
    quality.add_argument(
        "--max-tokens",
        type=argument_types.count,
        default=1024,
        metavar="N",
        help="Use the first N tokens of the text. Default: %(default)s.",
    )
    quality.add_argument(
        "--check-plans",
        type=_plans,
        default=DEFAULT_CHECKED_PLANS,
        metavar="N",
        help="Measure N random mixed plans too, and compare each with the sum over its blocks. "
        "The largest ratio is the margin that plans keep. Default: %(default)s.",
    )
    quality.add_argument(
        "--on",
        metavar="NAME",
        help="Measure on this agent of the shoal, or with auto on the fastest. The coordinator "
        "keeps the results for --quality-budget. If it is stopped, ask again: it goes on where it "
        "was.",
    )
    add_url_argument(quality)


def run_calibrate(options: argparse.Namespace, screen: Screen) -> None:
    """Measure, show the results, and keep those that an agent can use.

    Raises CommandFailed.
    """
    from backends.base import BackendError
    from model.errors import ModelError

    _require_used(options)
    if options.model is not None:
        options.given_model = str(options.model)
        find = model_here if options.quality else config_here
        options.model = find(options.model, screen)
    try:
        if options.quality:
            options.threads = options.threads or core_count()
        if options.quality and options.on is not None:
            quality_on_agent(options, screen)
        elif options.quality:
            quality_here(options, screen, options.state_dir or default_state_dir("agent"))
        else:
            target = target_of(options.state_dir)
            if target.unreachable is not None:
                screen.note(
                    f"the agent service here keeps its own figures, in {target.unreachable}: "
                    "`sudo shoal calibrate --again` measures those"
                )
            _device(options, screen, target)
    except (BackendError, ModelError) as error:
        raise failed(error) from error


def _require_used(options: argparse.Namespace) -> None:
    """Raise UsageError for an option that would change nothing."""
    if options.on is not None and not options.quality:
        raise UsageError("--on NAME goes with --quality: a device measures itself when it joins")
    has_layers = options.model is not None or options.shape is not None
    for names, is_used, rule in (
        (_OF_QUALITY, options.quality, "goes with --quality"),
        (_OF_DEVICE, not options.quality, "does not go with --quality"),
        (_OF_LAYERS, has_layers, "is about layers: name a --model or a --shape"),
        (_OF_COORDINATOR, options.on is not None, "goes with --on NAME"),
        (_HERE, options.on is None, "does not go with --on: the agent has its own"),
    ):
        for name in () if is_used else names:
            if getattr(options, name) != options.parser.get_default(name):
                raise UsageError(f"--{name.replace('_', '-')} {rule}")


# ---- the device and its layers -----------------------------------------------------------------


def _device(options: argparse.Namespace, screen: Screen, target: Target) -> None:
    from backends.registry import backend_class
    from calibration.shapes import shape_spec
    from calibration.store import CalibrationStore
    from calibration.survey import slower_than_before, survey_device
    from calibration.table import measure_table
    from model.families import load_spec

    spec: ModelSpec | None = None
    if options.model is not None:
        spec = load_spec(options.model)
    elif options.shape is not None:
        spec = shape_spec(options.shape)
    options.threads = options.threads or target.threads
    store = CalibrationStore(target.state_dir / "calibration.json")
    with screen.counting("measuring the device") as on_step:
        survey = survey_device(
            target.state_dir,
            options.threads,
            backends=None if options.backend is None else [options.backend],
            sustain_s=options.sustain,
            declared_watts=options.watts,
            progress=on_step,
        )
    slower = slower_than_before(survey, store, again=options.again)
    usable = [backend.name for backend in survey.backends if backend.reason is None]
    name = target.backend if target.backend in usable and not options.backend else usable[0]
    table = None
    if spec is not None:
        with screen.counting("measuring layers") as on_step:
            table = measure_table(
                spec,
                options.bits or DEFAULT_BITS,
                backend_class(name)(),
                threads=options.threads,
                store=store,
                full=options.full,
                again=options.again,
                progress=on_step,
            )
    agent = measure_for_agent(target, options.threads, store, screen) if options.again else None
    if options.json:
        answer = {"device": asdict(survey), "layers": None if table is None else asdict(table)}
        screen.json({**answer, "slower_than_before": slower, "agent": agent})
    else:
        show_survey(screen, survey)
        for line in slower:
            screen.out.print(f"slower than before: {line}", markup=False, soft_wrap=True)
        if spec is not None and table is not None:
            show_table(screen, table, name)
    if options.plot is not None:
        options.plot.write_text(roofline(survey, table, name), encoding="utf-8")
        screen.note(f"drawn to {options.plot}")
