"""Files for int8 products and what the host does around them, against plain integers and floats."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.base import BackendError
from backends.edgetpu_product import CLIP, Int8Product, Int8Weights
from backends.edgetpu_runtime import Engine, Runtime, find_runtime
from backends.edgetpu_tflite import fully_connected

Floats = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    try:
        return find_runtime()
    except BackendError as error:
        pytest.skip(str(error))


def weights_of(rows: int, columns: int, seed: int = 0) -> Int8Weights:
    random = np.random.default_rng(seed)
    matrix = random.standard_normal((rows, columns)) * random.uniform(0.5, 1.5, (rows, 1))
    return Int8Weights.of(matrix.astype(np.float32))


def engine_of(weights: Int8Weights, runtime: Runtime, directory: Path) -> Engine:
    path = directory / "product.tflite"
    path.write_bytes(fully_connected(weights.codes, weights.multipliers).content)
    return Engine(runtime, path, None, 1)


@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (3, 5), (64, 48), (257, 128), (100, 1000), (1024, 512)]
)
def test_the_runtime_computes_what_the_file_says(
    rows: int, columns: int, runtime: Runtime, tmp_path: Path
) -> None:
    weights = weights_of(rows, columns)
    random = np.random.default_rng(1)
    with closing(engine_of(weights, runtime, tmp_path)) as engine:
        assert engine.width == columns
        for count in (1, 64, 7, 1):
            codes = random.integers(-127, 128, (count, columns)).astype(np.int8)
            sums = codes.astype(np.int64) @ weights.codes.T.astype(np.int64)
            exact = np.clip(np.rint(sums * weights.multipliers.astype(np.float64)), -128, 127)
            assert np.abs(engine.run(codes) - exact).max() <= 1


def test_the_weights_lie_in_the_file_as_they_are() -> None:
    weights = weights_of(33, 70)
    file = fully_connected(weights.codes, weights.multipliers)
    assert file.weights_offset % 16 == 0
    stored = np.frombuffer(file.content, np.int8, weights.codes.size, file.weights_offset)
    np.testing.assert_array_equal(stored.reshape(33, 70), weights.codes)
    assert file.content[4:8] == b"TFL3"
    assert fully_connected(weights.codes, weights.multipliers).content == file.content


def test_codes_are_nearest_and_steps_are_per_row() -> None:
    matrix = np.random.default_rng(0).standard_normal((300, 40)).astype(np.float32)
    matrix[7] = 0
    weights = Int8Weights.of(matrix)
    assert np.abs(weights.codes).max() == 127
    error = np.abs(weights.codes * weights.steps[:, None] - matrix)
    assert (error.max(axis=1) <= weights.steps * 0.5001).all()
    assert not weights.codes[7].any()
    assert np.isfinite(weights.multipliers).all()


def test_a_product_is_the_float_product_to_two_percent(runtime: Runtime, tmp_path: Path) -> None:
    weights = weights_of(200, 512)
    rows = np.random.default_rng(1).standard_normal((50, 512)).astype(np.float32)
    # Magnitudes that no fixed scale covers.
    rows *= np.logspace(-6, 6, 50, dtype=np.float32)[:, None]
    with closing(Int8Product(weights, engine_of(weights, runtime, tmp_path))) as product:
        result = product(rows)
    assert result.dtype == np.float32
    expected = exact_product(rows, weights)
    errors = np.linalg.norm(result - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert errors.max() < 0.02


def test_columns_that_stand_out_are_exact(runtime: Runtime, tmp_path: Path) -> None:
    weights = weights_of(200, 512)
    rows = np.random.default_rng(1).standard_normal((50, 512)).astype(np.float32)
    # Some columns in all rows, one column in one row, and a row of a single value.
    rows[:, [3, 77, 400]] *= 40
    rows[5, 100] = 1000
    rows[6] = 0
    rows[6, 9] = -2
    with closing(Int8Product(weights, engine_of(weights, runtime, tmp_path))) as product:
        result = product(rows)
        counts = product.counts
    expected = exact_product(rows, weights)
    np.testing.assert_allclose(result[6], expected[6], rtol=1e-5, atol=1e-5)
    # The error is that of what is left without them, which they do not drown.
    rows[np.abs(rows) > 6] = 0
    rest = np.linalg.norm(exact_product(rows, weights), axis=1)
    errors = np.delete(np.linalg.norm(result - expected, axis=1) / rest, 6)
    assert errors.max() < 0.05
    assert counts.inputs == rows.size
    assert 100 < counts.outliers < 160


def test_what_saturates_is_exact_and_counted(runtime: Runtime, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    matrix = random.standard_normal((40, 256)).astype(np.float32)
    weights = Int8Weights.of(matrix)
    # Rows that are all but parallel to some channels: far beyond what independent values give.
    rows = np.concatenate([matrix[:5] * 3, random.standard_normal((20, 256))]).astype(np.float32)
    with closing(Int8Product(weights, engine_of(weights, runtime, tmp_path))) as product:
        result = product(rows)
        counts = product.counts
    expected = exact_product(rows, weights)
    own = np.arange(5), np.arange(5)
    assert counts.saturated >= 5
    assert counts.outputs == 25 * 40
    # Only the input's rounding is left, which averages out over 256 values.
    np.testing.assert_allclose(result[own], expected[own], rtol=2e-3)


def test_zeros_give_zeros(runtime: Runtime, tmp_path: Path) -> None:
    weights = weights_of(8, 16)
    with closing(Int8Product(weights, engine_of(weights, runtime, tmp_path))) as product:
        assert not product(np.zeros((3, 16), np.float32)).any()


@settings(max_examples=30, deadline=None)
@given(exponent=st.integers(-40, 40), seed=st.integers(0, 2**32 - 1))
def test_a_product_is_homogeneous(
    exponent: int, seed: int, runtime_and_product: Int8Product
) -> None:
    rows = np.random.default_rng(seed).standard_normal((2, 64)).astype(np.float32)
    factor = np.float32(2.0**exponent)
    np.testing.assert_allclose(
        runtime_and_product(rows * factor), runtime_and_product(rows) * factor, rtol=1e-4
    )


@pytest.fixture(scope="module")
def runtime_and_product(runtime: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Int8Product:
    weights = weights_of(32, 64)
    return Int8Product(weights, engine_of(weights, runtime, tmp_path_factory.mktemp("product")))


def test_a_row_without_outliers_uses_the_whole_range(runtime: Runtime, tmp_path: Path) -> None:
    """A value of CLIP root mean squares is the code 127, and not yet an outlier."""
    width = 400
    row = np.ones((1, width), np.float32)
    # With one value v among ones, the root mean square is sqrt((width - 1 + v^2) / width).
    row[0, 0] = 0.999 * CLIP * np.sqrt((width - 1) / (width - CLIP**2))
    weights = weights_of(4, width)
    with closing(Int8Product(weights, engine_of(weights, runtime, tmp_path))) as product:
        product(row)
        assert product.counts.outliers == 0
        row[0, 0] *= 1.01
        product(row)
        assert product.counts.outliers == 1


def test_a_damaged_file_is_an_error_of_one_line(runtime: Runtime, tmp_path: Path) -> None:
    path = tmp_path / "damaged.tflite"
    path.write_bytes(b"\0" * 64)
    with pytest.raises(BackendError) as caught:
        Engine(runtime, path, None, 1)
    assert "\n" not in str(caught.value)
    assert runtime.name in str(caught.value)


def exact_product(rows: Floats, weights: Int8Weights) -> npt.NDArray[np.float64]:
    matrix = weights.codes * weights.steps.astype(np.float64)[:, None]
    result: npt.NDArray[np.float64] = rows.astype(np.float64) @ matrix.T
    return result
