"""A model's tokens and prompts on a GPU, beside transformers on the same GPU.

    python -m benchmarks.gpu_peer                          # Llama-1B at 4, 8 and 16 bits
    python -m benchmarks.gpu_peer --shape qwen3-1.7b --bits 16 --json

All have the same shape and random weights. transformers has them in fp16 and runs `generate`. It
does so with its defaults, and with a static cache, for which it compiles the model.
A stage of shoal takes prompts in chunks as an agent does, and chooses each token on the host.

Every round runs each in turn. A continuation less its prompt and first token, divided by its other
tokens, is the time of a token. Ratios are medians over rounds.

`--backend torch_cpu --bits 16` tries this script without a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from backends.base import BackendError, Stage, StageOptions
from backends.registry import backend_class
from benchmarks.gpu_profile import CHUNK, loaded
from calibration.shapes import SHAPES, shape_spec
from model.errors import ModelError

Continue = Callable[[int], None]
"""Runs the prompt and this many tokens, at least one."""

COMPILING_FAILED = (RuntimeError, OSError, ImportError, ValueError, TypeError)
"""The errors of torch's compiler, of a missing C compiler or Triton, and of an unknown cache."""


@dataclass(slots=True)
class Runner:
    """One way to run the model, and its seconds per round."""

    name: str
    run: Continue
    compiles: bool = False
    """Whether it may fail for want of a compiler. Then the others are still compared."""
    prompt_s: list[float] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)

    def round(self, tokens: int) -> None:
        first_s = seconds(self.run, 1)
        self.prompt_s.append(first_s)
        self.token_s.append((seconds(self.run, tokens) - first_s) / (tokens - 1))


def seconds(run: Continue, tokens: int) -> float:
    started_s = time.perf_counter()
    run(tokens)
    return time.perf_counter() - started_s


def stage_runner(name: str, stage: Stage, prompt: np.ndarray[Any, Any]) -> Runner:
    def run(tokens: int) -> None:
        rows = prompt
        for first in range(0, len(prompt), CHUNK):
            last = min(first + CHUNK, len(prompt))
            rows = stage.forward(0, first, prompt[first:last], logits=last == len(prompt))
        for position in range(len(prompt), len(prompt) + tokens - 1):
            rows = stage.forward(0, position, rows[-1:].argmax(axis=-1))
        rows[-1:].argmax(axis=-1)

    return Runner(name, run)


def peer_runners(options: argparse.Namespace, prompt: np.ndarray[Any, Any]) -> list[Runner]:
    """Return transformers with its defaults, and unless ``--eager`` with a static cache."""
    import torch
    import transformers

    fields = dict(SHAPES[options.shape])
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    device = options.backend.removeprefix("torch_")
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float16).eval()
    ids = torch.from_numpy(prompt)[None].to(device)

    def run(tokens: int, **more: Any) -> None:
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=0,
            **more,
        ).cpu()

    name = f"transformers {transformers.__version__}"
    runners = [Runner(f"{name}, defaults", run)]
    if not options.eager:
        runners.append(
            Runner(
                f"{name}, static cache",
                lambda tokens: run(tokens, cache_implementation="static"),
                compiles=True,
            )
        )
    return runners


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the medians of each way to run the model, and ratios to transformers' defaults."""
    spec, backend = shape_spec(options.shape), backend_class(options.backend)()
    prompt = np.random.default_rng(0).integers(0, spec.vocab, options.prompt)
    conditions = StageOptions(1, options.prompt + options.tokens, options.threads)
    with ExitStack() as stack:
        runners = peer_runners(options, prompt)
        for bits in options.bits:
            stage, _ = stack.enter_context(loaded(spec, bits, backend, conditions))
            runners.append(stage_runner(f"shoal, {options.backend}, {bits} bits", stage, prompt))
        for runner in [*runners]:
            print(f"warming up: {runner.name}", file=sys.stderr, flush=True)
            try:
                runner.round(options.tokens)
            except COMPILING_FAILED as error:
                if not runner.compiles:
                    raise
                print(f"left out, {runner.name}: {error!r:.300}", file=sys.stderr, flush=True)
                runners.remove(runner)
            runner.prompt_s.clear()
            runner.token_s.clear()
        for _ in range(options.rounds):
            for runner in runners:
                runner.round(options.tokens)
    return [result(runner, runners[0], options.prompt) for runner in runners]


def result(runner: Runner, other: Runner, prompt_tokens: int) -> dict[str, Any]:
    def ratio(own: Sequence[float], others: Sequence[float]) -> float:
        return median(b / a for a, b in zip(own, others, strict=True))

    return {
        "name": runner.name,
        "token_ms": 1e3 * median(runner.token_s),
        "tokens_per_s_ratio": ratio(runner.token_s, other.token_s),
        "prompt_ms": 1e3 * median(runner.prompt_s),
        "prompt_tokens_per_s": prompt_tokens / median(runner.prompt_s),
        "prompt_ratio": ratio(runner.prompt_s, other.prompt_s),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-1b", metavar="NAME")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--backend", choices=["torch_cuda", "torch_cpu"], default="torch_cuda")
    parser.add_argument("--eager", action="store_true", help="leave out what must be compiled")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of a continuation")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    try:
        results = compare(options)
    except (ModelError, BackendError) as error:
        raise SystemExit(f"error: {error}") from error
    except ImportError as error:
        raise SystemExit(f"error: {error}. This comparison needs torch and transformers") from error
    if options.json:
        print(json.dumps(results, indent=2))
        return
    table = Table(title=f"{options.shape}, a prompt of {options.prompt} tokens, then single ones")
    table.add_column("")
    for title in ("ms/token", "tokens/s", "ratio", "prompt ms", "prompt tokens/s", "ratio"):
        table.add_column(title, justify="right")
    for found in results:
        table.add_row(
            found["name"],
            f"{found['token_ms']:.3f}",
            f"{1e3 / found['token_ms']:.0f}",
            f"{found['tokens_per_s_ratio']:.2f}",
            f"{found['prompt_ms']:.1f}",
            f"{found['prompt_tokens_per_s']:.0f}",
            f"{found['prompt_ratio']:.2f}",
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
