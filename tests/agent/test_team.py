"""Teams that answer: relay, lead and members over loopback sockets, against transformers."""

from __future__ import annotations

import math
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from agent.peers import connect_peer
from agent.relay import Relay
from agent.team import Team
from backends.base import BackendError
from model.checkpoint import Checkpoint
from tests.agent.teams import (
    ANSWER_S,
    CONTEXT,
    EPOCH,
    TEAM_KEY,
    Member,
    ReferenceStage,
    Ring,
    team_of,
)
from wire.errors import ConnectFailed
from wire.messages import (
    BlockRef,
    Endpoint,
    LoadStage,
    Message,
    PeerLost,
    Sampling,
    SequenceFailed,
    StartSequence,
    TokenSampled,
)

FIXTURES = Path(__file__).parents[1] / "fixtures"
NAMES = sorted(path.parent.name for path in FIXTURES.glob("*/golden.npz"))
LLAMA = Checkpoint.open(FIXTURES / "llama")
OPT = Checkpoint.open(FIXTURES / "opt-pre")
GOLDEN = np.load(FIXTURES / "llama" / "golden.npz")
PROMPT = tuple(GOLDEN["prompt"].tolist())
CONTINUATION = GOLDEN["continuation"].tolist()
GREEDY = Sampling(24, ())


@contextmanager
def ring_of(
    checkpoint: Checkpoint, weights: Sequence[int], slots: int = 1, sum_bits: int = 32
) -> Iterator[tuple[Ring, list[Member]]]:
    with team_of(checkpoint, weights, slots=slots, sum_bits=sum_bits) as members:  # type: ignore[arg-type]  # a literal
        ring = Ring(members, checkpoint.spec, slots)
        try:
            yield ring, members
        finally:
            ring.close()


@contextmanager
def alone(checkpoint: Checkpoint, slots: int = 1) -> Iterator[tuple[Relay, queue.Queue[Message]]]:
    """The same model unshared, in a relay of its own."""
    reports: queue.Queue[Message] = queue.Queue()
    spec = checkpoint.spec
    blocks = range(spec.block_count)
    relay = Relay(
        ReferenceStage.whole(checkpoint, blocks, slots),
        spec,
        blocks,
        epoch=EPOCH,
        slots=slots,
        context_tokens=CONTEXT,
        hop_bits=32,
        report=reports.put,
    )
    try:
        yield relay, reports
    finally:
        relay.close()


def answer_alone(checkpoint: Checkpoint, prompt: Sequence[int], sampling: Sampling) -> list[int]:
    with alone(checkpoint) as (relay, reports):
        relay.start(StartSequence(EPOCH, 1, 0, tuple(prompt), sampling))
        tokens: list[int] = []
        while True:
            message = reports.get(timeout=ANSWER_S)
            assert isinstance(message, TokenSampled), message
            tokens.append(message.token)
            if message.finish:
                return tokens


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (1, 2, 2)])
@pytest.mark.parametrize("name", NAMES)
def test_a_team_answers_as_transformers_does(name: str, weights: tuple[int, ...]) -> None:
    checkpoint = Checkpoint.open(FIXTURES / name)
    if checkpoint.spec.layers[0].kv_heads < len(weights):
        pytest.skip("the model has fewer KV heads than the team has members")
    golden = np.load(FIXTURES / name / "golden.npz")
    with ring_of(checkpoint, weights) as (ring, members):
        ring.start(1, golden["prompt"].tolist(), GREEDY, chunk=10)
        assert ring.answers(1) == {1: golden["continuation"].tolist()[: GREEDY.max_tokens]}
        # The prompt went in three chunks. Every token but the last one was a pass.
        passes = 3 + GREEDY.max_tokens - 1
        assert [member.share_stage.passes for member in members] == [passes] * len(weights)


@pytest.mark.parametrize("weights", [(2, 1), (1, 1, 2)])
def test_several_sequences_at_once_answer_as_alone(weights: tuple[int, ...]) -> None:
    prompts = [PROMPT[: 5 + 6 * index] for index in range(4)]
    settings = [
        Sampling(16, ()),
        Sampling(16, (), temperature=0.9, top_k=5, seed=3),
        Sampling(16, (), temperature=1.0, top_p=0.9, seed=4),
        Sampling(16, (), temperature=1.0, top_k=500, seed=5),
    ]
    checkpoint = OPT
    expected = {
        number: answer_alone(checkpoint, prompt, sampling)
        for number, (prompt, sampling) in enumerate(zip(prompts, settings, strict=True), 1)
    }
    with ring_of(checkpoint, weights, slots=4) as (ring, _):
        for slot, (prompt, sampling) in enumerate(zip(prompts, settings, strict=True)):
            ring.start(slot + 1, prompt, sampling, slot=slot, chunk=8)
        assert ring.answers(4) == expected


@pytest.mark.parametrize("sum_bits", [16, 8])
def test_rounded_sums_keep_members_alike_and_logits_near(sum_bits: int) -> None:
    with team_of(OPT, (2, 1, 1), sum_bits=sum_bits) as members:  # type: ignore[arg-type]  # a literal
        logits = members[0].stage.forward(0, 0, np.asarray(PROMPT, np.int64))
        members[0].stage.candidates = 1
        best = members[0].stage.forward(0, 0, np.asarray(PROMPT, np.int64))
        assert np.isfinite(best).sum() <= len(members)
        whole = ReferenceStage.whole(OPT, range(OPT.spec.block_count))
        expected = whole.forward(0, 0, np.asarray(PROMPT, np.int64))
        error = np.abs(members[0].stage.forward(0, 0, np.asarray(PROMPT, np.int64)) - expected)
        assert 0 < np.min(error) < (0.02 if sum_bits == 16 else 0.5)
    assert logits.shape == expected.shape


def test_a_team_in_the_middle_sends_hidden_rows_on() -> None:
    """Layers without embedding and head: the lead returns rows, and nobody sends logits."""
    spec = LLAMA.spec
    rows = np.random.default_rng(1).standard_normal((5, spec.hidden)).astype(np.float32)
    whole = ReferenceStage.whole(LLAMA, range(1, 3), 2)
    with team_of(LLAMA, (1, 1), slots=2, first_block=1, end_block=3) as members:
        for begin, end in ((0, 3), (3, 5)):
            expected = whole.forward(1, begin, rows[begin:end])
            actual = members[0].stage.forward(1, begin, rows[begin:end])
            np.testing.assert_allclose(actual, expected, atol=1e-5)
        together = members[0].stage.decode([0, 1], [0, 5], rows[:2])
        expected = whole.decode([0, 1], [0, 5], rows[:2])
        np.testing.assert_allclose(together, expected, atol=1e-5)


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_a_pass_that_fails_ends_its_sequence_and_no_other(broken: int) -> None:
    with ring_of(OPT, (1, 1, 1), slots=2) as (ring, members):
        members[broken].share_stage.broken[0] = 2
        ring.start(1, PROMPT, GREEDY, slot=0)
        ring.start(2, PROMPT, GREEDY, slot=1)
        failed = ring.lead.reports.get(timeout=ANSWER_S)
        while isinstance(failed, TokenSampled):
            assert failed.sequence == 2
            failed = ring.lead.reports.get(timeout=ANSWER_S)
        assert isinstance(failed, SequenceFailed)
        assert failed.sequence == 1
        assert "this slot is broken" in failed.reason
        del members[broken].share_stage.broken[0]
        expected = answer_alone(OPT, PROMPT, GREEDY)
        ring.start(3, PROMPT, GREEDY, slot=0)
        assert ring.answers(2)[3] == expected


def test_an_unexpected_error_is_not_told_in_detail() -> None:
    with team_of(LLAMA, (1, 1)) as members:

        def fail() -> None:
            raise ValueError("secret")

        members[1].share_stage.before_sum = fail
        for _ in range(20):
            with pytest.raises(BackendError, match="internal error in the stage"):
                members[0].stage.forward(0, 0, np.asarray(PROMPT, np.int64))
        members[1].share_stage.before_sum = lambda: None
        members[0].stage.forward(0, 0, np.asarray(PROMPT, np.int64))


@pytest.mark.parametrize("killed", [0, 1, 2])
def test_a_member_lost_in_mid_pass_is_named_by_all_others(killed: int) -> None:
    with ring_of(OPT, (1, 1, 1)) as (ring, members):

        def die() -> None:
            for peer in members[killed].team.mesh._peers.values():
                peer.connection.close()
            members[killed].team.stop()

        members[killed].share_stage.before_sum = _after(9, die)
        ring.start(1, PROMPT, GREEDY)
        for index, member in enumerate(members):
            if index == killed:
                continue
            message = member.reports.get(timeout=ANSWER_S)
            while isinstance(message, TokenSampled):
                message = member.reports.get(timeout=ANSWER_S)
            assert isinstance(message, PeerLost), message
            assert (message.epoch, message.device) == (EPOCH, f"member-{killed}")
        if killed:  # The coordinator may not have known the deployment yet.
            ring.start(2, PROMPT, GREEDY)
            message = ring.lead.reports.get(timeout=ANSWER_S)
            assert isinstance(message, PeerLost)
            assert message.device == f"member-{killed}"


def _after(count: int, act: Callable[[], None]) -> Callable[[], None]:
    left = count

    def step() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            act()

    return step


def test_closing_ends_a_pass_that_waits_for_a_member() -> None:
    with ring_of(LLAMA, (1, 1)) as (ring, members):
        members[1].team.stop()  # It goes mute, as when a file of it was damaged.
        members[0].team.mesh._silence_s = math.inf  # So that it never counts as lost.
        ring.start(1, PROMPT, GREEDY)
        while members[0].team.mesh.number == 0:
            time.sleep(0.001)
        ring.close()
        assert ring.lead.reports.empty()


def test_a_lead_that_sends_nonsense_ends_the_team() -> None:
    with team_of(LLAMA, (1, 1), slots=2) as members:
        lead = members[0].team
        lead.slots = lead.context_tokens = 1 << 20
        rows = np.zeros((1, LLAMA.spec.hidden), np.float32)
        stage = members[0].stage
        stage._embedding = None  # type: ignore[attr-defined]  # the lead's own check goes with it
        with pytest.raises(Exception, match="a pass that does not fit the stage"):
            stage.decode([0, 7], [0, 0], np.concatenate([rows, rows]))
        message = members[1].reports.get(timeout=ANSWER_S)
        assert isinstance(message, PeerLost)
        assert message.device == "member-0"


def test_at_rest_nothing_runs() -> None:
    with ring_of(LLAMA, (1, 1)) as (ring, _):
        ring.start(1, PROMPT, Sampling(8, ()))
        ring.answers(1)
        time.sleep(0.05)  # The last pass has been told when it ends.
        before_s = time.process_time()
        time.sleep(0.5)  # The time over which the processor's use is measured.
        # One thread that looks for messages without sleeping would take all of it.
        assert time.process_time() - before_s < 0.1


def test_the_sum_is_measured_over_the_real_connections() -> None:
    with ring_of(OPT, (1, 1, 1)) as (ring, members):
        row_s, chunk_rows, chunk_s = members[0].stage.measure()  # type: ignore[attr-defined]  # LeadStage
        assert chunk_rows == 64
        assert 1e-6 < row_s < 1
        assert 1e-6 < chunk_s < 1
        ring.start(1, PROMPT, GREEDY)
        assert ring.answers(1)[1] == answer_alone(OPT, PROMPT, GREEDY)


@pytest.mark.parametrize("key", [b"", b"another key"])
def test_only_earlier_members_with_the_key_get_in(key: bytes) -> None:
    with team_of(LLAMA, (1, 1)) as members:
        for device, expected in (("member-0", 1), ("member-1", 0), ("stranger", 1)):
            endpoint = Endpoint("127.0.0.1", members[expected].listener.port)
            name = members[expected].device
            if key:
                with pytest.raises(ConnectFailed, match="not an earlier member"):
                    connect_peer(device, name, [endpoint], team_key=key)
            else:
                connect_peer(device, name, [endpoint]).close()  # It may measure the link.
        endpoint = Endpoint("127.0.0.1", members[0].listener.port)
        with pytest.raises(ConnectFailed, match="not an earlier member"):
            connect_peer("member-1", "member-0", [endpoint], team_key=TEAM_KEY)


@pytest.mark.parametrize(
    ("team", "share", "why"),
    [
        (("a", "b"), (0, 1, 0, 24, 0, 130), "no member"),
        (("me",), (0, 1, 0, 24, 0, 130), "no member"),
        (("me", "me"), (0, 1, 0, 24, 0, 130), "no member"),
        (("me", "b"), (0, 1, 0, 24, 0), "six numbers"),
        (("me", "b"), (0, 3, 0, 24, 0, 130), "KV heads"),
    ],
)
def test_a_team_that_cannot_be_is_refused(
    team: tuple[str, ...], share: tuple[int, ...], why: str
) -> None:
    block = BlockRef("0" * 64, 1, 1)
    request = LoadStage(1, EPOCH, {}, (block,), 1, 8, "", b"", team=team, share=share)
    with pytest.raises(BackendError, match=why):
        Team(request, "me", LLAMA.spec, lambda message: None)
