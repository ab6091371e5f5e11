"""``shoal coordinator`` and ``shoal agent``: the processes that stay, and what they take."""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from cli import argument_types
from cli.argument_types import CONTROL_PORT, HTTP_PORT
from cli.errors import CommandFailed, Unavailable, UsageError
from cli.render import Screen
from cli.service.install import add_service_actions
from coordinator.config import DEFAULT_RECOVERY_WAIT_S
from wire.errors import WireError
from wire.messages import Endpoint
from wire.service import ServiceManager

MOST_DESCRIPTORS = 65_536
"""More than all connections that are let in, and all files."""

ALL_INTERFACES = "0.0.0.0"  # noqa: S104 - agents are on other machines

COORDINATOR_EXAMPLES = (
    "  shoal coordinator\n  shoal coordinator --cluster attic --http 0.0.0.0:7421\n"
    "  shoal coordinator --create-token --token-file ~/shoal.token   then copy it to agents\n"
)
AGENT_EXAMPLES = (
    "  shoal agent\n"
    "  shoal agent --name pi-1 --memory 3G --storage 8G\n"
    "  shoal agent --coordinator 192.168.1.10   where multicast is blocked\n"
    "  shoal agent --port 7430 --advertise 192.168.1.20   in a container that publishes 7430\n"
    "  shoal agent --token-file ~/shoal.token   the coordinator's, where it has one\n"
    "  shoal agent --list-backends\n"
)


def add_coordinator_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything but ``--json``, which all commands share; and the actions of a service."""
    parser.add_argument("--cluster", default="shoal", help="default: shoal")
    parser.add_argument(
        "--bind", default=ALL_INTERFACES, metavar="HOST", help="where agents connect"
    )
    parser.add_argument("--port", type=argument_types.port, default=CONTROL_PORT, help="for agents")
    parser.add_argument(
        "--http",
        type=argument_types.http_endpoint,
        default=Endpoint("127.0.0.1", HTTP_PORT),
        metavar="HOST:PORT",
        help=f"the API; default 127.0.0.1:{HTTP_PORT}, this machine only",
    )
    parser.add_argument(
        "--http-host",
        type=argument_types.host_names,
        action="extend",
        default=[],
        metavar="NAME",
        help="another host name that the API may be called by; added to this machine's own name "
        "and addresses; may be repeated, * for all",
    )
    parser.add_argument(
        "--storage",
        type=argument_types.size,
        metavar="SIZE",
        help="for quantized blocks, the least recently used make room; default: 90 %% of the free "
        "disk",
    )
    parser.add_argument(
        "--recovery-wait",
        type=argument_types.seconds,
        default=DEFAULT_RECOVERY_WAIT_S,
        metavar="S",
        help="how long answers wait for a lost device whose place no other can take; default: "
        f"{DEFAULT_RECOVERY_WAIT_S:g}",
    )
    parser.add_argument("--state-dir", type=Path, metavar="DIR")
    _add_token(parser)
    parser.add_argument(
        "--create-token", action="store_true", help="make the --token-file, if it is not there"
    )
    parser.add_argument(
        "--no-mdns", action="store_true", help="do not announce; agents need --coordinator"
    )
    parser.add_argument("--until-stdin-closes", action="store_true", help=argparse.SUPPRESS)
    _add_config(parser)
    add_service_actions(parser)  # After the options, which installing takes as well.


def add_agent_arguments(parser: argparse.ArgumentParser) -> None:
    """As ``add_coordinator_arguments``."""
    parser.add_argument("--name", help="default: this machine's host name")
    parser.add_argument(
        "--cluster", default="shoal", help="the only cluster to join; default: shoal"
    )
    parser.add_argument(
        "--coordinator",
        type=argument_types.control_endpoint,
        metavar="HOST[:PORT]",
        help="its address; default: search by mDNS",
    )
    parser.add_argument(
        "--memory", type=argument_types.size, metavar="SIZE", help="for weights, KV and buffers"
    )
    parser.add_argument(
        "--storage",
        type=argument_types.size,
        metavar="SIZE",
        help="for blocks and what is prepared of them",
    )
    parser.add_argument(
        "--threads", type=argument_types.count, default=len(os.sched_getaffinity(0)), metavar="N"
    )
    parser.add_argument(
        "--watts",
        type=argument_types.watts,
        metavar="W",
        help="what it draws while it computes, for energy",
    )
    parser.add_argument("--backend", default="onnx_cpu", help="default: onnx_cpu")
    parser.add_argument(
        "--exact", action="store_true", help="do not round activations: slow, to compare results"
    )
    parser.add_argument(
        "--fast-prompts",
        action="store_true",
        help="where memory has room for a copy in bytes: twice as fast, less accurate",
    )
    parser.add_argument("--bind", default=ALL_INTERFACES, metavar="HOST", help="for other agents")
    parser.add_argument(
        "--port", type=argument_types.port, default=0, help="for other agents; default: any"
    )
    parser.add_argument(
        "--advertise",
        action=argument_types.Several,
        type=argument_types.advertised_endpoint,
        default=(),
        metavar="HOST[:PORT]",
        help="where other agents reach this one, behind NAT or in a container; replaces this "
        "machine's own addresses; may be repeated",
    )
    parser.add_argument("--state-dir", type=Path, metavar="DIR")
    _add_token(parser)
    parser.add_argument("--list-backends", action="store_true", help="show them and exit")
    parser.add_argument("--measurements-dir", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--until-stdin-closes", action="store_true", help=argparse.SUPPRESS)
    _add_config(parser)
    add_service_actions(parser)


def run_coordinator(options: argparse.Namespace, screen: Screen) -> None:
    from cli.service.making import LocalMakers
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

    _raise_descriptor_limit()
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
                http_hosts=tuple(options.http_host),
                advertise=not options.no_mdns,
                token=read_token(options.token_file),
                storage_bytes=options.storage,
                recovery_wait_s=options.recovery_wait,
            ),
            screen.note,
            ServiceManager.from_environment(),
            LocalMakers(),
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

    from agent.config import AgentConfig, ConfigError, default_name, default_state_dir
    from agent.daemon import Agent
    from wire.auth import TokenError, read_token

    _raise_descriptor_limit()
    service = ServiceManager.from_environment()
    try:
        agent = Agent(
            AgentConfig(
                name=options.name or default_name(socket.gethostname()),
                state_dir=options.state_dir or default_state_dir(),
                cluster=options.cluster,
                coordinator=options.coordinator,
                bind_host=options.bind,
                data_port=options.port,
                memory_bytes=options.memory,
                storage_bytes=options.storage,
                threads=options.threads,
                exact=options.exact,
                fast_prompts=options.fast_prompts,
                backend=options.backend,
                token=read_token(options.token_file),
                watts=options.watts,
                advertise=options.advertise,
                measurements_dir=options.measurements_dir,
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


def _raise_descriptor_limit() -> None:
    """Let this process have as many file descriptors as it may: by default it starts with 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _required_token_file(options: argparse.Namespace) -> Path:
    path: Path | None = options.token_file
    if path is None:
        raise UsageError("--create-token writes a file: say which with --token-file FILE")
    return path


def _follow_parent(options: argparse.Namespace, stop: Callable[[], None]) -> None:
    """With --until-stdin-closes: end when the process that started this one does, however."""
    if not options.until_stdin_closes:
        return

    def watch() -> None:
        while os.read(0, 4096):
            pass
        stop()

    threading.Thread(target=watch, name="parent", daemon=True).start()
