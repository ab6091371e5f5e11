"""Devices keep their names, whoever joins first and whatever is restarted."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from api.page.state import StateFeed
from coordinator.roster import members, names
from coordinator.roster.members import Member
from coordinator.roster.names import NameBook
from tests.coordinator.test_members import PROFILE, Coordinator, hello, next_message, run
from wire.async_connection import AsyncConnection
from wire.messages import AgentHello, CoordinatorWelcome, Endpoint, Heartbeat, JoinRefused

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
    (said,) = (record.getMessage() for record in caplog.records)
    assert re.search(r"names\.json cannot be used \([a-z0-9 ]+\): ", said)
    assert "it is kept as names.damaged, and devices are named anew" in said
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
    return replace(hello(name=name), run=run, attempt=attempt)


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
    from api.admin import _device

    async def test(coordinator: Coordinator) -> None:
        _, member = await coordinator.joined(hello())
        monkeypatch.setattr("time.time", lambda: 0.0)
        assert 0 <= _device(member)["joined_s"] < 30

    run(test)


# ---- which cluster, and at which addresses -----------------------------------------------------


def test_a_lost_device_stays_on_the_page_when_the_clock_jumps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A board without a clock of its own learns the time when the network is there."""
    from tests.api.test_page import Parts

    async def test(coordinator: Coordinator) -> None:
        parts = Parts(tmp_path)
        connection, member = await coordinator.joined(hello())
        feed = StateFeed(
            parts.config, coordinator.roster, parts.models, parts.turns, parts.requests, parts.story
        )
        with coordinator.roster.changed.watch() as changed:
            connection.close()
            while coordinator.roster.members:
                changed.clear()
                await changed.wait()
        assert member.lost is not None
        for now_s in (time.time() + 3e7, 1.0):
            monkeypatch.setattr("time.time", lambda now_s=now_s: now_s)
            (shown,) = feed.state()["devices"]
            assert shown["state"] == "lost"
            assert abs(now_s - shown["since_s"]) < 60
            assert abs(now_s - feed.state()["shoal"]["started_s"]) < 60

    run(test)


def test_an_agent_of_another_cluster_is_refused_with_both_names() -> None:
    async def test(coordinator: Coordinator) -> None:
        for cluster in ("test", ""):
            await coordinator.joined(replace(hello(f"0{cluster}"), cluster=cluster))
        answer = await next_message(await coordinator.join(replace(hello("1"), cluster="attic")))
        assert isinstance(answer, JoinRefused)
        assert answer.reason.startswith("this is cluster 'test', and the agent wants 'attic'")
        assert len(coordinator.roster.members) == 2

    run(test)


class Seen:
    """A control connection as far as addresses go."""

    def __init__(self, peer: str, here: str) -> None:
        self.peer_host, self.local_host = peer, here


def member_at(
    peer: str, here: str, *hosts: str, port: int = 7, advertised: str | None = None
) -> Member:
    return Member(
        device=peer,
        name=peer,
        version="1",
        endpoints=tuple(Endpoint(host, 7) for host in hosts),
        profile=PROFILE,
        connection=cast("AsyncConnection", Seen(peer, here)),
        joined_s=0.0,
        port=port,
        advertised=(Endpoint(advertised, 9),) if advertised else (),
    )


HUB = "10.0.0.1"
BEHIND_NAT = ("10.0.0.3", HUB, "172.17.0.2")


@pytest.mark.parametrize(
    ("target", "source", "expected"),
    [
        # On the coordinator's machine, joined over loopback: at the coordinator's own address.
        (("127.0.0.1", "127.0.0.1", "127.0.0.1"), ("10.0.0.2", HUB), [HUB]),
        (("127.0.0.1", "127.0.0.1", "127.0.0.1"), ("127.0.0.1", "127.0.0.1"), ["127.0.0.1"]),
        ((HUB, HUB, HUB), ("127.0.0.1", "127.0.0.1"), [HUB]),
        # Behind NAT, or in a container that publishes its port.
        (BEHIND_NAT, ("10.0.0.2", HUB), ["10.0.0.3", "172.17.0.2"]),
        (("10.0.0.3", HUB, "10.0.0.3", "127.0.0.1"), ("10.0.0.2", HUB), ["10.0.0.3"]),
        (("fe80::1%eth0", HUB, "10.0.0.3"), ("10.0.0.2", HUB), ["10.0.0.3"]),
    ],
)
def test_an_agent_is_looked_for_where_the_coordinator_sees_it(
    target: tuple[str, ...], source: tuple[str, ...], expected: list[str]
) -> None:
    found = member_at(*target).endpoints_for(member_at(*source))
    assert [endpoint.host for endpoint in found] == expected


def test_what_the_user_says_comes_first_and_one_address_means_that_one() -> None:
    source = member_at("10.0.0.2", HUB)
    target = member_at(*BEHIND_NAT, advertised="nas.example")
    assert [(item.host, item.port) for item in target.endpoints_for(source)] == [
        ("nas.example", 9),
        ("10.0.0.3", 7),
        ("172.17.0.2", 7),
    ]
    bound = member_at(*BEHIND_NAT, port=0)
    assert [item.host for item in bound.endpoints_for(source)] == ["172.17.0.2"]
