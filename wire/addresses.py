"""The addresses of this machine, and the order in which to try the addresses of another one."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import ifaddr

if TYPE_CHECKING:
    from wire.messages import Endpoint

_INTERFACES = Path("/sys/class/net")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Interface = ipaddress.IPv4Interface | ipaddress.IPv6Interface


def host_addresses(version: int = 4) -> tuple[str, ...]:
    """Return the IP addresses of this machine: bridges late, loopback last.

    Another machine may have the same bridge (docker0) with the same address. IPv6 addresses that
    are valid on one link only are left out.
    """
    ranked: dict[str, tuple[bool, bool]] = {}
    for adapter, interface in _interfaces():
        address = interface.ip
        if address.version == version and not (version == 6 and address.is_link_local):
            is_bridge = (_INTERFACES / adapter / "bridge").is_dir()
            ranked.setdefault(str(address), (address.is_loopback, is_bridge))
    return tuple(sorted(ranked, key=ranked.__getitem__))


def reachable_addresses(bind_host: str) -> tuple[str, ...]:
    """Addresses at which others reach a socket bound to ``bind_host``, most useful first."""
    if is_everywhere(bind_host):
        return host_addresses(6 if ":" in bind_host else 4)
    return (bind_host,)


def is_everywhere(bind_host: str) -> bool:
    """Whether a socket bound there listens on every address of this machine."""
    address = _address(bind_host)
    return bind_host == "" or (address is not None and address.is_unspecified)


def is_loopback(host: str) -> bool:
    """Whether ``host`` is loopback, and so names whatever machine uses it."""
    address = _address(host)
    return host == "localhost" if address is None else address.is_loopback


def is_shared(host: str) -> bool:
    """Whether other machines on the network reach the same machine by this IP address."""
    address = _address(host)
    return address is not None and not (
        address.is_loopback or address.is_link_local or address.is_unspecified
    )


def is_own(host: str) -> bool:
    """Whether ``host`` is an address of this machine."""
    return is_loopback(host) or _address(host) in {interface.ip for _, interface in _interfaces()}


def own_last(endpoints: Iterable[Endpoint]) -> tuple[Endpoint, ...]:
    """Return the endpoints in the same order, but addresses of this machine at the end.

    If another machine has the same address, a connection to it from here reaches the wrong machine.
    """
    own = {interface.ip for _, interface in _interfaces()}
    return tuple(
        sorted(endpoints, key=lambda item: is_loopback(item.host) or _address(item.host) in own)
    )


def nearest_first(hosts: Iterable[str]) -> tuple[str, ...]:
    """Sort another machine's hosts: those in our networks first, our own addresses last."""
    interfaces = [interface for _, interface in _interfaces()]

    def rank(host: str) -> int:
        address = _address(host)
        if address is None:
            return 1
        if address.is_loopback or any(address == interface.ip for interface in interfaces):
            return 2
        return 0 if any(address in interface.network for interface in interfaces) else 1

    return tuple(sorted(dict.fromkeys(hosts), key=rank))


def _interfaces() -> list[tuple[str, Interface]]:
    """Return each adapter's name and an address with its network, in the system's order."""
    found: list[tuple[str, Interface]] = []
    for adapter in ifaddr.get_adapters():
        for ip in adapter.ips:
            # IPv6 comes as (address, flow, scope).
            address = ip.ip if isinstance(ip.ip, str) else ip.ip[0]
            interface = ipaddress.ip_interface(f"{address}/{ip.network_prefix}")
            found.append((str(adapter.name), interface))
    return found


def _address(host: str) -> Address | None:
    """Parse ``host`` as an address, IPv4 in IPv6 as IPv4. None if it is a name."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
