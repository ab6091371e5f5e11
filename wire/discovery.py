"""Finding the coordinator by mDNS. It says where somebody was, never that he is alive.

A killed host stays in mDNS caches for minutes (RFC 6762 section 10), so liveness is the business of
heartbeats, and every search here starts with an empty cache.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import threading
from collections.abc import Callable
from types import TracebackType

import ifaddr
from zeroconf import (
    BadTypeInNameException,
    Error,
    InterfaceChoice,
    ServiceBrowser,
    ServiceInfo,
    ServiceStateChange,
    Zeroconf,
)

from wire.errors import WireError
from wire.messages import Endpoint

SERVICE_TYPE = "_shoal._tcp.local."
RESOLVE_TIMEOUT_MS = 2000
"""How long to wait for the address records of an announced coordinator (RFC 6762 answers within
500 ms at most; the rest is for slow devices)."""


class DiscoveryUnavailable(WireError):
    """This machine or network does not let us use multicast."""


def host_addresses() -> tuple[str, ...]:
    """IPv4 addresses of this machine, loopback last (and alone if there is no other)."""
    found = [str(ip.ip) for adapter in ifaddr.get_adapters() for ip in adapter.ips if ip.is_IPv4]
    return tuple(sorted(dict.fromkeys(found), key=_is_loopback))


def reachable_addresses(bind_host: str) -> tuple[str, ...]:
    """Addresses at which others reach a socket bound to ``bind_host``, most useful first."""
    if bind_host not in ("", "0.0.0.0"):  # noqa: S104 - compared, not bound
        return (bind_host,)
    return host_addresses()


class Advertisement:
    """The coordinator's mDNS record while the context is open."""

    def __init__(self, cluster: str, instance: str, bind_host: str, port: int) -> None:
        addresses = reachable_addresses(bind_host)
        if not _is_loopback(addresses[0]):
            addresses = tuple(address for address in addresses if not _is_loopback(address))
        self._info = ServiceInfo(
            SERVICE_TYPE,
            f"{instance}.{SERVICE_TYPE}",
            port=port,
            addresses=[socket.inet_aton(address) for address in addresses],
            properties={"cluster": cluster},
            server=f"{instance}.local.",
        )
        self._interfaces = list(addresses)
        self._zeroconf: Zeroconf | None = None

    def __enter__(self) -> Advertisement:
        """Announce. Raises DiscoveryUnavailable."""
        try:
            self._zeroconf = Zeroconf(interfaces=self._interfaces)
            self._zeroconf.register_service(self._info, allow_name_change=True)
        except (OSError, Error) as error:
            self.__exit__(None, None, None)
            raise DiscoveryUnavailable(f"cannot announce by mDNS: {error}") from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._zeroconf is not None:
            with contextlib.suppress(OSError, Error):
                self._zeroconf.unregister_all_services()
            self._zeroconf.close()
            self._zeroconf = None


def find_coordinator(
    cluster: str, stop: threading.Event, on_wait: Callable[[], None] | None = None
) -> tuple[Endpoint, ...]:
    """Search until a coordinator of ``cluster`` is announced; its addresses, or () once stopped.

    ``on_wait`` is called once when none has answered within three seconds.
    Raises DiscoveryUnavailable.
    """
    found: list[Endpoint] = []
    wake = threading.Event()

    def on_change(
        zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        if state_change is ServiceStateChange.Removed or wake.is_set():
            return
        try:
            info = zeroconf.get_service_info(service_type, name, RESOLVE_TIMEOUT_MS)
        except BadTypeInNameException:
            return
        if info is None or info.port is None:
            return
        if (info.properties or {}).get(b"cluster") != cluster.encode():
            return
        found.extend(Endpoint(address, info.port) for address in info.parsed_addresses())
        if found:
            wake.set()

    try:
        zeroconf = Zeroconf(interfaces=InterfaceChoice.All)
    except OSError as error:
        raise DiscoveryUnavailable(f"cannot search by mDNS: {error}") from error
    try:
        browser = ServiceBrowser(zeroconf, SERVICE_TYPE, handlers=[on_change])
        waited_s = 0.0
        while not wake.wait(0.25) and not stop.is_set():
            waited_s += 0.25
            if on_wait is not None and waited_s == 3.0:
                on_wait()
        browser.cancel()
    finally:
        zeroconf.close()
    return tuple(found)


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback
