"""The team of a saved plan's stage: how many pieces of each layer every member has.

A file has counts instead of ranges, so that a person can move a head from one member to another.
The ranges follow one another in the order of members.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from model.share import Share, mlp_units, mlp_words
from planning.plan import PlanError, Stage
from planning.problem import PlanningProblem
from planning.teams import with_team
from wire.activations import HOP_BITS

MOST_MEMBERS = 64
"""More members than any model has KV heads to share."""

_COUNTS = {"kv_heads": "KV heads", "columns": "MLP columns", "vocab": "tokens of the vocabulary"}
_MOST = 1 << 31


@dataclass(frozen=True, slots=True)
class SavedTeam:
    """The members of a stage with their shares, the lead first."""

    members: tuple[tuple[str, Share], ...]
    sum_bits: int

    @staticmethod
    def of(stage: Stage) -> SavedTeam | None:
        """The team of a plan's stage; None if a device is alone."""
        if not stage.members or stage.sum_bits is None:
            return None
        return SavedTeam(tuple((one.device, one.share) for one in stage.members), stage.sum_bits)

    @property
    def devices(self) -> tuple[str, ...]:
        """The names of the members."""
        return tuple(device for device, _ in self.members)

    def to_dict(self) -> dict[str, Any]:
        """The fields of a stage in a file: ``sum_bits`` and ``team``."""
        members = [
            {"device": device} | {key: _size(getattr(share, key)) for key in _COUNTS}
            for device, share in self.members
        ]
        return {"sum_bits": self.sum_bits, "team": members}

    def renamed(self, rename: Callable[[str], str]) -> SavedTeam:
        """The same team with ``rename`` applied to each device."""
        members = tuple((rename(device), share) for device, share in self.members)
        return replace(self, members=members)

    def placed(self, problem: PlanningProblem) -> tuple[PlanningProblem, int]:
        """The problem with this team as a device, and its index there. Raises PlanError."""
        layer = problem.spec.layers[0]
        last = self.members[-1][1]
        totals = (layer.kv_heads, mlp_units(layer), problem.spec.vocab)
        for (key, words), total in zip(_COUNTS.items(), totals, strict=True):
            end = getattr(last, key)[1]
            words = mlp_words(layer) if key == "columns" else words
            if end != total:
                raise PlanError(
                    f"the team {self} has {end} {words} and the model {total}:"
                    f" change the counts in `{key}`"
                )
        indices = {device.name: index for index, device in enumerate(problem.devices)}
        members = [indices[device] for device in self.devices]
        shares = [share for _, share in self.members]
        try:
            return with_team(problem, members, shares, self.sum_bits)
        except ValueError as error:
            raise PlanError(str(error)) from error

    def __str__(self) -> str:
        """The names of the members."""
        return " + ".join(self.devices)

    @property
    def text(self) -> str:
        """Each member with its share of the columns, rounded to percent."""
        total = self.members[-1][1].columns[1]
        return " + ".join(
            f"{device} {_size(share.columns) / total:.0%}" for device, share in self.members
        )

    @property
    def exact_text(self) -> str:
        """Each member with its counts, and the width of sums."""
        members = (
            f"{device} {'/'.join(str(_size(getattr(share, key))) for key in _COUNTS)}"
            for device, share in self.members
        )
        return f"{' + '.join(members)}, sums at {self.sum_bits} bit"


def read_team(stage: Mapping[str, Any], where: str) -> SavedTeam | None:
    """The team in a stage of a file; None if there is none. Raises PlanError."""
    given, sum_bits = stage.get("team"), stage.get("sum_bits")
    if given is None:
        if sum_bits is not None:
            raise PlanError(f"{where}.sum_bits: a device alone sums nothing: drop it or add a team")
        return None
    if not isinstance(given, list) or not 2 <= len(given) <= MOST_MEMBERS:
        raise PlanError(f"{where}.team: expected a list of 2 to {MOST_MEMBERS} members")
    if type(sum_bits) is not int or sum_bits not in HOP_BITS:
        known = ", ".join(map(str, HOP_BITS))
        raise PlanError(f"{where}.sum_bits: {sum_bits!r:.20}: known are {known}")
    names, counts = [], []
    for index, member in enumerate(given):
        place = f"{where}.team[{index}]"
        if not isinstance(member, dict) or set(member) != {"device", *_COUNTS}:
            raise PlanError(f"{place}: expected an object of device, {', '.join(_COUNTS)}")
        if not isinstance(member["device"], str):
            raise PlanError(f"{place}.device: expected a name")
        for key in _COUNTS:
            if type(member[key]) is not int or not 0 < member[key] < _MOST:
                raise PlanError(f"{place}.{key}: expected a whole number above 0")
        names.append(member["device"])
        counts.append([member[key] for key in _COUNTS])
    if names[0] != stage["device"]:
        raise PlanError(f"{where}.team: the first member leads, so it must be {stage['device']}")
    spans = [
        itertools.pairwise(itertools.accumulate(column, initial=0))
        for column in zip(*counts, strict=True)
    ]
    shares = (Share(*parts) for parts in zip(*spans, strict=True))
    return SavedTeam(tuple(zip(names, shares, strict=True)), sum_bits)


def _size(span: tuple[int, int]) -> int:
    return span[1] - span[0]
