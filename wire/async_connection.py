"""Connections that a coordinator awaits: the counterpart of wire.connection, with the same errors.

It is a module of its own, because an agent's start need not import asyncio.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor
from typing import TypeVar

from wire import admission, limits
from wire.admission import Admit
from wire.claim import Claim
from wire.codec import encode
from wire.connection import MAX_TOLD, REFUSAL_READS, REFUSAL_S, answering
from wire.errors import AuthFailed, ConnectionLost, VersionMismatch, WireError
from wire.framing import BUFFER_BYTES, Framer
from wire.handshake import Handshake
from wire.introduction import Answerer
from wire.lobby import Lobby
from wire.messages import Message
from wire.patience import within
from wire.rare_log import RareLog
from wire.tls import RAW_BYTES, TlsChannel, server_context
from wire.transport import BACKLOG, Buffer, bind, peer_name, reason, tune

log = logging.getLogger(__name__)

Result = TypeVar("Result")

ACCEPT_AT_ONCE = 64
"""The number of connections that asyncio accepts before other tasks run."""


class AsyncConnection:
    """The awaiting counterpart of Connection, with the same errors."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        lobby: Lobby | None = None,
        handshake: Handshake | None = None,
        channel: TlsChannel | None = None,
    ) -> None:
        """Take the same arguments as ``Connection``. ``channel`` encrypts."""
        sock: socket.socket = writer.get_extra_info("socket")
        self.peer = peer_name(sock)
        # A peer that left before it was accepted has no address.
        self.peer_host: str = (writer.get_extra_info("peername") or ("",))[0]
        self.local_host: str = (writer.get_extra_info("sockname") or ("",))[0]
        """Our own address as this peer sees it."""
        self._reader = reader
        self._writer = writer
        self._channel = channel
        self._framer = Framer(self.peer, handshake)
        self._lobby = lobby
        self._opened_s = time.monotonic()
        self._send_lock = asyncio.Lock()
        tune(sock)

    @property
    def admit(self) -> Admit | None:
        """The check on the next frame. None admits every frame."""
        return self._framer.admit

    @admit.setter
    def admit(self, admit: Admit | None) -> None:
        self._framer.admit = admit

    @property
    def claim(self) -> Claim | None:
        """Do the same as ``Connection.claim``."""
        return self._framer.claim

    async def send(self, message: Message, payload: Buffer = b"") -> None:
        """Send one frame."""
        head = encode(message, len(payload))
        try:
            async with self._send_lock:
                self._write(head)
                if len(payload):
                    self._write(payload)
                await within(self._writer.drain(), limits.SEND_TIMEOUT_S)
        except (OSError, asyncio.TimeoutError) as error:
            self.close()
            raise ConnectionLost(f"{self.peer}: {_why(error)}") from error

    async def receive(self, timeout_s: float | None = None) -> tuple[Message, memoryview]:
        """Return the next message and its payload. Raises ConnectionLost after ``timeout_s``."""
        await self.prove()
        return await self._until(self._framer.next_frame, timeout_s)

    async def receive_hello(self, largest_bytes: Mapping[type[Message], int]) -> Message:
        """Do the same as ``Connection.receive_hello``."""
        await self.prove()
        left_s = max(self._opened_s + limits.HELLO_TIMEOUT_S - time.monotonic(), 0.0)
        admit, self.admit = self.admit, admission.hello(largest_bytes)
        message, _ = await self._until(self._framer.next_frame, left_s)
        self.admit = admit
        if self._lobby is not None and not self._lobby.leave(self):
            raise ConnectionLost(f"{self.peer} was closed to make room for others")
        return message

    async def prove(self, executor: Executor | None = None) -> None:
        """Complete the handshake within HANDSHAKE_TIMEOUT_S. Raises AuthFailed, WireError.

        executor: has the threads that prove. None: the event loop does, and waits for files.
        """
        if self._framer.is_proving:
            await self._until(self._framer.prove, limits.HANDSHAKE_TIMEOUT_S, executor)

    def close(self) -> None:
        """Close at once. Idempotent."""
        if self._lobby is not None:
            self._lobby.leave(self)
        self._writer.close()

    async def _until(
        self,
        step: Callable[[], Result | None],
        timeout_s: float | None,
        executor: Executor | None = None,
    ) -> Result:
        """Receive bytes until ``step`` returns something. Closes the connection at any error."""
        try:
            return await within(self._take_in(step, executor), timeout_s)
        except (OSError, asyncio.TimeoutError) as error:
            how = f": {_why(error)}"
            if timeout_s is not None and isinstance(error, asyncio.TimeoutError):
                how = f" was silent for {timeout_s:g} s"
            lost = self._framer.lost(how)
            await self._part()
            raise lost from error
        except BaseException:  # Refused or cancelled: half a message cannot be continued.
            await self._part()
            raise

    async def _take_in(
        self, step: Callable[[], Result | None], executor: Executor | None
    ) -> Result:
        framer = self._framer
        deadline_s: float | None = None
        loop = asyncio.get_running_loop()
        while (
            result := step() if executor is None else await loop.run_in_executor(executor, step)
        ) is None:
            if framer.outgoing:
                await self._flush()
            if framer.is_refusing:
                deadline_s = deadline_s or time.monotonic() + REFUSAL_S
                left_s = max(deadline_s - time.monotonic(), 0.0)
                await asyncio.wait_for(self._read(), left_s)
            else:
                await self._read()
        if framer.outgoing:
            await self._flush()
        return result

    async def _read(self) -> None:
        space, _ = self._framer.space()
        channel = self._channel
        if channel is None:
            data = await self._reader.read(len(space))
            space[: len(data)] = data
            self._framer.received(len(data))
            return
        count = channel.read_into(space)
        if count is None:
            data = await self._reader.read(RAW_BYTES)
            count = await self._decrypt(channel, data, space) if data else 0
        if count is not None:
            self._framer.received(count)

    async def _decrypt(self, channel: TlsChannel, data: bytes, space: memoryview) -> int | None:
        """Decrypt what was received, and answer the handshake while it lasts."""
        is_open = channel.is_open
        try:
            channel.feed(data)
            return channel.read_into(space)
        finally:
            if not is_open and (unsent := channel.take()):
                self._writer.write(unsent)
                await within(self._writer.drain(), limits.SEND_TIMEOUT_S)

    def _write(self, data: Buffer) -> None:
        self._writer.write(data if self._channel is None else self._channel.seal(data))

    async def _flush(self) -> None:
        async with self._send_lock:
            self._write(self._framer.take_outgoing())
            await within(self._writer.drain(), limits.SEND_TIMEOUT_S)

    async def _part(self) -> None:
        """Do the same as ``Connection._part``."""
        if self._framer.outgoing:
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                await self._flush()
                if self._writer.can_write_eof():
                    self._writer.write_eof()
                for _ in range(REFUSAL_READS):
                    if not await asyncio.wait_for(self._reader.read(BUFFER_BYTES), REFUSAL_S):
                        break
        self.close()


async def serve(
    host: str,
    port: int,
    handle: Callable[[AsyncConnection], Awaitable[None]],
    *,
    answerer: Answerer | None = None,
    executor: Executor | None = None,
) -> tuple[asyncio.Server, int]:
    """Accept AsyncConnections on an address, and return the server and its port.

    With an Answerer, connections are encrypted, and only callers that it admits get to ``handle``.
    The others are logged. A peer of another version is logged once, not at each attempt.
    ``executor`` has the threads that admit callers. Raises
    ConnectFailed if the address is taken.
    """
    listening = bind(host, port)
    bound_port = int(listening.getsockname()[1])
    context = None if answerer is None else server_context(answerer.identity)
    make_handshake = answering(answerer)
    lobby = Lobby(f"port {bound_port}")
    rare_log = RareLog(log)
    told: set[str] = set()

    async def on_connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        channel = None
        if context is not None:
            channel = TlsChannel(
                context, peer_name(writer.get_extra_info("socket")), is_server=True
            )
        connection = AsyncConnection(reader, writer, lobby, make_handshake(), channel)
        lobby.enter(connection, connection.peer_host, connection.close)
        try:
            await connection.prove(executor)
            await handle(connection)
        except VersionMismatch as error:
            if str(error) not in told and len(told) < MAX_TOLD:
                told.add(str(error))
                log.warning("connection refused: %s", error)
        except AuthFailed as error:
            rare_log.warning(error.refusal or "refused", "connection refused: %s", error)
        except WireError as error:
            log.info("connection dropped: %s", error)
        except asyncio.CancelledError:
            pass  # The event loop is ending, and asyncio would report this as an error of the task.
        finally:
            connection.close()

    server = await asyncio.start_server(on_connect, sock=listening, backlog=ACCEPT_AT_ONCE)
    listening.listen(BACKLOG)
    return server, bound_port


def _why(error: BaseException) -> str:
    """Do the same as ``reason``. Before Python 3.11, asyncio's TimeoutError is one of its own."""
    return reason(TimeoutError() if isinstance(error, asyncio.TimeoutError) else error)
