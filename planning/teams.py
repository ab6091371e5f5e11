"""Teams as devices of a problem: real devices that share each layer, made into one more device.

A team runs whole stages, so all of planning can treat it as a device. Its times are those of the
slowest member's share, with two sums per layer. Each member keeps limits of its own, and a real
device may be in only one device that a plan uses.

``candidates.py`` chooses the teams among which a plan is looked for. The functions here make any
team, also one that a user wrote into a plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np
import numpy.typing as npt

from model.costs import used_weights
from model.errors import UnsupportedModelError
from model.experts import busiest
from model.share import (
    Share,
    can_share,
    mlp_units,
    mlp_words,
    most_members,
    share_spec,
    share_steps,
    unshared,
)
from model.spec import QUANTIZED_TENSORS, LayerSpec
from planning.problem import (
    BlockOption,
    Device,
    HopFormat,
    Part,
    PartOption,
    PlanningProblem,
    Team,
)
from wire import limits
from wire.activations import HOP_BITS
from wire.profile import TIMED_ROWS
from wire.sums import traffic

ASSUMED_FIXED = 0.1
"""Part of a block's time that a share does not shorten, where shares were not measured."""

_VECTOR_WEIGHT = 8
"""Bytes of a number of a norm or a bias, in those of a weight at 4 bits. Members hold all of
them."""

_BY_HEADS = frozenset(f"{name}.weight" for name in "qkvo")


@dataclass(frozen=True, slots=True)
class Fractions:
    """A share as parts of the whole: 0 to 1."""

    heads: float
    columns: float
    vocab: float


def fractions(problem: PlanningProblem, share: Share) -> Fractions:
    """The share as parts of the problem's model."""
    layer = problem.spec.layers[0]
    spans = (
        (share.kv_heads, layer.kv_heads),
        (share.columns, mlp_units(layer)),
        (share.vocab, problem.spec.vocab),
    )
    return Fractions(*((end - begin) / total for (begin, end), total in spans))


def share_s(option: BlockOption, fraction: float) -> tuple[float, float]:
    """Seconds of one row, and of one row of a chunk, in a share of the block.

    Linear between the measured shares, and beyond them along the nearest two. Without measured
    shares ASSUMED_FIXED of the whole block's time stays, and the rest is in proportion.
    """
    points = option.shares_s
    if len(points) < 2:
        whole = (1.0, option.decode_s, option.prefill_s_per_token)
        assumed = (0.0, *(ASSUMED_FIXED * seconds for seconds in whole[1:]))
        points = (*points, whole) if points and points[0][0] < 1 else (assumed, whole)
    above = next((i for i, point in enumerate(points) if point[0] >= fraction), len(points) - 1)
    low, high = points[max(above, 1) - 1], points[max(above, 1)]
    part = (fraction - low[0]) / (high[0] - low[0])
    decode_s, prefill_s = (
        max(0.0, a + part * (b - a)) for a, b in zip(low[1:], high[1:], strict=True)
    )
    return decode_s, prefill_s


def heads_part(layer: LayerSpec) -> float:
    """The part of the weights that a token uses which is divided by heads.

    The rest is divided by columns or experts.
    """
    sizes = used_weights(layer)
    return sum(size for name, size in sizes.items() if name in _BY_HEADS) / sum(sizes.values())


def byte_part(problem: PlanningProblem, block: int, part: Fractions) -> float:
    """The part of a layer's or the head's bytes that a member holds. Vectors count whole."""
    spec = problem.spec
    divided = whole = 0.0
    total = 0
    for name, shape in spec.block_tensors(block).items():
        size = math.prod(shape)
        if name not in QUANTIZED_TENSORS:
            whole += _VECTOR_WEIGHT * size
            total += _VECTOR_WEIGHT * size
            continue
        total += size
        if name in _BY_HEADS:
            divided += part.heads * size
        elif name == "lm_head.weight":
            divided += part.vocab * size
        elif spec.block_kind(block) == "layer":
            divided += part.columns * size
        else:
            whole += size
    return (divided + whole) / total


def crowding(problem: PlanningProblem, shares: Sequence[Share], rows: int) -> float:
    """How much longer a team's experts take than if each row took equally many of each member.

    Rows choose as those of a text did, or uniformly if no text was run. 1 for layers without
    experts.
    """
    experts = problem.spec.layers[0].experts
    if experts is None:
        return 1.0
    held = tuple(share.columns[1] - share.columns[0] for share in shares)
    return busiest(held, experts.active, rows, problem.experts)


def sum_widths(problem: PlanningProblem) -> tuple[HopFormat, ...]:
    """The widths that partial rows may have, with the loss of one sum, the widest first.

    16 bits lose nothing that counts. 32 bits replace them if hops may have no fewer. 8 bits need a
    measured loss of hops.
    """
    known = {form.bits: form.sensitivity for form in problem.hop_formats}
    widest = HopFormat(32 if set(known) == {32} else 16, 0.0)
    narrow = known.get(8)
    return (widest,) if narrow is None else (widest, HopFormat(8, narrow))


def sum_s(problem: PlanningProblem, members: Sequence[int], rows: int, sum_bits: int) -> float:
    """Seconds of one sum of so many rows over a team (wire/sums.py). The slowest link counts."""
    links = [problem.links[pair] for pair in permutations(members, 2)]
    latency_s = max(link.transfer_s(0) for link in links)
    software_s = max(problem.devices[i].sum_s for i in members)
    messages, sent_bytes = _traffic(problem, members, rows, sum_bits)
    sent_s = sent_bytes / min(link.bytes_per_s for link in links)
    return messages * (latency_s + software_s) + sent_s


def _traffic(
    problem: PlanningProblem, members: Sequence[int], rows: int, sum_bits: int
) -> tuple[int, int]:
    """The messages one after the other of a sum over a team, and the bytes that a member sends."""
    (bits,) = (width for width in HOP_BITS if width == sum_bits)
    return traffic(len(members), rows, problem.spec.hidden, bits)


def sharing(problem: PlanningProblem) -> tuple[int, ...]:
    """The devices that can share layers, in order; none if no team is possible."""
    able = tuple(i for i in problem.real if problem.devices[i].shares and i not in problem.excluded)
    if problem.no_teams or len(able) < 2 or not _alike(problem):
        return ()
    return able


def incidence(problem: PlanningProblem) -> npt.NDArray[np.bool_]:
    """[device, real device]: whether the device is the real device, or a team with it.

    The columns are the real devices in order, then any members that are no device themselves.
    """
    devices = problem.devices
    column = {devices[i].name: i for i in problem.real}
    for device in devices[len(column) :]:
        for part in device.holders:
            column.setdefault(part.name, len(column))
    found = np.zeros((len(devices), len(column)), dtype=bool)
    for i, device in enumerate(devices):
        for part in device.holders:
            found[i, column[part.name]] = True
    return found


def real_problem(problem: PlanningProblem) -> PlanningProblem:
    """The problem with its real devices alone, which may still become teams."""
    count = len(problem.real)
    if count == len(problem.devices):
        return problem
    return replace(problem, devices=problem.devices[:count])


def with_team(
    problem: PlanningProblem, members: Sequence[int], shares: Sequence[Share], sum_bits: int
) -> tuple[PlanningProblem, int]:
    """The problem with such a team, lead first, and the team's index in its devices.

    Raises ValueError with one line that says why these devices cannot share layers so.
    """
    refusal = refused(problem, members) or _wrong_shares(problem, shares)
    if refusal is None and len(shares) != len(members):
        refusal = f"there are {len(shares)} shares for {len(members)} devices"
    if refusal is None and sum_bits not in (form.bits for form in sum_widths(problem)):
        refusal = f"partial rows cannot be sent at {sum_bits} bit here"
    if refusal is not None:
        raise ValueError(f"{_names(problem, members)} cannot share layers: {refusal}")
    names = tuple(problem.devices[i].name for i in members)
    for index in range(len(problem.real), len(problem.devices)):
        team = problem.devices[index].team
        if (
            team is not None
            and team.sum_bits == sum_bits
            and tuple(part.name for part in team.parts) == names
            and tuple(part.share for part in team.parts) == tuple(shares)
        ):
            return problem, index
    made = make(problem, members, shares, sum_bits)
    return replace(problem, devices=(*problem.devices, made)), len(problem.devices)


def refused(problem: PlanningProblem, members: Sequence[int]) -> str | None:
    """Why these devices cannot share layers, whatever their shares; None if they can."""
    devices = problem.devices
    if problem.no_teams:
        return "teams are forbidden"
    if len(members) < 2 or len(set(members)) < len(members):
        return "a team needs at least two devices, each once"
    reason = unshared(problem.spec) if problem.spec.layers else "the model has no layers"
    if reason is not None:
        return reason
    for i in members:
        if i not in problem.real or not devices[i].shares:
            return f"the backend of {devices[i].name} loads no shares"
        if i in problem.excluded:
            return f"{devices[i].name} is excluded"
    for pair in permutations(members, 2):
        if pair not in problem.links:
            return problem.no_link(*pair)
    widths = [{option.bits for option in devices[i].options[1]} for i in members]
    if not set.intersection(*widths) & set(problem.bits):
        return "they run layers at no width in common"
    most = most_members(problem.spec, problem.group_size)
    if most < len(members):
        return f"the layers can be divided into {most} parts at most"
    return None


def _wrong_shares(problem: PlanningProblem, shares: Sequence[Share]) -> str | None:
    """The fault of a team's shares, in words; None if they make up the whole model."""
    layer = problem.spec.layers[0]
    steps = share_steps(problem.spec, problem.group_size)
    for what, total, step, spans in (
        ("KV heads", layer.kv_heads, steps.kv_heads, [share.kv_heads for share in shares]),
        (mlp_words(layer), mlp_units(layer), steps.columns, [share.columns for share in shares]),
        ("vocabulary", problem.spec.vocab, steps.vocab, [share.vocab for share in shares]),
    ):
        expected = 0
        for begin, end in spans:
            if begin != expected or end <= begin:
                return f"the shares of {what} do not follow one another: [{begin}, {end})"
            if begin % step:
                return f"the shares of {what} cut a quantization group at {begin}"
            expected = end
        if expected != total:
            return f"the shares of {what} end at {expected} of {total}"
    try:
        for share in shares:
            share_spec(problem.spec, share)
    except UnsupportedModelError as error:
        return str(error)
    return None


def _alike(problem: PlanningProblem) -> bool:
    return bool(problem.spec.layers) and can_share(problem.spec)


def _names(problem: PlanningProblem, members: Sequence[int]) -> str:
    return ", ".join(problem.devices[i].name for i in members)


def make(
    problem: PlanningProblem, members: Sequence[int], shares: Sequence[Share], sum_bits: int
) -> Device:
    """The team as a device. Its members must be able to share layers so."""
    return _Maker(problem, members, shares, sum_bits).device()


Row = tuple[tuple[BlockOption, ...], tuple[tuple[PartOption, ...], ...]]
"""The options of a block, and for each member its parts of them."""


class _Maker:
    """Makes one team, with equal rows of blocks as one object."""

    def __init__(
        self,
        problem: PlanningProblem,
        members: Sequence[int],
        shares: Sequence[Share],
        sum_bits: int,
    ) -> None:
        self.problem, self.members, self.shares = problem, tuple(members), tuple(shares)
        self.devices = [problem.devices[i] for i in members]
        self.parts = [fractions(problem, share) for share in shares]
        self.sum_bits = sum_bits
        self.sums_s = {
            rows: sum_s(problem, members, rows, sum_bits)
            for rows in (1, *TIMED_ROWS, limits.PREFILL_CHUNK_TOKENS)
        }
        losses = {form.bits: form.sensitivity or 0.0 for form in sum_widths(problem)}
        self.loss = 2 * losses.get(sum_bits, 0.0)
        lead, *others = members
        away = [problem.links[lead, i] for i in others]
        back = [problem.links[i, lead] for i in others]
        self.software_s = max(device.sum_s for device in self.devices)
        self.gather_s = max(link.transfer_s(0) for link in back) + self.software_s
        sent_s = problem.hop_bytes(max(16, sum_bits)) / min(link.bytes_per_s for link in away)
        self.pass_row_s = len(others) * sent_s
        self.pass_s = max(link.transfer_s(0) for link in away) + self.software_s

    def device(self) -> Device:
        known: dict[tuple[object, ...], Row] = {}
        rows = []
        for block in range(self.problem.spec.block_count):
            key = self._looks(block)
            if key not in known:
                known[key] = self._row(block)
            rows.append(known[key])
        own, parts = self.devices, range(len(self.devices))
        watts = [device.watts for device in own if device.watts is not None]
        return Device(
            name="+".join(device.name for device in own),
            memory_bytes=sum(device.memory_bytes for device in own),
            storage_bytes=sum(device.storage_bytes for device in own),
            options=tuple(row for row, _ in rows),
            stage_bytes=sum(device.stage_bytes for device in own),
            call_s=max(device.call_s for device in own) + self.pass_s + self.pass_row_s,
            call_row_s=self.pass_row_s,
            backend_bits=tuple(sorted(set.intersection(*(set(d.backend_bits) for d in own)))),
            watts=sum(watts) if len(watts) == len(own) else None,
            team=Team(
                lead=self.members[0],
                parts=tuple(self._part(m, [row[m] for _, row in rows]) for m in parts),
                sum_bits=self.sum_bits,
                sum_s=self.sums_s[1],
            ),
        )

    def _part(self, m: int, options: Sequence[tuple[PartOption, ...]]) -> Part:
        own = self.devices[m]
        messages, _ = _traffic(self.problem, self.members, 1, self.sum_bits)
        return Part(
            name=own.name,
            share=self.shares[m],
            memory_bytes=own.memory_bytes,
            storage_bytes=own.storage_bytes,
            stage_bytes=own.stage_bytes,
            call_s=own.call_s,
            load_bytes_per_s=own.load_bytes_per_s,
            sum_s=messages * own.sum_s,
            options=tuple(options),
        )

    def _looks(self, block: int) -> tuple[object, ...]:
        """Everything on which the row of a block depends."""
        problem, spec = self.problem, self.problem.spec
        lost = self.loss and tuple((problem.sensitivities or ({},) * (block + 1))[block].items())
        return (
            spec.block_kind(block),
            tuple(id(device.options[block]) for device in self.devices),
            problem.kv_bytes[block],
            tuple(problem.stored_bytes[block].items()),
            lost,
        )

    def _row(self, block: int) -> Row:
        problem = self.problem
        embedding = problem.spec.block_kind(block) == "embedding"
        holders = self.devices[:1] if embedding else self.devices
        options: list[BlockOption] = []
        parts: list[list[PartOption]] = [[] for _ in self.devices]
        for one in holders[0].options[block]:
            found = [device.option(block, one.bits) for device in holders]
            whole = [option for option in found if option is not None]
            if len(whole) < len(holders):
                continue
            own = self._parts(block, whole)
            option = one if embedding else self._option(block, whole)
            executed = sum(part.memory_bytes for part in own) - problem.kv_bytes[block]
            options.append(replace(option, executed_bytes=executed, shares_s=()))
            for kept, part in zip(parts, own, strict=True):
                kept.append(part)
        return tuple(options), tuple(map(tuple, parts))

    def _parts(self, block: int, whole: Sequence[BlockOption]) -> list[PartOption]:
        """Each member's part of a block, of which ``whole`` are the members' options."""
        problem, kind = self.problem, self.problem.spec.block_kind(block)
        bits = whole[0].bits
        stored, kv = problem.stored_bytes[block][bits], problem.kv_bytes[block]
        if kind == "embedding":
            lead = PartOption(bits, whole[0].executed_bytes + kv, stored, whole[0].decode_s)
            return [lead, *[PartOption(bits, 0, 0, 0.0)] * (len(self.devices) - 1)]
        found = []
        for option, part in zip(whole, self.parts, strict=True):
            held = byte_part(problem, block, part)
            cache = math.ceil(part.heads * kv) if kind == "layer" else kv
            seconds = [s * share_s(option, at)[0] for s, at in self._halves(part, block)]
            memory = math.ceil(held * option.executed_bytes) + cache
            found.append(PartOption(bits, memory, math.ceil(held * stored), math.fsum(seconds)))
        return found

    def _halves(self, part: Fractions, block: int) -> tuple[tuple[float, float], ...]:
        """(weight, fraction): how the parts of a block between two sums are divided."""
        if self.problem.spec.block_kind(block) == "head":
            return ((1.0, part.vocab),)
        by_heads = heads_part(self.problem.spec.layer(block))
        return ((by_heads, part.heads), (1 - by_heads, part.columns))

    def _option(self, block: int, whole: Sequence[BlockOption]) -> BlockOption:
        """How the team runs a layer or the head at the width of ``whole``, one per member."""
        halves = [self._halves(part, block) for part in self.parts]
        layer = self.problem.spec.block_kind(block) == "layer"

        def slowest(figure: int, scale: Sequence[float], rows: int) -> float:
            """The sum over halves of the slowest member's seconds, times its scale."""
            return math.fsum(
                parts[0][0]
                * (crowding(self.problem, self.shares, rows) if half else 1.0)
                * max(
                    s * share_s(option, at)[figure]
                    for s, option, (_, at) in zip(scale, whole, parts, strict=True)
                )
                for half, parts in enumerate(zip(*halves, strict=True))
            )

        def exchanged_s(rows: int) -> float:
            return 2 * self.sums_s[rows] if layer else self.gather_s

        once = [1.0] * len(whole)
        chunk = limits.PREFILL_CHUNK_TOKENS
        several: tuple[float, ...] = ()
        if all(option.rows_s for option in whole):
            several = tuple(
                slowest(0, [option.rows_s[at] / option.decode_s for option in whole], rows)
                + exchanged_s(rows)
                for at, rows in enumerate(TIMED_ROWS)
            )
        return BlockOption(
            bits=whole[0].bits,
            executed_bytes=0,
            decode_s=slowest(0, once, 1) + exchanged_s(1),
            prefill_s_per_token=slowest(1, once, chunk) + exchanged_s(chunk) / chunk,
            sensitivity=self._sensitivity(block, whole, self.loss if layer else 0.0),
            rows_s=several,
        )

    def _sensitivity(self, block: int, whole: Sequence[BlockOption], added: float) -> float | None:
        """The loss of a block with its sums. None: the same as on any device."""
        known = [option.sensitivity for option in whole if option.sensitivity is not None]
        if not known and not added:
            return None
        rows: Sequence[Mapping[int, float]] = self.problem.sensitivities
        common = rows[block].get(whole[0].bits, math.inf) if rows else math.inf
        if len(known) < len(whole):
            known.append(common)
        return max(known) + added
