"""``shoal testbed``: emulates the devices of a lab file (docs/testbed.md)."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.status import Status

from cli.argument_types import HTTP_PORT
from cli.errors import CommandFailed
from cli.render import Screen, titled_table
from wire.sizes import format_size

DEFAULT_NAME = "lab"

ABOUT = (
    "A lab file describes devices and links. Each device becomes a network namespace with its own "
    "limits of memory and processor. Links have the described speed and delay. It needs root."
)
EXAMPLES = (
    "  sudo shoal testbed up lab.yaml\n"
    "  shoal load ~/models/opt-125m\n"
    "  shoal run opt-125m 'Once upon a time'\n"
    "  sudo shoal testbed fault attic link:rate=5,delay=40  # 5 Mbit/s, 40 ms one way\n"
    "  sudo shoal testbed fault pi-2 kill                   # as a loss of power\n"
    "  sudo shoal testbed exec pi-1 -- ip address\n"
    "  sudo shoal testbed status --json\n"
    "  sudo shoal testbed down\n"
)

FAULT_EXAMPLES = (
    "  sudo shoal testbed fault pi-2 kill\n"
    "  sudo shoal testbed fault attic link:rate=5,delay=40  # 5 Mbit/s, 40 ms one way\n"
    "  sudo shoal testbed fault attic heal\n"
)
FAULT_KINDS = (
    "\nfaults:\n"
    "  kill           end all processes at once, as a loss of power does\n"
    "  freeze, thaw   stop all processes, and let them go on\n"
    "  cut            unplug the cable: the carrier is gone\n"
    "  blackhole      drop every packet while the carrier stays\n"
    "  firewall       let nobody open a TCP connection to the host\n"
    "  lose=HOST      drop packets to HOST\n"
    "  multicast=off  drop multicast, which mDNS needs\n"
    "  link:KEY=NUMBER[,...]\n"
    "                 change the link: rate in Mbit/s, delay and jitter in ms\n"
    "                 one way, loss in percent\n"
    "  heal           end the faults of the cable\n"
    "  slow=PERCENT   limit the host to a share of one core, until slow=off\n"
)


def add_testbed_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--name", default=DEFAULT_NAME, help="The testbed's name. Default: %(default)s."
    )
    shared.add_argument(  # It may stand on either side of the action.
        "--json",
        action="store_true",
        default=argparse.SUPPRESS,
        help="Print JSON instead of tables.",
    )

    def action(name: str, summary: str, examples: str) -> argparse.ArgumentParser:
        return actions.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"examples:\n{examples}",
            parents=[shared],
        )

    up = action(
        "up",
        "Make the hosts of a lab file, and start shoal on them.",
        "  sudo shoal testbed up lab.yaml\n",
    )
    up.add_argument(
        "lab",
        type=Path,
        metavar="LAB.yaml",
        help="The lab file. A testbed of the same name is removed first.",
    )
    up.add_argument(
        "--bare",
        action="store_true",
        help="Make hosts and links only. Start neither coordinator nor agents.",
    )
    up.add_argument(
        "--http",
        type=_port,
        metavar="PORT",
        help=f"The API's port on this machine. Default: {HTTP_PORT} if it is free, else any.",
    )
    action(
        "status",
        "Show the hosts, the faults in force, and the running processes.",
        "  sudo shoal testbed status --json\n",
    )
    execute = action(
        "exec", "Run a command on a host.", "  sudo shoal testbed exec pi-1 -- ip address\n"
    )
    execute.add_argument("host", metavar="HOST", help="A host of the lab.")
    execute.add_argument(
        "words",
        nargs=argparse.REMAINDER,
        metavar="-- COMMAND",
        help="The command with its arguments. Its exit code is passed on.",
    )
    fault = action(
        "fault", "Inject a fault at a host, or end its faults.", FAULT_EXAMPLES + FAULT_KINDS
    )
    fault.add_argument("host", metavar="HOST", help="A host of the lab.")
    fault.add_argument("what", metavar="FAULT", help="One of the faults below.")
    action(
        "down",
        "Remove the testbed, and end every process on it.",
        "  sudo shoal testbed down\n",
    )


def run_testbed(options: argparse.Namespace, screen: Screen) -> None:
    """Carry out one action. Raises CommandFailed."""
    from testbed.bed import Testbed, TestbedError, down

    try:
        if options.action == "up":
            _up(options, screen)
        elif options.action == "status":
            _show(Testbed.standing(options.name).status(), options, screen)
        elif options.action == "exec":
            _exec(Testbed.standing(options.name), options)
        elif options.action == "fault":
            Testbed.standing(options.name).fault(options.host, options.what)
        else:
            down(options.name)
    except TestbedError as error:
        raise CommandFailed(str(error)) from error


def _up(options: argparse.Namespace, screen: Screen) -> None:
    from planning.labs.lab import LabError
    from testbed.bed import Testbed, check_possible, down
    from testbed.cluster import Cluster
    from testbed.lab import read_emulated_lab

    check_possible()
    try:
        lab = read_emulated_lab(options.lab)
    except LabError as error:
        raise CommandFailed(str(error)) from error
    bed = Testbed(lab.network, options.name)
    url = None
    try:
        with _doing(screen, "making hosts and links") as say:
            bed.up()
            if not options.bare:
                cluster = Cluster(bed, bed.directory)
                say("starting the coordinator")
                cluster.start_coordinator()
                for host, settings in lab.agents.items():
                    cluster.start_agent(host, settings)
                total = len(lab.agents)
                cluster.wait_for_agents(
                    list(lab.agents),
                    lambda joined: say(f"starting agents: {joined} of {total} have joined"),
                )
                url = cluster.open_door(options.http)
    except BaseException:  # Also when interrupted, no host stays.
        down(options.name)
        raise
    if options.json:
        screen.json({**bed.status(), "url": url})
        return
    _show(bed.status(), options, screen)
    if url is not None:
        screen.out.print(f"the coordinator's API is at {url}")
        if not url.endswith(":7421"):
            screen.out.print(f"for shoal's other commands: export SHOAL_COORDINATOR={url}")


def _show(status: dict[str, Any], options: argparse.Namespace, screen: Screen) -> None:
    from testbed.bed import describe

    if options.json:
        screen.json(status)
        return
    title = f"testbed {status['name']}" + ("" if status["switch"] else ": its switch has ended")
    shown = titled_table(title)
    for column in ("host", "address"):
        shown.add_column(column, no_wrap=True)
    for column in ("CPU %", "memory", "processes"):
        shown.add_column(column, justify="right")
    shown.add_column("faults")
    for name, host in status["hosts"].items():
        memory, cpu = host["memory_bytes"], host["cpu_percent"]
        shown.add_row(
            escape(name),
            host["address"],
            "-" if cpu is None else f"{cpu:g}",
            "-" if memory is None else format_size(memory),
            str(len(host["processes"])),
            describe(host["fault"]),
        )
    screen.table(shown)


def _exec(bed: Any, options: argparse.Namespace) -> None:
    words = options.words[1:] if options.words[:1] == ["--"] else options.words
    if not words:
        raise CommandFailed("exec: no command: shoal testbed exec HOST -- COMMAND")
    line = bed.command(options.host, words)
    # The command replaces this process, with its terminal, signals and exit code.
    os.execv(line[0], line)  # noqa: S606 - the user's command


@contextmanager
def _doing(screen: Screen, what: str) -> Iterator[Any]:
    """Show a status line. Yields the function that changes it."""
    with Status(what, console=screen.err) as status:
        yield status.update


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a port between 1 and 65535")
    return int(text)
