"""Builds a planning problem from what was measured of devices, links and a model."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

from model import costs
from model.quantize import BITS, Format
from model.spec import LayerSpec, ModelSpec
from planning.problem import (
    DEFAULT_HOPS,
    BlockOption,
    Device,
    HopFormat,
    NoLink,
    Objective,
    PlanningProblem,
)
from wire.profile import BlockTiming, DeviceProfile, LinkProfile


def build_problem(
    spec: ModelSpec,
    profiles: Mapping[str, DeviceProfile],
    timings: Mapping[str, Sequence[BlockTiming]],
    links: Iterable[LinkProfile],
    *,
    bits: Sequence[int],
    slots: int,
    context_tokens: int,
    chunk_tokens: int,
    formats: Mapping[int, Format] | None = None,
    weight_errors: Sequence[Mapping[int, float]] | None = None,
    max_weight_error: float | None = None,
    call_s: Mapping[str, float] | None = None,
    sensitivities: Sequence[Mapping[int, float]] | None = None,
    quality_budget: float | None = None,
    objective: Objective | None = None,
    pins: Mapping[int, str] | None = None,
    excluded: Collection[str] = (),
    held: Mapping[str, Sequence[Collection[int]]] | None = None,
    load_bytes_per_s: Mapping[str, float] | None = None,
    hop_formats: Sequence[HopFormat] = DEFAULT_HOPS,
    watts: Mapping[str, float] | None = None,
    own_sensitivities: Mapping[str, Sequence[Mapping[int, float]]] | None = None,
    no_links: Iterable[NoLink] = (),
) -> PlanningProblem:
    """The problem of splitting ``spec`` over the devices in ``profiles``, in that order.

    A device runs a block at the widths that its backend takes and that it has a timing for.
    ``slots`` sequences of ``context_tokens`` are held, prompts computed ``chunk_tokens`` at a time.
    ``formats`` says how each width is stored (None: the defaults); ``weight_errors`` has one
    mapping of bits to the normalised error per block, needed with ``max_weight_error``;
    ``sensitivities`` the same of KL divergence, needed with ``quality_budget``, and
    ``own_sensitivities`` those of devices whose arithmetic adds its own: all of theirs.
    ``hop_formats`` are the widths that hops may use, ``watts`` what devices draw while they
    compute. ``no_links`` says of links that were tried why they are missing. Links to or from other
    devices, and what they hold, load or draw, are ignored.
    Raises ValueError for input that is inconsistent.
    """
    blocks = range(spec.block_count)
    if formats is None:
        formats = {width: Format.of(width) for width in BITS}
    if not bits or any(width not in formats for width in bits):
        raise ValueError(f"bits must be some of {sorted(formats)}, not {list(bits)}")
    if weight_errors is None:
        if max_weight_error is not None:
            raise ValueError("a bound on weight errors needs the errors")
        weight_errors = [{} for _ in blocks]
    if len(weight_errors) != len(blocks):
        raise ValueError(f"weight errors of {len(weight_errors)} blocks, not {len(blocks)}")
    if sensitivities is None and quality_budget is not None:
        raise ValueError("a quality budget needs the sensitivities")
    if sensitivities is not None and len(sensitivities) != len(blocks):
        raise ValueError(f"sensitivities of {len(sensitivities)} blocks, not {len(blocks)}")
    for name, rows in (own_sensitivities or {}).items():
        if len(rows) != len(blocks):
            raise ValueError(f"{name}: sensitivities of {len(rows)} blocks, not {len(blocks)}")
    if not hop_formats or len({form.bits for form in hop_formats}) != len(hop_formats):
        raise ValueError("hops need at least one width, and each once")
    for name, power in (watts or {}).items():
        if not 0 < power < math.inf:
            raise ValueError(f"{name} cannot draw {power} watts")
    indices = {name: index for index, name in enumerate(profiles)}
    for block, name in (pins or {}).items():
        if block not in blocks:
            raise ValueError(f"cannot pin block {block} of {len(blocks)} to {name}")
        if name not in indices:
            raise ValueError(
                f"cannot pin {spec.block_name(block)} to {name}: no device has that name"
                f" ({_known(indices)})"
            )
    for name in excluded:
        if name not in indices:
            raise ValueError(f"cannot exclude {name}: no device has that name ({_known(indices)})")
    stage_bytes = costs.stage_buffer_bytes(spec, blocks, chunk_tokens, context_tokens)
    kv_bytes = tuple(slots * costs.kv_bytes(spec, k, context_tokens) for k in blocks)
    options = {
        name: _options(
            spec, profile, timings.get(name, ()), formats, (own_sensitivities or {}).get(name)
        )
        for name, profile in profiles.items()
    }
    devices = tuple(
        Device(
            name=name,
            memory_bytes=min(
                profile.memory_bytes,
                _on_chip_limit(spec, profile, options[name], kv_bytes, stage_bytes),
            ),
            storage_bytes=profile.storage_bytes,
            options=options[name],
            # The largest of all blocks, although a stage needs only the largest of its own.
            stage_bytes=stage_bytes,
            call_s=(call_s or {}).get(name, 0.0),
            backend_bits=tuple(sorted(width for width, _ in profile.container_bits)),
            held=tuple(map(frozenset, (held or {}).get(name, ()))),
            load_bytes_per_s=(load_bytes_per_s or {}).get(name, math.inf),
            watts=(watts or {}).get(name),
        )
        for name, profile in profiles.items()
    )
    return PlanningProblem(
        spec=spec,
        devices=devices,
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
        bits=tuple(sorted(set(bits))),
        stored_bytes=tuple(
            {width: costs.stored_bytes(spec, k, fmt) for width, fmt in formats.items()}
            for k in blocks
        ),
        kv_bytes=kv_bytes,
        weight_errors=tuple(dict(errors) for errors in weight_errors),
        max_weight_error=(math.inf if max_weight_error is None else max_weight_error,)
        * len(blocks),
        sensitivities=tuple(dict(row) for row in sensitivities or ()),
        quality_budget=quality_budget,
        objective=objective or Objective(),
        pins={block: indices[name] for block, name in (pins or {}).items()},
        excluded=frozenset(indices[name] for name in excluded),
        hop_formats=tuple(sorted(hop_formats, key=lambda form: form.bits)),
    )


def _known(names: Iterable[str]) -> str:
    return f"known are {', '.join(names)}" if names else "there are no devices"


def layer_variants(spec: ModelSpec) -> list[int]:
    """For each block its ``BlockTiming.variant``: distinct layer shapes by first appearance."""
    shapes: dict[LayerSpec, int] = {}
    layers = [shapes.setdefault(layer, len(shapes)) for layer in spec.layers]
    return [0, *layers, 0]


def _on_chip_limit(
    spec: ModelSpec,
    profile: DeviceProfile,
    options: Sequence[Sequence[BlockOption]],
    kv_bytes: Sequence[int],
    stage_bytes: int,
) -> int:
    """What a stage takes of as many layers as the device's chip holds; else no limit.

    Timings were taken with all weights on the chip, which this keeps true. Where not even one layer
    fits, they are those of weights that cross the bus at every call, and hold for any number.
    Embedding and head count as well, although they are not the chip's: never too little.
    """
    unlimited = profile.memory_bytes
    if profile.on_chip_bytes is None:
        return unlimited
    layers = profile.on_chip_bytes // max(map(costs.on_chip_layer_bytes, spec.layers))
    largest = max(
        (
            option.executed_bytes + kv_bytes[block]
            for block in range(1, spec.head_block)
            for option in options[block]
        ),
        default=0,
    )
    return stage_bytes + layers * largest if layers else unlimited


def _options(
    spec: ModelSpec,
    profile: DeviceProfile,
    timings: Iterable[BlockTiming],
    formats: Mapping[int, Format],
    sensitivities: Sequence[Mapping[int, float]] | None,
) -> tuple[tuple[BlockOption, ...], ...]:
    measured = {(timing.kind, timing.variant, timing.bits): timing for timing in timings}
    for timing in measured.values():
        for seconds in (timing.decode_s, timing.prefill_s_per_token):
            if not 0 < seconds < math.inf:
                raise ValueError(f"{profile.machine}: a block cannot take {seconds} s")
    rows = []
    for block, variant in enumerate(layer_variants(spec)):
        row = []
        for bits, fmt in sorted(formats.items()):
            container = profile.container(bits)
            found = measured.get((spec.block_kind(block), variant, bits))
            if container is not None and found is not None:
                executed = costs.executed_bytes(spec, block, fmt, container)
                own = None if sensitivities is None else sensitivities[block].get(bits, math.inf)
                row.append(
                    BlockOption(bits, executed, found.decode_s, found.prefill_s_per_token, own)
                )
        rows.append(tuple(row))
    return tuple(rows)
