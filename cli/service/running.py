"""Where a running coordinator is reached, in a file of its state directory.

``shoal token create`` tells new devices the port, and ``shoal`` finds a coordinator whose HTTP is
encrypted. The file has no secret. Whoever may not read the directory does without it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from model.bounded import read_json
from model.durable import replace_text

log = logging.getLogger(__name__)

FILE = "running.json"
LARGEST_FILE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Running:
    """A coordinator that runs now."""

    process: int
    control_host: str
    """The address to which the agents' port is bound."""
    control_port: int
    cluster: str
    http: str
    """A URL of its API."""
    http_fingerprint: str
    """The fingerprint of the certificate of HTTP, in hexadecimal. Empty without TLS."""


@contextmanager
def told(directory: Path, running: Running) -> Iterator[None]:
    """Have the file while the block runs."""
    path = directory / FILE
    try:
        replace_text(path, json.dumps(asdict(running), indent=1) + "\n", mode=0o644)
    except OSError as error:
        log.warning("%s: %s", path, error.strerror)
    try:
        yield
    finally:
        with suppress(OSError):  # It says nothing once its process is gone.
            path.unlink(missing_ok=True)


def running_in(directory: Path) -> Running | None:
    """Return the coordinator that runs with this state directory, if that can be told."""
    try:
        values = read_json(directory / FILE, LARGEST_FILE_BYTES)
        running = Running(**values)
        os.kill(running.process, 0)
    except PermissionError as error:
        # Another user's process lives. A file that may not be read has a name in the error.
        return None if error.filename else running
    except (OSError, ValueError, TypeError, OverflowError):
        return None
    return running
