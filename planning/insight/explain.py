"""Why a plan is as it is: where a token's time goes, and how much each change would help.

Each change is solved for again. Nothing is extrapolated.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from planning import advice
from planning.insight.team import and_text, no_team_text, team_views
from planning.plan import InfeasiblePlan, Plan, PlanError, combined_if_known, of_plan
from planning.planner import solve
from planning.problem import BlockOption, PlanningProblem
from planning.time_limit import now_s

MORE_MEMORY_BYTES = 1 << 30
FAST_LINK_BYTES_PER_S = 125e6
FAST_LINK_RTT_S = 0.0005
"""Wired gigabit Ethernet between two small computers. A link that is better in one of the two
figures keeps it."""

_SAME = 2e-6
"""Twice OPTIMALITY_GAP."""

OTHERS = "all others"
"""The subject of changes that are made at once at all places the plan does not use."""

Kind = Literal["memory", "link", "drop", "quality", "device", "teams"]
MarginalProof = Literal["exact", "bound", "found"]
Solve = Callable[[PlanningProblem, float], Plan]

_RESTRICTIONS = ("drop", "teams")
"""Changes with which no plan is better than before."""

_UNITS = {
    "latency": "ms/token",
    "throughput": "time between tokens of the full pipeline",
    "request": "s/request",
    "energy": "J/token",
}


@dataclass(frozen=True, slots=True)
class StageView:
    """One stage's predicted part in a token, and its use of the device.

    ``members``: the devices of a team, the lead first; empty if ``device`` is alone.
    ``sums_s``: the part of ``compute_s`` that the team's sums take.
    ``hop_s``: the hop to the next stage at ``hop_bits``; for the last stage the token's way back,
    with ``hop_bits`` None.
    ``energy_j``: declared watts times predicted seconds.
    ``sensitivity``: KL divergence that the blocks add.
    Errors, sensitivity and energy are None if they are not known.
    """

    device: str
    first: int
    last: int
    bits: tuple[int, ...]
    compute_s: float
    hop_s: float
    share: float
    """Share of the token's time, the hop included; 0 to 1."""
    memory_bytes: int
    memory_limit_bytes: int
    worst_weight_error: float | None
    sensitivity: float | None
    energy_j: float | None
    hop_bits: int | None
    members: tuple[str, ...] = ()
    sums_s: float = 0.0

    @property
    def name(self) -> str:
        """The device, or all members of the team."""
        return " + ".join(self.members) or self.device


@dataclass(frozen=True, slots=True)
class Marginal:
    """The effect of one change on the objective. ``after`` None: no plan fits any more.

    ``subject``: the device or pair that is changed, or several at once (``OTHERS``).
    ``solved`` False: true without solving, because the plan does not use the dropped device.
    ``proof``: how certain the difference is.
    ``exact``: both plans are optimal.
    ``bound``: only the present plan is optimal. The change gains at least, or costs at most, the
    difference.
    ``found``: neither is known to be optimal. It is the difference of the plans that were found.
    """

    kind: Kind
    subject: str
    unit: str
    before: float
    after: float | None
    proof: MarginalProof
    solved: bool = True

    @property
    def what(self) -> str:
        """The change in words."""
        return change_text(self.kind, self.subject)

    @property
    def change(self) -> float | None:
        """Relative change of the objective; None if no plan fits any more."""
        if self.after is None:
            return None
        change = self.after / self.before - 1
        return 0.0 if abs(change) <= _SAME else change

    @property
    def nothing(self) -> str:
        """A sentence for a change that made no difference."""
        if self.proof == "exact":
            return "changes nothing"
        if self.kind in _RESTRICTIONS:
            return "as good a plan was found"
        return "no better plan was found"

    def __str__(self) -> str:
        """The change and its effect in one line."""
        change = self.change
        if change is None:
            return f"{self.what}: no plan fits any more"
        if change == 0.0:
            return f"{self.what}: {self.nothing}"
        limit = {
            "exact": "",
            "bound": " or more" if change < 0 else " at most",
            "found": " between the plans found",
        }[self.proof]
        size = f"{100 * change:+.1f}"
        if abs(change) < 0.0005:
            size = f"less than {'-' if change < 0 else '+'}0.1"
        return f"{self.what}: {size} % {self.unit}{limit}"


def change_text(kind: Kind, subject: str) -> str:
    """A change in words."""
    if kind == "memory":
        return f"{MORE_MEMORY_BYTES >> 30} GiB more on {subject}"
    if kind == "drop":
        return f"dropping {subject}"
    if kind == "teams":
        return f"{subject} sharing no layers"
    if kind == "device":
        return f"one more device like {subject}"
    if kind == "quality":
        return f"{subject} losing no more quality than the others at equal bits"
    ends = f"between {subject}" if subject == OTHERS else subject
    return f"a 1 Gbit/s, {FAST_LINK_RTT_S * 1e3:g} ms link {ends}"


@dataclass(frozen=True, slots=True)
class Explanation:
    """The analysis of a plan. ``complete`` is False if the time limit ended the trials."""

    stages: tuple[StageView, ...]
    bottleneck: str
    pipeline_bottleneck: str
    prompt_bottleneck: str
    """Empty if the objective has no prompt."""
    marginals: tuple[Marginal, ...]
    complete: bool
    teams: tuple[str, ...] = ()
    """A line for each team: what sharing gains. Without a team, one line says why."""

    def to_dict(self) -> dict[str, Any]:
        """The explanation as plain values for JSON, each marginal with its line."""
        plain = asdict(self)
        for values, marginal in zip(plain["marginals"], self.marginals, strict=True):
            values |= {"what": marginal.what, "change": marginal.change, "text": str(marginal)}
        return plain


def explain(
    plan: Plan,
    problem: PlanningProblem,
    *,
    time_limit_s: float = 30.0,
    solve_limit_s: float = 5.0,
    solve_again: Solve | None = None,
    on_trial: Callable[[str, int, int], None] = lambda what, done, total: None,
    now_s: Callable[[], float] = now_s,
) -> Explanation:
    """Analyse ``plan``, and try changes until ``time_limit_s`` is over, the likeliest first.

    ``solve_again`` takes a problem and a limit in seconds (None: the planner).
    ``on_trial`` gets the change that is tried, the number of trials done, and their total.
    """
    again = solve_again or (lambda changed, limit_s: solve(changed, time_limit_s=limit_s))
    deadline_s = now_s() + time_limit_s
    trials = deque(_trials(plan, problem))
    marginals: list[Marginal] = []
    done = 0
    complete = True
    while trials:
        left_s = deadline_s - now_s()
        if left_s <= 0:
            complete = False
            break
        trial = trials.popleft()
        on_trial(change_text(trial.kind, trial.subject), done, done + len(trials) + 1)
        found, marginal = _tried(plan, trial, again, min(left_s, solve_limit_s))
        done += 1
        if marginal is None:
            complete = False
        elif trial.subject == OTHERS and marginal.change != 0.0 and found is not None:
            trials.extend(_parts(trial.kind, plan, problem, found))
        else:
            marginals.append(marginal)
    on_trial("", done, done)
    used = {name for stage in plan.stages for name in stage.devices}
    unit = _UNITS[plan.objective.kind]
    marginals += [
        # Without an unused device the plan stays possible, and no better plan appears.
        Marginal("drop", device.name, unit, plan.value, plan.value, "exact", False)
        for index, device in enumerate(problem.devices)
        if device.name not in used and index not in problem.excluded
    ]
    views = _stage_views(plan, problem)
    why_none = no_team_text(plan, problem)
    return Explanation(
        views,
        _bottleneck(plan),
        _pipeline_bottleneck(views),
        _prompt_bottleneck(plan),
        tuple(marginals),
        complete,
        (why_none,) if why_none else tuple(map(str, team_views(plan, problem))),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Trial:
    kind: Kind
    subject: str
    problem: PlanningProblem


def _tried(
    plan: Plan, trial: _Trial, again: Solve, limit_s: float
) -> tuple[Plan | None, Marginal | None]:
    """The changed problem's plan and the effect of the change; None if time ended first."""
    before, unit = plan.value, _UNITS[plan.objective.kind]
    try:
        better = again(trial.problem, limit_s)
    except InfeasiblePlan:
        return None, Marginal(trial.kind, trial.subject, unit, before, None, "exact")
    except PlanError:
        return None, None
    after = better.value
    if trial.kind not in _RESTRICTIONS:
        # The present plan still fits, although a search that was cut short may miss it.
        after = min(after, before)
    # A restriction makes no plan better than the old optimum, so an equal plan is optimal too.
    equal = trial.kind in _RESTRICTIONS and after <= before * (1 + _SAME)
    proof: MarginalProof = "found"
    if plan.proven_optimal:
        proof = "exact" if better.proven_optimal or equal else "bound"
    return better, Marginal(trial.kind, trial.subject, unit, before, after, proof)


def _trials(plan: Plan, problem: PlanningProblem) -> Iterator[_Trial]:
    """Each change at the plan's own stages and hops, then all changes elsewhere at once.

    If they do nothing together, no single one of them does anything.
    """
    used = _used(plan, problem)
    sharing = [stage.devices for stage in plan.stages if stage.members]
    if sharing:
        apart = replace(problem, teams=(), no_teams=True)
        yield _Trial("teams", and_text(tuple(itertools.chain(*sharing))), apart)
    for index in used:
        yield _more_memory(problem, [index], problem.devices[index].name)
    own = _hop_pairs(plan, problem)
    for pair in own:
        yield from _faster_links(problem, [pair], _pair_name(problem, pair))
    # The slowest link of a team counts, so all of them change together.
    for members in _teams(plan, problem):
        pairs = list(itertools.combinations(members, 2))
        names = (problem.devices[index].name for index in members)
        yield from _faster_links(problem, pairs, " <-> ".join(names))
        own += pairs
    for index in used:
        yield _Trial("drop", problem.devices[index].name, _without(problem, index))
    for index in advice.kinds(problem):
        if index in used:
            subject = problem.devices[index].name
            yield _Trial("device", subject, advice.with_more(problem, index))
    yield from _no_own_losses(problem)
    places = range(len(problem.devices))
    met = {frozenset(pair) for pair in own}
    others = [pair for pair in itertools.combinations(places, 2) if frozenset(pair) not in met]
    yield from _faster_links(problem, others, OTHERS)
    unused = [index for index in places if index not in used]
    if unused:
        yield _more_memory(problem, unused, OTHERS)


def _parts(kind: Kind, plan: Plan, problem: PlanningProblem, better: Plan) -> Iterator[_Trial]:
    """The single changes that the better plan uses, out of those made everywhere at once."""
    if kind == "memory":
        for index in _used(better, problem):
            if index not in _used(plan, problem):
                yield _more_memory(problem, [index], problem.devices[index].name)
    else:
        met = {frozenset(pair) for pair in _link_pairs(plan, problem)}
        for pair in _link_pairs(better, problem):
            if frozenset(pair) not in met:
                yield from _faster_links(problem, [pair], _pair_name(problem, pair))


def _used(plan: Plan, problem: PlanningProblem) -> list[int]:
    """All devices of the plan, members of teams too."""
    return [_index(problem, name) for stage in plan.stages for name in stage.devices]


def _index(problem: PlanningProblem, name: str) -> int:
    return next(index for index, device in enumerate(problem.devices) if device.name == name)


def _teams(plan: Plan, problem: PlanningProblem) -> list[tuple[int, ...]]:
    """The members of each team, without the stages of single devices."""
    return [
        tuple(_index(problem, name) for name in stage.devices)
        for stage in plan.stages
        if stage.members
    ]


def _hop_pairs(plan: Plan, problem: PlanningProblem) -> list[tuple[int, int]]:
    """The pairs of devices that a token passes between, each once, its way back included."""
    used = [_index(problem, stage.device) for stage in plan.stages]
    pairs: list[tuple[int, int]] = []
    for pair in zip(used, used[1:] + used[:1], strict=True):
        if pair[0] != pair[1] and pair not in pairs and pair[::-1] not in pairs:
            pairs.append(pair)
    return pairs


def _link_pairs(plan: Plan, problem: PlanningProblem) -> list[tuple[int, int]]:
    """The pairs of devices whose links the plan uses, for hops or for sums."""
    sums = (itertools.combinations(members, 2) for members in _teams(plan, problem))
    return [*_hop_pairs(plan, problem), *itertools.chain(*sums)]


def _pair_name(problem: PlanningProblem, pair: tuple[int, int]) -> str:
    return f"{problem.devices[pair[0]].name} <-> {problem.devices[pair[1]].name}"


def _more_memory(problem: PlanningProblem, which: Sequence[int], subject: str) -> _Trial:
    devices = list(problem.devices)
    for index in which:
        more = devices[index].memory_bytes + MORE_MEMORY_BYTES
        devices[index] = replace(devices[index], memory_bytes=more)
    return _Trial("memory", subject, replace(problem, devices=tuple(devices)))


def _without(problem: PlanningProblem, index: int) -> PlanningProblem:
    """The problem without a device, and without the wishes for teams with it."""
    teams = tuple(team for team in problem.teams if index not in team)
    return replace(problem, excluded=problem.excluded | {index}, teams=teams)


def _no_own_losses(problem: PlanningProblem) -> Iterator[_Trial]:
    """Trials without the losses that a device's arithmetic adds; none without a budget."""

    def relieved(option: BlockOption, common: Mapping[int, float]) -> BlockOption:
        own, block = option.sensitivity, common.get(option.bits)
        worse = own is not None and block is not None and own > block
        return replace(option, sensitivity=None) if worse else option

    if problem.quality_budget is None:
        return
    for index, device in enumerate(problem.devices):
        options = tuple(
            tuple(relieved(option, common) for option in row)
            for row, common in zip(device.options, problem.sensitivities, strict=True)
        )
        if options != device.options and index not in problem.excluded:
            devices = list(problem.devices)
            devices[index] = replace(device, options=options)
            yield _Trial("quality", device.name, replace(problem, devices=tuple(devices)))


def _faster_links(
    problem: PlanningProblem, pairs: Sequence[tuple[int, int]], subject: str
) -> Iterator[_Trial]:
    """A trial with gigabit links both ways in place of slower ones; none if no link is slower."""
    links = dict(problem.links)
    slower = False
    for i, j in pairs:
        for way in ((i, j), (j, i)):
            link = links.get(way)
            if link is None:
                continue
            # A link that is nearly as fast is not worth solving for.
            slower |= (
                link.bytes_per_s < 0.7 * FAST_LINK_BYTES_PER_S or link.rtt_s > 1.2 * FAST_LINK_RTT_S
            )
            links[way] = replace(
                link,
                rtt_s=min(link.rtt_s, FAST_LINK_RTT_S),
                bytes_per_s=max(link.bytes_per_s, FAST_LINK_BYTES_PER_S),
            )
    if slower:
        yield _Trial("link", subject, replace(problem, links=links))


def _stage_views(plan: Plan, problem: PlanningProblem) -> tuple[StageView, ...]:
    ways = [hop.seconds for hop in plan.hops] + [plan.return_s]
    views = []
    problem, indices = of_plan(problem, plan)
    for index, stage, way_s in zip(indices, plan.stages, ways, strict=True):
        placed = list(enumerate(stage.bits, stage.first))
        errors = [problem.weight_error(*place) for place in placed]
        losses = [problem.sensitivity(index, *place) for place in placed]
        views.append(
            StageView(
                device=stage.device,
                first=stage.first,
                last=stage.last,
                bits=stage.bits,
                compute_s=stage.compute_s,
                hop_s=way_s,
                share=(stage.compute_s + way_s) / plan.decode_s,
                memory_bytes=stage.memory_bytes,
                memory_limit_bytes=stage.memory_limit_bytes,
                worst_weight_error=combined_if_known(max, errors),
                sensitivity=combined_if_known(math.fsum, losses),
                energy_j=stage.energy_j,
                hop_bits=stage.hop_bits,
                members=stage.devices if stage.members else (),
                sums_s=stage.sums_s,
            )
        )
    return tuple(views)


def _bottleneck(plan: Plan) -> str:
    """A sentence on the largest part of a token's time."""
    parts = []
    for stage in plan.stages:
        names = and_text(stage.devices)
        parts.append((stage.compute_s - stage.sums_s, f"computing on {names}"))
        if stage.members:
            parts.append((stage.sums_s, f"the sums of {names}"))
    parts += [(hop.seconds, f"the hop {hop.source} -> {hop.target}") for hop in plan.hops]
    if plan.hops:
        ends = plan.stages[-1].device, plan.stages[0].device
        parts.append((plan.return_s, f"the token's way back {ends[0]} -> {ends[1]}"))
    seconds, what = max(parts, key=lambda part: part[0])
    return f"{what}: {100 * seconds / plan.decode_s:.0f} % of a token's predicted time"


def _pipeline_bottleneck(views: tuple[StageView, ...]) -> str:
    """A sentence on the stage that limits the tokens per second of several sequences."""
    slowest = max(views, key=lambda view: view.compute_s + view.hop_s)
    busy_s = slowest.compute_s + slowest.hop_s
    return (
        f"{slowest.name} with its link: at most {1 / busy_s:.1f} tokens/s predicted with one row"
        " at a time"
    )


def _prompt_bottleneck(plan: Plan) -> str:
    """A sentence on the stage or link for which the chunks of the prompt wait."""
    tokens = plan.objective.prompt_tokens
    if not tokens:
        return ""
    rows = min(plan.chunk_tokens(tokens), tokens)
    parts = [(stage.passage.busy_s(rows), and_text(stage.devices)) for stage in plan.stages]
    parts += [(hop.passage.busy_s(rows), f"{hop.source} -> {hop.target}") for hop in plan.hops]
    busy_s, slowest = max(parts, key=lambda part: part[0])
    return (
        f"{tokens} tokens in chunks of {rows}: {plan.prompt_s(tokens):.3g} s predicted, first token"
        f" after {plan.first_token_s(tokens):.3g} s; the slowest with a chunk is {slowest}:"
        f" {f'{busy_s:.3g} s' if busy_s >= 1 else f'{busy_s * 1e3:.3g} ms'}"
    )
