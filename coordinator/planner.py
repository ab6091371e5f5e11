"""Chooses the plan with the fewest seconds per decoded token, or says why there is none.

``solve`` is a function of the problem alone, apart from the clock: the same problem gives the same
plan, unless the time limit cuts the search short. Of equally fast plans it prefers fewer stages,
then wider bits where they cost nothing, then devices in their given order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from coordinator.plan import Advice, InfeasiblePlan, Plan, PlanError, Proof, assess, verify
from coordinator.plan_model import Objective, PlanProgram, StageChoice
from coordinator.plan_search import quick_stages
from coordinator.plan_solver import Outcome, SolverError, SolverName, run
from coordinator.problem import Device, PlanningProblem

# Solvers keep each row to about 1e-6 of its limit; a plan that used this slack is solved again
# with limits lowered by more than it.
_LIMIT_MARGIN = 4e-6
# Raising bits "at no cost" may use this share of the latency, far less than OPTIMALITY_GAP.
_FREE = 1e-9
# Saying what is wrong is worth this much, even when the search has used up the limit.
_ADVICE_S = 5.0


def solve(
    problem: PlanningProblem,
    *,
    time_limit_s: float = 60.0,
    on_progress: Callable[[str], None] | None = None,
    solver: SolverName | None = None,
) -> Plan:
    """The fastest plan, verified; at the time limit, the best one found with its proved gap.

    ``on_progress`` gets one line per step. ``solver`` None takes HiGHS where it is installed.
    Raises InfeasiblePlan with advice, PlanError where the limit passed without any plan.
    """
    started_s = time.monotonic()
    report = on_progress or (lambda _: None)
    runner = _Runner(started_s + time_limit_s, solver)
    report(f"planning {problem.spec.block_count} blocks on {len(problem.devices)} devices")
    reason = _hopeless(problem)
    if reason is None:
        plan = _fastest(problem, runner, report)
        if plan is not None:
            plan = replace(plan, proof=replace(plan.proof, solve_s=time.monotonic() - started_s))
            verify(plan, problem)
            return plan
        if not runner.refused:
            raise PlanError(
                f"no plan found in {time_limit_s:g} s, although one may exist: allow more time,"
                " or fewer devices"
            )
    report("no plan fits: looking for what would make one")
    runner.deadline_s = max(runner.deadline_s, time.monotonic() + _ADVICE_S)
    raise _explain(problem, reason, runner)


def _fastest(
    problem: PlanningProblem, runner: _Runner, report: Callable[[str], None]
) -> Plan | None:
    """The best plan that was found; None where none was."""
    bound_s = None
    for margin in (0.0, _LIMIT_MARGIN):
        program = PlanProgram(problem, margin=margin)
        outcome = runner.run(program)
        if bound_s is None:
            bound_s = program.bound_s(outcome.bound)
        candidates = [program.stages(outcome.values)] if outcome.values else []
        if outcome.status in ("feasible", "unknown"):
            report("the time limit has passed: looking for a plan at hand")
            candidates += [stages for stages in [quick_stages(problem)] if stages]
        proof = Proof(outcome.solver, 0.0, bound_s)
        plans = [assess(problem, _prefer(problem, stages), proof) for stages in candidates]
        best = min(filter(_fits, plans), key=lambda plan: plan.decode_s, default=None)
        if best is not None or not plans:
            return best
    return None


def _fits(plan: Plan) -> bool:
    return all(
        stage.memory_bytes <= stage.memory_limit_bytes
        and stage.storage_bytes <= stage.storage_limit_bytes
        for stage in plan.stages
    )


class _Runner:
    """Runs programs until one deadline."""

    def __init__(self, deadline_s: float, solver: SolverName | None) -> None:
        self.deadline_s = deadline_s
        self.solver = solver
        self.refused = False
        """The last program that ran has no solution."""

    def run(self, program: PlanProgram) -> Outcome:
        left_s = max(0.0, self.deadline_s - time.monotonic())
        try:
            outcome = run(program.program, time_limit_s=left_s, solver=self.solver)
        except SolverError as error:
            raise PlanError(str(error)) from error
        self.refused = outcome.status == "infeasible"
        return outcome

    def stages(self, problem: PlanningProblem, objective: Objective) -> list[StageChoice] | None:
        """Stages for another objective than latency; None where there are none, or no time."""
        program = PlanProgram(problem, objective=objective, margin=_LIMIT_MARGIN)
        outcome = self.run(program)
        found = outcome.status in ("optimal", "feasible")
        return program.stages(outcome.values) if found else None


def _prefer(problem: PlanningProblem, stages: Sequence[StageChoice]) -> list[StageChoice]:
    """The same stages, as fast: devices in their given order, bits as wide as comes for free."""
    order = [device for device, _, _ in stages]
    unused = [i for i in range(len(problem.devices)) if i not in order]
    for position in range(len(order)):
        for other in sorted([*order[position + 1 :], *unused]):
            mine = order[position]
            if other < mine and _twins(problem, mine, other):
                swap = {mine: other, other: mine}
                order = [swap.get(i, i) for i in order]
                unused = [swap.get(i, i) for i in unused]
                break
    chosen = [(i, first, bits) for i, (_, first, bits) in zip(order, stages, strict=True)]
    latency_s = assess(problem, chosen, Proof("", 0.0, 0.0)).decode_s
    return [_raise_bits(problem, stage, _FREE * latency_s / len(chosen)) for stage in chosen]


def _twins(problem: PlanningProblem, i: int, j: int) -> bool:
    """True where exchanging two devices changes no figure of any plan."""
    if replace(problem.devices[i], name="") != replace(problem.devices[j], name=""):
        return False
    swap = {i: j, j: i}
    return all(
        problem.hop_s(a, b) == problem.hop_s(swap.get(a, a), swap.get(b, b))
        and problem.return_s(a, b) == problem.return_s(swap.get(a, a), swap.get(b, b))
        for a in (i, j)
        for b in range(len(problem.devices))
        for a, b in ((a, b), (b, a))
    )


def _raise_bits(problem: PlanningProblem, stage: StageChoice, free_s: float) -> StageChoice:
    """The stage with each block as wide as fits and costs no time; worst errors choose first."""
    index, first, widths = stage
    device = problem.devices[index]
    chosen = dict(enumerate(widths, first))
    used = assess(problem, [stage], Proof("", 0.0, 0.0)).stages[0]
    memory, storage = used.memory_bytes, used.storage_bytes
    for block in sorted(chosen, key=lambda k: (-(problem.weight_error(k, chosen[k]) or 0.0), k)):
        stored = problem.stored_bytes[block]
        options = {option.bits: option for option in device.options[block]}
        now = options[chosen[block]]
        for option in sorted(options.values(), key=lambda option: -option.bits):
            if option.bits <= now.bits:
                break
            cost_s = option.decode_s - now.decode_s
            new_memory = memory + option.executed_bytes - now.executed_bytes
            new_storage = storage + stored[option.bits] - stored[now.bits]
            if (
                option.bits in problem.bits
                and problem.within_error(block, option.bits)
                and cost_s <= free_s
                and new_memory <= device.memory_bytes
                and new_storage <= device.storage_bytes
            ):
                memory, storage, free_s = new_memory, new_storage, free_s - max(0.0, cost_s)
                chosen[block] = option.bits
                break
    return index, first, tuple(chosen[block] for block in sorted(chosen))


def _hopeless(problem: PlanningProblem) -> str | None:
    """What rules out every plan whatever the sizes; None where nothing does."""
    if not problem.devices:
        return "there are no devices"
    runs = "; ".join(
        f"{device.name} runs {_list(device.backend_bits or _widths(device))}"
        for device in problem.devices
    )
    for block in range(problem.spec.block_count):
        name = problem.spec.block_name(block)
        allowed = [bits for bits in problem.bits if problem.within_error(block, bits)]
        if not allowed:
            bound = problem.max_weight_error[block]
            errors = ", ".join(
                f"{bits} bit {error:.3g}"
                for bits, error in sorted(problem.weight_errors[block].items())
            )
            return f"{name} stays within weight error {bound:g} at no width asked for ({errors})"
        if not any(device.option(block, bits) for device in problem.devices for bits in allowed):
            return f"no device can run {name} at {_list(allowed)} bit ({runs})"
    return None


def _explain(problem: PlanningProblem, reason: str | None, runner: _Runner) -> InfeasiblePlan:
    """What would make a plan possible; each way was tried, with its numbers rounded up."""
    if not problem.devices:
        return InfeasiblePlan(f"no plan fits: {reason}: start an agent on one")
    memory, storage = _shortage(problem, runner) if reason is None else ((), ())
    advice = Advice(memory, storage, _enough_bits(problem, runner), _enough_error(problem, runner))
    ways = []
    lacking = [
        f"{kind} is short by {_mb(sum(size for _, size in short))} in all ("
        + ", ".join(f"{name} +{_mb(size)}" for name, size in short)
        + ")"
        for kind, short in (("memory", memory), ("storage", storage))
        if short
    ]
    if lacking:
        ways.append(" and ".join(lacking))
    if advice.allow_bits is not None:
        ways.append(f"allow {advice.allow_bits} bits")
    if advice.max_weight_error is not None:
        ways.append(f"raise --max-weight-error to {advice.max_weight_error:g}")
    if reason is None and not ways:
        reason = (
            "no single change of memory, storage, bits or error bound is enough; are links missing?"
        )
    parts = [part for part in (reason, ", or ".join(ways)) if part]
    return InfeasiblePlan("no plan fits: " + ": ".join(parts), advice)


Shortage = tuple[tuple[str, int], ...]


def _shortage(problem: PlanningProblem, runner: _Runner) -> tuple[Shortage, Shortage]:
    """Bytes of memory, else of storage, else of both, that devices lack; least in all."""
    objectives: tuple[Objective, ...] = ("memory", "storage", "memory and storage")
    for objective in objectives:
        stages = runner.stages(problem, objective)
        if stages is not None:
            plan = assess(problem, stages, Proof("", 0.0, 0.0))
            memory = [(s.device, s.memory_bytes - s.memory_limit_bytes) for s in plan.stages]
            storage = [(s.device, s.storage_bytes - s.storage_limit_bytes) for s in plan.stages]
            return (
                tuple((name, _round_up(size)) for name, size in memory if size > 0),
                tuple((name, _round_up(size)) for name, size in storage if size > 0),
            )
    return (), ()


def _enough_bits(problem: PlanningProblem, runner: _Runner) -> int | None:
    """The widest other width that devices run and that makes a plan possible if also allowed."""
    known = {bits for device in problem.devices for bits in _widths(device)}
    for bits in sorted(known - set(problem.bits), reverse=True):
        wider = replace(problem, bits=tuple(sorted((*problem.bits, bits))))
        if _hopeless(wider) is None and runner.stages(wider, "any") is not None:
            return bits
    return None


def _enough_error(problem: PlanningProblem, runner: _Runner) -> float | None:
    """The least error bound, as three digits, that makes a plan possible."""
    lowest = min(problem.max_weight_error)
    bounds = sorted(
        {
            _three_digits(error)
            for errors in problem.weight_errors
            for bits, error in errors.items()
            if bits in problem.bits and error > lowest
        }
    )

    def possible(bound: float) -> bool:
        raised = tuple(max(bound, old) for old in problem.max_weight_error)
        eased = replace(problem, max_weight_error=raised)
        return _hopeless(eased) is None and runner.stages(eased, "any") is not None

    if not bounds or not possible(bounds[-1]):
        return None
    low, high = 0, len(bounds) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if possible(bounds[middle]) else (middle + 1, high)
    return bounds[low]


def _three_digits(value: float) -> float:
    """The least number of three digits that is not below ``value``."""
    rounded = float(f"{value:.3g}")
    if rounded >= value:
        return rounded
    return float(f"{value + 10.0 ** (math.floor(math.log10(value)) - 2):.3g}")


def _round_up(size_bytes: int) -> int:
    """To the next 0.1 MB, as it is printed."""
    return -(-size_bytes // 100_000) * 100_000


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB"


def _widths(device: Device) -> tuple[int, ...]:
    """The widths that the device has figures for, at any block."""
    return tuple(sorted({option.bits for row in device.options for option in row}))


def _list(widths: Sequence[int]) -> str:
    return ", ".join(map(str, widths)) or "nothing"
