"""A plan as a value: which device runs which blocks at how many bits, and its predicted figures.

    PlanError            a plan cannot be made or read, or a check of it failed
    └── InfeasiblePlan   no plan exists; has advice on how to make one possible

``assess`` computes every figure of a plan from its stages. ``verify`` checks a plan from any
source. Neither needs a solver.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from model.share import Share
from planning import teams
from planning.json_codec import from_plain, to_plain
from planning.problem import ONE_TOKEN, BlockOption, Device, Objective, PlanningProblem
from planning.prompt import NO_TIME, Passage, best_chunk_tokens, prompt_s
from planning.together import pass_s, row_s
from wire.profile import TIMED_ROWS

Layout = tuple[tuple[Any, ...], ...]

FORMAT = 1
OPTIMALITY_GAP = 1e-6
"""A plan with a proved gap up to this is called optimal."""

_RELATIVE_ERROR = 1e-9


class PlanError(Exception):
    """There is no usable plan. The message is one line for the user."""


@dataclass(frozen=True, slots=True)
class Advice:
    """Changes that each make a plan possible alone. Memory and storage are one change together.

    ``memory_short_bytes`` and ``storage_short_bytes`` say what is wrong. The other fields are
    changes that people can make.
    """

    memory_short_bytes: tuple[tuple[str, int], ...] = ()
    storage_short_bytes: tuple[tuple[str, int], ...] = ()
    allow_bits: int | None = None
    max_weight_error: float | None = None
    quality_budget: float | None = None
    free_placement: bool = False
    declare_watts: tuple[str, ...] = ()
    missing_links: tuple[tuple[str, str], ...] = ()
    """(source, target) of links. All of them together make a plan possible."""
    more_devices: tuple[str, int] | None = None
    """A device, and the number of further devices like it."""
    context_tokens: int | None = None
    """Positions of all slots' contexts together."""
    whole_memory: str | None = None
    """A device whose whole memory would be enough."""
    free_device: str | None = None
    """The device whose exclusion or pins are in the way."""
    free_teams: bool = False
    """The wish for teams, or for none, is in the way."""


class InfeasiblePlan(PlanError):
    """No plan exists. ``advice`` has the message's advice as numbers."""

    def __init__(self, message: str, advice: Advice | None = None) -> None:
        super().__init__(message)
        self.advice = advice or Advice()


@dataclass(frozen=True, slots=True)
class Placement:
    """The device and the bits of one block."""

    block: int
    device: str
    bits: int


@dataclass(frozen=True, slots=True)
class Member:
    """One device of a team, and the share of each layer that it runs (model/share.py).

    ``compute_s``: its part of one decoded token, its call included and without sums. ``sums_s``:
    its own work for the token's sums, without the network and waits. The figures are predicted.
    """

    device: str
    share: Share
    compute_s: float
    memory_bytes: int
    memory_limit_bytes: int
    storage_bytes: int
    storage_limit_bytes: int
    sums_s: float = 0.0

    @property
    def own_s(self) -> float:
        """The time of one decoded token for which no other member is waited for."""
        return self.compute_s + self.sums_s


@dataclass(frozen=True, slots=True)
class Stage:
    """Blocks [first, first + len(bits)) on one device or team, with their predicted figures.

    ``members``: the team, lead first; ``device`` is the lead. Empty: ``device`` is alone. Memory
    and storage of a team are sums over its members, and each member's limit holds by itself.
    ``sum_bits``: width of the partial rows that members exchange; None without a team.
    ``sums_s``: the part of ``compute_s`` that one token's sums take.

    ``compute_s``: one decoded token, the stage's call overhead included.
    ``memory_bytes``: weights as executed, KV cache and buffers.
    ``storage_bytes``: the blocks on disk.
    ``hop_bits``: width of the hidden values that the stage sends; None for the last stage, which
    sends a token.
    ``energy_j``: the device's watts while it computes, times ``compute_s``. None: not known.
    ``passage``: seconds of a prompt's chunks. The head's one row is its delay.
    ``rows_s``: seconds of one pass of TIMED_ROWS rows, each of another sequence. Empty: not known.
    """

    device: str
    first: int
    bits: tuple[int, ...]
    compute_s: float
    prefill_s_per_token: float
    memory_bytes: int
    memory_limit_bytes: int
    storage_bytes: int
    storage_limit_bytes: int
    hop_bits: int | None = None
    energy_j: float | None = None
    passage: Passage = NO_TIME
    rows_s: tuple[float, ...] = ()
    members: tuple[Member, ...] = ()
    sum_bits: int | None = None
    sums_s: float = 0.0

    @property
    def devices(self) -> tuple[str, ...]:
        """All devices that run this stage, the lead first."""
        return tuple(member.device for member in self.members) or (self.device,)

    @property
    def last(self) -> int:
        """End of the half-open range of blocks."""
        return self.first + len(self.bits)


@dataclass(frozen=True, slots=True)
class Hop:
    """The link between two stages. ``seconds`` is for one token, ``passage`` for chunks."""

    source: str
    target: str
    seconds: float
    passage: Passage = NO_TIME


@dataclass(frozen=True, slots=True)
class Proof:
    """The solver that found the plan, its time, and a bound on how much better a plan can be.

    ``bound`` is a proved lower bound of the objective (``Plan.value``) of every plan.
    """

    solver: str
    solve_s: float
    bound: float


@dataclass(frozen=True, slots=True)
class Plan:
    """A split of one model. Times are predicted seconds for one token of one sequence.

    ``decode_s``: compute of all stages + hops + return.
    ``prefill_s_per_token``: a row of a prompt in all stages and on all links, added up.
    ``bottleneck_s``: largest sum of a stage's compute and the link that leaves it.
    ``load_s``: loading the missing blocks, one after the other.
    ``worst_weight_error``: largest of all blocks. None: at least one was not measured.
    ``total_sensitivity``: KL divergence of blocks and hops, nats. None: at least one is unknown.
    ``energy_j``: joules of all stages for a token. None: at least one stage's are unknown.
    ``sequences``: number decoded at once for the objective throughput. None: more than enough.
    """

    stages: tuple[Stage, ...]
    hops: tuple[Hop, ...]
    return_s: float
    decode_s: float
    prefill_s_per_token: float
    worst_weight_error: float | None
    proof: Proof
    version: int = field(default=FORMAT, kw_only=True)
    bottleneck_s: float = field(default=0.0, kw_only=True)
    load_s: float = field(default=0.0, kw_only=True)
    total_sensitivity: float | None = field(default=None, kw_only=True)
    energy_j: float | None = field(default=None, kw_only=True)
    objective: Objective = field(default=ONE_TOKEN, kw_only=True)
    sequences: int | None = field(default=None, kw_only=True)

    @property
    def value(self) -> float:
        """The objective that the planner minimised, in seconds; for energy in joules."""
        if self.objective.kind == "energy":
            return math.inf if self.energy_j is None else self.energy_j
        prompt, output = self.objective.tokens
        value = self.first_token_s(prompt) + output * self.decode_s
        if self.objective.kind == "throughput":
            waited = self.sequences is None
            value += self.bottleneck_s if waited else self.shared_s(self.sequences or 1)
        return value + self.objective.migration_weight * self.load_s

    @property
    def value_text(self) -> str:
        """The objective with its unit."""
        if self.objective.kind == "energy":
            return f"{self.value:.3g} J"
        return f"{self.value:.2f} s" if self.value >= 10 else f"{1e3 * self.value:.2f} ms"

    @property
    def passages(self) -> tuple[Passage, ...]:
        """The passages of all stages, then of all hops."""
        stages, hops = self.stages, self.hops
        return (*(stage.passage for stage in stages), *(hop.passage for hop in hops))

    def chunk_tokens(self, prompt_tokens: int) -> int:
        """Rows of a chunk with which such a prompt takes least time."""
        return best_chunk_tokens(self.passages, prompt_tokens)

    def first_token_s(self, prompt_tokens: int) -> float:
        """Seconds from the start of a prompt until its first token is sampled."""
        return prompt_s(self.passages, prompt_tokens, self.chunk_tokens(prompt_tokens))

    def shared_s(self, sequences: int) -> float:
        """Seconds between two tokens of so many sequences together (planning/together.py).

        The slowest stage with its link sets the pace, or one token's way round the ring does.
        """
        ways = [hop.seconds for hop in self.hops] + [self.return_s]
        busy_s = [
            row_s(stage.compute_s, stage.rows_s, sequences, len(self.stages)) + way_s
            for stage, way_s in zip(self.stages, ways, strict=True)
        ]
        return max(*busy_s, self.decode_s / sequences)

    def prompt_s(self, prompt_tokens: int) -> float:
        """Seconds of a prompt in all layers, without the head."""
        head_s = self.stages[-1].passage.delay_s if prompt_tokens else 0.0
        return self.first_token_s(prompt_tokens) - head_s

    @property
    def gap(self) -> float:
        """The largest share of the objective that a better plan could save, 0 to 1."""
        return max(0.0, (self.value - self.proof.bound) / self.value)

    @property
    def proven_optimal(self) -> bool:
        """True if no plan is better by more than OPTIMALITY_GAP."""
        return self.gap <= OPTIMALITY_GAP

    @property
    def placements(self) -> tuple[Placement, ...]:
        """Every block in order, with its device and bits."""
        return tuple(
            Placement(block, stage.device, bits)
            for stage in self.stages
            for block, bits in enumerate(stage.bits, stage.first)
        )

    @property
    def layout(self) -> Layout:
        """The stages as devices load them. Plans with one layout are the same to load.

        Of each stage: its first block, widths, devices and their shares, and the widths of its sums
        and of its hop.
        """
        return tuple(
            (
                stage.first,
                stage.bits,
                stage.devices,
                tuple(member.share for member in stage.members),
                stage.sum_bits,
                stage.hop_bits,
            )
            for stage in self.stages
        )

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values, as JSON has them. ``from_dict`` is the inverse."""
        plain: dict[str, Any] = to_plain(self)
        return plain

    @staticmethod
    def from_dict(values: object) -> Plan:
        """The plan of plain values, as ``to_dict`` makes them; defaults may be left out.

        Figures are not checked: ``verify`` does that. Raises PlanError naming a key that is
        missing, unknown or wrong.
        """
        proof = values.get("proof") if isinstance(values, dict) else None
        if isinstance(values, dict) and isinstance(proof, dict) and "bound_s" in proof:
            # This was its name when all objectives were in seconds.
            renamed = {{"bound_s": "bound"}.get(key, key): item for key, item in proof.items()}
            values = {**values, "proof": renamed}
        try:
            plan: Plan = from_plain(Plan, values, "plan", finite=True)
        except ValueError as error:
            raise PlanError(str(error)) from error
        if plan.version != FORMAT:
            raise PlanError(f"plan.version: {plan.version}, this program reads {FORMAT}")
        sending = plan.stages[:-1]
        if all(stage.hop_bits is None for stage in sending):
            # Plans saved before hops had a width: hops were sent at 32 bits.
            stages = (*(replace(stage, hop_bits=32) for stage in sending), *plan.stages[-1:])
            plan = replace(plan, stages=stages)
        return plan


def assess(
    problem: PlanningProblem,
    stages: Sequence[tuple[int, int, Sequence[int]]],
    proof: Proof,
    hop_bits: Sequence[int | None] | None = None,
) -> Plan:
    """The plan made of ``stages``, given as (device index, first block, bits per block).

    ``hop_bits`` has the width of each hop. None, for one hop or for all, is the cheapest permitted
    width, or with a quality budget the width that takes least of it.
    Limits are reported, not enforced: ``verify`` does that. Raises PlanError if there is no stage,
    a device cannot run a block at its bits, or neighbours have no link.
    """
    if not stages:
        raise PlanError("the plan has no stages")
    order = [device for device, _, _ in stages]
    pairs = list(itertools.pairwise(order))
    sent = [
        _usual_hop_bits(problem, *pair) if bits is None else bits
        for pair, bits in zip(pairs, hop_bits or [None] * len(pairs), strict=True)
    ]
    assessed = tuple(
        _assess_stage(problem, *stage, bits)
        for stage, bits in zip(stages, (*sent, None), strict=True)
    )
    hops = []
    wire_s = 0.0
    for (source, target), bits in zip(pairs, sent, strict=True):
        leads = problem.lead(source), problem.lead(target)
        names = problem.devices[leads[0]].name, problem.devices[leads[1]].name
        seconds = problem.hop_s(source, target, bits)
        if seconds == math.inf:
            raise PlanError(problem.no_link(source, target))
        hops.append(Hop(*names, seconds, problem.hop_passage(source, target, bits)))
        wire_s += problem.hop_bytes(bits) / problem.links[leads].bytes_per_s
    return_s = problem.return_s(order[-1], order[0])
    if return_s == math.inf:
        raise PlanError(problem.no_link(order[-1], order[0]))
    places = [(i, k, bits) for i, first, widths in stages for k, bits in enumerate(widths, first)]
    errors = [problem.weight_error(block, bits) for _, block, bits in places]
    losses = [problem.sensitivity(*place) for place in places]
    losses += [problem.hop_sensitivity(bits) for bits in sent]
    leaving_s = [hop.seconds for hop in hops] + [return_s]
    return Plan(
        stages=assessed,
        hops=tuple(hops),
        return_s=return_s,
        decode_s=math.fsum([stage.compute_s for stage in assessed] + leaving_s),
        prefill_s_per_token=math.fsum(stage.prefill_s_per_token for stage in assessed) + wire_s,
        worst_weight_error=combined_if_known(max, errors),
        proof=proof,
        bottleneck_s=max(
            stage.compute_s + link_s for stage, link_s in zip(assessed, leaving_s, strict=True)
        ),
        load_s=math.fsum(problem.load_s(*place) for place in places),
        total_sensitivity=combined_if_known(math.fsum, losses),
        energy_j=combined_if_known(math.fsum, [stage.energy_j for stage in assessed]),
        objective=problem.objective,
        sequences=problem.shared_by,
    )


def of_plan(problem: PlanningProblem, plan: Plan) -> tuple[PlanningProblem, list[int]]:
    """The problem with the plan's teams as devices, and the device of each stage.

    The teams are made anew of the problem's devices and the plan's shares. Raises PlanError for an
    unknown device, or for devices that cannot share layers so.
    """
    indices = {problem.devices[i].name: i for i in problem.real}
    found = []
    for stage in plan.stages:
        for name in stage.devices:
            if name not in indices:
                raise PlanError(f"unknown device {name}")
        if not stage.members:
            found.append(indices[stage.device])
            continue
        if stage.members[0].device != stage.device:
            raise PlanError(f"{stage.device} does not lead its team {', '.join(stage.devices)}")
        shares = [member.share for member in stage.members]
        members = [indices[name] for name in stage.devices]
        try:
            problem, index = teams.with_team(problem, members, shares, stage.sum_bits or 0)
        except ValueError as error:
            raise PlanError(str(error)) from error
        found.append(index)
    return problem, found


def verify(plan: Plan, problem: PlanningProblem) -> None:
    """Check a plan against the problem without trusting a solver or the plan's own figures.

    Raises PlanError naming the first violation. It checks coverage, one contiguous stage for each
    device, and teams with their shares. Then it checks known watts, bits of blocks and hops,
    weight error, pins and exclusions. Last come memory and storage of each device, budget, every
    predicted figure, and the proved bound.
    """
    problem, indices = of_plan(problem, plan)
    _check_stages(plan, problem, indices)
    _check_asked_teams(plan, problem)
    _check_placements(plan, problem, indices)
    stages = [
        (index, stage.first, stage.bits) for index, stage in zip(indices, plan.stages, strict=True)
    ]
    actual = assess(problem, stages, plan.proof, _hop_widths(plan, problem))
    _check_limits(actual)
    if not keeps_budget(actual, problem):
        raise PlanError(
            f"the sensitivities add up to {actual.total_sensitivity},"
            f" above the budget {problem.quality_budget}"
        )
    _compare(plan.to_dict(), actual.to_dict(), "plan")
    if not plan.proof.bound <= plan.value * (1 + OPTIMALITY_GAP):
        raise PlanError(f"the proved bound {plan.proof.bound} is above {plan.value}")


def _check_stages(plan: Plan, problem: PlanningProblem, indices: Sequence[int]) -> None:
    """Raise PlanError if the stages do not cover the blocks in order, each on its own devices.

    indices: the device of each stage in the problem.
    """
    seen: set[str] = set()
    expected = 0
    for stage, index in zip(plan.stages, indices, strict=True):
        known = problem.devices[index].watts is not None
        if problem.objective.kind == "energy" and not known:
            raise PlanError(f"{stage.device} has no watts: nothing is known of its energy")
        for name in stage.devices:
            if name in seen:
                raise PlanError(f"{name} has more than one stage")
            seen.add(name)
        if stage.members and stage.last == 1:
            raise PlanError(f"{', '.join(stage.devices)} share no layer: the embedding is whole")
        if not stage.bits:
            raise PlanError(f"the stage on {stage.device} is empty")
        if stage.first != expected:
            raise PlanError(f"the stage on {stage.device} starts at {stage.first}, not {expected}")
        expected = stage.last
    blocks = problem.spec.block_count
    if expected != blocks:
        raise PlanError(f"the plan covers {expected} of {blocks} blocks")


def _check_placements(plan: Plan, problem: PlanningProblem, indices: Sequence[int]) -> None:
    """Raise PlanError if a block has a width or a device that the problem does not permit."""
    of_block = [
        index for index, stage in zip(indices, plan.stages, strict=True) for _ in stage.bits
    ]
    for place in plan.placements:
        name = problem.spec.block_name(place.block)
        if place.bits not in problem.bits:
            raise PlanError(f"{name} is at {place.bits} bit, which was not asked for")
        if not problem.within_error(place.block, place.bits):
            error = problem.weight_error(place.block, place.bits)
            bound = problem.max_weight_error[place.block]
            raise PlanError(f"{name} at {place.bits} bit has weight error {error}, above {bound}")
        index = of_block[place.block]
        if not problem.may_run(index, place.block):
            pinned = problem.devices[problem.pins[place.block]].name
            raise PlanError(f"{name} is on {problem.devices[index].name}, not {pinned}")
        if index in problem.excluded:
            raise PlanError(f"{name} is on {place.device}, which is excluded")


def _hop_widths(plan: Plan, problem: PlanningProblem) -> list[int]:
    """Return the bits of each hop. Raises PlanError if the problem does not permit one."""
    permitted = [form.bits for form in problem.permitted_hops]
    found: list[int] = []
    for stage in plan.stages[:-1]:
        if stage.hop_bits not in permitted:
            widths = ", ".join(map(str, permitted)) or "none"
            raise PlanError(f"{stage.device} sends at {stage.hop_bits} bit: permitted are {widths}")
        found.append(stage.hop_bits)
    return found


def _check_limits(plan: Plan) -> None:
    """Raise PlanError if a device needs more memory or storage than it has."""
    for stage in plan.stages:
        for holder in stage.members or (stage,):
            for kind, used, limit in (
                ("memory", holder.memory_bytes, holder.memory_limit_bytes),
                ("storage", holder.storage_bytes, holder.storage_limit_bytes),
            ):
                if used > limit:
                    raise PlanError(f"{holder.device} needs {used} bytes of {kind} and has {limit}")


def _check_asked_teams(plan: Plan, problem: PlanningProblem) -> None:
    """Raise PlanError if a team that the user asked for is no stage of the plan."""
    found = [set(stage.devices) for stage in plan.stages]
    for team in problem.teams:
        names = [problem.devices[index].name for index in team]
        if set(names) not in found:
            raise PlanError(f"{', '.join(names)} do not share layers, as was asked for")


def keeps_budget(plan: Plan, problem: PlanningProblem) -> bool:
    """True if there is no quality budget, or the plan is known to stay within it."""
    if problem.quality_budget is None:
        return True
    total = plan.total_sensitivity
    return total is not None and total <= problem.quality_budget


def bits_text(bits: Iterable[int]) -> str:
    """Widths of consecutive blocks, repeats counted: ``16 8x11 4``."""
    runs = [(width, len(list(group))) for width, group in itertools.groupby(bits)]
    return " ".join(str(width) if count == 1 else f"{width}x{count}" for width, count in runs)


def _usual_hop_bits(problem: PlanningProblem, source: int, target: int) -> int:
    """The width of a hop if the plan does not say one."""
    choices = problem.hop_choices(source, target)
    if not choices:
        if problem.link(source, target) is None:
            raise PlanError(problem.no_link(source, target))
        names = problem.devices[source].name, problem.devices[target].name
        raise PlanError(
            f"there is no width of known sensitivity for the hop from {names[0]} to {names[1]}"
        )
    return choices[0 if problem.quality_budget is None else -1].bits


def _assess_stage(
    problem: PlanningProblem, index: int, first: int, widths: Sequence[int], hop_bits: int | None
) -> Stage:
    device = problem.devices[index]
    memory, storage = device.stage_bytes, 0
    decode, prefill = [device.call_s], []
    passages = [Passage(device.call_s, device.call_row_s)]
    shared: list[BlockOption] = []
    for block, bits in enumerate(widths, first):
        option = device.option(block, bits)
        if option is None:
            name = problem.spec.block_name(block)
            raise PlanError(f"{device.name} cannot run {name} at {bits} bit")
        memory += option.executed_bytes + problem.kv_bytes[block]
        storage += problem.stored_bytes[block][bits]
        decode.append(option.decode_s)
        prefill.append(option.prefill_s_per_token)
        passages.append(problem.passage(block, option))
        shared.append(option)
    compute_s = math.fsum(decode)
    members: tuple[Member, ...] = ()
    layers = 0
    if device.team is not None:
        kinds = map(problem.spec.block_kind, range(first, first + len(widths)))
        layers = [*kinds].count("layer")
        members = _members(device, first, widths, layers)
        memory = sum(member.memory_bytes for member in members)
        storage = sum(member.storage_bytes for member in members)
    return Stage(
        device=device.holders[0].name,
        first=first,
        bits=tuple(widths),
        compute_s=compute_s,
        prefill_s_per_token=math.fsum(prefill),
        memory_bytes=memory,
        memory_limit_bytes=device.memory_bytes,
        storage_bytes=storage,
        storage_limit_bytes=device.storage_bytes,
        hop_bits=hop_bits,
        energy_j=None if device.watts is None else device.watts * compute_s,
        passage=Passage(
            math.fsum(one.fixed_s for one in passages),
            math.fsum(one.row_s for one in passages),
            math.fsum(one.delay_s for one in passages),
        ),
        rows_s=_rows_s(device.call_s, shared) if device.shares_passes else (),
        members=members,
        sum_bits=None if device.team is None else device.team.sum_bits,
        sums_s=0.0 if device.team is None else 2 * layers * device.team.sum_s,
    )


def _members(device: Device, first: int, widths: Sequence[int], layers: int) -> tuple[Member, ...]:
    """The members of a team with their figures for a stage of so many layers."""
    found = []
    for part in device.team.parts if device.team is not None else ():
        own = [part.option(block, bits) for block, bits in enumerate(widths, first)]
        found.append(
            Member(
                device=part.name,
                share=part.share,
                compute_s=math.fsum([part.call_s, *(one.decode_s for one in own)]),
                memory_bytes=part.stage_bytes + sum(one.memory_bytes for one in own),
                memory_limit_bytes=part.memory_bytes,
                storage_bytes=sum(one.storage_bytes for one in own),
                storage_limit_bytes=part.storage_bytes,
                sums_s=2 * layers * part.sum_s,
            )
        )
    return tuple(found)


def _rows_s(call_s: float, options: Sequence[BlockOption]) -> tuple[float, ...]:
    """Seconds of a pass of each of TIMED_ROWS rows in a stage of such blocks."""
    return tuple(
        math.fsum([call_s, *(pass_s(one.decode_s, one.rows_s, rows) for one in options)])
        for rows in TIMED_ROWS
    )


def combined_if_known(
    combine: Callable[[list[float]], float], values: Sequence[float | None]
) -> float | None:
    """``combine`` of ``values``; None if one of them is unknown."""
    known = [value for value in values if value is not None]
    return combine(known) if len(known) == len(values) else None


def _compare(claimed: Any, actual: Any, where: str) -> None:
    """Raise PlanError if a claimed value differs from the recomputed one."""
    if isinstance(actual, dict):
        for key, value in actual.items():
            _compare(claimed[key], value, f"{where}.{key}")
    elif isinstance(actual, list):
        if len(claimed) != len(actual):
            raise PlanError(f"{where}: {len(claimed)} entries, not {len(actual)}")
        for index, value in enumerate(actual):
            _compare(claimed[index], value, f"{where}[{index}]")
    elif isinstance(actual, float) and isinstance(claimed, float):
        if not math.isclose(claimed, actual, rel_tol=_RELATIVE_ERROR, abs_tol=0.0):
            raise PlanError(f"{where}: {claimed}, recomputed {actual}")
    elif claimed != actual:
        raise PlanError(f"{where}: {claimed}, recomputed {actual}")
