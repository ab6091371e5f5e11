"""A quick search for some good plan, for when the time limit leaves the solver without one.

Partial plans grow from the embedding to the head, a stage at a time. Of those that have come
equally far only the fastest few are kept, so that the result is neither optimal nor certain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from coordinator.plan_model import StageChoice, usable_options
from coordinator.problem import BlockOption, PlanningProblem

_KEPT = 40


@dataclass(frozen=True, slots=True)
class _Partial:
    """Stages up to some block: their seconds with all hops, and the devices they use."""

    seconds: float
    order: tuple[int, ...]
    stages: tuple[StageChoice, ...]


def quick_stages(problem: PlanningProblem) -> list[StageChoice] | None:
    """Stages that respect every limit; None where the search ended in dead ends."""
    total, devices = problem.spec.block_count, range(len(problem.devices))
    segments = {(i, k): _segments(problem, i, k) for i in devices for k in range(total)}
    most = [max(len(segments[i, k]) for k in range(total)) for i in devices]
    reached: list[list[_Partial]] = [[] for _ in range(total + 1)]
    reached[0].append(_Partial(0.0, (), ()))
    for k in range(total):
        for partial in _best(reached[k]):
            for i in devices:
                if i in partial.order:
                    continue
                hop_s = problem.hop_s(partial.order[-1], i) if partial.order else 0.0
                order = (*partial.order, i)
                room = sum(most[j] for j in devices if j not in order)
                for size, (compute_s, bits) in enumerate(segments[i, k], 1):
                    seconds = partial.seconds + hop_s + compute_s
                    if seconds < math.inf and room >= total - k - size:
                        stages = (*partial.stages, (i, k, bits))
                        reached[k + size].append(_Partial(seconds, order, stages))
    ends = [(p.seconds + problem.return_s(p.order[-1], p.order[0]), p) for p in reached[total]]
    seconds, best = min(ends, key=lambda end: (end[0], end[1].order), default=(math.inf, None))
    return list(best.stages) if best is not None and seconds < math.inf else None


def _best(partials: list[_Partial]) -> list[_Partial]:
    """The fastest few, no two of them with the same devices and the same last one."""
    kept: dict[tuple[frozenset[int], int], _Partial] = {}
    for partial in sorted(partials, key=lambda p: (p.seconds, p.order)):
        key = (frozenset(partial.order), partial.order[-1] if partial.order else -1)
        if len(kept) < _KEPT:
            kept.setdefault(key, partial)
    return list(kept.values())


def _segments(
    problem: PlanningProblem, device: int, first: int
) -> list[tuple[float, tuple[int, ...]]]:
    """(seconds, bits) of the stages on ``device`` that begin with ``first``, by length."""
    own = problem.devices[device]
    found: list[tuple[float, tuple[int, ...]]] = []
    chosen: list[BlockOption] = []
    choices: list[tuple[BlockOption, ...]] = []
    for block in range(first, problem.spec.block_count):
        options = usable_options(problem, device, block)
        if not options:
            break
        choices.append(options)
        chosen.append(min(options, key=lambda option: option.decode_s))
        while True:
            over_memory = own.stage_bytes - own.memory_bytes
            over_storage = -own.storage_bytes
            for k, option in enumerate(chosen, first):
                over_memory += option.executed_bytes + problem.kv_bytes[k]
                over_storage += problem.stored_bytes[k][option.bits]
            if over_memory <= 0 and over_storage <= 0:
                break
            swaps = []
            for k, (now, others) in enumerate(zip(chosen, choices, strict=True)):
                stored = problem.stored_bytes[first + k]
                for other in others:
                    memory_saved = now.executed_bytes - other.executed_bytes
                    storage_saved = stored[now.bits] - stored[other.bits]
                    saved = memory_saved if over_memory > 0 else storage_saved
                    if saved > 0 and memory_saved >= 0 and storage_saved >= 0:
                        swaps.append(((other.decode_s - now.decode_s) / saved, k, other))
            if not swaps:
                return found
            _, k, other = min(swaps, key=lambda swap: swap[:2])
            chosen[k] = other
        seconds = own.call_s + math.fsum(option.decode_s for option in chosen)
        found.append((seconds, tuple(option.bits for option in chosen)))
    return found
