"""Which announced coordinators are passed over."""

from __future__ import annotations

import pytest
from zeroconf import ServiceStateChange, Zeroconf

from wire.discovery import KEY, MOST_OTHERS, SERVICE_TYPE, Advertisement, is_wanted

OURS = bytes(range(32))


@pytest.mark.parametrize(
    ("cluster", "announced", "expected", "wanted"),
    [
        ("shoal", None, None, True),
        ("other", None, None, False),
        ("shoal", OURS, None, True),
        ("shoal", OURS, OURS, True),
        ("shoal", bytes(32), OURS, False),
        ("shoal", None, OURS, False),
        ("other", OURS, OURS, False),
    ],
)
def test_coordinators_with_another_key_are_passed_over(
    cluster: str, announced: bytes | None, expected: bytes | None, wanted: bool
) -> None:
    record = Advertisement(cluster, "instance", "127.0.0.1", 1, announced)._properties
    properties: dict[bytes, bytes | None] = {
        name.encode(): value.encode() for name, value in record.items()
    }
    assert is_wanted(properties, "shoal", expected) is wanted
    assert (KEY in record) == (announced is not None)


def test_names_that_strangers_announce_are_bounded() -> None:
    advertisement = Advertisement("shoal", "instance", "127.0.0.1", 1, on_other=print)
    zeroconf = Zeroconf(interfaces=["127.0.0.1"])
    try:
        for number in range(10 * MOST_OTHERS):
            advertisement._on_change(
                zeroconf, SERVICE_TYPE, f"{number}.{SERVICE_TYPE}", ServiceStateChange.Added
            )
    finally:
        zeroconf.close()
    assert advertisement._others.qsize() == MOST_OTHERS
