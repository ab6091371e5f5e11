"""``shoal key``: API keys of the coordinator whose state directory is on this machine."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

from api.key_book import CLASSES, BadKey, KeyBook
from cli.client import SERVICE_STATE
from cli.errors import CommandFailed
from cli.render import Screen, titled_table
from cli.shared_arguments import add_book_argument
from wire.service import default_state_dir

ABOUT = (
    "Clients show a key as `Authorization: Bearer KEY`. The shoal command takes it from "
    "SHOAL_API_KEY. Once a key was made, the coordinator serves no request without one. A "
    "coordinator that listens beyond its machine never does, except with --insecure-http. The file "
    "of keys has only their hashes. A running coordinator sees each change at once."
)
EXAMPLES = (
    "  sudo shoal key create alice\n"
    "  shoal key create laptop --state-dir ~/shoal\n"
    "  shoal key create nightly --class bulk\n"
    "  shoal key list\n"
    "  shoal key revoke alice\n"
)


_ACTIONS = {
    "create": "Make a key, and print it once.",
    "list": "Show the names of all keys.",
    "revoke": "Make a key worthless, at once.",
}


def add_key_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="create | list | revoke", required=True)
    for (name, summary), act in zip(_ACTIONS.items(), (_create, _list, _revoke), strict=True):
        example = f"  shoal key {name}" + (" alice" if name != "list" else "")
        action = actions.add_parser(
            name, help=summary, description=summary, epilog=f"examples:\n{example}\n"
        )
        if name != "list":
            action.add_argument(
                "name", metavar="NAME", help="Who or what uses the key. Logs show this name."
            )
        if name == "create":
            action.add_argument(
                "--class",
                dest="urgency",
                choices=CLASSES,
                default="",
                help="The class of requests with this key: realtime ones go first, bulk ones make "
                "way. A request may say a less urgent class. Default: each says its class.",
            )
        add_book_argument(action)
        # It may stand on either side of the action.
        action.add_argument(
            "--json",
            action="store_true",
            default=argparse.SUPPRESS,
            help="Print JSON instead of tables.",
        )
        action.set_defaults(act=act)


def run_key(options: argparse.Namespace, screen: Screen) -> None:
    act: Callable[[KeyBook, argparse.Namespace, Screen], None] = options.act
    directory = options.state_dir or coordinator_state_dir()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        act(KeyBook(directory), options, screen)
    except BadKey as error:
        raise CommandFailed(str(error)) from error
    except PermissionError as error:
        raise CommandFailed(
            f"{directory} belongs to the coordinator's user: run this with sudo, or name another "
            "state directory with --state-dir"
        ) from error


def coordinator_state_dir() -> Path:
    """Return the state directory of the coordinator on this machine."""
    if "STATE_DIRECTORY" not in os.environ and SERVICE_STATE.is_dir():
        return SERVICE_STATE
    return default_state_dir("coordinator")


def _create(book: KeyBook, options: argparse.Namespace, screen: Screen) -> None:
    key = book.create(options.name, options.urgency)
    if screen.json_output:
        screen.json({"name": options.name, "key": key, "class": options.urgency or None})
        return
    screen.out.print(key, markup=False, soft_wrap=True, highlight=False)
    screen.note("this key is shown only now; every client of the API needs a key from now on")


def _list(book: KeyBook, options: argparse.Namespace, screen: Screen) -> None:
    keys = book.listed()
    if screen.json_output:
        screen.json(
            {
                "keys": [
                    {"name": key.name, "created_s": key.created_s, "class": key.urgency or None}
                    for key in keys
                ]
            }
        )
    elif not keys:
        screen.out.print("there are no keys")
    else:
        table = titled_table("API keys")
        table.add_column("name")
        table.add_column("class")
        table.add_column("made")
        for key in keys:
            made = time.strftime("%Y-%m-%d %H:%M", time.localtime(key.created_s))
            table.add_row(key.name, key.urgency or "any", made)
        screen.out.print(table)


def _revoke(book: KeyBook, options: argparse.Namespace, screen: Screen) -> None:
    book.revoke(options.name)
    if screen.json_output:
        screen.json({"revoked": options.name})
    else:
        screen.out.print(f"{options.name} is revoked", markup=False)
