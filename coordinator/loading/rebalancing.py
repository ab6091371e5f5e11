"""Moves a model to a better plan by itself, compares what it measures there, and moves back.

Each few seconds the loop looks at the figures. If they have changed, it plans the model again.
coordinator.loading.rebalance has the rule that says when to move. After a move, the measured tokens
are compared with those before it. If they take longer, the model moves back, and the rule remembers
the plan. Models that were planned together move, are compared and move back together.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import operator
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from coordinator.errors import CoordinatorError, Moved
from coordinator.loading.deployment import Deployment, Planned
from coordinator.loading.models import Models
from coordinator.loading.operations import Compared, Operations
from coordinator.loading.paces import planned_s, token_s
from coordinator.loading.rebalance import (
    HORIZON_S,
    Key,
    Memory,
    is_worse,
    judge,
)
from coordinator.loading.remeasuring import LinkCosts, Remeasuring, run_while
from coordinator.loading.stale import Link
from coordinator.loading.state import Serving
from coordinator.loading.tempo import Tempo, in_common
from coordinator.loading.turns import Turns
from coordinator.roster.members import Member, Roster
from coordinator.story import Story
from model.errors import ModelError
from planning.errors import RequestInvalid
from planning.plan import PlanError

log = logging.getLogger(__name__)

LOOK_S = 5.0
"""Pause between two looks."""

REST = 20.0
"""After planning, the loop plans nothing for this many times as long. So it takes a processor's
twentieth at most."""

STEP = math.log(1.25)
"""A device's measured time counts as changed from this step of its logarithm on."""

FAILURES = (CoordinatorError, ModelError, PlanError, RequestInvalid, OSError)


@dataclass(frozen=True, slots=True)
class _Move:
    """A move that was begun.

    key: of the plans that were chosen.
    moved: the epoch of each model that moves before it, and its plan's key.
    before_s: measured seconds of a token before it, by model and sequences in flight.
    back: how the models that move were planned before. Empty if they do not move back.
    """

    key: Key
    moved: Mapping[str, tuple[int, Key]]
    before_s: Mapping[str, Mapping[int, float]]
    back: Mapping[str, Planned]


@dataclass(slots=True)
class _Watched:
    """The loop's knowledge of one deployment.

    links: what its links cost when the loop saw them first.
    basis: the figures from which ``compared`` was made.
    trial: a move of it, or of those that were planned with it, until tokens have been compared.
    proved_s: when links that it does not use were measured again for a better plan.
    """

    deployment: Deployment
    memory: Memory
    links: LinkCosts
    trial: _Move | None = None
    basis: object = None
    compared: Compared | None = None
    plan_from_s: float = -math.inf
    proved_s: dict[Link, float] = field(default_factory=dict)


class Rebalancer:
    """Follows the figures of every model that answers."""

    def __init__(
        self,
        roster: Roster,
        models: Models,
        turns: Turns,
        operations: Operations,
        story: Story,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._roster = roster
        self._models = models
        self._turns = turns
        self._operations = operations
        self._story = story
        self._clock = clock
        self._tempo = Tempo(roster, models, clock)
        self._watched: dict[str, _Watched] = {}
        self._remeasuring = Remeasuring(roster, models, turns, clock)

    async def follow(self) -> None:
        """Look for ever."""
        told: set[str] = set()
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await self.look()
            except Exception as error:  # The outermost loop: a failed look is not the last one.
                text = f"{type(error).__name__}: {error}"
                if text not in told:
                    told.add(text)
                    log.exception("no other plan was looked for: %s", text)

    async def look(self) -> None:
        """Look at every model that answers once."""
        names = {name for name, _ in self._models.present()}
        self._watched = {name: one for name, one in self._watched.items() if name in names}
        for _, state in self._models.present():
            if isinstance(state, Serving) and not self._turns.is_taken:
                await self._look(state.deployment)

    async def _look(self, deployment: Deployment) -> None:
        watched = self._recognised(deployment)
        self._remeasuring.keep()
        group = self._operations.answering_with(deployment)
        if any(other.name < deployment.name for other in group):
            return  # It is looked at with that one.
        if watched.trial is not None and await self._is_moved_back(watched, watched.trial):
            return
        with contextlib.suppress(*FAILURES):
            await self._remeasuring.measure(deployment)
        await self._plan(watched)
        compared = watched.compared
        if compared is None or not self._answers(deployment):
            return
        watched.memory, verdict = judge(watched.memory, compared.choice, self._clock())
        if verdict.moves and await self._are_links_proved(watched, compared):
            since_s = watched.memory.better_since_s or -math.inf
            before_s = {one.name: self._tempo.token_s(one.epoch, since_s) for one in group}
            log.warning("%s moves to a better plan: %s", deployment.name, verdict.why)
            moves, reason = compared.moves_of(deployment), Moved(f"{MOVES}: {verdict.why}")
            back = _way_back(compared, moves)
            move = _Move(compared.choice.key, _moved(moves), before_s, back)
            await self._move(watched, moves, move, reason)

    async def _are_links_proved(self, watched: _Watched, compared: Compared) -> bool:
        """Measure the links that a move begins to use. Returns whether their figures are new.

        If one link got worse, so did others of its device. Only those in use have told it.
        """
        links = self._remeasuring.new_links(compared.moves_of(watched.deployment))
        if links is None:
            return False  # Another plan is made as soon as one is due.
        # The cause of the move is older, so each link is measured once for it.
        since_s = watched.memory.better_since_s or -math.inf
        watched.proved_s = {link: at for link, at in watched.proved_s.items() if at >= since_s}
        links = [link for link in links if link not in watched.proved_s]
        if not links:
            return True
        done = await self._remeasuring.prove(watched.deployment, links)
        watched.proved_s |= dict.fromkeys(done, self._clock())
        watched.basis, watched.plan_from_s = None, -math.inf  # It plans at the next look.
        return False

    def _recognised(self, deployment: Deployment) -> _Watched:
        """Return what is known of a deployment. One that replaced another counts as a move.

        A load by a user does not: its plan is new, and only news can make another one better.
        """
        before = self._watched.get(deployment.name)
        if before is not None and before.deployment.epoch == deployment.epoch:
            before.deployment = deployment  # Its stages may have been taken over.
            return before
        now_s = self._clock()
        costs = self._remeasuring.link_costs(deployment)
        found = _Watched(deployment, Memory(), costs)
        if before is not None and self._models.is_replaced(before.deployment):
            found.links = {one: min(costs[one], before.links.get(one, math.inf)) for one in costs}
            found.memory = before.memory.moved(now_s)
            found.trial = before.trial
            self._remeasuring.left(before.deployment, before.links, deployment)
        self._watched[deployment.name] = found
        return found

    def _answers(self, deployment: Deployment) -> bool:
        return self._models.ended_by(deployment) is None

    def _may_go_on(self, deployment: Deployment) -> bool:
        """Whether work for a move may go on. Losses and users do not wait for it."""
        return self._answers(deployment) and not self._turns.is_awaited

    # ---- figures --------------------------------------------------------------------------------

    def _basis(self, deployment: Deployment) -> object:
        """Return a value that changes when a figure changes from which plans are made."""
        members = self._roster.members
        paces = []
        group = self._operations.answering_with(deployment)
        for one in group:
            for member in one.devices:
                measured_s, expected_s = token_s(one, member), planned_s(one, member)
                if measured_s and expected_s:
                    paces.append((member.device, round(math.log(measured_s / expected_s) / STEP)))
        return (
            [one.epoch for one in group],
            [
                (one.device, one.joined_s, one.profile, [_timings(one, of) for of in group])
                for one in members
            ],
            self._roster.links(),
            [link for link, _ in self._roster.failed_links()],
            paces,
            [(one.device, factor) for one, factor in self._remeasuring.slow.items()],
        )

    # ---- planning and moving --------------------------------------------------------------------

    async def _plan(self, watched: _Watched) -> None:
        """Choose again if figures have changed and planning is due."""
        deployment, begun_s = watched.deployment, self._clock()
        basis = self._basis(deployment)
        if basis == watched.basis or begun_s < watched.plan_from_s:
            return
        without = self._without(deployment)
        try:
            async with self._turns.unasked("another plan is being looked for"):
                work = self._operations.compare(
                    deployment, self._remeasuring.slow, measures=False, without=without
                )
                compared = await run_while(lambda: self._may_go_on(deployment), work)
        except FAILURES as error:
            log.info("%s: no other plan: %s", deployment.name, error)
            compared = None
        else:
            if compared is None:  # It made way for a user, and these figures are still news.
                basis = None
        watched.plan_from_s = self._clock() + REST * (self._clock() - begun_s)
        watched.basis = basis
        watched.compared = compared
        if compared is None:
            watched.memory = replace(watched.memory, better_since_s=None)
            return
        self._remeasuring.slow = dict(compared.slow)
        watched.basis = self._basis(deployment)

    def _without(self, deployment: Deployment) -> list[Member]:
        """Return devices that no model uses, and that have not measured a model to be planned."""
        group = self._operations.answering_with(deployment)
        missing = {
            device for one in group for device in self._remeasuring.missing(one, shares=False)
        }
        used = {member for one in group for member in one.devices}
        return [
            member
            for member in self._roster.members
            if member.device in missing and member not in used
        ]

    async def _is_moved_back(self, watched: _Watched, trial: _Move) -> bool:
        """Compare the tokens of a move with those before. Returns whether the models move back."""
        serving = {one.name: one for one in self._models.all_serving}
        if not trial.moved.keys() <= serving.keys():
            return False  # They are being placed.
        now = {name: serving[name] for name in trial.moved}
        if any(
            now[name].epoch == epoch or _key(now[name]) != key
            for name, (epoch, key) in trial.moved.items()
        ):
            watched.trial = None  # Something else has come of it.
            return False
        try:
            before_s, after_s = self._tempos(watched, trial, serving)
        except LookupError:
            return False  # Too few tokens have come.
        watched.trial = None
        took = f"{before_s * 1e3:.3g} ms a token before, {after_s * 1e3:.3g} ms after"
        if not is_worse(before_s, after_s) or not trial.back:
            watched.memory = watched.memory.kept()
            self._story.tell("move kept", watched.deployment.name, took)
            return False
        watched.memory = watched.memory.rolled_back(trial.key, self._clock())
        log.warning("%s moves back: %s", " and ".join(now), took)
        moves = [(one, trial.back[name]) for name, one in now.items()]
        move, who = _Move(trial.key, {}, {}, {}), "the model moves"
        if len(moves) > 1:
            who = "the models move"
        await self._move(watched, moves, move, Moved(f"{who} back: {took}"))
        return True

    def _tempos(
        self, watched: _Watched, trial: _Move, serving: Mapping[str, Deployment]
    ) -> tuple[float, float]:
        """Return the seconds of a token before a move and after it.

        Of several models it is the mean by their weights. A model that is asked nothing any more is
        waited for a while. Raises LookupError if too few tokens have come.
        """
        moved_s = watched.memory.moved_s or -math.inf
        pairs, missing = dict[str, tuple[float, float]](), False
        for name, known_s in trial.before_s.items():
            one = serving.get(name)
            if one is None or not known_s:
                continue
            since_s = -math.inf if name in trial.moved else moved_s
            try:
                pairs[name] = in_common(known_s, self._tempo.token_s(one.epoch, since_s))
            except LookupError:
                missing = True
        if not pairs or (missing and self._clock() - moved_s < HORIZON_S):
            raise LookupError
        weights = [serving[name].request.together.get(name, 1.0) for name in pairs]
        before_s, after_s = (
            math.fsum(map(operator.mul, weights, each)) / math.fsum(weights)
            for each in zip(*pairs.values(), strict=True)
        )
        return before_s, after_s

    async def _prepare(self, moves: Sequence[tuple[Deployment, Planned]]) -> bool:
        for deployment, planned in moves:
            await self._operations.prepare(planned, deployment)
        return True

    async def _move(
        self,
        watched: _Watched,
        moves: Sequence[tuple[Deployment, Planned]],
        move: _Move,
        reason: Moved,
    ) -> None:
        """Move to a plan, or let the keeper carry it out where memory is short."""
        deployment, mover = watched.deployment, self._operations.mover
        watched.trial = move if move.back else None

        def may_go_on() -> bool:
            return self._may_go_on(deployment)

        try:
            async with self._turns.unasked("a move to a better plan is under way"):
                if not await run_while(may_go_on, self._prepare(moves)):
                    return
                if len(moves) == 1:
                    await run_while(may_go_on, mover.move_together(moves, reason))
                else:  # Some of them would be at their new places, and the others not.
                    await mover.move_together(moves, reason)
                if not all(self._answers(one) for one, _ in moves):
                    watched.memory = watched.memory.moved(self._clock())
        except FAILURES as error:
            log.warning("%s is not moved: %s", deployment.name, error)
            watched.memory = watched.memory.moved(self._clock())


MOVES = "the model moves to a better plan"


def _key(deployment: Deployment) -> Key:
    return deployment.plan.layout


def _timings(member: Member, deployment: Deployment) -> object:
    """The measured block times of a device, without those of other models."""
    known = member.timings.get(deployment.spec, {})
    return {width: tuple(timings) for width, timings in known.items()}


def _moved(moves: Iterable[tuple[Deployment, Planned]]) -> dict[str, tuple[int, Key]]:
    """Return the epoch of each model before it moves, and the key of its new plan."""
    return {one.name: (one.epoch, to.plan.layout) for one, to in moves}


def _way_back(
    compared: Compared, moves: Iterable[tuple[Deployment, Planned]]
) -> dict[str, Planned]:
    """Return how to move back, by model. It is empty if no measured figure says whether to.

    A plan of less energy may be slower, and so may one of more throughput. What the user asked for
    is taken as it is.
    """
    planned = [compared.planned, *(to for _, to, _ in compared.beside)]
    if compared.choice.is_wished or any(
        one.request.objective.kind not in ("latency", "request") for one in planned
    ):
        return {}
    present = {one.name: plan for one, _, plan in compared.beside}
    return {
        one.name: replace(to, plan=present.get(one.name, compared.present)) for one, to in moves
    }
