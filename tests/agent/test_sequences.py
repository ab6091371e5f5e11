"""The order in which a stage runs its waiting rows."""

from __future__ import annotations

import numpy as np

from agent.sequences import Rows, Sequence, SequenceTable
from wire.messages import Sampling

GREEDY = Sampling(8, ())
CONTEXT = 20


def opened(table: SequenceTable, number: int, slot: int) -> Sequence:
    sequence = table.open(number, slot, GREEDY, None)
    assert sequence is not None
    return sequence


def rows(sequence: Sequence, count: int) -> Rows:
    return Rows(sequence.arrived, count, False, np.zeros(count, np.int64))


def taken(table: SequenceTable, *, chunks: bool = True) -> list[tuple[int, int]]:
    """(sequence, rows) of the next pass."""
    return [(sequence.number, part.count) for sequence, part in table.take(chunks=chunks)]


def test_tokens_and_chunks_alternate_and_prompts_take_turns() -> None:
    table = SequenceTable(4, CONTEXT)
    one, two, three, four = (opened(table, number, number - 1) for number in range(1, 5))
    for _ in range(3):
        for prompt in (one, two):
            assert table.add(prompt, rows(prompt, 4))
        for token in (three, four):
            assert table.add(token, rows(token, 1))
    passes = [taken(table) for _ in range(9)]
    together = [(3, 1), (4, 1)]
    assert passes == [
        *(together, [(1, 4)], together, [(2, 4)], together, [(1, 4)]),
        *([(2, 4)], [(1, 4)], [(2, 4)]),
    ]
    assert not table.waiting
    assert taken(table) == []


def test_chunks_stay_where_they_are_while_there_is_no_room_for_them() -> None:
    table = SequenceTable(2, CONTEXT)
    prompt, token = opened(table, 1, 0), opened(table, 2, 1)
    table.add(prompt, rows(prompt, 4))
    assert taken(table, chunks=False) == []
    table.add(token, rows(token, 1))
    assert taken(table, chunks=False) == [(2, 1)]
    assert taken(table) == [(1, 4)]


def test_the_last_row_of_a_prompt_waits_for_its_chunks() -> None:
    table = SequenceTable(1, CONTEXT)
    prompt = opened(table, 1, 0)
    for count in (4, 4, 1):
        table.add(prompt, rows(prompt, count))
    assert [taken(table) for _ in range(3)] == [[(1, 4)], [(1, 4)], [(1, 1)]]


def test_only_what_is_next_and_within_the_context_waits() -> None:
    table = SequenceTable(1, CONTEXT)
    sequence = opened(table, 1, 0)
    late = rows(sequence, 4)
    assert table.add(sequence, late)
    assert not table.add(sequence, late)
    assert not table.add(sequence, rows(sequence, CONTEXT - 3))
    assert table.add(sequence, rows(sequence, CONTEXT - 4))
    assert not table.add(sequence, rows(sequence, 1))
    assert len(sequence.waiting) == 2


def test_a_slot_goes_to_newer_sequences_only_and_nothing_of_the_old_one_stays() -> None:
    table = SequenceTable(2, CONTEXT)
    old = opened(table, 3, 0)
    table.add(old, rows(old, 4))
    assert table.open(3, 0, GREEDY, None) is None
    assert table.open(2, 0, GREEDY, None) is None
    assert table.open(3, 1, GREEDY, None) is None
    new = opened(table, 5, 0)
    assert (table.find(3), table.find(5)) == (None, new)
    assert table.alone
    assert not table.waiting
    table.drop(5)
    assert table.open(4, 0, GREEDY, None) is None
    assert table.find(5) is None


def test_what_fits() -> None:
    table = SequenceTable(2, CONTEXT)
    assert table.fits(1, 0, CONTEXT)
    assert table.fits(0, CONTEXT - 1, 1)
    for slot, position, count in ((2, 0, 1), (-1, 0, 1), (0, -1, 1), (0, 0, 0), (0, 1, CONTEXT)):
        assert not table.fits(slot, position, count)
