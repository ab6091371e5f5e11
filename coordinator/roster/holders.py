"""Which devices have the files that another one needs, and how near they are."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Collection
from functools import partial

from coordinator.errors import AgentFailed
from coordinator.roster.members import Member, Roster
from wire.messages import BlocksFound, FindBlocks, Holder

ANSWER_S = 2.0
"""The time for a device to look into its cache. One that is slower is not waited for."""

LEAST_SHARE = 0.25
"""A device is named if its link is at least this share of the best measured link into the asking
one. The coordinator itself, whose link is not measured, may be nearer than a slower one."""

MOST_ASKED = 4096
"""The most files that a device may ask for at once."""


async def holders(roster: Roster, device: str, sha256s: Collection[str]) -> tuple[Holder, ...]:
    """The devices that have some of these files, the nearest to ``device`` first.

    None that ``device`` cannot reach. Devices of about the same distance are mixed, so that not all
    load the same one.
    """
    asking = next((member for member in roster.members if member.device == device), None)
    if asking is None or not 0 < len(sha256s) <= MOST_ASKED:
        return ()
    wanted = frozenset(sha256s)
    near = _near(roster, asking)
    found = await asyncio.gather(*(_held(member, wanted) for member in near))
    return tuple(
        Holder(member.device, member.endpoints_for(asking), held)
        for member, held in zip(near, found, strict=True)
        if held
    )


def _near(roster: Roster, asking: Member) -> list[Member]:
    """The other devices that can be reached over good links, the nearest first.

    A link that was not measured counts as good as the best one.
    """
    others = [
        member
        for member in roster.members
        if member is not asking and roster.link_failure(asking, member) is None
    ]
    rates = {
        member.device: link.bytes_per_s
        for member in others
        if (link := roster.link(member, asking)) is not None
    }
    best = max(rates.values(), default=1.0)
    near = [member for member in others if rates.get(member.device, best) >= LEAST_SHARE * best]
    random.shuffle(near)
    return sorted(near, key=lambda member: -round(2 * math.log2(rates.get(member.device, best))))


async def _held(member: Member, wanted: frozenset[str]) -> tuple[str, ...]:
    """The files that a device says it has. It may lie: whoever fetches them checks."""
    request = member.request(partial(FindBlocks, sha256s=tuple(wanted)), BlocksFound)
    try:
        answer = await asyncio.wait_for(request, ANSWER_S)
    except (AgentFailed, asyncio.TimeoutError):
        return ()
    return tuple(wanted.intersection(answer.sha256s))
