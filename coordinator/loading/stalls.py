"""Finds devices that send heartbeats while a pass of their stage does not end.

An accelerator may hang, or a disk that weights are read from. Such a device is dropped as if it
were lost. So its place is taken as that of any lost device, and the answers go on. Its agent joins
again once the pass has ended.

A device of a team is left to its team, which waits for no member for long (agent.mesh).
"""

from __future__ import annotations

from coordinator.loading.deployment import Deployment
from coordinator.loading.models import Models
from coordinator.roster.members import Member, Roster
from planning.plan import Stage
from wire.messages import Heartbeat, Message, StageCounts

STALL_FACTOR = 8.0
"""A pass that takes this many times the predicted time does not end soon."""

STALL_S = 5.0
"""A shorter pass is no stall. Other programs may have used the processor."""

FIRST_STALL_S = 60.0
"""The first pass after a load may read all weights from a slow disk."""


class Stalls:
    """Drops members whose stage has stalled."""

    def __init__(self, roster: Roster, models: Models) -> None:
        self._roster = roster
        self._models = models
        roster.subscribe(self._on_event, lambda *_: None)

    def _on_event(self, member: Member, message: Message) -> None:
        if isinstance(message, Heartbeat):
            for stage in message.stages:
                deployment = self._models.of_epoch(stage.epoch)
                if deployment is not None and stage.counts is not None:
                    self._judge(member, deployment, stage.counts)

    def _judge(self, member: Member, deployment: Deployment, counts: StageCounts) -> None:
        if self._models.ended_by(deployment) is not None:
            return
        stage = _stage_of(deployment, member)
        if stage is None:
            return
        encodes = deployment.spec.encodes
        running_s, limit_s = counts.running_us / 1e6, stall_s(stage, counts, encodes=encodes)
        if running_s > limit_s:
            predicted_s = pass_s(stage, counts.running_rows, encodes=encodes)
            self._roster.drop(
                member,
                f"it is alive, but a pass of its stage has computed for {running_s:.1f} s and was "
                f"predicted to take {predicted_s:.3g} s",
            )


def _stage_of(deployment: Deployment, member: Member) -> Stage | None:
    """Return the stage that a device runs alone."""
    for stage, team in zip(deployment.plan.stages, deployment.teams, strict=True):
        if team == (member,):
            return stage
    return None


def pass_s(stage: Stage, rows: int, *, encodes: bool = False) -> float:
    """Return the predicted seconds of a pass of so many rows, rather too long than too short.

    encodes: the stage is an encoder's, whose ``compute_s`` is that of a whole pass.
    """
    each_s = stage.prefill_s_per_token
    return max(rows, 1) * (each_s if encodes else max(stage.compute_s, each_s))


def stall_s(stage: Stage, counts: StageCounts, *, encodes: bool = False) -> float:
    """Return the seconds after which the pass of this moment counts as stalled."""
    least_s = STALL_S if counts.passes else FIRST_STALL_S
    predicted_s = pass_s(stage, counts.running_rows, encodes=encodes)
    return max(least_s, STALL_FACTOR * predicted_s)
