"""Matrices that are read piece by piece: the same numbers, and each read once per pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from model.artifact import write_artifact
from model.checkpoint import Checkpoint
from model.quantize import Format, quantize
from model.row_pieces import RowPieces

FAMILIES = Path(__file__).parents[1] / "families"
ROWS = (3, 1, 700, 40)


class Reader:
    """Reads pieces, and counts how often."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self.parts: list[npt.NDArray[np.float32]] = [
            random.standard_normal((count, 64), np.float32) for count in ROWS
        ]
        self.reads = 0

    def __call__(self, number: int) -> npt.NDArray[np.float32]:
        self.reads += 1
        piece: npt.NDArray[np.float32] = self.parts[number].copy()
        return piece


@pytest.mark.parametrize("rows", [(0, 744), (0, 3), (2, 5), (3, 4), (4, 704), (703, 744), (9, 9)])
def test_rows_are_those_of_the_whole(rows: tuple[int, int]) -> None:
    reader = Reader()
    pieces = RowPieces(ROWS, 64, reader)
    assert pieces.shape == (744, 64)
    np.testing.assert_array_equal(pieces[slice(*rows)], np.concatenate(reader.parts)[slice(*rows)])
    np.testing.assert_array_equal(np.asarray(pieces), np.concatenate(reader.parts))


@pytest.mark.parametrize(
    "fmt", [Format(4), Format(3, "truncate", 64, True), Format.of(16)], ids=str
)
def test_a_matrix_is_quantized_by_reading_it_in_order(fmt: Format) -> None:
    """Each pass over the rows reads each piece once, although it takes rows in other portions."""
    reader = Reader()
    found = quantize(RowPieces(ROWS, 64, reader), fmt)
    expected = quantize(np.concatenate(reader.parts), fmt)
    np.testing.assert_array_equal(found.data, expected.data)
    np.testing.assert_array_equal(found.dequantize(), expected.dequantize())
    assert reader.reads <= 3 * len(ROWS)


@pytest.mark.parametrize("name", ["granitemoe", "gpt_oss", "qwen3_moe"])
@pytest.mark.parametrize("bits", [4, 16, 32])
def test_artifacts_of_experts_are_the_same(name: str, bits: int, tmp_path: Path) -> None:
    checkpoint, fmt = Checkpoint.open(FAMILIES / name), Format.of(bits)
    tensors = checkpoint.block_in(1, fmt)
    assert isinstance(tensors["down.weight"], RowPieces)
    whole = write_artifact(tmp_path, 1, checkpoint.block(1), fmt)
    assert write_artifact(tmp_path, 1, tensors, fmt).sha256 == whole.sha256
