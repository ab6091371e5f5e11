from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from model.rotary import rotary_table
from model.spec import RopeSpec


def angles(rope: RopeSpec, head_dim: int, count: int) -> np.ndarray:
    cos, sin = rotary_table(rope, head_dim, count)
    assert cos.shape == sin.shape == (count, head_dim // 2)
    assert cos.dtype == sin.dtype == np.float32
    np.testing.assert_allclose(cos**2 + sin**2, 1, atol=1e-6)
    return np.arctan2(sin, cos)


def wrapped(value: float) -> float:
    return math.remainder(value, 2 * math.pi)


def test_plain_angles_are_position_times_frequency() -> None:
    table = angles(RopeSpec(10000.0), 8, 50)
    for position in (0, 1, 49):
        for pair in range(4):
            expected = wrapped(position * 10000.0 ** (-2 * pair / 8))
            assert abs(wrapped(table[position, pair] - expected)) < 1e-5


def test_linear_scaling_divides_positions() -> None:
    plain = rotary_table(RopeSpec(10000.0), 8, 10)[0]
    scaled = rotary_table(RopeSpec(10000.0, "linear", 4.0, 10), 8, 40)[0]
    np.testing.assert_allclose(scaled[::4], plain, atol=1e-6)


def test_dynamic_scaling_starts_after_the_trained_context() -> None:
    rope = RopeSpec(10000.0, "dynamic", 3.0, 16)
    table, plain = angles(rope, 8, 40), angles(RopeSpec(10000.0), 8, 40)
    np.testing.assert_array_equal(table[:16], plain[:16])
    for position in (16, 39):
        base = 10000.0 * (3.0 * (position + 1) / 16 - 2.0) ** (8 / 6)
        for pair in range(4):
            expected = wrapped(position * base ** (-2 * pair / 8))
            assert abs(wrapped(table[position, pair] - expected)) < 1e-5


def test_llama3_keeps_short_waves_and_slows_long_ones() -> None:
    rope = RopeSpec(500000.0, "llama3", 8.0, 8192, 1.0, 4.0)
    table, plain = angles(rope, 128, 2), angles(RopeSpec(500000.0), 128, 2)
    wavelengths = 2 * math.pi / plain[1]
    short, long = wavelengths < 8192 / 4, wavelengths > 8192
    assert short.any()
    assert long.any()
    np.testing.assert_allclose(table[1][short], plain[1][short], rtol=1e-5)
    np.testing.assert_allclose(table[1][long], plain[1][long] / 8, rtol=1e-5)
    middle = table[1][~short & ~long] / plain[1][~short & ~long]
    assert ((middle > 1 / 8) & (middle < 1)).all()


@pytest.mark.parametrize("scaling", ["none", "linear", "dynamic", "llama3", "yarn"])
def test_tables_of_different_lengths_agree(scaling: Any) -> None:
    rope = RopeSpec(10000.0, scaling, 2.0, 8)
    for short, long in zip(rotary_table(rope, 8, 12), rotary_table(rope, 8, 30), strict=True):
        np.testing.assert_array_equal(short, long[:12])


def test_pairs_that_do_not_turn_keep_their_values() -> None:
    cos, sin = rotary_table(RopeSpec(10000.0, rotated=4), 16, 20)
    narrow = rotary_table(RopeSpec(10000.0), 4, 20)
    np.testing.assert_array_equal(cos[:, :2], narrow[0])
    np.testing.assert_array_equal(sin[:, :2], narrow[1])
    assert (cos[:, 2:] == 1).all()
    assert (sin[:, 2:] == 0).all()


def test_yarn_keeps_fast_pairs_and_slows_slow_ones() -> None:
    rope = RopeSpec(10000.0, "yarn", 8.0, 4096, attention_factor=1.25)
    table, plain = (rotary_table(one, 128, 2) for one in (rope, RopeSpec(10000.0)))
    cos, sin = (part[1] / 1.25 for part in table)
    np.testing.assert_allclose(cos**2 + sin**2, 1, atol=1e-6)
    ratio = np.arctan2(sin, cos) / np.arctan2(plain[1][1], plain[0][1])
    turns = 4096 * 10000.0 ** (-np.arange(64) / 64) / (2 * math.pi)
    # Bounds are rounded to whole pairs, so those next to them are mixed a little.
    np.testing.assert_allclose(ratio[turns > 32 * 1.2], 1, rtol=1e-4)
    np.testing.assert_allclose(ratio[turns < 1 / 1.2], 1 / 8, rtol=1e-4)
    middle = ratio[(turns < 32 / 1.2) & (turns > 1.2)]
    assert ((middle > 1 / 8) & (middle < 1)).all()
    assert (np.diff(ratio) <= 1e-5).all()


def test_longrope_takes_long_factors_for_tables_beyond_the_trained_context() -> None:
    rope = RopeSpec(
        10000.0,
        "longrope",
        original_context=16,
        attention_factor=1.1,
        short_factors=(1.0, 2.0),
        long_factors=(3.0, 5.0),
    )
    for count, expected in ((16, (1.0, 2.0)), (17, (3.0, 5.0))):
        cos, sin = rotary_table(rope, 4, count)
        np.testing.assert_allclose(cos**2 + sin**2, 1.1**2, rtol=1e-5)
        angles_of_one = np.arctan2(sin[1], cos[1])
        np.testing.assert_allclose(angles_of_one, [1 / expected[0], 0.01 / expected[1]], rtol=1e-5)
