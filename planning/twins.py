"""Devices that can be exchanged without a change of any figure of any plan."""

from __future__ import annotations

from dataclasses import replace

from planning.problem import PlanningProblem


def are_twins(problem: PlanningProblem, i: int, j: int) -> bool:
    """True if exchanging two real devices changes no figure of any plan."""
    one, other = problem.devices[i], problem.devices[j]
    # Memory differs for most of the many pairs, and is quick to compare.
    if one.memory_bytes != other.memory_bytes or replace(one, name=other.name) != other:
        return False
    named = {index for team in problem.teams for index in team}
    if {i, j} & {*problem.excluded, *problem.pins.values(), *named}:
        return False
    swap = {i: j, j: i}

    def speed(a: int, b: int) -> tuple[float, float] | None:
        link = problem.links.get((a, b))
        return None if link is None else (link.rtt_s, link.bytes_per_s)

    return all(
        speed(a, b) == speed(swap.get(a, a), swap.get(b, b))
        for a in (i, j)
        for b in problem.real
        for a, b in ((a, b), (b, a))
    )


def twin_sets(problem: PlanningProblem) -> list[list[int]]:
    """Sets of real devices that are twins of each other. One without a twin is a set of its own."""
    sets: list[list[int]] = []
    for j in problem.real:
        own = next((some for some in sets if are_twins(problem, some[0], j)), None)
        if own is None:
            sets.append([j])
        else:
            own.append(j)
    return sets
