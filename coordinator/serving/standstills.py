"""Finds answers whose rows were lost between two stages that are both well.

Then no token comes, and no connection or device is lost that anybody would see. There are two
signs. One is a deployment at a standstill: each lead says that it has nothing to do, and answers
wait all the same. The other is an answer that stands while others on the same stages go on.

Such an answer runs again from its last token (``Gateway``). If it stands again, the model is placed
anew. An answer may take long for many reasons. So no time is predicted here.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

from coordinator.loading.deployment import Deployment
from coordinator.loading.models import Models
from coordinator.roster.members import Member, Roster
from coordinator.serving.gateway import Gateway
from wire import limits
from wire.messages import Heartbeat, Message, StageCounts

STANDSTILL_S = 4.0
"""After so long without work at any stage, rows are lost. It covers heartbeats, which are a second
old, and a long prompt on its way to the first stage."""

LEAST_BEATS = 3
"""Each lead must have said so often that it has nothing to do."""

Work = tuple[int, int]
"""Passes and frames of a stage."""


@dataclass
class _Quiet:
    """How long a deployment has done nothing, while an answer waits."""

    work: dict[Member, Work] = field(default_factory=dict)
    beats: Counter[Member] = field(default_factory=Counter)
    quiet_s: float = 0.0
    newest_s: float = 0.0

    def take(self, member: Member, counts: StageCounts, now_s: float) -> None:
        """Take a heartbeat of a lead."""
        work = counts.passes, counts.frames
        if counts.busy or self.work.get(member, work) != work:
            self.quiet_s = 0.0
            self.beats.clear()
        # A coordinator that stood still reads many heartbeats at once. They count as one.
        self.quiet_s += min(now_s - self.newest_s, limits.HEARTBEAT_S) if self.beats else 0.0
        self.work[member], self.newest_s = work, now_s
        self.beats[member] += not counts.busy


class Standstills:
    """Has answers run again whose rows were lost."""

    def __init__(self, roster: Roster, models: Models, gateway: Gateway) -> None:
        self._models = models
        self._gateway = gateway
        self._quiet: dict[int, _Quiet] = {}
        """Maps the epochs of deployments with answers that wait."""
        roster.subscribe(self._on_event, lambda *_: None)

    def _on_event(self, member: Member, message: Message) -> None:
        if isinstance(message, Heartbeat):
            for stage in message.stages:
                deployment = self._models.of_epoch(stage.epoch)
                if deployment is not None and member in deployment.leads and stage.counts:
                    self._look(deployment, member, stage.counts)

    def _look(self, deployment: Deployment, member: Member, counts: StageCounts) -> None:
        epoch = deployment.epoch
        if not self._gateway.waits(deployment):
            self._quiet.pop(epoch, None)
            return
        if epoch not in self._quiet:  # Others may have ended.
            self._quiet = {
                known: one
                for known, one in self._quiet.items()
                if self._models.of_epoch(known) is not None
            }
        quiet = self._quiet.setdefault(epoch, _Quiet())
        quiet.take(member, counts, time.monotonic())
        stands = quiet.quiet_s >= STANDSTILL_S and all(
            quiet.beats[lead] >= LEAST_BEATS for lead in deployment.leads
        )
        if stands:
            del self._quiet[epoch]
        self._gateway.run_again(deployment, only_passed=not stands)
