"""The ``shoal`` command: parse, call, print. Exit codes are listed in cli.errors.

Only the command that was named is imported, with what it needs. `shoal --help` is quick therefore,
and a machine without ``[agent]`` or ``[coordinator]`` runs the other commands.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cli.errors import EXIT_SIGNAL, CommandFailed, Unavailable
from cli.render import Screen
from cli.service.journal import JournalFormatter, under_journal
from cli.service.signals import Terminated, terminated_like_interrupted
from wire.sizes import parse_size

Run = Callable[[argparse.Namespace, Screen], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code and lets no traceback reach the user."""
    parser = _parser(_named(sys.argv[1:] if arguments is None else arguments))
    options = parser.parse_args(arguments)
    journal = under_journal()
    screen = Screen(json_output=getattr(options, "json", False), journal=journal)
    logging.basicConfig(
        level=logging.INFO if options.verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
    )
    if journal:
        logging.getLogger().handlers[0].setFormatter(JournalFormatter("%(name)s: %(message)s"))
    try:
        with terminated_like_interrupted():
            if getattr(options, "config", None) is not None:
                from cli.service.settings import read_settings

                options.parser.set_defaults(**read_settings(options.config, options.parser))
                options = parser.parse_args(arguments)
            options.run(options, screen)
    except Terminated as signalled:
        if options.command in SERVICES and signalled.number == signal.SIGTERM:
            return 0  # Whoever stops a service has not made it fail.
        screen.note("terminated")
        return EXIT_SIGNAL + signalled.number
    except KeyboardInterrupt:
        screen.note("interrupted")
        return EXIT_SIGNAL + signal.SIGINT
    except CommandFailed as error:
        screen.error(str(error))
        return error.exit_code
    except ModuleNotFoundError as error:
        extra = "agent" if options.command in ("agent", "edgetpu") else "coordinator"
        screen.error(
            f"this installation lacks {error.name}: pip install 'shoal-llm[{extra}]' "
            f"to use `shoal {options.command}`"
        )
        return Unavailable.exit_code
    except BrokenPipeError:
        # Whoever read our output has seen enough; Python must not complain about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CommandFailed.exit_code
    except OSError as error:
        screen.error(
            f"{error.filename or 'this machine'}: {(error.strerror or str(error)).lower()}"
        )
        return CommandFailed.exit_code
    return 0


# ---- commands ----------------------------------------------------------------------------------


def run_devices(options: argparse.Namespace, screen: Screen) -> None:
    with _client(options) as client:
        if options.measure is None:
            answer = client.get("/shoal/v1/devices")
        else:
            with screen.progress() as on_step:
                answer = client.operate("/shoal/v1/measure", {"device": options.measure}, on_step)
    if options.json:
        screen.json(answer)
    elif answer["devices"]:
        screen.devices(answer)
    else:
        screen.out.print("no agent has joined yet: start `shoal agent` on each device")


def run_plan(options: argparse.Namespace, screen: Screen) -> None:
    from cli.commands import planning

    if options.devices is not None:
        planning.run_offline_plan(options, screen)
        return
    with _client(options) as client:
        planning.run_live_plan(options, screen, client)


def run_load(options: argparse.Namespace, screen: Screen) -> None:
    from cli.commands import plan_arguments
    from cli.commands.plan_views import show_divergence

    request = plan_arguments.request_of(options).to_dict()
    with _client(options) as client, screen.progress() as on_step:
        answer = client.operate("/shoal/v1/load", request, on_step)
    if options.json:
        screen.json(answer)
    else:
        title = f"{answer['model']} is loaded; predicted"
        screen.plan(answer["plan"], title, noise=answer.get("noise", ()))
        show_divergence(screen, answer["plan"], answer.get("quality"))


def run_ps(options: argparse.Namespace, screen: Screen) -> None:
    with _client(options) as client:
        answer = client.get("/shoal/v1/ps")
    if options.json:
        screen.json(answer)
    else:
        screen.models(_models(answer))


def run_events(options: argparse.Namespace, screen: Screen) -> None:
    with _client(options) as client:
        events, last = client.get("/shoal/v1/events")["events"], 0
        screen.events(events)
        while options.follow:
            last = events[-1]["number"] if events else last
            events = client.get(f"/shoal/v1/events?after={last}")["events"]
            if events:
                screen.events(events)


def run_unload(options: argparse.Namespace, screen: Screen) -> None:
    with _client(options) as client:
        answer = client.post("/shoal/v1/unload", {})
    if options.json:
        screen.json(answer)
    else:
        name = answer["unloaded"]
        screen.out.print("no model was loaded" if name is None else f"{name} is unloaded")


def run_prompt(options: argparse.Namespace, screen: Screen) -> None:
    from cli.generation import generate

    with _client(options) as client:
        name = _ensure_loaded(client, options, screen)
        result = generate(
            client,
            screen,
            name,
            options.prompt,
            chat=options.chat,
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
        )
    if options.json:
        screen.json(result)


def run_demo(options: argparse.Namespace, screen: Screen) -> None:
    screen.step("demo: reading the model")  # What is imported next takes seconds on a small board.
    from cli.commands.demo import Demo

    Demo(options, screen).run()


# ---- helpers of commands -----------------------------------------------------------------------


def _client(options: argparse.Namespace) -> Any:
    from cli.client import Client, default_url

    return Client(options.url or default_url())


def _models(answer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Every model that the coordinator told of; the one that answers comes first."""
    return [model for model in (answer["model"], *answer.get("beside", ())) if model is not None]


def _ensure_loaded(client: Any, options: argparse.Namespace, screen: Screen) -> str:
    """The name of the loaded model, which is MODEL; loads it with the defaults if need be."""
    from cli.commands import plan_arguments
    from planning.request import LoadRequest

    models = _models(client.get("/shoal/v1/ps"))
    path = Path(options.model).absolute()
    for known in models:
        is_broken = known["state"] == "broken"
        if options.model in (known["model"], known["directory"]):
            if is_broken:
                raise CommandFailed(known["reason"])
        elif is_broken or str(path) != known["directory"]:
            continue
        return str(known["model"])
    try:
        path = plan_arguments.absolute_model(options.model)
    except CommandFailed as error:
        name = models[0]["model"] if models else "nothing"
        raise CommandFailed(
            f"{error} (nor is it a loaded model's name: {name} is loaded)"
        ) from error
    hop_bits = None if options.hop_bits is None else tuple(options.hop_bits)
    request = LoadRequest(path, hop_bits=hop_bits).to_dict()
    with screen.progress() as on_step:
        answer = client.operate("/shoal/v1/load", request, on_step)
    return str(answer["model"])


# ---- arguments ---------------------------------------------------------------------------------


SERVICES = ("coordinator", "agent")
"""Commands that systemd runs. A request to stop is no failure of theirs."""

Filler = Callable[[argparse.ArgumentParser], tuple[Run, str]]
"""Adds a command's arguments to its parser; returns what runs it, and examples."""


def _named(arguments: Sequence[str]) -> str | None:
    """The command in ``arguments``: options before it take no value."""
    return next((text for text in arguments if not text.startswith("-")), "")


def _demo(demo: argparse.ArgumentParser) -> tuple[Run, str]:
    from cli import argument_types
    from cli.commands import plan_arguments

    sizes = argument_types.argument(
        lambda text: [parse_size(part) for part in text.split(",")], "sizes: 1G,512M"
    )
    demo.add_argument("--model", type=Path, metavar="DIR", help="default: the embedded tiny OPT")
    demo.add_argument(
        "--agents", type=argument_types.count, default=None, metavar="N", help="default: 3"
    )
    demo.add_argument(
        "--memory",
        type=sizes,
        metavar="A,B,C",
        help="each agent's memory limit; default: so little that the model must be split",
    )
    demo.add_argument(
        "--bits", type=argument_types.bits, metavar="4,8,16", help="widths to choose from"
    )
    plan_arguments.add_hop_argument(demo, with_budget=False)
    demo.add_argument("--prompt", metavar="TEXT")
    demo.add_argument("--max-tokens", type=argument_types.count, default=64, metavar="N")
    demo.add_argument("--temperature", type=_temperature, default=0.0, metavar="T")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--exact", action="store_true", help="do not round activations")
    plan_arguments.add_quality_arguments(demo)
    return run_demo, (
        "  shoal demo\n"
        "  shoal demo --agents 2 --bits 8 --prompt 'The lamp is in the attic. "
        "Where is the lamp?'\n"
        "  shoal demo --model ~/models/opt-125m --memory 300M,200M,200M --json\n"
        "  shoal demo --bits 32 --hop-bits 32   computes what the model computes unsplit\n"
    )


def _coordinator(parser: argparse.ArgumentParser) -> tuple[Run, str]:
    from cli.service import daemons

    daemons.add_coordinator_arguments(parser)
    return daemons.run_coordinator, daemons.COORDINATOR_EXAMPLES


def _agent(parser: argparse.ArgumentParser) -> tuple[Run, str]:
    from cli.service import daemons

    daemons.add_agent_arguments(parser)
    return daemons.run_agent, daemons.AGENT_EXAMPLES


def _doctor(parser: argparse.ArgumentParser) -> tuple[Run, str]:
    from cli.doctor import command

    command.add_doctor_arguments(parser)
    return command.run_doctor, command.EXAMPLES


def _devices(devices: argparse.ArgumentParser) -> tuple[Run, str]:
    devices.add_argument(
        "--measure",
        metavar="NAME",
        help="first measure this device, its block times and its links again",
    )
    _add_url(devices)
    return run_devices, (
        "  shoal devices\n  shoal devices --json | jq '.devices[].name'\n"
        "  shoal devices --measure pi-3   again, now that it is quiet\n"
    )


def _add_model(sub: argparse.ArgumentParser) -> None:
    """What ``plan`` and ``load`` share."""
    from cli import argument_types
    from cli.commands import plan_arguments

    sub.add_argument("model", metavar="MODEL", help="a Hugging Face model directory")
    sub.add_argument(
        "--bits", type=argument_types.bits, metavar="4,8,16", help="widths to choose from"
    )
    plan_arguments.add_quality_arguments(sub)
    plan_arguments.add_hop_argument(sub, with_budget=True)
    plan_arguments.add_objective_arguments(sub)


def _plan(plan: argparse.ArgumentParser) -> tuple[Run, str]:
    from cli.commands import plan_arguments

    _add_model(plan)
    plan_arguments.add_planning_arguments(plan)
    _add_url(plan)
    return run_plan, (
        "  shoal plan ~/models/llama-3.2-1b --bits 4,8 --explain\n"
        "  shoal plan ./opt-350m --save plan.json --plot plan.svg\n"
        "  shoal plan ./opt-350m --quality-budget 0.02 --check-quality\n"
        "  shoal plan ./opt-350m --devices examples/labs/home-4-pis.yaml\n"
    )


def _load(load: argparse.ArgumentParser) -> tuple[Run, str]:
    _add_model(load)
    _add_url(load)
    return run_load, (
        "  shoal load ~/models/llama-3.2-1b\n"
        "  shoal load ./opt-350m --bits 8,16 --context 1024\n"
        "  shoal load ./opt-350m --plan plan.json   exactly this plan\n"
        "  shoal load ./opt-350m --objective throughput --slots 8   for many users at once\n"
        "  shoal load ./opt-350m --bits 32 --hop-bits 32   computes what one machine computes\n"
    )


def _diff(parser: argparse.ArgumentParser) -> tuple[Run, str]:
    from cli.commands import plan_arguments, planning

    plan_arguments.add_diff_arguments(parser)
    return planning.run_plan_diff, "  shoal diff a.json b.json\n"


def _study(parser: argparse.ArgumentParser) -> tuple[Run, str]:
    from cli.commands import plan_arguments, planning

    plan_arguments.add_study_arguments(parser)
    return planning.run_study, "  shoal study dilemma --out figures\n"


def _calibrate(parser: argparse.ArgumentParser) -> tuple[Run, str]:
    from cli.commands import calibrate

    calibrate.add_calibrate_arguments(parser)
    return calibrate.run_calibrate, calibrate.EXAMPLES


def _testbed(parser: argparse.ArgumentParser) -> tuple[Run, str]:
    from cli.commands import testbed

    testbed.add_testbed_arguments(parser)
    return testbed.run_testbed, testbed.EXAMPLES


def _bench(parser: argparse.ArgumentParser) -> tuple[Run, str]:
    from cli.commands import bench

    bench.add_bench_arguments(parser)
    return bench.run_bench, bench.EXAMPLES


def _edgetpu(parser: argparse.ArgumentParser) -> tuple[Run, str]:
    from cli.commands import edgetpu

    edgetpu.add_edgetpu_arguments(parser)
    return edgetpu.run_edgetpu, edgetpu.EXAMPLES


def _ps(parser: argparse.ArgumentParser) -> tuple[Run, str]:
    _add_url(parser)
    return run_ps, "  shoal ps\n"


def _events(events: argparse.ArgumentParser) -> tuple[Run, str]:
    events.add_argument("--follow", action="store_true", help="go on with each new event")
    _add_url(events)
    return run_events, (
        "  shoal events\n  shoal events --follow\n  shoal events --json | jq -c '.events[]'\n"
    )


def _run(run: argparse.ArgumentParser) -> tuple[Run, str]:
    from cli import argument_types
    from cli.commands import plan_arguments

    share = argument_types.argument(argument_types.between(0, 1), "a number between 0 and 1")
    run.add_argument("model", metavar="MODEL", help="a loaded model's name, or a directory")
    run.add_argument("prompt", metavar="PROMPT")
    plan_arguments.add_hop_argument(run, with_budget=False)
    run.add_argument("--chat", action="store_true", help="use the model's chat template")
    run.add_argument("--max-tokens", type=argument_types.count, default=256, metavar="N")
    run.add_argument("--temperature", type=_temperature, default=0.0, metavar="T")
    run.add_argument("--top-k", type=int, default=0, metavar="K")
    run.add_argument("--top-p", type=share, default=1.0, metavar="P")
    run.add_argument("--seed", type=int, default=0)
    _add_url(run)
    return run_prompt, (
        '  shoal run llama-3.2-1b "Once upon a time"\n'
        '  shoal run ./tiny-opt --chat "Where is the lamp?" --temperature 0\n'
    )


def _unload(parser: argparse.ArgumentParser) -> tuple[Run, str]:
    _add_url(parser)
    return run_unload, "  shoal unload\n"


def _temperature(text: str) -> Any:
    from cli.argument_types import argument, between

    return argument(between(0, 2), "a number between 0 and 2")(text)


def _add_url(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url", metavar="URL", help="the coordinator's API; default: SHOAL_COORDINATOR or here"
    )


COMMANDS: dict[str, tuple[str, Filler]] = {
    "demo": ("split a model over agents on this machine and ask it something", _demo),
    "coordinator": ("run the coordinator: agents join it, users talk to it", _coordinator),
    "agent": ("run the agent on a device", _agent),
    "doctor": ("say what this machine is, and what it lacks", _doctor),
    "devices": ("show joined devices and measured links", _devices),
    "plan": ("decide which device would run which blocks at how many bits", _plan),
    "load": ("plan a model, quantize it and place it on the devices", _load),
    "diff": ("compare two saved plans", _diff),
    "study": ("repeat the DILEMMA paper's experiments", _study),
    "calibrate": ("measure what this device can do", _calibrate),
    "testbed": ("emulate a lab's hosts on this machine", _testbed),
    "bench": ("measure tokens per second of a shape", _bench),
    "edgetpu": ("compile for a Coral, and check one", _edgetpu),
    "ps": ("show what is loaded, and what it waits for", _ps),
    "events": (
        "show the last events: devices that joined or left, loads, losses, failed links",
        _events,
    ),
    "run": ("generate text, loading MODEL first if it is not", _run),
    "unload": ("free the devices", _unload),
}
"""Each command's summary, and what adds its arguments."""


class _ShowVersion(argparse.Action):
    """Print the version. It is read only when it is asked for, since that takes imports."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from wire.versions import full_version

        sys.stdout.write(f"{full_version()}\n")
        parser.exit()


def _parser(named: str | None = None) -> argparse.ArgumentParser:
    """The parser of all commands, with the arguments of the one that is ``named``, or of all."""
    parser = argparse.ArgumentParser(
        prog="shoal",
        description="One large language model across a shoal of small devices.",
        epilog=(
            "examples:\n"
            "  shoal demo                        everything on this machine, in one command\n"
            "  shoal coordinator                 on one machine\n"
            "  shoal agent --memory 2G           on each device\n"
            "  shoal load ~/models/llama-3.2-1b  plan, quantize, place\n"
            '  shoal run llama-3.2-1b "Hello"    generate\n'
            "exit codes: 0 it worked, 1 it did not, 2 a wrong argument or setting,\n"
            "  3 no coordinator answers, 4 something is not installed, 128 + N ended by signal N"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action=_ShowVersion, nargs=0, help="show program's version number and exit"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="log what happens")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    for name, (summary, fill) in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("--json", action="store_true", help="print JSON instead of tables")
        if named is None or named == name:
            run, examples = fill(sub)
            sub.set_defaults(run=run)
            sub.epilog = f"examples:\n{examples}"
    return parser
