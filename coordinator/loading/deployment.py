"""Loads and connects the stages of a plan on the members, and unloads them."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from coordinator.errors import AgentFailed, AgentLost, LinkFailed
from coordinator.loading.slots import Slots
from coordinator.roster.measurements import Step, forward, together
from coordinator.roster.members import Member
from model.checkpoint import Checkpoint
from model.spec import ModelSpec
from model.tokenizer import Tokenizer
from planning.plan import Plan, Stage
from planning.problem import PlanningProblem
from planning.request import LoadRequest, model_name
from planning.sensitivity import LossSource
from wire.activations import DEFAULT_HOP_BITS, HOP_BITS, HopBits
from wire.messages import BlockRef, ConnectStage, Done, LoadStage, StageLoaded, UnloadStage

HOP_KEY_BYTES = 16


@dataclass(frozen=True, slots=True, eq=False)
class Planned:
    """A plan with the request and the problem that it was made for.

    quality_margin: the margin in the problem's sensitivities, or None if it has none.
    measured_kl: the plan's measured divergence, or None if it was not measured.
    losses: says from what the sensitivities were counted.
    """

    request: LoadRequest
    checkpoint: Checkpoint
    context_tokens: int
    problem: PlanningProblem
    plan: Plan
    quality_margin: float | None
    measured_kl: float | None
    losses: LossSource
    devices: Mapping[str, str] = field(default_factory=dict)
    """Device ids by the names in the problem and the plan."""

    @property
    def quality(self) -> dict[str, Any] | None:
        """The known figures of the plan's loss, as JSON; None if there are none."""
        if self.quality_margin is None:
            return None
        return {
            "margin": self.quality_margin,
            "measured_kl": self.measured_kl,
            "budget": self.problem.quality_budget,
            **asdict(self.losses),
        }


@dataclass(frozen=True, slots=True, eq=False)
class Deployment:
    """A plan whose stages were loaded. coordinator.loading.models knows whether it still serves."""

    request: LoadRequest
    spec: ModelSpec
    tokenizer: Tokenizer
    plan: Plan
    epoch: int
    slots: Slots
    context_tokens: int
    members: tuple[Member, ...]
    loaded: tuple[StageLoaded, ...]
    quality: Mapping[str, Any] | None = None
    """As of ``Planned``."""

    @property
    def name(self) -> str:
        return model_name(self.request.model)

    def after(self, member: Member) -> Member | None:
        """The next device of the ring, or None if the member has no stage or the only one."""
        if member not in self.members or len(self.members) == 1:
            return None
        return self.members[(self.members.index(member) + 1) % len(self.members)]


async def deploy(
    planned: Planned,
    tokenizer: Tokenizer,
    refs: Sequence[BlockRef],
    roster: Sequence[Member],
    epoch: int,
    on_step: Callable[[Step], None],
    on_loaded: Callable[[Member, StageLoaded], None],
) -> Deployment:
    """Load and connect the stages of a plan. If that fails, none of them stays loaded.

    on_loaded: is called for each loaded stage, even if another one fails.
    Raises AgentFailed, LinkFailed.
    """
    by_device = {member.device: member for member in roster}
    stages = planned.plan.stages
    for stage in stages:
        if planned.devices[stage.device] not in by_device:
            raise AgentLost(stage.device, "it left while the plan was made")
    members = tuple(by_device[planned.devices[stage.device]] for stage in stages)
    spec = planned.checkpoint.spec
    # A stage admits its previous device by this key, which no third device knows.
    keys = tuple(secrets.token_bytes(HOP_KEY_BYTES) for _ in members)

    async def load(member: Member, stage: Stage, previous: Member, key: bytes) -> StageLoaded:
        build = partial(
            LoadStage,
            epoch=epoch,
            spec=spec.to_dict(),
            blocks=tuple(refs[stage.first : stage.last]),
            slots=planned.request.slots,
            context_tokens=planned.context_tokens,
            previous=previous.device,
            hop_key=key,
            hop_bits=_hop_bits(stage),
        )
        answer = await member.request(build, StageLoaded, forward(on_step, "load", member.name))
        on_loaded(member, answer)
        return answer

    try:
        loaded = await together(map(load, members, stages, members[-1:] + members[:-1], keys))
        await _connect_ring(members, epoch, keys)
        for member in members:  # A member may be lost after its answer, before the last one's.
            if member.lost is not None:
                raise member.lost.with_traceback(None)
    except BaseException:  # Also when cancelled, no stage stays loaded.
        await asyncio.shield(unload(members))
        raise
    return Deployment(
        request=planned.request,
        spec=spec,
        tokenizer=tokenizer,
        plan=planned.plan,
        epoch=epoch,
        slots=Slots(planned.request.slots),
        context_tokens=planned.context_tokens,
        members=members,
        loaded=loaded,
        quality=planned.quality,
    )


async def _connect_ring(members: tuple[Member, ...], epoch: int, keys: tuple[bytes, ...]) -> None:
    """Connect each stage to the next one, and the last to the first. Raises as ``_connect``."""
    if len(members) > 1:
        for member, after, key in zip(
            members, members[1:] + members[:1], keys[1:] + keys[:1], strict=True
        ):
            await _connect(member, after, epoch, key)


async def _connect(member: Member, after: Member, epoch: int, key: bytes) -> None:
    """Have a stage connect to the next one of the ring. Raises AgentLost, LinkFailed."""
    build = partial(
        ConnectStage,
        epoch=epoch,
        device=after.device,
        endpoints=after.endpoints_for(member),
        hop_key=key,
    )
    try:
        await member.request(build, Done)
    except AgentLost:
        raise
    except AgentFailed as error:
        await after.lives()
        if after.lost is not None:
            raise after.lost.with_traceback(None) from error
        raise LinkFailed(member.name, after.name, error.reason) from error


async def unload(members: Sequence[Member]) -> None:
    """Unload the stages of the living members."""

    async def one(member: Member) -> None:
        with contextlib.suppress(AgentFailed):
            await member.request(UnloadStage, Done)

    await asyncio.gather(*map(one, members))


def _hop_bits(stage: Stage) -> HopBits:
    """The bits of the hidden values that a stage sends. The last stage sends only tokens."""
    return next((bits for bits in HOP_BITS if bits == stage.hop_bits), DEFAULT_HOP_BITS)
