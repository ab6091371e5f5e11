"""Names belong to devices: whoever joins first, whatever was restarted in between."""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path

import pytest

from coordinator import members, names
from coordinator.names import NameBook
from tests.coordinator.test_members import Coordinator, hello, next_message, run
from wire.connection import AsyncConnection
from wire.messages import AgentHello, CoordinatorWelcome, Heartbeat, JoinRefused

WISHES = {"a" * 16: "pi", "b" * 16: "pi", "c" * 16: "pi-2"}


@pytest.mark.parametrize("order", list(itertools.permutations(WISHES)))
def test_a_name_stays_with_its_device_whoever_joins_first(
    tmp_path: Path, order: tuple[str, ...]
) -> None:
    first = NameBook(tmp_path)
    given = {device: first.assign(device, wish, ()) for device, wish in WISHES.items()}
    assert list(given.values()) == ["pi", "pi-2", "pi-2-2"]
    again = NameBook(tmp_path)
    assert {device: again.assign(device, WISHES[device], ()) for device in order} == given


def test_a_device_that_asks_for_another_name_gets_it_and_leaves_the_old_one(tmp_path: Path) -> None:
    book = NameBook(tmp_path)
    assert book.assign("a", "pi", ()) == "pi"
    assert book.assign("b", "pi", ()) == "pi-2"
    assert book.assign("a", "nano", ()) == "nano"
    assert book.assign("b", "pi", ()) == "pi-2"
    assert book.assign("c", "pi", ()) == "pi"
    assert (book.device("nano"), book.device("a"), book.device("pi")) == ("a", "a", "c")
    assert NameBook(tmp_path).name("a") == "nano"
    assert (book.device("who"), book.name("who")) == (None, "who")


def test_no_name_is_the_id_of_another_device() -> None:
    book = NameBook()
    book.assign("a" * 16, "pi", ())
    assert book.assign("b" * 16, "a" * 16, ()) == "a" * 16 + "-2"
    assert book.is_name("pi", besides="b" * 16)
    assert not book.is_name("pi", besides="a" * 16)


def test_a_long_name_stays_one_that_is_allowed() -> None:
    book = NameBook()
    given = [book.assign(device, "x" * 63, ()) for device in "abc"]
    assert len(set(given)) == 3
    assert max(map(len, given)) == 63


def test_so_many_names_are_kept_and_those_of_members_always(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "MAX_NAMES", 3)
    book = NameBook(tmp_path)
    for device in "abc":
        book.assign(device, "pi", ())
    book.assign("d", "pi", living={"a"})
    assert [device for device in "abcd" if NameBook(tmp_path).device(device)] == ["a", "c", "d"]


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\xff",
        b"[1]",
        b'{"version": 2, "devices": {}}',
        b'{"version": 1, "devices": {"a": ["pi"]}}',
        b'{"version": 1, "devices": {"a": ["pi", 3]}}',
        b'{"version": 1, "devices": {"a": ["pi", "pi"], "b": ["pi", "pi"]}}',
        b"[" * 100_000,
    ],
    ids=range(8),
)
def test_a_damaged_file_is_put_aside_with_a_word(
    tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "names.json").write_bytes(damage)
    book = NameBook(tmp_path)
    assert "is of no use" in caplog.text
    assert book.assign("a", "pi", ()) == "pi"
    assert (tmp_path / "names.damaged").read_bytes() == damage
    assert json.loads((tmp_path / "names.json").read_bytes())["devices"] == {"a": ["pi", "pi"]}


def test_a_disk_that_takes_nothing_is_no_reason_to_refuse_a_device(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    book = NameBook(tmp_path / "missing")
    assert book.assign("a", "pi", ()) == "pi"
    assert "a restart may rename devices" in caplog.text


# ---- joining -----------------------------------------------------------------------------------


def from_run(run: str, attempt: int, name: str = "pi") -> AgentHello:
    plain = hello(name=name)
    return AgentHello(
        plain.device, name, "1", plain.endpoints, plain.profile, run=run, attempt=attempt
    )


async def beat(connection: AsyncConnection) -> None:
    while True:
        await connection.send(Heartbeat())
        await asyncio.sleep(0.01)


def test_who_lost_its_connection_comes_back_as_itself_before_the_loss_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The old connection still delivers what was sent on it, as a network that stood still does."""
    monkeypatch.setattr(members, "SIGN_OF_LIFE_S", 60)

    async def test(coordinator: Coordinator) -> None:
        old, member = await coordinator.joined(from_run("one", 1))
        _, other = await coordinator.joined(hello("other", "pi"))
        assert other.name == "pi-2"
        beating = asyncio.ensure_future(beat(old))
        _, back = await coordinator.joined(from_run("one", 2))
        beating.cancel()
        assert (back.name, back.device) == ("pi", member.device)
        assert member.lost is not None
        assert "joined again" in str(member.lost)
        # A connection that was given up in between takes nothing over.
        late = await coordinator.join(from_run("one", 1))
        assert isinstance(await next_message(late), JoinRefused)
        assert coordinator.roster.find(back.device) is back

    run(test)


def test_what_lay_in_a_dead_connection_is_no_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "SIGN_OF_LIFE_S", 0.4)

    async def test(coordinator: Coordinator) -> None:
        old, member = await coordinator.joined(from_run("before", 1))
        new = await coordinator.join(from_run("after", 1))
        for _ in range(20):
            await old.send(Heartbeat())
        assert await next_message(new) == CoordinatorWelcome("test", "pi")
        assert member.lost is not None

    run(test)


def test_two_that_come_for_one_device_at_once_leave_one_member(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(members, "SIGN_OF_LIFE_S", 0.1)

    async def test(coordinator: Coordinator) -> None:
        _, first = await coordinator.joined(from_run("", 0))
        for connection in [await coordinator.join(from_run("", 0)) for _ in range(3)]:
            answer = await next_message(connection)
            assert answer == CoordinatorWelcome("test", "pi")
        # All but the last were told apart and lost: nobody serves a member that is none.
        for _ in range(3):
            await coordinator.ended.get()
        assert len(coordinator.lost) == 3
        assert first.lost is not None
        assert len(coordinator.roster.members) == 1

    run(test)


def test_an_id_that_is_the_name_of_another_is_refused() -> None:
    async def test(coordinator: Coordinator) -> None:
        await coordinator.joined(hello("0123", "pi"))
        answer = await next_message(await coordinator.join(hello("pi", "other")))
        assert answer == JoinRefused("the device id 'pi' is another device's name")

    run(test)


def test_how_long_a_device_is_there_survives_a_jump_of_the_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from coordinator.admin_api import _device

    async def test(coordinator: Coordinator) -> None:
        _, member = await coordinator.joined(hello())
        monkeypatch.setattr("time.time", lambda: 0.0)
        assert 0 <= _device(member)["joined_s"] < 30

    run(test)
