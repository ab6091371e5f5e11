"""The checks of ``shoal doctor`` for a coordinator's machine."""

from __future__ import annotations

import socket

from api.key_book import BadKey, KeyBook
from cli.doctor.checks import LEAST_MEMORY_BYTES, NEEDED, Check, Machine, installed
from cli.doctor.network import check_multicast
from model.memory import memory_bytes
from wire import limits
from wire.addresses import is_loopback
from wire.sizes import format_size
from wire.transport import reason

COORDINATOR_NEEDED = (
    *NEEDED,
    "httpx",
    "huggingface-hub",
    "jinja2",
    "prometheus-client",
    "pulp",
    "pyyaml",
    "starlette",
    "tokenizers",
    "uvicorn",
)

EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - a setting's value
"""Addresses that mean all interfaces, and the address that reaches them on this machine."""


def check_coordinator_libraries(machine: Machine) -> list[Check]:
    """Check the libraries that a coordinator imports."""
    return installed(COORDINATOR_NEEDED)


def check_coordinator_memory(machine: Machine) -> list[Check]:
    """Check memory. A coordinator holds one block at a time while it quantizes."""
    available, total = memory_bytes(machine.root)
    text = f"{format_size(available)} of {format_size(total)} available"
    if available < LEAST_MEMORY_BYTES:
        text += ", little for quantizing a model's blocks"
        return [Check("memory", "warning", text, "end other programs")]
    return [Check("memory", "ok", text)]


def check_announcing(machine: Machine) -> list[Check]:
    """Check whether agents can find this coordinator by mDNS. Otherwise they need its address."""
    fix = "give each agent the address: shoal agent --coordinator HOST"
    if not machine.announces:
        return [Check("multicast", "note", "no_mdns is set: nothing is announced", fix)]
    (found,) = check_multicast(machine)
    if found.state == "ok":
        return [found]
    if found.state == "failed":  # No interface has an address.
        text = f"{found.text}: only agents on this machine can join"
        return [Check("multicast", "warning", text, "connect it")]
    return [Check("multicast", "warning", found.text, fix)]


def check_keys(machine: Machine) -> list[Check]:
    """Check whether clients that reach the API from other machines need a key, and have one."""
    http = machine.http
    if http is None or is_loopback(http.host):
        return []
    if machine.insecure_http:
        text = f"the API at {http.host}:{http.port} asks for no key: whoever reaches it may use it"
        return [Check("keys", "warning", text, "remove insecure_http, and run shoal key create")]
    book = KeyBook(machine.state_dir)
    try:
        count = len(book.listed())
    except BadKey as error:
        return [Check("keys", "warning", str(error), "run shoal doctor with sudo")]
    if not count:
        text = "clients of other machines need a key, and there is none"
        return [Check("keys", "warning", text, "sudo shoal key create NAME")]
    return [Check("keys", "ok", f"{count} API key{'s' * (count != 1)}")]


def check_serving(machine: Machine) -> list[Check]:
    """Check whether a coordinator listens where the settings say."""
    endpoint = machine.coordinator
    if endpoint is None:
        return []
    where = f"{endpoint.host}:{endpoint.port}"
    address = (EVERYWHERE.get(endpoint.host, endpoint.host), endpoint.port)
    try:
        socket.create_connection(address, limits.CONNECT_TIMEOUT_S).close()
    except OSError as error:
        fix = (
            "sudo systemctl start shoal-coordinator, or `shoal coordinator`;"
            " journalctl -u shoal-coordinator says why it ended"
        )
        return [Check("coordinator", "warning", f"none listens at {where}: {reason(error)}", fix)]
    return [Check("coordinator", "ok", f"listens at {where}")]
