"""Weight errors are measured once, and kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.checkpoint import Checkpoint
from model.quantize import Format, weight_error
from model.spec import QUANTIZED_TENSORS
from model.weight_errors import weight_errors

CHECKPOINT = Checkpoint.open(Path(__file__).parents[1] / "fixtures" / "llama")
FORMATS = (Format.of(4), Format.of(8))
COUNT = CHECKPOINT.spec.block_count


class Steps:
    """Counts the blocks done, and ends the work after ``limit``."""

    def __init__(self, limit: int = COUNT) -> None:
        self.done = 0
        self.limit = limit

    def __call__(self, done: int, total: int) -> None:
        assert (done, total) == (self.done + 1, COUNT)
        self.done = done
        if done == self.limit < COUNT:
            raise InterruptedError


def test_the_largest_error_of_each_block_is_found(tmp_path: Path) -> None:
    found = weight_errors(CHECKPOINT, FORMATS, tmp_path, Steps())
    assert [sorted(row) for row in found] == [[4, 8]] * COUNT
    tensors = CHECKPOINT.block(1)
    assert found[1][4] == max(
        weight_error(tensors[name], FORMATS[0], normalized=True)
        for name in QUANTIZED_TENSORS
        if name in tensors
    )


def test_what_was_measured_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InterruptedError):
        weight_errors(CHECKPOINT, FORMATS, tmp_path, Steps(limit=2))
    read: list[int] = []
    block = Checkpoint.block

    def reading(self: Checkpoint, number: int) -> object:
        read.append(number)
        return block(self, number)

    monkeypatch.setattr(Checkpoint, "block", reading)
    first = weight_errors(CHECKPOINT, FORMATS, tmp_path, Steps())
    assert read == list(range(2, COUNT))
    assert weight_errors(CHECKPOINT, FORMATS, tmp_path, Steps()) == first
    assert len(read) == COUNT - 2


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        *(f'{{"1/4/rtn/64/asym": {bad}}}' for bad in ('"x"', "[]", "NaN", "-1.0", "1" + "0" * 400)),
    ],
)
def test_a_damaged_file_is_measured_again(tmp_path: Path, content: str) -> None:
    expected = weight_errors(CHECKPOINT, FORMATS, tmp_path, Steps())
    (path,) = (tmp_path / "weight-errors").iterdir()
    path.write_text(content)
    assert weight_errors(CHECKPOINT, FORMATS, tmp_path, Steps()) == expected
