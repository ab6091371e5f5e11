"""The cost of checking a stage's files: seconds to the first answer.

    make bench-integrity
    python -m benchmarks.integrity --rounds 5 --json

Two shoals of one agent run in turn on this machine, the second without checks and trials. A round
loads a model and asks for one token, twice. For ``first`` only the checkpoint is on disk, so blocks
are made and fetched, and times are measured. For ``again`` all of that is there. The small model is
hashed before it answers, the large one behind its first tokens.

Ratios are of one round's pair, and the order of the shoals changes from round to round. The report
also has this processor's hash rate. From its own rate, another processor's time behind a load can
be predicted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.random_model import Shape, make_model
from calibration.machine import processor_name
from cli.client import Client

ROOT = Path(__file__).parents[1]
STATE = Path("/var/tmp/shoal-integrity")  # noqa: S108 - a fixed place, so that models are made once

CONTEXT_TOKENS = 256
BITS = 8
SHAPES = {
    "small": Shape(hidden=256, ffn=704, layers=4, heads=4),
    "large": Shape(hidden=1024, ffn=2816, layers=16, heads=16),
}
HASHED_BYTES = 256 << 20
START_TIMEOUT_S = 60.0


class Shoal:
    """A coordinator and an agent, with or without checks."""

    def __init__(self, directory: Path, *, checked: bool) -> None:
        self._directory = directory
        module = "cli" if checked else "benchmarks.unchecked"
        self._command = [sys.executable, "-m", module]
        self._agent: subprocess.Popen[str] | None = None
        self._coordinator = self._start(
            *("coordinator", "--json", "--bind=127.0.0.1", "--port=0", "--http=127.0.0.1:0"),
            *("--no-mdns", f"--state-dir={directory / 'coordinator'}", "--create-token"),
            f"--token-file={directory / 'token'}",
            stdout=subprocess.PIPE,
        )
        said = self._coordinator.stdout
        ready = json.loads(said.readline() if said is not None else "")
        self._port, self._url = ready["control_port"], ready["http"]

    def join(self) -> None:
        """Start an agent, with empty disks for it and the coordinator."""
        state = self._directory / "agent"
        self.leave()
        shutil.rmtree(state, ignore_errors=True)
        for made in (self._directory / "coordinator").glob("[ac]*/*"):
            made.unlink()
        self._agent = self._start(
            *("agent", "--name=pi", "--bind=127.0.0.1", f"--state-dir={state}"),
            f"--coordinator=127.0.0.1:{self._port}",
            f"--token-file={self._directory / 'token'}",
        )
        deadline_s = time.monotonic() + START_TIMEOUT_S
        with Client(self._url) as client:
            while not client.get("/shoal/v1/devices")["devices"]:
                if time.monotonic() > deadline_s:
                    raise RuntimeError("the agent did not join")
                time.sleep(0.05)

    def leave(self) -> None:
        """Stop the agent."""
        if self._agent is not None:
            self._agent.terminate()
            self._agent.wait()

    def first_answer_s(self, model: Path) -> float:
        """Return the seconds to load a model and get one token, then unload the model."""
        body = {
            "model": str(model.absolute()),
            "bits": [BITS],
            "max_weight_error": None,
            "context_tokens": CONTEXT_TOKENS,
        }
        with Client(self._url) as client:
            started_s = time.perf_counter()
            client.operate("/shoal/v1/load", body, lambda step: None)
            client.post("/v1/completions", {"prompt": [1, 2], "max_tokens": 1, "temperature": 0})
            elapsed_s = time.perf_counter() - started_s
            client.post("/shoal/v1/unload", {})
        return elapsed_s

    def close(self) -> None:
        self.leave()
        self._coordinator.terminate()
        self._coordinator.wait()
        if self._coordinator.stdout is not None:
            self._coordinator.stdout.close()

    def _start(self, *arguments: str, stdout: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
        with (self._directory.parent / f"{self._directory.name}.log").open("a") as log:
            return subprocess.Popen(  # noqa: S603 - this interpreter, with our own arguments
                [*self._command, *arguments], stdout=stdout, stderr=log, text=True, cwd=ROOT
            )


def measure(model: Path, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each round and kind of load, with the seconds of both shoals."""
    rows = []
    with TemporaryDirectory(dir=model.parent, prefix="shoals-") as name:
        shoals = {}
        try:
            for kind in ("checked", "unchecked"):
                (Path(name) / kind).mkdir()
                shoals[kind] = Shoal(Path(name) / kind, checked=kind == "checked")
            for number in range(rounds):
                order = list(shoals)[:: 1 if number % 2 else -1]
                for kind in order:
                    shoals[kind].join()
                for load in ("first", "again"):
                    row = {kind: shoals[kind].first_answer_s(model) for kind in order}
                    ratio = row["checked"] / row["unchecked"]
                    rows.append({"model": model.name, "load": load, **row, "ratio": ratio})
        finally:
            for shoal in shoals.values():
                shoal.close()
    return rows


def hash_rate() -> float:
    """Return bytes per second of SHA-256 in one thread, the best of three."""
    data, best_s = bytes(HASHED_BYTES), float("inf")
    for _ in range(3):
        started_s = time.perf_counter()
        hashlib.sha256(data).digest()
        best_s = min(best_s, time.perf_counter() - started_s)
    return HASHED_BYTES / best_s


def report(rows: Sequence[dict[str, Any]], bytes_per_s: float) -> None:
    table = Table(title="seconds to the first answer, median (least to most) of the rounds")
    for name in ("model", "load", "unchecked", "checked", "ratio"):
        table.add_column(name, justify="right")
    for case in dict.fromkeys((row["model"], row["load"]) for row in rows):
        own = [row for row in rows if (row["model"], row["load"]) == case]
        table.add_row(*case, *(_spread(own, name) for name in ("unchecked", "checked", "ratio")))
    console = Console()
    console.print(table)
    console.print(
        f"{processor_name()}, load {os.getloadavg()[0]:.1f}: hashes {bytes_per_s / 1e6:.0f} MB/s"
        " (measured).\nPredicted for another processor: a large model is checked after its bytes"
        " on the disk / its own rate."
    )


def _spread(rows: Sequence[dict[str, Any]], name: str) -> str:
    values = [row[name] for row in rows]
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description="What checking the files of a stage costs.",
        epilog="example: python -m benchmarks.integrity --rounds 1 --json",
    )
    parser.add_argument("--state", type=Path, default=STATE, metavar="DIR", help=f"default {STATE}")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    for name, shape in SHAPES.items():
        make_model(options.state / name, shape, CONTEXT_TOKENS)
        rows += measure(options.state / name, options.rounds)
    bytes_per_s = hash_rate()
    if options.json:
        print(json.dumps({"rows": rows, "sha256_bytes_per_s": bytes_per_s}))
    else:
        report(rows, bytes_per_s)


if __name__ == "__main__":
    main()
