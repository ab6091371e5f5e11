"""The cost of cutting layers for a team, and the time of a share, on this machine alone.

    python -m benchmarks.shares                         # Llama-1B, and four layers of Llama-8B
    python -m benchmarks.shares --shapes llama-8b --parts 1 2 3 --threads 4 --json

Stages hold all layers and the head in random weights. `whole` has one session for its layers. `1/1`
is a team of one, whose sum returns its rows: the difference is the cost of the cuts. `1/n` is the
share of one of n equal members, without the time to add up rows. Every round runs each stage in
turn. Reported are medians of rounds, and each stage's time over that of `whole` in the same round.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from backends.base import Backend, Stage, StageOptions, TeamSum
from backends.registry import backend_class
from calibration.layers import random_artifacts
from calibration.shapes import shape_spec
from model.artifact import read_block, store_block
from model.quantize import Format
from model.share import Share, share_spec, share_steps, share_tensors
from model.spec import ModelSpec

Artifacts = list[tuple[int, Path]]

PAST = 32
"""The position of the first decoded token."""


def bench_spec(name: str) -> ModelSpec:
    """Return a shape of calibration/shapes.py, or `llama-8b`: four of its layers, 32,000 tokens."""
    if name != "llama-8b":
        return shape_spec(name)
    small = shape_spec("llama-1b")
    layer = replace(small.layers[0], hidden=4096, head_dim=128, ffn=14336)
    return replace(small, hidden=4096, embed_dim=4096, vocab=32000, layers=(layer,) * 4)


def equal_shares(spec: ModelSpec, members: int, group_size: int) -> list[Share]:
    """Return equal shares, as far as whole steps allow."""
    layer, steps = spec.layers[0], share_steps(spec, group_size)

    def spans(total: int, step: int) -> list[tuple[int, int]]:
        pieces = -(-total // step)
        ends = [min(pieces * member // members * step, total) for member in range(members + 1)]
        return list(pairwise(ends))

    return [
        Share(*parts)
        for parts in zip(
            spans(layer.kv_heads, steps.kv_heads),
            spans(layer.ffn, steps.columns),
            spans(spec.vocab, steps.vocab),
            strict=True,
        )
    ]


def share_artifacts(
    directory: Path, spec: ModelSpec, whole: Artifacts, share: Share, fmt: Format
) -> Iterator[tuple[int, Path]]:
    """Write a share's slices of layers and head."""
    for block, path in whole:
        _, tensors = read_block(path, spec, block)
        sliced = share_tensors(spec, block, tensors, share)
        yield block, store_block(directory, block, sliced, fmt).path


@dataclass(slots=True)
class Trial:
    """A stage under measurement, and its seconds per round: of a token, and of a prompt."""

    name: str
    stage: Stage
    hidden: int
    token_s: list[float] = field(default_factory=list)
    prompt_s: list[float] = field(default_factory=list)

    def round(self, tokens: int, prompt_tokens: int, chunk: int) -> None:
        """Run a prompt in chunks, and then some tokens, of which the median counts."""
        rows = np.random.default_rng(0).standard_normal((chunk, self.hidden), np.float32)
        started_s = time.perf_counter()
        for first in range(0, prompt_tokens, chunk):
            self.stage.forward(0, first, rows[: prompt_tokens - first], logits=False)
        self.prompt_s.append(time.perf_counter() - started_s)
        times_s = []
        for position in range(PAST, PAST + tokens):
            started_s = time.perf_counter()
            self.stage.forward(0, position, rows[:1])
            times_s.append(time.perf_counter() - started_s)
        self.token_s.append(median(times_s))


def measure(
    spec: ModelSpec, backend: Backend, fmt: Format, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return the medians of each stage, the whole one first."""
    blocks = range(1, spec.block_count)
    with TemporaryDirectory(prefix=".shoal-bench-") as name, ExitStack() as stack:
        home = Path(name)
        whole = list(random_artifacts(home, spec, blocks, [fmt] * len(blocks)))
        trials: list[Trial] = []

        def load(
            label: str, own: ModelSpec, artifacts: Artifacts, team_sum: TeamSum | None
        ) -> None:
            most = max(options.prompt, PAST + options.tokens)
            prepared = home / f"prepared-{len(trials)}"
            conditions = StageOptions(
                1, most, options.threads, prepared_dir=prepared, team_sum=team_sum
            )
            stage = stack.enter_context(closing(backend.load(own, artifacts, conditions)))
            trials.append(Trial(label, stage, spec.hidden))

        load("whole", spec, whole, None)
        for members in options.parts:
            share = equal_shares(spec, members, fmt.group_size)[0]
            artifacts = list(share_artifacts(home, spec, whole, share, fmt))
            load(f"1/{members}", share_spec(spec, share), artifacts, lambda partial: partial)
        for _ in range(options.rounds + 1):
            for trial in trials:
                trial.round(options.tokens, options.prompt, options.chunk)
        return [result(trial, trials[0], options.prompt) for trial in trials]


def result(trial: Trial, whole: Trial, prompt_tokens: int) -> dict[str, Any]:
    """Return medians without the first round, which only warms up."""

    def ratio(own: Sequence[float], other: Sequence[float]) -> float:
        return median(a / b for a, b in zip(own[1:], other[1:], strict=True))

    return {
        "stage": trial.name,
        "ms_per_token": 1e3 * median(trial.token_s[1:]),
        "of_whole": ratio(trial.token_s, whole.token_s),
        "prompt_ms_per_token": 1e3 * median(trial.prompt_s[1:]) / prompt_tokens,
        "prompt_of_whole": ratio(trial.prompt_s, whole.prompt_s),
        "stated_bytes": trial.stage.memory_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", default="onnx_cpu")
    parser.add_argument("--shapes", nargs="+", default=["llama-1b", "llama-8b"])
    parser.add_argument("--parts", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=16, help="of a round")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--chunk", type=int, default=64, help="rows of a call")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    backend = backend_class(options.backend)()
    for shape in options.shapes:
        rows = measure(bench_spec(shape), backend, Format.of(options.bits), options)
        if options.json:
            print(json.dumps({"shape": shape, "bits": options.bits, "stages": rows}))
            continue
        table = Table(title=f"{shape}, {options.bits} bits, {options.threads} thread(s)")
        for column in rows[0]:
            table.add_column(column.replace("_", " "), justify="right")
        for row in rows:
            table.add_row(
                *(
                    f"{value:.3f}" if isinstance(value, float) else str(value)
                    for value in row.values()
                )
            )
        Console().print(table)


if __name__ == "__main__":
    main()
