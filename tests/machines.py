"""Identities of machines in tests, and what they need to call each other."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

from wire.claim import Claim
from wire.identity import Identity, own_identity
from wire.introduction import COORDINATOR, Answerer, Caller, Purpose
from wire.messages import DevicesKnown, KnownDevice


@lru_cache
def _directory() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="shoal-identities-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


@lru_cache
def identity_of(machine: str) -> Identity:
    """The identity of the machine of this name, the same for all tests of this process."""
    return own_identity(_directory() / f"{machine}.pem")


def known(*devices: str) -> DevicesKnown:
    """What a coordinator tells agents if these devices have joined."""
    return DevicesKnown(
        tuple(KnownDevice(device, identity_of(device).fingerprint) for device in devices)
    )


def answering(device: str = COORDINATOR) -> Answerer:
    """Let everybody in who introduces itself to this machine."""

    def admit(claim: Claim) -> None:
        assert claim.device

    purposes: tuple[Purpose, ...] = ("control", "blocks") if device == COORDINATOR else ("data",)
    return Answerer(identity_of(device), device, frozenset(purposes), admit)


def calling(expected: str = COORDINATOR, device: str = "caller") -> Caller:
    """Call one of ``answering``."""
    purpose: Purpose = "control" if expected == COORDINATOR else "data"
    fingerprint = identity_of(expected).fingerprint
    return Caller(identity_of(device), fingerprint, purpose, device, expected)
