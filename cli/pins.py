"""Which key a coordinator's HTTPS address must show.

Like ssh, the command keeps the key that an address showed first, once the user has agreed. A later
key that differs is refused, before anything is sent. A certificate that the system trusts for the
address needs no such agreement.
"""

from __future__ import annotations

import json
import os
import socket
import ssl
import sys
from dataclasses import dataclass
from pathlib import Path

from cli.errors import CommandFailed, CoordinatorUnreachable
from cli.service.running import running_in
from model.bounded import read_json
from model.durable import replace_text
from wire.addresses import is_loopback
from wire.claim import Fingerprint, fingerprint_of, shown
from wire.service import default_state_dir

VARIABLE = "SHOAL_FINGERPRINT"
"""The environment variable with the fingerprint that the coordinator must show."""

LARGEST_FILE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Address:
    """Where an HTTPS server listens."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"https://{host}:{self.port}"


def encryption(address: Address, directories: tuple[Path, ...], timeout_s: float) -> ssl.SSLContext:
    """Return the context for connections to ``address``, which takes only the right key.

    ``directories`` are state directories of this machine's coordinators. Raises CommandFailed and
    CoordinatorUnreachable.
    """
    certificate = _shown_by(address, timeout_s)
    fingerprint = fingerprint_of(certificate)
    expected = os.environ.get(VARIABLE, "").strip()
    if expected:
        if not _is_written(fingerprint, expected):
            raise CommandFailed(
                f"{address} shows the key {shown(fingerprint)}, and {VARIABLE} names another one: "
                "somebody may be in between; nothing was sent"
            )
        return _only(certificate)
    path = default_state_dir("command") / "known-coordinators.json"
    known = _known(path)
    pinned = known.get(str(address)) or _own(address, directories)
    if pinned == fingerprint.hex():
        return _only(certificate)
    trusted = _trusted(address, timeout_s)
    if trusted is not None:
        return trusted
    if pinned is not None:
        raise CommandFailed(
            f"{address} shows another key than before: {shown(fingerprint)}. Somebody may be in "
            f"between, so nothing was sent. If the coordinator has a new key, remove the line of "
            f"this address in {path}"
        )
    _require_agreement(address, fingerprint)
    known[str(address)] = fingerprint.hex()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    replace_text(path, json.dumps(known, indent=1) + "\n")
    return _only(certificate)


def _shown_by(address: Address, timeout_s: float) -> bytes:
    """The certificate that a server shows, in DER. TLS proves that it has the key."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with (
            socket.create_connection((address.host, address.port), timeout_s) as plain,
            context.wrap_socket(plain, server_hostname=_name(address)) as encrypted,
        ):
            certificate = encrypted.getpeercert(binary_form=True)
    except ssl.SSLError as error:
        raise CommandFailed(
            f"{address} does not speak TLS: use http://, or start the coordinator with --http-tls"
        ) from error
    except OSError as error:
        raise CoordinatorUnreachable(
            f"no coordinator answers at {address}: start `shoal coordinator`, "
            "or name it with --url or SHOAL_COORDINATOR"
        ) from error
    if certificate is None:
        raise CommandFailed(f"{address} shows no certificate")
    return certificate


def _only(certificate: bytes) -> ssl.SSLContext:
    """A context that takes this certificate alone, for any name and at any date."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=certificate)
    # A leaf of the user's own authority stands for itself.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def _trusted(address: Address, timeout_s: float) -> ssl.SSLContext | None:
    """A context with the system's authorities, or None if they do not vouch for the server."""
    context = ssl.create_default_context()
    try:
        with (
            socket.create_connection((address.host, address.port), timeout_s) as plain,
            context.wrap_socket(plain, server_hostname=address.host),
        ):
            return context
    except OSError:
        return None


def _name(address: Address) -> str | None:
    """The name to ask for, where one machine serves several. Addresses are none."""
    is_address = ":" in address.host or address.host.replace(".", "").isdigit()
    return None if is_address else address.host


def _own(address: Address, directories: tuple[Path, ...]) -> str | None:
    """The key of this machine's coordinator, if it serves the address."""
    if not is_loopback(address.host):
        return None
    for directory in directories:
        running = running_in(directory)
        if running is not None and running.http.endswith(f":{address.port}"):
            return running.http_fingerprint or None
    return None


def _known(path: Path) -> dict[str, str]:
    try:
        values = read_json(path, LARGEST_FILE_BYTES)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CommandFailed(f"{path} is damaged: remove it") from error
    if not isinstance(values, dict) or not all(isinstance(item, str) for item in values.values()):
        raise CommandFailed(f"{path} is damaged: remove it")
    return values


def _is_written(fingerprint: Fingerprint, text: str) -> bool:
    """Whether a user's text names the fingerprint: in hexadecimal, or as it is shown."""
    return text.lower().replace(":", "") == fingerprint.hex() or text == shown(fingerprint)


def _require_agreement(address: Address, fingerprint: Fingerprint) -> None:
    """Ask whether the key is the right one. Raises CommandFailed."""
    text = (
        f"{address} has the key {shown(fingerprint)}, which this user's commands have not seen yet"
    )
    compare = "the coordinator prints its own when it starts"
    if not sys.stdin.isatty():
        raise CommandFailed(
            f"{text}: {compare}; if it is the same, set {VARIABLE}={shown(fingerprint)}"
        )
    sys.stderr.write(f"{text}.\nCompare: {compare}. Is it the same? [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise CommandFailed("nothing was sent")
