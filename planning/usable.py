"""The widths at which each device may run each block, and their figures, as arrays.

The integer program reads one option at a time, the search reads whole arrays.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from planning.problem import BlockOption, Part, PlanningProblem

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

LOSS_ROUNDING = 1e-13
"""Rounding error of a sum of losses, as a share of the budget."""


class Usable:
    """The options of a problem as arrays [device, block, width], inf where there is no option.

    ``allowed``: True unless quality, unknown watts, a pin or an exclusion forbids the option.
    ``usable``: like ``allowed``, without options that break the budget alone or that another option
    beats. With ``fitting``, options that exceed the device's limits alone are left out too.
    ``resources``: bytes of every option [device, block, width], with the limits [device]. First
    memory and storage of each device, or of the first member of a team, then of further members.
    ``memory``: bytes of memory of each device, or of all members of a team.
    ``least`` [block]: the least loss of a block on any device (0 if no device may run it).
    ``room``: the budget less all ``least``; inf without a budget. It may be tiny beside the
    losses that no plan avoids, so tolerances apply to the room and not to the budget.
    """

    def __init__(self, problem: PlanningProblem, *, fitting: bool = True) -> None:
        self.problem = problem
        self.widths = tuple(sorted(set(problem.bits)))
        blocks = range(problem.spec.block_count)
        self.decode, self.cost, self.turn, self.executed, own_loss = self._figures()
        kept = [[row.get(bits, math.inf) for bits in self.widths] for row in problem.stored_bytes]
        self.stored = np.array(kept, dtype=float).reshape(len(blocks), len(self.widths))
        self.memory = self.executed + np.array(problem.kv_bytes, dtype=float)[:, None]
        self.resources = self._resources()
        self.loss = self._losses(own_loss)
        self.allowed = np.isfinite(self.decode) & np.isfinite(self.loss) & self._permitted()
        least = np.where(self.allowed, self.loss, math.inf).min((0, 2), initial=math.inf)
        self.least = np.where(np.isfinite(least), least, 0.0)
        self.room = math.inf
        self.usable = self.allowed.copy()
        if (budget := problem.quality_budget) is not None:
            self.room = max(0.0, budget - math.fsum(self.least.tolist()))
            if self.room < math.inf:
                excess = self.loss - self.least[:, None]
                self.usable &= excess <= self.room + LOSS_ROUNDING * budget
        if fitting:
            self.usable &= self._small()
        self._leave_out_beaten()

    def options(self, device: int, block: int) -> tuple[BlockOption, ...]:
        """The usable options of a block on a device, in the device's order."""
        mask = self.usable[device, block]
        widths = {bits for bits, usable in zip(self.widths, mask, strict=True) if usable}
        return tuple(o for o in self.problem.devices[device].options[block] if o.bits in widths)

    def _figures(self) -> tuple[Floats, ...]:
        """Decoding seconds, cost, ``turn_s``, bytes as executed, and the device's own losses.

        A loss is nan if the device has none of its own.
        """
        problem, blocks = self.problem, range(self.problem.spec.block_count)
        at = {bits: index for index, bits in enumerate(self.widths)}
        found = np.full((5, len(problem.devices), len(blocks), len(at)), math.inf)
        for i, device in enumerate(problem.devices):
            # Most blocks share a row of options. With a ``migration_weight`` costs still differ.
            known: dict[tuple[int, object], Floats] = {}
            for k in blocks:
                row = device.options[k]
                differs = k if problem.objective.migration_weight else k == problem.spec.head_block
                key = id(row), differs
                if key not in known:
                    known[key] = np.full((5, len(at)), math.inf)
                    for option in row:
                        if option.bits in at:
                            known[key][:, at[option.bits]] = (
                                option.decode_s,
                                problem.block_cost(i, k, option),
                                problem.turn_s(k, option),
                                option.executed_bytes,
                                math.nan if option.sensitivity is None else option.sensitivity,
                            )
                found[:, i, k] = known[key]
        return tuple(found)

    def _resources(self) -> list[tuple[Floats, Floats]]:
        """Bytes of every option with limits. Members beyond a device's own take nothing."""
        devices, shape = self.problem.devices, self.memory.shape
        found = []
        for at in range(max((len(device.holders) for device in devices), default=1)):
            memory, storage = np.zeros(shape), np.zeros(shape)
            limits = np.ones((2, len(devices)))
            for i, device in enumerate(devices):
                if at >= len(device.holders):
                    continue
                own = device.holders[at]
                limits[:, i] = own.memory_bytes - own.stage_bytes, own.storage_bytes
                if device.team is None:
                    memory[i], storage[i] = self.memory[i], self.stored
                else:
                    memory[i], storage[i] = self._part_bytes(device.team.parts[at])
            found += [(memory, limits[0]), (storage, limits[1])]
        return found

    def _part_bytes(self, part: Part) -> Floats:
        """[memory or storage, block, width]: bytes of a member, inf where there is no option."""
        found = np.full((2, *self.memory.shape[1:]), math.inf)
        at = {bits: index for index, bits in enumerate(self.widths)}
        known: dict[int, Floats] = {}
        for block, row in enumerate(part.options):
            if id(row) not in known:
                sizes = known[id(row)] = np.full((2, len(at)), math.inf)
                for option in row:
                    if option.bits in at:
                        sizes[:, at[option.bits]] = option.memory_bytes, option.storage_bytes
            found[:, block] = known[id(row)]
        return found

    def _losses(self, own: Floats) -> Floats:
        """The loss of each option; inf if it is not known."""
        problem = self.problem
        if problem.quality_budget is None:
            return np.zeros_like(own)
        rows = problem.sensitivities or ({},) * problem.spec.block_count
        common = np.array([[row.get(bits, math.inf) for bits in self.widths] for row in rows])
        return np.where(np.isnan(own), common, own)

    def _permitted(self) -> Mask:
        """False where a pin, an exclusion, an error bound or unknown watts forbid an option."""
        problem = self.problem
        blocks, devices = range(problem.spec.block_count), range(len(problem.devices))
        within = [[problem.within_error(k, bits) for bits in self.widths] for k in blocks]
        found = np.tile(np.array(within, dtype=bool), (len(problem.devices), 1, 1))
        for block in problem.pins:
            found[[not problem.may_run(i, block) for i in devices], block] = False
        found[[*problem.excluded, *problem.only_shared]] = False
        if problem.objective.kind == "energy":
            found[[device.watts is None for device in problem.devices]] = False
        return found

    def _small(self) -> Mask:
        """True for options that keep the device's limits alone."""
        fits = [sizes <= limits[:, None, None] for sizes, limits in self.resources]
        return np.asarray(np.logical_and.reduce(fits), dtype=bool)

    def _leave_out_beaten(self) -> None:
        """Leave out options that are nowhere better than another; of equal ones the wider stays."""
        turn = self.turn if self.problem.slowest_counts else np.zeros_like(self.cost)
        sizes = [sizes for sizes, _ in self.resources]
        figures = np.stack([self.decode, self.cost, turn, self.executed, *sizes, self.loss])
        kept = self.usable.copy()
        for loser in range(len(self.widths)):
            for winner in range(len(self.widths)):
                ours, theirs = figures[..., loser], figures[..., winner]
                beaten = self.usable[..., winner] & (theirs <= ours).all(0)
                if winner <= loser:
                    beaten &= (theirs < ours).any(0)
                kept[..., loser] &= ~beaten
        self.usable = kept
