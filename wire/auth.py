"""The shared token, and how both ends of a connection prove that they know it. No I/O.

The one that connects is the caller, the other the answerer:

    caller      AuthChallenge   version of the handshake, the caller's nonce
    answerer    AuthAnswer      the answerer's nonce, proof of the answerer
    caller      AuthProof       proof of the caller

A proof is HMAC-SHA256 under the token over a label, the role of the prover and both nonces: fresh
ones make a recording worthless, the role makes what one end sent worthless in its own direction.
Whoever finds something wrong says so in a JoinRefused and leaves.

Tokens are random and long, so that a proof tells nobody anything. What follows on the connection is
neither encrypted nor signed: this keeps strangers out, not somebody who sits on the cable.
"""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Generator
from pathlib import Path
from typing import Literal

from wire import limits
from wire.codec import Prefix
from wire.errors import AuthFailed, ProtocolError
from wire.messages import AuthAnswer, AuthChallenge, AuthProof, JoinRefused, Message
from wire.versions import shoal_version

HANDSHAKE_VERSION = 1
NONCE_BYTES = 32
LEAST_TOKEN_CHARACTERS = 32
LARGEST_TOKEN_FILE_BYTES = 4096

NEEDED = "a token is needed: start with --token-file FILE, the same file on all machines"
CAME_WITHOUT = "it came without a token: start it with the --token-file that this side has"
CAME_WITH = "it came with a token, and this side has none: start both with the same --token-file"
UNWANTED = "no token is known there: start both sides with the same --token-file, or without"
DIFFERENT = "the tokens differ: use the same token file on all machines"
OTHER_VERSION = "another version of the handshake: install the same shoal version on all machines"

Token = bytes
Handshake = Generator[Message | None, Message | None, None]
"""Yields a message to send, or None to be sent the next one that arrives; returns once the other
end has proved itself. Raises AuthFailed; its refusal is for the driver to send."""


class TokenError(Exception):
    """A token cannot be used; the message says why and what to do."""


def call(token: Token) -> Handshake:
    """The caller's side."""
    ours = secrets.token_bytes(NONCE_BYTES)
    yield AuthChallenge(HANDSHAKE_VERSION, ours, shoal_version())
    answer = yield None
    if isinstance(answer, JoinRefused):
        raise AuthFailed(_printable(answer.reason))
    if not isinstance(answer, AuthAnswer) or len(answer.nonce) != NONCE_BYTES:
        raise AuthFailed("it does not answer the handshake")
    nonces = ours + answer.nonce
    if not hmac.compare_digest(answer.proof, _proof(token, "answerer", nonces)):
        raise AuthFailed(DIFFERENT, DIFFERENT)
    yield AuthProof(_proof(token, "caller", nonces))


def answer(token: Token) -> Handshake:
    """The answerer's side."""
    challenge = yield None
    if not isinstance(challenge, AuthChallenge):
        raise AuthFailed(CAME_WITHOUT, NEEDED)
    if challenge.version != HANDSHAKE_VERSION or len(challenge.nonce) != NONCE_BYTES:
        raise AuthFailed(OTHER_VERSION, OTHER_VERSION)
    ours = secrets.token_bytes(NONCE_BYTES)
    nonces = challenge.nonce + ours
    yield AuthAnswer(ours, _proof(token, "answerer", nonces))
    message = yield None
    if isinstance(message, JoinRefused):
        raise AuthFailed(_printable(message.reason))
    expected = _proof(token, "caller", nonces)
    if not isinstance(message, AuthProof) or not hmac.compare_digest(message.proof, expected):
        raise AuthFailed(DIFFERENT, DIFFERENT)


def admit(prefix: Prefix) -> None:
    """Refuse what is no part of a handshake before it is read. Raises AuthFailed, ProtocolError."""
    if prefix.kind not in (AuthChallenge, AuthAnswer, AuthProof, JoinRefused):
        raise AuthFailed(CAME_WITHOUT, NEEDED)
    if prefix.header_bytes > limits.MAX_HANDSHAKE_BYTES:
        raise ProtocolError(f"a handshake of {prefix.header_bytes} bytes")


def _proof(token: Token, role: Literal["caller", "answerer"], nonces: bytes) -> bytes:
    return hmac.digest(token, b"shoal handshake 1 " + role.encode() + b"\0" + nonces, "sha256")


def read_token(path: Path | None) -> Token | None:
    """The token in a file, else in SHOAL_TOKEN, else None. Raises TokenError."""
    if path is not None:
        try:
            with path.open("rb") as file:
                data = file.read(LARGEST_TOKEN_FILE_BYTES + 1)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise TokenError(f"token file {path}: {reason}") from error
        return _checked(data, f"token file {path}")
    value = os.environ.get("SHOAL_TOKEN")
    return None if value is None else _checked(value.encode(errors="replace"), "SHOAL_TOKEN")


def create_token(path: Path) -> None:
    """Write a new token to ``path``, for the owner's eyes; one that is there stays.

    Raises TokenError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            return
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise TokenError(f"token file {path} cannot be made: {reason}") from error
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_urlsafe(32) + "\n")


def _printable(reason: str) -> str:
    """What somebody unknown says, safe for a terminal."""
    return "".join(character for character in reason if character.isprintable())


def _checked(data: bytes, where: str) -> Token:
    token = data.strip()
    if len(token) < LEAST_TOKEN_CHARACTERS or len(data) > LARGEST_TOKEN_FILE_BYTES:
        raise TokenError(
            f"{where}: a token has {LEAST_TOKEN_CHARACTERS} to {LARGEST_TOKEN_FILE_BYTES} random "
            "characters; `shoal coordinator --create-token --token-file FILE` makes one"
        )
    return token
