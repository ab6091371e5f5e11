"""Remembers devices and links that were bad when they last ran a stage, to measure them again.

A running stage tells how fast its device and its links are. Without a stage they tell nothing. So
nobody would notice that a device has cooled down, or that a link is as it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from coordinator.roster.members import Member, Roster
from model.spec import ModelSpec

FIRST_S = 60.0
LONGEST_S = 1800.0
"""The first pause before a measurement, and the longest one. Each is twice the one before."""

HEALED = 1.25
"""A cost of at most this many times the good one is good again."""

FRAME_BYTES = 16384
"""The size of the message by whose time a link is judged: a row of a middle-sized model."""

Link: TypeAlias = "tuple[Member, Member]"


@dataclass(slots=True)
class _Entry:
    """good: the cost in seconds when all was well."""

    good: float
    due_s: float
    pause_s: float = FIRST_S


class Stale:
    """Devices and links to measure again, with a growing pause."""

    def __init__(self) -> None:
        self._entries: dict[Member | Link, _Entry] = {}

    def note(self, what: Member | Link, good: float, now_s: float) -> None:
        """Remember a device or a link that was bad. ``good`` is its cost when it was good."""
        self._entries.setdefault(what, _Entry(good, now_s + FIRST_S))

    def due(self, now_s: float) -> list[Member | Link]:
        """Return what should be measured now, the one that waits longest first."""
        due = [what for what, entry in self._entries.items() if entry.due_s <= now_s]
        return sorted(due, key=lambda what: self._entries[what].due_s)

    def measured(self, what: Member | Link, cost: float | None, now_s: float) -> None:
        """Note the newest cost of what was measured. None: the measurement failed."""
        entry = self._entries[what]
        if cost is not None and cost <= HEALED * entry.good:
            del self._entries[what]
            return
        entry.pause_s = min(2 * entry.pause_s, LONGEST_S)
        entry.due_s = now_s + entry.pause_s

    def keep(self, roster: Roster) -> None:
        """Forget devices that have left. If they join again, they are measured anyway."""
        here = set(roster.members)
        for what in list(self._entries):
            if not here.issuperset(ends_of(what)):
                del self._entries[what]


def ends_of(what: Member | Link) -> tuple[Member, ...]:
    """Return a device alone, or both devices of a link."""
    return what if isinstance(what, tuple) else (what,)


def device_cost(member: Member, spec: ModelSpec) -> float:
    """Return the seconds of the model's blocks on a device, at all widths together."""
    known = member.timings.get(spec, {}).values()
    return sum(timing.decode_s for timings in known for timing in timings)


def link_cost(roster: Roster, link: Link) -> float | None:
    """Return the seconds of a message over a link, or None if the link is not known."""
    known = roster.link(*link)
    return None if known is None else known.rtt_s / 2 + FRAME_BYTES / known.bytes_per_s
