"""Sums over loopback sockets: all members get the same rows, whatever happens to one of them."""

from __future__ import annotations

import threading
from contextlib import suppress
from functools import partial

import numpy as np
import pytest

from agent.mesh import Mesh, PassFailed, TeamLost, TeamStopped
from agent.team_sum import TeamSum
from backends.base import Array, BackendError
from tests.agent.teams import EPOCH, connected, meshes_of, together
from wire.activations import HopBits, decode_rows, encode_rows
from wire.codec import encode
from wire.connection import Connection
from wire.errors import ProtocolError, WireError
from wire.messages import Activation, Message, TeamFailed, TeamPart, TeamPass
from wire.sums import is_direct, span, traffic

HIDDEN = 640
LARGE = 4096
"""With 64 such rows, frames are larger than the buffers of a connection."""


def partials(members: int, rows: int, hidden: int = HIDDEN) -> list[Array]:
    random = np.random.default_rng(members * rows)
    return [random.standard_normal((rows, hidden), np.float32) for _ in range(members)]


def rounded(rows: Array, bits: HopBits) -> Array:
    count, hidden = rows.shape
    return decode_rows(encode_rows(rows, bits), count, hidden, bits)


def summed(meshes: list[Mesh], parts: list[Array], bits: HopBits) -> list[Array]:
    """Every member's sum of its partial rows, in the next pass."""

    def run(mesh: Mesh, part: Array) -> Array:
        mesh.number += 1
        return TeamSum(mesh, part.shape[1], bits)(part)

    return together([partial(run, *one) for one in zip(meshes, parts, strict=True)])


@pytest.mark.parametrize("bits", [32, 16, 8])
@pytest.mark.parametrize("members", [2, 3, 5])
def test_all_members_get_bit_equal_sums(members: int, bits: HopBits) -> None:
    with meshes_of(members) as meshes:
        for rows in (1, 7, 64):
            parts = partials(members, rows)
            expected: Array = sum(
                (rounded(part, bits) for part in parts[1:]), rounded(parts[0], bits)
            )
            if not is_direct(members, rows, HIDDEN, bits):
                spans = [span(rows, members, member) for member in range(members)]
                expected = np.concatenate([rounded(expected[a:b], bits) for a, b in spans])
            kept = [part.copy() for part in parts]
            for total in summed(meshes, parts, bits):
                np.testing.assert_array_equal(total, expected)
            for part, before in zip(parts, kept, strict=True):
                np.testing.assert_array_equal(part, before)


def test_both_ways_of_adding_are_tried() -> None:
    assert is_direct(2, 64, HIDDEN, 32)
    assert is_direct(5, 1, LARGE, 32)
    assert not is_direct(3, 64, HIDDEN, 8)
    assert not is_direct(5, 7, HIDDEN, 32)
    assert traffic(2, 1, LARGE, 16) == (1, 2 * LARGE + 4)
    messages, sent_bytes = traffic(4, 64, LARGE, 16)
    assert messages == 2
    # Three quarters of the rows leave as partial sums, and one quarter to three others as a sum.
    assert sent_bytes == 2 * 3 * 16 * (2 * LARGE + 4)


@pytest.mark.parametrize("members", [2, 3])
def test_frames_larger_than_all_buffers_do_not_wait_for_each_other(members: int) -> None:
    parts = partials(members, 512, LARGE)
    with meshes_of(members) as meshes:
        totals = summed(meshes, parts, 32)
        assert all((total == totals[0]).all() for total in totals)
        np.testing.assert_allclose(totals[0], np.sum(parts, axis=0), atol=1e-5)


def test_a_failed_pass_ends_for_all_and_the_next_one_runs() -> None:
    parts = partials(3, 64, LARGE)
    with meshes_of(3) as meshes:
        for broken in range(3):

            def run(mesh: Mesh, part: Array, broken: int = broken) -> str:
                mesh.number += 1
                if mesh.index == broken:
                    mesh.leave("out of luck")
                    return "left"
                with pytest.raises(PassFailed) as caught:
                    TeamSum(mesh, LARGE, 32)(part)
                mesh.flush()
                return str(caught.value)

            told = together([partial(run, *one) for one in zip(meshes, parts, strict=True)])
            reasons = {reason for reason in told if reason != "left"}
            assert reasons == {"another device of its team failed: out of luck"}
            totals = summed(meshes, parts, 32)
            assert all((total == totals[0]).all() for total in totals)


def test_everybody_names_the_same_lost_member() -> None:
    parts = partials(3, 1)
    with meshes_of(3) as meshes:

        def run(mesh: Mesh, part: Array) -> str:
            mesh.number += 1
            if mesh.index == 1:
                mesh.close()
                return mesh.devices[1]
            with pytest.raises(TeamLost) as caught:
                TeamSum(mesh, HIDDEN, 16)(part)
            with pytest.raises(TeamLost) as again:
                mesh.check()
            assert again.value.device == caught.value.device
            return caught.value.device

        lost = together([partial(run, *one) for one in zip(meshes, parts, strict=True)])
        assert lost == ["member-1"] * 3


def test_a_member_that_lost_another_one_says_so_and_stays() -> None:
    """Member 2 hears of the loss of member 1 by member 0 alone."""
    with meshes_of(3) as meshes:
        meshes[0].lose("member-1", "the cable is cut")
        with pytest.raises(TeamLost, match="the cable is cut") as caught:
            meshes[2].receive(0)
        assert caught.value.device == "member-1"


def test_a_silent_member_is_lost() -> None:
    with meshes_of(2, silence_s=0.05) as meshes, pytest.raises(TeamLost, match="said nothing"):
        TeamSum(meshes[0], HIDDEN, 16)(partials(1, 1)[0])


def test_a_pass_that_waits_ends_when_the_stage_is_unloaded() -> None:
    with meshes_of(2) as meshes:
        waiting = threading.Timer(0.05, meshes[0].stop)
        waiting.start()
        with pytest.raises(TeamStopped):
            TeamSum(meshes[0], HIDDEN, 16)(partials(1, 1)[0])
        with pytest.raises(TeamStopped):
            meshes[0].check()
        waiting.join()


def test_no_sum_before_all_members_are_connected() -> None:
    mesh = Mesh(EPOCH, ("a", "b"), 0, 1 << 20)
    with pytest.raises(BackendError, match="not connected yet"):
        TeamSum(mesh, HIDDEN, 16)(partials(1, 1)[0])
    mesh.close()


def test_strangers_and_second_connections_are_refused() -> None:
    with meshes_of(2) as meshes:
        near, far = connected()
        with near, far:
            for device in ("member-0", "member-1", "stranger"):
                with pytest.raises(ProtocolError):
                    meshes[0].add(device, near)


def part(**changes: int) -> TeamPart:
    values = {"epoch": EPOCH, "number": 1, "cut": 0, "first_row": 0, "rows": 2, **changes}
    return TeamPart(**values, bits=16)


ROWS = encode_rows(partials(1, 2)[0], 16)


@pytest.mark.parametrize(
    ("message", "payload"),
    [
        (part(epoch=EPOCH + 1), ROWS),
        (part(number=2), ROWS),
        (part(cut=1), ROWS),
        (part(first_row=1), ROWS),
        (part(rows=3), ROWS),
        (part(), ROWS[:-1]),
        (part(), memoryview(bytes(len(ROWS)))),
        (part(), b""),
        (part(), bytes(2 << 20)),
        (Activation(EPOCH, 1, 0, 0, 2, 16, True), ROWS),
        (TeamPass(EPOCH, 1, (0,), (0,), 2, 16, 0), ROWS),
        (TeamFailed(EPOCH, 2, "member-1", "early", False), b""),
        (TeamFailed(EPOCH, 1, "stranger", "never heard of", True), b""),
        (TeamFailed(EPOCH, 1, "member-0", "lost you", True), b""),
    ],
)
def test_wrong_messages_end_the_team_and_name_the_sender(
    message: Message, payload: bytes | memoryview
) -> None:
    near, far = connected()
    mesh = Mesh(EPOCH, ("member-0", "member-1"), 0, 1 << 20)
    mesh.add("member-1", near)
    mesh.number = 1
    sender = threading.Thread(target=_send, args=(far, message, payload))
    sender.start()
    with pytest.raises(TeamLost) as caught:
        TeamSum(mesh, HIDDEN, 16)(partials(1, 2)[0])
    assert caught.value.device == "member-1"
    assert "\n" not in str(caught.value)
    mesh.close()
    sender.join()
    far.close()


def _send(connection: Connection, message: Message, payload: bytes | memoryview) -> None:
    with suppress(WireError):  # A reader that has seen enough may close.
        connection.send(message, payload)


def test_a_flood_is_not_read_beyond_what_a_pass_needs() -> None:
    """Member 1 sends without end while member 0 waits for member 2."""
    with meshes_of(3, largest_bytes=1 << 20, silence_s=0.3) as meshes:
        frame = encode(part(number=1), 1 << 20)
        flood = memoryview(bytes(1 << 20))
        for _ in range(64):
            meshes[1].send(0, frame, flood)
        meshes[0].number = 1
        with pytest.raises(TeamLost, match="said nothing") as caught:
            meshes[0].receive(2)
        assert caught.value.device == "member-2"
        assert len(meshes[0]._peers[1].waiting) <= 4


def test_messages_without_end_of_passes_that_are_over_end_the_team() -> None:
    with meshes_of(2) as meshes:
        meshes[0].number = 5
        for number in range(5):
            meshes[1].send(0, encode(part(number=number), len(ROWS)), ROWS)
        current = part(number=5)
        meshes[1].send(0, encode(current, len(ROWS)), ROWS)
        assert meshes[0].receive(1)[0] == current
        for _ in range(40):
            meshes[1].send(0, encode(part(number=1), len(ROWS)), ROWS)
        with pytest.raises(TeamLost, match="passes that are over") as caught:
            meshes[0].receive(1)
        assert caught.value.device == "member-1"
