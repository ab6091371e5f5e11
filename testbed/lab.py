"""The testbed of a lab file, which also serves to make plans offline (docs/testbed.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from planning.labs.lab import Lab, LabError
from planning.labs.lab_file import read_lab
from testbed.network import HUB, Host, Link, Network, NetworkError

AGENT_BYTES = 320 << 20
WEIGHT_FACTOR = 1.25
"""A host may take AGENT_BYTES for the agent and its libraries, and this multiple of its stage.

The excess is for the buffers of a load. The limit catches a stage that takes far more than planned.
"""

_SECTION = ("hosts", "default")
_HOST = ("cpu", "jitter_ms", "loss", "backend")


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """The limits and the backend of one host's agent. None means the agent's default."""

    memory_bytes: int
    storage_bytes: int
    backend: str | None = None


@dataclass(frozen=True, slots=True)
class EmulatedLab:
    """A lab's devices as hosts, and HUB for the coordinator. Links of HUB are not shaped."""

    network: Network
    agents: Mapping[str, AgentSettings]


def read_emulated_lab(path: Path) -> EmulatedLab:
    """Read the testbed that a lab file describes. Raises LabError with one line for the user."""
    lab = read_lab(path)
    section = yaml.safe_load(path.read_bytes()).get("emulation") or {}
    return emulate(lab, section)


def emulate(lab: Lab, section: Mapping[str, Any]) -> EmulatedLab:
    """Turn ``lab`` into hosts. ``section`` is ``emulation`` in its file. Raises LabError."""
    where = f"{lab.source}: emulation"
    _check_keys(section, _SECTION, where)
    names = [device.name for device in lab.devices]
    if HUB in names:
        raise LabError(
            f"{lab.source}: {HUB} is the name of the coordinator's host: rename the device"
        )
    settings = section.get("hosts") or {}
    _check_keys(settings, names, f"{where}: hosts")
    default = section.get("default") or {}
    hosts: dict[str, Host] = {HUB: Host()}
    agents: dict[str, AgentSettings] = {}
    for device in lab.devices:
        own = settings.get(device.name) or {}
        for values, place in ((default, "default"), (own, f"hosts: {device.name}")):
            _check_keys(values, _HOST, f"{where}: {place}")
        memory_bytes = AGENT_BYTES + int(WEIGHT_FACTOR * device.memory_bytes)
        values = {**default, **own}
        backend = values.pop("backend", None)
        if backend is not None and not (isinstance(backend, str) and backend.isidentifier()):
            raise LabError(f"{where}: {device.name}: backend: expected a name like onnx_cpu")
        hosts[device.name] = _host(values, memory_bytes, f"{where}: {device.name}")
        agents[device.name] = AgentSettings(device.memory_bytes, device.storage_bytes, backend)
    links = {
        (link.source, link.target): Link(link.rtt_s / 2, link.bytes_per_s) for link in lab.links
    }
    for name in names:
        links[HUB, name] = links[name, HUB] = Link()
    try:
        network = Network(hosts, links, None)
    except NetworkError as error:
        raise LabError(f"{lab.source}: {error}") from error
    return EmulatedLab(network, agents)


def _host(values: Mapping[str, Any], memory_bytes: int, where: str) -> Host:
    numbers: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
            raise LabError(f"{where}: {key}: expected a number from 0 up, found {value!r:.40}")
        numbers[key] = float(value)
    cpu_percent, loss = numbers.get("cpu"), numbers.get("loss", 0.0)
    if cpu_percent is not None and not 1 <= cpu_percent < math.inf:
        raise LabError(f"{where}: cpu: expected percent of one core, from 1 up")
    if loss >= 100:
        raise LabError(f"{where}: loss: expected percent of frames, below 100")
    return Host(cpu_percent, memory_bytes, numbers.get("jitter_ms", 0.0) / 1e3, loss / 100)


def _check_keys(values: object, known: list[str] | tuple[str, ...], where: str) -> None:
    if not isinstance(values, Mapping):
        raise LabError(f"{where}: expected `key: value` pairs")
    for key in values:
        if key not in known:
            raise LabError(f"{where}: unknown key {key!r:.40}: known are {', '.join(known)}")
