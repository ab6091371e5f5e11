"""``shoal coordinator`` and ``shoal agent``: their arguments, and how they run."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import resource
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from cli import argument_types
from cli.argument_types import CONTROL_PORT, HTTP_PORT
from cli.collector import resume
from cli.errors import CommandFailed, Unavailable, UsageError
from cli.render import Screen
from cli.service.install import add_service_actions
from cli.service.running import Running, told
from cli.shared_arguments import add_memory_argument, add_threads_argument, add_watts_argument
from coordinator.claim import claim_alone, stand_by
from coordinator.config import (
    DEFAULT_MOST_WAITING,
    DEFAULT_RECOVERY_WAIT_S,
    ConfigError,
    CoordinatorConfig,
    SettingWrong,
)
from wire import limits
from wire.addresses import is_loopback
from wire.errors import NeedsPerson, WireError
from wire.messages import Endpoint
from wire.service import ServiceManager, default_state_dir

if TYPE_CHECKING:
    from api.site import Ready
    from wire.invite import Invite

MOST_DESCRIPTORS = 65_536
"""More than all admitted connections and all files."""

ALL_INTERFACES = "0.0.0.0"  # noqa: S104 - agents are on other machines

COORDINATOR_ABOUT = (
    "A shoal has one coordinator. It plans, quantizes models, serves their blocks to the agents, "
    "and answers HTTP requests. It needs no accelerator."
)
COORDINATOR_EXAMPLES = (
    "  shoal coordinator\n"
    "  shoal coordinator --cluster attic --http 0.0.0.0:7421\n"
    "  shoal coordinator --create-token --token-file ~/shoal.token\n"
)
AGENT_ABOUT = (
    "The agent measures this device, joins the coordinator and waits for blocks of a model. "
    "It finds the coordinator by itself if multicast works in the network."
)
AGENT_EXAMPLES = (
    "  shoal agent --token-file -                # first; it asks for the token\n"
    "  shoal agent --name pi-1 --memory 3G --storage 8G\n"
    "  shoal agent --coordinator 192.168.1.10    # where multicast is blocked\n"
    "  shoal agent --list-backends\n"
    "\nin a container that publishes port 7430 of the host 192.168.1.20:\n"
    "  shoal agent --port 7430 --advertise 192.168.1.20\n"
)
LOG_LEVELS = ("error", "warning", "info", "debug")
REQUESTS = "requests"
"""The coordinator's level between warning and info: warnings, and a line for each answer."""

_CLUSTER = "A name for this shoal. Agents join the coordinator of the same name. "


def add_coordinator_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cluster",
        default="shoal",
        metavar="NAME",
        help=f"{_CLUSTER}Default: %(default)s.",
    )
    parser.add_argument(
        "--bind",
        default=ALL_INTERFACES,
        metavar="HOST",
        help="The address where agents connect. Default: %(default)s, which means all.",
    )
    parser.add_argument(
        "--port",
        type=argument_types.port,
        default=CONTROL_PORT,
        help="The port where agents connect. Default: %(default)s.",
    )
    parser.add_argument(
        "--http",
        type=argument_types.http_endpoint,
        default=Endpoint("127.0.0.1", HTTP_PORT),
        metavar="HOST:PORT",
        help="The address and port of the HTTP API. "
        f"Default: 127.0.0.1:{HTTP_PORT}, which only this machine reaches.",
    )
    parser.add_argument(
        "--http-host",
        type=argument_types.host_names,
        action=argument_types.Several,
        default=[],
        metavar="NAME",
        help="Another host name by which clients call the API, or * for any. This machine's own "
        "name and addresses are known. May be repeated.",
    )
    parser.add_argument(
        "--insecure",
        action="store_true",
        help="Do not encrypt the connections of agents, and let any device join without a token. "
        "Agents need --insecure, too. For a network that you alone use.",
    )
    parser.add_argument(
        "--http-tls",
        action="store_true",
        help="Encrypt HTTP with the coordinator's own key, or with --http-cert. The shoal command "
        "asks once whether a key is the right one. A browser warns of the coordinator's own.",
    )
    parser.add_argument(
        "--http-cert",
        type=Path,
        metavar="FILE",
        help="A certificate for HTTP with its chain, in PEM. A renewed file is noticed.",
    )
    parser.add_argument(
        "--http-key",
        type=Path,
        metavar="FILE",
        help="The certificate's key. Default: it is in the file of --http-cert.",
    )
    parser.add_argument(
        "--insecure-http",
        action="store_true",
        help="Ask for no API key. Otherwise clients need one if --http is not this machine's "
        "loopback, and wherever one was made: `shoal key create NAME`.",
    )
    parser.add_argument(
        "--cors-origin",
        type=argument_types.origins,
        action=argument_types.Several,
        default=[],
        metavar="ORIGIN",
        help="An origin such as https://chat.lan whose web pages may use the API, or * for any. "
        "May be repeated. Default: none but the coordinator's own.",
    )
    parser.add_argument(
        "--queue",
        type=argument_types.count,
        default=DEFAULT_MOST_WAITING,
        metavar="N",
        help="The most requests that wait for a slot. More are told to try again later (429). "
        "Default: %(default)s.",
    )
    parser.add_argument(
        "--storage",
        type=argument_types.size,
        metavar="SIZE",
        help="The disk space for quantized blocks. Blocks used longest ago make room for new ones. "
        "Default: 90 %% of the free disk.",
    )
    parser.add_argument(
        "--recovery-wait",
        type=argument_types.seconds,
        default=DEFAULT_RECOVERY_WAIT_S,
        metavar="S",
        help="How many seconds answers wait for a lost device, if the remaining devices cannot "
        "hold the model. Default: %(default)g.",
    )
    parser.add_argument(
        "--standby",
        action="store_true",
        help="Wait while another coordinator runs with the same state directory, and take over "
        "when it ends. With the directory on a shared disk, it may run on another machine.",
    )
    parser.add_argument(
        "--rebalance",
        choices=("auto", "off"),
        default="auto",
        help="With auto, a model moves by itself when another plan has been better for a minute. "
        "It moves back if its tokens then take longer. With off, only `shoal rebalance` moves it. "
        "Default: %(default)s.",
    )
    parser.add_argument(
        "--no-prefix-cache",
        action="store_true",
        help="Compute every prompt from its first token, and not on from what a slot has kept.",
    )
    parser.add_argument(
        "--answer-cache",
        type=argument_types.size,
        default=0,
        metavar="SIZE",
        help="The memory for answers that are kept. A request at temperature 0 that was answered "
        'before gets the same answer at once, unless it says `"cache_prompt": false`. '
        "Default: none are kept.",
    )
    parser.add_argument(
        "--speculate",
        type=argument_types.guesses,
        default=limits.DRAFT_TOKENS,
        metavar="N",
        help="The most tokens that are guessed ahead where an answer repeats text, and checked at "
        "once. Answers stay the same. 0: none. Default: %(default)d.",
    )
    _add_state_dir(parser, "coordinator")
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="A file with a token of this coordinator, which --create-token makes. Other tokens "
        "come from `shoal token create`.",
    )
    parser.add_argument(
        "--create-token",
        action="store_true",
        help="Make the --token-file if it does not exist. Any number of devices can join by it.",
    )
    parser.add_argument(
        "--no-mdns",
        action="store_true",
        help="Do not announce the coordinator by mDNS. Agents then need --coordinator.",
    )
    _add_log_level(parser, (*LOG_LEVELS, REQUESTS), REQUESTS)
    parser.add_argument("--until-stdin-closes", action="store_true", help=argparse.SUPPRESS)
    _add_config(parser)
    add_service_actions(parser)  # After the options, because installing takes them too.


def add_agent_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", help="This device's name. Default: the machine's host name.")
    parser.add_argument(
        "--cluster",
        default="shoal",
        metavar="NAME",
        help="The cluster to join. Default: %(default)s.",
    )
    parser.add_argument(
        "--coordinator",
        type=argument_types.control_endpoint,
        metavar="HOST[:PORT]",
        help=f"Where the coordinator is. The port is {CONTROL_PORT} unless given. "
        "Default: a search by mDNS.",
    )
    add_memory_argument(parser)
    parser.add_argument(
        "--storage",
        type=argument_types.size,
        metavar="SIZE",
        help="The most disk space for blocks and prepared weights. Default: what is free.",
    )
    add_threads_argument(parser)
    add_watts_argument(parser, "The objective energy needs it.")
    parser.add_argument(
        "--backend",
        type=argument_types.backend,
        default="onnx_cpu",
        metavar="NAME",
        help="The backend that computes. --list-backends shows all. Default: %(default)s.",
    )
    parser.add_argument(
        "--exact",
        action="store_true",
        help="Do not round activations. This is slower, and serves to compare results.",
    )
    parser.add_argument(
        "--fast-prompts",
        action="store_true",
        help="Read prompts through a second, 8-bit copy of the layers if memory has room. This is "
        "about twice as fast, and less accurate.",
    )
    parser.add_argument(
        "--bind",
        default=ALL_INTERFACES,
        metavar="HOST",
        help="The address where other agents connect. Default: %(default)s, which means all.",
    )
    parser.add_argument(
        "--port",
        type=argument_types.port,
        default=0,
        help="The port where other agents connect. Default: any free one.",
    )
    parser.add_argument(
        "--advertise",
        action=argument_types.Several,
        type=argument_types.advertised_endpoint,
        default=(),
        metavar="HOST[:PORT]",
        help="Where other agents reach this one if it is behind NAT or in a container. It "
        "replaces this machine's own addresses. May be repeated.",
    )
    _add_state_dir(parser, "agent")
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="A file with a token of the coordinator, or - to be asked for it. The first start "
        "needs one. Later, the device is known by its key. Default: $SHOAL_TOKEN.",
    )
    parser.add_argument(
        "--insecure",
        action="store_true",
        help="Do not encrypt. For a coordinator that was started with --insecure, too.",
    )
    parser.add_argument(
        "--list-backends",
        action="store_true",
        help="Show every backend, with the reason if it cannot run here, and exit.",
    )
    _add_log_level(parser, LOG_LEVELS, "warning")
    parser.add_argument("--measurements-dir", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--until-stdin-closes", action="store_true", help=argparse.SUPPRESS)
    _add_config(parser)
    add_service_actions(parser)


def run_coordinator(options: argparse.Namespace, screen: Screen) -> None:
    import asyncio

    from api.site import Site
    from cli.service.making import LocalMakers
    from coordinator.server import Coordinator
    from wire.claim import shown
    from wire.identity import IdentityError
    from wire.invite import TokenError

    resume()
    _set_log_level(options)
    if options.http_key is not None and options.http_cert is None:
        raise UsageError("--http-key needs the certificate: name it with --http-cert FILE")

    state = contextlib.ExitStack()
    service = ServiceManager.from_environment()

    def on_ready(ready: Ready) -> None:
        running = _running(config, ready)
        state.enter_context(told(config.state_dir, running))
        _tell_about_keys(config, screen)
        _tell_who_may_join(config, screen)
        if running.http_fingerprint:
            screen.note(f"HTTPS shows the key {shown(bytes.fromhex(running.http_fingerprint))}")
        if options.json:
            screen.json(
                {
                    "event": "ready",
                    "control_port": ready.control_port,
                    "http": running.http,
                }
            )
        else:
            screen.out.print(
                f"cluster {options.cluster}: agents join at port {ready.control_port}, "
                f"page and API at {running.http}"
            )

    _raise_descriptor_limit()
    try:
        _require_one_way(options)
        _follow_parent(options, lambda: os.kill(os.getpid(), signal.SIGINT))
        state.enter_context(_claimed(options, screen, service))
        if not options.insecure:
            _prepare_token(options)
        config = _coordinator_config(options)
        coordinator = Coordinator(config, screen.note, service, LocalMakers())
        asyncio.run(Site(coordinator).run(on_ready))
    except NeedsPerson as error:
        raise UsageError(str(error)) from error
    except (ConfigError, IdentityError, TokenError, WireError) as error:
        raise CommandFailed(str(error)) from error
    finally:
        state.close()


def _coordinator_config(options: argparse.Namespace) -> CoordinatorConfig:
    return CoordinatorConfig(
        cluster=options.cluster,
        state_dir=options.state_dir or default_state_dir("coordinator"),
        control_host=options.bind,
        control_port=options.port,
        http_host=options.http.host,
        http_port=options.http.port,
        http_hosts=tuple(options.http_host),
        advertise=not options.no_mdns,
        insecure=options.insecure,
        storage_bytes=options.storage,
        recovery_wait_s=options.recovery_wait,
        rebalances=options.rebalance == "auto",
        http_tls=options.http_tls or options.http_cert is not None,
        http_cert=options.http_cert,
        http_key=options.http_key,
        insecure_http=options.insecure_http,
        cors_origins=tuple(options.cors_origin),
        most_waiting=options.queue,
        answer_cache_bytes=options.answer_cache,
        prefix_cache=not options.no_prefix_cache,
        drafts=options.speculate,
    )


def _claimed(options: argparse.Namespace, screen: Screen, service: ServiceManager) -> TextIO:
    """Lock the state directory, if need be after another coordinator. Raises ConfigError."""
    state_dir = options.state_dir or default_state_dir("coordinator")
    if not options.standby:
        return claim_alone(state_dir)
    tells = True

    def on_wait() -> None:
        nonlocal tells
        if tells:
            screen.note(f"standing by: another coordinator runs with {state_dir}")
            service.ready()
            service.status("standing by")
            tells = False
        service.alive()

    return stand_by(state_dir, on_wait)


def _require_one_way(options: argparse.Namespace) -> None:
    """Raise UsageError if --insecure comes with a token, which it does not look at."""
    if options.insecure and (options.token_file is not None or "SHOAL_TOKEN" in os.environ):
        raise UsageError("--insecure lets everybody join: leave out the token, or --insecure")


def _running(config: CoordinatorConfig, ready: Ready) -> Running:
    return Running(
        os.getpid(),
        config.control_host,
        ready.control_port,
        config.cluster,
        _url(ready.http_host, ready.http_port, encrypted=config.http_tls),
        _http_fingerprint(config).hex(),
    )


def _http_fingerprint(config: CoordinatorConfig) -> bytes:
    """The fingerprint of the certificate that HTTP shows. Empty without TLS."""
    import ssl

    from wire.claim import fingerprint_of

    if not config.http_tls:
        return b""
    path = config.http_cert or config.identity_path
    text = path.read_text(encoding="ascii", errors="replace")
    first = re.search(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", text, re.DOTALL)
    if first is None:
        raise SettingWrong(f"{path} has no BEGIN CERTIFICATE: convert it with `openssl x509`")
    return fingerprint_of(ssl.PEM_cert_to_DER_cert(first[0]))


def _prepare_token(options: argparse.Namespace) -> None:
    """Make or check the coordinator's token file.

    The token is for any number of devices, and has no end. Raises CommandFailed, TokenError,
    IdentityError.
    """
    from coordinator.roster.book import BadBook, DeviceBook
    from model.durable import replace_text
    from wire.identity import own_identity
    from wire.invite import TokenWrong, read_invite

    path: Path | None = options.token_file
    if path is None:
        if options.create_token:
            raise UsageError("--create-token writes a file: name it with --token-file FILE")
        if "SHOAL_TOKEN" not in os.environ:
            return
    state_dir = options.state_dir or default_state_dir("coordinator")
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        identity = own_identity(state_dir / "identity.pem")
        if path is not None and options.create_token and not path.exists():
            invite = DeviceBook(state_dir).invite(identity.fingerprint, ttl_s=None, uses=None)
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(path, invite.text + "\n")
        found = read_invite(path)
        if found is not None and found.coordinator != identity.fingerprint:
            where = "SHOAL_TOKEN" if path is None else path
            raise TokenWrong(f"{where}: this token is of another coordinator; remove it")
    except BadBook as error:
        raise UsageError(str(error)) from error
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise CommandFailed(f"token file {path} cannot be made: {reason}") from error


def _tell_about_keys(config: CoordinatorConfig, screen: Screen) -> None:
    """Say what clients of other machines need, if HTTP listens there."""
    from api.key_book import KeyBook

    if not config.beyond:
        return
    if config.insecure_http:
        screen.note("the API asks for no key: whoever reaches its port may use it")
    elif not KeyBook(config.state_dir).exists:
        screen.note(
            "the API needs a key, because it listens beyond this machine, and none was made yet: "
            f"`shoal key create NAME --state-dir {config.state_dir}` makes one"
        )


def _tell_who_may_join(config: CoordinatorConfig, screen: Screen) -> None:
    """Say what devices need to join, if none has joined yet or all may."""
    from coordinator.roster.book import BadBook, DeviceBook

    if config.insecure:
        if not is_loopback(config.control_host):
            screen.note("anybody who reaches the port may join, and nothing is encrypted")
        return
    book = DeviceBook(config.state_dir)
    with contextlib.suppress(BadBook):  # The first device that calls is told.
        if not book.devices() and not book.invites():
            screen.note(
                "no device can join yet: make a token for each with `shoal token create "
                f"--state-dir {config.state_dir}`"
            )


def run_agent(options: argparse.Namespace, screen: Screen) -> None:
    from backends.base import BackendError, BackendUnavailable, HardwareAbsent

    if options.list_backends:
        _list_backends(screen)
        return

    _set_log_level(options)
    from agent.config import AgentConfig, ConfigError, default_name
    from agent.daemon import Agent
    from wire.identity import IdentityError
    from wire.invite import TokenError

    resume()
    _raise_descriptor_limit()
    service = ServiceManager.from_environment()
    try:
        _require_one_way(options)
        agent = Agent(
            AgentConfig(
                name=options.name or default_name(socket.gethostname()),
                state_dir=options.state_dir or default_state_dir("agent"),
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
                token=None if options.insecure else _token(options, screen),
                insecure=options.insecure,
                watts=options.watts,
                advertise=options.advertise,
                measurements_dir=options.measurements_dir,
            ),
            screen.note,
            service,
        )
    except BackendUnavailable as error:
        kind = CommandFailed if isinstance(error, HardwareAbsent) else Unavailable
        raise kind(f"{error}; `shoal doctor` says how to get it") from error
    except NeedsPerson as error:
        raise UsageError(str(error)) from error
    except (ConfigError, IdentityError, TokenError, BackendError, WireError) as error:
        raise CommandFailed(str(error)) from error
    _follow_parent(options, agent.stop)
    try:
        agent.run()
    finally:
        agent.stop()


def _token(options: argparse.Namespace, screen: Screen) -> Invite | None:
    """The agent's token. Raises TokenError, unless its file is gone and no longer needed."""
    from agent.credentials import has_joined
    from cli.service.token_input import given_invite
    from wire.invite import TokenMissing

    try:
        return given_invite(options.token_file)
    except TokenMissing as error:
        if not has_joined(options.state_dir or default_state_dir("agent")):
            raise
        screen.note(f"{error}: this device has joined before, and needs no token")
        return None


def _list_backends(screen: Screen) -> None:
    from backends.base import BackendUnavailable
    from backends.registry import probe_all

    found = probe_all()
    if screen.json_output:
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


def _add_log_level(parser: argparse.ArgumentParser, levels: tuple[str, ...], default: str) -> None:
    parser.add_argument(
        "--log-level",
        type=argument_types.one_of(levels),
        metavar="LEVEL",
        help=f"What is logged: {', '.join(levels)}. Default: {default}, or info with -v.",
    )
    parser.set_defaults(default_log_level=default)


def _set_log_level(options: argparse.Namespace) -> None:
    level = options.log_level or ("info" if options.verbose else options.default_log_level)
    if level == REQUESTS:
        level = "warning"
        logging.getLogger("api.tracking").setLevel(logging.INFO)
    logging.getLogger().setLevel(level.upper())


def _add_state_dir(parser: argparse.ArgumentParser, kind: str) -> None:
    parser.add_argument(
        "--state-dir",
        type=Path,
        metavar="DIR",
        help="Where blocks and measurements are kept. "
        f"Default: $STATE_DIRECTORY, else shoal/{kind} in $XDG_STATE_HOME or ~/.local/state.",
    )


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="A TOML file that sets these options by their long names. The command line wins.",
    )
    parser.set_defaults(parser=parser)


def _raise_descriptor_limit() -> None:
    """Raise the limit of file descriptors, which by default is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _url(host: str, port: int, *, encrypted: bool) -> str:
    at = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return f"http{'s' * encrypted}://{at}"


def _follow_parent(options: argparse.Namespace, stop: Callable[[], None]) -> None:
    """With --until-stdin-closes, call ``stop`` when the parent process has ended."""
    if not options.until_stdin_closes:
        return

    def watch() -> None:
        while os.read(0, 4096):
            pass
        stop()

    threading.Thread(target=watch, name="parent", daemon=True).start()
