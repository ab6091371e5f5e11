"""The ``shoal`` command: parse, call, print. Exit codes are listed in cli.errors.

Parts that a machine did not install (``[agent]``, ``[coordinator]``) are imported by the commands
that need them, so that a Raspberry Pi carries only what it runs.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cli import edgetpu, plan_arguments, planning
from cli.bench import EXAMPLES as BENCH_EXAMPLES
from cli.bench import add_bench_arguments, run_bench
from cli.calibrate import EXAMPLES, add_calibrate_arguments, run_calibrate
from cli.doctor import EXAMPLES as CHECKS
from cli.doctor import add_doctor_arguments, run_doctor
from cli.errors import EXIT_SIGNAL, CommandFailed, Unavailable, UsageError
from cli.install import add_service_actions
from cli.journal import JournalFormatter, under_journal
from cli.render import Screen
from cli.settings import read_settings
from cli.testbed import EXAMPLES as TESTBED_EXAMPLES
from cli.testbed import add_testbed_arguments, run_testbed
from wire.errors import WireError
from wire.messages import Endpoint
from wire.service import ServiceManager
from wire.sizes import parse_size

CONTROL_PORT = 7420
HTTP_PORT = 7421
ALL_INTERFACES = "0.0.0.0"  # noqa: S104 - agents are on other machines


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
        with _terminated_like_interrupted():
            if getattr(options, "config", None) is not None:
                options.parser.set_defaults(**read_settings(options.config, options.parser))
                options = parser.parse_args(arguments)
            options.run(options, screen)
    except _Terminated as signalled:
        if options.run in (run_agent, run_coordinator) and signalled.number == signal.SIGTERM:
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


def run_coordinator(options: argparse.Namespace, screen: Screen) -> None:
    from coordinator.config import ConfigError, CoordinatorConfig, default_state_dir
    from coordinator.server import Coordinator, Ready
    from wire.auth import TokenError, create_token, read_token

    def on_ready(ready: Ready) -> None:
        if options.json:
            screen.json(
                {
                    "event": "ready",
                    "control_port": ready.control_port,
                    "http": _url(ready.http_host, ready.http_port),
                }
            )
        else:
            screen.out.print(
                f"cluster {options.cluster}: agents join at port {ready.control_port}, "
                f"API at {_url(ready.http_host, ready.http_port)}"
            )

    try:
        if options.create_token:
            create_token(_required_token_file(options))
        coordinator = Coordinator(
            CoordinatorConfig(
                cluster=options.cluster,
                state_dir=options.state_dir or default_state_dir(),
                control_host=options.bind,
                control_port=options.port,
                http_host=options.http.host,
                http_port=options.http.port,
                advertise=not options.no_mdns,
                token=read_token(options.token_file),
                storage_bytes=options.storage,
            ),
            screen.note,
            ServiceManager.from_environment(),
        )
        _follow_parent(options, lambda: os.kill(os.getpid(), signal.SIGINT))
        asyncio.run(coordinator.run(on_ready))
    except (ConfigError, TokenError, WireError) as error:
        raise CommandFailed(str(error)) from error


def run_agent(options: argparse.Namespace, screen: Screen) -> None:
    from backends.base import BackendError, BackendUnavailable
    from backends.registry import probe_all

    if options.list_backends:
        found = probe_all()
        if options.json:
            screen.json(
                {
                    name: {"available": False, "reason": result.reason}
                    if isinstance(result, BackendUnavailable)
                    else {"available": True, "version": result.version}
                    for name, result in found.items()
                }
            )
            return
        for name, result in found.items():
            if isinstance(result, BackendUnavailable):
                state = result.reason
            else:
                state = f"available ({result.version})"
            screen.out.print(f"{name}: {state}", markup=False, soft_wrap=True)
        return

    from agent.config import AgentConfig, ConfigError, default_state_dir
    from agent.daemon import Agent
    from wire.auth import TokenError, read_token

    service = ServiceManager.from_environment()
    try:
        agent = Agent(
            AgentConfig(
                name=options.name or socket.gethostname().split(".")[0],
                state_dir=options.state_dir or default_state_dir(),
                cluster=options.cluster,
                coordinator=options.coordinator,
                bind_host=options.bind,
                data_port=options.port,
                memory_bytes=options.memory,
                storage_bytes=options.storage,
                threads=options.threads,
                exact=options.exact,
                backend=options.backend,
                token=read_token(options.token_file),
                watts=options.watts,
            ),
            screen.note,
            service,
        )
    except BackendUnavailable as error:
        raise Unavailable(f"{error}; `shoal doctor` says how to get it") from error
    except (ConfigError, TokenError, BackendError, WireError) as error:
        raise CommandFailed(str(error)) from error
    _follow_parent(options, agent.stop)
    try:
        agent.run()
    finally:
        agent.stop()


def run_devices(options: argparse.Namespace, screen: Screen) -> None:
    with _client(options) as client:
        answer = client.get("/shoal/v1/devices")
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
        screen.plan(answer["plan"], f"{answer['model']} is loaded; predicted")


def run_ps(options: argparse.Namespace, screen: Screen) -> None:
    with _client(options) as client:
        answer = client.get("/shoal/v1/ps")
    if options.json:
        screen.json(answer)
    else:
        screen.deployment(answer["model"])


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
    from cli.demo import Demo

    Demo(options, screen).run()


# ---- helpers of commands -----------------------------------------------------------------------


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _required_token_file(options: argparse.Namespace) -> Path:
    path: Path | None = options.token_file
    if path is None:
        raise UsageError("--create-token writes a file: say which with --token-file FILE")
    return path


def _client(options: argparse.Namespace) -> Any:
    from cli.client import Client, default_url

    return Client(options.url or default_url())


def _ensure_loaded(client: Any, options: argparse.Namespace, screen: Screen) -> str:
    """The name of the loaded model, which is MODEL; loads it if need be, otherwise by default."""
    loaded = client.get("/shoal/v1/ps")["model"]
    path = Path(options.model).absolute()
    if loaded is not None and options.model in (loaded["model"], loaded["directory"]):
        if loaded["state"] != "ready":
            raise CommandFailed(loaded["reason"])
        return str(loaded["model"])
    if loaded is not None and str(path) == loaded["directory"] and loaded["state"] == "ready":
        return str(loaded["model"])
    if not path.is_dir():
        raise CommandFailed(f"{options.model} is not loaded and is no directory: run `shoal load`")
    with screen.progress() as on_step:
        answer = client.operate(
            "/shoal/v1/load", {"model": str(path), "hop_bits": options.hop_bits}, on_step
        )
    return str(answer["model"])


def _follow_parent(options: argparse.Namespace, stop: Callable[[], None]) -> None:
    """With --until-stdin-closes: end when the process that started this one does, however."""
    if not options.until_stdin_closes:
        return

    def watch() -> None:
        while os.read(0, 4096):
            pass
        stop()

    threading.Thread(target=watch, name="parent", daemon=True).start()


class _Terminated(KeyboardInterrupt):
    """A signal other than Ctrl-C's asked this process to end; cleaning up is the same."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM and the end of the terminal clean up as Ctrl-C does."""

    def interrupt(number: int, frame: object) -> None:
        raise _Terminated(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {signal.SIGTERM: signal.signal(signal.SIGTERM, interrupt)}
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # Which is what nohup asks for.
        previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, interrupt)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


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
    demo.add_argument("--agents", type=_count, default=None, metavar="N", help="default: 3")
    demo.add_argument(
        "--memory",
        type=_sizes,
        metavar="A,B,C",
        help="each agent's memory limit; default: so little that the model must be split",
    )
    demo.add_argument("--bits", type=_bits, metavar="4,8,16", help="widths to choose from")
    plan_arguments.add_hop_argument(demo, with_budget=False)
    demo.add_argument("--prompt", metavar="TEXT")
    demo.add_argument("--max-tokens", type=_count, default=64, metavar="N")
    demo.add_argument("--temperature", type=_temperature, default=0.0, metavar="T")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--exact", action="store_true", help="do not round activations")
    _add_quality(demo)

    coordinator = command(
        "coordinator",
        run_coordinator,
        "run the coordinator: agents join it, users talk to it",
        "  shoal coordinator\n  shoal coordinator --cluster attic --http 0.0.0.0:7421\n"
        "  shoal coordinator --create-token --token-file ~/shoal.token   then copy it to agents\n",
    )
    coordinator.add_argument("--cluster", default="shoal", help="default: shoal")
    coordinator.add_argument(
        "--bind", default=ALL_INTERFACES, metavar="HOST", help="where agents connect"
    )
    coordinator.add_argument("--port", type=_port, default=CONTROL_PORT, help="for agents")
    coordinator.add_argument(
        "--http",
        type=_http_endpoint,
        default=Endpoint("127.0.0.1", HTTP_PORT),
        metavar="HOST:PORT",
        help=f"the API; default 127.0.0.1:{HTTP_PORT}, this machine only",
    )
    coordinator.add_argument(
        "--storage",
        type=_size,
        metavar="SIZE",
        help="for quantized blocks, the least recently used make room; default: 90 %% of the free "
        "disk",
    )
    coordinator.add_argument("--state-dir", type=Path, metavar="DIR")
    _add_token(coordinator)
    coordinator.add_argument(
        "--create-token", action="store_true", help="make the --token-file, if it is not there"
    )
    coordinator.add_argument(
        "--no-mdns", action="store_true", help="do not announce; agents need --coordinator"
    )
    coordinator.add_argument("--until-stdin-closes", action="store_true", help=argparse.SUPPRESS)
    _add_config(coordinator)

    agent = command(
        "agent",
        run_agent,
        "run the agent on a device",
        "  shoal agent\n"
        "  shoal agent --name pi-1 --memory 3G --storage 8G\n"
        "  shoal agent --coordinator 192.168.1.10   where multicast is blocked\n"
        "  shoal agent --token-file ~/shoal.token   the coordinator's, where it has one\n"
        "  shoal agent --list-backends\n",
    )
    agent.add_argument("--name", help="default: this machine's host name")
    agent.add_argument("--cluster", default="shoal", help="which cluster to look for by mDNS")
    agent.add_argument(
        "--coordinator",
        type=_control_endpoint,
        metavar="HOST[:PORT]",
        help="its address; default: search by mDNS",
    )
    agent.add_argument("--memory", type=_size, metavar="SIZE", help="for weights, KV and buffers")
    agent.add_argument("--storage", type=_size, metavar="SIZE", help="for the block cache")
    agent.add_argument("--threads", type=_count, default=_default_threads(), metavar="N")
    agent.add_argument(
        "--watts", type=_watts, metavar="W", help="what it draws while it computes, for energy"
    )
    agent.add_argument("--backend", default="onnx_cpu", help="default: onnx_cpu")
    agent.add_argument(
        "--exact", action="store_true", help="do not round activations: slow, to compare results"
    )
    agent.add_argument("--bind", default=ALL_INTERFACES, metavar="HOST", help="for other agents")
    agent.add_argument("--port", type=_port, default=0, help="for other agents; default: any")
    agent.add_argument("--state-dir", type=Path, metavar="DIR")
    _add_token(agent)
    agent.add_argument("--list-backends", action="store_true", help="show them and exit")
    agent.add_argument("--until-stdin-closes", action="store_true", help=argparse.SUPPRESS)
    _add_config(agent)
    for service in (agent, coordinator):  # After their options, which installing takes as well.
        add_service_actions(service)

    doctor = command("doctor", run_doctor, "say what this machine is, and what it lacks", CHECKS)
    add_doctor_arguments(doctor, _control_endpoint)
    devices = command(
        "devices",
        run_devices,
        "show joined devices and measured links",
        "  shoal devices\n  shoal devices --json | jq '.devices[].name'\n",
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
        sub.add_argument("--bits", type=_bits, metavar="4,8,16", help="widths to choose from")
        _add_quality(sub)
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
    ps = command("ps", run_ps, "show what is loaded", "  shoal ps\n")
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
    run.add_argument("--max-tokens", type=_count, default=256, metavar="N")
    run.add_argument("--temperature", type=_temperature, default=0.0, metavar="T")
    run.add_argument("--top-k", type=int, default=0, metavar="K")
    run.add_argument("--top-p", type=_share, default=1.0, metavar="P")
    run.add_argument("--seed", type=int, default=0)
    unload = command("unload", run_unload, "free the devices", "  shoal unload\n")
    for sub in (devices, plan, load, ps, run, unload):
        sub.add_argument(
            "--url", metavar="URL", help="the coordinator's API; default: SHOAL_COORDINATOR or here"
        )
    return parser


def _add_token(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="the shoal's shared token; default: $SHOAL_TOKEN, or none",
    )


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="TOML with any of these options by their long names; the command line wins",
    )
    parser.set_defaults(parser=parser)


def _add_quality(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-weight-error",
        type=_error_bound,
        default=1e-3,
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
        default=64,
        help="weights per scale, of rtn; default 64",
    )
    parser.add_argument(
        "--context", type=_count, metavar="TOKENS", help="default: the model's, at most 2048"
    )
    parser.add_argument(
        "--time-limit",
        type=_seconds,
        default=20.0,
        metavar="S",
        help="for the solver, which ends early on a plan proved optimal, of large problems one"
        " within 0.5%% of that; default 20",
    )


def _argument(convert: Callable[[str], Any], expected: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return convert(text)
        except (ValueError, KeyError) as error:
            raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}") from error

    return parse


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def _known_bits(text: str) -> list[int]:
    bits = sorted({int(part) for part in text.split(",")})
    if not bits or any(value not in (2, 3, 4, 5, 6, 8, 16, 32) for value in bits):
        raise ValueError(text)
    return bits


def _bound(text: str) -> float | None:
    value = None if text == "none" else float(text)
    if value is not None and not 0 <= value < float("inf"):
        raise ValueError(text)
    return value


def _between(low: float, high: float) -> Callable[[str], float]:
    def convert(text: str) -> float:
        value = float(text)
        if not low <= value <= high:
            raise ValueError(text)
        return value

    return convert


def _port_number(text: str) -> int:
    value = int(text)
    if not 0 <= value < 65536:
        raise ValueError(text)
    return value


_ENDPOINT = re.compile(
    r"(?:\[(?P<v6>[^\]]+)\]|(?P<host>[^:\[\]]+))(?::(?P<port>\d{1,5}))?", re.ASCII
)


def _endpoint(default_port: int) -> Callable[[str], Endpoint]:
    def convert(text: str) -> Endpoint:
        match = _ENDPOINT.fullmatch(text)
        if match is None:
            raise ValueError(text)
        port = match["port"]
        return Endpoint(
            match["v6"] or match["host"], default_port if port is None else _port_number(port)
        )

    return convert


_count = _argument(_positive, "a whole number above 0")
_bits = _argument(_known_bits, "widths out of 2,3,4,5,6,8,16,32")
_size = _argument(parse_size, "a size such as 512M, 1.5G or 200MiB")
_sizes = _argument(lambda text: [parse_size(part) for part in text.split(",")], "sizes: 1G,512M")
_error_bound = _argument(_bound, "a number >= 0, or none")
_temperature = _argument(_between(0, 2), "a number between 0 and 2")
_share = _argument(_between(0, 1), "a number between 0 and 1")
_watts = _argument(_between(0.01, 1e5), "watts, such as 6.5")
_seconds = _argument(_between(0.01, 3600), "seconds between 0.01 and 3600")
_port = _argument(_port_number, "a port between 0 and 65535")
_http_endpoint = _argument(_endpoint(HTTP_PORT), "HOST:PORT")
_control_endpoint = _argument(_endpoint(CONTROL_PORT), "HOST or HOST:PORT")


def _default_threads() -> int:
    return len(os.sched_getaffinity(0))


if __name__ == "__main__":
    sys.exit(main())
