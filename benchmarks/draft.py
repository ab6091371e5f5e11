"""Measures answers with a draft model, with guesses from the text and with none, on slow links.

    make bench-draft
    python -m benchmarks.draft --rounds 3 --delay-ms 5 --wrong 0,0.2,0.5,1 --json

The shoal is that of benchmarks/serve.py: three hosts of 60 % of a core, links of 5 ms, and a model
of 190 million weights at 4 bits. The draft model is small, has the same vocabulary and walks alike,
but for a share of wrong tokens. Each share is loaded anew. The model is measured with

- ``new``: greedy answers that repeat nothing, so that the text gives no guesses;
- ``half``: drawn answers, in which each token has two followers;
- ``repeats``: greedy answers that repeat their context, where guesses from the text are better.

The three ways take turns within a round. Reported are medians of tokens per second over the rounds,
medians of the ratios to no guesses within a round, the lowest ratio, and the share of the draft
model's guesses that were right. All answers of a round must be equal.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.random_model import Shape
from benchmarks.serve import CONTEXT_TOKENS, NO_GUESSES, STATE, ask, say, served
from benchmarks.walk_model import make_walk_model, regions
from calibration.machine import processor_name
from cli.client import Client
from testbed.bed import TestbedError

DRAFT_SHAPE = Shape(hidden=256, ffn=704, layers=2, heads=4)
DRAFT_BITS = 4
ANSWER_TOKENS = 256
PROMPT_TOKENS = 160

WAYS: dict[str, dict[str, Any]] = {
    "none": NO_GUESSES,
    "text": {"speculative.draft_model": False},
    "draft": {},
}
CASES = {"new": True, "half": False, "repeats": True}
"""Regions of the model, and whether their answers are greedy."""


def round_of(url: str, case: str, seed: int) -> dict[str, float]:
    """Return tokens per second of one answer in each way. Raises RuntimeError if they differ."""
    prompt = regions()[case].walk(PROMPT_TOKENS, seed)
    sampling = {
        "temperature": 0.0 if CASES[case] else 1.0,
        "seed": seed,
        "cache_prompt": False,
    }
    ways = list(WAYS)
    order = ways[seed % len(ways) :] + ways[: seed % len(ways)]
    answers = {way: ask(url, prompt, ANSWER_TOKENS, **sampling, **WAYS[way]) for way in order}
    # Drawn answers may differ in a last bit of a logit: rows that run together round differently.
    if CASES[case] and len({tuple(answer.tokens) for answer in answers.values()}) > 1:
        raise RuntimeError("guesses changed a greedy answer")
    return {way: answer.per_s for way, answer in answers.items()}


def counts(url: str) -> tuple[int, int]:
    """Return the guesses of the draft model so far, and how many were right."""
    with Client(url) as client:
        draft = client.get("/shoal/v1/ps")["model"]["draft"]
    return draft["drafted_tokens"], draft["accepted_tokens"]


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the figures of each share of wrong tokens and each kind of answer."""
    for wrong in options.wrong:
        say(f"a draft model with {wrong:.0%} wrong tokens")
        draft = options.state / f"draft-{wrong:g}"
        make_walk_model(draft, DRAFT_SHAPE, CONTEXT_TOKENS, wrong_share=wrong)
        wishes = {"draft": str(draft.absolute()), "draft_bits": DRAFT_BITS}
        with served(options, wishes) as url:
            ask(url, regions()["new"].walk(80, 1), 16)
            for case in CASES:
                before = counts(url)
                rounds: dict[str, list[float]] = defaultdict(list)
                for number in range(1, options.rounds + 1):
                    for way, per_s in round_of(url, case, number).items():
                        rounds[way].append(per_s)
                made, right = (now - then for now, then in zip(counts(url), before, strict=True))
                yield {
                    "wrong": wrong,
                    "answers": case,
                    **{f"{way}_per_s": median(figures) for way, figures in rounds.items()},
                    **{
                        f"{way}_gain": median(_ratios(rounds[way], rounds["none"]))
                        for way in ("text", "draft")
                    },
                    "lowest_draft_gain": min(_ratios(rounds["draft"], rounds["none"])),
                    "drafted": made,
                    "accepted": right / made if made else None,
                }


def _ratios(some: list[float], others: list[float]) -> list[float]:
    return [one / other for one, other in zip(some, others, strict=True)]


def report(results: list[dict[str, Any]]) -> None:
    table = Table(title="tokens per second, measured")
    for name in results[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for one in results:
        table.add_row(*(_text(value) for value in one.values()))
    Console(width=max(Console().width, 120)).print(table)


def _text(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else "-" if value is None else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--state", type=Path, default=STATE, metavar="DIR", help=f"default {STATE}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--delay-ms", type=float, default=5.0, help="of a frame, one way")
    parser.add_argument(
        "--wrong",
        type=lambda text: [float(part) for part in text.split(",")],
        default=[0.0, 0.2, 0.5, 1.0],
        metavar="SHARE,...",
        help="the shares of tokens that the draft model gets wrong; default 0,0.2,0.5,1",
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    try:
        results = list(measure(options))
    except TestbedError as error:
        sys.exit(str(error))
    if options.json:
        about = {
            "machine": processor_name(),
            "date": date.today().isoformat(),
            "load": os.getloadavg()[2],
            "delay_ms": options.delay_ms,
            "rounds": options.rounds,
        }
        print(json.dumps(about | {"results": results}))
        return
    report(results)


if __name__ == "__main__":
    main()
