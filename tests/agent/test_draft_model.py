"""Guesses of a small model: the answer is the one of single rows, whatever the model guesses."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agent.drafter import Drafter
from agent.drafts import Pacer, Plan
from backends.base import Array, BackendError, Stage, StageOptions, Tokens
from backends.onnx_cpu import OnnxCpuBackend
from model.checkpoint import Checkpoint
from tests.agent.test_relay import CONTEXT, CONTINUATION, GREEDY, LLAMA, PROMPT, Node, blocks_at
from tests.agent.test_speculation import SAMPLINGS, TOKENS, asked, begun, messages_of
from wire import limits
from wire.messages import StartSequence, TokenSampled

VOCAB = Checkpoint.open(LLAMA).spec.vocab

Blocks = list[tuple[int, Path]]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Blocks:
    return blocks_at(32, tmp_path_factory.mktemp("blocks"))


@pytest.fixture(scope="module")
def coarse(tmp_path_factory: pytest.TempPathFactory) -> Blocks:
    """The same model with fewer bits: it often agrees, and not always."""
    return blocks_at(4, tmp_path_factory.mktemp("coarse"))


class Breakable(Stage):
    """A draft model's stage that fails once it is ``broken``."""

    def __init__(self, stage: Stage) -> None:
        self.broken: Exception | None = None
        self.closed = False
        self.rows = 0
        self._stage = stage

    def forward(
        self, slot: int, position: int, inputs: Array | Tokens, *, logits: int = 1
    ) -> Array:
        if self.broken is not None:
            raise self.broken
        self.rows += len(inputs)
        self._stage.candidates = self.candidates
        return self._stage.forward(slot, position, inputs, logits=logits)

    @property
    def memory_bytes(self) -> int:
        return self._stage.memory_bytes

    def close(self) -> None:
        self.closed = True
        self._stage.close()


def stage_of(blocks: Blocks, slots: int = 2, context: int = CONTEXT) -> Breakable:
    spec = Checkpoint.open(LLAMA).spec
    return Breakable(OnnxCpuBackend().load(spec, blocks, StageOptions(slots, context, 1)))


def drafter_of(blocks: Blocks, slots: int = 2, context: int = CONTEXT) -> Drafter:
    return Drafter(stage_of(blocks, slots, context), VOCAB, slots=slots, context_tokens=context)


Ring = tuple[Node, Node, Breakable]


@pytest.fixture
def ring(artifacts: Blocks, coarse: Blocks) -> Iterator[Ring]:
    """Three stages. The first one has the draft model."""
    stage = stage_of(coarse)
    drafter = Drafter(stage, VOCAB, slots=2, context_tokens=CONTEXT)
    drafter.warm_up()
    nodes = [
        Node(name, artifacts[begin:end], CONTEXT, slots=2, drafter=None if begin else drafter)
        for name, begin, end in (("first", 0, 2), ("middle", 2, 3), ("last", 3, len(artifacts)))
    ]
    for index, node in enumerate(nodes):
        node.connect(nodes[(index + 1) % len(nodes)])
    nodes[0].others = nodes[1:]
    yield nodes[0], nodes[-1], stage
    for node in nodes:
        node.close()


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take all sources and numbers of guesses at random, whatever they cost."""
    rng = random.Random(0)

    def plan(
        self: Pacer, most: int, matched: int, by_model: int, draft_s: Callable[[int], float]
    ) -> Plan:
        if most > 0 and rng.random() < 0.2:
            return Plan(rng.randint(0, most))
        return Plan(rng.randint(0, max(by_model, 0)), by_model=True)

    monkeypatch.setattr(Pacer, "plan", plan)


def tokens_of(messages: list[TokenSampled]) -> list[int]:
    return [message.token for message in messages]


def released(first: Node, number: int) -> None:
    """End a sequence on all stages."""
    for node in (first, *first.others):
        node.relay.release(number)


def by_model(messages: list[TokenSampled]) -> tuple[int, int]:
    """How many tokens the draft model guessed, and how many of them were right."""
    own = [message for message in messages if message.by_model]
    return sum(one.drafted for one in own), sum(one.accepted for one in own)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", SAMPLINGS)
def test_guesses_of_a_model_change_no_token(ring: Ring, name: str) -> None:
    first, last, _ = ring
    for seed in range(3):
        sampling = replace(SAMPLINGS[name], seed=seed)
        begun(first, last, asked(2 * seed + 1, sampling, drafts=0))
        expected = tokens_of(messages_of(last, 2 * seed + 1))
        released(first, 2 * seed + 1)
        begun(first, last, asked(2 * seed + 2, sampling, slot=seed % 2))
        messages = messages_of(last, 2 * seed + 2)
        released(first, 2 * seed + 2)
        assert tokens_of(messages) == expected
        drafted, accepted = by_model(messages)
        assert drafted > accepted > TOKENS / 8
    assert first.reports.empty()


@pytest.mark.usefixtures("eager")
def test_a_request_may_do_without_the_model(ring: Ring) -> None:
    first, last, stage = ring
    before = stage.rows
    begun(first, last, replace(asked(1, GREEDY), draft_model=False))
    messages = messages_of(last, 1)
    assert tokens_of(messages) == CONTINUATION
    assert (by_model(messages), stage.rows) == ((0, 0), before)


def test_a_model_that_agrees_and_costs_little_is_used_without_being_told(
    ring: Ring, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, last, _ = ring
    # The tiny stages of a test are as fast as the tiny draft model.
    monkeypatch.setattr(Drafter, "seconds", lambda self, guesses, lag: 0.0)
    number = right = 0
    while not right:  # A stall of the machine takes the credit for some answers.
        number += 1
        assert number < 50
        begun(first, last, asked(number, GREEDY))
        messages = messages_of(last, number)
        assert tokens_of(messages) == CONTINUATION
        right = by_model(messages)[1]


@pytest.mark.usefixtures("eager")
def test_the_next_turn_goes_on_in_the_models_own_cache(ring: Ring) -> None:
    first, last, stage = ring
    begun(first, last, asked(1, replace(GREEDY, max_tokens=30)))
    messages_of(last, 1)
    longer = (*PROMPT, *CONTINUATION[:30], 9, 8, 7)
    message = StartSequence(7, 2, 1, longer, replace(GREEDY, max_tokens=20))
    first.start(message)
    expected = tokens_of(messages_of(last, 2))
    released(first, 2)
    rows = stage.rows
    first.start(replace(message, sequence=3, slot=0, cached=len(longer) - 4, drafts=14))
    assert tokens_of(messages_of(last, 3)) == expected
    assert stage.rows - rows < len(longer) + 20 * limits.DRAFT_TOKENS


@pytest.mark.usefixtures("eager")
def test_sequences_that_come_and_go_give_what_each_gives_alone(ring: Ring) -> None:
    first, last, _ = ring
    expected = {}
    for number, name in ((1, "greedy"), (2, "drawn")):
        begun(first, last, asked(number, SAMPLINGS[name], drafts=0))
        expected[number + 3] = tokens_of(messages_of(last, number))
        released(first, number)
    begun(first, last, asked(3, SAMPLINGS["top-k"], 0))
    for _ in range(5):
        last.reports.get(timeout=60)
    released(first, 3)
    begun(first, last, asked(4, SAMPLINGS["greedy"], 0))
    found: dict[int, list[TokenSampled]] = {4: [], 5: []}
    ended = 0
    while ended < 2:
        message = last.reports.get(timeout=60)
        assert isinstance(message, TokenSampled)
        if message.sequence in found:
            found[message.sequence].append(message)
            ended += bool(message.finish)
            if len(found[4]) == 5 and not found[5]:
                begun(first, last, asked(5, SAMPLINGS["drawn"], 1))
                found[5] = []
    assert {number: tokens_of(messages) for number, messages in found.items()} == expected


FAILURES = (BackendError("the draft model is broken"), MemoryError("no memory for it"))


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("failure", FAILURES)
def test_a_model_that_fails_is_left_and_the_answer_goes_on(ring: Ring, failure: Exception) -> None:
    first, last, stage = ring
    begun(first, last, asked(1, GREEDY))
    tokens: list[int] = []
    finish = ""
    while not finish:
        message = last.reports.get(timeout=60)
        assert isinstance(message, TokenSampled)
        tokens.append(message.token)
        finish = message.finish
        stage.broken = failure if len(tokens) >= 10 else None
    assert tokens == CONTINUATION
    begun(first, last, asked(2, GREEDY))
    messages = messages_of(last, 2)
    assert tokens_of(messages) == CONTINUATION
    assert by_model(messages) == (0, 0)
    assert stage.closed  # Others may need its memory.


@pytest.mark.parametrize("failure", FAILURES)
def test_a_model_that_fails_while_it_is_fed_a_prompt_is_left(
    ring: Ring, failure: Exception
) -> None:
    first, last, stage = ring
    stage.broken = failure
    for number in (1, 2):
        begun(first, last, asked(number, GREEDY))
        assert tokens_of(messages_of(last, number)) == CONTINUATION


@pytest.mark.usefixtures("eager")
def test_a_lone_stage_drafts_and_the_shorter_context_of_its_model_is_no_limit(
    artifacts: Blocks, coarse: Blocks
) -> None:
    alone = Node("alone", artifacts, CONTEXT, drafter=drafter_of(coarse, 1, len(PROMPT) + 20))
    alone.start(asked(1, GREEDY))
    messages = messages_of(alone, 1)
    assert tokens_of(messages) == CONTINUATION
    assert by_model(messages)[1] > 3
    alone.close()


# ---- the model's own state ---------------------------------------------------------------------


def test_a_guess_after_any_change_is_that_of_a_fresh_model(coarse: Blocks) -> None:
    used = drafter_of(coarse)
    rng = random.Random(1)
    sampling = SAMPLINGS["drawn"]
    tokens = [rng.randrange(VOCAB) for _ in range(20)]
    for step in range(12):
        change = rng.choice(("append", "cut", "other", "feed"))
        if change == "append":
            tokens = [*tokens, *(rng.randrange(VOCAB) for _ in range(rng.randint(1, 6)))]
        elif change == "cut":
            tokens = tokens[: max(len(tokens) - rng.randint(1, 6), 3)]
        elif change == "other":
            tokens = [rng.randrange(VOCAB) for _ in range(rng.randint(3, 40))]
        now, slot = np.array(tokens, np.int64), step % 2
        if change == "feed":
            used.feed(slot, now[:-1], 5)
        fresh = drafter_of(coarse)
        expected = fresh.guess(slot, now, 6, sampling, VOCAB)
        assert used.guess(slot, now, 6, sampling, VOCAB) == expected
        assert used.lag(slot, now) == 1
        fresh.close()
    used.close()


def test_what_a_model_cannot_follow_is_not_guessed(coarse: Blocks) -> None:
    small = Drafter(stage_of(coarse, 1, 12), 250, slots=1, context_tokens=12)
    row = np.arange(5)
    assert small.lag(0, np.append(row, 255)) is None
    assert small.guess(0, np.append(row, 255), 4, GREEDY, VOCAB) == ()
    assert small.guess(0, np.arange(12), 4, GREEDY, VOCAB) == ()
    assert len(small.guess(0, np.arange(10), 14, GREEDY, VOCAB)) == 2
    assert all(token < 7 for token in small.guess(0, row, 4, GREEDY, 7))
    small.close()


# ---- which source ------------------------------------------------------------------------------


def speed(
    pacer: Pacer, step: float, right: Callable[[], int], matched: int, tokens: int = 1500
) -> float:
    """Simulate an answer: tokens per pass of one row, where a guess of the model takes ``step``.

    Guesses of the model are right as ``right`` says. Those of the text are all wrong.
    """
    made, passes = 0, 0.0
    while made < tokens:
        found = limits.DRAFT_TOKENS if matched else 0
        plan = pacer.plan(found, matched, limits.DRAFT_TOKENS, lambda count: count * step)
        accepted = min(right(), plan.guesses) if plan.by_model else 0
        draft_s = plan.guesses * step if plan.by_model else 0.0
        took = 1.0 + 0.05 * plan.guesses + draft_s
        pacer.note(took, plan.guesses, accepted, matched, draft_s=draft_s, by_model=plan.by_model)
        made += 1 + accepted
        passes += took
    return made / passes


def streaks(chance: float) -> Callable[[], int]:
    """How many guesses in a row are right, if each one is with this chance."""
    rng = random.Random(2)

    def right() -> int:
        count = 0
        while count < limits.DRAFT_TOKENS and rng.random() < chance:
            count += 1
        return count

    return right


@pytest.mark.parametrize("matched", [0, 3])
def test_a_quick_model_that_is_often_right_is_taken(matched: int) -> None:
    assert speed(Pacer(), 0.05, streaks(0.8), matched) > 1.8


@pytest.mark.parametrize("step", [0.02, 0.3, 1.0, 5.0])
@pytest.mark.parametrize("chance", [0.0, 0.2, 0.5])
def test_a_slow_or_wrong_model_costs_next_to_nothing(step: float, chance: float) -> None:
    assert speed(Pacer(), step, streaks(chance), 0) > 0.97


def test_text_is_guessed_from_where_it_repeats_and_by_the_model_elsewhere() -> None:
    pacer = Pacer()
    taken = {True: 0, False: 0}
    for at in range(400):
        repeats = at // 20 % 2 == 0
        found, matched = (limits.DRAFT_TOKENS, 12) if repeats else (0, 0)
        plan = pacer.plan(found, matched, limits.DRAFT_TOKENS, lambda count: 0.15 * count)
        accepted = plan.guesses if repeats else min(2, plan.guesses)
        draft_s = 0.15 * plan.guesses * plan.by_model
        pacer.note(
            1 + 0.01 * plan.guesses + draft_s,
            plan.guesses,
            accepted,
            matched,
            draft_s=draft_s,
            by_model=plan.by_model,
        )
        if at > 100 and plan.guesses:
            assert plan.by_model != repeats
            taken[repeats] += 1
    assert min(taken.values()) > 100
