"""A member's share of a model: some heads, columns and vocabulary of whole layers.

Devices that share layers are a team. Each member runs a share of every layer: whole KV heads with
their query heads, and columns of the MLP. A layer is cut twice, after ``o`` and after ``down``.
There the members add up their partial rows. The head is divided by vocabulary. The embedding is
not divided.

In a layer with experts each member has whole experts instead of columns, and the whole router. So
members that compute the same scores choose the same experts. The MLP beside the experts is divided
by columns, in proportion to the experts.

A share of a model is again a model, with fewer heads, a narrower MLP and a smaller vocabulary. So
sizes, costs, files and kernels of a share need no rules of their own.

Source: Shoeybi et al., "Megatron-LM" (columns of the first matrix, rows of the second).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from model.artifact import Tensor
from model.errors import UnsupportedModelError
from model.experts import STACKED, rows_of
from model.quantize import QuantizedMatrix, pack_rows
from model.spec import ExpertSpec, LayerSpec, ModelSpec

Span = tuple[int, int]
"""A half-open range."""

_BY_HEADS = frozenset(("q", "k", "v"))
_BY_COLUMNS = frozenset(("gate", "up"))
_BESIDE = frozenset(("shared_gate", "shared_up", "shared_down", "shared_mix"))

_BESIDE_STEP = 128
"""Columns of the MLP beside experts are divided at multiples, which are whole groups."""


@dataclass(frozen=True, slots=True)
class Share:
    """One member's KV heads, columns of the MLP (or experts) and tokens of the vocabulary."""

    kv_heads: Span
    columns: Span
    """Experts of layers that have them, else columns of the MLP."""
    vocab: Span

    @staticmethod
    def whole(spec: ModelSpec) -> Share:
        """Return the share of a device that is alone. The spec has one shape of heads and MLP."""
        layer = spec.layers[0]
        return Share((0, layer.kv_heads), (0, mlp_units(layer)), (0, spec.vocab))

    def to_tuple(self) -> tuple[int, ...]:
        """Return six plain numbers, for messages. ``from_tuple`` is the inverse."""
        return (*self.kv_heads, *self.columns, *self.vocab)

    @staticmethod
    def from_tuple(values: tuple[int, ...]) -> Share:
        """Inverse of ``to_tuple``. Raises UnsupportedModelError; ``share_spec`` checks the rest."""
        if len(values) != 6:
            raise UnsupportedModelError(f"a share has six numbers, not {len(values)}")
        return Share((values[0], values[1]), (values[2], values[3]), (values[4], values[5]))


@dataclass(frozen=True, slots=True)
class Steps:
    """The smallest pieces of a share: its ranges begin and end at multiples, or at the end."""

    kv_heads: int
    columns: int
    vocab: int = 1


def mlp_units(layer: LayerSpec) -> int:
    """Return into how many parts a layer's MLP can be divided: its experts, or its columns."""
    return layer.ffn if layer.experts is None else layer.experts.count


def unshared(spec: ModelSpec) -> str | None:
    """Why no team can share the model's layers; None if one can.

    One share describes all layers. A norm of q and k over all heads needs the sum of all members'
    squares before attention, which would be a third cut.
    """
    if spec.encodes:
        return "the model encodes whole texts, whose layers are not shared"
    first = spec.layers[0]
    sizes = {(layer.kv_heads, layer.heads, layer.ffn, layer.experts) for layer in spec.layers}
    if sizes != {(first.kv_heads, first.heads, first.ffn, first.experts)}:
        return "the model's layers differ in heads or MLP"
    if any(layer.qk_norm == "width" for layer in spec.layers):
        return "the model norms q and k over all heads at once"
    return None


def can_share(spec: ModelSpec) -> bool:
    """Whether a team can share the model's layers."""
    return unshared(spec) is None


def share_steps(spec: ModelSpec, group_size: int) -> Steps:
    """Return steps with which the columns of ``o`` and ``down`` are whole quantization groups.

    group_size: of the formats that the blocks may have; 0 for floats alone.
    """
    if not group_size:
        return Steps(1, 1)
    layer = spec.layers[0]
    columns = group_size if layer.experts is None else 1
    per_kv_head = layer.heads // layer.kv_heads * layer.head_dim
    return Steps(group_size // math.gcd(group_size, per_kv_head), columns)


def most_members(spec: ModelSpec, group_size: int) -> int:
    """Return how many devices a team of this model can have, as each has a step of everything.

    It is 1 if no team can share the model. ``group_size`` is that of ``share_steps``.
    """
    if not can_share(spec):
        return 1
    steps, layer = share_steps(spec, group_size), spec.layers[0]
    parts = -(-mlp_units(layer) // steps.columns)
    return min(-(-layer.kv_heads // steps.kv_heads), parts, spec.vocab)


def share_spec(spec: ModelSpec, share: Share) -> ModelSpec:
    """Return the model of a share: ``hidden`` stays, heads, MLP and vocabulary are the member's.

    It describes layers and head. The embedding is not divided. Raises UnsupportedModelError if the
    share is empty or exceeds the model, or no team can share it.
    """
    reason = unshared(spec)
    if reason is not None:
        raise UnsupportedModelError(f"{reason}, so no team can share its layers")
    layer = spec.layers[0]
    for name, (begin, end), total in (
        ("KV heads", share.kv_heads, layer.kv_heads),
        (mlp_words(layer), share.columns, mlp_units(layer)),
        ("vocabulary", share.vocab, spec.vocab),
    ):
        if not 0 <= begin < end <= total:
            raise UnsupportedModelError(f"a share of {name} [{begin}, {end}) of {total} is invalid")
    kv_heads = share.kv_heads[1] - share.kv_heads[0]
    layers = tuple(
        replace(
            one,
            heads=kv_heads * (layer.heads // layer.kv_heads),
            kv_heads=kv_heads,
            ffn=share.columns[1] - share.columns[0] if one.experts is None else one.ffn,
            experts=None if one.experts is None else _held(one.experts, share.columns),
        )
        for one in spec.layers
    )
    return replace(spec, layers=layers, vocab=share.vocab[1] - share.vocab[0])


def share_tensors(
    spec: ModelSpec, block: int, tensors: Mapping[str, Tensor], share: Share
) -> dict[str, Tensor]:
    """Return the share of a layer's or the head's tensors, as slices of the same numbers.

    Norms, and the biases that are added after a cut, stay whole. Raises ValueError for the
    embedding, or if a range cuts a quantization group.
    """
    kind = spec.block_kind(block)
    if kind == "embedding":
        raise ValueError("the embedding is not divided")
    if kind == "head":
        return {
            name: row_slice(tensor, share.vocab) if name == "lm_head.weight" else tensor
            for name, tensor in tensors.items()
        }
    layer = spec.layer(block)
    per_kv_head = layer.heads // layer.kv_heads
    begin, end = (heads * layer.head_dim for heads in share.kv_heads)
    queries = begin * per_kv_head, end * per_kv_head
    sliced: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        matrix = name.partition(".")[0]
        if layer.experts is not None and name in STACKED:
            first, last = (rows_of(layer, expert, name).start for expert in share.columns)
            sliced[name] = row_slice(tensor, (first, last))
        elif layer.experts is not None and matrix in _BESIDE:
            columns = _beside(layer.experts, share.columns)
            if columns[0] < columns[1]:
                sliced[name] = _beside_slice(matrix, tensor, columns)
        elif name == "sinks":
            heads = (head * per_kv_head for head in share.kv_heads)
            sliced[name] = row_slice(tensor, (next(heads), next(heads)))
        elif matrix in _BY_HEADS:
            sliced[name] = row_slice(tensor, queries if matrix == "q" else (begin, end))
        elif matrix in _BY_COLUMNS:
            sliced[name] = row_slice(tensor, share.columns)
        elif name == "o.weight":
            sliced[name] = column_slice(tensor, queries)
        elif name == "down.weight":
            sliced[name] = column_slice(tensor, share.columns)
        else:
            sliced[name] = tensor
    return sliced


def mlp_words(layer: LayerSpec) -> str:
    """Return what ``mlp_units`` counts, for messages."""
    return "MLP columns" if layer.experts is None else "experts"


def _held(experts: ExpertSpec, span: Span) -> ExpertSpec:
    """Return the experts of a member that holds those in ``span``."""
    begin, end = _beside(experts, span)
    return replace(experts, first=span[0], held=span[1] - span[0], shared_ffn=end - begin)


def _beside(experts: ExpertSpec, span: Span) -> Span:
    """Return the member's columns of the MLP beside the experts. There may be none."""
    steps = -(-experts.shared_ffn // _BESIDE_STEP)
    begin, end = (
        min(experts.shared_ffn, steps * expert // experts.count * _BESIDE_STEP) for expert in span
    )
    return begin, end


def _beside_slice(matrix: str, tensor: Tensor, columns: Span) -> Tensor:
    if matrix == "shared_mix":
        return tensor
    return column_slice(tensor, columns) if matrix == "shared_down" else row_slice(tensor, columns)


def row_slice(tensor: Tensor, span: Span) -> Tensor:
    """Return consecutive rows of a tensor, as a view."""
    rows = slice(*span)
    return tensor.rows(rows) if isinstance(tensor, QuantizedMatrix) else tensor[rows]


def column_slice(tensor: Tensor, span: Span) -> Tensor:
    """Return a copy of some columns of a matrix. Raises ValueError if they cut a group."""
    begin, end = span
    if not isinstance(tensor, QuantizedMatrix):
        return np.ascontiguousarray(tensor[:, begin:end])
    fmt = tensor.format
    shape = (tensor.shape[0], end - begin)
    if fmt.scheme == "float":
        return QuantizedMatrix(shape, fmt, np.ascontiguousarray(tensor.data[:, begin:end]))
    if begin % fmt.group_size or (end % fmt.group_size and end != tensor.shape[1]):
        raise ValueError(f"columns [{begin}, {end}) cut a group of {fmt.group_size}")
    groups = slice(begin // fmt.group_size, fmt.groups(end))
    scales, zeros = tensor.scale_data, None
    if scales is not None and fmt.scheme != "truncate":
        scales = np.ascontiguousarray(scales[:, groups])
    if tensor.zero_data is not None:
        zeros = pack_rows(tensor.zeros()[:, groups], fmt.bits)
    data = np.ascontiguousarray(tensor.data[:, groups])
    return QuantizedMatrix(shape, fmt, data, scales, zeros)
