"""Builds a planning problem from measurements of devices, links and a model."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from model import costs
from model.experts import ExpertCounts
from model.quantize import BITS, Format, own_format
from model.spec import ModelSpec
from model.texts import PASS_ROWS, pass_rows
from planning.problem import (
    DEFAULT_HOPS,
    ONE_TOKEN,
    BlockOption,
    Device,
    HopFormat,
    NoLink,
    Objective,
    ObjectiveKind,
    PlanningProblem,
)
from planning.prompt import block_passage
from planning.sensitivity import Own
from wire import limits
from wire.profile import BlockTiming, DeviceProfile, LinkProfile


@dataclass(frozen=True, slots=True)
class DeviceInput:
    """One device: its profile and its other measurements."""

    name: str
    profile: DeviceProfile
    timings: Sequence[BlockTiming] = ()
    """The device runs a block only at widths that have a timing."""
    held: Sequence[Collection[int]] = ()
    """Widths of each block on the device's disk. Empty: none."""
    load_bytes_per_s: float = math.inf
    """Speed at which the device loads blocks that it does not hold."""
    layer_kl: Mapping[int, float] | None = None
    """Bits -> KL divergence of a layer on the device. None: that of its arithmetic."""


@dataclass(frozen=True, slots=True)
class RequestInput:
    """The model, how it may be stored, and the limits of a plan. Rows are one per block."""

    spec: ModelSpec
    bits: Sequence[int]
    """Widths to plan with."""
    context_tokens: int
    slots: int = 1
    """Sequences held at once, each of ``context_tokens``."""
    chunk_tokens: int = limits.PREFILL_CHUNK_TOKENS
    """Tokens of a prompt computed at a time."""
    formats: Mapping[int, Format] = field(
        default_factory=lambda: {width: Format.of(width) for width in BITS}
    )
    """How each width is stored."""
    native: Mapping[int, Format] = field(default_factory=dict)
    """Block -> the format of its file's own codes, which it has at that format's bits."""
    weight_errors: Sequence[Mapping[int, float]] | None = None
    """Bits -> normalised error. Needed with ``max_weight_error``."""
    max_weight_error: float | None = None
    sensitivities: Sequence[Mapping[int, float]] | None = None
    """Bits -> KL divergence. Needed with ``quality_budget``."""
    own_sensitivities: Own = field(default_factory=dict)
    """Like ``sensitivities``, for layers in arithmetics that add losses."""
    quality_budget: float | None = None
    experts: ExpertCounts | None = None
    """How often rows of a text took each expert. None: uniformly."""
    objective: Objective = ONE_TOKEN
    """A prompt and answer beyond the context are shortened in proportion."""
    pins: Mapping[int, str] = field(default_factory=dict)
    """Block -> the name of the device that must run it."""
    excluded: Collection[str] = ()
    """Names of devices that run nothing."""
    teams: Sequence[Sequence[str]] = ()
    """Names of devices that must share layers, team by team."""
    no_teams: bool = False
    """Whether no devices may share layers."""
    hop_formats: Sequence[HopFormat] | None = None
    """Widths that hops may use. None: those of the lab, else DEFAULT_HOPS."""

    def __post_init__(self) -> None:
        if self.weight_errors is None and self.max_weight_error is not None:
            raise ValueError("a bound on weight errors needs the errors")
        if self.sensitivities is None and self.quality_budget is not None:
            raise ValueError("a quality budget needs the sensitivities")
        count = self.spec.block_count
        for what, rows in (
            ("weight errors", self.weight_errors),
            ("sensitivities", self.sensitivities),
        ):
            if rows is not None and len(rows) != count:
                raise ValueError(f"{what} of {len(rows)} blocks, not {count}")
        if not self.bits or any(width not in self.formats for width in self.bits):
            raise ValueError(f"bits must be some of {sorted(self.formats)}, not {list(self.bits)}")
        if not set(self.native) <= set(range(count)):
            raise ValueError(f"native formats of blocks beyond {count}")
        widths = None if self.hop_formats is None else [form.bits for form in self.hop_formats]
        if widths is not None and (not widths or len(set(widths)) != len(widths)):
            raise ValueError("hops need at least one width, and each once")

    def format_of(self, block: int, bits: int) -> Format:
        """The format of a block at a width: its file's own, or that of ``formats``."""
        return own_format(self.native.get(block), self.formats[bits])


def build_problem(
    request: RequestInput,
    devices: Sequence[DeviceInput],
    links: Iterable[LinkProfile],
    no_links: Iterable[NoLink] = (),
) -> PlanningProblem:
    """The problem of splitting the request's model over ``devices``, in that order.

    ``no_links`` says why links that were tried are missing. Links to or from other devices are
    ignored. Raises ValueError for inconsistent input.
    """
    spec, blocks = request.spec, range(request.spec.block_count)
    indices = {device.name: index for index, device in enumerate(devices)}
    _check_names(request, indices)
    kv_bytes = tuple(
        request.slots * costs.kv_bytes(spec, k, request.context_tokens) for k in blocks
    )
    bound = math.inf if request.max_weight_error is None else request.max_weight_error
    hops = DEFAULT_HOPS if request.hop_formats is None else request.hop_formats
    errors = request.weight_errors or [{}] * len(blocks)
    return PlanningProblem(
        spec=spec,
        devices=tuple(_device(request, device, kv_bytes) for device in devices),
        links={
            (indices[link.source], indices[link.target]): link
            for link in links
            if link.source in indices and link.target in indices
        },
        no_links={
            (indices[link.source], indices[link.target]): link
            for link in no_links
            if link.source in indices and link.target in indices
        },
        bits=tuple(sorted(set(request.bits))),
        stored_bytes=tuple(
            {
                width: costs.stored_bytes(spec, k, request.format_of(k, width))
                for width in request.formats
            }
            for k in blocks
        ),
        kv_bytes=kv_bytes,
        weight_errors=tuple(dict(row) for row in errors),
        max_weight_error=(bound,) * len(blocks),
        sensitivities=tuple(dict(row) for row in request.sensitivities or ()),
        quality_budget=request.quality_budget,
        experts=request.experts,
        objective=_objective(request),
        pins={block: indices[name] for block, name in request.pins.items()},
        excluded=frozenset(indices[name] for name in request.excluded),
        hop_formats=tuple(sorted(hops, key=lambda form: form.bits)),
        sequences=request.slots if request.slots > 1 else None,
        teams=tuple(tuple(indices[name] for name in team) for team in request.teams),
        no_teams=request.no_teams,
        group_size=max(
            request.format_of(block, width).group_size for block in blocks for width in request.bits
        ),
        pass_tokens=pass_tokens(request),
    )


def pass_tokens(request: RequestInput) -> int:
    """Return the rows of a pass that the plan counts: 1, or for an encoder those of a prompt."""
    if not request.spec.encodes:
        return 1
    return max(min(request.objective.prompt_tokens or PASS_ROWS, request.context_tokens), 1)


def _objective(request: RequestInput) -> Objective:
    """Return the objective. For an encoder, one pass of texts counts as one decoded token."""
    asked = request.objective
    if not request.spec.encodes:
        return asked.within(request.context_tokens)
    kind: ObjectiveKind = "latency" if asked.kind == "request" else asked.kind
    return Objective(kind, pass_tokens(request), 1, asked.migration_weight)


def own_rows(request: RequestInput, device: DeviceInput) -> tuple[Mapping[int, float], ...] | None:
    """Per block, the sensitivities of a device whose arithmetic adds losses; else None.

    For layers they are ``layer_kl`` of the device, or else those of the arithmetic. They are empty
    if nothing was measured. Embedding and head are computed alike everywhere.
    """
    common, arithmetic = request.sensitivities, device.profile.arithmetic
    if not common or (device.layer_kl is None and not arithmetic):
        return None
    measured = request.own_sensitivities.get(arithmetic, {})
    layers = (
        measured.get(block, {}) if device.layer_kl is None else device.layer_kl
        for block in range(1, len(common) - 1)
    )
    return (common[0], *layers, common[-1])


def _check_names(request: RequestInput, names: Collection[str]) -> None:
    """Raise ValueError for a pin or an exclusion of an unknown block or device."""
    blocks = range(request.spec.block_count)
    known = f"known are {', '.join(names)}" if names else "there are no devices"
    for block, name in request.pins.items():
        if block not in blocks:
            raise ValueError(f"cannot pin block {block} of {len(blocks)} to {name}")
        if name not in names:
            raise ValueError(
                f"cannot pin {request.spec.block_name(block)} to {name}: no device has that name"
                f" ({known})"
            )
    for name in request.excluded:
        if name not in names:
            raise ValueError(f"cannot exclude {name}: no device has that name ({known})")
    members = [name for team in request.teams for name in team]
    for name in members:
        if name not in names:
            raise ValueError(f"{name} cannot share layers: no device has that name ({known})")
        if members.count(name) > 1:
            raise ValueError(f"{name} cannot share layers twice: name it in one team, once")
    if any(len(team) < 2 for team in request.teams):
        raise ValueError("a team needs at least two devices")
    if request.no_teams and members:
        raise ValueError("teams are named and forbidden: drop one of the two wishes")


def _device(request: RequestInput, device: DeviceInput, kv_bytes: Sequence[int]) -> Device:
    spec, profile = request.spec, device.profile
    if profile.watts is not None and not 0 < profile.watts < math.inf:
        raise ValueError(f"{device.name} cannot draw {profile.watts} watts")
    # The buffers of the largest block, although a stage needs only those of its own blocks.
    rows = pass_rows(request.context_tokens) if spec.encodes else request.chunk_tokens
    stage_bytes = costs.stage_buffer_bytes(
        spec, range(spec.block_count), rows, request.context_tokens
    )
    options = _options(request, device)
    on_chip = _on_chip_limit(spec, profile, options, kv_bytes, stage_bytes)
    own, total = profile.memory_bytes, profile.memory_total_bytes
    return Device(
        name=device.name,
        memory_bytes=own if on_chip is None else min(own, on_chip),
        storage_bytes=profile.storage_bytes,
        options=options,
        stage_bytes=stage_bytes,
        call_s=profile.call_s + profile.relay_s,
        backend_bits=tuple(sorted(width for width, _ in profile.container_bits)),
        held=tuple(map(frozenset, device.held)),
        load_bytes_per_s=device.load_bytes_per_s,
        watts=profile.watts,
        # More of the board's memory puts no more on its chip.
        memory_total_bytes=total if on_chip is None else min(total, on_chip),
        shares=profile.shares,
        sum_s=profile.sum_s,
    )


def _on_chip_limit(
    spec: ModelSpec,
    profile: DeviceProfile,
    options: Sequence[Sequence[BlockOption]],
    kv_bytes: Sequence[int],
    stage_bytes: int,
) -> int | None:
    """Memory of a stage with as many layers as the device's chip holds; None without a limit.

    Timings were taken with all weights on the chip, and the limit keeps them true. If not even one
    layer fits, weights crossed the bus at every call. These timings hold for any number of layers,
    so there is no limit. Embedding and head count too, although they are not on the chip. This
    errs on the side of fewer layers.
    """
    if profile.on_chip_bytes is None:
        return None
    layers = profile.on_chip_bytes // max(map(costs.on_chip_layer_bytes, spec.layers))
    largest = max(
        (
            option.executed_bytes + kv_bytes[block]
            for block in range(1, spec.head_block)
            for option in options[block]
        ),
        default=0,
    )
    return stage_bytes + layers * largest if layers else None


def _options(request: RequestInput, device: DeviceInput) -> tuple[tuple[BlockOption, ...], ...]:
    """For each block, an option at every width that the device runs it at."""
    spec, profile = request.spec, device.profile
    measured = {(timing.kind, timing.variant, timing.bits): timing for timing in device.timings}
    for timing in measured.values():
        for seconds in (timing.decode_s, timing.prefill_s_per_token):
            if not 0 < seconds < math.inf:
                raise ValueError(f"{profile.machine}: a block cannot take {seconds} s")
    sensitivities = own_rows(request, device)
    rows = []
    # Equal rows are one object, which makes large problems small.
    shared: dict[tuple[BlockOption, ...], tuple[BlockOption, ...]] = {}
    for block in range(spec.block_count):
        kind, variant = spec.block_kind(block), spec.block_variant(block)
        row = []
        for bits in sorted(request.formats):
            fmt = request.format_of(block, bits)
            container = profile.container(bits)
            found = measured.get((kind, variant, bits))
            if container is not None and found is not None:
                executed = costs.executed_bytes(spec, block, fmt, container)
                own = None if sensitivities is None else sensitivities[block].get(bits, math.inf)
                times = found.decode_s, found.prefill_s_per_token
                if spec.encodes:
                    pass_s = block_passage(*times).busy_s(pass_tokens(request))
                    times = pass_s, pass_s / pass_tokens(request)
                row.append(BlockOption(bits, executed, *times, own, found.rows_s, found.shares_s))
        rows.append(shared.setdefault(tuple(row), tuple(row)))
    return tuple(rows)
