"""What a user sets on the coordinator, checked once and passed down."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from wire.auth import Token

DEFAULT_RECOVERY_WAIT_S = 30.0
"""An agent that its service manager starts again is back by then."""

CLUSTER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,40}")


class ConfigError(Exception):
    """A setting is wrong; the message names it, its value and what would be right."""


@dataclass(frozen=True, slots=True)
class CoordinatorConfig:
    """Settings of the coordinator. Agents come in on the control address, users over HTTP."""

    cluster: str
    state_dir: Path
    control_host: str
    control_port: int
    http_host: str
    http_port: int
    advertise: bool
    """Announce the control address by mDNS."""
    http_hosts: tuple[str, ...] = ()
    """Host names that HTTP serves beside this machine's own; "*": all."""
    storage_bytes: int | None = None
    """For quantized blocks; None: most of the free disk."""
    recovery_wait_s: float = DEFAULT_RECOVERY_WAIT_S
    """How long answers wait for a lost device where the others cannot take its place."""
    token: Token | None = field(default=None, repr=False)
    """What agents must know to join; None lets everybody in."""

    def __post_init__(self) -> None:
        if not CLUSTER.fullmatch(self.cluster):
            raise ConfigError(
                f"cluster {self.cluster!r}: use 1 to 41 letters, digits, dashes or underscores"
            )
        if self.storage_bytes is not None and self.storage_bytes <= 0:
            raise ConfigError(f"storage {self.storage_bytes}: must be more than nothing")


def default_state_dir() -> Path:
    """Where the coordinator keeps quantized blocks: STATE_DIRECTORY under systemd, else XDG."""
    service = os.environ.get("STATE_DIRECTORY")
    if service:
        return Path(service.split(":")[0])
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "shoal" / "coordinator"
