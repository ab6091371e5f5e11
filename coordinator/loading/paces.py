"""Finds devices that run their part of a model slower than planned: hot, throttled or busy ones."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

from coordinator.loading.deployment import Deployment
from coordinator.loading.models import Models
from coordinator.roster.members import Member, Roster
from coordinator.story import Story
from planning.plan import Stage
from wire.messages import Heartbeat, Message, StageCounts

log = logging.getLogger(__name__)

SLOW = 2.0
"""From this many times the planned time on, a device is called slow."""

SLOW_BY_S = 2e-3
"""A device that is less behind its plan is not called slow. Nobody would notice."""

AS_PLANNED = 1.5
"""Below this, it is not called slow any more. The gap avoids a change of mind each second."""

ADVICE = (
    "look there for heat, a throttled clock or other programs (`shoal doctor`), "
    "or load the model without it (--exclude)"
)


def token_s(deployment: Deployment, member: Member) -> float | None:
    """Return the measured seconds of one token in a device's part. None: not known yet."""
    beat = member.beats.get(deployment.epoch)
    return beat.token_s if beat is not None and beat.token_s else None


def counts_of(deployment: Deployment, lead: Member) -> StageCounts | None:
    """Return what a stage of ``deployment`` has done. None: not known yet."""
    beat = lead.beats.get(deployment.epoch)
    return None if beat is None else beat.counts


def planned_s(deployment: Deployment, member: Member) -> float | None:
    """Return the planned seconds of ``token_s``, without waiting for other devices of a team."""
    return _expected_s(deployment, deployment.plan.stages).get(member)


def _expected_s(deployment: Deployment, stages: Sequence[Stage]) -> dict[Member, float]:
    """Return the predicted seconds of each device's ``token_s``, by the figures of ``stages``."""
    return {
        member: expected_s
        for stage, team in zip(stages, deployment.teams, strict=True)
        for member, expected_s in zip(
            team, [part.own_s for part in stage.members] or [stage.compute_s], strict=True
        )
    }


class Paces:
    """Tells the log and the story when a device becomes slow, and when it is no longer so."""

    def __init__(self, roster: Roster, models: Models, story: Story) -> None:
        self._models = models
        self._story = story
        self._slow: set[tuple[int, Member]] = set()
        """Pairs of a deployment's epoch and a device that is slow in it."""
        roster.subscribe(self._on_event, lambda *_: None)

    def _on_event(self, member: Member, message: Message) -> None:
        if isinstance(message, Heartbeat):
            for stage in message.stages:
                deployment = self._models.of_epoch(stage.epoch)
                if deployment is not None:
                    self._judge(member, deployment)

    def _judge(self, member: Member, deployment: Deployment) -> None:
        measured_s, expected_s = token_s(deployment, member), planned_s(deployment, member)
        if not measured_s or not expected_s:
            return
        key = (deployment.epoch, member)
        if key not in self._slow and _is_slow(measured_s, expected_s):
            present = {one for one in self._slow if self._models.of_epoch(one[0]) is not None}
            self._slow = present | {key}
            text = _text(measured_s, expected_s)
            self._story.tell("slow", member.name, text)
            log.warning("%s %s; %s", member.name, text, ADVICE)
        elif key in self._slow and measured_s < AS_PLANNED * expected_s + SLOW_BY_S:
            self._slow.remove(key)
            self._story.tell("as planned", member.name, f"{measured_s * 1e3:.3g} ms a token again")
            log.info("%s takes %.3g ms a token again", member.name, measured_s * 1e3)


def slow_devices(deployment: Deployment) -> list[str]:
    """Return a sentence for each device that is slow now."""
    found = []
    for member in deployment.devices:
        measured_s, expected_s = token_s(deployment, member), planned_s(deployment, member)
        if measured_s and expected_s and _is_slow(measured_s, expected_s):
            found.append(f"{member.name} {_text(measured_s, expected_s)}; {ADVICE}")
    return found


def slowness_of(
    deployment: Deployment, stages: Sequence[Stage], known: Collection[Member] = ()
) -> dict[Member, float]:
    """Return how many times longer than predicted each slow device takes.

    stages: those of the deployment with the present predictions.
    known: devices that were slow at the last look. They count until they are as predicted.
    """
    found = {}
    for member, expected_s in _expected_s(deployment, stages).items():
        measured_s = token_s(deployment, member)
        if not measured_s or not expected_s:
            continue
        is_still = member in known and measured_s >= AS_PLANNED * expected_s + SLOW_BY_S
        if is_still or _is_slow(measured_s, expected_s):
            found[member] = measured_s / expected_s
    return found


def _is_slow(measured_s: float, expected_s: float) -> bool:
    return measured_s >= max(SLOW * expected_s, expected_s + SLOW_BY_S)


def _text(measured_s: float, expected_s: float) -> str:
    """Say how much slower a device is than planned. Its name goes before."""
    return (
        f"takes {measured_s * 1e3:.3g} ms a token for its part, "
        f"{measured_s / expected_s:.1f} times the predicted {expected_s * 1e3:.3g} ms"
    )
