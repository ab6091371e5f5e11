"""Waiting with a limit that this process's own standstill does not use up."""

from __future__ import annotations

import asyncio
import gc
import socket
import time

import pytest

from wire.async_connection import AsyncConnection
from wire.codec import encode
from wire.errors import ConnectionLost
from wire.messages import Heartbeat
from wire.patience import within


def test_a_result_an_error_and_the_limit() -> None:
    async def fail() -> None:
        raise KeyError("x")

    async def main() -> None:
        assert await within(asyncio.sleep(0, "done"), 5) == "done"
        assert await within(asyncio.sleep(0, "done"), None) == "done"
        with pytest.raises(KeyError):
            await within(fail(), 5)
        forever = asyncio.get_running_loop().create_future()
        with pytest.raises(asyncio.TimeoutError):
            await within(forever, 0.01)
        assert forever.cancelled()

    asyncio.run(main())


def test_cancelling_the_wait_cancels_the_work() -> None:
    async def main() -> None:
        forever = asyncio.get_running_loop().create_future()
        waiting = asyncio.ensure_future(within(forever, 5))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert forever.cancelled()

    asyncio.run(main())


def test_an_error_that_comes_with_the_cancellation_is_reported_to_nobody() -> None:
    async def main() -> None:
        reported: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, found: reported.append(found))
        failing = asyncio.get_running_loop().create_future()
        waiting = asyncio.ensure_future(within(failing, 5))
        await asyncio.sleep(0)
        failing.set_exception(ConnectionResetError())
        waiting.cancel()
        with pytest.raises((asyncio.CancelledError, ConnectionResetError)):
            await waiting
        del failing, waiting
        gc.collect()
        assert reported == []

    asyncio.run(main())


def test_what_arrived_during_a_standstill_is_read_before_anyone_is_called_silent() -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            connection = AsyncConnection(*await asyncio.open_connection(*listener.getsockname()))
            theirs, _ = listener.accept()
        loop = asyncio.get_running_loop()
        # The whole limit passes while the loop cannot turn; meanwhile the peer beats.

        def stand_still() -> None:
            time.sleep(0.5)
            theirs.sendall(encode(Heartbeat()))

        loop.call_later(0.05, stand_still)
        message, _ = await connection.receive(0.2)
        assert isinstance(message, Heartbeat)
        with pytest.raises(ConnectionLost, match=r"silent for 0\.2 s"):
            await connection.receive(0.2)
        theirs.close()

    asyncio.run(main())
