"""Widths that cost the objective nothing: fewer options before solving, fewer bytes after it.

Some backends run several widths with the same kernels: 3 bits as 4, and 5 and 6 as 8. Memory-bound
and compute-bound devices have such ties too. Tied widths differ in loss and bytes alone. Bytes are
loading time, and they have a price: loading as much again as the least possible must remove the
whole quality budget.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise

from planning.exact.program import StageChoice
from planning.problem import BlockOption, PlanningProblem
from planning.sensitivity import squared_step


def undominated(problem: PlanningProblem) -> PlanningProblem:
    """The problem without options that another option replaces at no cost of any kind.

    A device that cannot store the widest options of all blocks keeps all of its options.
    """
    devices, variants = [], problem.variants
    for i, device in enumerate(problem.devices):
        if _short_of_storage(problem, i):
            devices.append(device)
            continue
        rows = tuple(_best_options(variants, i, k, row) for k, row in enumerate(device.options))
        devices.append(replace(device, options=rows))
    return replace(problem, devices=tuple(devices))


def _short_of_storage(problem: PlanningProblem, index: int) -> bool:
    """Whether any device of a stage there cannot store the widest options of all blocks."""
    device = problem.devices[index]
    for m, holder in enumerate(device.holders):
        stored = [
            max((problem.taken(index, block, o)[m][1] for o in row), default=0)
            for block, row in enumerate(device.options)
        ]
        if sum(stored) > holder.storage_bytes:
            return True
    return False


def _is_a_tradeoff(problem: PlanningProblem, row: Sequence[BlockOption]) -> bool:
    """Whether each wider option takes more time, so that none replaces a narrower one.

    With a budget narrower options lose more. If they do not, an option too many stays.
    """
    return problem.quality_budget is not None and all(
        one.bits < other.bits and one.decode_s < other.decode_s for one, other in pairwise(row)
    )


def _best_options(
    variants: Sequence[PlanningProblem], i: int, block: int, row: Sequence[BlockOption]
) -> tuple[BlockOption, ...]:
    """The options that no other option replaces in any of the problem's ``variants``."""
    problem = variants[0]
    if _is_a_tradeoff(problem, row):
        return tuple(row)
    allowed = [option for option in row if problem.allows(i, block, option.bits)]

    def figures(option: BlockOption) -> tuple[float, ...]:
        return (
            option.decode_s,
            option.prefill_s_per_token,
            *(one.block_cost(i, block, option) for one in variants),
            *(one.turn_s(block, option) for one in variants if one.slowest_counts),
            option.executed_bytes,
            *(memory for memory, _ in problem.taken(i, block, option)),
            problem.loss(i, block, option.bits),
        )

    # Of equal options the one with fewer bits stays.
    order = sorted(allowed, key=lambda option: (figures(option), option.bits))
    kept: list[BlockOption] = []
    for option in order:
        own = figures(option)
        if not any(all(x <= y for x, y in zip(figures(o), own, strict=True)) for o in kept):
            kept.append(option)
    return tuple(option for option in row if option in kept)


@dataclass(frozen=True, slots=True)
class _Change:
    """Another width for one block of a stage, with the change of each figure."""

    block: int
    option: BlockOption
    cost_s: float
    sizes: tuple[int, ...]
    """Bytes of memory and of storage, for each device of the stage."""
    loss: float
    score: float
    """Price of the bytes less the loss removed. Below 0 is better."""


def settle(
    problem: PlanningProblem, stages: Sequence[StageChoice], loss: float, free_s: float
) -> list[StageChoice]:
    """The same stages with the best widths by loss and bytes that cost no time.

    ``loss`` is the plan's part of the budget. ``free_s`` is the rounding of sums: each stage may
    take so much longer. Memory, storage and the budget are kept.
    """
    budget = math.inf if problem.quality_budget is None else problem.quality_budget
    settled, variants = [], problem.variants
    for stage in stages:
        widths, change = _settle_stage(variants, stage, budget - loss, free_s)
        loss += change
        settled.append((stage[0], stage[1], widths))
    return settled


def _settle_stage(
    variants: Sequence[PlanningProblem], stage: StageChoice, loss_left: float, free_s: float
) -> tuple[tuple[int, ...], float]:
    """The stage's new widths, and the change of the loss."""
    problem = variants[0]
    index, first, widths = stage
    chosen = dict(enumerate(widths, first))
    room = _room(problem, index, chosen)
    added = 0.0
    changes = [
        change for block in chosen for change in _changes(variants, index, block, chosen[block])
    ]
    done: set[int] = set()
    for change in sorted(changes, key=lambda one: (one.score, one.block, one.option.bits)):
        if (
            change.block not in done
            and change.cost_s <= free_s
            and all(size <= left for size, left in zip(change.sizes, room, strict=True))
            and change.loss <= loss_left - added
        ):
            done.add(change.block)
            chosen[change.block] = change.option.bits
            room = [left - size for left, size in zip(room, change.sizes, strict=True)]
            free_s -= max(0.0, change.cost_s)
            added += change.loss
    return tuple(chosen[block] for block in sorted(chosen)), added


def _room(problem: PlanningProblem, index: int, chosen: Mapping[int, int]) -> list[int]:
    """Bytes of memory and of storage that a stage leaves free on each of its devices."""
    device = problem.devices[index]
    room = [
        size
        for holder in device.holders
        for size in (holder.memory_bytes - holder.stage_bytes, holder.storage_bytes)
    ]
    for block, bits in chosen.items():
        option = device.option(block, bits)
        if option is not None:
            taken = chain.from_iterable(problem.taken(index, block, option))
            room = [left - size for left, size in zip(room, taken, strict=True)]
    return room


def _changes(
    variants: Sequence[PlanningProblem], index: int, block: int, bits: int
) -> Iterable[_Change]:
    """Every other width of a block with a score below 0."""
    problem = variants[0]
    device, stored = problem.devices[index], problem.stored_bytes[block]
    now = device.option(block, bits)
    if now is None:
        return
    least = sum(min(row[b] for b in problem.bits if b in row) for row in problem.stored_bytes)
    for option in device.options[block]:
        if option.bits == bits or not problem.allows(index, block, option.bits):
            continue
        removed = _removed(problem, index, block, (bits, option.bits))
        more_bytes = stored[option.bits] - stored[bits]
        score = more_bytes / least - removed
        if score < 0:
            yield _Change(
                block,
                option,
                max(_added_s(one, index, block, (now, option)) for one in variants),
                tuple(
                    more - less
                    for pair in zip(
                        problem.taken(index, block, option),
                        problem.taken(index, block, now),
                        strict=True,
                    )
                    for more, less in zip(*pair, strict=True)
                ),
                problem.loss(index, block, option.bits) - problem.loss(index, block, bits),
                score,
            )


def _added_s(
    problem: PlanningProblem, device: int, block: int, options: tuple[BlockOption, BlockOption]
) -> float:
    """The most that the other option can add to the objective, or to the time of a token."""
    now, other = options
    added_s = problem.block_cost(device, block, other) - problem.block_cost(device, block, now)
    if problem.slowest_counts:
        slower_s = problem.turn_s(block, other) - problem.turn_s(block, now)
        added_s += problem.slowest_counts * max(0.0, slower_s)
    return max(
        added_s,
        other.decode_s - now.decode_s,
        other.prefill_s_per_token - now.prefill_s_per_token,
    )


def _removed(problem: PlanningProblem, index: int, block: int, bits: tuple[int, int]) -> float:
    """The loss that a change of width removes, as a share of the budget.

    Without a budget the loss of the model at 4 bits stands for it. A block has its share by bytes.
    """
    before, after = bits
    if problem.quality_budget is not None:
        saved = problem.loss(index, block, before) - problem.loss(index, block, after)
        if problem.quality_budget == 0:
            return math.copysign(math.inf, saved) if saved else 0.0
        return saved / problem.quality_budget
    size = problem.stored_bytes[block][before] / before
    whole = sum(min(row.items())[1] / min(row) for row in problem.stored_bytes)
    return size / whole * (squared_step(before) - squared_step(after))
