"""A problem with some of its devices, and its choices as choices of the whole problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from planning.exact.program import Choice
from planning.problem import PlanningProblem


def part_of(problem: PlanningProblem, chosen: Sequence[int]) -> PlanningProblem:
    """The problem with the chosen devices alone, which must include all pinned devices."""
    index = {device: at for at, device in enumerate(chosen)}
    return replace(
        problem,
        devices=tuple(problem.devices[i] for i in chosen),
        links={
            (index[i], index[j]): link
            for (i, j), link in problem.links.items()
            if i in index and j in index
        },
        no_links={},
        pins={block: index[i] for block, i in problem.pins.items()},
        excluded=frozenset(index[i] for i in problem.excluded if i in index),
    )


def renamed(choice: Choice, chosen: Sequence[int]) -> Choice:
    """A choice of the part as a choice of the whole problem."""
    stages = [(chosen[i], first, bits) for i, first, bits in choice.stages]
    return Choice(stages, choice.hop_bits)
