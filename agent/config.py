"""The settings of an agent, checked once and passed down."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from model.durable import open_lock, replace_text
from wire.addresses import is_everywhere
from wire.errors import NeedsPerson
from wire.invite import Invite
from wire.messages import Endpoint

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class ConfigError(Exception):
    """The agent cannot start. The message says why and what to do. Another start may work."""


class SettingWrong(ConfigError, NeedsPerson):
    """A setting or a kept file is wrong. The message names it, and what is valid."""


def default_name(host_name: str) -> str:
    """Make a device name from the first part of a host name, replacing invalid characters."""
    plain = unicodedata.normalize("NFKD", host_name.strip().split(".")[0])
    plain = plain.encode("ascii", "ignore").decode()
    mended = re.sub(r"[^A-Za-z0-9_-]+", "-", plain)
    return mended.strip("-_")[:63].rstrip("-_") or "device"


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """The settings of one agent. None for a limit means: measure what is free, and use that."""

    name: str
    state_dir: Path
    cluster: str
    coordinator: Endpoint | None
    """The coordinator's address. None searches by mDNS."""
    bind_host: str
    data_port: int
    memory_bytes: int | None
    storage_bytes: int | None
    threads: int
    backend: str
    watts: float | None = None
    """The power that the device draws while it computes, as its user says. None if unknown."""
    token: Invite | None = field(default=None, repr=False)
    """The token by which a new device joins. None: the coordinator knows the device already."""
    insecure: bool = False
    """Do not encrypt. Then this device joins only a coordinator that does not either."""
    exact: bool = False
    """Do not round activations. Slower, for comparing results."""
    fast_prompts: bool = False
    """Read prompts faster through a coarser copy of the layers, if memory has room for it."""
    advertise: tuple[Endpoint, ...] = ()
    """Addresses at which other agents reach this one, besides its own. Port 0 is the data port."""
    measurements_dir: Path | None = None
    """Where measurements are kept. Agents of one machine may share it. None: ``state_dir``."""

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise SettingWrong(
                f"name {self.name!r}: use 1 to 63 letters, digits, dots, dashes or underscores"
            )
        if not 1 <= self.threads <= 1024:
            raise SettingWrong(f"threads {self.threads}: must be between 1 and 1024")
        for endpoint in self.advertise:
            if not endpoint.host or is_everywhere(endpoint.host):
                raise SettingWrong(
                    f"advertise {endpoint.host!r}: must be an address that other agents reach"
                )
        for label, limit in (("memory", self.memory_bytes), ("storage", self.storage_bytes)):
            if limit is not None and limit <= 0:
                raise SettingWrong(f"{label} {limit}: must be above 0")

    @property
    def cache_dir(self) -> Path:
        """Blocks, what is prepared of them, and under names with a dot what is not finished yet."""
        return self.state_dir / "blocks"

    @property
    def identity_path(self) -> Path:
        """The file of this device's key and certificate."""
        return self.state_dir / "identity.pem"

    @property
    def calibration_path(self) -> Path:
        """The file of this device's measurements."""
        return (self.measurements_dir or self.state_dir) / "calibration.json"

    @property
    def trials_path(self) -> Path:
        """Which blocks have run in a child process without harm."""
        return (self.measurements_dir or self.state_dir) / "trials.json"


def claim(state_dir: Path) -> TextIO:
    """Lock ``state_dir`` for this process until the result is closed. Raises ConfigError."""
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.fdopen(open_lock(state_dir / "lock"), "w", encoding="ascii")
    except OSError as error:
        raise _unusable(state_dir, error) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise ConfigError(
            f"another agent runs with the state directory {state_dir}: "
            "stop it, or give this one its own with --state-dir"
        ) from error
    return lock


def _unusable(state_dir: Path, error: OSError) -> ConfigError:
    named = error.filename2 or error.filename  # Of a rename, the file that is replaced.
    within = f"{named}: " if named not in (None, str(state_dir)) else ""
    reason = (error.strerror or str(error)).lower()
    return ConfigError(f"state directory {state_dir} is not usable: {within}{reason}")


def device_identity(state_dir: Path) -> str:
    """Return this device's id, which is made once and kept in ``state_dir``. Raises ConfigError.

    The coordinator knows a device's key, name and pins by its id. So a damaged id is not replaced:
    to all others this would be a new device, which nobody has let in.
    """
    path = state_dir / "device-id"
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            replace_text(path, secrets.token_hex(8) + "\n", lasts=True)
        identity = path.read_text(encoding="ascii", errors="replace").strip()
    except OSError as error:
        raise _unusable(state_dir, error) from error
    if not re.fullmatch(r"[0-9a-f]{16}", identity):
        raise SettingWrong(
            f"{path} is damaged: write this device's id into it, which `shoal devices --json` "
            "shows as `device`, or remove the file and let the device join anew with a token"
        )
    return identity
