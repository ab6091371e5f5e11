"""The effect of a backend's arithmetic on the demo model's answers, at one width.

For each backend it reports the mean divergence KL(original || backend) of the next token over all
positions. It also reports loss and perplexity of the answers given their questions, and the number
of exactly answered questions of the dev set. If the backend counts the products that its host had
to compute, they are reported too.

    python benchmarks/backend_quality.py
    python benchmarks/backend_quality.py --backends tflite_cpu --questions 100 --json
    python benchmarks/backend_quality.py --backends onnx_cpu --bits 4 --exact
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from backends.base import Backend, StageOptions
from backends.edgetpu import Int8Stage
from backends.registry import backend_class
from model.artifact import write_artifact
from model.checkpoint import Checkpoint
from model.divergence import divergences
from model.quantize import Format
from model.reference import ReferenceModel

TINY_OPT = Path(__file__).parents[1] / "examples" / "tiny-opt"
NEW_TOKENS = 8

Question = tuple[list[int], list[int]]
"""The tokens of a prompt and of its answer, the end-of-text token included."""


def questions_of(path: Path, tokenizer: Tokenizer, eos: int, count: int) -> list[Question]:
    """Return the first ``count`` questions of a dev set."""
    data = json.loads(path.read_text(encoding="utf-8"))["data"]
    found = []
    for entry in data:
        for paragraph in entry["paragraphs"]:
            for qa in paragraph["qas"]:
                prompt = f"{paragraph['context']} {qa['question']}"
                whole = tokenizer.encode(f"{prompt} {qa['answers'][0]['text']}").ids
                begin = len(tokenizer.encode(prompt).ids)
                found.append((whole[:begin], [*whole[begin:], eos]))
    return found[:count]


def measure(
    checkpoint: Checkpoint,
    backend: Backend,
    bits: int,
    questions: Sequence[Question],
    original: ReferenceModel,
    *,
    exact_stages: bool,
) -> dict[str, Any]:
    """Measure all figures of one backend; ``exact_stages`` is ``StageOptions.exact``."""
    spec = checkpoint.spec
    with tempfile.TemporaryDirectory() as name:
        artifacts = [
            (
                block,
                write_artifact(Path(name), block, checkpoint.block(block), Format.of(bits)).path,
            )
            for block in range(spec.block_count)
        ]
        # A stage gives only the logits of a prompt's last row. The reference head gives all rows'.
        head = ReferenceModel.from_artifacts(spec, artifacts[-1:])
        options = StageOptions(1, spec.max_context, 1, exact=exact_stages)
        kls, losses, exact = [], [], 0
        with (
            closing(backend.load(spec, artifacts[:-1], options)) as body,
            closing(backend.load(spec, artifacts, options)) as whole,
        ):
            for prompt, answer in questions:
                tokens = np.array(prompt + answer[:-1])
                logits = head.forward(body.forward(0, 0, tokens))
                kls.append(divergences(original.forward(tokens), logits))
                rows = logits[len(prompt) - 1 :]
                chances = rows - np.logaddexp.reduce(rows, axis=1, keepdims=True)
                losses.append(-chances[np.arange(len(answer)), answer])
                said = [int(whole.forward(0, 0, np.array(prompt))[0].argmax())]
                while said[-1] not in spec.eos_tokens and len(said) < NEW_TOKENS:
                    at = len(prompt) + len(said) - 1
                    said.append(int(whole.forward(0, at, np.array(said[-1:]))[0].argmax()))
                exact += said == answer
            counts = list(whole.counts.values()) if isinstance(whole, Int8Stage) else []
    loss = float(np.concatenate(losses).mean())
    result = {
        "backend": backend.probe().backend,
        "version": backend.probe().version,
        "kl": float(np.concatenate(kls).mean()),
        "loss": loss,
        "perplexity": math.exp(loss),
        "exact": exact / len(questions),
    }
    if counts:
        for share, part, all_ in (
            ("saturated", "saturated", "outputs"),
            ("outliers", "outliers", "inputs"),
        ):
            total = sum(getattr(item, all_) for item in counts)
            result[share] = sum(getattr(item, part) for item in counts) / total
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backends", nargs="+", default=["onnx_cpu", "tflite_cpu"])
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--questions", type=int, default=750, metavar="N")
    parser.add_argument("--exact", action="store_true", help="do not round activations")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    checkpoint = Checkpoint.open(TINY_OPT / "model")
    tokenizer = Tokenizer.from_file(str(TINY_OPT / "model" / "tokenizer.json"))
    (eos,) = checkpoint.spec.eos_tokens
    questions = questions_of(TINY_OPT / "dev.json", tokenizer, eos, options.questions)
    original = ReferenceModel.from_checkpoint(checkpoint)
    for name in options.backends:
        result = measure(
            checkpoint,
            backend_class(name)(),
            options.bits,
            questions,
            original,
            exact_stages=options.exact,
        )
        if options.json:
            print(json.dumps(result), flush=True)
            continue
        print(
            f"{result['backend']}: KL {result['kl']:.2e}, loss {result['loss']:.5f},"
            f" perplexity {result['perplexity']:.5f}, exact {result['exact']:.1%}"
            + (
                f"; on the host {result['saturated']:.2%} of outputs, {result['outliers']:.2%} of"
                " inputs"
                if "saturated" in result
                else ""
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
