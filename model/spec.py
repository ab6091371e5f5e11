"""A decoder language model as features, from which backends, cost formulas and plans are built.

A family (``model.families``) maps config.json to these values once. No other code asks for a
family's name. The unit of placement is the block:

    block 0                 the embedding (token rows, learned positions, input projection)
    block 1 .. layers       the decoder layers
    block layers + 1        the head (final norm, output projection, LM head)
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from model.errors import UnsupportedModelError

BlockKind = Literal["embedding", "layer", "head"]
NormKind = Literal["layernorm", "rmsnorm"]
NormPosition = Literal["pre", "post"]
Activation = Literal["relu", "silu", "gelu", "gelu_tanh"]
RopeScaling = Literal["none", "linear", "dynamic", "llama3"]


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding: half-split ("rotate half") pairs over the whole head dimension.

    ``original_context`` is the trained context. `dynamic` scaling starts there, and `llama3`
    compares wavelengths with it. Other kinds ignore the frequency and band factors.
    """

    theta: float
    scaling: RopeScaling = "none"
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One decoder layer. Two layers with equal specs cost the same on the same device."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    norm: NormKind
    norm_eps: float
    norm_position: NormPosition
    activation: Activation
    gated: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool = False
    rope: RopeSpec | None = None
    sliding_window: int | None = None
    """The number of positions that a query sees, itself included. None sees all."""

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the layer's canonical tensor names and shapes. Matrices are [out, in]."""
        q_rows, kv_rows = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {}

        def linear(name: str, rows: int, columns: int, bias: bool) -> None:
            shapes[f"{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{name}.bias"] = (rows,)

        def norm(name: str, width: int) -> None:
            shapes[f"{name}.weight"] = (width,)
            if self.norm == "layernorm":
                shapes[f"{name}.bias"] = (width,)

        norm("attn_norm", self.hidden)
        linear("q", q_rows, self.hidden, self.qkv_bias)
        linear("k", kv_rows, self.hidden, self.qkv_bias)
        linear("v", kv_rows, self.hidden, self.qkv_bias)
        if self.qk_norm:
            shapes["q_norm.weight"] = (self.head_dim,)
            shapes["k_norm.weight"] = (self.head_dim,)
        linear("o", self.hidden, q_rows, self.out_bias)
        norm("mlp_norm", self.hidden)
        if self.gated:
            linear("gate", self.ffn, self.hidden, self.mlp_bias)
        linear("up", self.ffn, self.hidden, self.mlp_bias)
        linear("down", self.hidden, self.ffn, self.mlp_bias)
        return shapes


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A whole model. ``hidden`` is the width that crosses a hop, ``embed_dim`` the table's."""

    vocab: int
    hidden: int
    embed_dim: int
    max_context: int
    layers: tuple[LayerSpec, ...]
    learned_positions: int
    """Rows of the learned position table, or 0. Position p reads row p + position_offset."""
    position_offset: int
    final_norm: bool
    tied_head: bool
    bos_token: int | None
    eos_tokens: tuple[int, ...]

    @property
    def block_count(self) -> int:
        return len(self.layers) + 2

    @property
    def head_block(self) -> int:
        return len(self.layers) + 1

    @property
    def layer_variants(self) -> tuple[LayerSpec, ...]:
        """The distinct shapes of layers, in order of first appearance.

        On the wire, BlockTiming.variant and a measurement's variant are indices into it.
        """
        return tuple(dict.fromkeys(self.layers))

    def block_variant(self, block: int) -> int:
        """Return the index of the block's shape in ``layer_variants``; 0 for embedding and head."""
        if self.block_kind(block) != "layer":
            return 0
        return self.layer_variants.index(self.layers[block - 1])

    @property
    def projected(self) -> bool:
        """Whether the embedding width differs from the hidden width (OPT-350m)."""
        return self.embed_dim != self.hidden

    def block_kind(self, block: int) -> BlockKind:
        """Return the kind of a block. Raises IndexError outside [0, block_count)."""
        if not 0 <= block < self.block_count:
            raise IndexError(f"the model has {self.block_count} blocks, but no block {block}")
        if block == 0:
            return "embedding"
        return "head" if block == self.head_block else "layer"

    def layer(self, block: int) -> LayerSpec:
        """Return the decoder layer of a block."""
        return self.layers[block - 1]

    def block_name(self, block: int) -> str:
        """Return the name for users: ``embedding``, ``layer 0`` .. ``layer L-1``, ``head``."""
        kind = self.block_kind(block)
        return f"layer {block - 1}" if kind == "layer" else kind

    def block_tensors(self, block: int) -> dict[str, tuple[int, ...]]:
        """Return a block's canonical tensor names and shapes. Matrices are [out, in].

        A tied head owns a copy of the token table as ``lm_head.weight``, because it may be on
        another device than the embedding.
        """
        kind = self.block_kind(block)
        if kind == "layer":
            return self.layer(block).tensors()
        shapes: dict[str, tuple[int, ...]] = {}
        if kind == "embedding":
            shapes["tokens.weight"] = (self.vocab, self.embed_dim)
            if self.learned_positions:
                shapes["positions.weight"] = (self.learned_positions, self.hidden)
            if self.projected:
                shapes["project_in.weight"] = (self.hidden, self.embed_dim)
            return shapes
        if self.final_norm:
            shapes["norm.weight"] = (self.hidden,)
            if self.layers[-1].norm == "layernorm":
                shapes["norm.bias"] = (self.hidden,)
        if self.projected:
            shapes["project_out.weight"] = (self.embed_dim, self.hidden)
        shapes["lm_head.weight"] = (self.vocab, self.embed_dim)
        return shapes

    def to_dict(self) -> dict[str, Any]:
        """Return plain values only, for messages and files. ``from_dict`` is the inverse."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> ModelSpec:
        """Inverse of ``to_dict`` for input that may come from a peer.

        Raises UnsupportedModelError if a key is missing, unknown or absurd.
        """
        try:
            plain = dict(values)
            layers = tuple(_layer_from_dict(dict(item)) for item in plain.pop("layers"))
            plain["eos_tokens"] = tuple(plain["eos_tokens"])
            spec = ModelSpec(layers=layers, **plain)
            _check(spec)
        except (KeyError, TypeError, ValueError) as error:
            raise UnsupportedModelError(f"malformed model description: {error}") from error
        return spec


QUANTIZED_TENSORS = frozenset(
    f"{name}.weight"
    for name in (
        "q", "k", "v", "o", "gate", "up", "down",
        "tokens", "project_in", "project_out", "lm_head",
    )
)  # fmt: skip
"""Canonical names stored in the block's format. All other tensors are stored as fp32."""


def _layer_from_dict(values: dict[str, Any]) -> LayerSpec:
    rope = values.pop("rope", None)
    return LayerSpec(rope=None if rope is None else RopeSpec(**rope), **values)


_CHOICES: dict[str, tuple[str, ...]] = {
    "norm": get_args(NormKind),
    "norm_position": get_args(NormPosition),
    "activation": get_args(Activation),
    "scaling": get_args(RopeScaling),
}
_NUMBERS = frozenset(("norm_eps", "theta", "factor", "low_freq_factor", "high_freq_factor"))
_COUNTS = frozenset(("learned_positions", "position_offset", "original_context"))
_SIZES = frozenset(
    ("vocab", "hidden", "embed_dim", "max_context", "heads", "kv_heads", "head_dim", "ffn")
)
MAX_SIZE = 1 << 24
"""The bound of each width, head count and token id. No real model has more."""
MAX_LAYERS = 1 << 12


def _check(spec: ModelSpec) -> None:
    """Refuse types and sizes that no real model has, before they are used for allocation."""
    if not 0 < len(spec.layers) <= MAX_LAYERS:
        raise UnsupportedModelError(f"malformed model description: {len(spec.layers)} layers")
    _check_fields(spec)
    for layer in set(spec.layers):
        _check_fields(layer)
        if layer.hidden != spec.hidden or layer.heads % layer.kv_heads:
            raise UnsupportedModelError("malformed model description: inconsistent layer sizes")
        if layer.rope is None:
            continue
        _check_fields(layer.rope)
        smallest = 4 if layer.rope.scaling == "dynamic" else 2
        scaled = layer.rope.scaling in ("dynamic", "llama3")
        if layer.head_dim % 2 or layer.head_dim < smallest:
            raise UnsupportedModelError("malformed model description: head_dim cannot be rotated")
        if scaled and not layer.rope.original_context:
            raise UnsupportedModelError("malformed model description: original_context is missing")


def _check_fields(part: ModelSpec | LayerSpec | RopeSpec) -> None:
    for field in fields(part):
        value = getattr(part, field.name)
        if not _is_valid(field.name, value):
            shown = repr(value)[:80]
            raise UnsupportedModelError(f"malformed model description: {field.name} = {shown}")


def _is_valid(name: str, value: Any) -> bool:
    if name in ("layers", "rope"):
        return True
    if name in _CHOICES:
        return value in _CHOICES[name]
    if name in _NUMBERS:
        return type(value) in (int, float) and 0 < value < math.inf
    if name in _SIZES:
        return _is_count(value) and value > 0
    if name in _COUNTS:
        return _is_count(value)
    if name == "sliding_window":
        return value is None or (_is_count(value) and value > 0)
    if name == "bos_token":
        return value is None or _is_count(value)
    if name == "eos_tokens":
        return all(_is_count(token) for token in value)
    return type(value) is bool


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_SIZE
