"""A draft model in a plan: a small model that lies whole on the device of the first stage.

It guesses tokens there, and the ring checks them. The embedding is on that device, so the draft
model's memory and files count as parts of the embedding. Any plan then has room for both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from model import costs
from model.quantize import Format
from model.spec import ModelSpec
from planning.build import DeviceInput
from planning.plan import Plan
from planning.problem import BlockOption, PlanningProblem
from wire import limits
from wire.profile import BlockTiming

ASSUMED_ACCEPTANCE = 0.7
"""The share of right guesses that a prediction assumes before any were counted."""

GUESSES = (1, 3, 7, limits.DRAFT_TOKENS)
"""The numbers of guesses that a prediction compares, as the first stage does."""


@dataclass(frozen=True, slots=True)
class DraftInput:
    """A draft model and how it is stored. ``formats`` has one per block, all at ``bits``."""

    spec: ModelSpec
    bits: int
    formats: Sequence[Format]
    context_tokens: int
    slots: int

    @property
    def stored_bytes(self) -> int:
        """The bytes of its files."""
        return sum(costs.stored_bytes(self.spec, *item) for item in enumerate(self.formats))

    def memory_bytes(self, container_bits: int) -> int:
        """Return its memory: weights as executed, the KV cache of all slots, and buffers."""
        spec, blocks = self.spec, range(self.spec.block_count)
        weights = sum(
            costs.executed_bytes(spec, block, fmt, container_bits)
            for block, fmt in enumerate(self.formats)
        )
        cache = sum(costs.kv_bytes(spec, block, self.context_tokens) for block in blocks)
        buffers = costs.stage_buffer_bytes(
            spec, blocks, limits.PREFILL_CHUNK_TOKENS, self.context_tokens
        )
        return weights + self.slots * cache + buffers

    def token_s(self, timings: Sequence[BlockTiming]) -> float | None:
        """Return its seconds for a token by measured blocks, or None if one was not measured."""
        known = {(one.kind, one.variant, one.bits): one.decode_s for one in timings}
        spec = self.spec
        each = [
            known.get((spec.block_kind(block), spec.block_variant(block), self.bits))
            for block in range(spec.block_count)
        ]
        measured = [seconds for seconds in each if seconds is not None]
        return math.fsum(measured) if len(measured) == len(each) else None


@dataclass(frozen=True, slots=True)
class DraftOn:
    """A draft model on one device: the memory it takes there, and its seconds for a token."""

    memory_bytes: int
    token_s: float


def places_of(draft: DraftInput, devices: Sequence[DeviceInput]) -> dict[str, DraftOn]:
    """Return what the draft model takes on each device that can run it, by the device's name.

    ``timings`` of the devices are those of the draft model.
    """
    found = {}
    for device in devices:
        container = device.profile.container(draft.bits)
        token_s = draft.token_s(device.timings)
        if container is not None and token_s is not None:
            memory_bytes = draft.memory_bytes(container)
            found[device.name] = DraftOn(memory_bytes, token_s + device.profile.call_s)
    return found


def with_draft(
    problem: PlanningProblem, draft: DraftInput, places: Mapping[str, DraftOn]
) -> PlanningProblem:
    """Return the problem in which the device of the embedding also holds the draft model.

    Devices without a place cannot have the embedding. ``problem`` has no made teams yet.
    """

    def charged(name: str, row: Sequence[BlockOption]) -> tuple[BlockOption, ...]:
        place = places.get(name)
        if place is None:
            return ()
        more = place.memory_bytes
        return tuple(replace(one, executed_bytes=one.executed_bytes + more) for one in row)

    stored = {bits: size + draft.stored_bytes for bits, size in problem.stored_bytes[0].items()}
    return replace(
        problem,
        devices=tuple(
            replace(device, options=(charged(device.name, device.options[0]), *device.options[1:]))
            for device in problem.devices
        ),
        stored_bytes=(stored, *problem.stored_bytes[1:]),
    )


def missing_bytes(
    plan: Plan, draft: DraftInput, places: Mapping[str, DraftOn]
) -> tuple[int, int] | None:
    """Return the memory and the storage that the first device of a plan lacks for the draft model.

    0 for what it does not lack. None if it cannot run the draft model. ``plan`` was made without
    it.
    """
    stage = plan.stages[0]
    holder = stage.members[0] if stage.members else stage
    place = places.get(holder.device)
    if place is None:
        return None
    memory = holder.memory_bytes + place.memory_bytes - holder.memory_limit_bytes
    storage = holder.storage_bytes + draft.stored_bytes - holder.storage_limit_bytes
    return max(memory, 0), max(storage, 0)


def gain(token_s: float, draft_token_s: float, acceptance: float) -> float:
    """Return how many times faster tokens come with the best number of guesses, at least 1.

    token_s: of a token through the ring. Checking guesses is taken to cost no more than that.
    acceptance: the chance that a guess is right if those before it are.
    """
    chance = min(acceptance, 0.99)
    rates = [
        (1 - chance ** (guesses + 1)) / (1 - chance) / (1 + guesses * draft_token_s / token_s)
        for guesses in GUESSES
    ]
    return max(1.0, *rates)
