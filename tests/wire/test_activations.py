from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from wire.activations import (
    BLOCK_VALUES,
    HOP_BITS,
    HopBits,
    Rows,
    decode_rows,
    encode_rows,
    payload_bytes,
)
from wire.errors import ProtocolError

SHAPES = arrays.array_shapes(min_dims=2, max_dims=2, max_side=9)
LARGEST = float(np.float32(3.4e38))
# Libraries that other tests load let the processor take subnormal numbers for zero.
NUMBERS = st.floats(-LARGEST, LARGEST, width=32, allow_subnormal=False)
HALVES = st.floats(-65504, 65504, width=32, allow_subnormal=False)
FINITE = arrays.arrays(np.float32, SHAPES, elements=NUMBERS)
ANY = arrays.arrays(
    np.float32, SHAPES, elements=NUMBERS | st.sampled_from([np.nan, np.inf, -np.inf])
)


def through(rows: Rows, bits: HopBits) -> Rows:
    count, hidden = rows.shape
    payload = encode_rows(rows, bits)
    assert len(payload) == payload_bytes(count, hidden, bits)
    return decode_rows(payload, count, hidden, bits)


def halves(values: Rows) -> npt.NDArray[np.float64]:
    """What float16 makes of values, by struct, which rounds in C and not in numpy."""
    flat = [struct.unpack("<e", struct.pack("<e", value))[0] for value in values.ravel().tolist()]
    return np.array(flat).reshape(values.shape)


@given(ANY)
def test_32_bits_are_the_same_bits(rows: Rows) -> None:
    assert through(rows, 32).tobytes() == rows.tobytes()


@given(arrays.arrays(np.float32, SHAPES, elements=HALVES))
def test_16_bits_are_float16_where_it_reaches(rows: Rows) -> None:
    assert (through(rows, 16) == halves(rows)).all()


@settings(max_examples=300)
@given(FINITE)
@example(np.array([[2.0**41, 3.0]], np.float32))
def test_the_error_is_within_the_bounds_of_the_format(rows: Rows) -> None:
    exact = rows.astype(np.float64)
    largest = np.abs(exact).max(axis=1, keepdims=True)
    # No scale is below the least normal float32.
    tiny = float(np.finfo(np.float32).tiny)
    # The least power of two that keeps all values below 32768; frexp is exact at powers of two.
    scale = np.maximum(1, 2.0 ** (np.frexp(largest)[1] - 15.0))
    bound = np.abs(exact) / 2**11 + scale / 2**25
    assert (np.abs(through(rows, 16) - exact) <= bound).all()
    bound = np.maximum(largest / 127, tiny) * (0.5 + 1e-4)
    assert (np.abs(through(rows, 8) - exact) <= bound).all()


@settings(max_examples=300)
@given(ANY, st.sampled_from(HOP_BITS))
def test_what_is_not_finite_stays_so_and_spoils_nothing_else(rows: Rows, bits: HopBits) -> None:
    got = through(rows, bits)
    finite = np.isfinite(rows)
    assert (np.isfinite(got) == finite).all()
    alone = through(np.where(finite, rows, 0), bits)
    assert (got[finite] == alone[finite]).all()


@pytest.mark.parametrize("bits", HOP_BITS)
def test_edges_of_float32(bits: HopBits) -> None:
    for value in (LARGEST, -LARGEST, 65504, 65505, 65519.996, 65520, 1e30):
        row = np.array([[value, 0, -value / 3]], np.float32)
        assert np.allclose(through(row, bits), row, rtol=1 / 2**9, atol=abs(value) / 200)
    zeros = np.zeros((3, 5), np.float32)
    assert (through(zeros, bits) == 0).all()
    assert (through(zeros[:, ::2], bits) == 0).all()


@given(st.sampled_from(HOP_BITS), st.integers(0, 4), st.integers(1, 9), st.binary(max_size=80))
def test_a_payload_of_another_length_is_refused(
    bits: HopBits, rows: int, hidden: int, payload: bytes
) -> None:
    if len(payload) != payload_bytes(rows, hidden, bits):
        with pytest.raises(ProtocolError):
            decode_rows(memoryview(payload), rows, hidden, bits)


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0, 0.0, -0.0, 3e38])
def test_scales_that_no_encoder_makes_are_refused(bits: HopBits, scale: float) -> None:
    payload = bytearray(encode_rows(np.ones((2, 6), np.float32), bits))
    payload[-4:] = struct.pack("<f", scale)
    with pytest.raises(ProtocolError, match="scales"):
        decode_rows(memoryview(payload), 2, 6, bits)


@given(st.sampled_from([8, 16]), st.binary(min_size=40, max_size=40))
def test_hostile_values_are_refused_or_decoded(bits: HopBits, payload: bytes) -> None:
    hidden = 18 if bits == 8 else 9
    size = payload_bytes(2, hidden, bits)
    data = (payload * 2)[:size]
    try:
        rows = decode_rows(memoryview(data), 2, hidden, bits)
    except ProtocolError:
        return
    assert rows.shape == (2, hidden)
    assert rows.dtype == np.float32


@pytest.mark.parametrize("bits", HOP_BITS)
def test_many_rows_are_coded_as_each_alone(bits: HopBits) -> None:
    rows = np.random.default_rng(bits).standard_normal((40, 3000), np.float32)
    assert rows.size > 3 * BLOCK_VALUES
    rows[7] *= 1e30
    rows[20, 5] = np.nan
    rows[39, 0] = -np.inf
    memory, out = memoryview(bytearray(4 * rows.size)), np.empty_like(rows)
    payload = encode_rows(rows, bits, memory)
    assert payload == encode_rows(rows, bits)
    decoded = decode_rows(payload, 40, 3000, bits)
    for row, one in zip(rows, decoded, strict=True):
        alone = decode_rows(encode_rows(row[None], bits), 1, 3000, bits)
        np.testing.assert_array_equal(one[None], alone)
    assert decode_rows(payload, 40, 3000, bits, out) is out
    np.testing.assert_array_equal(out, decoded)
