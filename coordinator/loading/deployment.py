"""Loads and connects the stages of a plan on the members, and unloads them.

A stage runs on a team: one device, or several that share its layers. First all devices load. Then
the devices of each team connect to each other. Last, the leads of the teams connect to a ring.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from coordinator.errors import AgentFailed, AgentLost, LinkFailed
from coordinator.files.artifacts import Wanted
from coordinator.files.vocabulary import Vocabulary
from coordinator.loading.drafting import DRAFT, Counts, Draft, PlannedDraft
from coordinator.loading.slots import Slots
from coordinator.roster.measurements import Step, forward, together
from coordinator.roster.members import Member
from model.checkpoint import Checkpoint
from model.generation import SamplingDefaults
from model.kept import weight_notes
from model.spec import ModelSpec
from model.tokenizer import Tokenizer
from planning.forecast import rows_at_once
from planning.plan import Plan, PlanError, Stage
from planning.problem import PlanningProblem
from planning.request import LoadRequest, model_name
from planning.sensitivity import LossSource
from wire.activations import DEFAULT_HOP_BITS, HOP_BITS, HopBits
from wire.messages import (
    BlockRef,
    BlocksFetched,
    ConnectStage,
    ConnectTeam,
    Done,
    FetchBlocks,
    LoadStage,
    MeasureTeam,
    Message,
    StageLoaded,
    TeamMeasured,
    UnloadStage,
)

log = logging.getLogger(__name__)

KEY_BYTES = 16

DeploymentKey = tuple[int, int]

Team = tuple[Member, ...]
"""The devices of a stage, the lead first. A device that is alone is a team of one."""


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
    draft: PlannedDraft | None = None
    """The draft model that the plan has room for, if there is one."""

    @property
    def weights(self) -> list[str]:
        """Lines about codes that are kept from the model's files, or quantized again."""
        bits = [width for stage in self.plan.stages for width in stage.bits]
        return weight_notes(self.checkpoint, bits)

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
    teams: tuple[Team, ...]
    """The devices of each stage, in the order of the ring."""
    loaded: tuple[tuple[StageLoaded, ...], ...]
    """The answers of each team's devices."""
    sums: tuple[TeamMeasured | None, ...]
    """The measured sums of each team. None for a device alone, or if they were not measured."""
    quality: Mapping[str, Any] | None = None
    """As of ``Planned``."""
    weights: Sequence[str] = ()
    """As of ``Planned``."""
    vocabulary: Vocabulary | None = None
    """The bytes of the model's tokens. None if they have none, or llguidance is not installed."""
    draft: Draft | None = None
    """The draft model on the first stage's device. None if there is none, or no room for it."""
    draft_counts: Counts = field(default_factory=Counts)
    fingerprint: str = ""
    """The fingerprint of the checkpoint from which the stages were made."""
    newest_sequence: int = 0
    """The newest sequence that its stages knew when this coordinator took them over."""
    takeover: int = 0
    """How often a device's connection ended, and its stage was still there afterwards."""

    @property
    def key(self) -> DeploymentKey:
        """Two deployments have the same key only if answers of one are answers of the other."""
        return self.epoch, self.takeover

    @property
    def name(self) -> str:
        return model_name(self.request.model)

    @property
    def sampling_defaults(self) -> SamplingDefaults:
        """The values that a request takes where it says none, unless the load ignores them."""
        return self.tokenizer.defaults if self.request.generation_defaults else SamplingDefaults()

    @property
    def leads(self) -> tuple[Member, ...]:
        """The devices that form the ring, one per stage."""
        return tuple(team[0] for team in self.teams)

    @property
    def devices(self) -> tuple[Member, ...]:
        """All devices that run a part of the model."""
        return tuple(itertools.chain.from_iterable(self.teams))

    @property
    def keeps_grammars(self) -> bool:
        """Whether the device that samples can keep answers to a grammar."""
        return self.vocabulary is not None and bool(self.loaded[-1][0].grammars)

    @property
    def load_s(self) -> float:
        """The longest time that a device took to load its blocks from its disk."""
        return max(one.load_s for team in self.loaded for one in team)

    @property
    def where(self) -> str:
        """The devices in words, such as "pi-1+pi-2, pi-3"."""
        return ", ".join(map(team_name, self.teams))

    def team_of(self, member: Member) -> Team:
        """The team of a device, or an empty one if it runs no part of the model."""
        return next((team for team in self.teams if member in team), ())

    def after(self, member: Member) -> Member | None:
        """The next lead of the ring, or None if the member is no lead or the only one."""
        leads = self.leads
        if member not in leads or len(leads) == 1:
            return None
        return leads[(leads.index(member) + 1) % len(leads)]


def team_name(team: Iterable[Member]) -> str:
    """The names of a team's devices as one, such as "pi-1+pi-2"."""
    return "+".join(member.name for member in team)


def wanted_artifacts(planned: Planned) -> list[tuple[str, Wanted]]:
    """The artifacts of a plan, each with the device's name. Shares of a block follow each other.

    The embedding is not shared: it is the lead's. Raises PlanError if a member would have nothing.
    """
    wanted: list[tuple[str, Wanted]] = []
    for stage in planned.plan.stages:
        if stage.members and stage.last == 1:
            raise PlanError(
                f"{'+'.join(stage.devices)} cannot share the embedding alone: add a layer to their "
                "stage"
            )
        for block, bits in enumerate(stage.bits, stage.first):
            fmt = planned.checkpoint.format_of(block, planned.request.format(bits))
            if block and stage.members:
                wanted += [
                    (member.device, Wanted(block, fmt, member.share)) for member in stage.members
                ]
            else:
                wanted.append((stage.device, Wanted(block, fmt)))
    return wanted


async def deploy(
    planned: Planned,
    tokenizer: Tokenizer,
    blocks: Mapping[str, Sequence[BlockRef]],
    roster: Sequence[Member],
    epoch: int,
    on_step: Callable[[Step], None],
    on_loaded: Callable[[Member, StageLoaded], None],
    vocabulary: Vocabulary | None = None,
    keeps: tuple[int, ...] = (),
) -> Deployment:
    """Load and connect the stages of a plan. If that fails, none of them stays loaded.

    blocks: the artifacts of each device, by its name in the plan, and of DRAFT.
    vocabulary: the device that samples gets it.
    keeps: the epochs of deployments whose stages stay beside the new ones.
    on_loaded: is called for each loaded stage, even if another one fails.
    Raises AgentFailed, LinkFailed.
    """
    teams = _teams(planned, roster)
    leads = tuple(team[0] for team in teams)
    devices = tuple(itertools.chain.from_iterable(teams))
    # A stage admits its previous device by this key, which no third device knows.
    hop_keys, team_keys = _keys(leads), _keys(teams)
    order = partial(LoadStage, epoch=epoch, keeps=keeps, weight=planned.request.weight)
    orders = _orders(planned, teams, blocks, order, (hop_keys, team_keys), vocabulary)

    async def load(member: Member, label: str, order: Callable[[int], Message]) -> StageLoaded:
        answer = await member.request(order, StageLoaded, forward(on_step, "load", label))
        on_loaded(member, answer)
        return answer

    try:
        loaded = iter(await together(itertools.starmap(load, orders)))
        await _connect_teams(teams, epoch, team_keys)
        await _connect_ring(leads, epoch, hop_keys)
        sums = await _measure_sums(teams, epoch)
        for member in devices:  # A member may be lost after its answer, before the last one's.
            if member.lost is not None:
                raise member.lost.with_traceback(None)
    except BaseException:  # Also when cancelled, no stage stays loaded.
        await asyncio.shield(unload(devices, epoch))
        raise
    for stage, team in zip(planned.plan.stages, teams, strict=True):
        if stage.members:
            log.info("%s share blocks %d..%d", team_name(team), max(stage.first, 1), stage.last - 1)
    return Deployment(
        request=planned.request,
        spec=planned.checkpoint.spec,
        tokenizer=tokenizer,
        plan=planned.plan,
        epoch=epoch,
        slots=Slots(planned.request.slots),
        context_tokens=planned.context_tokens,
        teams=teams,
        loaded=tuple(tuple(itertools.islice(loaded, len(team))) for team in teams),
        sums=sums,
        quality=planned.quality,
        weights=planned.weights,
        vocabulary=vocabulary,
        draft=None if planned.draft is None else planned.draft.on(planned.plan),
        fingerprint=planned.checkpoint.fingerprint,
    )


async def fetch(
    planned: Planned,
    blocks: Mapping[str, Sequence[BlockRef]],
    roster: Sequence[Member],
    on_step: Callable[[Step], None],
    vocabulary: Vocabulary | None = None,
) -> None:
    """Have the devices of a plan fetch its blocks for a later ``deploy``. Raises AgentFailed."""
    teams = _teams(planned, roster)

    async def one(name: str, member: Member) -> None:
        draft = blocks.get(DRAFT, ()) if member is teams[0][0] else ()
        build = partial(FetchBlocks, blocks=(*blocks[name], *draft))
        if vocabulary is not None and member is teams[-1][0]:
            build = partial(build, vocabulary=vocabulary.ref)
        await member.request(build, BlocksFetched, forward(on_step, "fetch", name))

    await together(
        one(name, member)
        for stage, team in zip(planned.plan.stages, teams, strict=True)
        for name, member in zip(stage.devices, team, strict=True)
    )


def _teams(planned: Planned, roster: Sequence[Member]) -> tuple[Team, ...]:
    """The members that run each stage. Raises AgentLost if one is not there any more."""
    by_device = {member.device: member for member in roster}
    for stage in planned.plan.stages:
        for name in stage.devices:
            if planned.devices[name] not in by_device:
                raise AgentLost(name, "it left while the plan was made")
    return tuple(
        tuple(by_device[planned.devices[name]] for name in stage.devices)
        for stage in planned.plan.stages
    )


def _keys(of: Sequence[object]) -> tuple[bytes, ...]:
    return tuple(secrets.token_bytes(KEY_BYTES) for _ in of)


def _orders(
    planned: Planned,
    teams: Sequence[Team],
    blocks: Mapping[str, Sequence[BlockRef]],
    begun: partial[LoadStage],
    keys: tuple[Sequence[bytes], Sequence[bytes]],
    vocabulary: Vocabulary | None,
) -> list[tuple[Member, str, partial[LoadStage]]]:
    """Each device's order to load, with its label for progress. ``begun`` is the same for all.

    Only leads have a place in the ring. ``keys`` are those of hops and of teams.
    """
    orders = []
    slots = planned.request.slots
    at_once = tuple(rows_at_once(planned.plan, count) for count in range(1, 1 + slots))
    for index, (stage, team) in enumerate(zip(planned.plan.stages, teams, strict=True)):
        order = partial(
            begun,
            spec=planned.checkpoint.spec.to_dict(),
            slots=slots,
            context_tokens=planned.context_tokens,
            previous=teams[index - 1][0].device,
            hop_key=keys[0][index],
            hop_bits=_bits(stage.hop_bits),
        )
        shares = _shares(stage, team, order, keys[1][index]) if stage.members else [order]
        for name, member, share in zip(stage.devices, team, shares, strict=True):
            label = member.name if len(team) == 1 else f"{member.name} of {team_name(team)}"
            if vocabulary is not None and member is teams[-1][0]:
                share = partial(share, vocabulary=vocabulary.ref)
            if planned.draft is not None and member is teams[0][0]:
                draft = planned.draft.message(planned.plan, blocks[DRAFT])
                share = partial(share, draft=draft)
            if member is teams[0][0]:
                share = partial(share, rows_at_once=at_once)
            orders.append((member, label, partial(share, blocks=tuple(blocks[name]))))
    return orders


def _shares(
    stage: Stage, team: Team, order: partial[LoadStage], team_key: bytes
) -> list[partial[LoadStage]]:
    """The order of a stage for each member of its team."""
    shared = partial(
        order,
        team=tuple(member.device for member in team),
        team_key=team_key,
        sum_bits=_bits(stage.sum_bits),
    )
    lead, *others = [partial(shared, share=member.share.to_tuple()) for member in stage.members]
    # Nobody is told these keys, so that no device can pass for a previous one.
    alone = [
        partial(other, previous="", hop_key=key)
        for other, key in zip(others, _keys(others), strict=True)
    ]
    return [lead, *alone]


async def _connect_teams(teams: Sequence[Team], epoch: int, keys: Sequence[bytes]) -> None:
    """Connect each member of a team to all members after it. Raises as ``_connect``."""
    for team, key in zip(teams, keys, strict=True):
        for member, after in itertools.combinations(team, 2):
            await _connect(member, after, partial(ConnectTeam, epoch=epoch, team_key=key))


async def _connect_ring(leads: tuple[Member, ...], epoch: int, keys: tuple[bytes, ...]) -> None:
    """Connect each lead to the next one, and the last to the first. Raises as ``_connect``."""
    if len(leads) > 1:
        for lead, after, key in zip(leads, leads[1:] + leads[:1], keys[1:] + keys[:1], strict=True):
            await _connect(lead, after, partial(ConnectStage, epoch=epoch, hop_key=key))


async def _measure_sums(teams: Sequence[Team], epoch: int) -> tuple[TeamMeasured | None, ...]:
    """Have the lead of each connected team measure its sums. Without a result the load goes on.

    Raises AgentLost.
    """
    sums: list[TeamMeasured | None] = []
    for team in teams:
        measured = None
        if len(team) > 1:
            try:
                measured = await team[0].request(partial(MeasureTeam, epoch=epoch), TeamMeasured)
            except AgentLost:
                raise
            except AgentFailed as error:
                log.warning("sums of %s were not measured: %s", team_name(team), error.reason)
        sums.append(measured)
    return tuple(sums)


async def _connect(
    member: Member, after: Member, order: partial[ConnectStage] | partial[ConnectTeam]
) -> None:
    """Have a device connect to another one. Raises AgentLost, LinkFailed."""
    build = partial(order, device=after.device, endpoints=after.endpoints_for(member))
    try:
        await member.request(build, Done)
    except AgentLost:
        raise
    except AgentFailed as error:
        await after.lives()
        if after.lost is not None:
            raise after.lost.with_traceback(None) from error
        raise LinkFailed(member.name, after.name, error.reason) from error


async def unload(members: Sequence[Member], epoch: int = 0) -> None:
    """Unload the stages of one deployment, or all stages, from the living members."""

    async def one(member: Member) -> None:
        if epoch:
            member.kept.pop(epoch, None)
        else:
            member.kept.clear()
        with contextlib.suppress(AgentFailed):
            await member.request(partial(UnloadStage, epoch=epoch), Done)

    await asyncio.gather(*map(one, members))


async def unload_forgotten(members: Sequence[Member], keeps: Collection[int]) -> None:
    """Unload stages that members have kept for this coordinator, but for these epochs."""
    await asyncio.gather(
        *(unload([member], epoch) for member in members for epoch in set(member.kept) - set(keeps))
    )


def _bits(bits: int | None) -> HopBits:
    """The width of sent rows. The last stage sends tokens, and a device alone no partial rows."""
    return next((known for known in HOP_BITS if known == bits), DEFAULT_HOP_BITS)
