"""The steps from a stored tensor to a canonical one."""

from __future__ import annotations

import numpy as np
import pytest

from model.families.sources import Piece, changed, scaled, stacked

COLUMN = np.arange(24.0, dtype=np.float32)
MATRIX = np.stack([COLUMN, 100 + COLUMN], axis=1)  # [24, 2]


def test_a_head_that_turns_in_part_is_ordered_as_one_that_turns_whole() -> None:
    piece = Piece("q", turned=(8, 4))
    assert piece.shape_of((24, 2)) == (24, 2)
    order = [0, 1, 4, 5, 2, 3, 6, 7]
    np.testing.assert_array_equal(piece.apply(COLUMN)[:8], order)
    np.testing.assert_array_equal(piece.apply(MATRIX)[8:16, 1], 108 + np.array(order))
    with pytest.raises(ValueError, match="heads of 10 rows"):
        Piece("q", turned=(10, 4)).shape_of((24, 2))


def test_neighbouring_pairs_of_a_part_come_out_in_the_same_order() -> None:
    """Stored pairs are (0, 1), (2, 3), of which the first two of four turn."""
    np.testing.assert_array_equal(Piece("q", pairs=8).apply(COLUMN)[:8], [0, 2, 4, 6, 1, 3, 5, 7])


def test_rows_are_taken_before_they_are_ordered() -> None:
    piece = Piece("q", rows=(8, 16, 1), turned=(8, 4), scale=2.0)
    np.testing.assert_array_equal(piece.apply(COLUMN), 2 * (8 + np.array([0, 1, 4, 5, 2, 3, 6, 7])))
    transposed = Piece("q", transposed=True, rows=(1, 2, 1))
    assert transposed.shape_of((24, 2)) == (1, 24)
    np.testing.assert_array_equal(transposed.apply(MATRIX), MATRIX.T[1:2])


def test_stacked_modules_are_rows_of_one_matrix() -> None:
    sources = {
        f"{module}.{kind}": (Piece(f"fused.{kind}"),)
        for module in ("q", "k", "v")
        for kind in ("weight", "bias")
    }
    shapes = {"q.weight": (16, 2), "k.weight": (4, 2), "v.weight": (4, 2)}
    parts = stacked(sources, shapes, "qkv")
    expected = {"q": (0, 16, 1), "k": (16, 20, 1), "v": (20, 24, 1)}
    for name, source in parts.items():
        assert source == (Piece(f"fused.{name[2:]}", rows=expected[name[0]]),)


def test_steps_of_some_modules_change_and_factors_multiply() -> None:
    sources = {"o.weight": (Piece("o", scale=2.0),), "o.bias": (Piece("b"),), "up.weight": ()}
    assert changed(sources, ("o",), add=1.0) == {
        "o.weight": (Piece("o", scale=2.0, add=1.0),),
        "o.bias": (Piece("b", add=1.0),),
    }
    assert scaled(sources, ("o",), 3.0)["o.weight"] == (Piece("o", scale=6.0),)
