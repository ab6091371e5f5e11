"""Waits a moment for a lost device that may still have its stage.

A connection to the coordinator may end although the device is well: a router forgets it, or a cable
is plugged again. Such an agent keeps its stage and joins again within a moment. If no stage of the
deployment is gone, nothing needs to be loaded.

A device whose process or network is gone is lost to its neighbours too. Their reports end the wait.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import replace

from coordinator.loading.deployment import Deployment, Team
from coordinator.loading.slots import Slots
from coordinator.roster.members import Member, Roster
from wire.messages import Message, PeerLost, StageDamaged
from wire.patience import within

RETURN_S = 1.5
"""An agent that is well is back within this time. A silence that both ends see is seen within
about a second of each other."""

TORN = 64
"""More reports than devices with stages of several models send at once."""


class Returns:
    """Takes over the stages of a deployment whose devices are back."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._torn: deque[int] = deque(maxlen=TORN)
        """The last epochs of which a stage was reported as lost or damaged."""
        roster.subscribe(self._on_event, lambda *_: None)

    def _on_event(self, member: Member, message: Message) -> None:
        if isinstance(message, (PeerLost, StageDamaged)):
            self._torn.append(message.epoch)
            self._roster.changed.fire()

    async def whole(self, broken: Deployment) -> Deployment | None:
        """Return the deployment with its returned devices, or None if one of them stays away."""
        deadline_s = time.monotonic() + RETURN_S
        with self._roster.changed.watch() as changed:
            while broken.epoch not in self._torn and not self._is_empty_handed(broken):
                changed.clear()
                teams = self._teams(broken)
                if teams is not None:
                    return _taken_over(broken, teams)
                try:
                    await within(changed.wait(), deadline_s - time.monotonic())
                except asyncio.TimeoutError:
                    break
        return None

    def _is_empty_handed(self, broken: Deployment) -> bool:
        """Whether a lost device is back without its stage."""
        here = {member.device: member for member in self._roster.members}
        lost = [member.device for member in broken.devices if member.lost is not None]
        return any(device in here and broken.epoch not in here[device].kept for device in lost)

    def _teams(self, broken: Deployment) -> tuple[Team, ...] | None:
        """Return the members that have the stages now, or None while one is missing."""
        here = {member.device: member for member in self._roster.members}
        if not {member.device for member in broken.devices} <= here.keys():
            return None
        return tuple(tuple(here[member.device] for member in team) for team in broken.teams)


def _taken_over(broken: Deployment, teams: tuple[Team, ...]) -> Deployment:
    """Return the same stages as another deployment. Its slots keep no rows."""
    for team in teams:
        for member in team:
            member.kept.pop(broken.epoch, None)
    return replace(
        broken, teams=teams, slots=Slots(broken.slots.total), takeover=broken.takeover + 1
    )
