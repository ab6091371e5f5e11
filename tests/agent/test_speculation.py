"""Guesses that the last stage checks: the answer is the one of single rows, whatever is guessed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agent.drafts import History, Pacer
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
from wire import limits
from wire.messages import Sampling, SequenceFailed, StartSequence, TokenSampled

TOKENS = 60
SAMPLINGS = {
    "greedy": Sampling(TOKENS, ()),
    "drawn": Sampling(TOKENS, (), temperature=1.2, top_p=0.95, seed=11),
    "top-k": Sampling(TOKENS, (), temperature=0.9, top_k=20, seed=12),
    "penalized": Sampling(TOKENS, (), temperature=0.8, seed=13, repetition_penalty=1.3),
}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, Path]]:
    return blocks_at(32, tmp_path_factory.mktemp("blocks"))


@pytest.fixture
def ring(artifacts: list[tuple[int, Path]]) -> Iterator[tuple[Node, Node]]:
    """Three stages would behave as two do; the middle one passes rows on."""
    nodes = [
        Node(name, artifacts[begin:end], CONTEXT, slots=2)
        for name, begin, end in (("first", 0, 2), ("middle", 2, 3), ("last", 3, len(artifacts)))
    ]
    for index, node in enumerate(nodes):
        node.connect(nodes[(index + 1) % len(nodes)])
    nodes[0].others = nodes[1:]
    yield nodes[0], nodes[-1]
    for node in nodes:
        node.close()


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens that are guessed behind each prompt. The test fills it."""
    answer: list[int] = []
    rng = random.Random(0)

    def guess(self: History, most: int) -> tuple[tuple[int, ...], int]:
        done = self._count - len(PROMPT)
        guesses = list(answer[done : done + most])
        for index in range(len(guesses)):
            if rng.random() < 0.15:
                guesses[index] = (guesses[index] + 1) % 256
        return tuple(guesses), 8

    monkeypatch.setattr(History, "guess", guess)
    monkeypatch.setattr(Pacer, "choose", lambda self, most, matched: rng.randint(0, max(most, 0)))
    return answer


def asked(number: int, sampling: Sampling, slot: int = 0, drafts: int = 14) -> StartSequence:
    return StartSequence(EPOCH, number, slot, PROMPT, sampling, drafts=drafts)


def begun(first: Node, last: Node, message: StartSequence) -> None:
    """Start a sequence, of whose prompt the last stage knows what is penalized."""
    if message.sampling.repetition_penalty != 1:
        told = replace(message.sampling, penalized=tuple(sorted(set(message.prompt))))
        last.relay.start(replace(message, prompt=(), sampling=told))
    first.start(message)


def messages_of(node: Node, number: int) -> list[TokenSampled]:
    """What the last stage reports of a sequence until its end, in order."""
    messages: list[TokenSampled] = []
    while not messages or not messages[-1].finish:
        message = node.reports.get(timeout=ANSWER_S)
        assert isinstance(message, TokenSampled), message
        assert (message.sequence, message.index) == (number, len(messages))
        assert (message.after_us > 0) == (message.index > 0)
        messages.append(message)
    return messages


@pytest.mark.parametrize("name", SAMPLINGS)
def test_guesses_right_and_wrong_change_no_token(
    ring: tuple[Node, Node], oracle: list[int], name: str
) -> None:
    first, last = ring
    sampling = SAMPLINGS[name]
    begun(first, last, asked(1, sampling, drafts=0))
    expected = [message.token for message in messages_of(last, 1)]
    oracle += expected
    for number in range(2, 6):
        begun(first, last, asked(number, sampling))
        messages = messages_of(last, number)
        assert [message.token for message in messages] == expected
        accepted = sum(message.accepted for message in messages)
        drafted = sum(message.drafted for message in messages)
        assert drafted > accepted > TOKENS / 8
    assert first.reports.empty()


def test_guesses_save_passes(ring: tuple[Node, Node], oracle: list[int]) -> None:
    first, last = ring
    oracle += CONTINUATION
    begun(first, last, asked(1, SAMPLINGS["greedy"]))
    messages = messages_of(last, 1)
    passes = first.stage.calls.qsize()
    # Each pass gives one token and what it accepted; the last pass may have ended early.
    assert passes == TOKENS - sum(message.accepted for message in messages)
    assert passes < TOKENS / 2


def test_one_stage_that_is_the_whole_ring_checks_its_own_guesses(
    artifacts: list[tuple[int, Path]], oracle: list[int]
) -> None:
    oracle += CONTINUATION
    alone = Node("alone", artifacts, CONTEXT)
    alone.start(replace(asked(1, GREEDY)))
    messages = messages_of(alone, 1)
    assert [message.token for message in messages] == CONTINUATION
    assert sum(message.accepted for message in messages) > 20
    alone.close()


def test_a_team_checks_guesses(oracle: list[int]) -> None:
    checkpoint = Checkpoint.open(LLAMA)
    oracle += CONTINUATION
    with team_of(checkpoint, (1, 1)) as members:
        ring = Ring(members, checkpoint.spec)
        try:
            for number, sampling in enumerate((GREEDY, SAMPLINGS["drawn"]), 1):
                ring.relay.start(asked(2 * number, sampling, drafts=0))
                expected = ring.answers(1)[2 * number]
                oracle[:] = expected
                before = members[1].share_stage.passes
                ring.relay.start(asked(2 * number + 1, sampling))
                assert ring.answers(1)[2 * number + 1] == expected
                assert members[1].share_stage.passes - before < len(expected)
        finally:
            ring.close()


def test_a_stop_token_among_right_guesses_ends_the_answer(
    ring: tuple[Node, Node], oracle: list[int]
) -> None:
    first, last = ring
    oracle += CONTINUATION
    for number, at in enumerate((3, 10, 25), 1):
        stop = CONTINUATION[at]
        end = CONTINUATION.index(stop)
        begun(first, last, asked(number, replace(GREEDY, stop_tokens=(stop,))))
        messages = messages_of(last, number)
        assert [message.token for message in messages] == CONTINUATION[: end + 1]
        assert messages[-1].finish == "stop"
    assert last.reports.empty()


@pytest.mark.parametrize("tokens", [1, 2, 3, 17])
def test_no_more_tokens_come_than_were_asked_for(
    ring: tuple[Node, Node], oracle: list[int], tokens: int
) -> None:
    first, last = ring
    oracle += CONTINUATION
    begun(first, last, asked(1, replace(GREEDY, max_tokens=tokens)))
    assert [message.token for message in messages_of(last, 1)] == CONTINUATION[:tokens]
    assert last.reports.empty()


def test_an_answer_may_end_with_the_context(
    artifacts: list[tuple[int, Path]], oracle: list[int]
) -> None:
    oracle += CONTINUATION
    alone = Node("alone", artifacts, len(PROMPT) + 20)
    alone.start(asked(1, replace(GREEDY, max_tokens=1000)))
    messages = messages_of(alone, 1)
    assert [message.token for message in messages] == CONTINUATION[:21]
    assert messages[-1].finish == "length"
    alone.close()


def test_sequences_at_once_are_not_guessed_and_give_what_each_gives_alone(
    ring: tuple[Node, Node], oracle: list[int]
) -> None:
    first, last = ring
    oracle += CONTINUATION
    expected = {}
    for number, name in ((1, "greedy"), (2, "drawn")):
        begun(first, last, asked(number, SAMPLINGS[name], drafts=0))
        expected[number + 2] = [message.token for message in messages_of(last, number)]
    begun(first, last, asked(3, SAMPLINGS["greedy"], 0))
    tokens = [last.reports.get(timeout=ANSWER_S) for _ in range(5)]
    begun(first, last, asked(4, SAMPLINGS["drawn"], 1))
    found: dict[int, list[TokenSampled]] = {3: [], 4: []}
    ended = 0
    while ended < 2:
        message = tokens.pop(0) if tokens else last.reports.get(timeout=ANSWER_S)
        assert isinstance(message, TokenSampled)
        found[message.sequence].append(message)
        ended += bool(message.finish)
    assert {
        number: [message.token for message in messages] for number, messages in found.items()
    } == expected


def test_the_next_turn_goes_on_behind_rejected_guesses(
    ring: tuple[Node, Node], oracle: list[int]
) -> None:
    first, last = ring
    oracle += CONTINUATION
    begun(first, last, asked(1, replace(GREEDY, max_tokens=30)))
    messages_of(last, 1)
    longer = (*PROMPT, *CONTINUATION[:30], 9, 8, 7)
    oracle.clear()
    message = StartSequence(EPOCH, 2, 1, longer, replace(GREEDY, max_tokens=20))
    first.start(message)
    expected = [one.token for one in messages_of(last, 2)]
    first.start(replace(message, sequence=3, slot=0, cached=len(longer) - 4, drafts=14))
    assert [one.token for one in messages_of(last, 3)] == expected


def test_what_repeats_is_guessed_without_an_oracle(
    artifacts: list[tuple[int, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer is in the prompt. So it follows its own beginning there."""
    monkeypatch.setattr(Pacer, "choose", lambda self, most, matched: most)
    alone = Node("alone", artifacts, CONTEXT)
    repeating = (7, 7, *[3, 1, 4, 1, 5, 9, 2, 6] * 6)
    sampling = Sampling(90, ())
    alone.start(StartSequence(EPOCH, 1, 0, repeating, sampling))
    expected = [message.token for message in messages_of(alone, 1)]
    alone.start(StartSequence(EPOCH, 2, 0, repeating, sampling, drafts=5))
    messages = messages_of(alone, 2)
    assert [message.token for message in messages] == expected
    assert all(message.drafted <= 5 for message in messages)
    assert sum(message.drafted for message in messages) > 0
    alone.close()


# ---- what peers may send -----------------------------------------------------------------------


def test_guesses_that_do_not_fit_are_refused(ring: tuple[Node, Node]) -> None:
    _, last = ring
    last.relay.start(start(1, ()))
    good, payload = activation(1, 4, last=True)
    for message in (
        replace(good, drafts=(1, 2)),
        replace(good, drafts=(1, 2, 3, 4)),
        replace(good, drafts=(1, 2, 3), last=False),
    ):
        last.relay.deliver(message, payload)
        assert isinstance(last.reports.get(timeout=ANSWER_S), SequenceFailed), message
    many = 2 + limits.DRAFT_TOKENS
    message, payload = activation(1, many, last=True)
    last.relay.deliver(replace(message, drafts=(1,) * (many - 1)), payload)
    assert isinstance(last.reports.get(timeout=ANSWER_S), SequenceFailed)


@pytest.mark.parametrize("accepted", [-1, 1, 99])
def test_more_right_guesses_than_there_were_are_not_believed(
    ring: tuple[Node, Node], accepted: int
) -> None:
    first, last = ring
    first.start(replace(start(1), sampling=replace(GREEDY, max_tokens=5)))
    tokens = [last.token(1).token]
    lie = TokenSampled(EPOCH, 1, 0, 9, "", accepted=accepted)
    first.relay.deliver(lie, memoryview(b""))
    assert tokens + last.answer(1, 1) == CONTINUATION[:5]


@pytest.mark.parametrize("drafts", [-1, limits.DRAFT_TOKENS + 1])
def test_an_impossible_number_of_guesses_is_refused(ring: tuple[Node, Node], drafts: int) -> None:
    first, _ = ring
    first.relay.start(asked(1, GREEDY, drafts=drafts))
    assert isinstance(first.reports.get(timeout=ANSWER_S), SequenceFailed)
