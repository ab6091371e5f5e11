"""Teams in one process, for tests: members in threads that add up their partial rows."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from backends.base import TeamSum
from model.families import load_spec
from model.share import Share, can_share, mlp_units, share_steps
from model.spec import ModelSpec

Result = TypeVar("Result")
Array = npt.NDArray[Any]

StagePlan = tuple[tuple[str, ...], int, tuple[int, ...]]
"""Devices of a stage, its blocks, and how much of each layer every device has."""

TIMEOUT_S = 120.0


def run_together(members: Sequence[Callable[[TeamSum], Result]]) -> list[Result]:
    """Run members at once, each with its sum over the team, and return their results in order.

    Every member adds the partial rows in the same order. If one fails, all do.
    """
    partials: list[Array | None] = [None] * len(members)
    barrier = threading.Barrier(len(members), timeout=TIMEOUT_S)

    def run(index: int) -> Result:
        def team_sum(partial: Array) -> Array:
            partials[index] = partial.copy()
            barrier.wait()
            total: Array = np.sum([part for part in partials if part is not None], axis=0)
            barrier.wait()  # Nobody overwrites its partial rows before all have read them.
            return total

        try:
            return members[index](team_sum)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(len(members)) as pool:
        return [future.result() for future in [pool.submit(run, i) for i in range(len(members))]]


def shares_of(spec: ModelSpec, weights: Sequence[int], group_size: int = 0) -> list[Share]:
    """Divide a model over members in proportion to ``weights``, each with at least one step."""
    assert can_share(spec)
    steps, layer = share_steps(spec, group_size), spec.layers[0]
    spans = [
        _divide(total, step, weights)
        for total, step in (
            (layer.kv_heads, steps.kv_heads),
            (mlp_units(layer), steps.columns),
            (spec.vocab, steps.vocab),
        )
    ]
    return [Share(*parts) for parts in zip(*spans, strict=True)]


def _divide(total: int, step: int, weights: Sequence[int]) -> list[tuple[int, int]]:
    pieces = -(-total // step)
    assert pieces >= len(weights), f"{total} in steps of {step} is too small for {len(weights)}"
    spare = pieces - len(weights)
    ends = [
        index + 1 + spare * sum(weights[: index + 1]) // sum(weights)
        for index in range(len(weights))
    ]
    cuts = [0, *(min(end * step, total) for end in ends)]
    return list(pairwise(cuts))


def write_plan(directory: Path, model: Path, stages: Sequence[StagePlan], bits: int = 32) -> Path:
    """Write a plan's file, and return its path. All blocks have ``bits``, and sums 32."""
    spec = load_spec(model)
    parts = []
    for names, blocks, weights in stages:
        stage: dict[str, Any] = {"device": names[0], "bits": [bits] * blocks}
        if len(names) > 1:
            spans = [
                {"kv_heads": share.kv_heads, "columns": share.columns, "vocab": share.vocab}
                for share in shares_of(spec, weights)
            ]
            stage["sum_bits"] = 32
            stage["team"] = [
                {"device": name} | {key: end - begin for key, (begin, end) in own.items()}
                for name, own in zip(names, spans, strict=True)
            ]
        parts.append(stage)
    path = directory / "plan.json"
    path.write_text(json.dumps({"shoal_plan": 1, "model": "model", "stages": parts}))
    return path
