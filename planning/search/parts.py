"""A problem with some of its devices, and its choices as choices of the whole problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from planning.exact.program import Choice
from planning.problem import PlanningProblem


def part_of(problem: PlanningProblem, chosen: Sequence[int]) -> PlanningProblem:
    """The problem with the chosen devices alone, in their order.

    They must include all pinned devices, and the leads of all teams.
    """
    index = {device: at for at, device in enumerate(chosen)}
    devices = [problem.devices[i] for i in chosen]
    return replace(
        problem,
        devices=tuple(
            device
            if device.team is None
            else replace(device, team=replace(device.team, lead=index[device.team.lead]))
            for device in devices
        ),
        links={
            (index[i], index[j]): link
            for (i, j), link in problem.links.items()
            if i in index and j in index
        },
        no_links={},
        pins={block: index[i] for block, i in problem.pins.items()},
        excluded=frozenset(index[i] for i in problem.excluded if i in index),
        teams=tuple(tuple(index[i] for i in team) for team in problem.teams),
    )


def renamed(choice: Choice, chosen: Sequence[int]) -> Choice:
    """A choice of the part as a choice of the whole problem."""
    stages = [(chosen[i], first, bits) for i, first, bits in choice.stages]
    return Choice(stages, choice.hop_bits)
