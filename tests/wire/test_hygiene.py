"""Values from peers with the token: which are accepted, cleaned or refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wire.hygiene import (
    MAX_TEXT_CHARACTERS,
    clean,
    clean_text,
    implausible_profile,
    is_plausible,
)
from wire.messages import (
    AgentHello,
    ConnectStage,
    CoordinatorWelcome,
    Endpoint,
    JoinRefused,
    Message,
    Progress,
    RequestFailed,
    SequenceFailed,
    TokenSampled,
)
from wire.profile import BlockTiming, DeviceProfile

PROFILE = DeviceProfile(
    "x86_64", "test", 1, 1, "onnx_cpu", "1", ((32, 32),), 1 << 30, 1 << 30, 1 << 30, 1e9, 1e9
)
NASTY = "a\x1b]0;owned\x07b\r\nc\u202ed\u200be\u2028f\x9b31m"
NICE = "a ]0;owned b  c d e f 31m"


@given(st.text())
def test_cleaned_text_is_one_printable_line_and_stays_so(text: str) -> None:
    cleaned = clean_text(text)
    assert cleaned.isprintable()
    assert len(cleaned) <= MAX_TEXT_CHARACTERS
    assert clean_text(cleaned) == cleaned
    if text.isprintable() and len(text) <= MAX_TEXT_CHARACTERS:
        assert cleaned == text


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (RequestFailed(1, NASTY), RequestFailed(1, NICE)),
        (SequenceFailed(1, 2, NASTY), SequenceFailed(1, 2, NICE)),
        (JoinRefused(NASTY), JoinRefused(NICE)),
        (CoordinatorWelcome(NASTY, NASTY), CoordinatorWelcome(NICE, NICE)),
        (Progress(1, NASTY, 0, 1, "bytes"), Progress(1, NICE, 0, 1, "bytes")),
        (
            AgentHello(
                "id",
                "pi",
                NASTY,
                (Endpoint(NASTY, 1), Endpoint("b", 2)),
                replace(PROFILE, processor=NASTY, makes=((NASTY, "1"),)),
            ),
            AgentHello(
                "id",
                "pi",
                NICE,
                (Endpoint(NICE, 1), Endpoint("b", 2)),
                replace(PROFILE, processor=NICE, makes=((NICE, "1"),)),
            ),
        ),
        (
            ConnectStage(1, 2, "b", (Endpoint(NASTY, 1),), b"key"),
            ConnectStage(1, 2, "b", (Endpoint(NICE, 1),), b"key"),
        ),
    ],
)  # fmt: skip
def test_text_is_cleaned_wherever_a_message_has_it(message: Message, expected: Message) -> None:
    assert clean(message) == expected
    assert clean(expected) is expected


def test_long_text_is_cut() -> None:
    cleaned = clean(RequestFailed(1, "x" * 1_000_000))
    assert isinstance(cleaned, RequestFailed)
    assert len(cleaned.reason) == MAX_TEXT_CHARACTERS


def test_a_token_passes_untouched() -> None:
    token = TokenSampled(1, 2, 3, 4, "")
    assert clean(token) is token


def test_a_good_profile() -> None:
    assert implausible_profile(PROFILE) is None
    assert implausible_profile(replace(PROFILE, watts=5.0, on_chip_bytes=8 << 20)) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("processor", "x" * 4_000_000),
        ("arithmetic", "x" * 257),
        ("makes", (("a", "b"),) * 65),
        ("makes", (("a", "b" * 257),)),
        ("container_bits", ((32, 32),) * 65),
        ("container_bits", ((0, 32),)),
        ("container_bits", ((4, -1),)),
        ("cores", 0),
        ("threads", 2**63 - 1),
        ("memory_bytes", -1),
        ("memory_bytes", 2**63 - 1),
        ("storage_bytes", 2**61),
        ("memory_read_bytes_per_s", 5e-324),
        ("memory_read_bytes_per_s", 1e308),
        ("disk_write_bytes_per_s", 0.0),
        ("call_s", -1.0),
        ("call_s", 1e308),
        ("call_s", float("nan")),
        ("watts", -1.0),
        ("watts", float("inf")),
        ("on_chip_bytes", -1),
    ],
)
def test_an_impossible_profile_is_named(field: str, value: Any) -> None:
    wrong = implausible_profile(replace(PROFILE, **{field: value}))
    assert wrong is not None
    assert field in wrong or "widths" in wrong
    assert len(wrong) < 200


@pytest.mark.parametrize("time_s", [1e308, 5e-324, 0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_time(time_s: float) -> None:
    assert is_plausible(BlockTiming("layer", 0, 4, 1e-3, 1e-4))
    assert not is_plausible(BlockTiming("layer", 0, 4, time_s, 1e-4))
    assert not is_plausible(BlockTiming("layer", 0, 4, 1e-3, time_s))
    assert is_plausible(BlockTiming("layer", 0, 4, 1e-3, 1e-4, rows_s=(1e-3, 2e-3, 3e-3)))
    assert not is_plausible(BlockTiming("layer", 0, 4, 1e-3, 1e-4, rows_s=(1e-3, 2e-3, time_s)))
    assert not is_plausible(BlockTiming("layer", 0, 4, 1e-3, 1e-4, rows_s=(1e-3,)))
    assert not is_plausible(BlockTiming("layer", 0, 4, 1e-3, 1e-4, shares_s=((0.5, time_s, 1e-4),)))


@pytest.mark.parametrize(
    ("fractions", "fits"),
    [
        ((0.25, 0.5, 1.0), True),
        ((0.5, 0.25), False),
        ((0.5, 0.5), False),
        ((0.0, 0.5), False),
        ((0.5, 1.01), False),
        ((float("nan"),), False),
        (tuple(part / 100 for part in range(1, 100)), False),
    ],
)
def test_shares_of_a_block(fractions: tuple[float, ...], fits: bool) -> None:
    shares_s = tuple((fraction, 1e-3, 1e-4) for fraction in fractions)
    assert is_plausible(BlockTiming("layer", 0, 4, 1e-3, 1e-4, shares_s=shares_s)) == fits
