"""The cost of counting and remembering passes, on the way of a token.

    make bench-telemetry
    python -m benchmarks.telemetry --rounds 60 --json

Two shoals of two agents each run beside each other on the loopback interface, with the embedded
model. The agents of one count and remember each pass, as always. In the agents of the other, these
calls do nothing. Both answer the same request in turns, so that both see the same machine. The
figure is the time of a token with telemetry over that without: the median over pairs of answers,
with its 95 % interval by resampling.

The embedded model's token takes well under a millisecond on a PC. So this is the worst case. The
report also has the time of the calls themselves, which is the same for every model.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np

from agent.hop import HopCounts
from agent.meter import StageMeter
from agent.sampler import Sampler
from agent.sequences import Rows
from agent.sequences import Sequence as Generation
from wire.messages import Sampling

ROOT = Path(__file__).parents[1]
SHOAL = (sys.executable, "-m", "cli")
MODEL = ROOT / "examples" / "tiny-opt" / "model"
WITHOUT = (
    "import agent.meter, agent.hop, sys;"
    "nothing = lambda *_: None;"
    "agent.meter.StageMeter.ran = agent.meter.StageMeter.sent = nothing;"
    "agent.hop.HopCounts.add = nothing;"
    "from cli.__main__ import run;"
    "run()"
)
"""The program of an agent that counts nothing."""

BODY = {"prompt": "The lamp is in the attic.", "max_tokens": 160, "temperature": 0,
        "ignore_eos": True, "return_token_ids": True}  # fmt: skip
RESAMPLES = 2000


class Shoal:
    """A coordinator and two agents, which all end with ``stop``."""

    def __init__(self, directory: Path, program: Sequence[str]) -> None:
        directory.mkdir()
        coordinator = subprocess.Popen(  # noqa: S603 - our own command
            [
                *SHOAL, "coordinator", "--json", "--no-mdns", "--bind=127.0.0.1", "--port=0",
                "--http=127.0.0.1:0", f"--state-dir={directory}/coordinator",
                "--create-token", f"--token-file={directory}/token",
            ],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT,
        )  # fmt: skip
        self._processes = [coordinator]
        ready = json.loads(coordinator.stdout.readline() if coordinator.stdout else "")
        self.url: str = ready["http"]
        for name in ("a1", "a2"):
            self._processes.append(
                subprocess.Popen(  # noqa: S603 - our own command
                    [
                        *program,
                        "agent",
                        f"--name={name}",
                        "--bind=127.0.0.1",
                        "--threads=1",
                        f"--coordinator=127.0.0.1:{ready['control_port']}",
                        f"--state-dir={directory}/{name}",
                        f"--measurements-dir={directory}",
                        f"--token-file={directory}/token",
                    ],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    cwd=ROOT,
                )
            )
        devices = f"{self.url}/shoal/v1/devices"
        while len(httpx.get(devices, trust_env=False).json()["devices"]) < 2:
            time.sleep(0.2)  # Joining tells no event here.
        subprocess.run(  # noqa: S603 - our own command
            [
                *SHOAL, "load", str(MODEL), "--bits=8", "--max-weight-error=none",
                "--pin=embedding:a1", "--pin=head:a2", f"--url={self.url}",
            ],
            check=True, stdout=subprocess.DEVNULL, cwd=ROOT,
        )  # fmt: skip

    def token_s(self) -> float:
        """Ask once. Returns the mean seconds between two tokens on the last stage."""
        answer = httpx.post(f"{self.url}/v1/completions", json=BODY, timeout=60, trust_env=False)
        return 1 / float(answer.json()["shoal"]["decode_tokens_per_s"])

    def stop(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.communicate()


def calls_s() -> float:
    """The seconds that a stage and its hop take for counting and remembering one pass."""
    meter, counts, payload = StageMeter(), HopCounts(), memoryview(b"x" * 256)
    generation = Generation(1, 0, Sampling(1, ()), Sampler(Sampling(1, ())))
    rows = Rows(0, 1, True, np.zeros(1, dtype=np.int64))
    turns = [(generation, rows)]

    def one() -> None:
        rows.arrived_s = time.monotonic()
        started_s = time.monotonic()
        meter.ran(turns, started_s, time.monotonic())
        sending_s = time.monotonic()
        counts.add(payload, time.monotonic() - sending_s)
        meter.sent(1, rows)

    number = 20_000
    return min(timeit.repeat(one, number=number, repeat=5)) / number


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the median, by resampling."""
    chance = random.Random(1)
    medians = sorted(median(chance.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    return medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES)]


def run(rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="shoal-telemetry-") as directory:
        shoals: list[Shoal] = []
        try:
            shoals.append(Shoal(Path(directory) / "with", SHOAL))
            shoals.append(Shoal(Path(directory) / "without", (sys.executable, "-c", WITHOUT)))
            for shoal in shoals * 3:
                shoal.token_s()  # The first answers are slower.
            pairs = []
            for number in range(rounds):
                order = (0, 1) if number % 2 else (1, 0)
                times = {index: shoals[index].token_s() for index in order}
                pairs.append((times[0], times[1]))
        finally:
            for shoal in shoals:
                shoal.stop()
    low, high = interval([first / second for first, second in pairs])
    return {
        "rounds": rounds,
        "with_us": 1e6 * median(first for first, _ in pairs),
        "without_us": 1e6 * median(second for _, second in pairs),
        "ratio": median(first / second for first, second in pairs),
        "ratio_95": [low, high],
        "calls_us": 1e6 * calls_s(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = run(options.rounds)
    if options.json:
        print(json.dumps(found))
        return
    low, high = found["ratio_95"]
    print(
        f"a token with telemetry: {found['with_us']:.1f} us, without: {found['without_us']:.1f} us"
    )
    print(f"ratio: {found['ratio']:.4f} (95 %: {low:.4f} to {high:.4f}), {found['rounds']} pairs")
    print(f"the calls alone: {found['calls_us']:.2f} us for each stage")


if __name__ == "__main__":
    main()
