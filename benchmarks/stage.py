"""The quality of a backend's real arithmetic, and the cost of layers of several widths.

    python -m benchmarks.stage                      # demo model: loss and exact match, both modes
    python -m benchmarks.stage --bits 4 --groups 64 --questions 100 --json
    python -m benchmarks.stage --layers --bits 4 8  # what rounding does to each layer's result
    python -m benchmarks.stage --mixed llama-1b     # 4, 6, 8 and 16 bits in one stage

Quality: every token of the dev set goes through a stage of the embedded model. Activations are not
    rounded (fp32), or rounded as in serving (packed). If memory has room, prompts also run through
    a coarser copy (bytes). Loss, in nats, is of the answer's tokens and the end of the text, given
    the question. Exact match compares greedy answers as the SQuAD v1.1 script does.

Layers: the relative L2 error of a layer's addition to the hidden states of prompts.

Mixed: seconds per token of stages of one width each, and of one stage with all widths in turn. The
    former predict the latter.
"""

from __future__ import annotations

import argparse
import json
import re
import string
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer

from backends.base import Backend, Stage, StageOptions
from backends.registry import backend_class
from calibration.shapes import shape_spec
from calibration.speed import SpeedOptions, prepared_stage
from model.artifact import write_artifact
from model.checkpoint import Checkpoint
from model.quantize import Format

DEMO = Path(__file__).parents[1] / "examples" / "tiny-opt"
NEW_TOKENS = 8
END = 2
"""The demo model's end-of-text token."""

MIXED_BITS = (4, 6, 8, 16)

MODES: dict[str, dict[str, Any]] = {
    "fp32": {"exact": True},
    "packed": {},
    "bytes": {"memory_bytes": 1 << 40, "fast_prompts": True},
}
"""The options of a stage, by its treatment of activations."""


def questions(count: int) -> list[tuple[str, str]]:
    """Return (prompt, answer) of the dev set, evenly picked."""
    data = json.loads((DEMO / "dev.json").read_text(encoding="utf-8"))
    found = [
        (f"{paragraph['context']} {qa['question']}", qa["answers"][0]["text"])
        for article in data["data"]
        for paragraph in article["paragraphs"]
        for qa in paragraph["qas"]
    ]
    return found[:: max(1, len(found) // count)][:count]


def quality(
    backend: Backend,
    fmt: Format,
    *,
    mode: str,
    asked: Sequence[tuple[str, str]],
) -> dict[str, Any]:
    """Return loss and exact match of the demo model with every block in ``fmt``."""
    checkpoint = Checkpoint.open(DEMO / "model")
    spec = checkpoint.spec
    tokenizer = Tokenizer.from_file(str(DEMO / "model" / "tokenizer.json"))
    options = StageOptions(1, spec.max_context, 1, **MODES[mode])
    loss, count, right = 0.0, 0, 0
    with TemporaryDirectory() as name:
        artifacts = [
            (block, write_artifact(Path(name), block, checkpoint.block(block), fmt).path)
            for block in range(spec.block_count)
        ]
        with closing(backend.load(spec, artifacts, options)) as stage:
            for prompt, answer in asked:
                ids = tokenizer.encode(prompt).ids
                wanted = [*tokenizer.encode(answer).ids, END]
                for token, logits in zip(wanted, forced(stage, ids, wanted), strict=True):
                    loss -= log_probability(logits, token)
                    count += 1
                text = tokenizer.decode(list(greedy(stage, ids)), skip_special_tokens=True)
                right += normalized(text) == normalized(answer)
    return {
        "bits": fmt.bits,
        "group_size": fmt.group_size,
        "mode": mode,
        "loss": loss / count,
        "exact_match": right / len(asked),
    }


def layer_errors(backend: Backend, fmt: Format, prompts: Sequence[str]) -> list[dict[str, Any]]:
    """Return each layer's error per mode, with the exact layers' results as input."""
    checkpoint = Checkpoint.open(DEMO / "model")
    spec = checkpoint.spec
    tokenizer = Tokenizer.from_file(str(DEMO / "model" / "tokenizer.json"))
    inputs = [np.array(tokenizer.encode(prompt).ids) for prompt in prompts]
    found = []
    with TemporaryDirectory() as name:
        for block in range(spec.head_block):
            artifact = write_artifact(Path(name), block, checkpoint.block(block), fmt).path
            outputs = {}
            for mode, chosen in MODES.items():
                options = StageOptions(1, spec.max_context, 1, **chosen)
                with closing(backend.load(spec, [(block, artifact)], options)) as stage:
                    outputs[mode] = [stage.forward(0, 0, rows) for rows in inputs]
            exact = np.concatenate(outputs["fp32"])
            if block:
                row: dict[str, Any] = {"bits": fmt.bits, "layer": block - 1}
                for mode in ("packed", "bytes"):
                    error = np.linalg.norm(np.concatenate(outputs[mode]) - exact)
                    row[mode] = float(error / np.linalg.norm(exact - np.concatenate(inputs)))
                found.append(row)
            inputs = outputs["fp32"]
    return found


def forced(stage: Stage, prompt: Sequence[int], wanted: Sequence[int]) -> Iterator[Any]:
    """Yield the logits before each wanted token."""
    yield stage.forward(0, 0, np.array(prompt))[0]
    for position, token in enumerate(wanted[:-1], len(prompt)):
        yield stage.forward(0, position, np.array([token]))[0]


def greedy(stage: Stage, prompt: Sequence[int]) -> Iterator[int]:
    """Yield the likeliest continuation."""
    rows, position = np.array(prompt), 0
    for _ in range(NEW_TOKENS):
        token = int(stage.forward(0, position, rows)[0].argmax())
        if token == END:
            return
        yield token
        position += len(rows)
        rows = np.array([token])


def log_probability(logits: Any, token: int) -> float:
    """Return the natural logarithm of softmax(logits)[token]."""
    wide = logits.astype(np.float64)
    wide -= wide.max()
    return float(wide[token] - np.log(np.exp(wide).sum()))


def normalized(text: str) -> str:
    """Return text without case, punctuation and articles."""
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def mixed(shape: str, backend: Backend, threads: int, rounds: int) -> dict[str, Any]:
    """Time stages in one width each and one stage with all, interleaved, in seconds per token.

    The mixed stage has embedding and head at the first width, whose time is subtracted.
    """
    spec = shape_spec(shape)
    layers = len(MIXED_BITS) * 2
    spec = replace(spec, layers=spec.layers[:1] * layers, vocab=1024)
    options = SpeedOptions(threads=threads, contexts=(32,), prompt_tokens=64, cached=False)
    formats = [Format.of(bits) for bits in MIXED_BITS]
    times: dict[str, list[float]] = {}
    with ExitStack() as stack:
        trials = {
            str(fmt.bits): stack.enter_context(prepared_stage(spec, [fmt], backend, options))
            for fmt in formats
        }
        trials["mixed"] = stack.enter_context(prepared_stage(spec, formats, backend, options))
        for trial in trials.values():
            trial.prefill()
        for _ in range(rounds):
            for name, trial in trials.items():
                times.setdefault(name, []).append(1 / trial.decode(32))
    own = {name: median(values) for name, values in times.items()}
    predicted = sum(own[str(bits)] for bits in MIXED_BITS) / len(MIXED_BITS)
    return {
        "layers": layers,
        "ms_per_token": {name: 1e3 * seconds for name, seconds in own.items()},
        "mixed_predicted_ms": 1e3 * predicted,
        "mixed_over_predicted": own["mixed"] / predicted,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", default="onnx_cpu")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 5, 6, 8, 16])
    parser.add_argument("--groups", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--questions", type=int, default=750)
    parser.add_argument("--layers", action="store_true", help="measure this instead")
    parser.add_argument("--mixed", metavar="SHAPE", help="measure this instead")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    backend = backend_class(options.backend)()
    if options.mixed:
        print(json.dumps(mixed(options.mixed, backend, options.threads, options.rounds)))
        return
    asked = questions(options.questions)
    if options.layers:
        prompts = [prompt for prompt, _ in asked[:40]]
        for bits in options.bits:
            for row in layer_errors(backend, Format.of(bits), prompts):
                print(json.dumps(row))
        return
    cases = [
        (bits, group, mode)
        for bits in options.bits
        for group in (options.groups if bits < 16 else [0])
        for mode in MODES
        if bits < 16 or mode != "bytes"
    ]
    results = []
    for bits, group, mode in track(cases, console=Console(stderr=True), transient=True):
        fmt = Format.of(bits, "rtn", group or 64)
        results.append(quality(backend, fmt, mode=mode, asked=asked))
    if options.json:
        print(json.dumps(results))
        return
    print("| bits | group | products | loss | exact match |")
    print("| ---: | ---: | --- | ---: | ---: |")
    for row in results:
        print(
            f"| {row['bits']} | {row['group_size'] or '-'} | {row['mode']} | {row['loss']:.2e} "
            f"| {row['exact_match']:.1%} |"
        )


if __name__ == "__main__":
    main()
