"""Measures a light model beside a heavy one on one device, and what classes of requests do there.

    make bench-classes
    python -m benchmarks.classes --seconds 10 --json

A coordinator and one agent on the loopback interface hold two models of random weights at 8 bits: a
light one of 31 million weights, and a heavy one of 175 million. All figures are of clients over
HTTP:

- The time between two tokens of the light one, which answers all the time: alone, beside the heavy
  one at half load, and the same with prompts of 512 tokens. Half load: its answers of 24 tokens
  begin every twice as long as one takes alone.
- The time until the last token of a request of 24 tokens to the light one: alone, and among bulk
  work. That keeps all slots of the light one busy, or runs on the heavy one. Once nobody says a
  class, and once the request is real-time and the others are bulk.

One phase takes --seconds. There are eight, so all takes about four minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.loopback import Shoal
from benchmarks.random_model import Shape
from benchmarks.soak import PATIENCE_S
from benchmarks.walk_model import make_walk_model, regions
from coordinator.serving.urgency import HEADER

SHAPES = {
    "light": Shape(hidden=512, ffn=1408, layers=8, heads=8),
    "heavy": Shape(hidden=1024, ffn=2816, layers=14, heads=16),
}
CONTEXT_TOKENS = 1024
SLOTS = 4
BITS = 8
LOAD_OPTIONS = (
    f"--bits={BITS}",
    f"--slots={SLOTS}",
    f"--context={CONTEXT_TOKENS}",
    "--quality-budget=none",
)
TOKENS = 24
STREAM_TOKENS = 192
LONG_TOKENS = 512
BULK_CLIENTS = 6
BULK_TOKENS = 96
LEAST_REQUESTS = 5
"""A phase goes on until it has so many requests."""


@dataclass(frozen=True, slots=True)
class Clients:
    """Sends requests to one coordinator."""

    url: str

    def stream(
        self,
        model: str,
        tokens: int,
        *,
        prompt: int = 16,
        urgency: str | None = None,
        seed: int = 0,
    ) -> Iterator[float]:
        """Ask for an answer, and yield the moment of each token."""
        chosen = regions()["new"].walk(prompt, seed)
        body = {
            "model": model, "prompt": chosen, "max_tokens": tokens, "stream": True,
            "ignore_eos": True, "cache_prompt": False, "temperature": 0,
            "speculative.n_max": 0,
        }  # fmt: skip
        headers = {HEADER: urgency} if urgency else {}
        with httpx.Client(timeout=PATIENCE_S, trust_env=False) as client:
            url = f"{self.url}/v1/completions"
            with client.stream("POST", url, json=body, headers=headers) as response:
                if response.status_code != 200:
                    raise RuntimeError(response.read().decode())
                for line in response.iter_lines():
                    if not line.startswith("data: {"):
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise RuntimeError(event["error"]["message"])
                    if event["choices"] and not event["choices"][0]["finish_reason"]:
                        yield time.perf_counter()

    def gaps_s(self, model: str, seconds: float) -> list[float]:
        """Return the times between tokens of answers that follow each other for so long."""
        found: list[float] = []
        until_s, seed = time.perf_counter() + seconds, 0
        while time.perf_counter() < until_s:
            seed += 1
            times = list(self.stream(model, STREAM_TOKENS, seed=seed))
            # The first one is behind the prompt, which is no decoding.
            found += list(np.diff(times[1:]))
        return found

    def last_s(self, model: str, seconds: float, urgency: str | None) -> list[float]:
        """Return the times until the last token of requests that come one after the other."""
        found: list[float] = []
        until_s = time.perf_counter() + seconds
        while time.perf_counter() < until_s or len(found) < LEAST_REQUESTS:
            begun_s = time.perf_counter()
            *_, last_s = self.stream(model, TOKENS, urgency=urgency, seed=len(found))
            found.append(last_s - begun_s)
            time.sleep(0.2)  # A client that reads the answer.
        return found

    @contextmanager
    def half_load(self, model: str, prompt: int) -> Iterator[list[float]]:
        """Ask a model for answers, each to begin every twice as long as one takes alone.

        Yields the times that they take, which grows.
        """

        def one(seed: int) -> float:
            begun_s = time.perf_counter()
            list(self.stream(model, TOKENS, prompt=prompt, seed=seed))
            return time.perf_counter() - begun_s

        alone_s = min(one(seed) for seed in range(3))
        over, taken = threading.Event(), list[float]()

        def ask() -> None:
            due_s, seed = time.perf_counter(), 10
            while not over.wait(max(due_s - time.perf_counter(), 0)):
                seed += 1
                due_s = max(due_s + 2 * alone_s, time.perf_counter())
                taken.append(one(seed))

        with _threads([ask], over):
            yield taken

    @contextmanager
    def bulk(self, model: str, urgency: str | None) -> Iterator[None]:
        """Keep a model busy with long answers."""
        over = threading.Event()

        def ask(seed: int) -> None:
            while not over.is_set():
                for _ in self.stream(model, BULK_TOKENS, urgency=urgency, seed=seed):
                    if over.is_set():
                        break

        with _threads([lambda seed=seed: ask(seed) for seed in range(BULK_CLIENTS)], over):
            time.sleep(1.0)  # All slots are busy then.
            yield


@contextmanager
def _threads(works: list[Any], over: threading.Event) -> Iterator[None]:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def gaps(clients: Clients, seconds: float) -> list[dict[str, Any]]:
    """Measure the time between tokens of the light model."""
    rows = []

    def row(label: str, found: list[float]) -> None:
        ms = 1e3 * np.array(found)
        figures = {name: float(np.percentile(ms, at)) for name, at in (("p50", 50), ("p99", 99))}
        rows.append({"case": label, "tokens": len(ms), **figures, "most": float(ms.max())})

    clients.gaps_s("light", 2.0)
    row("alone", clients.gaps_s("light", seconds))
    for label, prompt in (
        ("beside the heavy one at half load", 16),
        (f"the same, with prompts of {LONG_TOKENS} tokens", LONG_TOKENS),
    ):
        with clients.half_load("heavy", prompt) as taken:
            row(label, clients.gaps_s("light", seconds))
        rows[-1]["heavy_s"] = float(np.median(taken))
    return rows


def classes(clients: Clients, seconds: float) -> list[dict[str, Any]]:
    """Measure the time until the last token of a request to the light model."""
    rows = []

    def row(label: str, found: list[float]) -> None:
        seconds = np.array(found)
        rows.append(
            {
                "case": label,
                "requests": len(seconds),
                "p50": float(np.median(seconds)),
                "most": float(seconds.max()),
            }
        )

    row("alone", clients.last_s("light", seconds, None))
    for where, model in (("the same model", "light"), ("the heavy one", "heavy")):
        for label, own, others in (
            ("no classes", None, None),
            ("real-time among bulk", "realtime", "bulk"),
        ):
            with clients.bulk(model, others):
                row(f"{BULK_CLIENTS} on {where}, {label}", clients.last_s("light", seconds, own))
    return rows


def run(directory: Path, seconds: float) -> dict[str, Any]:
    shoal = Shoal(directory)
    try:
        shoal.start_all(1, threads=1)
        for name, shape in SHAPES.items():
            make_walk_model(directory / name, shape, CONTEXT_TOKENS)
            shoal.put(directory / name, *LOAD_OPTIONS)
        clients = Clients(shoal.url)
        return {"gaps_ms": gaps(clients, seconds), "last_token_s": classes(clients, seconds)}
    finally:
        shoal.stop()


def show(found: dict[str, Any]) -> None:
    out = sys.stdout
    first = found["gaps_ms"][0]["p99"]
    out.write(
        "| tokens of the light model | tokens | median ms | p99 ms | x alone | longest ms |\n"
    )
    out.write("| --- | ---: | ---: | ---: | ---: | ---: |\n")
    for row in found["gaps_ms"]:
        out.write(
            f"| {row['case']} | {row['tokens']} | {row['p50']:.1f} | {row['p99']:.1f}"
            f" | {row['p99'] / first:.1f} | {row['most']:.1f} |\n"
        )
    out.write("\n| until the last token | requests | median s | x alone | longest s |\n")
    out.write("| --- | ---: | ---: | ---: | ---: |\n")
    first = found["last_token_s"][0]["p50"]
    for row in found["last_token_s"]:
        out.write(
            f"| {row['case']} | {row['requests']} | {row['p50']:.2f}"
            f" | {row['p50'] / first:.1f} | {row['most']:.2f} |\n"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="of each phase")
    parser.add_argument("--logs", type=Path, help="Keep the processes' files in this folder.")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="shoal-classes-") as name:
        directory = options.logs or Path(name)
        directory.mkdir(parents=True, exist_ok=True)
        found = run(directory, options.seconds)
    if options.json:
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        show(found)


if __name__ == "__main__":
    main()
