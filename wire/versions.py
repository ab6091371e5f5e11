"""The shoal versions of two machines, and the advice if they speak different protocols.

Three things never change from version 3 on, so that both sides of a mismatch can be told:

- the prefix of a frame
- JoinRefused: code 3, whose first field is text. It carries the version of the refused peer.
- the first message: AgentHello begins with id, name and shoal version. AuthChallenge has two fields
  before the shoal version.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

import msgpack

from wire.hygiene import clean_text
from wire.messages import CODES, PROTOCOL_VERSION, AgentHello, AuthChallenge

OLDEST = 2
"""The first published protocol. Its peers close a connection in silence."""

_PROFILE_OF_2 = ["", "", 0, 0, "", "", [], 0, 0, 0, 0.0, 0.0, 0.0, None, None, [], ""]
_HELLO_OF_2: list[object] = ["", "", "", [], _PROFILE_OF_2]
"""AgentHello of protocol 2 with an empty id. Such a peer refuses it, in protocol 2."""

_MAX_TEXT = 48


@lru_cache
def shoal_version() -> str:
    """Return the installed version, or "source" if the tree runs uninstalled."""
    try:
        return version("shoal-llm")
    except PackageNotFoundError:
        return "source"


def full_version() -> str:
    """Return the text that ``shoal --version`` prints."""
    return f"shoal {shoal_version()}, protocol {PROTOCOL_VERSION}"


@dataclass(frozen=True, slots=True)
class Stranger:
    """The known facts of a peer of another protocol. Empty text means unknown."""

    host: str
    protocol: int
    name: str = ""
    shoal: str = ""

    @staticmethod
    def of(host: str, protocol: int, code: int, header: bytes) -> Stranger:
        """Read the first message of any version. Anything malformed counts as unknown."""
        try:
            values = msgpack.unpackb(header, raw=False)
            if CODES.get(code) is AgentHello:
                return Stranger(host, protocol, _clean(values[1]), _clean(values[2]))
            if CODES.get(code) is AuthChallenge:
                return Stranger(host, protocol, "", _clean(values[2]))
        except (ValueError, TypeError, LookupError, msgpack.exceptions.UnpackException):
            pass
        return Stranger(host, protocol)

    def story(self) -> str:
        """Return one line for the user of this machine."""
        where = f"{self.host} ({self.name})" if self.name else self.host
        cure = self._cure(where, "this machine")
        return f"{where} runs {self._runs()}, this machine runs {_runs_here()}: {cure}"

    def refusal(self) -> str:
        """Return one line for the user of the other machine."""
        here = socket.gethostname()
        cure = self._cure("this machine", here)
        return f"{here} runs {_runs_here()}, this machine runs {self._runs()}: {cure}"

    def _cure(self, there: str, here: str) -> str:
        """Advise to upgrade the older machine."""
        if self.shoal == shoal_version():
            older = there if self.protocol < PROTOCOL_VERSION else here
            return f"install the newer build of shoal {self.shoal} on {older}"
        if self.protocol < PROTOCOL_VERSION:
            return f"install shoal {shoal_version()} on {there}"
        return f"install {self._shoal(f'the shoal of {there}')} on {here}"

    def _runs(self) -> str:
        age = "an older" if self.protocol < PROTOCOL_VERSION else "a newer"
        return f"{self._shoal(f'{age} shoal')} (protocol {self.protocol})"

    def _shoal(self, unknown: str) -> str:
        return f"shoal {self.shoal}" if self.shoal else unknown


def hello_of_oldest() -> list[object]:
    """Return the fields of a hello that a peer of protocol OLDEST answers with a refusal."""
    return _HELLO_OF_2


def _runs_here() -> str:
    return f"shoal {shoal_version()} (protocol {PROTOCOL_VERSION})"


def _clean(text: object) -> str:
    """Make a stranger's text safe for a terminal."""
    return clean_text(text[:_MAX_TEXT]).strip() if isinstance(text, str) else ""
