"""The rule that says when a model moves to a better plan. It is pure: no clock, no task, no I/O.

A move costs answers a pause, and figures lie now and then. So a better plan is taken only if

- it saves a share of the objective, or it loses much less quality in about the same time, or it is
  what the user asked for, with devices that are back;
- it has been better for a while without a break, so that a toggling link moves nothing;
- the last move is long enough ago;
- what it saves within a while is more than the pause;
- it was not tried before and measured worse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from planning.joint.beside import seconds_beside
from planning.plan import Plan, assess, of_plan
from planning.problem import BlockOption, Device, PlanningProblem

GAIN = 0.15
"""The smallest share of the objective that is worth a move. Predictions are off by as much."""

LOSS_GAIN = 0.2
"""The smallest share of the loss of quality that is worth a move."""

AS_FAST = 1.05
"""A plan with less loss may be slower by this factor."""

STEADY_S = 60.0
"""A plan must have been better for so long. A shorter cause would be over before it paid."""

PAUSE_S = 300.0
"""The time between two moves. Two in ten minutes are the most that anybody should notice."""

HORIZON_S = 600.0
"""A move must save its own pause within this time of answering."""

WORSE = 1.1
"""A move is taken back if tokens take this many times longer than before it."""

REFUSED_S = 1800.0
"""A plan that measured worse is left alone for so long, and for twice as long the next time."""

Key = tuple[Any, ...]
"""The layout of a plan, or of those of all models. Plans with one key are the same to load."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The present plan and another one, both by the present figures.

    now, then: the objective of both, in seconds; for energy in joules. Loading does not count.
    loss_now, loss_then: the KL divergence of both in nats, or None if it is not known.
    move_s: how long answers would pause.
    """

    key: Key
    now: float
    then: float
    loss_now: float | None
    loss_then: float | None
    move_s: float
    is_wished: bool = False
    """Whether the other plan does what the user asked for, and the present one does not."""

    @property
    def gain(self) -> float:
        """The share of the objective that the other plan saves. Negative if it is slower."""
        return 1.0 - self.then / self.now if self.now > 0 else 0.0

    @property
    def loss_gain(self) -> float:
        """The share of the loss that the other plan saves; 0 if a loss is not known."""
        if self.loss_now is None or self.loss_then is None or self.loss_now <= 0:
            return 0.0
        return 1.0 - self.loss_then / self.loss_now

    @property
    def is_better(self) -> bool:
        """Whether it is worth a move, if it lasts."""
        if self.is_wished:
            return True
        is_truer = self.loss_gain >= LOSS_GAIN and self.then <= AS_FAST * self.now
        return self.gain >= GAIN or is_truer


@dataclass(frozen=True, slots=True)
class Refusal:
    """A plan that measured worse than predicted."""

    until_s: float
    times: int


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory of the rule. Seconds are of the monotonic clock."""

    better_since_s: float | None = None
    """Since when each look has found a better plan. None: the last one found none."""
    moved_s: float | None = None
    """When the model was placed anew last, by a move or after a loss. None: never."""
    refused: Mapping[Key, Refusal] = field(default_factory=lambda: MappingProxyType({}))
    failures: int = 0
    """How many moves in a row measured worse than the plan before."""

    @property
    def pause_s(self) -> float:
        """The time between two moves. From the second failure on it doubles with each."""
        return PAUSE_S * 2.0 ** max(self.failures - 1, 0)

    def kept(self) -> Memory:
        """Return the memory after a move was compared, and was no failure."""
        return replace(self, failures=0)

    def moved(self, now_s: float) -> Memory:
        """Return the memory after a move."""
        return replace(self, better_since_s=None, moved_s=now_s)

    def rolled_back(self, key: Key, now_s: float) -> Memory:
        """Return the memory after the plan ``key`` measured worse and was left again."""
        times = self.refused[key].times + 1 if key in self.refused else 1
        refusal = Refusal(now_s + REFUSED_S * 2 ** (times - 1), times)
        refused = MappingProxyType({**self.refused, key: refusal})
        return replace(
            self,
            better_since_s=None,
            moved_s=now_s,
            refused=refused,
            failures=self.failures + 1,
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether to move, and the reason in words."""

    moves: bool
    why: str


def judge(memory: Memory, choice: Choice, now_s: float) -> tuple[Memory, Verdict]:
    """Look at a choice, and return what to remember of the look and whether to move."""
    if not choice.is_better:
        return replace(memory, better_since_s=None), Verdict(False, _not_better(choice))
    since_s = now_s if memory.better_since_s is None else memory.better_since_s
    memory = replace(memory, better_since_s=since_s)
    refusal = memory.refused.get(choice.key)
    if refusal is not None and now_s < refusal.until_s:
        left_s = refusal.until_s - now_s
        return memory, Verdict(False, f"it measured worse before: left alone for {left_s:.0f} s")
    if not choice.is_wished and choice.move_s > HORIZON_S * max(choice.gain, choice.loss_gain):
        why = (
            f"the pause of {choice.move_s:.0f} s is longer than what it saves in {HORIZON_S:.0f} s"
        )
        return memory, Verdict(False, why)
    if now_s - since_s < STEADY_S:
        return memory, Verdict(
            False, f"it has been better for {now_s - since_s:.0f} s, of {STEADY_S:.0f} s"
        )
    if memory.moved_s is not None and now_s - memory.moved_s < memory.pause_s:
        ago_s = now_s - memory.moved_s
        why = f"the last move was {ago_s:.0f} s ago, of {memory.pause_s:.0f} s"
        return memory, Verdict(False, why)
    return memory, Verdict(True, _better(choice))


def judge_alone(choice: Choice) -> Verdict:
    """Judge a choice by itself, as if it had been there for long and nothing had been moved."""
    _, verdict = judge(Memory(better_since_s=-STEADY_S), choice, 0.0)
    return verdict


def is_worse(before_s: float, after_s: float) -> bool:
    """Whether a move is taken back, by the measured seconds of a token before and after it."""
    return after_s > WORSE * before_s


def _better(choice: Choice) -> str:
    if choice.is_wished:
        return "it is what was asked for"
    if choice.gain >= GAIN:
        return f"it saves {choice.gain:.0%} of the predicted time"
    return f"it loses {choice.loss_gain:.0%} less quality in about the same time"


def _not_better(choice: Choice) -> str:
    if choice.gain <= 0:
        return "no plan is better by the present figures"
    return f"it saves only {choice.gain:.0%} of the predicted time, of {GAIN:.0%}"


# ---- what is compared --------------------------------------------------------------------------


def choice_of(
    problem: PlanningProblem,
    present: Plan,
    other: Plan,
    load_s: float = 0.0,
    *,
    is_wished: bool = False,
    others: Sequence[Plan] = (),
    lacks_draft: bool = False,
) -> Choice:
    """Compare the present plan with another one of ``problem``, which has the present figures.

    load_s: how long stages take to load blocks that their devices have.
    is_wished: the present plan is not as the user asked for.
    others: of other models on these devices. What a plan takes of their time counts, too.
    lacks_draft: it has no draft model, which the user asked for, and the other one has room for it.
    Raises PlanError if the present plan needs a device or link that is not there.
    """
    now = revalued(present, problem)
    return Choice(
        other.layout,
        _without_loading(now, others),
        _without_loading(other, others),
        now.total_sensitivity,
        other.total_sensitivity,
        other.load_s + load_s,
        lacks_draft or (is_wished and present.layout != other.layout),
    )


def revalued(plan: Plan, problem: PlanningProblem) -> Plan:
    """Return the same stages with the figures of ``problem``. Raises PlanError."""
    problem, devices = of_plan(problem, plan)
    stages = [
        (device, stage.first, stage.bits)
        for device, stage in zip(devices, plan.stages, strict=True)
    ]
    return assess(problem, stages, plan.proof, [stage.hop_bits for stage in plan.stages[:-1]])


def slowed(problem: PlanningProblem, factors: Mapping[str, float]) -> PlanningProblem:
    """Return the problem with devices that take so many times longer, by their names.

    A running stage tells how long its tokens take. Its blocks are not measured one by one.
    """
    devices = tuple(
        _slowed(device, factors[device.name]) if device.name in factors else device
        for device in problem.devices
    )
    return replace(problem, devices=devices)


def _slowed(device: Device, factor: float) -> Device:
    def slower(option: BlockOption) -> BlockOption:
        return replace(
            option,
            decode_s=option.decode_s * factor,
            prefill_s_per_token=option.prefill_s_per_token * factor,
            rows_s=tuple(factor * seconds for seconds in option.rows_s),
            shares_s=tuple(
                (fraction, *(factor * seconds for seconds in rest))
                for fraction, *rest in option.shares_s
            ),
        )

    options = tuple(tuple(map(slower, row)) for row in device.options)
    return replace(device, options=options)


def _without_loading(plan: Plan, others: Sequence[Plan]) -> float:
    if others and plan.objective.kind != "energy":
        return seconds_beside(plan, others)
    return plan.value - plan.objective.migration_weight * plan.load_s
