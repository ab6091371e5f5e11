"""A described testbed: devices and links written down, instead of measured.

``planning.labs.lab_file`` reads a lab. ``lab_problem`` makes a planning problem of it. The times
of its plans are only as true as the description. They are the times of one model, which the
description names. For another model they are scaled by its weights, and ``times_of`` says so.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

from model.costs import used_weights
from model.experts import STACKED
from model.spec import LayerSpec, ModelSpec
from planning.build import DeviceInput, RequestInput, build_problem
from planning.problem import HopFormat, PlanningProblem
from wire import limits
from wire.profile import BlockTiming, DeviceProfile, LinkProfile

ASSUMED_SUM_S = 1.5e-4
"""A device's own work for one sum over a team, if the file does not say."""


class LabError(Exception):
    """The description cannot be used. The message is one line: file, line and what to do."""


@dataclass(frozen=True, slots=True)
class LabModel:
    """The model of a lab's times: its name, and the shape that its times depend on.

    ``q_rows`` and ``kv_rows`` are the numbers of heads times their width.
    """

    name: str
    hidden: int
    ffn: int
    q_rows: int
    kv_rows: int
    vocab: int
    gated: bool = True

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's matrices, which decoding reads once a token."""
        return _layer_weights(self.hidden, self.ffn, self.q_rows, self.kv_rows, self.gated)

    def layer_factor(self, layer: LayerSpec) -> float:
        """The weights of ``layer``, relative to a layer of this model; 1.0 for the same shape."""
        rows = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
        used = _layer_weights(layer.hidden, layer.used_ffn, *rows, layer.gated)
        return used / self.layer_weights

    def head_factor(self, spec: ModelSpec) -> float:
        """The weights of the head of ``spec``, relative to the head of this model."""
        return spec.vocab * spec.hidden / (self.vocab * self.hidden)

    def is_shape_of(self, spec: ModelSpec) -> bool:
        """True if every layer and the head of ``spec`` have this shape, so the times are theirs."""
        shapes = {
            (
                layer.hidden,
                layer.used_ffn,
                layer.heads * layer.head_dim,
                layer.kv_heads * layer.head_dim,
                layer.gated,
            )
            for layer in spec.layers
        }
        own = (self.hidden, self.ffn, self.q_rows, self.kv_rows, self.gated)
        return shapes == {own} and spec.vocab == self.vocab


def _layer_weights(hidden: int, ffn: int, q_rows: int, kv_rows: int, gated: bool) -> int:
    return hidden * (2 * q_rows + 2 * kv_rows + (3 if gated else 2) * ffn)


@dataclass(frozen=True, slots=True)
class TimesOf:
    """The source of a plan's times. ``model`` is None if the lab names no model.

    ``assumed`` is True unless they are the described times of the planned model.
    """

    model: str | None
    assumed: bool
    text: str


@dataclass(frozen=True, slots=True)
class LabDevice:
    """One described device. Times are seconds, by width; ``container`` is the width executed.

    ``watts``: power while the device computes. None: not known.
    ``on_chip_bytes``, ``arithmetic``: as in DeviceProfile.
    ``layer_kl``: KL divergence that a layer adds on the device, by width, if the file has it.
    ``shares``: whether the device can run shares of layers, in a team with others.
    ``share_times``: time of a share, relative to the whole layer, by the share. Empty: not
    described, so it is assumed.
    ``sum_s``: the device's own work for one sum over a team, without the network.
    """

    name: str
    memory_bytes: int
    storage_bytes: int
    container: Mapping[int, int]
    layer_decode_s: Mapping[int, float]
    layer_prefill_s_per_token: Mapping[int, float]
    embed_s: Mapping[int, float]
    head_s: Mapping[int, float]
    call_s: float = 0.0
    watts: float | None = None
    on_chip_bytes: int | None = None
    arithmetic: str = ""
    layer_kl: Mapping[int, float] | None = None
    shares: bool = True
    share_times: Mapping[float, float] = field(default_factory=dict)
    sum_s: float = ASSUMED_SUM_S

    @property
    def bits(self) -> tuple[int, ...]:
        """The widths that the device runs."""
        return tuple(sorted(self.container))


@dataclass(frozen=True, slots=True)
class Lab:
    """A testbed: its devices in the file's order, and the links by ordered pair."""

    source: str
    devices: tuple[LabDevice, ...]
    links: tuple[LinkProfile, ...]
    hop_formats: tuple[HopFormat, ...] = ()
    """Formats of hops in the file; empty if it has none."""
    model: LabModel | None = None
    """The model of the devices' times; None if the file does not say."""

    @property
    def bits(self) -> tuple[int, ...]:
        """The widths that any device runs."""
        return tuple(sorted({width for device in self.devices for width in device.bits}))


def times_of(lab: Lab, spec: ModelSpec, members: Collection[str] = ()) -> TimesOf:
    """The source of the times that ``lab_problem`` takes for ``spec``, also in words.

    ``members``: devices of which a plan has shares of layers. Their times may be assumed as well.
    """
    found = _times_of(lab, spec)
    if any(device.name in members and not device.share_times for device in lab.devices):
        text = f"{found.text}; times of shares are assumed: a tenth is fixed (docs/labs.md)"
        return replace(found, assumed=True, text=text)
    return found


def _times_of(lab: Lab, spec: ModelSpec) -> TimesOf:
    if lab.model is None:
        return TimesOf(
            None,
            True,
            f"assumed: {lab.source} does not say which model its times are for, so they are taken"
            " as they are: add `model:` (docs/labs.md)",
        )
    name = lab.model.name
    if lab.model.is_shape_of(spec):
        return TimesOf(name, False, f"those that {lab.source} describes for {name}")
    factors = sorted({lab.model.layer_factor(layer) for layer in spec.layers})
    layers = " to ".join(f"{factor:.3g}" for factor in (factors[0], factors[-1])[: len(factors)])
    return TimesOf(
        name,
        True,
        f"scaled from {name} by weights (layers x {layers},"
        f" head x {lab.model.head_factor(spec):.3g}): assumed",
    )


def lab_problem(lab: Lab, request: RequestInput) -> PlanningProblem:
    """The problem of splitting the request's model over the lab.

    The lab's times are scaled by the weights of blocks if they are for another model. They are
    taken as they are if the lab names no model (``times_of``). Raises ValueError like
    ``build_problem``, and LabError if no device runs any of the request's bits.
    """
    if not set(lab.bits) & set(request.bits):
        asked, described = (", ".join(map(str, sorted(w))) for w in (request.bits, lab.bits))
        raise LabError(
            f"{lab.source}: no device runs {asked} bit: the described widths are {described}"
        )
    devices = [
        DeviceInput(
            device.name,
            _profile(device),
            tuple(_timings(device, request.spec, lab.model)),
            layer_kl=device.layer_kl,
        )
        for device in lab.devices
    ]
    hops = request.hop_formats or lab.hop_formats or None
    return build_problem(replace(request, hop_formats=hops), devices, lab.links)


def _profile(device: LabDevice) -> DeviceProfile:
    # Figures that only a measurement gives are 0. No plan uses them.
    return DeviceProfile(
        machine=device.name,
        processor="described",
        cores=0,
        threads=0,
        backend="described",
        backend_version="",
        container_bits=tuple(sorted(device.container.items())),
        memory_bytes=device.memory_bytes,
        memory_total_bytes=device.memory_bytes,
        storage_bytes=device.storage_bytes,
        memory_read_bytes_per_s=0.0,
        disk_write_bytes_per_s=0.0,
        call_s=device.call_s,
        watts=device.watts,
        on_chip_bytes=device.on_chip_bytes,
        arithmetic=device.arithmetic,
        shares=device.shares,
        sum_s=device.sum_s,
    )


def _timings(device: LabDevice, spec: ModelSpec, model: LabModel | None) -> Iterator[BlockTiming]:
    ends = embedding = 1.0
    layers = dict.fromkeys(spec.layers, 1.0)
    if model is not None and not model.is_shape_of(spec):
        ends, embedding = model.head_factor(spec), spec.hidden / model.hidden
        layers = {layer: model.layer_factor(layer) for layer in spec.layers}
    for bits in device.bits:
        embed_s, head_s = embedding * device.embed_s[bits], ends * device.head_s[bits]
        yield BlockTiming("embedding", 0, bits, embed_s, embed_s)
        # In the order of ``ModelSpec.layer_variants``.
        for variant, (layer, factor) in enumerate(layers.items()):
            times = device.layer_decode_s[bits], device.layer_prefill_s_per_token[bits]
            times = factor * times[0], factor * times[1]
            # A chunk of a prompt takes at least as long as reading all experts that it chooses.
            times = times[0], max(times[1], times[0] * _chunk_reading(layer))
            yield BlockTiming("layer", variant, bits, *times, shares_s=_shares_s(device, *times))
        # The head computes a prompt's last row alone, so a row has its share in a full chunk.
        times = head_s, head_s / limits.PREFILL_CHUNK_TOKENS
        yield BlockTiming("head", 0, bits, *times, shares_s=_shares_s(device, *times))


def _chunk_reading(layer: LayerSpec) -> float:
    """How much a row of a chunk reads, in what a token reads. 0 for layers without experts."""
    experts = layer.experts
    if experts is None:
        return 0.0
    rows, used = limits.PREFILL_CHUNK_TOKENS, used_weights(layer)
    chosen = (1 - (1 - experts.active / experts.count) ** rows) * experts.count / experts.active
    read = sum(size * (chosen if name in STACKED else 1.0) for name, size in used.items())
    return read / sum(used.values()) / rows


def _shares_s(
    device: LabDevice, decode_s: float, prefill_s_per_token: float
) -> tuple[tuple[float, float, float], ...]:
    """The described shares of a block with these times; empty if none are described."""
    times = {1.0: 1.0, **device.share_times} if device.share_times else {}
    return tuple(
        (share, time * decode_s, time * prefill_s_per_token)
        for share, time in sorted(times.items())
    )
