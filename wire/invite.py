"""The token by which a machine joins: whom it joins, and a secret that shows that it may.

    shoal1.<fingerprint of the coordinator>.<secret>

Both parts are base64url. The machine leaves a coordinator that has another fingerprint before it
tells it anything. It needs the token once. Then the coordinator knows its certificate.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from wire.claim import FINGERPRINT_BYTES, Fingerprint
from wire.errors import NeedsPerson

PREFIX = "shoal1"
LARGEST_FILE_BYTES = 4096
SECRET_BYTES = 32
ID_CHARACTERS = 8

MAKE_ONE = "make one where the coordinator runs: `shoal token create`"


class TokenError(Exception):
    """A token cannot be used. The message says why and what to do."""


class TokenWrong(TokenError, NeedsPerson):
    """... because it is none of this coordinator, or everybody can read it."""


class TokenMissing(TokenError):
    """... because its file is not there. A first boot may write it when the agent already runs."""


@dataclass(frozen=True, slots=True)
class Invite:
    """A token."""

    coordinator: Fingerprint
    secret: bytes = field(repr=False)

    @property
    def id(self) -> str:
        """Names the invite to people and in messages, and says nothing about the secret."""
        return hashlib.sha256(b"shoal invite id" + self.secret).hexdigest()[:ID_CHARACTERS]

    @property
    def text(self) -> str:
        return f"{PREFIX}.{_encoded(self.coordinator)}.{_encoded(self.secret)}"


def new_invite(coordinator: Fingerprint) -> Invite:
    return Invite(coordinator, secrets.token_bytes(SECRET_BYTES))


def parse_invite(text: str, where: str) -> Invite:
    """Return the token in a text, which came from ``where``. Raises TokenError."""
    parts = text.strip().split(".")
    if parts[0] != PREFIX or len(parts) != 3:
        raise TokenWrong(f"{where}: this is no token, or one of an older shoal; {MAKE_ONE}")
    coordinator, secret = _decoded(parts[1]), _decoded(parts[2])
    if len(coordinator) != FINGERPRINT_BYTES or len(secret) != SECRET_BYTES:
        raise TokenWrong(f"{where}: the token is cut or mistyped: copy all of it again")
    return Invite(coordinator, secret)


def read_invite(path: Path | None) -> Invite | None:
    """Read the token from a file, or from SHOAL_TOKEN, or return None. Raises TokenError."""
    if path is None:
        value = os.environ.get("SHOAL_TOKEN")
        return None if value is None else parse_invite(value, "SHOAL_TOKEN")
    where = f"token file {path}"
    try:
        with path.open("rb") as file:
            is_open_to_all = bool(os.fstat(file.fileno()).st_mode & 0o007)
            data = file.read(LARGEST_FILE_BYTES + 1)
    except FileNotFoundError as error:
        raise TokenMissing(f"{where}: no such file or directory") from error
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise TokenError(f"{where}: {reason}") from error
    if is_open_to_all:
        raise TokenWrong(f"{where}: every user of this machine can read it: run `chmod o= {path}`")
    return parse_invite(data.decode("ascii", "replace"), where)


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def _decoded(text: str) -> bytes:
    """Return the bytes, or none if the text has other characters."""
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), b"-_", validate=True)
    except (binascii.Error, ValueError):
        return b""
