"""The predicted times of models that answer at the same time, from a simulation of the events.

Each model answers one request after the other. Chunks of its prompt follow each other through its
stages, then tokens go round one by one. A device runs one pass at a time. Among the stages there
that have a row waiting, the one whose passes took least time is next, as agents do it
(agent/turnstile.py). Passes vary by 5 %, because on real devices nothing stays in step for ever.

The planner's formula (``contention.py``) is linear, so that a program can minimise it. It knows
nothing of the order of passes. Where small and large models share several devices, it is far off.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from dataclasses import dataclass, field

from planning.joint.contention import settled, use_of
from planning.joint.plan import JointPlan
from planning.plan import Plan

_VARIES = 0.05
_REQUESTS = 24
_MOST_EVENTS = 60_000
_MOST_TOKENS = 32
"""More tokens of an answer than this are simulated as this many, and count for more."""


@dataclass(frozen=True, slots=True)
class _Step:
    """One thing that a row or chunk goes through: a stage's pass, or a link."""

    device: int | None
    seconds: float
    delay_s: float = 0.0


@dataclass(slots=True)
class _Model:
    """A model's request: its chunks and tokens with their steps, and how far it is."""

    prompt: list[list[_Step]]
    token: list[_Step]
    tokens: int
    begun_s: float = 0.0
    left: int = 0
    ended: list[tuple[float, float]] = field(default_factory=list)
    """Seconds of each request: of its prompt, and of its tokens."""
    prompted_s: float = 0.0


def simulated_s(plan: JointPlan, *, seed: int = 0) -> tuple[float, ...]:
    """Seconds of a request of each model while all models answer all the time.

    For throughput and energy it is the planner's own figure.
    """
    kind = plan.plans[0].objective.kind
    if kind in ("throughput", "energy") or len(plan.plans) == 1:
        return plan.together_s
    uses = [use_of(one, rows) for one, rows in zip(plan.plans, plan.chunk_tokens, strict=True)]
    shared: dict[str, int] = {}
    for use in uses:
        for name in use.busy_s:
            shared[name] = shared.get(name, 0) + 1
    if max(shared.values(), default=0) < 2:
        return plan.alone_s
    found = _Simulation(plan, seed).run()
    formula = settled(uses)
    return tuple(
        max(formula[m] if seconds is None else seconds, use.alone_s) + use.load_s
        for m, (seconds, use) in enumerate(zip(found, uses, strict=True))
    )


def _places(plan: JointPlan) -> dict[str, int]:
    """A number for each device. All members of a team have one, because their passes are one."""
    found: dict[str, int] = {}
    for one in plan.plans:
        for stage in one.stages:
            old = {found[name] for name in stage.devices if name in found}
            number = min(old, default=len(found))
            for name, known in found.items():
                if known in old:
                    found[name] = number
            found.update(dict.fromkeys(stage.devices, number))
    return found


class _Simulation:
    def __init__(self, plan: JointPlan, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311 - a simulation
        self._number = _places(plan)
        places = range(1 + max(self._number.values()))
        self._models = [
            self._model(one, rows) for one, rows in zip(plan.plans, plan.chunk_tokens, strict=True)
        ]
        self._scale = [one.objective.tokens[1] / max(m.tokens, 1) for one, m in self._pairs(plan)]
        self._waiting: list[list[deque[tuple[list[_Step], int]]]] = [
            [deque() for _ in self._models] for _ in places
        ]
        # Virtual times, as those of agent/turnstile.py: of each stage, and of the running pass.
        self._due_s = [[0.0] * len(self._models) for _ in places]
        self._now_s = [0.0] * len(places)
        self._busy = [False] * len(places)
        self._events: list[tuple[float, int, int, list[_Step], int]] = []
        self._count = 0

    def _pairs(self, plan: JointPlan) -> list[tuple[Plan, _Model]]:
        return list(zip(plan.plans, self._models, strict=True))

    def _model(self, plan: Plan, rows: int) -> _Model:
        prompt, output = plan.objective.tokens
        ways = [*plan.hops, None]
        chunks: list[list[_Step]] = []
        for begin in range(0, prompt, rows or 1) if prompt else ():
            own = min(rows, prompt - begin)
            last = begin + own >= prompt
            steps = []
            for stage, hop in zip(plan.stages, ways, strict=True):
                head_s = stage.passage.delay_s if last else 0.0
                seconds = stage.passage.busy_s(own) + head_s
                steps.append(_Step(self._number[stage.device], seconds))
                if hop is not None:
                    steps.append(_Step(None, hop.passage.busy_s(own), hop.passage.delay_s))
            chunks.append(steps)
        token = []
        for stage, hop in zip(plan.stages, ways, strict=True):
            token.append(_Step(self._number[stage.device], stage.compute_s))
            token.append(_Step(None, plan.return_s if hop is None else hop.seconds))
        return _Model(chunks, token, min(output, _MOST_TOKENS))

    def run(self) -> list[float | None]:
        """Mean seconds of each model's requests; None if too few were simulated."""
        for m in range(len(self._models)):
            self._begin(self._random.uniform(0.0, 1e-3), m)
        while self._events and self._count < _MOST_EVENTS:
            now_s, _, m, steps, at = heapq.heappop(self._events)
            step = steps[at]
            if step.device is not None:
                self._busy[step.device] = False
            # A stage whose next row is there at once may go on, if it has used least time.
            self._go(now_s + step.delay_s, m, steps, at + 1)
            if step.device is not None:
                self._serve(now_s, step.device)
            if all(len(model.ended) >= _REQUESTS for model in self._models):
                break
        return [
            None if len(model.ended) < 4 else self._mean(m, model)
            for m, model in enumerate(self._models)
        ]

    def _mean(self, m: int, model: _Model) -> float:
        counted = model.ended[1:]
        return math.fsum(p + self._scale[m] * t for p, t in counted) / len(counted)

    def _begin(self, now_s: float, m: int) -> None:
        """Start a request: all chunks wait at the first stage, or the first token."""
        model = self._models[m]
        model.begun_s = model.prompted_s = now_s
        model.left = model.tokens
        if not model.prompt:
            self._go(now_s, m, model.token, 0)
        for steps in model.prompt:
            self._go(now_s, m, steps, 0)

    def _go(self, now_s: float, m: int, steps: list[_Step], at: int) -> None:
        """Let a row or chunk enter its next step, or end."""
        if at < len(steps):
            step = steps[at]
            if step.device is None and step.seconds <= 0.0:
                self._go(now_s, m, steps, at + 1)
            elif step.device is None:
                self._end_of(now_s, m, steps, at)
            else:
                due_s = self._due_s[step.device]
                due_s[m] = max(due_s[m], self._now_s[step.device])
                self._waiting[step.device][m].append((steps, at))
                self._serve(now_s, step.device)
            return
        model = self._models[m]
        if steps is model.token:
            model.left -= 1
        elif steps is model.prompt[-1]:
            model.prompted_s = now_s
        else:
            return  # An earlier chunk: nothing waits for it.
        if model.left > 0:
            self._go(now_s, m, model.token, 0)
            return
        model.ended.append((model.prompted_s - model.begun_s, now_s - model.prompted_s))
        self._begin(now_s, m)

    def _serve(self, now_s: float, device: int) -> None:
        """Begin the next pass of a device that is free."""
        queues = self._waiting[device]
        ready = [m for m, queue in enumerate(queues) if queue]
        if self._busy[device] or not ready:
            return
        due_s = self._due_s[device]
        m = min(ready, key=lambda one: (due_s[one], one))
        steps, at = queues[m].popleft()
        self._busy[device] = True
        self._now_s[device] = due_s[m]
        due_s[m] += steps[at].seconds
        self._end_of(now_s, m, steps, at)

    def _end_of(self, now_s: float, m: int, steps: list[_Step], at: int) -> None:
        self._count += 1
        varies = self._random.uniform(1 - _VARIES, 1 + _VARIES)
        event = (now_s + steps[at].seconds * varies, self._count, m, steps, at)
        heapq.heappush(self._events, event)
