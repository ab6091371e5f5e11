"""Changes that people can make if no plan fits. Each is tried alone, by planning again.

People can buy another device of a kind, shorten the context, or move a limit. Each ``enough_...``
function returns the least change of its kind that makes a plan possible, or None. ``possible`` says
whether a problem has a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from model import costs
from planning.problem import PlanningProblem
from wire.profile import LinkProfile

Possible = Callable[[PlanningProblem], bool]

MOST_DEVICES = 64
"""The most devices of a kind that advice names."""

MOST_COUNTS = 4
"""So many counts of devices are tried by planning, from the first with bytes enough."""

LEAST_CONTEXT_TOKENS = 128

ASSUMED_BYTES_PER_S, ASSUMED_RTT_S = 125e6, 0.0005
"""A wired link of 1 Gbit/s, assumed for a second device beside a single one without links."""


def with_more(problem: PlanningProblem, index: int, count: int = 1) -> PlanningProblem:
    """The problem with ``count`` more devices like the one at ``index``, with the same links.

    Links among all these devices are as slow as the slowest link of the first.
    """
    devices, links = list(problem.devices), dict(problem.links)
    own = [link for pair, link in problem.links.items() if index in pair]
    slowest = LinkProfile(
        "",
        "",
        max((link.rtt_s for link in own), default=ASSUMED_RTT_S),
        min((link.bytes_per_s for link in own), default=ASSUMED_BYTES_PER_S),
    )
    alike = [index]
    for number in range(1, count + 1):
        name = f"another {problem.devices[index].name} {number}"
        new = len(devices)
        devices.append(replace(problem.devices[index], name=name, held=()))
        for other in range(len(problem.devices)):
            for pair, like in (((new, other), (index, other)), ((other, new), (other, index))):
                if like in problem.links:
                    links[pair] = problem.links[like]
        for other in alike:
            links[new, other] = links[other, new] = slowest
        alike.append(new)
    named = {
        (i, j): replace(link, source=devices[i].name, target=devices[j].name)
        for (i, j), link in links.items()
    }
    return replace(problem, devices=tuple(devices), links=named)


def kinds(problem: PlanningProblem) -> Iterator[int]:
    """The first device of each kind that is not excluded. A kind differs in more than names."""
    met = []
    for index, device in enumerate(problem.devices):
        kind = replace(device, name="", held=())
        if index not in problem.excluded and kind not in met:
            met.append(kind)
            yield index


def enough_devices(
    problem: PlanningProblem, possible: Possible, roomy: Possible
) -> tuple[str, int] | None:
    """The name of a device, and the least number of more like it that are enough.

    ``roomy`` is a quick test of bytes that every possible problem passes.
    """
    tried = 0
    for count in range(1, MOST_DEVICES + 1):
        more = ((index, with_more(problem, index, count)) for index in kinds(problem))
        hopeful = [(index, changed) for index, changed in more if roomy(changed)]
        tried += bool(hopeful)
        for index, changed in hopeful:
            if possible(changed):
                return problem.devices[index].name, count
        if tried == MOST_COUNTS:
            return None
    return None


def context_tokens(problem: PlanningProblem) -> int:
    """Positions of all slots' KV caches together; 0 if no block has a cache."""
    for block, size in enumerate(problem.kv_bytes):
        one = costs.kv_bytes(problem.spec, block, 1)
        if size and one:
            return size // one
    return 0


def with_context(problem: PlanningProblem, tokens: int) -> PlanningProblem:
    """The problem with KV caches of so many positions. Buffers keep their size."""
    now = context_tokens(problem)
    sizes = tuple(-(-size * tokens // now) for size in problem.kv_bytes)
    return replace(problem, kv_bytes=sizes)


def enough_context(problem: PlanningProblem, possible: Possible) -> int | None:
    """The longest context that fits, of a half, a quarter and so on of the present one."""
    tokens = context_tokens(problem) // 2
    if tokens < LEAST_CONTEXT_TOKENS or not possible(with_context(problem, LEAST_CONTEXT_TOKENS)):
        return None
    while tokens >= LEAST_CONTEXT_TOKENS:
        if possible(with_context(problem, tokens)):
            return tokens
        tokens //= 2
    return None


def with_memory(problem: PlanningProblem, index: int) -> PlanningProblem:
    """The problem in which shoal may use all memory of a device."""
    devices = list(problem.devices)
    total = devices[index].memory_total_bytes or 0
    memory_bytes = max(devices[index].memory_bytes, total)
    devices[index] = replace(devices[index], memory_bytes=memory_bytes)
    return replace(problem, devices=tuple(devices))


def enough_memory(problem: PlanningProblem, possible: Possible) -> str | None:
    """A device whose whole memory is enough, if shoal may not use all of it yet."""
    for index, device in enumerate(problem.devices):
        more = (device.memory_total_bytes or 0) > device.memory_bytes
        if more and possible(with_memory(problem, index)):
            return device.name
    return None


def without(problem: PlanningProblem, name: str) -> PlanningProblem:
    """The problem in which the device of that name is neither excluded nor pinned to."""
    (index,) = (i for i, device in enumerate(problem.devices) if device.name == name)
    return replace(
        problem,
        excluded=problem.excluded - {index},
        pins={block: i for block, i in problem.pins.items() if i != index},
    )


def hindrance(problem: PlanningProblem, name: str) -> str:
    """The pins or the exclusion of a device, in words that its name follows."""
    (index,) = (i for i, device in enumerate(problem.devices) if device.name == name)
    pinned = index in problem.pins.values()
    if index not in problem.excluded:
        return "the pins to"
    return "the exclusion of and the pins to" if pinned else "the exclusion of"


def any_teams(problem: PlanningProblem) -> PlanningProblem:
    """The problem without a wish about teams."""
    return replace(problem, teams=(), no_teams=False)


def teams_hinder(problem: PlanningProblem, possible: Possible) -> bool:
    """Whether the wish for teams, or for none, is alone in the way."""
    return bool(problem.teams or problem.no_teams) and possible(any_teams(problem))


def enough_placement(problem: PlanningProblem, possible: Possible) -> str | None:
    """A device whose exclusion and pins alone are in the way."""
    for index in sorted({*problem.excluded, *problem.pins.values()}):
        name = problem.devices[index].name
        if possible(without(problem, name)):
            return name
    return None
