"""A connection of this machine to itself, to measure what agents pay for theirs."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress

from wire.connection import Connection
from wire.errors import WireError
from wire.identity import Identity
from wire.messages import Heartbeat
from wire.tls import TlsTransport, own_client_context, server_context
from wire.transport import TcpTransport


@contextmanager
def loopback_pair(identity: Identity | None) -> Iterator[tuple[Connection, Connection]]:
    """Yield both ends of a TCP connection, which is encrypted if there is an identity.

    Raises OSError, WireError.
    """
    near, far = _connected()
    if identity is None:
        one, other = Connection(TcpTransport(near)), Connection(TcpTransport(far))
        with closing(one), closing(other):
            yield one, other
        return
    with closing(Connection(TlsTransport(far, server_context(identity)))) as answerer:

        def shake() -> None:
            """An answerer shakes hands while it receives, until the first message has come."""
            with suppress(WireError):  # The caller learns of it, too.
                answerer.receive()

        thread = threading.Thread(target=shake, daemon=True)
        thread.start()
        transport = TlsTransport(near, own_client_context(), identity.fingerprint)
        with closing(Connection(transport)) as caller:
            caller.send(Heartbeat())
            thread.join()
            yield caller, answerer


def _connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    return near, far
