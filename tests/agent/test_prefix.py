"""Sequences that begin with rows which an earlier one left in their slot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from model.checkpoint import Checkpoint
from tests.agent.teams import Ring, team_of
from tests.agent.test_relay import (
    ANSWER_S,
    CONTEXT,
    CONTINUATION,
    EPOCH,
    GREEDY,
    LLAMA,
    PROMPT,
    Node,
    activation,
    blocks_at,
    start,
)
from wire.messages import Sampling, SequenceFailed, StartSequence, TokenSampled

TURN = (11, 7, 200, 31, 5)
"""What a user says next."""

FRESH, SLOT = 1, 0
"""The slot in which whole prompts run, and the slot that goes on."""


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, Path]]:
    return blocks_at(32, tmp_path_factory.mktemp("blocks"))


@pytest.fixture
def ring(artifacts: list[tuple[int, Path]]) -> Iterator[tuple[Node, Node]]:
    first = Node("first", artifacts[:2], CONTEXT, slots=2)
    last = Node("last", artifacts[2:], CONTEXT, slots=2)
    first.connect(last)
    last.connect(first)
    yield first, last
    for node in (first, last):
        node.close()


def asked(
    number: int, prompt: tuple[int, ...], slot: int = SLOT, cached: int = 0, *, drawn: bool = False
) -> StartSequence:
    sampling = Sampling(12, (), temperature=1.0, top_p=0.95, seed=5) if drawn else Sampling(12, ())
    return StartSequence(EPOCH, number, slot, prompt, sampling, cached=cached)


def rows_run(node: Node) -> int:
    """The rows that the node's stage has run since the last time."""
    rows = 0
    while not node.stage.calls.empty():
        rows += node.stage.next_call()[1]
    return rows


@pytest.mark.parametrize("drawn", [False, True])
def test_each_turn_of_a_chat_goes_on_where_the_last_one_ended(
    ring: tuple[Node, Node], drawn: bool
) -> None:
    first, last = ring
    prompt: tuple[int, ...] = PROMPT
    cached = 0
    for turn in range(1, 4):
        first.start(asked(2 * turn, prompt, FRESH, drawn=drawn))
        expected = last.answer(2 * turn)
        rows_run(first)
        first.start(asked(2 * turn + 1, prompt, cached=cached, drawn=drawn))
        assert last.answer(2 * turn + 1) == expected
        # The last token is an answer's end, so that no stage runs it.
        assert rows_run(first) == len(prompt) - cached + len(expected) - 1
        cached = len(prompt) + len(expected) - 1
        prompt = (*prompt, *expected, *TURN)
    assert first.reports.empty()


@pytest.mark.parametrize("common", [1, len(PROMPT) - 1, len(PROMPT), len(PROMPT) + 6])
def test_a_prompt_may_leave_the_kept_tokens_anywhere(ring: tuple[Node, Node], common: int) -> None:
    first, last = ring
    first.start(asked(1, PROMPT))
    kept = (*PROMPT, *last.answer(1))
    edited = (*kept[:common], *TURN)
    first.start(asked(2, edited, FRESH))
    expected = last.answer(2)
    first.start(asked(3, edited, cached=common))
    assert last.answer(3) == expected
    # The rows behind the common ones are those of the new prompt now.
    first.start(asked(4, (*edited, *expected), FRESH))
    expected_later = last.answer(4)
    first.start(asked(5, (*edited, *expected), cached=len(edited) + len(expected) - 1))
    assert last.answer(5) == expected_later


def test_rows_of_a_cancelled_sequence_that_are_on_their_way_spoil_nothing(
    ring: tuple[Node, Node],
) -> None:
    first, last = ring
    first.start(asked(1, PROMPT))
    tokens = [last.token(1).token for _ in range(3)]
    last.stage.gate.clear()
    rows_run(last)
    last.stage.next_call()  # The row of token 2 or a later one waits here.
    for node in ring:
        node.relay.release(1)
    prompt = (*PROMPT, *tokens[:2], *TURN)
    first.start(asked(2, prompt, cached=len(PROMPT) + 2))
    last.stage.gate.set()
    answer: list[int] = []
    while len(answer) < 12:
        message = last.reports.get(timeout=ANSWER_S)
        assert isinstance(message, TokenSampled)
        answer += [message.token] * (message.sequence == 2)
    first.start(asked(3, prompt, FRESH))
    assert answer == last.answer(3)


def lost(node: Node) -> int:
    """The number of the sequence of which the node says that its first rows are not kept."""
    message = node.reports.get(timeout=ANSWER_S)
    assert isinstance(message, SequenceFailed)
    assert message.prefix_lost
    return message.sequence


def test_a_slot_that_keeps_too_little_is_reported_by_the_stage_that_lacks_it(
    ring: tuple[Node, Node],
) -> None:
    first, last = ring
    first.start(asked(1, PROMPT))
    last.answer(1)
    prompt = (*PROMPT, *TURN * 8)
    for node in ring:
        node.relay.start(asked(2, prompt if node is first else (), cached=len(PROMPT) + 30))
        assert lost(node) == 2
    # A start without the rows works at once.
    first.start(asked(3, prompt, FRESH))
    expected = last.answer(3)
    first.start(asked(4, prompt))
    assert last.answer(4) == expected


def test_a_failed_pass_loses_all_rows_of_its_slot(ring: tuple[Node, Node]) -> None:
    first, last = ring
    for number, slot in ((1, SLOT), (2, FRESH)):
        first.start(asked(number, PROMPT, slot))
        last.answer(number)
    last.stage.broken = {SLOT}
    first.start(asked(3, (*PROMPT, *TURN), cached=len(PROMPT)))
    failed = last.reports.get(timeout=ANSWER_S)
    assert failed == SequenceFailed(EPOCH, 3, "this slot is broken")
    last.stage.broken = set()
    for node in ring:
        node.relay.release(3)
    first.start(asked(4, (*PROMPT, *TURN), cached=len(PROMPT)))
    assert lost(last) == 4
    # The other slot has lost nothing.
    first.start(asked(5, (*PROMPT, *TURN), FRESH, cached=len(PROMPT)))
    answer = last.answer(5)
    first.start(asked(6, (*PROMPT, *TURN)))
    assert last.answer(6) == answer


def test_a_late_failure_of_the_last_sequence_ends_one_that_relies_on_its_rows(
    artifacts: list[tuple[int, Path]],
) -> None:
    last = Node("last", artifacts[2:], CONTEXT)
    last.deliver(*activation(1, 4))
    assert last.stage.next_call() == ((0,), 4)
    last.stage.gate.clear()
    last.relay.deliver(*activation(1, 2, 4))
    last.stage.next_call()
    last.relay.release(1)
    last.relay.start(replace(start(2, ()), cached=4))
    last.relay.deliver(*activation(2, 3, 4))
    last.stage.broken = {0}
    last.stage.gate.set()
    reports = [last.reports.get(timeout=ANSWER_S) for _ in range(2)]
    assert [report.sequence for report in reports if isinstance(report, SequenceFailed)] == [2, 1]
    assert reports[0] != reports[1]
    assert last.stage.calls.empty()
    last.close()


@pytest.mark.parametrize("cached", [-1, len(PROMPT), CONTEXT])
def test_cached_rows_that_leave_nothing_to_run_are_refused(
    ring: tuple[Node, Node], cached: int
) -> None:
    first, _ = ring
    first.relay.start(asked(1, PROMPT, cached=cached))
    failed = first.reports.get(timeout=ANSWER_S)
    assert failed == SequenceFailed(EPOCH, 1, "the coordinator sent a prompt that does not fit")


def test_a_team_goes_on_from_the_rows_that_its_members_keep() -> None:
    checkpoint = Checkpoint.open(LLAMA)
    prompt = (*PROMPT, *CONTINUATION[:8], *TURN)
    with team_of(checkpoint, (1, 1), slots=2) as members:
        ring = Ring(members, checkpoint.spec, slots=2)
        try:
            ring.relay.start(replace(asked(1, PROMPT), sampling=replace(GREEDY, max_tokens=9)))
            assert ring.answers(1)[1] == CONTINUATION[:9]
            ring.relay.start(asked(2, prompt, FRESH))
            ring.relay.start(asked(3, prompt, cached=len(PROMPT) + 8))
            answers = ring.answers(2)
            assert answers[2] == answers[3]
        finally:
            ring.close()


def test_rows_computed_in_other_chunks_differ_by_rounding_only(
    artifacts: list[tuple[int, Path]],
) -> None:
    """At 32 bits sums run in another order. So logits, and not only tokens, stay close."""
    node = Node("whole", artifacts, CONTEXT, slots=2)
    stage = node.stage
    tokens = np.random.default_rng(3).integers(0, 256, 90)
    whole = stage.forward(FRESH, 0, tokens)
    stage.forward(SLOT, 0, tokens[:40])
    for position in range(40, 60):
        stage.forward(SLOT, position, tokens[position : position + 1])
    resumed = stage.forward(SLOT, 60, tokens[60:])
    np.testing.assert_allclose(resumed, whole, rtol=0, atol=1e-5 * np.abs(whole).max())
    node.close()
