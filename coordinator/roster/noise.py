"""Tells users which figures may have been measured on a busy machine."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from typing import Any

from coordinator.roster.members import Member
from model.spec import ModelSpec
from wire.conditions import Conditions, worst
from wire.profile import LinkProfile

Found = list[tuple[str, Conditions | None]]

_NAMES = {"memory": "memory bandwidth", "disk": "disk rate", "call": "time of a call"}


def device_noise(member: Member, links: Iterable[LinkProfile]) -> dict[str, Any] | None:
    """The noisy figures of a member, or None if no figure is noisy.

    ``figures`` has their names and ``conditions`` the worst conditions. ``text`` is one line for a
    user, with advice.
    """
    found: Found = [(_NAMES.get(name, "figures"), of) for name, of in member.profile.conditions]
    for known in member.timings.values():
        found += _blocks(known.values())
    return _entry(member, found + _links(member, links))


def plan_noise(
    members: Sequence[Member],
    links: Iterable[LinkProfile],
    spec: ModelSpec,
    bits: Collection[int],
    excluded: Collection[str] = (),
) -> list[dict[str, Any]]:
    """The noisy figures of each member that a plan of this model at these widths is made from.

    excluded: device ids of members that the plan does not use.
    """
    names = {member.name for member in members if member.device not in excluded}
    among = [link for link in links if {link.source, link.target} <= names]
    entries = []
    for member in members:
        if member.name in names:
            known = member.timings.get(spec, {})
            found: Found = [
                (_NAMES["call"], of) for name, of in member.profile.conditions if name == "call"
            ]
            found += _blocks(known[width] for width in bits if width in known)
            entries.append(_entry(member, found + _links(member, among)))
    return [entry for entry in entries if entry is not None]


def _blocks(timings: Iterable[Sequence[Any]]) -> Found:
    return [("block times", timing.conditions) for several in timings for timing in several]


def _links(member: Member, links: Iterable[LinkProfile]) -> Found:
    return [
        (f"link to {link.target}", link.conditions) for link in links if link.source == member.name
    ]


def _entry(member: Member, found: Found) -> dict[str, Any] | None:
    noisy = [(name, of) for name, of in found if of is not None and of.is_noisy]
    conditions = worst(of for _, of in noisy)
    if conditions is None:
        return None
    figures = list(dict.fromkeys(name for name, _ in noisy))
    shown = ", ".join(figures[:3]) + (f" and {len(figures) - 3} more" if len(figures) > 3 else "")
    return {
        "device": member.name,
        "figures": figures,
        "conditions": asdict(conditions),
        "text": f"{member.name}: {shown}: {conditions.text}; run `shoal devices --measure "
        f"{member.name}` when it is quiet",
    }
