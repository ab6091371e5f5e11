"""Moves a loaded model to another plan. Its answers go on there.

Where memory allows, the new stages are loaded beside the old ones, which answer meanwhile. The
tokens that each answer has so far run through the new stages. Then these take over, and the old
ones are unloaded. So an answer pauses for about one token.

Otherwise the old stages are unloaded first. The devices have the new blocks on their disks by then,
so answers pause while stages are loaded.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from coordinator.errors import AgentDamaged, AgentFailed, AgentLost, LinkFailed, Moved
from coordinator.loading.deployment import Deployment, Planned, unload
from coordinator.loading.models import Models
from coordinator.loading.remeasuring import run_while
from coordinator.loading.state import MoveBegan, MovedOver, Release, deployment_of
from coordinator.roster.members import Member, Roster
from wire.patience import within

log = logging.getLogger(__name__)

WARM_S = 120.0
"""The longest time for the tokens of present answers. Then the new stages take over without."""

SOON_S = 0.5
"""If the last tokens ran through the new stages in this time, so will those that came meanwhile."""

ROUNDS = 3
"""How often the tokens of present answers run ahead at most."""

CarryOut = Callable[[Planned, Deployment], Awaitable[Deployment]]
FindDamage = Callable[[int], AgentDamaged | None]
Warm = Callable[[Deployment, Deployment], Coroutine[Any, Any, None]]


async def _leave_cold(before: Deployment, after: Deployment) -> None:
    """Run nothing ahead."""


class Mover:
    """Moves models between plans."""

    def __init__(
        self, roster: Roster, models: Models, carry_out: CarryOut, damage: FindDamage
    ) -> None:
        """Take what moves need.

        carry_out: loads a plan in place of a deployment, beside those that answer.
        damage: returns what was found damaged of it since.
        """
        self._roster = roster
        self._models = models
        self._carry_out = carry_out
        self._damage = damage
        self.warm: Warm = _leave_cold
        """Runs what the sequences of one deployment have so far through the stages of another."""
        self._releases: set[asyncio.Task[None]] = set()
        models.carry_out(Release, self._release)

    async def move(self, deployment: Deployment, planned: Planned, reason: Moved) -> None:
        """Move a deployment that answers to a plan whose blocks its devices have.

        The caller holds the turn. Raises CoordinatorError, ModelError, PlanError.
        """
        if self._fits_beside(planned):
            try:
                placed = await self._carry_out(planned, deployment)
            except (AgentLost, LinkFailed):
                raise
            except AgentFailed as error:
                log.warning("%s does not fit beside itself: %s", deployment.name, error)
            else:
                await self._take_over(deployment, placed, reason)
                return
        self._models.apply(deployment.name, MoveBegan(reason, planned))

    async def move_together(
        self, moves: Sequence[tuple[Deployment, Planned]], reason: Moved
    ) -> None:
        """Move deployments as ``move`` does.

        If one has no room beside all that is loaded, all leave their places before any is loaded.
        """
        if all(self._fits_beside(planned) for _, planned in moves):
            for deployment, planned in moves:
                await self.move(deployment, planned, reason)
        else:
            for deployment, planned in moves:
                self._models.apply(deployment.name, MoveBegan(reason, planned))

    async def _take_over(self, before: Deployment, after: Deployment, reason: Moved) -> None:
        try:
            await self._run_ahead(before, after)
            for member in after.devices:
                if member.lost is not None:
                    raise member.lost.with_traceback(None)
            damage = self._damage(after.epoch)
            if damage is not None:
                raise damage
            self._models.require(before)
        except BaseException:  # Raised again. Also when cancelled, the new stages must not stay.
            await asyncio.shield(unload(after.devices, after.epoch))
            raise
        self._models.apply(before.name, MovedOver(after, reason))
        log.warning("%s answers on %s now: %s", after.name, after.where, reason)

    async def _run_ahead(self, before: Deployment, after: Deployment) -> None:
        """Run the tokens of present answers through the new stages, until few are missing."""
        for _ in range(ROUNDS):
            begun_s = time.monotonic()
            try:
                await within(
                    run_while(self._lasts(before, after), self.warm(before, after)), WARM_S
                )
            except asyncio.TimeoutError:
                return
            if time.monotonic() - begun_s < SOON_S:
                return

    def _lasts(self, before: Deployment, after: Deployment) -> Callable[[], bool]:
        """Return what tells whether the old stages answer, and none of the new ones is lost."""
        return lambda: (
            self._models.ended_by(before) is None
            and all(member.lost is None for member in after.devices)
            and self._damage(after.epoch) is None
        )

    def _fits_beside(self, planned: Planned) -> bool:
        """Whether each device has the memory for its new stage beside all that it has loaded."""
        for stage in planned.plan.stages:
            parts = [part.memory_bytes for part in stage.members] or [stage.memory_bytes]
            for name, size_bytes in zip(stage.devices, parts, strict=True):
                member = self._roster.find(planned.devices[name])
                if member is None or not self._has_room(member, size_bytes):
                    return False
        return True

    def _has_room(self, member: Member, size_bytes: int) -> bool:
        loaded_bytes = 0
        for _, state in self._models.present():
            deployment = deployment_of(state)
            if deployment is not None:
                loaded_bytes += _loaded_bytes(deployment, member)
        # A heartbeat says what is free. The first one may not have come yet.
        free_bytes = member.memory_available_bytes or size_bytes
        return size_bytes <= min(member.profile.memory_bytes - loaded_bytes, free_bytes)

    def _release(self, action: Release) -> None:
        task = asyncio.create_task(unload(action.deployment.devices, action.deployment.epoch))
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)


def _loaded_bytes(deployment: Deployment, member: Member) -> int:
    """Return the memory that a deployment's stage takes on a device."""
    return sum(
        answer.memory_bytes
        for team, answers in zip(deployment.teams, deployment.loaded, strict=True)
        for one, answer in zip(team, answers, strict=True)
        if one.device == member.device
    )
