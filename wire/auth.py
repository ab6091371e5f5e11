"""The shared token, and the handshake in which both ends prove that they know it. No I/O.

The caller opens the connection, and the answerer accepts it:

    caller      AuthChallenge   version of the handshake, the caller's nonce
    answerer    AuthAnswer      the answerer's nonce, proof of the answerer
    caller      AuthProof       proof of the caller

A proof is HMAC-SHA256 under the token. It covers a label, the role of the prover and both nonces.
Fresh nonces make a recorded proof useless. The role makes a proof useless in the other direction.
An end that refuses the other one sends JoinRefused and closes.

Tokens are random and long, so a proof does not help anybody to guess them. Later messages are
neither encrypted nor signed. So a token keeps strangers out, but not somebody who taps the network.
"""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Generator
from pathlib import Path
from typing import Literal

from wire import limits
from wire.claim import Claim
from wire.codec import Prefix
from wire.errors import AuthFailed, ProtocolError
from wire.hygiene import clean_text
from wire.messages import (
    AuthAnswer,
    AuthChallenge,
    AuthProof,
    Introduction,
    JoinRefused,
    Message,
)
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
Handshake = Generator[Message | None, Message | None, Claim | None]
"""Yields a message to send, or None to receive one. Returns once the peer has proved itself.

An answerer inside TLS returns what its caller has proved.

Raises AuthFailed, whose refusal the driver must send.
"""


class TokenError(Exception):
    """A token cannot be used. The message says why and what to do."""


def call(token: Token) -> Handshake:
    """Run the caller's side."""
    ours = secrets.token_bytes(NONCE_BYTES)
    yield AuthChallenge(HANDSHAKE_VERSION, ours, shoal_version())
    answer = yield None
    if isinstance(answer, JoinRefused):
        raise AuthFailed(clean_text(answer.reason))
    if not isinstance(answer, AuthAnswer) or len(answer.nonce) != NONCE_BYTES:
        raise AuthFailed("it does not answer the handshake")
    nonces = ours + answer.nonce
    if not hmac.compare_digest(answer.proof, _proof(token, "answerer", nonces)):
        raise AuthFailed(DIFFERENT, DIFFERENT)
    yield AuthProof(_proof(token, "caller", nonces))
    return None


def answer(token: Token) -> Handshake:
    """Run the answerer's side."""
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
        raise AuthFailed(clean_text(message.reason))
    expected = _proof(token, "caller", nonces)
    if not isinstance(message, AuthProof) or not hmac.compare_digest(message.proof, expected):
        raise AuthFailed(DIFFERENT, DIFFERENT)
    return None


def admit(prefix: Prefix) -> None:
    """Refuse a message that is not part of a handshake. Raises AuthFailed, ProtocolError."""
    if prefix.kind not in (AuthChallenge, AuthAnswer, AuthProof, Introduction, JoinRefused):
        raise AuthFailed(CAME_WITHOUT, NEEDED)
    if prefix.header_bytes > limits.MAX_HANDSHAKE_BYTES:
        raise ProtocolError(f"its handshake has {prefix.header_bytes} bytes, over the limit")


def _proof(token: Token, role: Literal["caller", "answerer"], nonces: bytes) -> bytes:
    return hmac.digest(token, b"shoal handshake 1 " + role.encode() + b"\0" + nonces, "sha256")


def read_token(path: Path | None) -> Token | None:
    """Read the token from a file, or from SHOAL_TOKEN, or return None. Raises TokenError."""
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
    """Write a new token to ``path``, readable by its owner only. An existing token stays.

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


def _checked(data: bytes, where: str) -> Token:
    token = data.strip()
    if len(token) < LEAST_TOKEN_CHARACTERS or len(data) > LARGEST_TOKEN_FILE_BYTES:
        raise TokenError(
            f"{where}: a token has {LEAST_TOKEN_CHARACTERS} to {LARGEST_TOKEN_FILE_BYTES} random "
            "characters; `shoal coordinator --create-token --token-file FILE` makes one"
        )
    return token
