"""Formats lines for the systemd journal, which reads a priority from ``<N>``.

Source: systemd, sd-daemon(3) for the prefixes and systemd.exec(5) for JOURNAL_STREAM.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import IO


def under_journal(environment: Mapping[str, str] = os.environ, stream: IO[str] | int = 2) -> bool:
    """Whether stderr goes straight to the journal."""
    try:
        status = os.fstat(stream if isinstance(stream, int) else stream.fileno())
    except (OSError, ValueError):
        return False
    return environment.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def prefixed(level: int, text: str) -> str:
    """``text`` with the syslog priority of a logging level before each line."""
    if level >= logging.CRITICAL:
        priority = 2
    elif level >= logging.ERROR:
        priority = 3
    elif level >= logging.WARNING:
        priority = 4
    else:
        priority = 6 if level >= logging.INFO else 7
    return "\n".join(f"<{priority}>{line}" for line in text.splitlines())


class JournalFormatter(logging.Formatter):
    """Gives every line its priority, also the lines of a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        return prefixed(record.levelno, super().format(record))
