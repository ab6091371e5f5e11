"""Measures chats, repeated text and a long prompt over HTTP, on emulated hosts behind slow links.

    make bench-serve
    python -m benchmarks.serve --rounds 3 --delay-ms 5 --plot docs/serving.svg --json

Three hosts of 60 % of a core each hold a model of 190 million weights at 4 bits (testbed/). A frame
takes 5 ms from each to the next. All figures are of one client over HTTP:

- A chat of six turns: seconds until the first token of each turn, with kept prefixes and without.
  The first prompt has 128 tokens, and each turn adds an answer of 48 and a question of 48.
- Tokens per second with guesses and without, for answers that repeat their context, that can half
  be guessed, that mislead, and that repeat nothing (benchmarks/walk_model.py). Answers with and
  without guesses must be equal where they are greedy.
- Tokens per second of 1, 2 and 4 answers at once, with guesses and without.
- The time between tokens of three running streams while a prompt of 1000 tokens enters, and before.

Both ways take turns within a round. Reported are medians over the rounds, and medians of the ratios
within a round. The model and the measurements of the hosts are kept in --state.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.busy_hosts import await_rest
from benchmarks.random_model import Shape
from benchmarks.serve_picture import serving_svg
from benchmarks.walk_model import Region, make_walk_model, regions
from calibration.machine import processor_name
from cli.client import Client
from testbed.bed import Testbed, TestbedError
from testbed.cluster import Cluster
from testbed.lab import AgentSettings
from testbed.network import HUB, Host, Link, Network

STATE = Path("/var/tmp/shoal-serve")  # noqa: S108 - a fixed place, so that a model stays

SHAPE = Shape(hidden=1024, ffn=2816, layers=12, heads=16)
NAMES = ("ash", "birch", "cedar")
CPU_PERCENT = 60.0
BYTES_PER_S = 12.5e6
BITS = 4
SLOTS = 4
CONTEXT_TOKENS = 2048
MEMORY_BYTES, STORAGE_BYTES = 2 << 30, 4 << 30

TURNS = 6
FIRST_TOKENS, TURN_TOKENS, ANSWER_TOKENS = 128, 48, 48
SPEED_TOKENS = 128
LONG_TOKENS = 1000
STREAMS = 3

NO_GUESSES = {"speculative.n_max": 0}


@dataclass(slots=True)
class Answer:
    """An answer as the client saw it. ``times_s`` are those of its tokens, since the request."""

    tokens: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    cached: int = 0
    per_s: float = 0.0

    @property
    def first_s(self) -> float:
        return self.times_s[0]


def ask(url: str, prompt: list[int], tokens: int, **fields: Any) -> Answer:
    """Stream an answer of so many tokens."""
    body = {
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        **fields,
    }
    answer, began_s = Answer(), time.perf_counter()
    with Client(url) as client, closing(client.stream("/v1/completions", body)) as events:
        for event in events:
            if event["choices"] and not event["choices"][0]["finish_reason"]:
                answer.times_s.append(time.perf_counter() - began_s)
            if "shoal" in event:
                answer.tokens = event["shoal"]["tokens"]
                answer.per_s = event["shoal"]["decode_tokens_per_s"] or 0.0
            if event.get("usage"):
                details = event["usage"]["prompt_tokens_details"]
                answer.cached = details["cached_tokens"]
    if len(answer.tokens) != tokens:
        raise RuntimeError(f"{tokens} tokens were asked for, and {len(answer.tokens)} came")
    return answer


# ---- one round of each measurement --------------------------------------------------------------


def chat(url: str, region: Region, seed: int, *, keeps: bool) -> list[float]:
    """Return the seconds until the first token of each turn."""
    prompt, first_s = region.walk(FIRST_TOKENS, seed), []
    for turn in range(TURNS):
        answer = ask(url, prompt, ANSWER_TOKENS, cache_prompt=keeps)
        if bool(answer.cached) != (keeps and turn > 0):
            raise RuntimeError(f"{answer.cached} tokens of turn {turn + 1} were kept")
        first_s.append(answer.first_s)
        prompt = [*prompt, *answer.tokens, *region.walk(TURN_TOKENS, seed + 100 + turn)]
    return first_s


def speeds(url: str, region: Region, seed: int, *, greedy: bool) -> tuple[float, float]:
    """Return tokens per second of one answer, without guesses and with them."""
    prompt = region.walk(160, seed)
    sampling = {"temperature": 0.0 if greedy else 1.0, "seed": seed, "cache_prompt": False}
    order = (NO_GUESSES, {}) if seed % 2 else ({}, NO_GUESSES)
    answers = [ask(url, prompt, SPEED_TOKENS, **sampling, **fields) for fields in order]
    plain, guessed = answers if seed % 2 else answers[::-1]
    if greedy and plain.tokens != guessed.tokens:
        raise RuntimeError("guesses changed a greedy answer")
    return plain.per_s, guessed.per_s


def together(url: str, region: Region, count: int, **fields: Any) -> float:
    """Return tokens per second of this many answers at once."""

    def one(seed: int) -> Answer:
        return ask(url, region.walk(16, seed), SPEED_TOKENS, cache_prompt=False, **fields)

    with ThreadPoolExecutor(count) as pool:
        began_s = time.perf_counter()
        list(pool.map(one, range(count)))
        return count * SPEED_TOKENS / (time.perf_counter() - began_s)


def beside_a_prompt(url: str, region: Region) -> dict[str, float]:
    """Return times between tokens of running streams, before a long prompt and while it enters."""
    gaps: list[tuple[float, float]] = []
    over = threading.Event()

    def stream(seed: int) -> None:
        body = {
            "prompt": region.walk(16, seed),
            "max_tokens": CONTEXT_TOKENS - 16,
            "temperature": 0,
            "stream": True,
        }
        with Client(url) as client, closing(client.stream("/v1/completions", body)) as events:
            last_s = 0.0
            for _ in events:
                now_s = time.perf_counter()
                if last_s:
                    gaps.append((now_s, now_s - last_s))
                last_s = now_s
                if over.is_set():
                    return

    with ThreadPoolExecutor(STREAMS) as pool:
        running = [pool.submit(stream, seed) for seed in range(STREAMS)]
        try:
            while len(gaps) < 40 * STREAMS:
                time.sleep(0.05)  # The streams run meanwhile.
            began_s = time.perf_counter()
            first_s = ask(url, region.walk(LONG_TOKENS, 77), 2, cache_prompt=False).first_s
        finally:
            over.set()
        for one in running:
            one.result()
    before = [gap_s for at_s, gap_s in gaps if at_s < began_s]
    beside = [gap_s for at_s, gap_s in gaps if began_s <= at_s < began_s + first_s]
    return {
        "prompt_s": first_s,
        "before_median_ms": 1e3 * median(before),
        "before_p99_ms": 1e3 * float(np.percentile(before, 99)),
        "median_ms": 1e3 * median(beside),
        "p99_ms": 1e3 * float(np.percentile(beside, 99)),
        "p99_over_median": float(np.percentile(beside, 99)) / median(beside),
    }


# ---- all of them --------------------------------------------------------------------------------


CASES = {"repeats": True, "half": False, "misleads": False, "new": True}
"""Regions of the model, and whether their answers are greedy."""


def measure(options: argparse.Namespace, url: str) -> dict[str, Any]:
    found: dict[str, list[Any]] = defaultdict(list)
    parts = regions()
    ask(url, parts["new"].walk(80, 1), 16)
    for number in range(1, options.rounds + 1):
        say(f"round {number} of {options.rounds}")
        for keeps in (True, False) if number % 2 else (False, True):
            seed = 1000 * number + 500 * keeps  # No slot keeps the other way's first prompt.
            found[f"chat {keeps}"].append(chat(url, parts["new"], seed, keeps=keeps))
        for name, greedy in CASES.items():
            found[name].append(speeds(url, parts[name], number, greedy=greedy))
        for count in (1, 2, SLOTS):
            found[f"together {count}"].append(
                (
                    together(url, parts["repeats"], count, **NO_GUESSES),
                    together(url, parts["repeats"], count),
                )
            )
        found["beside"].append(beside_a_prompt(url, parts["new"]))
    return {
        "chat_first_s": {
            label: [median(turns) for turns in zip(*found[f"chat {keeps}"], strict=True)]
            for label, keeps in (("kept", True), ("whole", False))
        },
        "last_turn_over_first": median(turns[-1] / turns[0] for turns in found["chat True"]),
        "speeds": {name: _compared(found[name]) for name in CASES},
        "together": {str(n): _compared(found[f"together {n}"]) for n in (1, 2, SLOTS)},
        "beside": {
            name: median(one[name] for one in found["beside"]) for name in found["beside"][0]
        },
    }


def _compared(pairs: list[tuple[float, float]]) -> dict[str, float]:
    """Return medians of tokens per second, and of the ratios within a round."""
    return {
        "plain_per_s": median(plain for plain, _ in pairs),
        "guessed_per_s": median(guessed for _, guessed in pairs),
        "gain": median(guessed / plain for plain, guessed in pairs),
        "lowest_gain": min(guessed / plain for plain, guessed in pairs),
    }


@contextmanager
def served(options: argparse.Namespace, wishes: Mapping[str, Any] | None = None) -> Iterator[str]:
    """Run a shoal on emulated hosts, with the model over three of them, and yield its URL.

    wishes: further fields of the request to load it.
    """
    delay_s = options.delay_ms / 1e3
    links = {(a, b): Link(delay_s, BYTES_PER_S) for a in NAMES for b in NAMES if a != b}
    for name in NAMES:
        links[HUB, name] = links[name, HUB] = Link(0.2e-3, BYTES_PER_S)
    hosts = {HUB: Host()} | {name: Host(cpu_percent=CPU_PERCENT) for name in NAMES}
    make_walk_model(options.state / "model", SHAPE, CONTEXT_TOKENS)
    body = {
        "model": str((options.state / "model").absolute()),
        "bits": [BITS],
        "max_weight_error": None,
        "context_tokens": CONTEXT_TOKENS,
        "slots": SLOTS,
        "pins": {str(1 + at * SHAPE.layers // len(NAMES)): name for at, name in enumerate(NAMES)},
        **(wishes or {}),
    }
    with Testbed(Network(hosts, links, None), "serve") as bed:
        shoal = Cluster(bed, options.state / "hosts")
        shoal.start_coordinator()
        url = shoal.open_door(0)
        for name in NAMES:
            shoal.start_agent(name, AgentSettings(MEMORY_BYTES, STORAGE_BYTES))
        shoal.wait_for_agents(NAMES)
        say("planning and loading")
        with Client(url) as client:
            client.operate("/shoal/v1/load", body, lambda step: None)
        await_rest(bed, NAMES)
        yield url


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def report(result: dict[str, Any]) -> None:
    console = Console(width=max(Console().width, 100))
    chat_s = result["chat_first_s"]
    table = Table(title="seconds until the first token of a turn")
    for name in ("turn", "kept prefix", "whole prompt"):
        table.add_column(name, justify="right")
    for turn, (kept, whole) in enumerate(zip(chat_s["kept"], chat_s["whole"], strict=True), 1):
        table.add_row(str(turn), f"{kept:.3f}", f"{whole:.3f}")
    console.print(table)
    console.print(f"the last turn takes {result['last_turn_over_first']:.2f} times the first one")
    table = Table(title="tokens per second")
    for name in ("answers", "without guesses", "with guesses", "gain", "lowest gain"):
        table.add_column(name, justify="right")
    rows = result["speeds"] | {f"{n} at once": one for n, one in result["together"].items()}
    for name, one in rows.items():
        table.add_row(name, *(f"{value:.2f}" for value in one.values()))
    console.print(table)
    beside = result["beside"]
    console.print(
        f"between tokens of {STREAMS} streams: {beside['before_median_ms']:.0f} ms (median), "
        f"{beside['before_p99_ms']:.0f} ms (p99); beside a prompt of {LONG_TOKENS} tokens "
        f"({beside['prompt_s']:.1f} s): {beside['median_ms']:.0f} ms, {beside['p99_ms']:.0f} ms, "
        f"{beside['p99_over_median']:.2f} times the median"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--state", type=Path, default=STATE, metavar="DIR", help=f"default {STATE}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--delay-ms", type=float, default=5.0, help="of a frame, one way")
    parser.add_argument("--only-beside", action="store_true", help="only the long prompt")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    try:
        with served(options) as url:
            if options.only_beside:
                for _ in range(options.rounds):
                    print(json.dumps(beside_a_prompt(url, regions()["new"])))
                return
            result = measure(options, url)
    except TestbedError as error:
        sys.exit(str(error))
    about = {
        "machine": processor_name(),
        "date": date.today().isoformat(),
        "load": os.getloadavg()[2],
        "delay_ms": options.delay_ms,
        "rounds": options.rounds,
    }
    if options.plot:
        options.plot.write_text(serving_svg(about | result), encoding="utf-8")
    if options.json:
        print(json.dumps(about | result))
        return
    report(result)


if __name__ == "__main__":
    main()
