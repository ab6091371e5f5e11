"""The cost of drawing a token compared with taking the likeliest one, over HTTP.

    make bench-sampling
    make bench-sampling ARGS='--streams 1,4,8 --rounds 9 --json'
    make bench-sampling ARGS='--hidden 512 --layers 4'    # a model that is little but its head

A coordinator and one agent run on this machine. The model has random weights in Llama's shape and
Llama 3's vocabulary. It is smaller than any model of that vocabulary, so that sampling is a larger
part of a token. Requests go the way of every client: HTTP, coordinator, agent.

In each round all settings take turns, greedy among them. Rates are medians over the rounds. A ratio
is the median of the ratios within each round.

The model is kept in --state.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.random_model import Shape, make_model
from cli.client import Client

STATE = Path("/var/tmp/shoal-sampling")  # noqa: S108 - a fixed place, so that a run can continue
ROOT = Path(__file__).parents[1]
SHOAL = (sys.executable, "-m", "cli")
JOIN_TIMEOUT_S = 60.0

VOCAB = 128_256
CONTEXT_TOKENS = 512
HEAD_WIDTH = 64

SETTINGS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0},
    "temperature 1": {"temperature": 1},
    "top_k 40": {"temperature": 1, "top_k": 40},
    "top_p 0.9": {"temperature": 1, "top_p": 0.9},
}


@contextmanager
def serving(model: Path, bits: int, threads: int, slots: int) -> Iterator[str]:
    """Start a coordinator with one agent that has the model loaded, and yield the URL."""
    with tempfile.TemporaryDirectory(prefix="shoal-sampling-") as directory:
        coordinator = _start(
            "coordinator", "--json", "--no-mdns", "--bind=127.0.0.1", "--port=0",
            "--http=127.0.0.1:0", f"--state-dir={directory}/coordinator",
            "--create-token", f"--token-file={directory}/token",
        )  # fmt: skip
        processes = [coordinator]
        try:
            ready = json.loads(coordinator.stdout.readline() if coordinator.stdout else "")
            processes.append(
                _start(
                    "agent", "--bind=127.0.0.1", f"--threads={threads}",
                    f"--coordinator=127.0.0.1:{ready['control_port']}",
                    f"--state-dir={directory}/agent", f"--token-file={directory}/token",
                )
            )  # fmt: skip
            body = {
                "model": str(model),
                "bits": [bits],
                "max_weight_error": None,
                "context_tokens": CONTEXT_TOKENS,
                "slots": slots,
            }
            with Client(ready["http"]) as client:
                deadline_s = time.monotonic() + JOIN_TIMEOUT_S
                while not client.get("/shoal/v1/devices")["devices"]:
                    if time.monotonic() > deadline_s:
                        raise SystemExit("the agent did not join")
                    time.sleep(0.1)
                client.operate("/shoal/v1/load", body, lambda step: None)
            yield ready["http"]
        finally:
            for process in reversed(processes):
                process.terminate()
                process.communicate()


def _start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(  # noqa: S603 - our own command
        [*SHOAL, *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )


def rate(url: str, streams: int, tokens: int, settings: dict[str, float], seed: int) -> float:
    """Return tokens per second of all streams, from the first request to the last answer."""

    def one(first: int) -> None:
        body = {
            "prompt": [first],
            "max_tokens": tokens,
            "seed": seed + first,
            "speculative.n_max": 0,  # Greedy answers repeat themselves more than drawn ones.
            **settings,
        }
        with Client(url) as client:
            answer = client.post("/v1/completions", body)
        if answer["usage"]["completion_tokens"] != tokens:
            raise RuntimeError(f"{tokens} tokens were asked for, and these came: {answer}")

    with ThreadPoolExecutor(streams) as pool:
        started_s = time.perf_counter()
        list(pool.map(one, range(1, 1 + streams)))
        return streams * tokens / (time.perf_counter() - started_s)


def measure(url: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each number of streams and each setting."""
    cells = [(streams, name) for streams in options.streams for name in SETTINGS]
    found: dict[tuple[int, str], list[float]] = {cell: [] for cell in cells}
    for number in track(range(-1, options.rounds), console=Console(stderr=True), transient=True):
        # The first setting may find a cooler processor, so the order changes from round to round.
        for streams, name in np.roll(np.array(cells, object), number, axis=0):
            measured = rate(url, streams, options.tokens, SETTINGS[name], 1000 * number + 1000)
            if number >= 0:  # The first round only warms up.
                found[streams, name].append(measured)
    return [
        {
            "streams": streams,
            "setting": name,
            "tokens_per_s": median(rates),
            "all_tokens_per_s": rates,
            "against_greedy": median(
                drawn / greedy
                for drawn, greedy in zip(rates, found[streams, "greedy"], strict=True)
            ),
        }
        for (streams, name), rates in found.items()
    ]


def report(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title=f"drawing from {VOCAB:,} tokens, over HTTP")
    for name in ("streams", "setting", "tokens/s", "lowest", "highest", "against greedy"):
        table.add_column(name, justify="right")
    for row in rows:
        rates = row["all_tokens_per_s"]
        figures = [f"{value:.1f}" for value in (row["tokens_per_s"], min(rates), max(rates))]
        ratio = f"{row['against_greedy']:.3f}"
        table.add_row(str(row["streams"]), row["setting"], *figures, ratio)
    Console().print(table)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description="What drawing a token costs beside taking the likeliest, over HTTP.",
        epilog="example: python -m benchmarks.sampling --streams 1,4 --rounds 9 --json",
    )
    parser.add_argument("--state", type=Path, default=STATE, metavar="DIR", help=f"default {STATE}")
    parser.add_argument("--streams", type=_numbers, default=[1, 4], metavar="1,4")
    parser.add_argument("--hidden", type=int, default=1024, help="width of the model")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1, help="of the agent")
    parser.add_argument("--rounds", type=int, default=15, metavar="N")
    parser.add_argument("--tokens", type=int, default=50, metavar="N", help="of a generation")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    hidden, layers = options.hidden, options.layers
    model = options.state / f"model-{hidden}-{layers}"
    shape = Shape(hidden, ffn=11 * hidden // 4, layers=layers, heads=hidden // HEAD_WIDTH)
    make_model(model, shape, CONTEXT_TOKENS, vocab=VOCAB)
    before = os.getloadavg()[0]
    with serving(model, options.bits, options.threads, max(options.streams)) as url:
        rows = measure(url, options)
    if options.json:
        print(
            json.dumps(
                {
                    "vocab": VOCAB,
                    "hidden": hidden,
                    "layers": layers,
                    "load_before": before,
                    "rows": rows,
                }
            )
        )
    else:
        report(rows)
        print(f"load average when it began: {before:.1f}")


if __name__ == "__main__":
    main()
