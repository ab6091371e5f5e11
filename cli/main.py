"""The ``shoal`` command: parse, call, print. Exit codes are listed in cli.errors.

Parts that a machine did not install (``[agent]``, ``[coordinator]``) are imported by the commands
that need them, so that a Raspberry Pi carries only what it runs.
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

from cli import argument_types
from cli.argument_types import argument, between
from cli.commands import edgetpu, plan_arguments, planning
from cli.commands.bench import EXAMPLES as BENCH_EXAMPLES
from cli.commands.bench import add_bench_arguments, run_bench
from cli.commands.calibrate import EXAMPLES, add_calibrate_arguments, run_calibrate
from cli.commands.testbed import EXAMPLES as TESTBED_EXAMPLES
from cli.commands.testbed import add_testbed_arguments, run_testbed
from cli.doctor.command import EXAMPLES as CHECKS
from cli.doctor.command import add_doctor_arguments, run_doctor
from cli.errors import EXIT_SIGNAL, CommandFailed, Unavailable
from cli.render import Screen
from cli.service import daemons
from cli.service.journal import JournalFormatter, under_journal
from cli.service.settings import read_settings
from cli.service.signals import Terminated, terminated_like_interrupted
from wire.sizes import parse_size
from wire.versions import full_version

_sizes = argument(lambda text: [parse_size(part) for part in text.split(",")], "sizes: 1G,512M")
_temperature = argument(between(0, 2), "a number between 0 and 2")
_share = argument(between(0, 1), "a number between 0 and 1")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code and lets no traceback reach the user."""
    parser = _parser()
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
                options.parser.set_defaults(**read_settings(options.config, options.parser))
                options = parser.parse_args(arguments)
            options.run(options, screen)
    except Terminated as signalled:
        if options.run in daemons.SERVICES and signalled.number == signal.SIGTERM:
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
    if options.devices is not None:
        planning.run_offline_plan(options, screen)
        return
    with _client(options) as client:
        planning.run_live_plan(options, screen, client)


def run_load(options: argparse.Namespace, screen: Screen) -> None:
    with _client(options) as client, screen.progress() as on_step:
        answer = client.operate("/shoal/v1/load", plan_arguments.request_of(options), on_step)
    if options.json:
        screen.json(answer)
    else:
        title = f"{answer['model']} is loaded; predicted"
        screen.plan(answer["plan"], title, noise=answer.get("noise", ()))


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
    """The name of the loaded model, which is MODEL; loads it if need be, otherwise by default."""
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
    with screen.progress() as on_step:
        answer = client.operate(
            "/shoal/v1/load", {"model": str(path), "hop_bits": options.hop_bits}, on_step
        )
    return str(answer["model"])


# ---- arguments ---------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
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
    parser.add_argument("--version", action="version", version=full_version())
    parser.add_argument("-v", "--verbose", action="store_true", help="log what happens")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str,
        run: Callable[[argparse.Namespace, Screen], None],
        summary: str,
        examples: str,
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print JSON instead of tables")
        return sub

    demo = command(
        "demo",
        run_demo,
        "split a model over agents on this machine and ask it something",
        "  shoal demo\n"
        "  shoal demo --agents 2 --bits 8 --prompt 'The lamp is in the attic. "
        "Where is the lamp?'\n"
        "  shoal demo --model ~/models/opt-125m --memory 300M,200M,200M --json\n"
        "  shoal demo --bits 32 --hop-bits 32   computes what the model computes unsplit\n",
    )
    demo.add_argument("--model", type=Path, metavar="DIR", help="default: the embedded tiny OPT")
    demo.add_argument(
        "--agents", type=argument_types.count, default=None, metavar="N", help="default: 3"
    )
    demo.add_argument(
        "--memory",
        type=_sizes,
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

    coordinator = command(
        "coordinator",
        daemons.run_coordinator,
        "run the coordinator: agents join it, users talk to it",
        daemons.COORDINATOR_EXAMPLES,
    )
    daemons.add_coordinator_arguments(coordinator)
    agent = command("agent", daemons.run_agent, "run the agent on a device", daemons.AGENT_EXAMPLES)
    daemons.add_agent_arguments(agent)
    doctor = command("doctor", run_doctor, "say what this machine is, and what it lacks", CHECKS)
    add_doctor_arguments(doctor)
    devices = command(
        "devices",
        run_devices,
        "show joined devices and measured links",
        "  shoal devices\n  shoal devices --json | jq '.devices[].name'\n"
        "  shoal devices --measure pi-3   again, now that it is quiet\n",
    )
    devices.add_argument(
        "--measure",
        metavar="NAME",
        help="first measure this device, its block times and its links again",
    )
    plan = command(
        "plan",
        run_plan,
        "decide which device would run which blocks at how many bits",
        "  shoal plan ~/models/llama-3.2-1b --bits 4,8 --explain\n"
        "  shoal plan ./opt-350m --save plan.json --plot plan.svg\n"
        "  shoal plan ./opt-350m --quality-budget 0.02 --check-quality\n"
        "  shoal plan ./opt-350m --devices examples/labs/home-4-pis.yaml\n",
    )
    load = command(
        "load",
        run_load,
        "plan a model, quantize it and place it on the devices",
        "  shoal load ~/models/llama-3.2-1b\n"
        "  shoal load ./opt-350m --bits 8,16 --context 1024\n"
        "  shoal load ./opt-350m --plan plan.json   exactly this plan\n"
        "  shoal load ./opt-350m --objective throughput --slots 8   for many users at once\n"
        "  shoal load ./opt-350m --bits 32 --hop-bits 32   computes what one machine computes\n",
    )
    for sub in (plan, load):
        sub.add_argument("model", metavar="MODEL", help="a Hugging Face model directory")
        sub.add_argument(
            "--bits", type=argument_types.bits, metavar="4,8,16", help="widths to choose from"
        )
        plan_arguments.add_quality_arguments(sub)
        plan_arguments.add_hop_argument(sub, with_budget=True)
        plan_arguments.add_objective_arguments(sub)
    plan_arguments.add_planning_arguments(plan)
    diff = command(
        "diff", planning.run_plan_diff, "compare two saved plans", "  shoal diff a.json b.json\n"
    )
    plan_arguments.add_diff_arguments(diff)
    study = command(
        "study",
        planning.run_study,
        "repeat the DILEMMA paper's experiments",
        "  shoal study dilemma --out figures\n",
    )
    plan_arguments.add_study_arguments(study)
    calibrate = command("calibrate", run_calibrate, "measure what this device can do", EXAMPLES)
    add_calibrate_arguments(calibrate)
    testbed = command(
        "testbed", run_testbed, "emulate a lab's hosts on this machine", TESTBED_EXAMPLES
    )
    add_testbed_arguments(testbed)
    bench = command("bench", run_bench, "measure tokens per second of a shape", BENCH_EXAMPLES)
    add_bench_arguments(bench)
    coral = command(
        "edgetpu", edgetpu.run_edgetpu, "compile for a Coral, and check one", edgetpu.EXAMPLES
    )
    edgetpu.add_edgetpu_arguments(coral)
    ps = command("ps", run_ps, "show what is loaded, and what it waits for", "  shoal ps\n")
    events = command(
        "events",
        run_events,
        "show the last events: devices that joined or left, loads, losses, failed links",
        "  shoal events\n  shoal events --follow\n  shoal events --json | jq -c '.events[]'\n",
    )
    events.add_argument("--follow", action="store_true", help="go on with each new event")
    run = command(
        "run",
        run_prompt,
        "generate text, loading MODEL first if it is not",
        '  shoal run llama-3.2-1b "Once upon a time"\n'
        '  shoal run ./tiny-opt --chat "Where is the lamp?" --temperature 0\n',
    )
    run.add_argument("model", metavar="MODEL", help="a loaded model's name, or a directory")
    run.add_argument("prompt", metavar="PROMPT")
    plan_arguments.add_hop_argument(run, with_budget=False)
    run.add_argument("--chat", action="store_true", help="use the model's chat template")
    run.add_argument("--max-tokens", type=argument_types.count, default=256, metavar="N")
    run.add_argument("--temperature", type=_temperature, default=0.0, metavar="T")
    run.add_argument("--top-k", type=int, default=0, metavar="K")
    run.add_argument("--top-p", type=_share, default=1.0, metavar="P")
    run.add_argument("--seed", type=int, default=0)
    unload = command("unload", run_unload, "free the devices", "  shoal unload\n")
    for sub in (devices, plan, load, ps, events, run, unload):
        sub.add_argument(
            "--url", metavar="URL", help="the coordinator's API; default: SHOAL_COORDINATOR or here"
        )
    return parser
