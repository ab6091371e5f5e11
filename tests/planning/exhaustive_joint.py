"""Small problems of several models, and every plan of them, tried one after the other.

Nothing here uses the planner's figures of contention or its limits of all models together.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from planning.candidates import with_teams
from planning.joint.problem import JointProblem
from planning.plan import Plan, PlanError, Proof, assess, keeps_budget
from planning.problem import Objective, ObjectiveKind, PlanningProblem
from planning.teams import incidence, refused
from tests.planning.exhaustive_teams import random_teams
from tests.planning.test_planner import random_extras, random_problem


def random_joint(
    seed: int, *, models: int = 2, devices: int = 2, teams: bool = False
) -> JointProblem:
    """Models of a few blocks on the same devices, whose memory is short for all of them."""
    rng = random.Random(f"joint {seed}")
    kinds: list[ObjectiveKind] = ["latency", "request", "throughput", "energy"]
    kind = rng.choice([*kinds, "request", "latency"])
    found: list[PlanningProblem] = []
    at = seed * 1000
    while len(found) < models:
        at += 1
        make = random_extras if rng.random() < 0.5 else random_problem
        one = random_teams(at) if teams else make(at)
        if len(one.devices) != devices or one.spec.block_count > 4:
            continue
        if rng.random() < 0.7:
            one = replace(one, pins={}, excluded=frozenset(), teams=())
        if any(refused(one, team) for team in one.teams):
            continue
        aim = Objective(kind, rng.choice([20, 40, 100]), rng.randint(1, 5), 0.0)
        if kind != "energy" and one.quality_budget is not None and rng.random() < 0.3:
            aim = replace(aim, migration_weight=rng.choice([0.01, 1.0]))
        sequences = rng.choice([None, 2, 5]) if kind == "throughput" else None
        hops = one.hop_formats[:2]
        bits = one.bits[:2]
        found.append(replace(one, objective=aim, hop_formats=hops, bits=bits, sequences=sequences))
    scale = rng.uniform(1.0, 6.0)
    limits = [
        (
            int(scale * max(one.devices[i].memory_bytes for one in found)),
            int(2 * scale * max(one.devices[i].storage_bytes for one in found)),
        )
        for i in range(devices)
    ]
    problems = tuple(
        replace(
            one,
            devices=tuple(
                replace(
                    device,
                    # A chip may hold more layers of one model than of another.
                    memory_bytes=int(memory * rng.choice([1.0, 1.0, 1.0, 0.7])),
                    storage_bytes=storage,
                    watts=device.watts or 3.0,
                )
                for device, (memory, storage) in zip(one.devices, limits, strict=True)
            ),
        )
        for one in found
    )
    names = tuple("ABC"[:models])
    weights = tuple(rng.choice([1.0, 1.0, 2.0, 5.0]) for _ in names)
    return JointProblem(names, problems, weights)


@dataclass(frozen=True)
class Way:
    """One plan of one model: its time alone, and what it takes of each device."""

    alone_s: float
    load_s: float
    busy_s: tuple[float | None, ...]
    """None: the plan does not use the device."""
    memory: tuple[float, ...]
    storage: tuple[float, ...]
    leads: tuple[bool, ...]
    """Whether a stage is on the device, alone or led by it."""

    @property
    def figures(self) -> tuple[float, ...]:
        busy = (-1.0 if seconds is None else seconds for seconds in self.busy_s)
        return (
            self.alone_s + self.load_s,
            self.alone_s,
            *busy,
            *self.memory,
            *self.storage,
            *self.leads,
        )


def plans_of(problem: PlanningProblem) -> Iterator[Plan]:
    """Every plan that keeps the problem's own limits, with the teams that it has as devices."""
    blocks, devices = problem.spec.block_count, list(range(len(problem.devices)))
    members = incidence(problem)
    hops = [form.bits for form in problem.permitted_hops]
    for count in range(1, len(devices) + 1):
        for order in itertools.permutations(devices, count):
            together = members[list(order)].sum(0)
            if together.max() > 1 or not all(together[list(team)].all() for team in problem.teams):
                continue
            for cuts in itertools.combinations(range(1, blocks), count - 1):
                for widths in itertools.product(problem.bits, repeat=blocks):
                    spans = zip(order, (0, *cuts), (*cuts, blocks), strict=True)
                    stages = [(i, first, widths[first:last]) for i, first, last in spans]
                    if stages[0][0] not in problem.real and len(stages[0][2]) == 1:
                        continue  # The embedding is never shared.
                    if not all(
                        problem.allows(i, k, bits)
                        for i, first, own in stages
                        for k, bits in enumerate(own, first)
                    ):
                        continue
                    for sent in itertools.product(hops, repeat=count - 1):
                        try:
                            plan = assess(problem, stages, Proof("", 0.0, 0.0), sent)
                        except PlanError:
                            continue
                        if keeps_budget(plan, problem) and all(
                            one.memory_bytes <= one.memory_limit_bytes
                            and one.storage_bytes <= one.storage_limit_bytes
                            for stage in plan.stages
                            for one in stage.members or (stage,)
                        ):
                            yield plan


def ways_of(problem: PlanningProblem) -> list[Way]:
    """The ways to run a model of which no other is as good in everything."""
    found: dict[tuple[float, ...], Way] = {}
    for plan in plans_of(problem):
        for way in _ways(problem, plan):
            found[way.figures] = way
    kept: list[Way] = []
    for way in sorted(found.values(), key=lambda one: one.figures):
        if not any(
            all(a <= b for a, b in zip(other.figures, way.figures, strict=True)) for other in kept
        ):
            kept.append(way)
    return kept


def _ways(problem: PlanningProblem, plan: Plan) -> Iterator[Way]:
    aim = problem.objective
    real = [problem.devices[i] for i in problem.real]
    of_device = {name: stage for stage in plan.stages for name in stage.devices}
    held = {one.device: one for stage in plan.stages for one in stage.members or (stage,)}
    stages = [of_device.get(device.name) for device in real]
    own = [(held.get(device.name), device) for device in real]
    memory = tuple(0.0 if one is None else one.memory_bytes / d.memory_bytes for one, d in own)
    storage = tuple(
        0.0 if one is None else one.storage_bytes / max(d.storage_bytes, 1) for one, d in own
    )
    leads = tuple(any(stage.device == d.name for stage in plan.stages) for d in real)
    load_s = aim.migration_weight * plan.load_s
    if aim.kind == "energy":
        yield Way(plan.value, 0.0, (None,) * len(stages), memory, storage, leads)
    elif aim.kind == "latency":
        busy = tuple(None if stage is None else stage.compute_s for stage in stages)
        yield Way(plan.decode_s, load_s, busy, memory, storage, leads)
    elif aim.kind == "throughput":
        busy = tuple(None if stage is None else stage.compute_s for stage in stages)
        yield Way(plan.value - load_s, load_s, busy, memory, storage, leads)
    else:
        prompt, output = aim.prompt_tokens, aim.output_tokens
        for rows in {min(64, prompt), min(32, prompt), min(16, prompt)} if prompt else {0}:
            chunks = prompt / rows if prompt else 0.0
            passages = [(one.fixed_s + rows * one.row_s, one.delay_s) for one in plan.passages]
            alone_s = output * plan.decode_s
            if prompt:
                alone_s += sum(a + b for a, b in passages)
                alone_s += (chunks - 1) * max(a for a, _ in passages)
            busy = tuple(
                None
                if stage is None
                else output * stage.compute_s
                + chunks * (stage.passage.fixed_s + rows * stage.passage.row_s)
                + (stage.passage.delay_s if prompt else 0.0)
                for stage in stages
            )
            yield Way(alone_s, load_s, busy, memory, storage, leads)


def exhaustive_at(problem: JointProblem, paces_s: Sequence[float]) -> float:
    """The least mean time of a request at these paces over all plans that fit; inf without any."""
    total = sum(problem.weights)
    best = math.inf
    known = [
        ways_of(with_teams(one)) if plan is None else list(_ways(one, plan))
        for one, plan in zip(problem.problems, problem.fixed, strict=True)
    ]
    for ways in itertools.product(*known):
        devices = range(len(ways[0].memory))
        if any(sum(way.memory[i] for way in ways) > 1 + 1e-12 for i in devices):
            continue
        if any(sum(way.storage[i] for way in ways) > 1 + 1e-12 for i in devices):
            continue
        value = 0.0
        for m, way in enumerate(ways):
            met = [
                sum(
                    (other.busy_s[i] or 0.0) * min(1.0, paces_s[m] / paces_s[k])
                    for k, other in enumerate(ways)
                    if k != m
                )
                for i in devices
            ]
            here = [i for i in devices if way.busy_s[i] is not None]
            seconds = way.alone_s
            if problem.problems[m].objective.kind != "throughput":
                seconds += sum(met[i] for i in here if way.leads[i]) / 2
            seconds = max(seconds, *((way.busy_s[i] or 0.0) + met[i] for i in here), 0.0)
            value += problem.weights[m] / total * (seconds + way.load_s)
        best = min(best, value)
    return best
