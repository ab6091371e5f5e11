"""Finds out whether a device or only a link was lost, once a device says that it lost another.

A device reports the next one of the ring, or another member of its team. If the reported device is
alive, the link between them has failed. A dead device is the roster's business.

When a team loses a member, its other members may close their connections too, and report each
other. So all reports of a team are judged together. A lost device explains them all. If everybody
is alive, a report counts before those that are about devices with a report of their own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from coordinator.errors import LinkFailed
from coordinator.loading.deployment import Deployment
from coordinator.loading.models import Models
from coordinator.loading.state import Lost
from coordinator.roster.members import Member, Roster
from wire.messages import PeerLost

Pair = tuple[Member, Member]
"""The source and the target of a report."""


class Doubts:
    """The reports of lost peers that are being judged."""

    def __init__(self, roster: Roster, models: Models) -> None:
        self._roster = roster
        self._models = models
        self._open: dict[tuple[int, tuple[Member, ...]], dict[Pair, str]] = {}
        """The reports of an epoch, by the team or the two devices that they are about."""
        self._tasks: set[asyncio.Task[None]] = set()

    def report(self, source: Member, message: PeerLost) -> None:
        """Begin to judge a report. One about a device that ``source`` does not talk to is dropped.

        A deployment that was broken before may close its connections in any order. So reports
        about its teams are dropped too.
        """
        deployment = self._models.of_epoch(message.epoch)
        if deployment is None:
            return
        group = deployment.team_of(source)
        target = next((member for member in group if member.device == message.device), None)
        after = deployment.after(source)
        if after is not None and after.device == message.device:
            group, target = (source, after), after
        elif self._models.ended_by(deployment) is not None:
            return
        if target is None or target is source:
            return
        key = (deployment.epoch, group)
        is_new = key not in self._open
        self._open.setdefault(key, {}).setdefault((source, target), message.reason)
        if is_new:
            task = asyncio.create_task(self._judge(deployment, group))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _judge(self, deployment: Deployment, group: tuple[Member, ...]) -> None:
        key = (deployment.epoch, group)
        reports, heard = self._open[key], set[Member]()
        try:
            while missing := {target for _, target in reports} - heard:
                await asyncio.gather(*(member.lives() for member in missing))
                heard |= missing
        finally:
            del self._open[key]
        if any(member.lost is not None for member in group):
            return  # The roster itself reports lost devices.
        is_news = self._models.ended_by(deployment) is None
        if not is_news and group in deployment.teams:
            return
        source, target = _cause(list(reports))
        reason = reports[source, target]
        self._roster.fail_link(source, target, reason, used=True)
        if is_news:
            error = LinkFailed(source.name, target.name, reason)
            self._models.apply(deployment.name, Lost(error))


def _cause(reports: Sequence[Pair]) -> Pair:
    """The report that explains the others."""
    for source, target in reports:
        if not any(other is target and about is not source for other, about in reports):
            return source, target
    return reports[0]
