"""How long models take that use the same devices at the same time: one formula for all of planning.

A device runs one pass at a time. Models that have stages on it take turns. So while model m answers
one request, a device that it uses is busy with all of m's passes. Meanwhile each other model k runs
its own requests one after the other. It gets through ``rounds`` of them, one at most, since a pass
of m never waits for more than one pass of k:

    rounds_mk = min(1, T_m / T_k)
    T_m       = max(alone_m + half of the sum over stages of m, on device i, and other models k of
                        rounds_mk x busy_ki,
                    max over devices i that m uses of
                        busy_mi + sum over other models k of rounds_mk x busy_ki)

alone_m is the model's time with all devices to itself, and busy_mi the part of it in which device i
computes. A pass that comes while another model computes waits for half of that pass on average. Two
models that are alone on one device both take the sum. ``settled`` finds the T that fit together.

All models are assumed to answer all the time. It is the worst that users of one model notice of the
others. The formula is linear in what a plan decides, so that a program can minimise it. The times
that users see come from a simulation of the events (``forecast.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from planning.plan import Plan
from planning.problem import BlockOption, PlanningProblem
from planning.prompt import prompt_s, turns
from planning.together import row_s

_ROUNDS = 5000
_CHANGE = 1e-13
WAITED = 0.5
"""The part of another model's pass that a pass waits for, on average."""


@dataclass(frozen=True, slots=True)
class Use:
    """A model's use of devices for one request, in the seconds of its objective.

    ``alone_s``: with all devices to itself. ``busy_s``: computing seconds of each device, by name.
    ``load_s``: the part of the objective for loading blocks, which shares nothing.
    ``leads``: where a pass waits for others: one device of each stage, the lead of a team. Empty
    for throughput, because only the slowest device counts there.
    """

    alone_s: float
    busy_s: Mapping[str, float]
    load_s: float = 0.0
    leads: tuple[str, ...] = ()

    @property
    def value(self) -> float:
        """The objective of the model alone."""
        return self.alone_s + self.load_s


def rounds(own_s: float, other_s: float) -> float:
    """Requests that another model answers during one of this model, one at most."""
    return min(1.0, own_s / other_s) if other_s else 1.0


def at_pace(uses: Sequence[Use], paces_s: Sequence[float]) -> tuple[float, ...]:
    """Seconds of each model's request if all are busy and their requests take about ``paces_s``."""
    found = []
    for m, use in enumerate(uses):
        met_s = {
            name: math.fsum(
                rounds(paces_s[m], paces_s[k]) * other.busy_s.get(name, 0.0)
                for k, other in enumerate(uses)
                if k != m
            )
            for name in use.busy_s
        }
        waited_s = WAITED * math.fsum(met_s[name] for name in use.leads)
        shared = [busy_s + met_s[name] for name, busy_s in use.busy_s.items()]
        found.append(max(use.alone_s + waited_s, *shared, 0.0))
    return tuple(found)


def settled(uses: Sequence[Use]) -> tuple[float, ...]:
    """Seconds of each model's request if all are busy: the paces that ``at_pace`` gives again."""
    paces = tuple(use.alone_s for use in uses)
    for _ in range(_ROUNDS):
        found = at_pace(uses, paces)
        if all(abs(new - old) <= _CHANGE * new for new, old in zip(found, paces, strict=True)):
            break
        paces = tuple((new + old) / 2 for new, old in zip(found, paces, strict=True))
    return paces


def use_of(plan: Plan, chunk_tokens: int) -> Use:
    """The use of devices of a plan whose prompts run in chunks of so many rows.

    Joules do not depend on other models, so for the objective energy no device counts as shared.
    """
    objective = plan.objective
    load_s = objective.migration_weight * plan.load_s
    if objective.kind == "energy":
        return Use(plan.value, {})
    prompt, output = objective.tokens
    rows = min(chunk_tokens, prompt)
    chunks = 1 + turns(prompt, rows) if prompt else 0.0
    alone_s = plan.value - load_s
    if prompt:
        alone_s = prompt_s(plan.passages, prompt, chunk_tokens) + output * plan.decode_s
    busy_s = {}
    for stage in plan.stages:
        if objective.kind == "throughput":
            seconds = stage.compute_s
            if plan.sequences is not None:
                seconds = row_s(seconds, stage.rows_s, plan.sequences, len(plan.stages))
        else:
            seconds = output * stage.compute_s
            if prompt:
                seconds += chunks * stage.passage.busy_s(rows) + stage.passage.delay_s
        busy_s.update(dict.fromkeys(stage.devices, seconds))
    leads = tuple(stage.device for stage in plan.stages)
    return Use(alone_s, busy_s, load_s, () if objective.kind == "throughput" else leads)


def block_busy_s(problem: PlanningProblem, block: int, option: BlockOption) -> float:
    """The block's part of its device's busy seconds, for one size of chunks."""
    kind = problem.objective.kind
    if kind == "energy":
        return 0.0
    if kind == "throughput":
        return problem.turn_s(block, option)
    seconds = problem.objective.tokens[1] * option.decode_s
    if rows := problem.chunk_rows:
        passage = problem.passage(block, option)
        seconds += (1 + problem.turns) * passage.busy_s(rows) + passage.delay_s
    return seconds


def call_busy_s(problem: PlanningProblem, device: int) -> float:
    """The call's part of a stage's busy seconds, for one size of chunks."""
    kind, own = problem.objective.kind, problem.devices[device]
    if kind == "energy":
        return 0.0
    if kind == "throughput":
        return problem.call_turn_s(device)
    seconds = problem.objective.tokens[1] * own.call_s
    if rows := problem.chunk_rows:
        seconds += (1 + problem.turns) * (own.call_s + rows * own.call_row_s)
    return seconds
