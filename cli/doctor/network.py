"""The network checks of ``shoal doctor``: multicast, the coordinator and firewalls."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import subprocess
import threading
from typing import Any

from cli.doctor.checks import Check, Machine
from cli.doctor.hardware import read_text
from wire import limits
from wire.discovery import DiscoveryUnavailable, find_coordinator, host_addresses
from wire.transport import reason

MDNS = ("224.0.0.251", 5353)
_MDNS_QUERY = bytes(12)
"""A message without questions, which every responder ignores."""

SEARCH_S = 4.0
"""A coordinator on this network answers within a second. A search round takes three."""

_ECHO_S = 1.0
_TOOL_S = 3.0
_IFF_UP = 0x1
_IFF_MULTICAST = 0x1000

WITHOUT_MULTICAST = "name the coordinator: shoal agent --coordinator HOST"
PORTS = "TCP 7420 (and 7421 for users) on the coordinator, UDP 5353, and the agent's --port"


def check_multicast(machine: Machine) -> list[Check]:
    """Check whether this machine can send and receive mDNS packets."""
    addresses = [address for address in host_addresses() if not address.startswith("127.")]
    if not addresses:
        return [Check("multicast", "failed", "no network interface has an address", "connect it")]
    flags = {
        path.parent.name: int(read_text(path) or "0", 16)
        for path in sorted(machine.root.glob("sys/class/net/*/flags"))
    }
    up = [name for name, value in flags.items() if value & _IFF_UP and name != "lo"]
    unable = [name for name in up if not flags[name] & _IFF_MULTICAST]
    if up and unable == up:
        addresses = []
    heard, why = [], ""
    for address in addresses:
        try:
            if _echo(address):
                heard.append(address)
        except OSError as error:
            why = f" ({reason(error)})"
    if not heard:
        return [
            Check(
                "multicast",
                "warning",
                f"not on {', '.join(addresses or unable)}{why}: no discovery by mDNS",
                WITHOUT_MULTICAST,
            )
        ]
    text = f"works on this machine at {', '.join(heard)}"
    if unable:
        text += f"; not on {', '.join(unable)}"
    return [Check("multicast", "ok", text)]


def check_coordinator(machine: Machine) -> list[Check]:
    """Check the coordinator that an agent on this machine would join."""
    endpoint = machine.coordinator
    if endpoint is not None:
        where = f"{endpoint.host}:{endpoint.port}"
        try:
            address = (endpoint.host, endpoint.port)
            socket.create_connection(address, limits.CONNECT_TIMEOUT_S).close()
        except OSError as error:
            fix = "start `shoal coordinator` there, and let TCP 7420 through its firewall"
            return [Check("coordinator", "warning", f"{where}: {reason(error)}", fix)]
        return [Check("coordinator", "ok", f"{where} takes connections")]
    stop = threading.Event()
    timer = threading.Timer(SEARCH_S, stop.set)
    timer.start()
    try:
        found = find_coordinator(machine.cluster, stop)
    except DiscoveryUnavailable as error:
        return [Check("coordinator", "warning", str(error), WITHOUT_MULTICAST)]
    finally:
        timer.cancel()
        timer.join()
    if not found:
        return [
            Check(
                "coordinator",
                "note",
                f"none of cluster {machine.cluster!r} answers by mDNS within {SEARCH_S:g} s",
                "start `shoal coordinator`; if one runs, the network blocks multicast: "
                + WITHOUT_MULTICAST,
            )
        ]
    where = ", ".join(f"{endpoint.host}:{endpoint.port}" for endpoint in found)
    return [Check("coordinator", "ok", f"cluster {machine.cluster!r} at {where}, found by mDNS")]


def check_firewall(machine: Machine) -> list[Check]:
    """Check whether a firewall drops incoming connections by default."""
    if not machine.real:
        return [Check("firewall", "note", "not checked")]
    closed, seen = [], False
    for name, command in (
        ("nftables", ["nft", "-j", "list", "ruleset"]),
        ("iptables", ["iptables", "-S", "INPUT"]),
    ):
        output = _output(command)
        if output is None:
            continue
        seen = True
        drops = _nft_drops(output) if name == "nftables" else _iptables_drops(output)
        if drops:
            closed.append(name)
    if closed:
        fix = f"allow {PORTS}; with ufw: sudo ufw allow 7420/tcp"
        return [Check("firewall", "warning", f"{closed[0]} drops incoming packets by default", fix)]
    if not seen:
        return [Check("firewall", "note", "unknown: run as root, with nft or iptables")]
    return [Check("firewall", "ok", "drops nothing by default")]


def _echo(address: str) -> bool:
    """Whether a packet sent to the mDNS group at ``address`` comes back. Raises OSError."""
    interface = socket.inet_aton(address)
    with contextlib.ExitStack() as stack:
        listener, sender = (
            stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in "ab"
        )
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            listener.setsockopt(socket.SOL_SOCKET, option, 1)
        listener.bind(("", MDNS[1]))
        group = socket.inet_aton(MDNS[0]) + interface
        listener.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
        listener.settimeout(_ECHO_S)
        sender.bind((address, 0))
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, interface)
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)
        sender.sendto(_MDNS_QUERY, MDNS)
        ours = sender.getsockname()
        try:
            while listener.recvfrom(2048)[1] != ours:
                pass
        except TimeoutError:
            return False
    return True


def _output(command: list[str]) -> str | None:
    """The output of a tool, or None if it is missing, not allowed, or does not answer."""
    path = shutil.which(command[0], path="/usr/sbin:/sbin:/usr/bin:/bin")
    if path is None:
        return None
    try:
        completed = subprocess.run(  # noqa: S603 - fixed commands
            [path, *command[1:]], capture_output=True, text=True, timeout=_TOOL_S, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return completed.stdout if completed.returncode == 0 else None


def _nft_drops(output: str) -> bool:
    try:
        entries: list[dict[str, Any]] = json.loads(output)["nftables"]
        chains = [entry["chain"] for entry in entries if "chain" in entry]
    except (ValueError, KeyError, TypeError):
        return False
    return any(chain.get("hook") == "input" and chain.get("policy") == "drop" for chain in chains)


def _iptables_drops(output: str) -> bool:
    return re.search(r"^-P INPUT (DROP|REJECT)", output, re.MULTILINE) is not None
