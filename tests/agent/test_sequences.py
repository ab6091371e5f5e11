"""The order in which a stage runs its waiting rows."""

from __future__ import annotations

from dataclasses import replace

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


def taken(
    table: SequenceTable, *, chunks: bool = True, most: int | None = None
) -> list[tuple[int, int]]:
    """(sequence, rows) of the next pass."""
    turns = table.take(chunks=chunks, most=most)
    return [(sequence.number, part.count) for sequence, part in turns]


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


def test_sequences_of_neighbouring_slots_run_in_turns() -> None:
    table = SequenceTable(5, CONTEXT)
    slots = {1: 4, 2: 0, 3: 2, 4: 1, 5: 3}
    held = {number: opened(table, number, slot) for number, slot in slots.items()}
    for number in (5, 4, 3, 2, 1):
        table.add(held[number], rows(held[number], 1))
    # Of slots 0 and 1, 2 and 3, and 4. The row of slot 3 has waited longest.
    assert sorted(taken(table, most=2)) == [(3, 1), (5, 1)]
    # What comes back waits behind those that have not run yet.
    for number in (5, 3):
        table.add(held[number], rows(held[number], 1))
    assert sorted(taken(table, most=2)) == [(2, 1), (4, 1)]
    assert taken(table, most=2) == [(1, 1)]
    assert sorted(taken(table, most=2)) == [(3, 1), (5, 1)]
    # A group does not wait for those of it that are elsewhere, and takes none of another group.
    for number in (2, 3, 5):
        table.add(held[number], rows(held[number], 1))
    assert taken(table, most=2) == [(2, 1)]
    assert sorted(taken(table, most=5)) == [(3, 1), (5, 1)]


def test_a_group_waits_for_its_rows_that_are_on_their_way() -> None:
    table = SequenceTable(4, CONTEXT)
    held = [opened(table, number, number - 1) for number in range(1, 5)]

    def come(*numbers: int) -> None:
        for number in numbers:
            sequence = held[number - 1]
            assert table.add(sequence, replace(rows(sequence, 1), last=True))

    come(1)
    assert taken(table, most=2) == [(1, 1)]
    come(2, 3, 4)
    table._round_s = 1e3
    assert sorted(taken(table, most=2)) == [(3, 1), (4, 1)]
    # The row of sequence 1 is still on its way, and 2 waits for it.
    assert taken(table, most=2) == []
    assert table.due_s > held[1].waiting[0].arrived_s + 1e2
    come(1)
    table._round_s = 1e3
    assert sorted(taken(table, most=2)) == [(1, 1), (2, 1)]
    # It goes without those that do not come, or that are over.
    come(3)
    table._round_s = 0.0
    assert taken(table, most=2) == [(3, 1)]
    come(3)
    table._round_s = 1e3
    assert taken(table, most=2) == []
    table.drop(4)
    assert taken(table, most=2) == [(3, 1)]


def test_a_chunk_waits_for_a_token_of_every_answer() -> None:
    table = SequenceTable(4, CONTEXT)
    prompt, *answers = (opened(table, number, number - 1) for number in range(1, 5))
    for _ in range(2):
        table.add(prompt, rows(prompt, 4))
        for answer in answers:
            table.add(answer, rows(answer, 1))
    passes = [taken(table, most=2) for _ in range(6)]
    assert [passed[0][1] for passed in passes] == [1, 1, 4, 1, 1, 4]
    assert sorted(number for number, _ in passes[0] + passes[1]) == [2, 3, 4]
    assert not table.waiting


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


def guessed(position: int, guesses: int) -> Rows:
    count = 1 + guesses
    return Rows(position, count, True, np.zeros(count, np.int64), (7,) * guesses)


def test_only_guessed_rows_may_be_replaced() -> None:
    table = SequenceTable(1, CONTEXT)
    sequence = opened(table, 1, 0)
    assert table.add(sequence, rows(sequence, 4))
    assert table.add(sequence, guessed(4, 3))  # Rows 4 to 7, of which 4 is sure.
    for position in (0, 3, 4, 9):
        assert not table.add(sequence, guessed(position, 1))
    assert table.add(sequence, guessed(6, 1))
    assert not table.add(sequence, guessed(6, 0))
    assert table.add(sequence, guessed(7, 0))
    assert not table.add(sequence, guessed(7, 0))
    assert not table.add(sequence, guessed(8, CONTEXT - 8))
    assert table.add(sequence, guessed(8, CONTEXT - 9))


def test_a_row_with_guesses_runs_by_itself_whether_or_not_there_is_room() -> None:
    table = SequenceTable(3, CONTEXT)
    one, two, three = (opened(table, number, number - 1) for number in (1, 2, 3))
    table.add(one, rows(one, 4))
    table.add(two, rows(two, 1))
    table.add(three, guessed(0, 2))
    assert taken(table, chunks=False) == [(3, 3)]
    assert taken(table, chunks=False) == [(2, 1)]
    assert taken(table, chunks=False) == []
    assert taken(table) == [(1, 4)]


def test_a_slot_keeps_the_rows_that_ran_until_a_pass_of_it_fails() -> None:
    table = SequenceTable(2, CONTEXT)
    old = opened(table, 1, 0)
    assert not table.keeps(0, 1)
    table.ran([(old, Rows(0, 6, True, np.zeros(6, np.int64)))])
    assert table.keeps(0, 6)
    assert not table.keeps(0, 7)
    assert not table.keeps(1, 1)
    new = table.open(2, 0, GREEDY, None, cached=4)
    assert new is not None
    assert (new.arrived, table.keeps(0, 5)) == (4, False)
    # The old sequence's last pass ends late. Its rows are behind those that the new one keeps.
    table.ran([(old, Rows(6, 1, True, np.zeros(1, np.int64)))])
    assert not table.keeps(0, 5)
    assert table.spoil(old) is new
    assert table.find(2) is None
    assert not table.keeps(0, 1)


def test_a_sequence_that_relies_on_no_kept_row_survives_a_late_failure() -> None:
    table = SequenceTable(1, CONTEXT)
    old, new = opened(table, 1, 0), opened(table, 2, 0)
    assert table.spoil(old) is None
    assert table.find(2) is new


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
