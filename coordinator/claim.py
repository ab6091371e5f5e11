"""Lets one coordinator at a time use a state directory, and others stand by."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from coordinator.config import ConfigError, usable
from model.durable import open_lock

LOOK_S = 1.0
"""The pause between two looks whether the other coordinator still runs."""


def claim(state_dir: Path) -> TextIO | None:
    """Lock a state directory for this process until the result is closed.

    Returns None if another coordinator has it. The lock ends with its process, and it holds for all
    machines that share the directory. Raises ConfigError.
    """
    with usable(state_dir):
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.fdopen(open_lock(state_dir / "coordinator.lock"), "w", encoding="ascii")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # Child processes do not inherit it.
    except BlockingIOError:
        lock.close()
        return None
    except OSError as error:
        lock.close()
        raise ConfigError(
            f"state directory {state_dir} cannot be locked: {error.strerror}"
        ) from error
    return lock


def claim_alone(state_dir: Path) -> TextIO:
    """Lock a state directory. Raises ConfigError, also if another coordinator has it."""
    lock = claim(state_dir)
    if lock is None:
        raise ConfigError(
            f"another coordinator runs with the state directory {state_dir}: stop it, give this "
            "one its own with --state-dir, or let it wait for the other one's end with --standby"
        )
    return lock


def stand_by(state_dir: Path, on_wait: Callable[[], None]) -> TextIO:
    """Wait until no other coordinator has a state directory, and lock it. Raises ConfigError.

    on_wait: is called before each pause.
    """
    while (lock := claim(state_dir)) is None:
        on_wait()
        time.sleep(LOOK_S)
    return lock
