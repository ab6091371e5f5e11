"""Carries connections from outside a testbed to a port of this process's host.

Run it as ``python -m testbed.forward DESCRIPTOR PORT``. DESCRIPTOR is an inherited listening socket
that was made outside. A socket stays in the network in which it was made.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys

_PIECE_BYTES = 1 << 16


async def forward(listener: socket.socket, port: int) -> None:
    """Serve until cancelled."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            writer.close()
            return
        # Either end closes both ways, so a user who leaves cancels the request.
        ways = {
            asyncio.ensure_future(_copy(reader, inner_writer)),
            asyncio.ensure_future(_copy(inner_reader, writer)),
        }
        _, pending = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in pending:
            way.cancel()
        for end in (writer, inner_writer):
            end.close()

    server = await asyncio.start_server(serve, sock=listener)
    await server.serve_forever()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while piece := await reader.read(_PIECE_BYTES):
            writer.write(piece)
            await writer.drain()


if __name__ == "__main__":
    asyncio.run(forward(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])))
