"""Chooses the best plan by the problem's objective, or says why there is none.

``solve`` depends on the problem alone, apart from the clock. The same problem gives the same plan,
unless the time limit cuts the search short. Of equally good plans it prefers fewer stages, then
widths by loss and bytes (planning.widths), then devices in their given order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from planning import advice
from planning.candidates import with_teams
from planning.exact.program import Aim, Choice, PlanProgram, StageChoice
from planning.exact.solver import Outcome, SolverError, SolverName, default_solver, run
from planning.plan import (
    OPTIMALITY_GAP,
    Advice,
    InfeasiblePlan,
    Plan,
    PlanError,
    Proof,
    assess,
    keeps_budget,
    of_plan,
    verify,
)
from planning.problem import ONE_TOKEN, Device, PlanningProblem
from planning.search.base import NOTHING, PACK_S, Found
from planning.search.packing import pack
from planning.search.search import search
from planning.search.tables import Tables
from planning.shortage import shortage
from planning.teams import incidence, refused
from planning.time_limit import now_s
from planning.twins import are_twins, twin_sets
from planning.usable import Usable
from planning.widths import settle, undominated
from wire.profile import LinkProfile

# Solvers keep each row to about 1e-6 of its limit. If a plan exceeds a limit by this slack, the
# program is solved again with limits lowered by more than the slack.
_LIMIT_MARGIN = 4e-6
# Changing bits "at no cost" may use this share of the objective, far less than OPTIMALITY_GAP.
_FREE = 1e-9
# Half of OPTIMALITY_GAP. Beside a known plan, only plans better by this share are looked for.
_SAME = 5e-7
# With more than SMALL_COUNTS counts, or with a gap allowed, the search goes first. It closes large
# problems sooner, but seldom to nothing. If counts + twice the hops are more than _CLOSED, the
# program closes no gap that the search left. If counts + hops are more than _WRITTEN, writing the
# program takes seconds.
SMALL_COUNTS, _CLOSED, _WRITTEN = 600, 2_000, 15_000
# With more links than this, the search has a part of the time first, whatever the counts. The
# program alone may find no plan in a minute if nearly every device is needed.
_FEW_LINKS, _GLANCE = 240, 0.1
# In place of SMALL_COUNTS, for prompts: the program is slower with the slowest stage in it.
_SMALL_REQUEST = 100
_ALONE_SHARE = {"request": 0.3, "throughput": 0.6}
"""Part of the time for a plan without teams, before a large problem with teams is searched.

Searches for throughput need it most: with teams, 16 devices and more have no good plan in 10 s.
"""
DEFAULT_GAP = 0.005
"""The default gap if the search goes first. The last half percent can take any amount of time."""

# The least budget is looked for so many times, each time on the scale of the last answer.
_BUDGET_ROUNDS = 4

# Advice gets at least this long, even if the search has used up the limit.
_ADVICE_S = 5.0
# The least shortage of each device gets this long if one of all together is proved already.
_SHORTAGE_S = 2.0
# The plan that shows which links are missing may be this far from the best.
_LINKS_GAP = 0.05
_ASSUMED_BYTES_PER_S = 1e9
# With less time than this left, no variant is searched again.
_AGAIN_S = 1.0
# While there is no plan the search gets this long: a slow or busy machine takes longer for one.
_LAST_RESORT_S = 5.0


def solve(
    problem: PlanningProblem,
    *,
    time_limit_s: float = 60.0,
    gap: float | None = None,
    on_progress: Callable[[str], None] | None = None,
    solver: SolverName | None = None,
    advise: bool = True,
) -> Plan:
    """The best plan, verified; at the time limit, the best plan found with its proved gap.

    It may end early with a plan proved to be within ``gap`` (0.01: one percent) of the best. None
    means 0 for small problems, and DEFAULT_GAP for problems where the search goes first.
    ``on_progress`` gets one line per step. ``solver`` None means HiGHS if it is installed, or CBC.
    Raises InfeasiblePlan with advice, or PlanError if no plan was found and none is ruled out.
    Without ``advise`` the former has none, and comes sooner.
    """
    started_s = now_s()
    asked = problem
    report = on_progress or (lambda _: None)
    runner = _Runner(started_s + time_limit_s, solver)
    report(f"planning {problem.spec.block_count} blocks on {len(problem.devices)} devices")
    reason = _hopeless(problem)
    if reason is None:
        problem = with_teams(problem)
        plan = None
        lacking = shortage(problem)
        if lacking is None:
            first = _without_teams(asked, problem, runner, gap)
            plan = _best(undominated(problem), runner, gap, report, first)
        if plan is not None:
            plan = _settled(problem, plan)
            plan = replace(plan, proof=replace(plan.proof, solve_s=now_s() - started_s))
            verify(plan, problem)
            return plan
        if runner.failure is not None:
            raise PlanError(f"no plan found, although one may exist: {runner.failure}")
        if lacking is None and not runner.refused:
            lost = "; ".join(map(str, problem.no_links.values()))
            raise PlanError(
                f"no plan found in {time_limit_s:g} s, although one may exist: allow more time,"
                " or fewer devices" + (f"; links that do not work: {lost}" if lost else "")
            )
    if not advise:
        raise InfeasiblePlan("no plan fits")
    report("no plan fits: looking for what would make one")
    problem = asked
    runner.deadline_s = max(runner.deadline_s, now_s() + _ADVICE_S)
    raise _explain(problem, reason, runner)


def _without_teams(
    real: PlanningProblem, problem: PlanningProblem, runner: _Runner, asked: float | None
) -> Plan | None:
    """A plan of devices alone for a large problem with teams; else None.

    Teams make a search for prompts or throughput slower. With this plan at hand its result is never
    worse. For one token alone the search is quick enough.
    """
    kind = problem.objective.kind
    share = _ALONE_SHARE.get(kind)
    if share is None or problem is real or real.teams or _closable(problem):
        return None
    soon = _Runner(now_s() + share * runner.left_s(), runner.solver)
    return _best(undominated(real), soon, asked, lambda _: None)


def _best(
    problem: PlanningProblem,
    runner: _Runner,
    asked: float | None,
    report: Callable[[str], None],
    known: Plan | None = None,
) -> Plan | None:
    """The best plan found over all variants of the problem; None if none was found.

    Only plans better than ``known`` are looked for, which is returned if there are none.
    """
    gap = (DEFAULT_GAP if counts(problem) > _small(problem) else 0.0) if asked is None else asked
    best = known
    variants = problem.variants
    bounds = [0.0] * len(variants)
    # Variants for which the time did not suffice, as far as is known.
    cut = set(range(len(variants)))
    until_s, refused = runner.deadline_s, True
    before = NOTHING

    def is_open(at: int) -> bool:
        return best is None or bounds[at] < (1 - max(gap, OPTIMALITY_GAP)) * best.value

    for _ in range(2):
        # The time that some variants leave is for those that it did not suffice for.
        waiting = [at for at in sorted(cut) if is_open(at)]
        while waiting:
            if best is not None:
                likely = partial(_is_of, best)
                waiting.sort(key=lambda at: likely(variants[at]), reverse=True)
            at = waiting.pop(0)
            runner.refused = False
            runner.deadline_s = now_s() + max(0.0, until_s - now_s()) / (1 + len(waiting))
            found, proved, before = _best_of(variants[at], runner, gap, report, best, before)
            if runner.left_s() > 0:
                cut.discard(at)
            runner.deadline_s = until_s
            refused = refused and runner.refused
            best = min(
                (one for one in (found, best) if one is not None),
                key=lambda one: one.value,
                default=None,
            )
            bounds[at] = max(bounds[at], proved)
            # Chunks are no limit: if no plan fits with one size of them, none fits with another.
            if best is None and problem.shared_by is None:
                return None
            waiting = [at for at in waiting if is_open(at)]
        if runner.left_s() < _AGAIN_S:
            break
    runner.refused = refused
    if best is None:
        return None
    return replace(best, proof=replace(best.proof, bound=min(*bounds, best.value)))


def _is_of(plan: Plan, variant: PlanningProblem) -> bool:
    """Whether the plan belongs to the variant, by its chunks or its number of stages."""
    if variant.shared_by is None:
        return plan.chunk_tokens(variant.objective.tokens[0]) == variant.chunk_tokens
    return variant.least_stages <= len(plan.stages) <= (variant.most_stages or len(plan.stages))


def _best_of(
    problem: PlanningProblem,
    runner: _Runner,
    gap: float,
    report: Callable[[str], None],
    rival: Plan | None,
    before: Found,
) -> tuple[Plan | None, float, Found]:
    """A plan of a variant, a bound of all its plans, and what the search found.

    Only plans better than ``rival`` count. ``before`` was found for another variant.
    """
    size = counts(problem)
    found = NOTHING
    plan = None
    enough = math.inf if rival is None else rival.value * (1 - max(gap, _SAME))
    large = size > _small(problem) or gap > 0
    if searching := large or len(problem.links) > _FEW_LINKS:
        report("searching")
        share = (0.5 if _closable(problem) else 1.0) if large else _GLANCE
        found = _search(problem, runner, gap, share=share, rival=rival, before=before)
        if found.impossible:
            runner.refused = True
            return None, math.inf, found
        plan = _plan_of(problem, found.choice, Proof("search", 0.0, found.bound))
    bound = found.bound
    least = min((one.value for one in (plan, rival) if one is not None), default=math.inf)
    missing = plan is None and rival is None
    open_ = bound < (1 - gap) * least and (_closable(problem) or not searching)
    if (missing and writable(problem)) or (open_ and runner.left_s() > 0):
        report("solving the integer program")
        exact, exact_bound = _solve(problem, runner, gap, found.choice if plan else None, enough)
        if exact is None and missing and not searching:
            report("the integer program gave no plan: looking for one at hand")
            # Solvers may call a program infeasible wrongly, if its figures are far apart.
            share = 0.0 if runner.refused else 1.0
            found = _search(problem, runner, gap, share=share)
            exact = _plan_of(problem, found.choice, Proof("search", 0.0, 0.0))
            # The search may find plans of other variants. They do not refute the solver.
            own = exact is not None and (problem.shared_by is None or _is_of(exact, problem))
            wrong = runner.refused and own
            exact_bound = found.bound if wrong else max(exact_bound, found.bound)
        bound = max(bound, exact_bound)
        # The search's plan stays, whatever the solver says.
        plan = min(
            (one for one in (exact, plan) if one is not None),
            key=lambda one: one.value,
            default=None,
        )
    return plan, bound, found


def _small(problem: PlanningProblem) -> int:
    """The most counts with which the program is used alone."""
    return _SMALL_REQUEST if problem.objective.tokens[0] else SMALL_COUNTS


def counts(problem: PlanningProblem) -> int:
    """About the number of counts of the integer program: different blocks x devices x widths."""

    def looks(k: int) -> tuple[object, ...]:
        losses = problem.sensitivities[k] if problem.quality_budget is not None else None
        rows = [device.options[k] for device in problem.devices]
        return losses, rows, problem.stored_bytes[k], problem.kv_bytes[k]

    blocks = range(1, problem.spec.block_count)
    distinct = 1 + sum(looks(k) != looks(k - 1) for k in blocks)
    return distinct * len(problem.devices) * len(problem.bits)


def _closable(problem: PlanningProblem) -> bool:
    """Whether the program is small enough to close a gap that the search left."""
    hops = len(problem.links) * len(problem.permitted_hops)
    return counts(problem) + 2 * hops <= _CLOSED


def writable(problem: PlanningProblem) -> bool:
    """Whether the program can be written in little time."""
    hops = len(problem.links) * len(problem.permitted_hops)
    return counts(problem) + hops <= _WRITTEN


def _search(
    problem: PlanningProblem,
    runner: _Runner,
    gap: float,
    *,
    share: float,
    rival: Plan | None = None,
    before: Found = NOTHING,
) -> Found:
    """A choice by search within a share of the time left, and a lower bound of the objective.

    Only plans better than ``rival`` are looked for. ``before`` was found for another variant.
    """
    started_s = now_s()
    deadline_s = started_s + share * runner.left_s()
    # If the search finds no plan, the program may still prove that nothing fits.
    resort_s = (0.5 if writable(problem) else share) * runner.left_s()
    last_resort_s = started_s + max(resort_s, _LAST_RESORT_S) if share else deadline_s
    ties = _ties(problem)
    return search(
        problem,
        deadline_s=deadline_s,
        gap=gap,
        ties=ties,
        last_resort_s=last_resort_s,
        known=math.inf if rival is None else rival.value,
        before=before,
    )


def _ties(problem: PlanningProblem) -> npt.NDArray[np.bool_]:
    """[i, j] is True for real devices i < j that are twins."""
    ties = np.zeros((incidence(problem).shape[1],) * 2, dtype=bool)
    for some in twin_sets(problem):
        for at, i in enumerate(some):
            ties[i, some[at + 1 :]] = True
    return ties


def _solve(
    problem: PlanningProblem,
    runner: _Runner,
    gap: float,
    known: Choice | None,
    cutoff: float = math.inf,
) -> tuple[Plan | None, float]:
    """A plan from the integer program, and a lower bound of the objective.

    ``known`` is a choice that fits: the solver starts with it. Plans with an objective above
    ``cutoff`` are not looked for.
    """
    bound = None
    twins = [pair for some in twin_sets(problem) for pair in pairwise(some)]
    if known is not None:
        known = Choice(_in_order(problem, known.stages), known.hop_bits)
    for margin in (0.0, _LIMIT_MARGIN):
        program = PlanProgram(problem, margin=margin, cutoff=cutoff, twins=twins)
        start = None if known is None else program.values(known)
        outcome = runner.run(program, gap, start)
        if runner.failure is not None and cutoff < math.inf and runner.left_s() > 0:
            # HiGHS was seen to fail because of the cutoff's row: solve without it.
            runner.failure = None
            return _solve(problem, runner, gap, known)
        if bound is None:
            bound = cutoff if runner.refused else min(program.bound(outcome.bound), cutoff)
        choice = program.choice(outcome.values) if outcome.values else None
        plan = _plan_of(problem, choice, Proof(outcome.solver, 0.0, 0.0))
        if plan is not None or choice is None:
            return plan, bound
    return None, bound or 0.0


def _plan_of(problem: PlanningProblem, choice: Choice | None, proof: Proof) -> Plan | None:
    """The plan of a choice; None without a choice, or if the plan breaks a limit."""
    if choice is None:
        return None
    plan = assess(problem, _in_order(problem, choice.stages), proof, choice.hop_bits)
    return plan if _fits(plan) and keeps_budget(plan, problem) else None


def _fits(plan: Plan) -> bool:
    return all(
        one.memory_bytes <= one.memory_limit_bytes and one.storage_bytes <= one.storage_limit_bytes
        for stage in plan.stages
        for one in stage.members or (stage,)
    )


class _Runner:
    """Runs programs until one deadline."""

    def __init__(self, deadline_s: float, solver: SolverName | None) -> None:
        self.deadline_s = deadline_s
        self.solver = solver
        self.refused = False
        """Whether the last problem was proved to have no plan."""
        self.closed = False
        """Whether the last program was solved to its end."""
        self.unsure = False
        """Whether any program ended without an answer."""
        self.failure: str | None = None
        """Why the solver failed; None if it did not."""

    def left_s(self) -> float:
        return max(0.0, self.deadline_s - now_s())

    def run(
        self, program: PlanProgram, gap: float = 0.0, start: Mapping[str, float] | None = None
    ) -> Outcome:
        """The solver's outcome; ``unknown`` if the solver fails."""
        try:
            outcome = run(
                program.program,
                time_limit_s=self.left_s(),
                solver=self.solver,
                gap=gap,
                start=start,
            )
        except SolverError as error:
            self.failure = str(error)
            outcome = Outcome("unknown", self.solver or default_solver())
        self.refused = outcome.status == "infeasible"
        self.closed = outcome.status in ("optimal", "infeasible")
        self.unsure = self.unsure or outcome.status == "unknown"
        return outcome

    def plan(self, problem: PlanningProblem, aim: Aim, gap: float = 0.0) -> Plan | None:
        """A plan for advice; None if none was found in time."""
        if not self.left_s():
            self.unsure = True
            return None
        problem = with_teams(problem)
        if aim in ("any", "best", "sensitivity") and shortage(problem) is not None:
            self.refused = True
            return None
        large = counts(problem) > _small(problem) or len(problem.links) > _FEW_LINKS
        if aim == "any" and large:
            # The search finds some plan of many devices sooner than the solver.
            found = _search(problem, self, gap=0.5, share=0.2)
            plan = _plan_of(problem, found.choice, Proof("search", 0.0, found.bound))
            if plan is not None or found.impossible:
                self.refused = found.impossible
                return plan
        if aim == "sensitivity" and large and (plan := _least_lossy(problem)) is not None:
            return plan
        if not writable(problem) or not self.left_s():
            self.unsure = True
            return None
        program = PlanProgram(problem, aim=aim, margin=_LIMIT_MARGIN)
        outcome = self.run(program, gap)
        if outcome.status not in ("optimal", "feasible"):
            return None
        choice = program.choice(outcome.values)
        return assess(problem, choice.stages, Proof("", 0.0, 0.0), choice.hop_bits)


def _least_lossy(problem: PlanningProblem) -> Plan | None:
    """A plan that loses hardly more than it must, found by counts; None if that finds none."""
    losses = Usable(problem).loss
    most = float(np.where(np.isfinite(losses), losses, 0.0).max((0, 2)).sum())
    problem = replace(problem, quality_budget=min(most, problem.quality_budget or 0.0))
    tables = Tables(problem, _ties(problem))
    walk = pack(tables, limit_s=PACK_S).walk if tables.longest else None
    choice = None if walk is None else tables.choice(walk.spans, walk.chosen, walk.hops)
    return _plan_of(problem, choice, Proof("search", 0.0, 0.0))


def _in_order(problem: PlanningProblem, stages: Sequence[StageChoice]) -> list[StageChoice]:
    """The same stages with twins in their given order. The plan is as fast."""
    if len(problem.real) < len(problem.devices):
        return _teams_in_order(problem, stages)
    order = [device for device, _, _ in stages]
    unused = [i for i in range(len(problem.devices)) if i not in order]
    for position in range(len(order)):
        for other in sorted([*order[position + 1 :], *unused]):
            mine = order[position]
            if other < mine and are_twins(problem, mine, other):
                swap = {mine: other, other: mine}
                order = [swap.get(i, i) for i in order]
                unused = [swap.get(i, i) for i in unused]
                break
    return [(i, first, bits) for i, (_, first, bits) in zip(order, stages, strict=True)]


def _teams_in_order(problem: PlanningProblem, stages: Sequence[StageChoice]) -> list[StageChoice]:
    """Like ``_in_order``, with teams: the twins of a kind are given to stages in their order."""
    members = incidence(problem)
    kinds = {i: kind for kind in twin_sets(problem) for i in kind}
    waiting = {kind[0]: [*kind] for kind in kinds.values()}
    ordered = []
    for device, first, bits in stages:
        own = sorted(np.flatnonzero(members[device]).tolist())
        given = {waiting[kinds[i][0]].pop(0) for i in own}
        ordered.append((_like(problem, members, device, given), first, bits))
    if any(device is None for device, *_ in ordered):
        return list(stages)
    return [(device or 0, first, bits) for device, first, bits in ordered]


def _like(
    problem: PlanningProblem, members: npt.NDArray[np.bool_], device: int, given: set[int]
) -> int | None:
    """The device or team of just these real devices with the figures of ``device``."""
    team = problem.devices[device].team
    for other in np.flatnonzero(members.sum(1) == len(given)).tolist():
        same = problem.devices[other].team
        if set(np.flatnonzero(members[other]).tolist()) != given or (team is None) != (
            same is None
        ):
            continue
        if team is None or same is None:
            return int(other)
        shares, others = (tuple(part.share for part in one.parts) for one in (team, same))
        if shares == others and team.sum_bits == same.sum_bits:
            return int(other)
    return None


def _settled(problem: PlanningProblem, plan: Plan) -> Plan:
    """The plan with the best widths by loss and bytes that cost no time."""
    problem, indices = of_plan(problem, plan)
    stages = [
        (index, stage.first, stage.bits) for index, stage in zip(indices, plan.stages, strict=True)
    ]
    hops = [stage.hop_bits for stage in plan.stages if stage.hop_bits is not None]
    loss = plan.total_sensitivity if problem.quality_budget is not None else None
    free_s = _FREE * plan.value / len(stages)
    settled = assess(problem, settle(problem, stages, loss or 0.0, free_s), plan.proof, hops)
    proof = replace(plan.proof, bound=min(plan.proof.bound, settled.value))
    return replace(settled, proof=proof)


def _hopeless(problem: PlanningProblem) -> str | None:
    """The reason that rules out every plan, whatever the sizes; None if there is none."""
    if not problem.devices:
        return "there are no devices"
    if (against := _contradiction(problem)) is not None:
        return against
    for team in problem.teams:
        if (against := refused(problem, team)) is not None:
            names = ", ".join(problem.devices[i].name for i in team)
            return f"{names} cannot share layers: {against}"
    if problem.teams:
        # Devices of these teams run nothing alone.
        problem = with_teams(problem)
    usable = Usable(problem)
    placed = usable.allowed.any((0, 2))
    for block in np.flatnonzero(~placed).tolist():
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
            runs = "; ".join(
                f"{device.name} runs {_list(device.backend_bits or _widths(device))}"
                for device in problem.devices
            )
            return f"no device can run {name} at {_list(allowed)} bit ({runs})"
        unknown = "unknown watts" if problem.objective.kind == "energy" else ""
        causes = ["the pins", "the exclusions", unknown, "unknown sensitivities"]
        *some, last = [cause for cause in causes if cause]
        return f"{', '.join(some)} or {last} leave no place for {name}"
    least = math.fsum(usable.least.tolist())
    if problem.quality_budget is not None and least > problem.quality_budget:
        return (
            f"the sensitivities add up to {least:.3g} at the best widths asked for,"
            f" above the budget of {problem.quality_budget:g}"
        )
    return None


def _contradiction(problem: PlanningProblem) -> str | None:
    """The pins that cannot be kept, in words, whatever the sizes; None if all can be."""
    block_name = problem.spec.block_name
    pins = sorted(problem.pins.items())
    for block, i in pins:
        device = problem.devices[i]
        pin = f"{block_name(block)} is pinned to {device.name}"
        if i in problem.excluded:
            return f"{pin}, which is excluded"
        if problem.objective.kind == "energy" and device.watts is None:
            continue  # The advice names all devices without watts.
        if not any(option.bits in problem.bits for option in device.options[block]):
            widths = _list([option.bits for option in device.options[block]])
            return f"{pin}, which runs it at {widths} bit, not at {_list(problem.bits)}"
    ended: dict[int, int] = {}
    # A pin to a device of a team that was asked for means the team.
    stands = {i: team[0] for team in problem.teams for i in team}
    pins = [(block, stands.get(i, i)) for block, i in pins]
    for (block, i), (later, j) in pairwise(pins):
        if i != j:
            ended[i] = block
        if i != j and j in ended:
            first, last, between = ended[j], later, problem.devices[i].name
            return (
                f"{block_name(first)} and {block_name(last)} are pinned to"
                f" {problem.devices[j].name}, and {block_name(block)} between them to {between}:"
                " a device has one run of blocks"
            )
    return None


def _explain(problem: PlanningProblem, reason: str | None, runner: _Runner) -> InfeasiblePlan:
    """The error for a problem without a plan. Each advice was tried, its numbers rounded up."""
    if not problem.devices:
        return InfeasiblePlan(f"no plan fits: {reason}: start an agent on one")
    memory: Shortage = ()
    storage: Shortage = ()
    proved = shortage(with_teams(problem)) if reason is None else None
    links: tuple[tuple[int, int], ...] = ()
    soon, closed = runner, False
    if reason is None and proved is None:
        links = _missing_links(problem, runner, problem.no_links)
    # Before the advice, which may take all the time.
    if reason is None and not links:
        # The advice tells more, and needs time too.
        longest_s = runner.left_s() / 2 if proved is None else _SHORTAGE_S
        soon = _Runner(min(runner.deadline_s, now_s() + longest_s), runner.solver)
        memory, storage = _shortage(problem, soon)
        closed = soon.closed  # The advice solves other programs.
        if not closed and proved is not None:
            memory, storage = (), ()  # These are far from the least.
    found = replace(
        _advice(problem, reason, runner, links),
        memory_short_bytes=memory,
        storage_short_bytes=storage,
    )
    if links:
        reason = "; ".join(problem.no_link(*pair) for pair in links)
    ways = _ways(problem, found, links)
    at_most = "" if closed else "at most "
    lacking = [
        f"{kind} is short by {at_most}{_mb(sum(size for _, size in short))} in all"
        for kind, short in (("memory", memory), ("storage", storage))
        if short
    ]
    if lacking:
        reason = " and ".join(lacking)
    elif proved is not None:
        reason = proved
    elif reason is None and not ways and runner.unsure:
        reason = "the time limit passed before a change was found that is enough"
    elif reason is None and not ways and not problem.permitted_hops:
        reason = "no width of hops has a known sensitivity, and no device is enough alone"
    elif reason is None and not ways:
        reason = "no single change of memory, storage, bits or quality is enough; " + (
            "; ".join(map(str, problem.no_links.values())) or _links_to_describe(problem, runner)
        )
    parts = [part for part in (reason, ", or ".join(ways)) if part]
    return InfeasiblePlan("no plan fits: " + ": ".join(parts), found)


def _advice(
    problem: PlanningProblem,
    reason: str | None,
    runner: _Runner,
    links: tuple[tuple[int, int], ...],
) -> Advice:
    """The changes that help. Devices and memory are tried only if nothing else is wrong."""

    def possible(changed: PlanningProblem) -> bool:
        return _hopeless(changed) is None and runner.plan(changed, "any") is not None

    def roomy(changed: PlanningProblem) -> bool:
        if shortage(changed) is None or not runner.left_s():
            return True
        return shortage(with_teams(changed)) is None  # Teams hold layers that devices cannot.

    room = reason is None and not links
    freed = advice.enough_placement(problem, possible)
    return Advice(
        allow_bits=_enough_bits(problem, runner),
        max_weight_error=_enough_error(problem, runner),
        quality_budget=_enough_budget(problem, runner),
        free_placement=freed is None and _placement_is_free(problem, runner),
        free_device=freed,
        free_teams=advice.teams_hinder(problem, possible),
        declare_watts=_watts_to_declare(problem, runner),
        missing_links=tuple((problem.devices[i].name, problem.devices[j].name) for i, j in links),
        whole_memory=advice.enough_memory(problem, possible) if room else None,
        context_tokens=advice.enough_context(problem, possible) if room else None,
        more_devices=advice.enough_devices(problem, possible, roomy) if room else None,
    )


def _ways(problem: PlanningProblem, found: Advice, links: tuple[tuple[int, int], ...]) -> list[str]:
    """The advice in words."""
    ways = []
    if links:
        remedies = " and ".join(problem.no_links[pair].remedy for pair in links)
        fixed = "`shoal agent --port PORT` fixes an agent's port"
        ways.append(f"let {remedies} (firewall, NAT, cable; {fixed})")
    if found.allow_bits is not None:
        # The default budget is for several widths.
        alone = len(problem.bits) == 1 and not problem.spec.encodes
        loose = problem.quality_budget is None and min(problem.max_weight_error) == math.inf
        given = " (with --quality-budget none)" if alone and loose else ""
        ways.append(f"allow {found.allow_bits} bits{given}")
    if found.max_weight_error is not None:
        ways.append(f"raise --max-weight-error to {found.max_weight_error:g}")
    if found.quality_budget is not None:
        ways.append(f"raise the quality budget to {found.quality_budget:g}")
    if found.context_tokens is not None:
        ways.append(f"shorten the context to {found.context_tokens} tokens (of all slots together)")
    if found.free_device is not None:
        ways.append(f"drop {advice.hindrance(problem, found.free_device)} {found.free_device}")
    if found.free_teams:
        ways.append(f"drop {'--no-teams' if problem.no_teams else '--team'}")
    if found.free_placement:
        ways.append("drop the pins and exclusions")
    if found.whole_memory is not None:
        ways.append(
            f"let shoal use more of {found.whole_memory}'s memory (its agent's --memory, other"
            " programs there)"
        )
    if found.declare_watts:
        names = ", ".join(found.declare_watts)
        ways.append(f"declare the watts of {names}: without them no plan for energy uses these")
    if found.more_devices is not None:
        name, count = found.more_devices
        number = "one" if count == 1 else str(count)
        ways.append(f"add {number} more device{'s' * (count > 1)} like {name}")
    return ways


def _links_to_describe(problem: PlanningProblem, runner: _Runner) -> str:
    """A question about links that nobody described, naming some that would be enough."""
    every = itertools.permutations(range(len(problem.devices)), 2)
    links = [problem.no_link(*pair) for pair in _missing_links(problem, runner, every)]
    return ": ".join(["are links missing?", *(["; ".join(links)] if links else [])])


def _missing_links(
    problem: PlanningProblem, runner: _Runner, pairs: Iterable[tuple[int, int]]
) -> tuple[tuple[int, int], ...]:
    """The pairs whose missing links alone rule out every plan; as few as were found.

    Solves again with a link for each of ``pairs``. Each takes longer than the rest of a plan, so
    that the plan uses as few of them as possible.
    """
    unusable = set(problem.excluded)
    if problem.objective.kind == "energy":
        unusable |= {i for i, device in enumerate(problem.devices) if device.watts is None}
    missing = [pair for pair in pairs if pair not in problem.links and not unusable & {*pair}]
    if not missing or not problem.permitted_hops:
        return ()
    slowest_s = math.fsum(
        max(option.decode_s for device in problem.devices for option in device.options[k])
        for k in range(problem.spec.block_count)
    )
    widest = max(form.bits for form in problem.permitted_hops)
    slowest_s += len(problem.devices) * max(
        (problem.hop_s(*pair, widest) for pair in problem.links), default=0
    )
    assumed = {
        (i, j): LinkProfile(
            problem.devices[i].name, problem.devices[j].name, 20 * slowest_s, _ASSUMED_BYTES_PER_S
        )
        for i, j in missing
    }
    linked = replace(
        problem,
        links={**problem.links, **assumed},
        objective=ONE_TOKEN,
        excluded=frozenset(unusable),
    )
    if counts(linked) > SMALL_COUNTS:
        found = _search(linked, runner, _LINKS_GAP, share=0.5)
        plan = _plan_of(linked, found.choice, Proof("search", 0.0, found.bound))
    else:
        soon = _Runner(min(runner.deadline_s, now_s() + _ADVICE_S), runner.solver)
        plan = soon.plan(linked, "best", gap=_LINKS_GAP) or runner.plan(linked, "any")
    if plan is None:
        return ()
    indices = {device.name: index for index, device in enumerate(problem.devices)}
    ring = [indices[stage.device] for stage in plan.stages]
    return tuple(pair for pair in zip(ring, ring[1:] + ring[:1], strict=True) if pair in assumed)


Shortage = tuple[tuple[str, int], ...]


def _shortage(problem: PlanningProblem, runner: _Runner) -> tuple[Shortage, Shortage]:
    """Bytes of memory, else of storage, else of both, that devices lack; the least sum."""
    aims: tuple[Aim, ...] = ("memory", "storage", "memory and storage")
    for aim in aims:
        plan = runner.plan(problem, aim)
        if plan is not None:
            held = [one for stage in plan.stages for one in stage.members or (stage,)]
            memory = [(s.device, s.memory_bytes - s.memory_limit_bytes) for s in held]
            storage = [(s.device, s.storage_bytes - s.storage_limit_bytes) for s in held]
            return (
                tuple((name, _round_up(size)) for name, size in memory if size > 0),
                tuple((name, _round_up(size)) for name, size in storage if size > 0),
            )
    return (), ()


def _enough_bits(problem: PlanningProblem, runner: _Runner) -> int | None:
    """The widest further width that makes a plan possible; None if no width does."""
    known = {bits for device in problem.devices for bits in _widths(device)}
    for bits in sorted(known - set(problem.bits), reverse=True):
        wider = replace(problem, bits=tuple(sorted((*problem.bits, bits))))
        if _hopeless(wider) is None and runner.plan(wider, "any") is not None:
            return bits
    return None


def _enough_error(problem: PlanningProblem, runner: _Runner) -> float | None:
    """The least error bound that makes a plan possible, to three digits; None if none does."""
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
        return _hopeless(eased) is None and runner.plan(eased, "any") is not None

    if not bounds or not possible(bounds[-1]):
        return None
    low, high = 0, len(bounds) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if possible(bounds[middle]) else (middle + 1, high)
    return bounds[low]


def _enough_budget(problem: PlanningProblem, runner: _Runner) -> float | None:
    """The least quality budget that makes a plan possible, to three digits; None if none does."""
    if problem.quality_budget is None:
        return None
    if _hopeless(replace(problem, quality_budget=math.inf)) is not None:
        return None
    total = math.inf
    for _ in range(_BUDGET_ROUNDS):
        # The largest losses set the solver's scale. The least loss may be far below it.
        plan = runner.plan(replace(problem, quality_budget=total), "sensitivity")
        if plan is None or not plan.total_sensitivity or plan.total_sensitivity >= 0.999 * total:
            break
        total = plan.total_sensitivity
    return _three_digits(total) if problem.quality_budget < total < math.inf else None


def _placement_is_free(problem: PlanningProblem, runner: _Runner) -> bool:
    """True if dropping all pins and exclusions makes a plan possible."""
    if not problem.pins and not problem.excluded:
        return False
    free = replace(problem, pins={}, excluded=frozenset())
    return _hopeless(free) is None and runner.plan(free, "any") is not None


def _watts_to_declare(problem: PlanningProblem, runner: _Runner) -> tuple[str, ...]:
    """Devices of unknown watts, if a plan for energy is possible with them; else none."""
    if problem.objective.kind != "energy":
        return ()
    unknown = tuple(device.name for device in problem.devices if device.watts is None)
    devices = tuple(replace(device, watts=device.watts or 1.0) for device in problem.devices)
    known = replace(problem, devices=devices)
    possible = unknown and _hopeless(known) is None and runner.plan(known, "any") is not None
    return unknown if possible else ()


def _three_digits(value: float) -> float:
    """The least number of three digits that is not below ``value``."""
    rounded = float(f"{value:.3g}")
    if rounded >= value:
        return rounded
    return float(f"{value + 10.0 ** (math.floor(math.log10(value)) - 2):.3g}")


def _round_up(size_bytes: int) -> int:
    """The size rounded up to 0.1 MB, as it is printed."""
    return -(-size_bytes // 100_000) * 100_000


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB"


def _widths(device: Device) -> tuple[int, ...]:
    """The widths at which the device can run any block."""
    return tuple(sorted({option.bits for row in device.options for option in row}))


def _list(widths: Sequence[int]) -> str:
    return ", ".join(map(str, widths)) or "nothing"
