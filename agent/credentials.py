"""An agent's proofs for the coordinator and for other agents, and whom it lets in.

Connections are encrypted. The agent shows its own certificate, and the coordinator tells it the
fingerprints of all others. With --insecure there is nothing to show, and everybody is let in.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

from agent.config import AgentConfig, ConfigError, SettingWrong
from agent.contacts import NOT_KNOWN, Contacts
from model.durable import replace_text
from wire.claim import FINGERPRINT_BYTES, Claim, Fingerprint
from wire.errors import AuthFailed, ConnectFailed
from wire.identity import Identity, own_identity
from wire.introduction import COORDINATOR, Answerer, Caller, Purpose
from wire.invite import Invite
from wire.messages import DevicesKnown

JOINED_FILE = "coordinator-fingerprint"
"""The file with the key of the coordinator that was joined."""

UNKNOWN_S = 2.0
"""How long a device may be unknown. The coordinator may just be telling us about it."""

NEEDS_INVITE = (
    "a token is needed to join: `shoal token create` makes one where the coordinator runs; give it "
    "by --token-file FILE or SHOAL_TOKEN"
)


def has_joined(state_dir: Path) -> bool:
    """Whether the agent with this state directory has joined a coordinator with a key."""
    return (state_dir / JOINED_FILE).exists()


class Credentials:
    """One agent's. Any thread may call."""

    def __init__(self, config: AgentConfig, device: str) -> None:
        """Raises ConfigError, IdentityError."""
        self._device = device
        self._path = config.state_dir / JOINED_FILE
        self._tls = None if config.insecure else self._chosen(config)
        self._known: dict[str, Fingerprint] = {}
        self._told = threading.Condition()
        self.contacts = Contacts(self._knows)
        """The open connections to other devices. None are noted with --insecure."""

    def _chosen(self, config: AgentConfig) -> _Tls:
        """Take the coordinator of the token, else the one that was joined before."""
        token = config.token
        try:
            if token is not None:
                return _Tls(own_identity(config.identity_path), token.coordinator, token)
            coordinator = bytes.fromhex(self._path.read_text(encoding="ascii"))
            if len(coordinator) != FINGERPRINT_BYTES:
                raise ValueError("not a fingerprint")
            return _Tls(own_identity(config.identity_path), coordinator, None)
        except FileNotFoundError as error:
            raise SettingWrong(NEEDS_INVITE) from error
        except OSError as error:
            raise ConfigError(f"{self._path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise SettingWrong(
                f"{self._path} is damaged: remove it, and start with a token again"
            ) from error

    @property
    def coordinator(self) -> Fingerprint | None:
        """The fingerprint of the only coordinator to join. None with --insecure."""
        return None if self._tls is None else self._tls.coordinator

    def to_coordinator(self, purpose: Purpose) -> Caller | None:
        """Return what a connection to the coordinator needs."""
        tls = self._tls
        if tls is None:
            return None
        return Caller(tls.identity, tls.coordinator, purpose, self._device, COORDINATOR, tls.invite)

    def to_device(self, device: str) -> Caller | None:
        """Return what a connection to another agent needs. Raises ConnectFailed."""
        tls = self._tls
        if tls is None:
            return None
        fingerprint = self._await(device)
        if fingerprint is None:
            raise ConnectFailed(f"the coordinator has not told the key of device {device}")
        return Caller(tls.identity, fingerprint, "data", self._device, device)

    def of_others(self) -> Answerer | None:
        """Return what other agents must show."""
        tls = self._tls
        if tls is None:
            return None
        return Answerer(tls.identity, self._device, frozenset(("data",)), self._admit)

    def joined(self) -> None:
        """Remember the coordinator, so that no token is needed from now on. Raises OSError."""
        tls = self._tls
        if tls is None or tls.invite is None:
            return
        replace_text(self._path, tls.coordinator.hex(), lasts=True)

    def learn(self, message: DevicesKnown) -> None:
        """Take the list of devices that may be connected from now on, and cut off all others."""
        with self._told:
            self._known = {item.device: item.fingerprint for item in message.devices}
            self._told.notify_all()
        self.contacts.cut()

    def _knows(self, device: str, fingerprint: Fingerprint) -> bool:
        return self._known.get(device) == fingerprint

    def _admit(self, claim: Claim) -> None:
        self._await(claim.device)
        if not self._knows(claim.device, claim.fingerprint):
            raise AuthFailed(NOT_KNOWN, NOT_KNOWN)

    def _await(self, device: str) -> Fingerprint | None:
        """Return a device's fingerprint, for which this waits a little."""
        with self._told:
            self._told.wait_for(lambda: device in self._known, UNKNOWN_S)
            return self._known.get(device)


@dataclass(frozen=True, slots=True)
class _Tls:
    identity: Identity
    coordinator: Fingerprint
    invite: Invite | None
