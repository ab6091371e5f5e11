"""Whom the coordinator names as sources of files: devices that have them, the nearest first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from coordinator.roster import holders as holders_module
from coordinator.roster.holders import MOST_ASKED, holders
from coordinator.roster.members import Member, Roster
from tests.coordinator.test_measurements import PROFILE
from wire.async_connection import AsyncConnection, serve
from wire.messages import (
    AgentHello,
    BlocksFound,
    Endpoint,
    FindBlocks,
    Heartbeat,
    Holder,
    LinkMeasured,
)

A, B = "a" * 64, "b" * 64


class Shoal:
    """A roster, and agents with files. An agent with None says nothing."""

    def __init__(self, held: dict[str, tuple[str, ...] | None]) -> None:
        self.roster = Roster("test")
        self.held = held
        self.tasks: list[asyncio.Task[None]] = []

    async def handle(self, connection: AsyncConnection) -> None:
        message, _ = await connection.receive(5)
        assert isinstance(message, AgentHello)
        await self.roster.serve(message, connection)

    async def join(self, name: str, port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        agent = AsyncConnection(reader, writer)
        ends = (Endpoint("127.0.0.1", ord(name)),)
        await agent.send(AgentHello(f"id-of-{name}", name, "1", ends, PROFILE))
        await agent.receive(5)
        self.tasks.append(asyncio.ensure_future(self.play(name, agent)))

    async def play(self, name: str, agent: AsyncConnection) -> None:
        try:
            while True:
                message, _ = await agent.receive(30)
                held = self.held[name]
                if isinstance(message, Heartbeat):
                    await agent.send(Heartbeat())
                elif isinstance(message, FindBlocks) and held is not None:
                    await agent.send(BlocksFound(message.request, held))
        finally:
            agent.close()

    def member(self, name: str) -> Member:
        return next(member for member in self.roster.members if member.name == name)

    def link(self, source: str, target: str, rate: float) -> None:
        measured = LinkMeasured(0, 1e-3, rate, 2e-3)
        self.roster.set_link(self.member(source), self.member(target), measured)

    async def found(self, *sha256s: str) -> list[tuple[str, set[str]]]:
        """Names and files of the holders for device x."""
        found = await holders(self.roster, "id-of-x", sha256s or (A, B))
        return [(item.device.removeprefix("id-of-"), set(item.sha256s)) for item in found]


@asynccontextmanager
async def running(held: dict[str, tuple[str, ...] | None]) -> AsyncIterator[Shoal]:
    shoal = Shoal(held)
    server, port = await serve("127.0.0.1", 0, shoal.handle)
    try:
        for name in held:
            await shoal.join(name, port)
        yield shoal
    finally:
        server.close()
        shoal.roster.close()
        for task in shoal.tasks:
            task.cancel()
        await asyncio.gather(*shoal.tasks, return_exceptions=True)


def run(test: Callable[[Shoal], Awaitable[None]], **held: tuple[str, ...] | None) -> None:
    async def main() -> None:
        async with running({"x": (A, B), **held}) as shoal:
            await asyncio.wait_for(test(shoal), 30)

    asyncio.run(main())


def test_the_nearest_come_first() -> None:
    async def test(shoal: Shoal) -> None:
        for name, rate in (("c", 6e6), ("d", 11e6), ("e", 8e6)):
            shoal.link(name, "x", rate)
        # Over a link below a quarter of the best one, the coordinator may be nearer.
        shoal.link("f", "x", 2e6)
        assert await shoal.found() == [("d", {A}), ("e", {B}), ("c", {A, B})]
        (first, *_) = await holders(shoal.roster, "id-of-x", [A])
        assert first == Holder("id-of-d", (Endpoint("127.0.0.1", ord("d")),), (A,))

    run(test, c=(A, B), d=(A,), e=(B,), f=(A, B), g=())


def test_a_device_that_cannot_be_reached_is_not_named() -> None:
    async def test(shoal: Shoal) -> None:
        shoal.roster.fail_link(shoal.member("x"), shoal.member("c"), "refused")
        assert await shoal.found() == [("d", {A})]

    run(test, c=(A, B), d=(A,))


def test_a_device_is_named_only_for_what_was_asked() -> None:
    async def test(shoal: Shoal) -> None:
        assert await shoal.found(A) == [("c", {A})]

    run(test, c=(A, B, "../../etc/passwd", "x" * 64), d=(B,))


def test_a_device_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holders_module, "ANSWER_S", 0.3)

    async def test(shoal: Shoal) -> None:
        assert await shoal.found() == [("d", {A})]

    run(test, c=None, d=(A,))


def test_strangers_and_absurd_questions_get_nothing() -> None:
    async def test(shoal: Shoal) -> None:
        assert await holders(shoal.roster, "id-of-nobody", [A]) == ()
        assert await holders(shoal.roster, "id-of-x", []) == ()
        many = [f"{number:064x}" for number in range(MOST_ASKED)]
        assert await holders(shoal.roster, "id-of-x", [A, *many]) == ()

    run(test, c=(A,))
