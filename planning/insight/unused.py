"""Why a plan leaves devices out, as far as the numbers of its problem tell."""

from __future__ import annotations

import math

from planning.candidates import division
from planning.insight.team import and_text
from planning.plan import Plan, of_plan
from planning.problem import PlanningProblem
from planning.teams import refused
from wire.sizes import format_size

_MOST_DEVICES = 32
"""With more devices, no team is divided anew to say why a device is not in it."""


def idle_reasons(plan: Plan, problem: PlanningProblem) -> list[str]:
    """One line for each reason why devices run nothing, with the devices that have this reason."""
    layers = range(1, problem.spec.head_block)
    placed, places = of_plan(problem, plan)
    times_s = [
        option.decode_s
        for index, stage in zip(places, plan.stages, strict=True)
        for block, bits in enumerate(stage.bits, stage.first)
        if block in layers and (option := placed.devices[index].option(block, bits)) is not None
    ]
    used = {name for stage in plan.stages for name in stage.devices}
    indices = [index for index, device in enumerate(problem.devices) if device.name in used]
    reasons: dict[str, list[str]] = {}
    for index, device in enumerate(problem.devices):
        if device.name not in used:
            reason = _cut_off(problem, index, indices) or _reason(problem, index, times_s)
            reason += _in_teams(plan, problem, index)
            reasons.setdefault(reason, []).append(device.name)
    return [
        f"{names[0]} is left out: {reason}"
        if len(names) == 1
        else f"{', '.join(names)} are left out, each because {reason}"
        for reason, names in reasons.items()
    ]


def _reason(problem: PlanningProblem, index: int, times_s: list[float]) -> str:
    if index in problem.excluded:
        return "it is excluded"
    device = problem.devices[index]
    options = [
        (option.executed_bytes + problem.kv_bytes[block], option)
        for block in range(1, problem.spec.head_block)
        for option in device.options[block]
        if problem.allows(index, block, option.bits)
    ]
    if not options:
        if problem.quality_budget is not None and _has_unknown_losses(problem, index):
            return "its arithmetic adds losses of its own, and what they are was not measured"
        if problem.objective.kind == "energy" and device.watts is None:
            return "its watts are not known"
        return "it runs no layer at a width that is allowed"
    room = device.memory_bytes - device.stage_bytes
    fitting = [option for size, option in options if size <= room]
    if not fitting:
        least = min(size for size, _ in options)
        return (
            f"a layer takes {format_size(least)}, and {format_size(max(room, 0))} are left for"
            " layers"
        )
    fastest = min(fitting, key=lambda option: option.decode_s)
    added_s = _stage_s(problem, index)
    if added_s == math.inf:
        return "no link leads there and on to the rest"
    reason = (
        f"its fastest layer takes {1e3 * fastest.decode_s:.2f} ms at {fastest.bits} bits, those of"
        f" the plan {_span_ms(times_s)}"
    )
    if round(1e5 * fastest.decode_s) <= round(1e5 * max(times_s, default=0.0)):
        # The device is as fast as those in use, so the cost is that of one more stage.
        reason += f", and a stage there would add at least {1e3 * added_s:.2f} ms of links and call"
    return reason + _own_losses(problem, index, fastest.bits)


def _in_teams(plan: Plan, problem: PlanningProblem, index: int) -> str:
    """A clause on the plan's first team with this device; empty without a team, or if excluded."""
    team = next((stage for stage in plan.stages if stage.members), None)
    device = problem.devices[index]
    if team is None or index in problem.excluded or len(problem.devices) > _MOST_DEVICES:
        return ""
    members = [i for i, own in enumerate(problem.devices) if own.name in team.devices]
    refusal = refused(problem, [*members, index])
    if refusal is not None:
        return f"; it cannot share layers with {team.device}: {refusal}"
    now, then = division(problem, members), division(problem, [*members, index])
    if now is None or then is None:
        return f"; it runs layers at no width that {and_text(team.devices)} have in common"
    return (
        f"; in a team of {and_text((*team.devices, device.name))} a layer would take"
        f" {1e3 * then.layer_s:.2f} ms, and without it {1e3 * now.layer_s:.2f} ms"
    )


def _stage_s(problem: PlanningProblem, index: int) -> float:
    """The least seconds that a stage adds to a token by links and call; inf without links."""
    others = [i for i in range(len(problem.devices)) if i not in (index, *problem.excluded)]
    forms = [form.bits for form in problem.permitted_hops]
    there, onward = (
        min(
            # As the first or the last stage the device has the token's way back on this link.
            (
                min([problem.return_s(*pair), *(problem.hop_s(*pair, bits) for bits in forms)])
                for pair in pairs
            ),
            default=math.inf,
        )
        for pairs in ([(i, index) for i in others], [(index, i) for i in others])
    )
    return problem.devices[index].call_s + there + onward


def _cut_off(problem: PlanningProblem, index: int, used: list[int]) -> str:
    """Why no device of the plan reaches this one, or it reaches none; else empty."""
    if index in problem.excluded:
        return ""
    ways = [(other, index) for other in used], [(index, other) for other in used]
    for pairs in ways:
        if all(pair in problem.no_links for pair in pairs):
            return "; ".join(problem.no_link(*pair) for pair in pairs)
    return ""


def _has_unknown_losses(problem: PlanningProblem, index: int) -> bool:
    rows = problem.devices[index].options
    return any(option.sensitivity == math.inf for row in rows for option in row)


def _own_losses(problem: PlanningProblem, index: int, bits: int) -> str:
    """A clause on the layers' losses in the device's arithmetic; empty if it is like others."""
    if problem.quality_budget is None:
        return ""
    layers = range(1, problem.spec.head_block)
    own = [problem.sensitivity(index, block, bits) for block in layers]
    common = [problem.sensitivities[block].get(bits) for block in layers]
    if own == common or None in own or None in common:
        return ""
    ours, theirs = (math.fsum(kl or 0.0 for kl in losses) for losses in (own, common))
    return f"; all layers there at {bits} bits would lose {ours:.2g} of KL, elsewhere {theirs:.2g}"


def _span_ms(times_s: list[float]) -> str:
    low, high = (f"{1e3 * bound:.2f}" for bound in (min(times_s), max(times_s)))
    return f"{low} ms" if low == high else f"{low} to {high} ms"
