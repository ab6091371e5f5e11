"""TLS of the HTTP port: its certificate, and connections whose handshake has not ended yet.

asyncio's own TLS server shows a connection only after its handshake. So silent ones would neither
have a time limit of ours nor a seat in the lobby, and could take all descriptors.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from pathlib import Path
from typing import Any

from api import guard
from coordinator.config import ConfigError, SettingWrong
from wire.identity import own_identity
from wire.lobby import Lobby
from wire.rare_log import RareLog

log = logging.getLogger(__name__)

PROTOCOLS = ("http/1.1",)

MOST_EARLY_BYTES = 1 << 18
"""A client may send its request together with the end of the handshake."""


class HttpTls:
    """A certificate and its key. Files that were renewed are used from the next connection on."""

    def __init__(self, certificate: Path, key: Path | None = None) -> None:
        """``key`` is None if the certificate's file has it, too. Raises ConfigError."""
        self._certificate = certificate
        self._key = key
        self._rare_log = RareLog(log)
        try:
            self._stamp = self._stamp_now()
            self._context = self._loaded()
        except OSError as error:
            kind = SettingWrong if isinstance(error, ssl.SSLError) else ConfigError
            raise kind(f"HTTP cannot use TLS: {self._reason(error)}") from error

    def context(self) -> ssl.SSLContext:
        """Return the context for a new connection."""
        try:
            stamp = self._stamp_now()
            if stamp != self._stamp:
                self._context, self._stamp = self._loaded(), stamp
        except OSError as error:
            self._rare_log.warning("tls", "the old certificate stays: %s", self._reason(error))
        return self._context

    def _loaded(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(PROTOCOLS)
        # A key with a passphrase would ask for it at the terminal of a service.
        context.load_cert_chain(self._certificate, self._key, password=lambda: "")
        return context

    def _stamp_now(self) -> tuple[int, ...]:
        paths = (self._certificate, self._key or self._certificate)
        return tuple(path.stat().st_mtime_ns for path in paths)

    def _reason(self, error: OSError) -> str:
        files = f"{self._certificate}" if self._key is None else f"{self._certificate}, {self._key}"
        if isinstance(error, ssl.SSLError):
            return (
                f"{files}: expected a certificate and its key, without a passphrase, in PEM "
                f"({getattr(error, 'reason', None) or 'unreadable'})"
            )
        return f"{error.filename or files}: {(error.strerror or str(error)).lower()}"


def http_tls(certificate: Path | None, key: Path | None, identity: Path) -> HttpTls:
    """The user's certificate, or the coordinator's own. Raises ConfigError, IdentityError."""
    if certificate is not None:
        return HttpTls(certificate, key)
    return HttpTls(own_identity(identity).path)


class EncryptedProtocol(guard.GuardedProtocol):
    """GuardedProtocol inside TLS. The handshake has guard.HEAD_S, and a seat in the lobby."""

    tls: HttpTls
    """Set by ``encrypted_protocol``."""

    _is_open = False
    _is_lost = False
    _early = b""
    _opening: asyncio.Task[None] | None = None

    def connection_made(self, transport: Any) -> None:
        host = transport.get_extra_info("peername") or ("",)
        self.lobby.enter(self, host[0], transport.abort)
        # The task runs before the loop looks for data, and start_tls pauses reading. To pause here
        # would not hold in Python 3.10.
        self._opening = self.loop.create_task(self._open(transport))

    async def _open(self, transport: Any) -> None:
        try:
            encrypted = await self.loop.start_tls(
                transport,
                self,
                self.tls.context(),
                server_side=True,
                ssl_handshake_timeout=guard.HEAD_S,
            )
        except (OSError, asyncio.TimeoutError) as error:
            log.debug("no TLS: %s", error)
            transport.abort()
            encrypted = None
        finally:
            self.lobby.leave(self)
        # asyncio returns None for a connection that ended during the handshake.
        if encrypted is None:
            return
        if self._is_lost or encrypted.is_closing():
            encrypted.abort()
            return
        self._is_open = True
        super().connection_made(encrypted)
        if self._early:
            super().data_received(self._early)
            self._early = b""

    def data_received(self, data: bytes) -> None:
        if self._is_open:
            super().data_received(data)
        elif len(self._early) + len(data) <= MOST_EARLY_BYTES:
            self._early += data
        else:
            self._early, self._is_lost = b"", True

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_lost = True
        if self._is_open:
            super().connection_lost(exc)


def encrypted_protocol(lobby: Lobby, tls: HttpTls) -> type[EncryptedProtocol]:
    """Make the protocol class of one server."""
    return type("EncryptedProtocol", (EncryptedProtocol,), {"lobby": lobby, "tls": tls})
