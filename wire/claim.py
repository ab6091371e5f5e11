"""A caller's proofs in the handshake, and fingerprints, by which machines know each other."""

from __future__ import annotations

import base64
import hashlib
import hmac
from dataclasses import dataclass

Fingerprint = bytes
"""The SHA-256 of a certificate: FINGERPRINT_BYTES bytes."""

FINGERPRINT_BYTES = 32

_SHOWN_GROUP = 4
_SHOWN_GROUPS = 4


@dataclass(frozen=True, slots=True)
class Claim:
    """A caller who has proved to own a certificate. The answerer decides whether it may come in."""

    fingerprint: Fingerprint
    purpose: str
    device: str
    """The caller's own word."""
    invite_id: str
    """The invite that the caller says it has. Empty if none."""
    text: bytes
    """The text that the caller has signed."""
    invite_proof: bytes

    def knows(self, secret: bytes) -> bool:
        """Whether the caller knows this secret of an invite."""
        return hmac.compare_digest(prove_invite(secret, self.text), self.invite_proof)


def prove_invite(secret: bytes, text: bytes) -> bytes:
    """Return the proof that the signer of ``text`` knows the secret of an invite."""
    return hmac.digest(secret, b"shoal invite 2" + text, "sha256")


def fingerprint_of(certificate: bytes) -> Fingerprint:
    """Return the fingerprint of a certificate in DER."""
    return hashlib.sha256(certificate).digest()


def shown(fingerprint: Fingerprint) -> str:
    """Return the beginning of a fingerprint in groups that people can compare: 80 bits of it."""
    text = base64.b32encode(fingerprint).decode("ascii")
    step = _SHOWN_GROUP
    return "-".join(text[begin : begin + step] for begin in range(0, step * _SHOWN_GROUPS, step))
