"""``shoal token``: by which new devices join the coordinator of this machine."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from cli.argument_types import CONTROL_PORT, argument, whole
from cli.commands.keys import coordinator_state_dir
from cli.errors import CommandFailed
from cli.render import Screen, titled_table
from cli.service.running import Running, running_in
from cli.shared_arguments import add_book_argument
from coordinator.roster.book import DEFAULT_TTL_S, BadBook, DeviceBook
from wire.addresses import is_loopback, reachable_addresses
from wire.identity import IdentityError, own_identity

ABOUT = (
    "A new device joins by a token, once. Then it is known by its key. The token names the "
    "coordinator, so the device tells nothing to another one. A running coordinator sees each "
    "change at once."
)
EXAMPLES = (
    "  sudo shoal token create\n"
    "  sudo shoal token create --uses 4 --ttl 1h\n"
    "  shoal token list --state-dir ~/shoal\n"
    "  sudo shoal token revoke 1f0c9a52\n"
)
_EACH = {
    "create": ("Make a token, and print it once.", "  sudo shoal token create\n"),
    "list": ("Show the ids of all tokens that can be used.", "  sudo shoal token list\n"),
    "revoke": (
        "Make a token worthless, at once. Devices that have joined by it stay.",
        "  sudo shoal token revoke 1f0c9a52\n",
    ),
}
Result = TypeVar("Result")
_UNIT_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
NEVER = "never"
ANY = "any"


def _ttl(text: str) -> float | None:
    if text == NEVER:
        return None
    found = re.fullmatch(r"([1-9][0-9]{0,5})([smhd])", text)
    if found is None:
        raise ValueError(text)
    return float(found[1]) * _UNIT_S[found[2]]


def _uses(text: str) -> int | None:
    count = None if text == ANY else whole(text)
    if count is not None and not 0 < count <= 1000:
        raise ValueError(text)
    return count


def add_token_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="create | list | revoke", required=True)
    for (name, (summary, example)), act in zip(
        _EACH.items(), (_create, _list, _revoke), strict=True
    ):
        action = actions.add_parser(
            name, help=summary, description=summary, epilog=f"examples:\n{example}"
        )
        if name == "create":
            action.add_argument(
                "--ttl",
                type=argument(_ttl, "a time such as 90m, 24h or 7d, or never"),
                default=DEFAULT_TTL_S,
                metavar="TIME",
                help="How long the token can be used: 90m, 24h, 7d, never. Default: 24h.",
            )
            action.add_argument(
                "--uses",
                type=argument(_uses, "a number from 1 to 1000, or any"),
                default=1,
                metavar="N",
                help="The number of devices that may join by it, or any. Default: 1.",
            )
        if name == "revoke":
            action.add_argument("id", metavar="ID", help="The id that `shoal token list` shows.")
        add_book_argument(action)
        # It may stand on either side of the action.
        action.add_argument(
            "--json",
            action="store_true",
            default=argparse.SUPPRESS,
            help="Print JSON instead of tables.",
        )
        action.set_defaults(act=act)


def run_token(options: argparse.Namespace, screen: Screen) -> None:
    act: Callable[[Path, argparse.Namespace, Screen], None] = options.act
    with_book(options, lambda directory: act(directory, options, screen))


def with_book(options: argparse.Namespace, act: Callable[[Path], Result]) -> Result:
    """Call ``act`` with the coordinator's state directory. Raises CommandFailed."""
    directory = options.state_dir or coordinator_state_dir()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return act(directory)
    except (BadBook, IdentityError) as error:
        raise CommandFailed(str(error)) from error
    except PermissionError as error:
        raise CommandFailed(
            f"{directory} belongs to the coordinator's user: run this with sudo, or name another "
            "state directory with --state-dir"
        ) from error


def _create(directory: Path, options: argparse.Namespace, screen: Screen) -> None:
    identity = own_identity(directory / "identity.pem")
    invite = DeviceBook(directory).invite(identity.fingerprint, options.ttl, options.uses)
    line = f"shoal agent {_where(running_in(directory))}--token-file -"
    if screen.json_output:
        screen.json({"id": invite.id, "token": invite.text, "join": line})
        return
    screen.out.print(invite.text, markup=False, soft_wrap=True, highlight=False)
    devices = "any number of devices" if options.uses is None else f"{options.uses} device(s)"
    until = "" if options.ttl is None else f" until {_moment(time.time() + options.ttl)}"
    screen.note(
        f"This token lets {devices} join{until}, and is shown only now. Run there\n\n"
        f"    {line}\n\n"
        f"or, for a service, `sudo sh install.sh {line.removeprefix('shoal ')}`. It asks for the "
        "token, so that none lands in the shell's history: paste the line above."
    )


def _where(running: Running | None) -> str:
    """The options by which an agent finds this coordinator.

    Without them it looks for the coordinator by mDNS.
    """
    port = CONTROL_PORT if running is None else running.control_port
    hosts = reachable_addresses("" if running is None else running.control_host)
    host = next((host for host in hosts if not is_loopback(host)), hosts[0] if hosts else None)
    if host is None:
        return ""
    at = f"[{host}]" if ":" in host else host
    at += f":{port}" if port != CONTROL_PORT else ""
    cluster = "" if running is None or running.cluster == "shoal" else running.cluster
    return f"--coordinator {at} " + (f"--cluster {cluster} " if cluster else "")


def _list(directory: Path, options: argparse.Namespace, screen: Screen) -> None:
    invites = DeviceBook(directory).invites()
    if screen.json_output:
        listed = [
            {"id": item.id, "created_s": item.created_s, "ends_s": item.ends_s, "uses": item.uses}
            for item in invites
        ]
        screen.json({"tokens": listed})
    elif not invites:
        screen.out.print("there are no tokens")
    else:
        table = titled_table("Tokens")
        for column in ("id", "made", "ends", "devices left"):
            table.add_column(column)
        for item in invites:
            ends = NEVER if item.ends_s is None else _moment(item.ends_s)
            uses = ANY if item.uses is None else str(item.uses)
            table.add_row(item.id, _moment(item.created_s), ends, uses)
        screen.out.print(table)


def _revoke(directory: Path, options: argparse.Namespace, screen: Screen) -> None:
    DeviceBook(directory).revoke_invite(options.id)
    if screen.json_output:
        screen.json({"revoked": options.id})
    else:
        screen.out.print(f"{options.id} is revoked", markup=False)


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
