"""Run all targets for some time, and print how many frames each has read.

    python -m tests.fuzz --seconds 60 --seed 1

A finding ends it with its traceback. The same seed gives the same frames in memory. Those on the
ports of running processes depend on their timing, too.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.live import living
from tests.fuzz.targets import in_memory


def main() -> None:
    parser = argparse.ArgumentParser(description="Hostile bytes against codec, TLS and ports.")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)  # noqa: T201 - to repeat it
    context = multiprocessing.get_context("spawn")
    told: multiprocessing.SimpleQueue[dict[str, int]] = context.SimpleQueue()
    beside = context.Process(target=in_memory, args=(options.seed, options.seconds, told))
    beside.start()
    try:
        with (
            tempfile.TemporaryDirectory(prefix="shoal-fuzz-") as directory,
            living(Path(directory), options.seed) as shoal,
        ):
            shoal.run(options.seconds)
        beside.join()
    finally:
        beside.kill()
    if beside.exitcode:
        sys.exit(f"the targets in memory have a finding: seed {options.seed}")
    frames = {**told.get(), **shoal.frames}
    for name, count in frames.items():
        print(f"{count:>9,} frames  {name}")  # noqa: T201 - the result
    print(f"{sum(frames.values()):>9,} frames  in all: no finding")  # noqa: T201 - the result


if __name__ == "__main__":
    main()
