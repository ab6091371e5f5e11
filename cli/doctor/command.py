"""``shoal doctor``: checks what works on this machine, and says how to mend the rest.

The checks are in cli.doctor.checks and cli.doctor.network. Each runs for a bounded time. The exit
code is 1 if something essential fails.
"""

from __future__ import annotations

import argparse
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from cli.argument_types import CONTROL_PORT, control_endpoint, http_endpoint
from cli.doctor import checks, coordinator, network
from cli.doctor.checks import Check, Machine
from cli.errors import CommandFailed, UsageError
from cli.render import Screen
from cli.service.settings import parse_toml
from wire.messages import Endpoint
from wire.service import default_state_dir

ABOUT = (
    "It checks memory, disk, libraries, accelerators and network. Each finding that is not ok says "
    "what to do about it. The exit code is 1 if something essential fails."
)
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
    (network.check_multicast, 5.0),
    (network.check_coordinator, 10.0),
    (network.check_firewall, 10.0),
)
"""The checks of an agent in the order of the output, each with its time limit in seconds.

A dead disk or a library that hangs must not hold up the other checks."""

COORDINATOR_CHECKS: tuple[tuple[Callable[[Machine], list[Check]], float], ...] = (
    (checks.check_board, 5.0),
    (checks.check_system, 5.0),
    (coordinator.check_coordinator_libraries, 5.0),
    (checks.check_clock, 5.0),
    (coordinator.check_coordinator_memory, 5.0),
    (checks.check_disk, 10.0),
    (coordinator.check_announcing, 5.0),
    (coordinator.check_serving, 10.0),
    (coordinator.check_keys, 5.0),
    (network.check_firewall, 10.0),
)
"""The checks of a coordinator, which needs no backend and joins no cluster."""

ROLES = {"agent": CHECKS, "coordinator": COORDINATOR_CHECKS}
SETTINGS = Path("/etc/shoal")
SERVICE_STATE = Path("/var/lib/shoal")
UNITS = Path("/etc/systemd/system")
ANYWHERE = "0.0.0.0"  # noqa: S104 - the coordinator's default
COLOURS = {"ok": "green", "note": "default", "warning": "yellow", "failed": "bold red"}


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cluster",
        metavar="NAME",
        help="The cluster to look for. Default: the installed service's, else shoal.",
    )
    parser.add_argument(
        "--coordinator",
        type=control_endpoint,
        metavar="HOST[:PORT]",
        help="Where the coordinator is. Default: as the installed service says, else a search by "
        "mDNS.",
    )
    parser.add_argument(
        "--role",
        choices=tuple(ROLES),
        help="What to check the machine for. Default: the services that are installed, else agent.",
    )
    parser.add_argument(
        "--state-dir",
        type=Path,
        metavar="DIR",
        help="The directory of blocks and measurements. Default: the installed service's, else "
        "the user's.",
    )
    parser.add_argument("--root", type=Path, default=Path("/"), help=argparse.SUPPRESS)


def run_doctor(options: argparse.Namespace, screen: Screen) -> None:
    """Run every check and show it. Raises CommandFailed if something essential fails."""
    roles = _roles(options)
    found: list[Check] = []
    verdicts = []
    for role in roles:
        machine = _machine(options, role)
        of_role = [
            finding
            for check, timeout_s in ROLES[role]
            for finding in bounded(check, machine, timeout_s)
        ]
        failed = [check.name for check in of_role if check.state == "failed"]
        if failed:
            article = "an" if role == "agent" else "a"
            verdicts.append(f"this machine cannot be {article} {role} yet: {', '.join(failed)}")
        found += [check for check in of_role if check not in found]
    if options.json:
        checked = [check.as_dict() for check in found]
        screen.json({"ok": not verdicts, "roles": roles, "checks": checked})
    else:
        for check in found:
            screen.text(f"{check.name:<12} ")
            screen.out.print(f"{check.state:<8}", style=COLOURS[check.state], end="")
            screen.text(f" {check.text}\n")
            if check.fix:
                screen.text(f"{'':<21} -> {check.fix}\n")
    if verdicts:
        raise CommandFailed("; ".join(verdicts))


def bounded(
    check: Callable[[Machine], list[Check]], machine: Machine, timeout_s: float
) -> list[Check]:
    """The findings of ``check``, or a failure if it raises or takes too long."""
    name = check.__name__.removeprefix("check_")
    found: list[Check] = []

    def run() -> None:
        try:
            found.extend(check(machine))
        except Exception as error:  # On a broken machine anything may fail. It is a finding.
            found.append(Check(name, "failed", f"cannot be checked: {error!r}"))

    thread = threading.Thread(target=run, name=f"check {name}", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        return [Check(name, "failed", f"no answer within {timeout_s:g} s")]
    return found


def _roles(options: argparse.Namespace) -> list[str]:
    """The roles to check the machine for: --role, else its installed services."""
    if options.role is not None:
        return [options.role]
    units = options.root / UNITS.relative_to("/")
    return [role for role in ROLES if (units / f"shoal-{role}.service").exists()] or ["agent"]


def _machine(options: argparse.Namespace, role: str) -> Machine:
    """The machine as arguments and the service's settings describe it. Raises UsageError."""
    root: Path = options.root
    settings = {}
    path = root / SETTINGS.relative_to("/") / f"{role}.toml"
    if path.is_file() and os.access(path, os.R_OK):
        try:
            settings = parse_toml(path.read_text(encoding="utf-8"), path)
        except UnicodeDecodeError as error:
            raise UsageError(f"{path} is not UTF-8 text: {error}") from error
    coordinator = options.coordinator
    if role == "coordinator":
        bind, port = settings.get("bind", ANYWHERE), settings.get("port", CONTROL_PORT)
        coordinator = Endpoint(str(bind), port if isinstance(port, int) else CONTROL_PORT)
    elif coordinator is None and "coordinator" in settings:
        try:
            coordinator = control_endpoint(str(settings["coordinator"]))
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"{path}: coordinator: {error}") from error
    state_dir = options.state_dir
    if state_dir is None:
        service = root / SERVICE_STATE.relative_to("/") / role
        state_dir = service if service.is_dir() else default_state_dir(role)
    return Machine(
        root=root,
        state_dir=state_dir,
        cluster=options.cluster or str(settings.get("cluster", "shoal")),
        coordinator=coordinator,
        backend=str(settings.get("backend", "onnx_cpu")),
        announces=not settings.get("no_mdns", False),
        http=_http(settings, path) if role == "coordinator" else None,
        insecure_http=settings.get("insecure_http") is True,
    )


def _http(settings: Mapping[str, object], path: Path) -> Endpoint | None:
    """Where the settings let HTTP listen, or None for the default. Raises UsageError."""
    if "http" not in settings:
        return None
    try:
        endpoint: Endpoint = http_endpoint(str(settings["http"]))
        return endpoint
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"{path}: http: {error}") from error
