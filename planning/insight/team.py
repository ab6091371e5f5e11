"""Teams in words and figures: who has how much of a layer, and what sharing gains or would cost."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

from model import costs
from model.share import Share, share_spec, unshared
from model.spec import ModelSpec
from planning import candidates, teams
from planning.plan import Plan, Stage, assess, of_plan
from planning.problem import Device, PlanningProblem

WIFI_RTT_S, WIFI_BYTES_PER_S = 5e-3, 60e6 / 8
"""A wireless link between small computers at home, for comparison. It is assumed, not measured."""

_MOST_PAIRS = 64
"""Pairs of devices that are tried to say what sharing would cost."""

_SUM_BITS = 16
"""The usual width of sums, by which pairs of devices are sorted."""

_A_LAYER = 1
"""The first layer. All layers of a model that teams share are alike."""


def layer_fraction(spec: ModelSpec, share: Share) -> float:
    """The part of a layer's weights that a member has, 0 to 1."""
    own = costs.block_flops(share_spec(spec, share), _A_LAYER, 0)
    return own / costs.block_flops(spec, _A_LAYER, 0)


def fractions(spec: ModelSpec, plan: Plan) -> dict[str, float]:
    """The part of a layer's weights of each member of a team, by device."""
    return {
        member.device: layer_fraction(spec, member.share)
        for stage in plan.stages
        for member in stage.members
    }


def and_text(names: tuple[str, ...]) -> str:
    """Names in a sentence: "a", "a and b", "a, b and c"."""
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


@dataclass(frozen=True, slots=True)
class TeamView:
    """A team of a plan, beside its fastest member alone. All figures are predicted.

    ``alone``: the member that would run the same blocks at the same bits fastest alone, or None if
    none can. ``fits``: whether it has the memory for them.
    ``wifi_s``: the stage's time if WIFI linked its members. None: their links are no better.
    """

    devices: tuple[str, ...]
    compute_s: float
    sums_s: float
    alone: str | None
    alone_s: float
    fits: bool
    wifi_s: float | None

    @property
    def gain(self) -> float:
        """How many times as fast as the fastest member alone; inf if none can run the blocks."""
        return self.alone_s / self.compute_s

    def __str__(self) -> str:
        """The gain and its parts in one line."""
        text = f"sharing layers between {and_text(self.devices)}"
        took = f"{1e3 * self.compute_s:.1f} ms a token, of which sums {1e3 * self.sums_s:.1f} ms"
        if self.alone is None:
            return f"{text} takes {took} (predicted); no member runs these blocks alone"
        alone = f"{1e3 * self.alone_s:.1f} ms on {self.alone} alone"
        alone += "" if self.fits else ", which has too little memory for them"
        text += f" {_gain_text(self.gain)}: {took}, instead of {alone} (predicted)"
        if self.wifi_s is not None:
            wifi = _gain_text(self.alone_s / self.wifi_s, "gain", "lose")
            text += (
                f"; over Wi-Fi ({1e3 * WIFI_RTT_S:g} ms, {8e-6 * WIFI_BYTES_PER_S:g} Mbit/s,"
                f" assumed) it would {wifi}"
            )
        return text


def team_views(plan: Plan, problem: PlanningProblem) -> tuple[TeamView, ...]:
    """A view of each team of a plan for the problem."""
    return tuple(_view(plan, problem, at) for at, one in enumerate(plan.stages) if one.members)


def no_team_text(plan: Plan, problem: PlanningProblem) -> str:
    """Why no devices of the plan share layers, in one line; empty if some do, or one is alone."""
    places = [i for i in range(len(problem.devices)) if i not in problem.excluded]
    if len(places) < 2 or any(stage.members for stage in plan.stages):
        return ""
    return f"no devices share layers: {_no_team(plan, problem, places)}"


def _no_team(plan: Plan, problem: PlanningProblem, places: list[int]) -> str:
    devices = problem.devices
    if problem.no_teams:
        return "it was asked for (--no-teams)"
    reason = unshared(problem.spec)
    if reason is not None:
        return reason
    able = [i for i in places if devices[i].shares]
    if len(able) < 2:
        names = tuple(devices[i].name for i in places if i not in able)
        return f"{and_text(names)} can only run whole layers"
    pairs = list(itertools.combinations(able, 2))
    linked = [pair for pair in pairs if teams.refused(problem, pair) is None]
    if not linked:
        return teams.refused(problem, pairs[0]) or ""
    used = {stage.device for stage in plan.stages}
    own = [pair for pair in linked if {devices[i].name for i in pair} & used]
    own.sort(key=lambda pair: teams.sum_s(problem, pair, 1, _SUM_BITS))
    return _best_text(plan, problem, own[:_MOST_PAIRS])


def _best_text(plan: Plan, problem: PlanningProblem, pairs: list[tuple[int, int]]) -> str:
    """The cost of the best pair's sums beside what sharing would save, in one line.

    The pair would share the layers of a stage of the plan, which one of them runs now.
    """
    found: list[tuple[float, float, tuple[int, ...]]] = []
    for pair in pairs:
        division = candidates.division(problem, pair)
        if division is None:
            continue
        more, index = teams.with_team(problem, division.members, division.shares, division.sum_bits)
        for stage in plan.stages:
            saved_s, sums_s = _saved(problem, stage, pair, more.devices[index])
            if sums_s:
                found.append((saved_s, sums_s, pair))
    if not found:
        return "no device of this plan has another that could share its layers"
    # The largest gain comes first. If none gains, it is the pair that loses least for its sums.
    saved_s, sums_s, best = max(found, key=lambda one: (max(one[0] - one[1], 0), one[0] / one[1]))
    gain_s = saved_s - sums_s
    names = and_text(tuple(problem.devices[i].name for i in best))
    text = (
        f"between {names} sums would cost {1e3 * sums_s:.3g} ms a token, and sharing would save"
        f" {1e3 * max(saved_s, 0.0):.3g} ms of computing (predicted)"
    )
    if gain_s <= 0:
        return text
    used = {stage.device for stage in plan.stages}
    if all(problem.devices[i].name in used for i in best):
        return f"{text}, but each has a stage of its own in the best plan found"
    return f"{text}, but no better plan was found with it"


def _saved(
    problem: PlanningProblem, stage: Stage, pair: tuple[int, int], team: Device
) -> tuple[float, float]:
    """Seconds of computing that a team saves on the layers of a stage, and those of its sums.

    Both are 0 if the stage's device is not of the pair, or the team cannot run the layers.
    """
    if stage.device not in [problem.devices[i].name for i in pair] or team.team is None:
        return 0.0, 0.0
    own = next(device for device in problem.devices if device.name == stage.device)
    layers = range(1, problem.spec.head_block)
    saved_s = sums_s = 0.0
    for block, bits in enumerate(stage.bits, stage.first):
        if block not in layers:
            continue
        alone, shared = own.option(block, bits), team.option(block, bits)
        if alone is None or shared is None:
            return 0.0, 0.0
        layer_sums_s = 2 * team.team.sum_s
        sums_s += layer_sums_s
        saved_s += alone.decode_s - (shared.decode_s - layer_sums_s)
    return saved_s, sums_s


def _view(plan: Plan, problem: PlanningProblem, at: int) -> TeamView:
    stage = plan.stages[at]
    members = [device for device in problem.devices if device.name in stage.devices]
    alone_s, name, fits = min(
        (_alone(problem, device, stage) for device in members), key=lambda one: one[0]
    )
    alone = name if alone_s < math.inf else None
    return TeamView(
        stage.devices, stage.compute_s, stage.sums_s, alone, alone_s, fits,
        _wifi_s(plan, problem, at),
    )  # fmt: skip


def _alone(problem: PlanningProblem, device: Device, stage: Stage) -> tuple[float, str, bool]:
    """Seconds of the stage on one device alone, its name, and whether it has the memory."""
    seconds, memory = [device.call_s], device.stage_bytes
    for block, bits in enumerate(stage.bits, stage.first):
        option = device.option(block, bits)
        if option is None:
            return math.inf, device.name, False
        seconds.append(option.decode_s)
        memory += option.executed_bytes + problem.kv_bytes[block]
    return math.fsum(seconds), device.name, memory <= device.memory_bytes


def _wifi_s(plan: Plan, problem: PlanningProblem, at: int) -> float | None:
    """Seconds of a team's stage if its members had Wi-Fi; None if their links are no better."""
    names = plan.stages[at].devices
    members = [i for i, device in enumerate(problem.devices) if device.name in names]
    own = {pair: problem.links[pair] for pair in itertools.permutations(members, 2)}
    if not any(
        link.rtt_s < WIFI_RTT_S and link.bytes_per_s > WIFI_BYTES_PER_S for link in own.values()
    ):
        return None
    slower = {
        pair: replace(
            link,
            rtt_s=max(link.rtt_s, WIFI_RTT_S),
            bytes_per_s=min(link.bytes_per_s, WIFI_BYTES_PER_S),
        )
        for pair, link in own.items()
    }
    changed = replace(problem, links={**problem.links, **slower})
    return reassessed(plan, changed).stages[at].compute_s


def reassessed(plan: Plan, problem: PlanningProblem) -> Plan:
    """The same stages, teams and widths with the figures of another problem. Raises PlanError."""
    placed, indices = of_plan(problem, plan)
    stages = [
        (index, stage.first, stage.bits) for index, stage in zip(indices, plan.stages, strict=True)
    ]
    return assess(placed, stages, plan.proof, [stage.hop_bits for stage in plan.stages[:-1]])


def _gain_text(gain: float, gains: str = "gains", loses: str = "loses") -> str:
    """A factor in words: "gains 1.8 x", or "loses (1.2 x as long)"."""
    return f"{gains} {gain:.2g} x" if gain >= 1 else f"{loses} ({1 / gain:.2g} x as long)"
