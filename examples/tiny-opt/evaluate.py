#!/usr/bin/env python3
"""Measure the tiny OPT model on its dev set at several bit-widths.

Every matrix of the decoder layers, and the token embedding (which is the output head too), is
quantized and dequantized with shoal's own quantizer. Then the questions are answered greedily.

Exact match compares answers as the SQuAD v1.1 script does (case, punctuation and articles do not
count). Loss and perplexity are of the answer's tokens and the end-of-text token, given the
question.

    python evaluate.py                       # the table of the model card
    python evaluate.py --bits 16 3 --json
    python evaluate.py --bits 8 --ask "The lamp is in the attic. Where is the lamp?"
"""

from __future__ import annotations

import argparse
import json
import math
import re
import string
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import generate
import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn import functional as F
from train import HERE, MAX_POSITIONS, TinyOPT

sys.path.insert(0, str(HERE.parents[1]))

from model.quantize import BITS, Format, Scheme, quantize
from model.safetensors import read_safetensors

NEW_TOKENS = 8
BATCH = 50


@dataclass(frozen=True)
class Question:
    """One question of the dev set."""

    kind: str
    prompt: str
    answer: str


def load_questions(path: Path) -> list[Question]:
    """Return the questions of a SQuAD v1.1 file, as prompts."""
    data = json.loads(path.read_text(encoding="utf-8"))
    return [
        Question(qa["kind"], f"{context} {qa['question']}", qa["answers"][0]["text"])
        for context, qa in generate.iterate(data)
    ]


def load_model(folder: Path, fmt: Format) -> TinyOPT:
    """Return the model with its matrices rounded to the format."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = TinyOPT(
        config["vocab_size"],
        config["hidden_size"],
        config["num_attention_heads"],
        config["num_hidden_layers"],
    )
    state = {}
    stored = read_safetensors(folder / "model.safetensors")
    for name in stored.entries:
        value = stored.float32(name)
        if value.ndim == 2 and "embed_positions" not in name:
            value = quantize(value, fmt, name).dequantize()
        state[name] = torch.from_numpy(value)
    model.load_state_dict(state)
    model.eval()
    return model


def forward(model: TinyOPT, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits [rows, tokens, words] of plain causal sequences."""
    length = ids.shape[1]
    positions = torch.arange(length).expand_as(ids)
    mask = torch.full((length, length), -1e9).triu(1)[None, None]
    hidden, _ = model(ids, positions, mask)
    return model.logits(hidden)


@torch.no_grad()
def answer(model: TinyOPT, tokenizer: Tokenizer, prompts: list[str]) -> list[str]:
    """Return the greedy completions of the prompts."""
    encoded = [tokenizer.encode(p).ids for p in prompts]
    lengths = torch.tensor([len(e) for e in encoded])
    width = int(lengths.max()) + NEW_TOKENS
    if width > MAX_POSITIONS:
        raise ValueError(f"a prompt has more than {MAX_POSITIONS - NEW_TOKENS} tokens")
    ids = torch.full((len(encoded), width), generate.PAD_ID)
    for i, e in enumerate(encoded):
        ids[i, : len(e)] = torch.tensor(e)
    rows = torch.arange(len(encoded))
    done = torch.zeros(len(encoded), dtype=torch.bool)
    for step in range(NEW_TOKENS):
        logits = forward(model, ids[:, : int(lengths.max()) + step])
        token = logits[rows, lengths + step - 1].argmax(-1)
        token[done] = generate.EOS_ID
        ids[rows, lengths + step] = token
        done |= token == generate.EOS_ID
        if bool(done.all()):
            break
    texts = []
    for i, e in enumerate(encoded):
        new = ids[i, len(e) : len(e) + NEW_TOKENS].tolist()
        new = new[: new.index(generate.EOS_ID)] if generate.EOS_ID in new else new
        texts.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    return texts


@torch.no_grad()
def answer_loss(
    model: TinyOPT, tokenizer: Tokenizer, questions: list[Question]
) -> tuple[float, int]:
    """Return the summed cross-entropy of the answers' tokens, and their number."""
    prompts = [tokenizer.encode(q.prompt).ids for q in questions]
    wholes = [
        [*p, *tokenizer.encode(q.answer).ids, generate.EOS_ID]
        for p, q in zip(prompts, questions, strict=True)
    ]
    width = max(len(w) for w in wholes)
    ids = torch.full((len(wholes), width), generate.PAD_ID)
    wanted = torch.full((len(wholes), width), -100)
    for i, (p, w) in enumerate(zip(prompts, wholes, strict=True)):
        ids[i, : len(w)] = torch.tensor(w)
        wanted[i, len(p) - 1 : len(w) - 1] = torch.tensor(w[len(p) :])
    logits = forward(model, ids)
    loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum")
    return float(loss), int((wanted >= 0).sum())


def normalize(text: str) -> str:
    """Return the text as the SQuAD v1.1 script compares it."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def measure(model: TinyOPT, tokenizer: Tokenizer, questions: list[Question]) -> dict[str, Any]:
    """Return exact match by kind and in all, loss and perplexity."""
    right: dict[str, list[bool]] = {kind: [] for kind in generate.KINDS}
    total, tokens = 0.0, 0
    for at in range(0, len(questions), BATCH):
        part = questions[at : at + BATCH]
        for q, text in zip(part, answer(model, tokenizer, [q.prompt for q in part]), strict=True):
            right[q.kind].append(normalize(text) == normalize(q.answer))
        loss, count = answer_loss(model, tokenizer, part)
        total, tokens = total + loss, tokens + count
    every = [r for kind in right.values() for r in kind]
    return {
        "exact_match": {k: float(np.mean(v)) for k, v in right.items() if v},
        "exact_match_all": float(np.mean(every)),
        "loss": total / tokens,
        "perplexity": math.exp(total / tokens),
        "questions": len(every),
    }


def table(results: list[dict[str, Any]]) -> str:
    """Return the results as a markdown table."""
    kinds = [k for k in generate.KINDS if k in results[0]["exact_match"]]
    lines = [
        "| bits | " + " | ".join(kinds) + " | all | loss | perplexity |",
        "| ---: |" + " ---: |" * (len(kinds) + 3),
    ]
    for r in results:
        cells = [f"{100 * r['exact_match'][k]:.1f} %" for k in kinds]
        cells += [f"{100 * r['exact_match_all']:.1f} %"]
        cells += [f"{r['loss']:.2g}", f"{r['perplexity']:.6g}"]
        lines.append(f"| {r['bits']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Print the table, the JSON, or one answer; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-dir", type=Path, default=HERE / "model")
    parser.add_argument("--dev", type=Path, default=HERE / "dev.json")
    parser.add_argument(
        "--bits", type=int, nargs="+", default=sorted(BITS, reverse=True), choices=BITS
    )
    scheme: Scheme
    parser.add_argument("--scheme", choices=("rtn", "truncate"), default="rtn")
    parser.add_argument("--group", type=int, default=32, help="inputs per scale")
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--ask", metavar="PROMPT", help="answer this instead of the dev set")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    args = parser.parse_args(argv)
    scheme = args.scheme
    tokenizer = Tokenizer.from_file(str(args.model_dir / "tokenizer.json"))
    results = []
    for bits in args.bits:
        model = load_model(args.model_dir, Format.of(bits, scheme, args.group, args.symmetric))
        if args.ask:
            results.append({"bits": bits, "answer": answer(model, tokenizer, [args.ask])[0]})
        else:
            found = measure(model, tokenizer, load_questions(args.dev))
            results.append({"bits": bits, **found})
    if args.json:
        print(json.dumps(results, indent=2))
    elif args.ask:
        for r in results:
            print(f"{r['bits']} bits: {r['answer']}")
    else:
        print(table(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
