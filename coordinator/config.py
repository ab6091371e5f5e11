"""The settings of the coordinator, checked once and passed down."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from wire import limits
from wire.addresses import is_loopback
from wire.errors import NeedsPerson

DEFAULT_RECOVERY_WAIT_S = 30.0
"""An agent that its service manager restarts is back after this time."""

DEFAULT_MOST_WAITING = 128
"""The requests that may wait for a slot. Each holds its prompt in memory."""

CLUSTER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,40}")


class ConfigError(Exception):
    """The coordinator cannot start. The message says why and what to do. Another start may work."""


class SettingWrong(ConfigError, NeedsPerson):
    """A setting or a kept file is wrong. The message names it, and what is valid."""


@dataclass(frozen=True, slots=True)
class CoordinatorConfig:
    """Settings of the coordinator. Agents connect to the control address, users over HTTP."""

    cluster: str
    state_dir: Path
    control_host: str
    control_port: int
    http_host: str
    http_port: int
    advertise: bool
    """Announce the control address by mDNS."""
    http_hosts: tuple[str, ...] = ()
    """Host names that HTTP serves beside this machine's own. "*" means all."""
    storage_bytes: int | None = None
    """The most disk space for quantized blocks. None means most of the free space."""
    recovery_wait_s: float = DEFAULT_RECOVERY_WAIT_S
    """The time that answers wait for a lost device if the others cannot take its place."""
    rebalances: bool = True
    """Whether a model moves by itself to a plan that is better for a while."""
    prefix_cache: bool = True
    """Whether prompts may begin with rows that an earlier sequence left in a slot."""
    drafts: int = limits.DRAFT_TOKENS
    """The most tokens that the first stage may guess ahead of an answer. 0: none."""
    insecure: bool = False
    """Do not encrypt the connections of agents, and let everybody join."""
    http_tls: bool = False
    """Encrypt HTTP."""
    http_cert: Path | None = None
    """A PEM file with the certificate that HTTP shows. None: that of the coordinator itself."""
    http_key: Path | None = None
    """A PEM file with its key. None: it is in the same file."""
    insecure_http: bool = False
    """Ask no HTTP client for an API key, wherever HTTP listens."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose web pages may use the API, as "https://chat.lan". "*" means all."""
    answer_cache_bytes: int = 0
    """The memory for greedy answers that identical requests get again. 0 keeps none."""
    most_waiting: int = DEFAULT_MOST_WAITING
    """The most requests that wait for a slot. More get an error."""

    def __post_init__(self) -> None:
        if not CLUSTER.fullmatch(self.cluster):
            raise SettingWrong(
                f"cluster {self.cluster!r}: use 1 to 41 letters, digits, dashes or underscores"
            )
        if self.storage_bytes is not None and self.storage_bytes <= 0:
            raise SettingWrong(f"storage {self.storage_bytes}: must be more than nothing")

    @property
    def identity_path(self) -> Path:
        """The file of this coordinator's key and certificate."""
        return self.state_dir / "identity.pem"

    @property
    def beyond(self) -> bool:
        """Whether other machines can reach HTTP."""
        return not is_loopback(self.http_host)


@contextlib.contextmanager
def usable(state_dir: Path) -> Iterator[None]:
    """Raise ConfigError in place of an OSError about the state directory."""
    try:
        yield
    except OSError as error:
        named = error.filename2 or error.filename  # Of a rename, the file that is replaced.
        within = f"{named}: " if named not in (None, str(state_dir)) else ""
        raise ConfigError(
            f"state directory {state_dir} is not usable: {within}{(error.strerror or '').lower()}"
        ) from error
