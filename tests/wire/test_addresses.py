"""The order in which addresses are announced and tried, on a machine with docker's bridge."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest

from wire import addresses
from wire.addresses import (
    host_addresses,
    is_everywhere,
    is_loopback,
    is_own,
    is_shared,
    nearest_first,
    own_last,
    reachable_addresses,
)
from wire.messages import Endpoint

INTERFACES = [
    ("lo", "127.0.0.1/8"),
    ("docker0", "172.17.0.1/16"),
    ("eth0", "192.168.1.7/24"),
    ("lo", "::1/128"),
    ("eth0", "fe80::1/64"),
    ("eth0", "2001:db8::7/64"),
]


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = [(name, ipaddress.ip_interface(text)) for name, text in INTERFACES]
    (tmp_path / "docker0" / "bridge").mkdir(parents=True)
    monkeypatch.setattr(addresses, "_interfaces", lambda: found)
    monkeypatch.setattr(addresses, "_INTERFACES", tmp_path)


def test_bridges_come_late_and_loopback_last() -> None:
    everything = ("192.168.1.7", "172.17.0.1", "127.0.0.1")
    assert host_addresses() == everything
    assert reachable_addresses("0.0.0.0") == reachable_addresses("") == everything  # noqa: S104
    assert reachable_addresses("::") == ("2001:db8::7", "::1")
    assert reachable_addresses("10.0.0.1") == ("10.0.0.1",)


def test_an_address_that_this_machine_has_too_is_tried_last() -> None:
    hosts = ("172.17.0.1", "127.0.0.1", "pi.example", "192.168.1.8", "10.1.1.1")
    endpoints = [Endpoint(host, 1) for host in hosts]
    assert [item.host for item in own_last(endpoints)] == [*hosts[2:], *hosts[:2]]
    assert nearest_first(hosts) == ("192.168.1.8", "pi.example", "10.1.1.1", *hosts[:2])


def test_what_an_address_means() -> None:
    assert [host for host in ("", "::", "0.0.0.0", "::1", "pi") if is_everywhere(host)] == [  # noqa: S104
        "",
        "::",
        "0.0.0.0",  # noqa: S104
    ]
    loopback = ("127.0.0.1", "127.9.9.9", "::1", "localhost", "::ffff:127.0.0.1")
    assert all(map(is_loopback, loopback))
    assert not any(map(is_loopback, ("pi", "10.0.0.1", "::2")))
    assert all(map(is_shared, ("10.0.0.1", "2001:db8::1")))
    assert not any(map(is_shared, (*loopback, "pi", "", "fe80::1", "169.254.1.1", "0.0.0.0")))  # noqa: S104
    assert all(map(is_own, ("172.17.0.1", "::1", "2001:db8::7", "::ffff:192.168.1.7")))
    assert not any(map(is_own, ("pi", "192.168.1.8")))
