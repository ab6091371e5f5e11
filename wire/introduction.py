"""The handshake inside TLS, in which the caller says and proves who it is. No I/O.

TLS has shown the caller that the answerer has the expected certificate (wire.tls). Inside TLS:

    caller      AuthChallenge   version 2 of the handshake, the caller's nonce
    answerer    AuthAnswer      the answerer's nonce
    caller      Introduction    purpose, both device ids, certificate, signature, proof of an invite

The signature is made by the key of the caller's certificate. It covers the fingerprints of both
certificates, the purpose, both device ids and both nonces. A machine joins by an invite, whose
secret it knows: an HMAC-SHA256 of the same text. Later its certificate is known.

So nobody can use a signature elsewhere. It names the answerer, and the caller makes it only for the
answerer at the other end of its own TLS connection. Nobody else sees it. The nonce makes a recorded
one useless. docs/security.md has the whole argument.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from wire.claim import Claim, Fingerprint, fingerprint_of, prove_invite
from wire.errors import AuthFailed
from wire.handshake import CAME_PLAIN, NEEDED, Handshake
from wire.hygiene import clean_text
from wire.identity import Identity, has_signed
from wire.invite import Invite
from wire.messages import AuthAnswer, AuthChallenge, Introduction, JoinRefused
from wire.versions import shoal_version

HANDSHAKE_VERSION = 2
NONCE_BYTES = 32

Purpose = Literal["control", "blocks", "data"]
"""The purpose of a connection: an agent's requests, files of the coordinator, or other agents."""

COORDINATOR = "coordinator"
"""The device id of a coordinator."""

MISDIRECTED = "this machine is not the one that was called: check the address"
FORGED = "the signature is not that of the certificate"
OTHER_VERSION = "another version of the handshake: install the same shoal version on all machines"


@dataclass(frozen=True, slots=True)
class Caller:
    """The things that a machine needs to call one answerer."""

    identity: Identity
    answerer: Fingerprint
    """The only answerer that is told anything."""
    purpose: Purpose
    device: str
    """The caller's device id."""
    expected: str
    """The answerer's device id, or COORDINATOR."""
    invite: Invite | None = None
    """Proved to an answerer that does not know the caller's certificate yet."""


Admittance = Callable[[Claim], None]
"""Decides about a caller. Raises AuthFailed, whose refusal the caller is told."""


@dataclass(frozen=True, slots=True)
class Answerer:
    """The things that a machine needs to answer callers at one port."""

    identity: Identity
    device: str
    """The answerer's device id, or COORDINATOR."""
    purposes: frozenset[Purpose]
    """The purposes of connections to this port."""
    admit: Admittance


def call(caller: Caller) -> Handshake:
    """Run the caller's side. TLS must have checked the answerer's fingerprint before."""
    ours = secrets.token_bytes(NONCE_BYTES)
    yield AuthChallenge(HANDSHAKE_VERSION, ours, shoal_version())
    answer = yield None
    if isinstance(answer, JoinRefused):
        raise AuthFailed(clean_text(answer.reason))
    if not isinstance(answer, AuthAnswer) or len(answer.nonce) != NONCE_BYTES:
        raise AuthFailed("it does not answer the handshake")
    text = _text(
        caller.purpose,
        caller.device,
        caller.expected,
        caller.answerer,
        caller.identity.fingerprint,
        ours + answer.nonce,
    )
    invite = caller.invite
    yield Introduction(
        purpose=caller.purpose,
        device=caller.device,
        expected=caller.expected,
        certificate=caller.identity.certificate,
        signature=caller.identity.sign(text),
        invite="" if invite is None else invite.id,
        invite_proof=b"" if invite is None else prove_invite(invite.secret, text),
    )
    return None


def answer(answerer: Answerer) -> Handshake:
    """Run the answerer's side, and return the Claim of the caller, which was admitted."""
    challenge = yield None
    if not isinstance(challenge, AuthChallenge):
        raise AuthFailed(CAME_PLAIN, NEEDED)
    if challenge.version != HANDSHAKE_VERSION or len(challenge.nonce) != NONCE_BYTES:
        raise AuthFailed(OTHER_VERSION, OTHER_VERSION)
    ours = secrets.token_bytes(NONCE_BYTES)
    yield AuthAnswer(ours)
    message = yield None
    if isinstance(message, JoinRefused):
        raise AuthFailed(clean_text(message.reason))
    if not isinstance(message, Introduction):
        raise AuthFailed(CAME_PLAIN, NEEDED)
    if message.purpose not in answerer.purposes or message.expected != answerer.device:
        raise AuthFailed(MISDIRECTED, MISDIRECTED)
    text = _text(
        message.purpose,
        message.device,
        answerer.device,
        answerer.identity.fingerprint,
        fingerprint_of(message.certificate),
        challenge.nonce + ours,
    )
    if not has_signed(message.certificate, message.signature, text):
        raise AuthFailed(FORGED, FORGED)
    claim = Claim(
        fingerprint=fingerprint_of(message.certificate),
        purpose=message.purpose,
        device=message.device,
        invite_id=message.invite,
        text=text,
        invite_proof=message.invite_proof,
    )
    answerer.admit(claim)
    return claim


def _text(
    purpose: str,
    device: str,
    expected: str,
    answerer: Fingerprint,
    caller: Fingerprint,
    nonces: bytes,
) -> bytes:
    """Return what is signed. Each part has its length before it, so no two texts are equal."""
    parts = (
        b"shoal introduction 2",
        purpose.encode(),
        device.encode(),
        expected.encode(),
        answerer,
        caller,
        nonces,
    )
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)
