"""Messages of broken or hostile peers, and impossible addresses."""

from __future__ import annotations

import asyncio
import socket
import struct
from pathlib import Path

import msgpack
import pytest

from model.checkpoint import Checkpoint
from model.spec import ModelSpec
from wire.async_connection import AsyncConnection, serve
from wire.codec import decode_header, encode
from wire.connection import Connection
from wire.discovery import Advertisement, DiscoveryUnavailable
from wire.errors import ConnectFailed, ProtocolError
from wire.limits import MAX_NESTING
from wire.messages import Endpoint, Heartbeat, MeasureModel, RequestFailed
from wire.transport import bind

FIXTURES = Path(__file__).parents[1] / "fixtures"


def measure(depth: int) -> bytes:
    """The header of a MeasureModel whose spec is ``depth`` maps, one in the other."""
    return b"\x95\x01" + b"\x81\xa1a" * (depth - 1) + b"\x80" + b"\x91\x04" + b"\xc2\xc2"


@pytest.mark.parametrize("depth", [MAX_NESTING + 1, 100, 900])
def test_deep_nesting_is_refused(depth: int) -> None:
    with pytest.raises(ProtocolError):
        decode_header(MeasureModel, measure(depth))


def test_nesting_up_to_the_limit_is_read() -> None:
    assert isinstance(decode_header(MeasureModel, measure(MAX_NESTING)), MeasureModel)
    spec = Checkpoint.open(FIXTURES / "llama").spec
    message = decode_header(MeasureModel, msgpack.packb([1, spec.to_dict(), [4], False, False]))
    assert isinstance(message, MeasureModel)
    assert ModelSpec.from_dict(message.spec) == spec


@pytest.mark.parametrize("message", [Heartbeat(1 << 64), RequestFailed(1, "/pi\udcff")])
def test_what_cannot_be_written_is_the_senders_mistake(
    message: Heartbeat | RequestFailed,
) -> None:
    with pytest.raises(ProtocolError, match="cannot be sent"):
        encode(message)


@pytest.mark.parametrize("host", ["192.168.1..10", "a" * 64, "no such host.invalid", "::g"])
def test_a_host_that_is_none_is_named(host: str) -> None:
    with pytest.raises(ConnectFailed, match="cannot connect"):
        Connection.connect(Endpoint(host, 1))
    with pytest.raises(ConnectFailed, match="cannot listen"):
        bind(host, 0)


def test_ipv6() -> None:
    try:
        listening = bind("::1", 0)
    except ConnectFailed:
        pytest.skip("this machine has no IPv6")
    with listening, Connection.connect(Endpoint("::1", listening.getsockname()[1])) as connection:
        assert connection.local_host == "::1"


def test_a_peer_that_is_gone_before_it_is_accepted() -> None:
    """A port scan: the connection is reset before anyone looks at it."""

    async def main() -> None:
        errors: list[object] = []
        handled: asyncio.Queue[str] = asyncio.Queue()
        asyncio.get_running_loop().set_exception_handler(lambda _, error: errors.append(error))

        async def handle(connection: AsyncConnection) -> None:
            handled.put_nowait(connection.peer_host)

        server, port = await serve("127.0.0.1", 0, handle)
        async with server:
            scan = socket.create_connection(("127.0.0.1", port))
            scan.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            scan.close()
            assert await asyncio.wait_for(handled.get(), 5) in ("", "127.0.0.1")
        assert not errors

    asyncio.run(main())


def test_an_address_that_cannot_be_announced_is_said_so() -> None:
    with pytest.raises(DiscoveryUnavailable, match="cannot announce"):
        Advertisement("shoal", "test", "::1", 1).__enter__()
    with Advertisement("shoal", "test", "localhost", 1):
        pass
