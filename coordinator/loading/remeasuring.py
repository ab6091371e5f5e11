"""Measures what plans lack, and what may have healed, where that disturbs nobody.

A machine without a stage is measured at any time, and no request ends that. Others, and links to
them, are measured while nothing is answered. A request ends such a measurement, and it begins again
later.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from coordinator.errors import CoordinatorError
from coordinator.loading.deployment import Deployment, Planned
from coordinator.loading.models import Models
from coordinator.loading.stale import Link, Stale, device_cost, ends_of, link_cost
from coordinator.loading.state import Serving
from coordinator.loading.turns import Turns
from coordinator.roster.measurements import (
    machines,
    measure_again,
    measure_blocks,
    try_links,
    unmeasured_widths,
)
from coordinator.roster.members import Member, Roster

log = logging.getLogger(__name__)

POLL_S = 0.05
"""A measurement ends so soon after a request has come."""

PATIENCE_S = 120.0
"""Links of a device that joined are measured while answers run, if nothing was quiet for so long.
One link is measured at each look."""

LinkCosts: TypeAlias = Mapping[Link, float]
Result = TypeVar("Result")


class Remeasuring:
    """Knows what should be measured, and when that may be."""

    def __init__(
        self, roster: Roster, models: Models, turns: Turns, clock: Callable[[], float]
    ) -> None:
        self._roster = roster
        self._models = models
        self._turns = turns
        self._clock = clock
        self.slow: dict[Member, float] = {}
        """How many times longer than measured devices took when they ran a stage last."""
        self._stale = Stale()
        self._tried: set[tuple[Member, tuple[int, ...]]] = set()
        """Devices and widths that were asked for. Some devices cannot measure all of them."""
        self._noisy_since_s: float | None = None
        """Since when no look has found a quiet moment."""

    def keep(self) -> None:
        """Forget devices that have left."""
        here = self._roster.members
        self._stale.keep(self._roster)
        self.slow = {one: self.slow[one] for one in here if one in self.slow}
        self._tried = {tried for tried in self._tried if tried[0] in here}

    def link_costs(self, deployment: Deployment) -> LinkCosts:
        """Return the present costs of a deployment's links."""
        costs = {link: link_cost(self._roster, link) for link in _links(deployment.teams)}
        return {link: cost for link, cost in costs.items() if cost is not None}

    def new_links(self, moves: Iterable[tuple[Deployment, Planned]]) -> list[Link] | None:
        """Return the links that models would use after moves, and do not use now.

        None if a device of a plan has left.
        """
        here = {member.device: member for member in self._roster.members}
        found: dict[Link, None] = {}
        for before, planned in moves:
            devices = [name for stage in planned.plan.stages for name in stage.devices]
            if not all(planned.devices[name] in here for name in devices):
                return None
            teams = [
                [here[planned.devices[name]] for name in stage.devices]
                for stage in planned.plan.stages
            ]
            used = set(_links(before.teams))
            found |= dict.fromkeys(link for link in _links(teams) if link not in used)
        return list(found)

    async def prove(self, deployment: Deployment, links: Iterable[Link]) -> list[Link]:
        """Measure links again, one at a time, because that disturbs answers less.

        Nobody uses them, so nothing has told what they cost since they were measured. Returns the
        links that were measured or have failed. Others wait if a user or a loss waits for the turn.
        """
        done: list[Link] = []

        def answers() -> bool:
            return self._models.ended_by(deployment) is None

        with contextlib.suppress(CoordinatorError):
            async with self._turns.unasked("the links of a better plan are being measured"):
                for link in links:
                    if self._turns.is_awaited:
                        break
                    work = try_links(self._roster, [link], self._turns.report)
                    if await run_while(answers, work) is not None:
                        done.append(link)
        return done

    def left(self, before: Deployment, links: LinkCosts, now: Deployment) -> None:
        """Note slow devices and links that a model has left, to measure them again.

        links: what the links of the deployment before cost when they were good.
        """
        now_s = self._clock()
        for member in self.slow:
            if member in before.devices and member not in now.devices:
                self._stale.note(member, device_cost(member, now.spec), now_s)
        kept = self.link_costs(now)
        for link, good in links.items():
            cost = link_cost(self._roster, link)
            if link not in kept and cost is not None and cost > good:
                self._stale.note(link, good, now_s)

    async def measure(self, deployment: Deployment) -> None:
        """Measure what is missing or may have healed, as far as that disturbs nobody."""
        now_s = self._clock()
        is_quiet = self._is_quiet()
        if is_quiet:
            self._noisy_since_s = None
        elif self._noisy_since_s is None:
            self._noisy_since_s = now_s
        apart = self._apart()
        free = list(self._roster.members) if is_quiet else apart
        wanted = self._wanted(deployment)
        missing = self.missing(deployment, shares=not deployment.request.no_teams)
        asked = [
            one
            for one in free
            if one.device in missing and (one, missing[one.device]) not in self._tried
        ]
        # No request ends a measurement of these, so they come first.
        asked = [one for one in asked if one in apart] or asked
        links = [
            link
            for link in self._roster.links_to_measure(wanted)
            if self._roster.link_failure(*link) is None and self._may_use(link, free)
        ]
        due = [what for what in self._stale.due(now_s) if all(one in free for one in ends_of(what))]
        if not (asked or links or due):
            return

        def answers() -> bool:
            return self._models.ended_by(deployment) is None and not self._turns.is_awaited

        def until_asked(ends: Iterable[Member]) -> Callable[[], bool]:
            """Requests end what disturbs their answers."""
            disturbs = not all(one in apart for one in ends)
            return lambda: answers() and not (disturbs and not self._is_quiet())

        async with self._turns.unasked("a device or link is being measured"):
            if asked:
                await run_while(
                    until_asked(asked), self._measure_blocks(deployment, asked, missing)
                )
            elif links and is_quiet:
                ends = itertools.chain.from_iterable(links)
                work = try_links(self._roster, links, self._turns.report)
                await run_while(until_asked(ends), work)
            elif links:  # One link at a time disturbs answers less, and it is over soon.
                work = try_links(self._roster, links[:1], self._turns.report)
                await run_while(lambda: self._models.ended_by(deployment) is None, work)
            else:
                await run_while(
                    until_asked(ends_of(due[0])), self._measure_again(deployment, due[0])
                )

    def _apart(self) -> list[Member]:
        """Return the members on machines without a stage."""
        serving = {
            member
            for _, state in self._models.present()
            if isinstance(state, Serving)
            for member in state.deployment.devices
        }
        return [
            member
            for residents in machines(self._roster.members)
            if not serving.intersection(residents)
            for member in residents
        ]

    def _may_use(self, link: Link, free: list[Member]) -> bool:
        noisy_s = 0.0 if self._noisy_since_s is None else self._clock() - self._noisy_since_s
        return noisy_s >= PATIENCE_S or all(member in free for member in link)

    def _wanted(self, deployment: Deployment) -> list[Member]:
        """Return the members that the user has not excluded."""
        excluded = deployment.request.exclude
        return [one for one in self._roster.members if one.device not in excluded]

    def missing(self, deployment: Deployment, *, shares: bool) -> dict[str, tuple[int, ...]]:
        """Return the widths that devices have not measured, by their ids."""
        request = deployment.request
        return unmeasured_widths(
            self._wanted(deployment),
            deployment.spec,
            request.bits,
            rows=request.slots > 1,
            shares=shares,
        )

    async def _measure_blocks(
        self, deployment: Deployment, asked: list[Member], missing: Mapping[str, tuple[int, ...]]
    ) -> None:
        """Have devices measure what is missing. What failed once is not asked again."""
        request = deployment.request
        try:
            await measure_blocks(
                self._wanted(deployment),
                deployment.spec,
                request.bits,
                self._turns.report,
                rows=request.slots > 1,
                shares=not request.no_teams,
                only=asked,
            )
        except asyncio.CancelledError:
            raise  # A request came in between.
        except CoordinatorError as error:
            log.info("not measured: %s", error)
        self._tried |= {(one, missing[one.device]) for one in asked}

    async def _measure_again(self, deployment: Deployment, what: Member | Link) -> None:
        cost = None
        try:
            if isinstance(what, tuple):
                if await try_links(self._roster, [what], self._turns.report):
                    cost = link_cost(self._roster, what)
            else:
                await measure_again(self._roster, what, [], self._turns.report)
                cost = device_cost(what, deployment.spec)
                self.slow.pop(what, None)  # It was measured as it is now.
        except CoordinatorError as error:
            log.info("not measured again: %s", error)
        self._stale.measured(what, cost, self._clock())

    def _is_quiet(self) -> bool:
        """Whether nothing is answered and nobody waits for an answer."""
        return all(one.slots.is_idle for one in self._models.all_serving)


def _links(teams: Sequence[Sequence[Member]]) -> list[Link]:
    """The links of a ring of stages, those of its leads, and the links inside of each team."""
    leads = [team[0] for team in teams]
    ring = zip(leads, [*leads[1:], *leads[:1]], strict=True)
    found = itertools.chain(ring, *(itertools.permutations(team, 2) for team in teams))
    return list(dict.fromkeys((one, other) for one, other in found if one is not other))


async def run_while(holds: Callable[[], bool], work: Coroutine[Any, Any, Result]) -> Result | None:
    """Return the result of ``work``, or None if it was ended because ``holds`` did not."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done() and holds():
            await asyncio.wait({task}, timeout=POLL_S)
        return task.result() if task.done() else None
    finally:
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(task, return_exceptions=True)
