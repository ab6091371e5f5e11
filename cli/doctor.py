"""``shoal doctor``: what this machine is, what works on it, and the command that mends the rest.

The checks are in cli.checks and cli.network_checks; here they are run, each for a bounded time,
and shown. The exit code is 1 when something essential fails.
"""

from __future__ import annotations

import argparse
import os
import threading
from collections.abc import Callable
from pathlib import Path

from agent.config import default_state_dir
from cli import checks, network_checks
from cli.argument_types import control_endpoint
from cli.checks import Check, Machine
from cli.errors import CommandFailed, UsageError
from cli.render import Screen
from cli.settings import parse_toml

EXAMPLES = (
    "  shoal doctor\n"
    "  shoal doctor --coordinator 192.168.1.10\n"
    "  shoal doctor --json | jq '.checks[] | select(.state != \"ok\")'\n"
)

CHECKS: tuple[tuple[Callable[[Machine], list[Check]], float], ...] = (
    (checks.check_board, 5.0),
    (checks.check_system, 5.0),
    (checks.check_libraries, 5.0),
    (checks.check_backends, checks.PROBE_TIMEOUT_S + 5.0),
    (checks.check_accelerators, 5.0),
    (checks.check_clock, 5.0),
    (checks.check_memory, 5.0),
    (checks.check_limits, 5.0),
    (checks.check_swap, 5.0),
    (checks.check_disk, 10.0),
    (checks.check_heat, 5.0),
    (network_checks.check_multicast, 5.0),
    (network_checks.check_coordinator, 10.0),
    (network_checks.check_firewall, 10.0),
)
"""In the order they are shown, each with the seconds after which it is given up: a dead disk or a
library that hangs must not keep the rest from being said."""

SETTINGS = Path("/etc/shoal/agent.toml")
SERVICE_STATE = Path("/var/lib/shoal/agent")
COLOURS = {"ok": "green", "note": "default", "warning": "yellow", "failed": "bold red"}


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cluster", help="which one to look for; default: the service's, or shoal")
    parser.add_argument(
        "--coordinator",
        type=control_endpoint,
        metavar="HOST[:PORT]",
        help="its address; default: the service's, or search by mDNS",
    )
    parser.add_argument("--state-dir", type=Path, metavar="DIR", help="where blocks are kept")
    parser.add_argument("--root", type=Path, default=Path("/"), help=argparse.SUPPRESS)


def run_doctor(options: argparse.Namespace, screen: Screen) -> None:
    """Run every check and show it. Raises CommandFailed when something essential fails."""
    machine = _machine(options)
    found = [
        finding for check, timeout_s in CHECKS for finding in bounded(check, machine, timeout_s)
    ]
    failed = [check.name for check in found if check.state == "failed"]
    if options.json:
        screen.json({"ok": not failed, "checks": [check.as_dict() for check in found]})
    else:
        for check in found:
            screen.text(f"{check.name:<12} ")
            screen.out.print(f"{check.state:<8}", style=COLOURS[check.state], end="")
            screen.text(f" {check.text}\n")
            if check.fix:
                screen.text(f"{'':<21} -> {check.fix}\n")
    if failed:
        raise CommandFailed(f"this machine cannot be an agent yet: {', '.join(failed)}")


def bounded(
    check: Callable[[Machine], list[Check]], machine: Machine, timeout_s: float
) -> list[Check]:
    """What ``check`` finds, or that it failed or did not come back in time."""
    name = check.__name__.removeprefix("check_")
    found: list[Check] = []

    def run() -> None:
        try:
            found.extend(check(machine))
        except Exception as error:  # On a broken machine anything may break, and is a finding.
            found.append(Check(name, "failed", f"cannot be checked: {error!r}"))

    thread = threading.Thread(target=run, name=f"check {name}", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        return [Check(name, "failed", f"no answer within {timeout_s:g} s")]
    return found


def _machine(options: argparse.Namespace) -> Machine:
    """What the arguments and the service's settings say. Raises UsageError."""
    root: Path = options.root
    settings = {}
    path = root / SETTINGS.relative_to("/")
    if path.is_file() and os.access(path, os.R_OK):
        try:
            settings = parse_toml(path.read_text(encoding="utf-8"), path)
        except UnicodeDecodeError as error:
            raise UsageError(f"{path} is not UTF-8 text: {error}") from error
    coordinator = options.coordinator
    if coordinator is None and "coordinator" in settings:
        try:
            coordinator = control_endpoint(str(settings["coordinator"]))
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"{path}: coordinator: {error}") from error
    state_dir = options.state_dir
    if state_dir is None:
        service = root / SERVICE_STATE.relative_to("/")
        state_dir = service if service.is_dir() else default_state_dir()
    return Machine(
        root=root,
        state_dir=state_dir,
        cluster=options.cluster or str(settings.get("cluster", "shoal")),
        coordinator=coordinator,
        backend=str(settings.get("backend", "onnx_cpu")),
    )
