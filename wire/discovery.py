"""Finds the coordinator by mDNS. A record says where it was, not that it is alive.

A killed host stays in mDNS caches for minutes (RFC 6762 section 10). So heartbeats decide liveness,
and every search here starts with an empty cache.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType

from zeroconf import (
    BadTypeInNameException,
    Error,
    InterfaceChoice,
    ServiceBrowser,
    ServiceInfo,
    ServiceStateChange,
    Zeroconf,
)

from wire.addresses import host_addresses as host_addresses
from wire.addresses import is_loopback, nearest_first, reachable_addresses
from wire.claim import Fingerprint
from wire.errors import WireError
from wire.messages import Endpoint

SERVICE_TYPE = "_shoal._tcp.local."
KEY = "key"
"""The property with the fingerprint of a coordinator that answers in TLS."""

RESOLVE_TIMEOUT_MS = 2000
"""How long to wait for the address records of an announced coordinator.

RFC 6762 allows 500 ms for an answer. The rest is for slow devices.
"""

SEARCH_ROUND_S = 3.0
"""How long one set of sockets is used for a search.

zeroconf asks after 0, 1, 5 and 14 s and then never again. It also ignores interfaces that come up
later. An agent must outlast both.
"""

OTHERS_S = 0.15
"""How long to wait for other coordinators. They were asked together and answer within 120 ms."""

ADDRESS_CHECK_S = 2.0
"""The interval at which the coordinator checks its machine's addresses for changes, and looks at
other coordinators that were announced."""

MOST_OTHERS = 64
"""The announced names that wait to be looked at. Anybody may announce any number of them."""

MOST_FOUND = 32
"""The addresses that one search returns. The caller tries one after the other."""

MOST_ADDRESSES = 8
"""The addresses of one announced coordinator that are tried."""

ALIVE_TIMEOUT_S = 2.0
"""The time in which another coordinator must accept a connection to count as alive."""

# zeroconf warns with a traceback of each packet that it cannot send while a cable is unplugged.
logging.getLogger("zeroconf").setLevel(logging.ERROR)


class DiscoveryUnavailable(WireError):
    """This machine or network does not allow multicast."""


class Advertisement:
    """The coordinator's mDNS record while the context is open. It follows changes of address."""

    def __init__(
        self,
        cluster: str,
        instance: str,
        bind_host: str,
        port: int,
        fingerprint: Fingerprint | None = None,
        on_other: Callable[[Endpoint], object] | None = None,
    ) -> None:
        """Make a record.

        fingerprint: the coordinator's, if it answers in TLS.
        on_other: a thread calls it with the address of each other living coordinator of the
            cluster, once for each announcement.
        """
        self._cluster = cluster
        self._on_other = on_other
        self._others: queue.Queue[str] = queue.Queue(MOST_OTHERS)
        """Names of coordinators that were announced, this one's among them."""
        self._own_name = ""
        self._properties = {"cluster": cluster}
        if fingerprint is not None:
            self._properties[KEY] = fingerprint.hex()
        self._instance = instance
        self._bind_host = bind_host
        self._port = port
        self._announced: tuple[str, ...] = ()
        self._zeroconf: Zeroconf | None = None
        self._stop = threading.Event()
        self._follower = threading.Thread(target=self._follow, name="announce", daemon=True)

    def __enter__(self) -> Advertisement:
        """Announce the coordinator. Raises DiscoveryUnavailable."""
        self._announce(_announced_addresses(self._bind_host))
        self._follower.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._follower.is_alive():
            self._follower.join()
        self._withdraw()

    def _announce(self, addresses: tuple[str, ...]) -> None:
        info = ServiceInfo(
            SERVICE_TYPE,
            f"{self._instance}.{SERVICE_TYPE}",
            port=self._port,
            addresses=[socket.inet_aton(address) for address in addresses],
            properties=self._properties,
            server=f"{self._instance}.local.",
        )
        try:
            if not addresses:
                raise OSError("no network interface has an address")
            self._zeroconf = Zeroconf(interfaces=list(addresses))
            self._zeroconf.register_service(info, allow_name_change=True)
            self._own_name = info.name
            if self._on_other is not None:
                ServiceBrowser(self._zeroconf, SERVICE_TYPE, handlers=[self._on_change])
        except (OSError, Error) as error:
            self._withdraw()
            raise DiscoveryUnavailable(f"cannot announce by mDNS: {error}") from error
        self._announced = addresses

    def _withdraw(self) -> None:
        zeroconf, self._zeroconf, self._announced = self._zeroconf, None, ()
        if zeroconf is not None:
            with contextlib.suppress(OSError, Error):
                zeroconf.unregister_all_services()
            zeroconf.close()

    def _follow(self) -> None:
        """Announce again when the addresses change, which may be long after the start."""
        while not self._stop.wait(ADDRESS_CHECK_S):
            self._look_at_another()
            addresses = _announced_addresses(self._bind_host)
            if addresses == self._announced:
                continue
            self._withdraw()
            with contextlib.suppress(DiscoveryUnavailable):
                self._announce(addresses)

    def _on_change(
        self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        if state_change is ServiceStateChange.Added:
            with contextlib.suppress(queue.Full):
                self._others.put_nowait(name)

    def _look_at_another(self) -> None:
        """Report the next coordinator that was announced, if it lives.

        It is one at a time: looking may take seconds, and changed addresses must not wait long.
        """
        zeroconf, on_other = self._zeroconf, self._on_other
        name = self._own_name
        with contextlib.suppress(queue.Empty):
            while name == self._own_name:
                name = self._others.get_nowait()
        if zeroconf is None or on_other is None or name == self._own_name:
            return
        with contextlib.suppress(BadTypeInNameException, OSError, Error):
            info = zeroconf.get_service_info(SERVICE_TYPE, name, RESOLVE_TIMEOUT_MS)
            if info is None or not is_wanted(info.properties, self._cluster, None):
                return
            for address in info.parsed_addresses()[:MOST_ADDRESSES]:
                is_this = info.port == self._port and address in self._announced
                if not is_this and _is_alive(address, info.port):
                    on_other(Endpoint(address, info.port or 0))
                    return


def _is_alive(address: str, port: int | None) -> bool:
    """Whether something accepts connections there. A record may outlive its coordinator."""
    with contextlib.suppress(OSError):
        socket.create_connection((address, port or 0), ALIVE_TIMEOUT_S).close()
        return True
    return False


def find_coordinator(
    cluster: str,
    stop: threading.Event,
    on_wait: Callable[[], None] | None = None,
    on_round: Callable[[], None] | None = None,
    fingerprint: Fingerprint | None = None,
) -> tuple[Endpoint, ...]:
    """Search until a coordinator of ``cluster`` is announced, and return its addresses.

    Returns () once stopped. The likeliest address comes first. An address that this machine has
    itself comes last, because it may mean another machine. If several coordinators answer at once,
    the result has the addresses of all of them, up to MOST_FOUND.

    ``on_wait`` is called once if none has answered within SEARCH_ROUND_S, and ``on_round`` after
    each round of that length. With a fingerprint, others are passed over. What is announced proves
    nothing, so the caller must check the fingerprint again. Raises DiscoveryUnavailable.
    """
    found = _search(cluster, stop, fingerprint)
    if not found and not stop.is_set() and on_wait is not None:
        on_wait()
    while not found and not stop.is_set():
        if on_round is not None:
            on_round()
        found = _search(cluster, stop, fingerprint)
    return found


def _search(
    cluster: str, stop: threading.Event, fingerprint: Fingerprint | None
) -> tuple[Endpoint, ...]:
    """Run one round of find_coordinator."""
    names: queue.SimpleQueue[str] = queue.SimpleQueue()

    def on_change(
        zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        if state_change is not ServiceStateChange.Removed:
            names.put(name)

    try:
        zeroconf = Zeroconf(interfaces=InterfaceChoice.All)
    except (OSError, RuntimeError) as error:  # RuntimeError: no interface has an address.
        raise DiscoveryUnavailable(f"cannot search by mDNS: {error}") from error
    deadline = time.monotonic() + SEARCH_ROUND_S
    found: dict[Endpoint, None] = {}
    with zeroconf, ServiceBrowser(zeroconf, SERVICE_TYPE, handlers=[on_change]):
        while time.monotonic() < deadline and len(found) < MOST_FOUND and not stop.is_set():
            try:
                name = names.get(timeout=OTHERS_S if found else 0.25)
                info = zeroconf.get_service_info(SERVICE_TYPE, name, RESOLVE_TIMEOUT_MS)
            except queue.Empty:
                if found:
                    break
                continue
            except BadTypeInNameException:
                continue
            if (
                info is not None
                and info.port is not None
                and is_wanted(info.properties, cluster, fingerprint)
                and (addresses := info.parsed_addresses())
            ):
                near = nearest_first(addresses)[:MOST_ADDRESSES]
                found |= dict.fromkeys(Endpoint(address, info.port) for address in near)
    return tuple(found)[:MOST_FOUND]


def is_wanted(
    properties: Mapping[bytes, bytes | None], cluster: str, fingerprint: Fingerprint | None
) -> bool:
    """Whether an announced coordinator is of this cluster and, if it is known, has this key."""
    if properties.get(b"cluster") != cluster.encode():
        return False
    return fingerprint is None or properties.get(KEY.encode()) == fingerprint.hex().encode()


def _announced_addresses(bind_host: str) -> tuple[str, ...]:
    """Return the addresses at which other machines reach us, or else this machine."""
    addresses = reachable_addresses(bind_host)
    if addresses == (bind_host,):
        try:  # It may be a name, or have no IPv4 address.
            answers = socket.getaddrinfo(bind_host, None, socket.AF_INET, socket.SOCK_STREAM)
        except OSError:
            return ()
        addresses = tuple(str(address[0]) for *_, address in answers)
    addresses = tuple(item for item in addresses if ":" not in item)
    return tuple(item for item in addresses if not is_loopback(item)) or addresses
