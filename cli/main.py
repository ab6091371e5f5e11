"""Parses the ``shoal`` command line and runs the command. cli.errors lists the exit codes.

Only the named command is imported. So `shoal --help` is quick, and a machine without ``[agent]`` or
``[coordinator]`` runs the other commands.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from cli.collector import resume
from cli.errors import EXIT_SIGNAL, CommandFailed, Unavailable, UsageError
from cli.parser import Parser, add_url_argument
from cli.render import Screen
from cli.service.journal import JournalFormatter, under_journal
from cli.service.signals import Terminated, terminated_like_interrupted
from wire.sizes import parse_size

Run = Callable[[argparse.Namespace, Screen], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. No traceback reaches the user."""
    try:
        parser = _parser(_named(sys.argv[1:] if arguments is None else arguments))
        options = parser.parse_args(arguments)
    except ImportError as error:
        Screen(json_output=False, journal=under_journal()).error(_not_loading(error))
        return Unavailable.exit_code
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
            if options.command not in SERVICES:  # They resume it after their last import.
                resume()
            options.run(options, screen)
    except Terminated as signalled:
        if options.command in SERVICES and signalled.number == signal.SIGTERM:
            return 0  # A service that is stopped has not failed.
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
    except ImportError as error:
        screen.error(_not_loading(error))
        return Unavailable.exit_code
    except UnicodeEncodeError:
        screen.error("an argument has bytes that are not UTF-8 text")
        return UsageError.exit_code
    except BrokenPipeError:
        # The reader has seen enough. Without this, Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CommandFailed.exit_code
    except OSError as error:
        screen.error(
            f"{error.filename or 'this machine'}: {(error.strerror or str(error)).lower()}"
        )
        return CommandFailed.exit_code
    return 0


def _not_loading(error: ImportError) -> str:
    """Name the library that does not load, what it lacks, and how to install it again.

    It may have been built for another Python or system, or lack a library of the system.
    """
    frames = traceback.walk_tb(error.__traceback__)
    modules = [str(frame.f_globals.get("__name__", "")) for frame, _ in frames]
    importing = [name for name in modules if not name.startswith("importlib.")][-1]
    library = (error.name or importing).partition(".")[0]
    first: BaseException = error
    while isinstance(first.__context__, ImportError):
        first = first.__context__  # numpy, for one, puts pages of advice around it.
    cause = str(first).strip().partition("\n")[0].rstrip(".")
    return (
        f"{library} does not load ({cause}): install what is missing, or "
        f"`{sys.executable} -m pip install --force-reinstall {library}`"
    )


# ---- commands ----------------------------------------------------------------------------------


def run_plan(options: argparse.Namespace, screen: Screen) -> None:
    from cli.commands import plan_arguments, planning
    from cli.commands.model_names import model_to_plan

    plan_arguments.require_used(options)
    given = [*options.models, *(options.shape or ())]
    if not given:
        raise UsageError("give a MODEL, or --shape NAME with --devices LAB.yaml")
    if len(given) > 1:
        _plan_several(options, screen)
        return
    if options.weights is not None:
        raise UsageError("--weights is for several models: name them, or drop it")
    options.model = options.models[0] if options.models else None
    options.shape = options.shape[0] if options.shape else None
    if options.devices is not None:
        with model_to_plan(options, screen):
            planning.run_offline_plan(options, screen)
        return
    if options.shape is not None:
        raise UsageError("--shape has no files for a coordinator to read: add --devices LAB.yaml")
    with _client(options) as client:
        planning.run_live_plan(options, screen, client)


def _plan_several(options: argparse.Namespace, screen: Screen) -> None:
    from cli.commands import joint

    if options.devices is not None:
        joint.run_offline_joint(options, screen)
        return
    if options.shape is not None:
        raise UsageError("--shape has no files for a coordinator to read: add --devices LAB.yaml")
    with _client(options) as client:
        joint.run_live_joint(options, screen, client)


def run_load(options: argparse.Namespace, screen: Screen) -> None:
    from cli.commands import joint, plan_arguments
    from cli.commands.model_names import locate
    from cli.commands.plan_views import show_divergence, show_weights
    from planning.request import model_name

    if len(options.models) > 1:
        with _client(options) as client:
            joint.run_live_load(options, screen, client)
        return
    if options.weights is not None:
        raise UsageError("--weights is for several models: name them, or drop it")
    (options.model,) = options.models
    plan_arguments.request_of(options)  # Wrong arguments are told before a model is fetched.
    with _client(options) as client:
        locate(options, client, screen)
        request = plan_arguments.request_of(options)
        plan_arguments.note_other_model(screen, request.plan, model_name(request.model))
        request = replace(
            request,
            generation_defaults=options.generation_defaults,
            replaces=options.replace,
            weight=options.weight,
            keep_s=options.keep,
        )
        with screen.progress() as on_step:
            answer = client.operate("/shoal/v1/load", request.to_dict(), on_step)
    if options.json:
        screen.json(answer)
    else:
        title = f"{answer['model']} is loaded; predicted"
        screen.plan(answer["plan"], title, noise=answer.get("noise", ()))
        show_weights(screen, answer)
        show_divergence(screen, answer["plan"], answer.get("quality"))
        screen.draft(answer)
        screen.sampling_defaults(answer)


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
        answer = client.post("/shoal/v1/unload", {"model": options.name} if options.name else {})
    if options.json:
        screen.json(answer)
        return
    # An older coordinator names one model.
    names = answer.get("models", [answer["unloaded"]] if answer["unloaded"] else [])
    for name in names:
        screen.out.print(f"{name} is unloaded")
    if not names:
        screen.out.print("no model was loaded")


def run_rebalance(options: argparse.Namespace, screen: Screen) -> None:
    with _client(options) as client, screen.progress() as on_step:
        body = {"dry_run": options.dry_run, **({"model": options.name} if options.name else {})}
        answer = client.operate("/shoal/v1/rebalance", body, on_step)
    if options.json:
        screen.json(answer)
        return
    for name, times in answer["slower_than_planned"].items():
        screen.out.print(f"{name} takes {times:.1f} times as long as planned")
    screen.plan(answer["present"], f"{answer['model']} now; by the present figures")
    if answer["moves"]:
        title = "the best plan" if options.dry_run else "moved to"
        screen.plan(answer["plan"], f"{title}; {answer['why']}")
    else:
        screen.out.print(f"it stays as it is: {answer['why']}")


SAMPLING = ("max_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed")
"""The options of ``shoal run`` that the API has by the same names. None: not given."""


def run_prompt(options: argparse.Namespace, screen: Screen) -> None:
    from cli.commands import chat
    from cli.encoding import encode
    from cli.generation import generate

    if options.prompt is None:
        chat.require_terminal()
    with _client(options) as client:
        name, defaults, output = _ensure_loaded(client, options, screen)
        if output is not None:
            encode(client, screen, name, output, options.prompt, options.question)
            return
        if options.question is not None:
            raise UsageError(f"--question: {name} generates text; ask in the prompt")
        given = {field: getattr(options, field) for field in SAMPLING}
        sampling = {field: value for field, value in given.items() if value is not None}
        if "temperature" not in defaults:
            sampling.setdefault("temperature", 0.0)
        if options.prompt is None:
            chat.chat(client, screen, chat.Conversation(name, sampling))
            return
        result = generate(client, screen, name, options.prompt, sampling, chat=options.chat)
    if options.json:
        screen.json(result)


def run_chat(options: argparse.Namespace, screen: Screen) -> None:
    from cli.commands import chat
    from cli.encoding import require_generates

    chat.require_terminal()
    with _client(options) as client:
        if options.model is None:
            models = _models(client.get("/shoal/v1/ps"))
            if not models:
                raise CommandFailed("no model is loaded: name one, or run `shoal load MODEL`")
            name, _, output = _name_and_defaults(models[0])
        else:
            name, _, output = _ensure_loaded(client, options, screen)
        require_generates(name, output)
        chat.chat(client, screen, chat.Conversation(name))


def run_demo(options: argparse.Namespace, screen: Screen) -> None:
    screen.step("demo: reading the model")  # The next import takes seconds on a small board.
    from cli.commands.demo import Demo

    Demo(options, screen).run()


# ---- helpers of commands -----------------------------------------------------------------------


def _client(options: argparse.Namespace) -> Any:
    from cli.client import Client, default_url

    return Client(options.url or default_url())


def _models(answer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Every model in the coordinator's answer. The one that serves comes first."""
    return [model for model in (answer["model"], *answer.get("beside", ())) if model is not None]


def _ensure_loaded(
    client: Any, options: argparse.Namespace, screen: Screen
) -> tuple[str, Mapping[str, float], str | None]:
    """The name of the model MODEL, its defaults of sampling, and what it returns if it encodes.

    It is loaded with the defaults of `shoal load` if it is not loaded.
    """
    from cli.commands import plan_arguments
    from cli.commands.model_names import locate, path_given
    from model.hub import is_loaded_from
    from planning.request import LoadRequest

    plan_arguments.check_teams(options)
    models = _models(client.get("/shoal/v1/ps"))
    path = path_given(options.model)
    for known in models:
        is_broken = known["state"] == "broken"
        directory = Path(known["directory"])
        named = options.model in (known["model"], known["directory"])
        if named or is_loaded_from(directory, options.model):
            if is_broken:
                raise CommandFailed(known["reason"])
        elif is_broken or path != directory:
            continue
        return _name_and_defaults(known)
    locate(options, client, screen)
    try:
        path = plan_arguments.absolute_model(options.model)
    except CommandFailed as error:
        name = models[0]["model"] if models else "nothing"
        raise CommandFailed(
            f"{error} (nor is it a loaded model's name: {name} is loaded)"
        ) from error
    hop_bits = None if options.hop_bits is None else tuple(options.hop_bits)
    wishes = plan_arguments.teams_of(options)
    request = LoadRequest(path, hop_bits=hop_bits, **wishes).to_dict()
    with screen.progress() as on_step:
        answer = client.operate("/shoal/v1/load", request, on_step)
    return _name_and_defaults(answer)


def _name_and_defaults(model: Mapping[str, Any]) -> tuple[str, Mapping[str, float], str | None]:
    """An older coordinator sends no defaults, nor does one that still loads the model."""
    return str(model["model"]), model.get("sampling_defaults") or {}, model.get("output")


# ---- arguments ---------------------------------------------------------------------------------


SERVICES = ("coordinator", "agent")
"""Commands that systemd runs. Stopping them is no failure."""


class Page(NamedTuple):
    """A command's function and its help beside the summary and the options."""

    run: Run
    examples: str
    about: str = ""


Filler = Callable[[argparse.ArgumentParser], Page]
"""Adds a command's arguments to its parser."""


def _named(arguments: Sequence[str]) -> str | None:
    """The command in ``arguments``. Options before it take no value."""
    return next((text for text in arguments if not text.startswith("-")), "")


def _demo(demo: argparse.ArgumentParser) -> Page:
    from cli import argument_types
    from cli.commands import plan_arguments

    sizes = argument_types.argument(
        lambda text: [parse_size(part) for part in text.split(",")], "sizes: 1G,512M"
    )
    demo.add_argument(
        "--model",
        type=Path,
        metavar="MODEL",
        help="A model's folder, or its name on the hub. Default: a tiny OPT that comes with shoal.",
    )
    demo.add_argument(
        "--agents",
        type=argument_types.count,
        default=None,
        metavar="N",
        help="How many agents to start. Default: one for each size of --memory, else 3.",
    )
    demo.add_argument(
        "--memory",
        type=sizes,
        metavar="A,B,C",
        help="The memory limit of each agent. Default: so little that the model must be split.",
    )
    _add_bits(demo)
    plan_arguments.add_hop_argument(demo, with_budget=False)
    plan_arguments.add_team_arguments(demo)
    demo.add_argument("--prompt", metavar="TEXT", help="The text to continue. Default: a question.")
    demo.add_argument("--max-tokens", default=64, **_MAX_TOKENS)
    demo.add_argument("--temperature", default=0.0, **_TEMPERATURE)
    demo.add_argument("--seed", type=int, default=0, metavar="N", help=_SEED)
    demo.add_argument(
        "--exact",
        action="store_true",
        help="Compute with activations that are not rounded. This is slower.",
    )
    demo.add_argument(
        "--measurements-dir",
        type=Path,
        metavar="DIR",
        help="Keep measurements in DIR for the next demo. Default: each demo measures.",
    )
    plan_arguments.add_quality_arguments(demo, with_plan=False)
    return Page(
        run_demo,
        "  shoal demo\n"
        "  shoal demo --agents 2 --bits 8 --prompt 'Once upon a time'\n"
        "  shoal demo --model ~/models/opt-125m --memory 300M,200M,200M\n"
        "  shoal demo --bits 32 --hop-bits 32  # the same numbers as the unsplit model\n",
        "It starts a coordinator and several agents on this machine. Each agent has so little "
        "memory that the model must be split. The demo then loads the model, answers one prompt, "
        "and ends every process that it started.",
    )


def _coordinator(parser: argparse.ArgumentParser) -> Page:
    from cli.service import daemons

    daemons.add_coordinator_arguments(parser)
    return Page(daemons.run_coordinator, daemons.COORDINATOR_EXAMPLES, daemons.COORDINATOR_ABOUT)


def _agent(parser: argparse.ArgumentParser) -> Page:
    from cli.service import daemons

    daemons.add_agent_arguments(parser)
    return Page(daemons.run_agent, daemons.AGENT_EXAMPLES, daemons.AGENT_ABOUT)


def _doctor(parser: argparse.ArgumentParser) -> Page:
    from cli.doctor import command

    command.add_doctor_arguments(parser)
    return Page(command.run_doctor, command.EXAMPLES, command.ABOUT)


def _devices(parser: argparse.ArgumentParser) -> Page:
    from cli.commands import devices

    devices.add_devices_arguments(parser)
    return Page(devices.run_devices, devices.EXAMPLES, devices.ABOUT)


MODEL_HELP = "A model's folder or GGUF file, or its name on the hub as ORG/NAME."


def _add_bits(parser: argparse.ArgumentParser, others: str = "") -> None:
    """Add --bits. ``others`` says which defaults the command has beside the usual one."""
    from cli import argument_types
    from planning.request import DEFAULT_BITS

    parser.add_argument(
        "--bits",
        type=argument_types.bits,
        metavar="4,8,16",
        help="The bits per weight that a block may have. "
        f"Default: {','.join(map(str, DEFAULT_BITS))}.{others}",
    )


def _add_models(sub: argparse.ArgumentParser, *, count: str) -> None:
    """The arguments that ``plan`` and ``load`` share. ``count``: how many models, for argparse."""
    from cli.commands import plan_arguments

    several = " Several are planned together."
    sub.add_argument("models", metavar="MODEL", nargs=count, help=MODEL_HELP + several)
    plan_arguments.add_weights_argument(sub)
    of_labs = " With --devices: those of the lab file." if count == "*" else ""
    _add_bits(sub, f" For a model that encodes: 8.{of_labs}")
    plan_arguments.add_quality_arguments(sub, with_plan=True)
    plan_arguments.add_hop_argument(sub, with_budget=True)
    plan_arguments.add_objective_arguments(sub)


def _plan(plan: argparse.ArgumentParser) -> Page:
    from cli.commands import plan_arguments

    _add_models(plan, count="*")
    plan_arguments.add_planning_arguments(plan)
    add_url_argument(plan)
    return Page(
        run_plan,
        "  shoal plan Qwen/Qwen3-0.6B  # before its download, from config.json alone\n"
        "  shoal plan ~/models/llama-3.2-1b --bits 4,8 --explain\n"
        "  shoal plan ./opt-350m --save plan.json --plot plan.svg\n"
        "  shoal plan ./opt-350m --quality-budget 0.02 --check-quality\n"
        "  shoal plan ./opt-350m --devices lab.yaml\n"
        "  shoal plan --shape llama-1b --devices lab.yaml\n"
        "  shoal plan ./llama-1b ./qwen3-0.6b --weights 1,3 --devices lab.yaml --explain\n",
        "The coordinator measures what it does not know yet, and solves an integer program. "
        "Nothing is loaded. With --devices no coordinator is needed.",
    )


def _load(load: argparse.ArgumentParser) -> Page:
    from cli import argument_types

    _add_models(load, count="+")
    load.add_argument(
        "--no-generation-defaults",
        dest="generation_defaults",
        action="store_false",
        help="Ignore the model's generation_config.json, apart from its end of text. Without it, "
        "requests that say no temperature, top_k, top_p or repetition_penalty take the file's.",
    )
    load.add_argument(
        "--replace",
        action="store_true",
        help="End all other models first. Default: they stay, and the model gets what they leave.",
    )
    load.add_argument(
        "--keep",
        type=argument_types.duration,
        metavar="10m",
        help="Unload the model after so long without a request: 90s, 10m, 2h. A request that names "
        "it loads it again, and waits. Default: it stays loaded.",
    )
    load.add_argument(
        "--weight",
        type=argument_types.between(0.01, 100),
        default=1.0,
        metavar="W",
        help="The model's part of devices that it shares, against 1 for others. Default: 1.",
    )
    add_url_argument(load)
    return Page(
        run_load,
        "  shoal load Qwen/Qwen3-0.6B  # fetched first, if it is not here\n"
        "  shoal load ~/models/llama-3.2-1b\n"
        "  shoal load ./opt-350m --bits 8,16 --context 1024\n"
        "  shoal load ./opt-350m --plan plan.json  # exactly this plan\n"
        "  shoal load ./llama-1b ./qwen3-0.6b --weights 1,3  # both, planned together\n"
        "  shoal load ./opt-350m --objective throughput --slots 8  # for many users\n"
        "  shoal load ./opt-125m --keep 10m  # beside the others, while somebody uses it\n"
        "  shoal load ./opt-350m --bits 32 --hop-bits 32  # as one machine computes it\n",
        "Other models stay loaded, because somebody may be using them: a load that does not fit "
        "beside them fails, and says so. With --replace they end, as they always did up to 0.1. "
        "The same model is loaded anew. The coordinator reads the files, so a hub's model must be "
        "on its machine: `shoal pull` there fetches it.",
    )


def _pull(parser: argparse.ArgumentParser) -> Page:
    from cli.commands import models

    models.add_pull_arguments(parser)
    return Page(models.run_pull, models.PULL_EXAMPLES, models.PULL_ABOUT)


def _cached_models(parser: argparse.ArgumentParser) -> Page:
    from cli.commands import models

    models.add_models_arguments(parser)
    return Page(models.run_models, models.MODELS_EXAMPLES, models.MODELS_ABOUT)


def _rm(parser: argparse.ArgumentParser) -> Page:
    from cli.commands import models

    models.add_rm_arguments(parser)
    return Page(models.run_rm, models.RM_EXAMPLES)


def _diff(parser: argparse.ArgumentParser) -> Page:
    from cli.commands import plan_arguments, planning

    plan_arguments.add_diff_arguments(parser)
    return Page(planning.run_plan_diff, "  shoal diff a.json b.json\n")


def _study(parser: argparse.ArgumentParser) -> Page:
    from cli.commands import study

    study.add_study_arguments(parser)
    return Page(study.run_study, study.EXAMPLES, study.ABOUT)


def _sweep(parser: argparse.ArgumentParser) -> Page:
    from cli.commands import sweep, sweep_arguments

    sweep_arguments.add_sweep_arguments(parser)
    return Page(sweep.run_sweep, sweep.EXAMPLES, sweep.ABOUT)


def _calibrate(parser: argparse.ArgumentParser) -> Page:
    from cli.commands import calibrate

    calibrate.add_calibrate_arguments(parser)
    return Page(calibrate.run_calibrate, calibrate.EXAMPLES, calibrate.ABOUT)


def _testbed(parser: argparse.ArgumentParser) -> Page:
    from cli.commands import testbed

    testbed.add_testbed_arguments(parser)
    return Page(testbed.run_testbed, testbed.EXAMPLES, testbed.ABOUT)


def _bench(parser: argparse.ArgumentParser) -> Page:
    from cli.commands import bench

    bench.add_bench_arguments(parser)
    return Page(bench.run_bench, bench.EXAMPLES, bench.ABOUT)


def _eval(parser: argparse.ArgumentParser) -> Page:
    from cli.commands import evaluate, evaluate_arguments

    evaluate_arguments.add_eval_arguments(parser)
    return Page(evaluate.run_eval, evaluate.EXAMPLES, evaluate.ABOUT)


def _compress(parser: argparse.ArgumentParser) -> Page:
    from cli.commands import compress

    compress.add_compress_arguments(parser)
    return Page(compress.run_compress, compress.EXAMPLES, compress.ABOUT)


def _edgetpu(parser: argparse.ArgumentParser) -> Page:
    from cli.commands import edgetpu

    edgetpu.add_edgetpu_arguments(parser)
    return Page(edgetpu.run_edgetpu, edgetpu.EXAMPLES, edgetpu.ABOUT)


def _key(parser: argparse.ArgumentParser) -> Page:
    from cli.commands import keys

    keys.add_key_arguments(parser)
    return Page(keys.run_key, keys.EXAMPLES, keys.ABOUT)


def _token(parser: argparse.ArgumentParser) -> Page:
    from cli.commands import tokens

    tokens.add_token_arguments(parser)
    return Page(tokens.run_token, tokens.EXAMPLES, tokens.ABOUT)


def _ps(parser: argparse.ArgumentParser) -> Page:
    add_url_argument(parser)
    return Page(run_ps, "  shoal ps\n  shoal ps --json | jq .model.state\n")


def _events(events: argparse.ArgumentParser) -> Page:
    events.add_argument(
        "--follow", action="store_true", help="Wait, and show each new event as it happens."
    )
    add_url_argument(events)
    return Page(
        run_events,
        "  shoal events\n  shoal events --follow\n  shoal events --json | jq -c '.events[]'\n",
        "Events are devices that joined or left, loads, lost devices and failed links.",
    )


def _trace(parser: argparse.ArgumentParser) -> Page:
    from cli.commands import trace

    trace.add_trace_arguments(parser)
    return Page(trace.run_trace, trace.EXAMPLES, trace.ABOUT)


def _run(run: argparse.ArgumentParser) -> Page:
    from cli import argument_types
    from cli.commands import plan_arguments

    share = argument_types.argument(argument_types.between(0, 1), "a number between 0 and 1")
    penalty = argument_types.argument(
        argument_types.between(0.1, 10), "a number between 0.1 and 10"
    )
    run.add_argument(
        "model", metavar="MODEL", help="A loaded model's name, or a model as for `shoal load`."
    )
    run.add_argument(
        "prompt",
        metavar="PROMPT",
        nargs="?",
        help="The text to continue, or to answer. Without it, a terminal becomes a chat.",
    )
    plan_arguments.add_hop_argument(run, with_budget=False)
    plan_arguments.add_team_arguments(run)
    run.add_argument(
        "--chat",
        action="store_true",
        help="Send the prompt as a chat message, with the model's template.",
    )
    run.add_argument(
        "--question",
        metavar="TEXT",
        help="Ask a model for questions about a text, which PROMPT is.",
    )
    run.add_argument("--max-tokens", default=256, **_MAX_TOKENS)
    run.add_argument(
        "--temperature",
        type=_temperature,
        metavar="T",
        help="How freely tokens are drawn, from 0 to 2. 0 takes the likeliest token each time. "
        "Default: what the model recommends, else 0.",
    )
    run.add_argument(
        "--top-k",
        type=int,
        metavar="K",
        help="Draw from the K likeliest tokens only. 0 means all. "
        "Default: what the model recommends, else 0.",
    )
    run.add_argument(
        "--top-p",
        type=share,
        metavar="P",
        help="Draw from the likeliest tokens that have probability P together. 1 means all. "
        "Default: what the model recommends, else 1.",
    )
    run.add_argument(
        "--repetition-penalty",
        type=penalty,
        metavar="R",
        help="Above 1, tokens that were in the prompt or the answer become less likely. "
        "Default: what the model recommends, else 1.",
    )
    run.add_argument("--seed", type=int, default=0, metavar="N", help=_SEED)
    add_url_argument(run)
    return Page(
        run_prompt,
        '  shoal run llama-3.2-1b "Once upon a time"\n'
        '  shoal run ./tiny-opt --chat "Where is the lamp?" --temperature 0.7\n',
        "A model that is not loaded is loaded first, with the defaults of `shoal load`. "
        "What the model recommends is in its generation_config.json. `shoal ps` shows it.",
    )


def _chat(parser: argparse.ArgumentParser) -> Page:
    from cli.commands import chat, plan_arguments

    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="A loaded model's name, or a model as for `shoal load`. Default: the loaded model.",
    )
    plan_arguments.add_hop_argument(parser, with_budget=False)
    plan_arguments.add_team_arguments(parser)
    add_url_argument(parser)
    return Page(run_chat, chat.EXAMPLES, chat.ABOUT)


def _top(parser: argparse.ArgumentParser) -> Page:
    from cli.commands import top

    top.add_top_arguments(parser)
    return Page(top.run_top, top.EXAMPLES, top.ABOUT)


def _unload(parser: argparse.ArgumentParser) -> Page:
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="A loaded model, as in shoal ps. Default: all."
    )
    add_url_argument(parser)
    return Page(run_unload, "  shoal unload\n  shoal unload opt-350m  # the others stay\n")


def _rebalance(parser: argparse.ArgumentParser) -> Page:
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="A loaded model. Default: the one loaded last."
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="Only compare, and move nothing.",
    )
    add_url_argument(parser)
    return Page(
        run_rebalance,
        "  shoal rebalance --dry-run  # say whether it would pay\n  shoal rebalance\n",
        "Plans the loaded model again by the present figures: devices that joined, links that "
        "changed, and devices that run slower than planned. If the new plan is better by enough, "
        "the model moves there, and its answers go on. A coordinator does so by itself, unless it "
        "was started with --rebalance off.",
    )


def _temperature(text: str) -> Any:
    from cli.argument_types import argument, between

    return argument(between(0, 2), "a number between 0 and 2")(text)


def _tokens(text: str) -> Any:
    from cli.argument_types import count

    return count(text)


_MAX_TOKENS: dict[str, Any] = {
    "type": _tokens,
    "metavar": "N",
    "help": "End the answer after N tokens. Default: %(default)s.",
}
_TEMPERATURE: dict[str, Any] = {
    "type": _temperature,
    "metavar": "T",
    "help": "How freely tokens are drawn, from 0 to 2. 0 takes the likeliest token each time. "
    "Default: %(default)g.",
}
_SEED = "Draws with the same seed are the same. Default: %(default)s."


COMMANDS: dict[str, tuple[str, Filler]] = {
    "demo": ("Split a model over agents on this machine, and ask it something.", _demo),
    "coordinator": ("Run the coordinator: agents join it, users talk to it.", _coordinator),
    "agent": ("Run the agent, which lets this device compute part of a model.", _agent),
    "doctor": ("Check what this machine can do for shoal, and what it lacks.", _doctor),
    "devices": ("Show the devices that have joined and their links, or revoke one.", _devices),
    "pull": ("Fetch a model from the hub, or go on fetching it.", _pull),
    "models": ("List the models on this machine, and which would fit.", _cached_models),
    "rm": ("Remove a model that was fetched.", _rm),
    "plan": ("Decide which device would run which blocks at how many bits.", _plan),
    "load": ("Plan a model, quantize it and place it on the devices.", _load),
    "diff": ("Compare two saved plans.", _diff),
    "sweep": ("Plan a model for a grid of bounds, bits, links and memory.", _sweep),
    "study": ("Repeat the experiments of the DILEMMA paper.", _study),
    "calibrate": ("Measure what this device can do.", _calibrate),
    "testbed": ("Emulate the devices of a lab file on this machine.", _testbed),
    "bench": ("Measure this device's tokens per second for a model's shape.", _bench),
    "eval": ("Score a model's answers and losses on your data.", _eval),
    "compress": ("Make smaller models of one, and teach them with your text.", _compress),
    "edgetpu": ("Compile a model for a Coral Edge TPU, or check the one here.", _edgetpu),
    "key": ("Make, list and revoke API keys of this machine's coordinator.", _key),
    "token": ("Make, list and revoke tokens by which devices join.", _token),
    "ps": ("Show what is loaded, and what it waits for.", _ps),
    "events": ("Show the coordinator's last events.", _events),
    "trace": ("Show where the time of one request went, device by device.", _trace),
    "top": ("Watch the shoal at work.", _top),
    "run": ("Generate text from a prompt.", _run),
    "chat": ("Talk with a model.", _chat),
    "unload": ("Unload one model or all, and free the devices.", _unload),
    "rebalance": ("Move the loaded model to a better plan, if there is one now.", _rebalance),
}
"""Each command's summary, and the function that adds its arguments."""


class _ShowVersion(argparse.Action):
    """Print the version, which is imported only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from wire.versions import full_version

        sys.stdout.write(f"{full_version()}\n")
        parser.exit()


def _parser(named: str | None = None) -> Parser:
    """The parser of all commands, with the arguments of the command ``named``, or of all."""
    parser = Parser(
        prog="shoal",
        description="Run one large language model across a shoal of small devices.",
        epilog=(
            "examples:\n"
            "  shoal demo                        # everything on this machine\n"
            "  shoal coordinator                 # on one machine\n"
            "  shoal agent --memory 2G           # on each device\n"
            "  shoal load Qwen/Qwen3-0.6B        # fetch, plan, quantize and place the model\n"
            '  shoal run Qwen3-0.6B "Hello"      # generate text\n'
            "\n"
            "exit codes:\n"
            "  0        success\n"
            "  1        failure\n"
            "  2        a wrong argument or setting\n"
            "  3        no coordinator answers\n"
            "  4        something is not installed\n"
            "  128 + N  ended by signal N\n"
        ),
    )
    parser.add_argument(
        "--version", action=_ShowVersion, nargs=0, help="Show the version and exit."
    )
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="Log each step to standard error."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    for name, (summary, fill) in COMMANDS.items():
        sub = commands.add_parser(name, help=summary)
        sub.add_argument("--json", action="store_true", help="Print JSON instead of tables.")
        if named is None or named == name:
            page = fill(sub)
            sub.set_defaults(run=page.run)
            sub.description = f"{summary}\n\n{page.about}".strip()
            sub.epilog = f"examples:\n{page.examples}"
    return parser
