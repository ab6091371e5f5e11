"""An agent that hashes everything behind a load, once the file ``go`` is in its state directory.

    python tests/system/late_check.py STATE_DIR ARGUMENTS OF THE COMMAND LINE ...

The stage answers before its damage is found, as that of a large model does.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from agent import integrity
from cli.__main__ import run

go = Path(sys.argv.pop(1)) / "go"
hash_now = integrity._hash


def hash_later(path: Path, stopped: Callable[[], bool]) -> str | None:
    while not go.exists() and not stopped():
        time.sleep(0.01)  # Only the file system says it.
    return hash_now(path, stopped)


integrity.CHECK_FIRST_BYTES = -1
integrity._hash = hash_later
sys.exit(run())
