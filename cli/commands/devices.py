"""``shoal devices``: who has joined, what was measured, and ``revoke``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from cli.client import Client, default_url
from cli.commands.keys import coordinator_state_dir
from cli.errors import CommandFailed, CoordinatorUnreachable
from cli.parser import add_url_argument
from cli.render import Screen
from cli.shared_arguments import add_book_argument

ABOUT = (
    "It shows each device, its measured links, the beginning of its key, and the devices that "
    "may join but are not here. `shoal devices revoke` takes one's right to join away."
)
EXAMPLES = (
    "  shoal devices\n"
    "  shoal devices --measure pi-3  # again, now that nothing else runs there\n"
    "  shoal devices revoke pi-3     # it is sold, or was stolen\n"
    "  shoal devices --json | jq '.devices[].name'\n"
)
_REVOKE = "Let a device join no more, and drop it at once."
_REVOKE_ABOUT = (
    "The coordinator closes the device's connection and tells all others not to take its calls. "
    "The device can join again only with a new token. Where no coordinator answers, its list in "
    "the state directory of this machine is changed."
)


def add_devices_arguments(devices: argparse.ArgumentParser) -> None:
    devices.add_argument(
        "--measure",
        metavar="NAME",
        help="First measure this device's block times and links again.",
    )
    add_url_argument(devices)
    actions = devices.add_subparsers(dest="action", metavar="revoke")
    revoke = actions.add_parser(
        "revoke",
        help=_REVOKE,
        description=f"{_REVOKE}\n\n{_REVOKE_ABOUT}",
        epilog="examples:\n"
        "  shoal devices revoke pi-3\n"
        "  shoal devices revoke pi-3 --url http://nano.lan:7421\n"
        "  sudo shoal devices revoke pi-3 --state-dir /var/lib/shoal/coordinator\n",
    )
    revoke.add_argument("name", metavar="NAME", help="The device's name or id.")
    add_book_argument(revoke)
    # These may stand on either side of the action.
    revoke.add_argument("--url", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    revoke.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )


def run_devices(options: argparse.Namespace, screen: Screen) -> None:
    if options.action == "revoke":
        _revoke(options, screen)
        return
    with Client(options.url or default_url()) as client:
        if options.measure is None:
            answer = client.get("/shoal/v1/devices")
        else:
            with screen.progress() as on_step:
                answer = client.operate("/shoal/v1/measure", {"device": options.measure}, on_step)
    if options.json:
        screen.json(answer)
        return
    if answer["devices"]:
        screen.devices(answer)
    else:
        screen.out.print("no agent has joined yet: `shoal token create` prints how one joins")
    absent = answer.get("absent", ())  # Older coordinators do not send them.
    for device in absent:
        screen.out.print(
            f"not here: {device['name']} (key {device['key']})", markup=False, soft_wrap=True
        )


def _revoke(options: argparse.Namespace, screen: Screen) -> None:
    if options.state_dir is not None:
        answer = _revoke_in_file(options)
    else:
        try:
            with Client(options.url or default_url()) as client:
                answer = client.post("/shoal/v1/revoke", {"device": options.name})
        except CoordinatorUnreachable:
            is_elsewhere = options.url is not None or "SHOAL_COORDINATOR" in os.environ
            if is_elsewhere or not _has_book(coordinator_state_dir()):
                raise
            answer = _revoke_in_file(options)
    if screen.json_output:
        screen.json(answer)
    else:
        screen.out.print(f"{answer['revoked']} is revoked", markup=False)


def _revoke_in_file(options: argparse.Namespace) -> dict[str, Any]:
    # With them come cryptography and numpy, which `shoal devices` does not need.
    from cli.commands.tokens import with_book
    from coordinator.roster.book import DeviceBook

    def revoke(directory: Path) -> dict[str, Any]:
        gone = DeviceBook(directory).revoke_device(options.name)
        return {"revoked": gone.name or gone.device, "device": gone.device}

    return with_book(options, revoke)


def _has_book(directory: Path) -> bool:
    from coordinator.roster.book import FILE

    try:
        return (directory / FILE).exists()
    except PermissionError as error:
        raise CommandFailed(
            f"no coordinator answers, and {directory} belongs to another user: run this with sudo"
        ) from error
