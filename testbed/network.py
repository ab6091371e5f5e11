"""The description of a testbed as values: hosts, and the links between them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

HOST_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
MAX_HOSTS = 250
_SUBNET = "10.77.0"

HUB = "hub"
"""The host of a lab's coordinator."""


class NetworkError(Exception):
    """A testbed cannot have this description. The text is one line for the user."""


@dataclass(frozen=True, slots=True)
class Host:
    """One host. None means without limit.

    cpu_percent: of one core of the machine underneath.
    cores: the cores of that machine on which its processes may run.
    jitter_s: each frame to or from the host is up to this much earlier or later, uniformly.
    loss: the share of frames to or from the host that get lost.
    """

    cpu_percent: float | None = None
    memory_bytes: int | None = None
    jitter_s: float = 0.0
    loss: float = 0.0
    cores: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.cores is not None and not self.cores:
            raise NetworkError("a host without cores: not possible")
        if self.jitter_s < 0 or not 0 <= self.loss < 1:
            raise NetworkError(f"jitter {self.jitter_s} s, loss {self.loss}: not possible")


@dataclass(frozen=True, slots=True)
class Link:
    """One direction between two hosts: the delay of a frame, and the rate at which bytes pass."""

    delay_s: float = 0.0
    bytes_per_s: float = math.inf

    def __post_init__(self) -> None:
        if not 0 <= self.delay_s < math.inf or not self.bytes_per_s > 0:
            raise NetworkError(
                f"a link of {self.bytes_per_s} bytes/s, {self.delay_s} s: not possible"
            )


@dataclass(frozen=True, slots=True)
class Network:
    """Hosts on one switch, in order. A pair (source, target) has its own link or the default one.

    If ``default`` is None, other pairs cannot reach each other. In each direction, a host's port is
    as fast as its fastest link.
    """

    hosts: Mapping[str, Host]
    links: Mapping[tuple[str, str], Link] = field(default_factory=dict)
    default: Link | None = Link()

    def __post_init__(self) -> None:
        if not 0 < len(self.hosts) <= MAX_HOSTS:
            raise NetworkError(f"{len(self.hosts)} hosts: there can be 1 to {MAX_HOSTS}")
        for name in self.hosts:
            if not HOST_NAME.fullmatch(name):
                raise NetworkError(
                    f"host {name!r}: use 1 to 63 letters, digits, dots, dashes or underscores"
                )
        for pair in self.links:
            if not set(pair) <= set(self.hosts) or pair[0] == pair[1]:
                raise NetworkError(f"a link from {pair[0]} to {pair[1]}: name two different hosts")

    def link(self, source: str, target: str) -> Link | None:
        """Return the link from one host to another, or None if there is none."""
        return self.links.get((source, target), self.default)

    def address(self, host: str) -> str:
        """Return the host's IPv4 address. All hosts are in one /24 network."""
        return f"{_SUBNET}.{1 + list(self.hosts).index(host)}"

    def to_dict(self) -> dict[str, Any]:
        """Return the network in a form that JSON can hold."""
        return {
            "hosts": {name: asdict(host) for name, host in self.hosts.items()},
            "links": [[*pair, *_speed(link)] for pair, link in self.links.items()],
            "default": None if self.default is None else _speed(self.default),
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Network:
        """Inverse of ``to_dict``."""
        default = values["default"]
        return Network(
            {name: _host(host) for name, host in values["hosts"].items()},
            {(source, target): _link(speed) for source, target, *speed in values["links"]},
            None if default is None else _link(default),
        )


def _host(values: Mapping[str, Any]) -> Host:
    cores = values.get("cores")
    return Host(**{**values, "cores": None if cores is None else tuple(cores)})


def _speed(link: Link) -> list[float | None]:
    return [link.delay_s, None if link.bytes_per_s == math.inf else link.bytes_per_s]


def _link(speed: list[Any]) -> Link:
    delay_s, bytes_per_s = speed
    return Link(delay_s, math.inf if bytes_per_s is None else bytes_per_s)
