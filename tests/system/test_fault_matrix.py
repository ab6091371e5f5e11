"""Each fault in each phase of an answer: no token is lost or repeated (``pytest -m slow``)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.fault_matrix import (
    BEGIN,
    END,
    FAULTS,
    PHASES,
    Cell,
    Matrix,
    standing,
    table,
    write,
)
from tests.system.namespaces import unavailable

CELLS = [(fault, phase) for phase in PHASES for fault in FAULTS]


@pytest.fixture(scope="module")
def matrix(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Matrix]:
    if "slow" not in str(request.config.option.markexpr):
        pytest.skip("all faults take half an hour: run them by -m slow, or make fault-matrix")
    reason = unavailable()
    if reason is not None:
        pytest.skip(reason)
    with standing(tmp_path_factory.mktemp("faults"), "fault-tests") as matrix:
        yield matrix
        assert matrix.shoal.tracebacks() == []


@pytest.mark.slow
@pytest.mark.netns
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("fault", "phase"), CELLS)
def test_an_answer_is_the_undisturbed_one(matrix: Matrix, fault: str, phase: str) -> None:
    cell = matrix.run(fault, phase)
    assert (cell.outcome, cell.lost, cell.repeated) == ("right", 0, 0), cell
    assert not cell.is_early, cell


def test_the_table_has_a_line_for_each_fault_and_a_sum(tmp_path: Path) -> None:
    cells = [
        Cell("killed", "answer", "right", wait_s=1.26),
        Cell("killed", "load", "right", "load: pi-1 is gone", wait_s=9),
        Cell("coordinator", "answer", "right", wait_s=3, again=2),
        Cell("coordinator", "load", "wrong", lost=3, repeated=1),
    ]
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write(page, table(cells, "here"))
    assert page.read_text().splitlines() == [
        "before",
        BEGIN,
        "Measured here.",
        "",
        "| fault | load | answer |",
        "| --- | --- | --- |",
        "| agent killed | 9.0 s, loaded again | 1.3 s |",
        "| coordinator killed for 1 s | **wrong** | 3.0 s, asked again |",
        "",
        "3 of 4 answers right, 3 tokens lost, 1 repeated.",
        END,
        "after",
    ]
    page.write_text("no markers\n")
    with pytest.raises(SystemExit, match="are missing"):
        write(page, "")
