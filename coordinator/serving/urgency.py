"""Classes of requests: real-time ones go before others, and bulk ones make way for them.

A request says its class in the header ``x-shoal-class``, or in OpenAI's field ``service_tier``.
A key may have a class, which is that of its requests. They may say a less urgent one.
Real-time requests are first in the line for slots. While one runs, bulk requests on its devices
pause, also those of other models. A paused answer keeps its tokens and goes on later.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from coordinator.loading.deployment import Deployment
from coordinator.roster.members import Member
from coordinator.watching import Signal
from planning.errors import RequestInvalid

HEADER = "x-shoal-class"


class Urgency(enum.IntEnum):
    """A class of requests. The smallest one is served first."""

    REALTIME = 0
    NORMAL = 1
    BULK = 2


_NAMES = {"realtime": Urgency.REALTIME, "normal": Urgency.NORMAL, "bulk": Urgency.BULK}
_TIERS = {"priority": Urgency.REALTIME, "flex": Urgency.BULK}
"""OpenAI's names. Its other ones, such as "auto", are normal."""


def urgency_named(name: str) -> Urgency | None:
    """Return the class of this name, or None for an empty name."""
    return _NAMES[name] if name else None


def urgency_of(
    headers: Mapping[str, str], body: Mapping[str, Any], most: Urgency | None = None
) -> Urgency:
    """Return the class of a request. The header counts before the field. Raises RequestInvalid.

    most: the class of its key, which is also that of a request that says none. None: it has none.
    """
    given = _given(headers, body)
    if most is None:
        return Urgency.NORMAL if given is None else given
    return most if given is None else max(given, most)


def _given(headers: Mapping[str, str], body: Mapping[str, Any]) -> Urgency | None:
    name = headers.get(HEADER)
    if name is None:
        tier = body.get("service_tier")
        return _TIERS.get(tier) if isinstance(tier, str) else None
    if name not in _NAMES:
        raise RequestInvalid(f"{HEADER}: expected one of {', '.join(_NAMES)}")
    return _NAMES[name]


class Lanes:
    """The devices that real-time requests use now. Bulk requests keep away from them."""

    def __init__(self) -> None:
        self._urgent: list[frozenset[Member]] = []
        self._changed = Signal()

    @contextmanager
    def urgent(self, deployment: Deployment) -> Iterator[None]:
        """Keep bulk requests away from a deployment's devices."""
        devices = frozenset(deployment.devices)
        self._urgent.append(devices)
        try:
            yield
        finally:
            self._urgent.remove(devices)
            self._changed.fire()

    def are_urgent(self, deployment: Deployment) -> bool:
        """Whether a real-time request runs on a device of this deployment."""
        return any(not devices.isdisjoint(deployment.devices) for devices in self._urgent)

    async def free(self, deployment: Deployment) -> None:
        """Wait until no real-time request runs on a device of this deployment."""
        with self._changed.watch() as changed:
            while self.are_urgent(deployment):
                changed.clear()
                await changed.wait()
