"""Compares quantizers at equal bits: what a model loses, how it answers, time and memory.

    python -m benchmarks.quantizers                                the embedded model
    python -m benchmarks.quantizers --model DIR --data FILE --text FILE
    python -m benchmarks.quantizers --layer                        one layer of a 1B model's shape

A model's loss, divergence and answers are those of ``shoal eval``. The text that quantizers look at
is kept apart from the questions: by default it is the built-in one, which is of another kind.

The layer has random heavy-tailed weights (Student's t, 4 degrees of freedom). The rows that enter
it have few directions, and columns of very different sizes, as hidden rows do. The error of its
outputs is measured on rows that no quantizer saw. Time and memory are those of a process of its
own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from model.checkpoint import Checkpoint
from model.quantize import Format, Quantizer
from model.quantizers.blocks import BlockText, prepared_block
from model.quantizers.prepared import quantized
from model.spec import LayerSpec, ModelSpec, RopeSpec

ROOT = Path(__file__).parents[1]
EMBEDDED = ROOT / "examples" / "tiny-opt"
QUANTIZERS: tuple[Quantizer, ...] = ("rtn", "clip", "gptq", "auto")
BITS = (4, 3, 2)
MIB = 1 << 20

LAYER = LayerSpec(
    hidden=2048,
    heads=32,
    kv_heads=8,
    head_dim=64,
    ffn=8192,
    norm="rmsnorm",
    norm_eps=1e-5,
    norm_position="pre",
    activation="silu",
    gated=True,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    rope=RopeSpec(theta=500000.0),
)
"""The shape of a layer of Llama 3.2 1B."""

LENGTH = 128


def layer_spec() -> ModelSpec:
    return ModelSpec(
        vocab=32, hidden=LAYER.hidden, embed_dim=LAYER.hidden, max_context=2048, layers=(LAYER,),
        learned_positions=0, position_offset=0, final_norm=True, tied_head=False, bos_token=None,
        eos_tokens=(),
    )  # fmt: skip


def layer_texts(tokens: int) -> tuple[BlockText, BlockText]:
    """Return a random layer with the rows that are looked at, and with others."""
    random = np.random.default_rng(0)
    spec = layer_spec()
    tensors = {}
    for name, shape in spec.block_tensors(1).items():
        values = random.standard_t(4, shape) if len(shape) == 2 else np.ones(shape)
        scale = 0.7 / shape[-1] ** 0.5 if len(shape) == 2 else 1.0
        tensors[name] = (values * scale).astype(np.float32)
    mixing = random.normal(size=(128, LAYER.hidden)) / 128**0.5
    sizes = random.lognormal(0, 0.7, LAYER.hidden)
    texts = []
    for _ in range(2):
        rows = random.standard_t(5, (tokens, 128)) @ mixing
        rows += 0.5 * random.normal(size=rows.shape)
        lengths = [LENGTH] * (tokens // LENGTH)
        texts.append(BlockText(spec, 1, tensors, (rows * sizes).astype(np.float32), lengths))
    return texts[0], texts[1]


def child(work: Sequence[str]) -> Any:
    """Run this file in a process of its own, and return what it prints as JSON."""
    command = [sys.executable, "-m", "benchmarks.quantizers", "--child", *work]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)  # noqa: S603 - our own command
    return json.loads(done.stdout)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_layer(quantizer: Quantizer, bits: int, tokens: int) -> dict[str, float]:
    text, other = layer_texts(tokens)
    before = peak_bytes()
    started_s = time.perf_counter()
    made = prepared_block(text, Format.of(bits, quantizer), quantizer)
    took_s = time.perf_counter() - started_s
    error = other.error(made) / float(np.square(other.outputs).sum(dtype=np.float64))
    return {"seconds": took_s, "peak": peak_bytes(), "before": before, "error": error}


def measure_making(
    model: Path, quantizer: Quantizer, bits: int, text: Path | None
) -> dict[str, float]:
    with TemporaryDirectory() as name:
        words = None if text is None else text.read_text(encoding="utf-8")
        checkpoint = quantized(Checkpoint.open(model), quantizer, Path(name), words)
        started_s = time.perf_counter()
        for block in range(checkpoint.spec.block_count):
            fmt = checkpoint.format_of(block, Format.of(bits, quantizer))
            checkpoint.block_in(block, fmt)
        return {"seconds": time.perf_counter() - started_s, "peak": peak_bytes()}


def evaluated(options: argparse.Namespace, quantizer: Quantizer, home: Path) -> list[Any]:
    """Return the figures of ``shoal eval`` for each width."""
    command = [
        sys.executable, "-m", "cli", "eval", str(options.model), f"--data={options.data}",
        f"--bits={','.join(map(str, options.bits))}", f"--scheme={quantizer}", "--json",
        f"--questions={options.questions}", "--max-tokens=16",
    ]  # fmt: skip
    if options.data.suffix == ".json":
        command.append("--template={context} {question}")
    if options.text is not None:
        command.append(f"--scheme-text={options.text}")
    environment = {**os.environ, "HOME": str(home), "XDG_STATE_HOME": str(home)}
    done = subprocess.run(  # noqa: S603 - our own command
        command, check=True, capture_output=True, text=True, cwd=ROOT, env=environment
    )
    return [run["figures"] for run in json.loads(done.stdout)["runs"]]


def models(options: argparse.Namespace) -> None:
    print("| bits | quantizer | loss | KL | of rtn's KL | exact match | seconds | peak MiB |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    with TemporaryDirectory() as name:
        found = {one: evaluated(options, one, Path(name)) for one in QUANTIZERS}
    for index, bits in enumerate(options.bits):
        for quantizer in QUANTIZERS:
            figures = {key: one["value"] for key, one in found[quantizer][index].items()}
            text = [] if options.text is None else [f"--text={options.text}"]
            work = [f"--model={options.model}", quantizer, str(bits), *text]
            cost = child(work)
            part = figures["kl"] / found["rtn"][index]["kl"]["value"]
            match = figures.get("exact_match", float("nan"))
            print(
                f"| {bits} | {quantizer} | {figures['loss']:.4g} | {figures['kl']:.3g} | "
                f"{100 * part:.0f} % | {match:.1f} | {cost['seconds']:.1f} | "
                f"{cost['peak'] / MIB:.0f} |",
                flush=True,
            )


def layers(options: argparse.Namespace) -> None:
    print("| bits | quantizer | error of outputs | of rtn's | seconds a layer | peak MiB |")
    print("| ---: | --- | ---: | ---: | ---: | ---: |")
    for bits in options.bits:
        least = 0.0
        for quantizer in QUANTIZERS:
            found = child(["--layer", quantizer, str(bits), f"--tokens={options.tokens}"])
            least = least or found["error"]
            print(
                f"| {bits} | {quantizer} | {found['error']:.4f} | "
                f"{100 * found['error'] / least:.0f} % | {found['seconds']:.1f} | "
                f"{found['peak'] / MIB:.0f} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=EMBEDDED / "model")
    parser.add_argument("--data", type=Path, default=EMBEDDED / "dev.json")
    parser.add_argument("--text", type=Path, help="what quantizers look at")
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--bits", type=int, nargs="+", default=BITS)
    parser.add_argument("--layer", action="store_true", help="measure a layer, not a model")
    parser.add_argument("--tokens", type=int, default=2048, help="rows of the layer")
    parser.add_argument("--child", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("job", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        quantizer, bits = [*options.child, *options.job][:2]
        if options.layer:
            answer = measure_layer(quantizer, int(bits), options.tokens)
        else:
            answer = measure_making(options.model, quantizer, int(bits), options.text)
        print(json.dumps(answer))
    elif options.layer:
        layers(options)
    else:
        models(options)


if __name__ == "__main__":
    main()
