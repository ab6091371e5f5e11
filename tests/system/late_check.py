"""An agent that hashes everything behind a load, once the file ``go`` is in its state directory.

While ``hold`` is there, no answer passes HELD_AT before a stage stops for its damage. On a busy
machine the answer would otherwise end first.

    python tests/system/late_check.py STATE_DIR ARGUMENTS OF THE COMMAND LINE ...

The stage answers before its damage is found, as that of a large model does.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from agent import integrity
from agent.adjustments import Logits
from agent.loading import StageLoader
from agent.sampler import Sampler
from agent.stages import LoadedStage
from cli.__main__ import run

HELD_AT = 200

directory = Path(sys.argv.pop(1))
go, hold = directory / "go", directory / "hold"
hash_now, sample_now, stop_now = integrity._hash, Sampler.sample, StageLoader.stop_damaged
stopping = threading.Event()


def hash_later(path: Path, stopped: Callable[[], bool]) -> str | None:
    while not go.exists() and not stopped():
        time.sleep(0.01)  # Only the file system says it.
    return hash_now(path, stopped)


def sample_held(self: Sampler, logits: Logits, position: int) -> int:
    if position >= HELD_AT and hold.exists():
        stopping.wait()
    return sample_now(self, logits, position)


def stop_held(self: StageLoader, stage: LoadedStage, path: Path) -> None:
    stopping.set()
    stop_now(self, stage, path)


Sampler.sample = sample_held  # type: ignore[method-assign]  # This process is the test's alone.
StageLoader.stop_damaged = stop_held  # type: ignore[method-assign]  # As above.
integrity.CHECK_FIRST_BYTES = -1
integrity._hash = hash_later
sys.exit(run())
