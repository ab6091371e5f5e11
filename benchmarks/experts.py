"""Measure a layer with experts beside a dense layer that is as wide as the experts of a token.

    python -m benchmarks.experts [--layers N] [--bits N] [--threads N] [--tokens N] [--json FILE]

The layers have the shape of Qwen3-30B-A3B: hidden 2048, 32 heads of 128, 4 KV heads, 128 experts of
768, of which a token takes 8. The dense ones have an MLP of 6144. Weights are random, in groups of
64. Rows are random, so that each token takes other experts. The two kinds take turns, token by
token. Times are medians over tokens, for one layer. The ratio is the median of those of each turn.

Two layers with experts take 2 GB of memory and 2 GB of disk at 4 bits, and twice that at 8.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from backends.base import Stage, StageOptions
from backends.onnx_cpu import OnnxCpuBackend
from calibration.shapes import shape_spec
from model.artifact import Tensor, store_block
from model.quantize import Format, random_matrix
from model.spec import QUANTIZED_TENSORS, ModelSpec

SHAPE = "qwen3-30b-a3b"
PAST_TOKENS = 32
PROMPT_ROWS = 64

Seconds = dict[str, npt.NDArray[np.float64]]
"""The seconds of each turn, by kind of stage."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    routed = shape(arguments.layers)
    dense = replace(
        routed,
        layers=tuple(replace(one, ffn=one.used_ffn, experts=None) for one in routed.layers),
    )
    with tempfile.TemporaryDirectory() as name:
        stages = {
            kind: load(spec, Path(name) / kind, arguments.threads, arguments.bits)
            for kind, spec in (("experts", routed), ("dense", dense))
        }
        with closing(stages["experts"]), closing(stages["dense"]):
            figures = measure(stages, routed, arguments.tokens)
    results: dict[str, Any] = {
        "shape": SHAPE,
        "layers": arguments.layers,
        "bits": arguments.bits,
        "threads": arguments.threads,
        "load": os.getloadavg()[0],
    }
    for what, seconds in figures.items():
        per_layer = {
            kind: 1e6 * float(np.median(values)) / arguments.layers
            for kind, values in seconds.items()
        }
        ratio = float(np.median(seconds["dense"] / seconds["experts"]))
        results[what] = {**per_layer, "ratio": ratio}
        print(
            f"{what}: experts {per_layer['experts']:.0f} us, dense {per_layer['dense']:.0f} us a "
            f"layer: {ratio:.2f} x the dense layer's speed"
        )
    print(f"load of the machine: {results['load']:.1f}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def shape(layers: int) -> ModelSpec:
    spec = shape_spec(SHAPE)
    return replace(spec, layers=spec.layers[:1] * layers, max_context=512)


def load(spec: ModelSpec, directory: Path, threads: int, bits: int) -> Stage:
    """Return the layers with random weights, mapped as in an agent."""
    random, fmt = np.random.default_rng(0), Format.of(bits)
    (directory / "blocks").mkdir(parents=True)
    artifacts = []
    for block in range(1, spec.head_block):
        tensors = {
            name: random_matrix((dims[0], dims[1]), fmt, random)
            if name in QUANTIZED_TENSORS
            else vector(name, dims, random)
            for name, dims in spec.block_tensors(block).items()
        }
        artifacts.append((block, store_block(directory / "blocks", block, tensors, fmt).path))
    options = StageOptions(
        slots=1, context_tokens=256, threads=threads, prepared_dir=directory / "prepared"
    )
    return OnnxCpuBackend().load(spec, artifacts, options)


def vector(name: str, dims: tuple[int, ...], random: np.random.Generator) -> Tensor:
    if name != "router.weight":
        return np.ones(dims, np.float32)
    scores = random.standard_normal(dims, np.float32)
    scores *= np.float32(dims[1] ** -0.5)
    return scores


def measure(stages: dict[str, Stage], spec: ModelSpec, tokens: int) -> dict[str, Seconds]:
    """Return the seconds of tokens and of prompts' rows, by kind of stage."""
    random = np.random.default_rng(1)
    rows = random.standard_normal((tokens + PAST_TOKENS, spec.hidden), np.float32)
    for stage in stages.values():
        stage.forward(0, 0, rows[:PAST_TOKENS])

    def token(stage: Stage, number: int) -> None:
        stage.forward(0, PAST_TOKENS + number % 64, rows[PAST_TOKENS + number][None])

    def prompt(stage: Stage, number: int) -> None:
        some = np.random.default_rng(number).standard_normal((PROMPT_ROWS, spec.hidden), np.float32)
        stage.forward(0, 0, some)

    return {
        "token": in_turn(stages, token, tokens),
        "prompt row": {
            kind: seconds / PROMPT_ROWS
            for kind, seconds in in_turn(stages, prompt, max(5, tokens // 10)).items()
        },
    }


def in_turn(stages: dict[str, Stage], run: Callable[[Stage, int], None], count: int) -> Seconds:
    seconds: dict[str, list[float]] = {kind: [] for kind in stages}
    for number in range(count):
        for kind, stage in stages.items():
            begun_s = time.perf_counter()
            run(stage, number)
            seconds[kind].append(time.perf_counter() - begun_s)
    return {kind: np.array(some[count // 10 :]) for kind, some in seconds.items()}


if __name__ == "__main__":
    main()
