"""A plan as a file that a person can read, edit and compare.

Reading takes the stages with their devices and bits, the slots and the context. Figures are
recomputed from the problem, so that an edited line cannot leave a stale prediction behind.

A stage of a team says how many KV heads, MLP columns and tokens of the vocabulary each member has,
in their order and the lead first (``planning.saved_team``).

Stages name devices. ``devices`` has the id of the device that had a name when the plan was saved.
So the stage stays with this device if names change. A name without an id means the device that has
the name now.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from model.bounded import read_bytes
from model.quantize import BITS
from planning.plan import Plan, PlanError, Proof, assess, bits_text, verify
from planning.problem import PlanningProblem
from planning.saved_team import SavedTeam, read_team
from wire.activations import HOP_BITS

FORMAT = 1
MAX_FILE_BYTES = 1 << 20
_MAX_BLOCKS = 1 << 13
MORE_BLOCKS = "more blocks than any model has"
_MOST_PREDICTED = 1e30

_KEYS = (
    "shoal_plan",
    "model",
    "stages",
    "devices",
    "slots",
    "context_tokens",
    "draft",
    "predicted",
    "predicted_for",
)
_STAGE_KEYS = ("device", "bits", "hop_bits", "team", "sum_bits")
_SENT_KEYS = ("source", "model", "stages", "devices")
_MAX_ID_CHARACTERS = 64
_RUN = re.compile(r"(\d{1,2})(?:x(\d{1,4}))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class SavedPlan:
    """The contents of a plan file. ``predicted`` has the figures computed when it was saved.

    It is empty if the stages were edited since, because the figures are those of another plan.
    """

    source: str
    model: str
    stages: tuple[tuple[str, tuple[int, ...]], ...]
    """Devices in pipeline order, each with the bits of its blocks. A team has its lead here."""
    predicted: Mapping[str, float]
    hop_bits: tuple[int | None, ...]
    """Bits that each stage but the last sends at; None if the file does not say."""
    slots: int | None = None
    context_tokens: int | None = None
    """Slots and context that the plan was made for; None if the file does not say."""
    devices: Mapping[str, str] = field(default_factory=dict)
    """Names of devices -> device ids; devices of a described lab have none."""
    draft: tuple[str, int] | None = None
    """The path and the bits of the draft model that the plan has room for."""
    teams: tuple[SavedTeam | None, ...] = ()
    """The team of each stage, None for a device alone. Empty: there are no teams."""

    @property
    def used(self) -> tuple[str, ...]:
        """Every device of the plan, in order of stages and members."""
        return tuple(
            name
            for (device, _), team in zip(self.stages, self._teams, strict=True)
            for name in ((device,) if team is None else team.devices)
        )

    @property
    def _teams(self) -> tuple[SavedTeam | None, ...]:
        return self.teams or (None,) * len(self.stages)

    @property
    def placements(self) -> tuple[tuple[str, int], ...]:
        """Device and bits of every block in order, a team by its lead."""
        return tuple((device, bits) for device, widths in self.stages for bits in widths)

    @property
    def hops(self) -> dict[int, int | Literal["default"]]:
        """Block -> bits of the hop behind it, for each hop."""
        ends = itertools.accumulate(len(widths) for _, widths in self.stages[:-1])
        return {end - 1: bits or "default" for end, bits in zip(ends, self.hop_bits, strict=True)}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``from_dict``: the source, the model, the stages and device ids."""
        stages = [
            {"device": device, "bits": list(bits), "hop_bits": hop_bits}
            | ({} if team is None else team.to_dict())
            for (device, bits), hop_bits, team in zip(
                self.stages, (*self.hop_bits, None), self._teams, strict=True
            )
        ]
        sent: dict[str, Any] = {"source": self.source, "model": self.model, "stages": stages}
        return {**sent, "devices": dict(self.devices)} if self.devices else sent

    def renamed(self, rename: Callable[[str], str]) -> SavedPlan:
        """The same plan with ``rename`` applied to every device, and without ids."""
        stages = tuple((rename(device), bits) for device, bits in self.stages)
        teams = tuple(None if team is None else team.renamed(rename) for team in self.teams)
        return replace(self, stages=stages, teams=teams, devices={})

    @staticmethod
    def from_dict(values: object) -> SavedPlan:
        """The plan of plain values from a client, without predictions. Raises PlanError."""
        plan = _object(values, "plan", _SENT_KEYS, _SENT_KEYS[:3])
        if not isinstance(plan["source"], str):
            raise PlanError("plan.source: expected a name")
        sent = {key: value for key, value in plan.items() if key != "source"}
        return _read({"shoal_plan": FORMAT, **sent}, plan["source"])

    def to_plan(self, problem: PlanningProblem) -> Plan:
        """The plan with figures from ``problem``, verified. Raises PlanError naming the file.

        Its proved bound is 0, because no better plan was looked for.
        """
        indices = {device.name: index for index, device in enumerate(problem.devices)}
        blocks = problem.spec.block_count
        try:
            if len(self.placements) != blocks:
                raise PlanError(
                    f"its stages have {len(self.placements)} blocks and the model {blocks}"
                    " (embedding, layers, head): change the counts in `bits`"
                )
            for device in self.used:
                if device not in indices:
                    raise PlanError(f"unknown device {device}: there are {', '.join(indices)}")
                if self.used.count(device) > 1:
                    raise PlanError(f"{device} has more than one stage: join them")
            stages: list[tuple[int, int, tuple[int, ...]]] = []
            first = 0
            with_teams = problem
            for (device, widths), team in zip(self.stages, self._teams, strict=True):
                index = indices[device]
                if team is not None:
                    with_teams, index = team.placed(with_teams)
                stages.append((index, first, widths))
                first += len(widths)
            plan = assess(with_teams, stages, Proof("file", 0.0, 0.0), self.hop_bits)
            verify(plan, problem)
        except PlanError as error:
            raise PlanError(f"{self.source}: {error}") from error
        return plan


@dataclass(frozen=True, slots=True)
class Change:
    """Blocks [first, last) with the same device and bits before, and others after."""

    first: int
    last: int
    before: tuple[str, int]
    """Device and bits. A team has its members with their shares in place of a device."""
    after: tuple[str, int]


@dataclass(frozen=True, slots=True)
class HopChange:
    """The hop behind ``block`` has other bits in two plans; None if there is no hop."""

    block: int
    before: int | Literal["default"] | None
    after: int | Literal["default"] | None


def plan_text(
    plan: Plan,
    model: str,
    *,
    slots: int | None = None,
    context_tokens: int | None = None,
    devices: Mapping[str, str] | None = None,
    draft: tuple[str, int] | None = None,
) -> str:
    """The file of a plan: JSON with one stage a line, ``bits`` as runs like ``16 4x11 8``.

    ``hop_bits`` is the width that a stage sends at; the last stage has none.
    ``slots``, ``context_tokens``: what the plan was made for. None: decided when it is loaded.
    ``devices``: ids by name. Names that the plan does not use are left out.
    ``draft``: path and bits of a draft model.
    """
    stages = []
    for stage in plan.stages:
        values: dict[str, Any] = {"device": stage.device, "bits": bits_text(stage.bits)}
        if stage.hop_bits is not None:
            values["hop_bits"] = stage.hop_bits
        team = SavedTeam.of(stage)
        if team is not None:
            values |= team.to_dict()
        stages.append(json.dumps(values))
    prompt_tokens = plan.objective.prompt_tokens
    predicted = {
        "ms_per_token": plan.decode_s * 1e3,
        "prefill_ms_per_token": plan.prefill_s_per_token * 1e3,
        "prompt_tokens": prompt_tokens,
        "prompt_s": plan.prompt_s(prompt_tokens),
        "first_token_s": plan.first_token_s(prompt_tokens),
    }
    made_for = {"slots": slots, "context_tokens": context_tokens}
    ids = {
        name: devices[name]
        for stage in plan.stages
        for name in stage.devices
        if devices is not None and name in devices
    }
    mark = _mark((s.device, s.bits, s.hop_bits, SavedTeam.of(s)) for s in plan.stages)
    lines = [
        "{",
        f'  "shoal_plan": {FORMAT},',
        f'  "model": {json.dumps(model)},',
        '  "stages": [',
        ",\n".join(f"    {stage}" for stage in stages),
        "  ],",
        *([f'  "devices": {json.dumps(ids)},'] if ids else []),
        *(f'  "{key}": {value},' for key, value in made_for.items() if value is not None),
        *([f'  "draft": {json.dumps({"model": draft[0], "bits": draft[1]})},'] if draft else []),
        f'  "predicted": {json.dumps(predicted)},',
        f'  "predicted_for": "{mark}"',
        "}",
    ]
    return "\n".join(lines) + "\n"


def read_file(path: Path, limit_bytes: int) -> bytes:
    """The bytes of a file of plans. Raises PlanError with one line."""
    try:
        return read_bytes(path, limit_bytes)
    except OSError as error:
        raise PlanError(f"{path}: {(error.strerror or str(error)).lower()}") from error
    except ValueError as error:
        raise PlanError(f"{path}: {error}") from error


def read_json(text: str | bytes, source: str) -> Any:
    """The JSON of a text, which ``source`` names. Raises PlanError with one line."""
    try:
        return json.loads(text, object_pairs_hook=_each_once)
    except json.JSONDecodeError as error:
        raise PlanError(f"{source}:{error.lineno}: not JSON: {error.msg.lower()}") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise PlanError(f"{source}: not JSON") from error
    except ValueError as error:  # A key is there twice, or a number has thousands of digits.
        raise PlanError(f"{source}: {str(error).lower()}") from error


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object. Of a key that is there twice, Python would drop the first one."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key[:40]!r} is there twice in one object: drop one")
        found[key] = value
    return found


def read_plan(path: Path) -> SavedPlan:
    """The plan in a file. Raises PlanError with one line: file, place, what was expected."""
    return parse_plan(read_file(path, MAX_FILE_BYTES), str(path))


def parse_plan(text: str | bytes, source: str) -> SavedPlan:
    """The plan in a text; ``source`` names it in messages. Raises PlanError like ``read_plan``."""
    values = read_json(text, source)
    try:
        return _read(values, source)
    except PlanError as error:
        raise PlanError(f"{source}: {error}") from error


def difference(before: SavedPlan, after: SavedPlan) -> tuple[Change, ...]:
    """The blocks with another device, team, share or bits, consecutive ones together.

    A device with a new name is still the same device. Raises PlanError if the plans have different
    numbers of blocks.
    """
    before, after = _told_apart(before, after)
    teams = {team for plan in (before, after) for team in plan.teams if team is not None}
    # Percents tell most teams apart. For the others the counts are shown.
    exact = len({team.text for team in teams}) < len(teams)
    old, new = _places(before, exact=exact), _places(after, exact=exact)
    if len(old) != len(new):
        raise PlanError(
            f"{before.source} places {len(old)} blocks and {after.source} {len(new)}:"
            " they are plans of different models"
        )
    changes = []
    pairs = enumerate(zip(old, new, strict=True))
    for (a, b), run in itertools.groupby(pairs, key=lambda item: item[1]):
        blocks = [block for block, _ in run]
        if a != b:
            changes.append(Change(blocks[0], blocks[-1] + 1, a, b))
    return tuple(changes)


def _places(plan: SavedPlan, *, exact: bool) -> list[tuple[str, int]]:
    """The device or team and the bits of every block in order."""
    found = []
    for (device, widths), team in zip(plan.stages, plan._teams, strict=True):
        if team is not None:
            device = team.exact_text if exact else team.text
        found += [(device, bits) for bits in widths]
    return found


def _told_apart(before: SavedPlan, after: SavedPlan) -> tuple[SavedPlan, SavedPlan]:
    """Both plans, renamed so that each device has one name and no two share one."""
    now = {device: name for name, device in after.devices.items()}

    def rename(name: str) -> str:
        device = before.devices.get(name)
        if device in now:
            return now[device]
        other = after.devices.get(name)
        return name if device is None or other is None else f"{name} ({device})"

    return before.renamed(rename), after


def hop_difference(before: SavedPlan, after: SavedPlan) -> tuple[HopChange, ...]:
    """The hops with other bits in two plans of one model, in order."""
    old, new = before.hops, after.hops
    return tuple(
        HopChange(block, old.get(block), new.get(block))
        for block in sorted(old.keys() | new.keys())
        if old.get(block) != new.get(block)
    )


def _read(values: object, source: str) -> SavedPlan:
    plan = _object(values, "the plan", _KEYS, _KEYS[:3])
    if plan["shoal_plan"] is True or plan["shoal_plan"] != FORMAT:
        raise PlanError(f"shoal_plan: {plan['shoal_plan']!r:.20}, this program reads {FORMAT}")
    if not isinstance(plan["model"], str):
        raise PlanError("model: expected a name")
    if not isinstance(plan["stages"], list) or not plan["stages"]:
        raise PlanError("stages: expected a list of at least one stage")
    stages, blocks = [], 0
    for index, item in enumerate(plan["stages"]):
        where = f"stages[{index}]"
        stage = _object(item, where, _STAGE_KEYS, _STAGE_KEYS[:2])
        if not isinstance(stage["device"], str):
            raise PlanError(f"{where}.device: expected a name")
        hop_bits = stage.get("hop_bits")
        if hop_bits is not None:
            if index == len(plan["stages"]) - 1:
                raise PlanError(f"{where}.hop_bits: the last stage sends a token: drop it")
            if type(hop_bits) is not int or hop_bits not in HOP_BITS:
                known = ", ".join(map(str, HOP_BITS))
                raise PlanError(f"{where}.hop_bits: {hop_bits!r:.20}: known are {known}")
        bits = _bits(stage["bits"], f"{where}.bits")
        blocks += len(bits)
        if blocks > _MAX_BLOCKS:
            raise PlanError(f"{where}.bits: {MORE_BLOCKS}")
        team = read_team(stage, where)
        stages.append((stage["device"], bits, hop_bits, team))
    devices = plan.get("devices", {})
    if not isinstance(devices, dict) or not all(
        isinstance(item, str) and 0 < len(item) <= _MAX_ID_CHARACTERS for item in devices.values()
    ):
        raise PlanError("devices: expected device ids by name")
    for key in ("slots", "context_tokens"):
        value = plan.get(key)
        if value is not None and (type(value) is not int or value < 1):
            raise PlanError(f"{key}: expected a whole number above 0")
    predicted = plan.get("predicted", {})
    if not isinstance(predicted, dict) or not all(
        type(value) in (int, float) and 0 <= value <= _MOST_PREDICTED
        for value in predicted.values()
    ):
        raise PlanError("predicted: expected numbers from 0 up by name")
    if plan.get("predicted_for") != _mark(stages):
        predicted = {}
    return SavedPlan(
        source,
        plan["model"],
        tuple((device, bits) for device, bits, _, _ in stages),
        predicted,
        tuple(hop_bits for _, _, hop_bits, _ in stages[:-1]),
        plan.get("slots"),
        plan.get("context_tokens"),
        devices,
        _draft(plan.get("draft")),
        teams if any(teams := tuple(team for _, _, _, team in stages)) else (),
    )


def _draft(value: object) -> tuple[str, int] | None:
    """The draft model of a file: its path and bits."""
    if value is None:
        return None
    draft = _object(value, "draft", ("model", "bits"), ("model", "bits"))
    path, bits = draft["model"], draft["bits"]
    if not isinstance(path, str) or type(bits) is not int or bits not in BITS:
        raise PlanError("draft: expected the path of a model, and its bits")
    return path, bits


def _mark(stages: Iterable[tuple[str, tuple[int, ...], int | None, SavedTeam | None]]) -> str:
    """A short hash of the stages."""
    parts = (
        (device, bits, hop_bits, None if team is None else team.to_dict())
        for device, bits, hop_bits, team in stages
    )
    text = json.dumps([[part for part in stage if part is not None] for stage in parts])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _object(
    value: object, where: str, known: tuple[str, ...], required: tuple[str, ...]
) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise PlanError(f"{where}: expected an object")
    for key in value:
        if key not in known:
            raise PlanError(f"{where}: unknown key {key!r:.40}: known are {', '.join(known)}")
    for key in required:
        if key not in value:
            raise PlanError(f"{where}: {key} is missing")
    return value


def _bits(value: object, where: str) -> tuple[int, ...]:
    """The widths of a text like ``"16 4x11 8"``, or of a list."""
    widths: list[int] = []
    if isinstance(value, list):
        widths = value
    elif isinstance(value, str):
        for word in value.split():
            match = _RUN.fullmatch(word)
            if match is None:
                raise PlanError(f"{where}: {word!r:.20} is neither a width nor a run like 4x11")
            widths += [int(match[1])] * int(match[2] or 1)
            if len(widths) > _MAX_BLOCKS:
                raise PlanError(f"{where}: {MORE_BLOCKS}")
    else:
        raise PlanError(f"{where}: expected widths such as '16 4x11 8'")
    if not widths:
        raise PlanError(f"{where}: a stage needs at least one block: drop the stage instead")
    for width in widths:
        if type(width) is not int or width not in BITS:
            known = ", ".join(map(str, BITS))
            raise PlanError(f"{where}: {width!r:.20} is no width: known are {known}")
    return tuple(widths)
