"""A proof, without a solver, of what all devices together lack, whatever the placement."""

from __future__ import annotations

import numpy as np

from planning.problem import PlanningProblem
from planning.usable import Floats, Usable


def shortage(problem: PlanningProblem) -> str | None:
    """Say what no placement can mend; None if nothing is proved.

    A problem may have no plan although this finds nothing: it takes each block at its smallest.
    """
    usable = Usable(problem, fitting=False)
    if not usable.allowed.any((0, 2)).all():
        return None  # Bytes are not what is wrong.
    layers = problem.spec.block_count - 2
    most = _most_layers(usable)
    if most < layers:
        return f"all devices together hold at most {most} of {layers} layers"
    sizes = [each for each, _ in usable.resources]
    for kind, name in enumerate(("memory", "storage")):
        # Members beyond a device's own take nothing, so that sums are over members.
        least = np.where(usable.allowed, sum(sizes[kind::2]), np.inf).min(2)
        short = int(least.min(0).sum()) - sum(_given(usable, kind).values())
        if short > 0:
            return f"{name} is short by at least {short / 1e6:.1f} MB in all"
    return None


def _given(usable: Usable, kind: int) -> dict[str, int]:
    """Bytes of memory (0) or storage (1) that each real device has for blocks."""
    given: dict[str, int] = {}
    for index in np.flatnonzero(usable.allowed.any((1, 2))).tolist():
        for own in usable.problem.devices[index].holders:
            free = own.storage_bytes if kind else own.memory_bytes - own.stage_bytes
            given[own.name] = max(given.get(own.name, 0), free)
    return given


def _most_layers(usable: Usable) -> int:
    """A bound on the number of layers that fit on all devices: each holds its smallest ones.

    A team's layers count for its members in equal parts. No device is in two stages.
    """
    credit: dict[str, float] = {}
    for index in np.flatnonzero(usable.allowed.any((1, 2))).tolist():
        most = min(_count(usable, index, sizes, limits) for sizes, limits in usable.resources)
        holders = usable.problem.devices[index].holders
        for own in holders:
            credit[own.name] = max(credit.get(own.name, 0.0), most / len(holders))
    return int(sum(credit.values()) + 1e-6)


def _count(usable: Usable, index: int, sizes: Floats, limits: Floats) -> int:
    """The most layers that fit on a device within one of its limits."""
    least = np.where(usable.allowed[index], sizes[index], np.inf).min(1)
    layers = np.sort(least[1 : usable.problem.spec.head_block])
    return int((np.cumsum(layers) <= limits[index]).sum())
