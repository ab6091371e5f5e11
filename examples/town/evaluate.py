#!/usr/bin/env python3
"""Measure the town model on its dev set at several bit-widths, kind by kind.

`shoal eval` does the work: every block is quantized with shoal's own quantizer, and the questions
are answered greedily with the whole model on this machine. This script sums up by kind.

Exact match compares answers as the SQuAD v1.1 script does. Loss and perplexity are of the answer's
tokens, given the question. KL is the divergence of the predictions from those of the original.

    python evaluate.py                       # the table of the model card
    python evaluate.py --bits 16 3 --group-size 32
    python evaluate.py --bits 4 --scheme truncate
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import generate

HERE = Path(__file__).resolve().parent
BITS = (16, 8, 6, 5, 4, 3, 2)


def evaluate(arguments: list[str], bits: list[int]) -> dict[int, list[dict[str, Any]]]:
    """Return the results of `shoal eval`, one for each line, by bits. Raises CalledProcessError."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.jsonl"
        command = [sys.executable, "-m", "cli", "eval", *arguments, "--out", str(out), "--exact"]
        command += ["--bits", ",".join(map(str, bits)), "--max-tokens", "16", "--slots", "16"]
        subprocess.run(command, check=True, cwd=HERE.parents[1], stdout=subprocess.DEVNULL)  # noqa: S603 - our own command
        found: dict[int, list[dict[str, Any]]] = {width: [] for width in bits}
        for text in out.read_text().splitlines()[1:]:
            line = json.loads(text)
            found[int(line["run"].split("x")[0])].append(line)  # "8x8 rtn 64": bits x blocks
    return found


def sums(lines: list[dict[str, Any]], questions: list[dict[str, str]]) -> dict[str, float]:
    """Return exact match in percent by kind and in all, loss, perplexity and KL."""
    right: dict[str, list[bool]] = {kind: [] for kind in generate.KINDS}
    nats, kl, tokens = 0.0, 0.0, 0
    for line in lines:
        question = questions[line["item"]]
        if line["kind"] == "answer":
            answer = (line["answer"] or "").strip().lower()
            right[question["kind"]].append(normalize(answer) == normalize(question["answer"]))
        elif line["kind"] == "loss":
            nats, kl, tokens = nats + line["nats"], kl + line["kl"], tokens + line["tokens"]
    every = [one for each in right.values() for one in each]
    found = {kind: 100 * sum(each) / len(each) for kind, each in right.items() if each}
    return found | {
        "all": 100 * sum(every) / len(every),
        "loss": nats / tokens,
        "perplexity": math.exp(nats / tokens),
        "kl": kl / tokens,
    }


def normalize(text: str) -> str:
    """Return the text as the SQuAD v1.1 script compares it; answers have no punctuation."""
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def main(argv: list[str] | None = None) -> int:
    """Print the table; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-dir", type=Path, default=HERE / "model")
    parser.add_argument("--dev", type=Path, default=HERE / "dev.jsonl")
    parser.add_argument("--bits", type=int, nargs="+", default=BITS)
    parser.add_argument("--scheme", default=None, help="how to quantize; default: shoal's")
    parser.add_argument("--group-size", type=int, default=None, help="inputs per scale")
    args = parser.parse_args(argv)
    arguments = [str(args.model_dir.absolute()), "--data", str(args.dev.absolute())]
    for name in ("scheme", "group_size"):
        value = getattr(args, name)
        if value is not None:
            arguments += [f"--{name.replace('_', '-')}", str(value)]
    questions = [json.loads(line) for line in args.dev.read_text().splitlines()]
    kinds = [kind for kind in generate.KINDS if any(kind == one["kind"] for one in questions)]
    print("| bits | " + " | ".join(kinds) + " | all | loss | perplexity | KL |")
    print("| ---: |" + " ---: |" * (len(kinds) + 4))
    for bits, lines in evaluate(arguments, args.bits).items():
        found = sums(lines, questions)
        cells = [f"{found[kind]:.1f} %" for kind in (*kinds, "all")]
        cells += [f"{found[name]:.3g}" for name in ("loss", "perplexity", "kl")]
        print(f"| {bits} | " + " | ".join(cells) + " |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
