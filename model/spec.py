"""A language model as features, from which backends, cost formulas and plans are built.

A family (``model.families``) maps config.json to these values once. No other code asks for a
family's name. The unit of placement is the block:

    block 0                 the embedding (token rows, learned positions, input projection)
    block 1 .. layers       the decoder layers
    block layers + 1        the head (final norm, output projection, LM head; ``OutputSpec``)
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, TypeAlias, get_args

from model.errors import UnsupportedModelError

BlockKind = Literal["embedding", "layer", "head"]
NormKind = Literal["layernorm", "rmsnorm"]
NormPosition = Literal["pre", "post", "both", "output"]
"""Where a layer's norms are, around attention and MLP (the parts).

pre: x + part(norm(x)). post: norm(x + part(x)). both: x + norm(part(norm(x))).
output: x + norm(part(x)).
"""
QkNorm = Literal["none", "head", "width"]
"""RMS norms of q and k: over each head's columns with one weight, or over all heads at once."""
ExpertScoring = Literal["softmax", "topk_softmax"]
Activation = Literal["relu", "silu", "gelu", "gelu_tanh"]
RopeScaling = Literal["none", "linear", "dynamic", "llama3", "yarn", "longrope"]
OutputKind = Literal["vector", "class", "tokens", "span"]
"""The result of a text: a vector, scores of its classes, scores of each token's classes,
or how well an answer begins and ends at each token."""
Pooling = Literal["none", "first", "mean", "last", "max", "mean_sqrt_len", "weighted_mean"]
"""Which of a text's rows its result comes from: each, the first, all of them, or the last."""
POOLING_KEY = "gguf_pooling"
"""Where the config that stands for a GGUF file has the pooling of an embedder."""
DenseActivation = Literal["none", "tanh", "relu"]
"""The function behind the dense layer of a head. none: the head has no such layer."""


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding: half-split ("rotate half") pairs (i, i + head_dim / 2) of a head.

    ``original_context`` is the trained context. `dynamic` scaling starts there, and `llama3`
    compares wavelengths with it. Other kinds ignore the frequency and band factors.

    rotated: columns of a head that turn, or 0 for all: those of the first rotated / 2 pairs. Their
        frequencies are those of a head that has no other columns.
    beta_fast, beta_slow, truncated: `yarn` keeps waves with more than beta_fast turns within the
        trained context, and divides those with fewer than beta_slow. ``truncated`` rounds the
        bounds to whole columns.
    attention_factor: `yarn` and `longrope` multiply cosines and sines by it.
    short_factors, long_factors: `longrope` divides frequencies by them, one per pair that turns.
    """

    theta: float
    scaling: RopeScaling = "none"
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    rotated: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncated: bool = True
    attention_factor: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def columns(self, head_dim: int) -> int:
        """Return how many columns of a head turn."""
        return self.rotated or head_dim


@dataclass(frozen=True, slots=True)
class ExpertSpec:
    """The experts of a layer, each a gated MLP that is ``LayerSpec.ffn`` wide.

    count, active: experts of the layer, and those that a token uses.
    scoring: softmax over all experts before the best are taken, or over the best alone.
    normalized: the weights of the chosen experts are divided by their sum.
    bias: router and experts have biases.
    limit: gate and up are clipped to it, and the gate is weighted by sigmoid(1.702 gate) and
        multiplied by up + 1 (gpt-oss). None: plain SwiGLU.
    shared_ffn: width of the MLP that every token uses beside its experts, or 0.
    shared_gate: a sigmoid of a linear layer weights that MLP.
    first, held: the experts that a member of a team holds, from the first one on. 0 held are all.
    """

    count: int
    active: int
    scoring: ExpertScoring = "softmax"
    normalized: bool = True
    bias: bool = False
    limit: float | None = None
    shared_ffn: int = 0
    shared_gate: bool = False
    first: int = 0
    held: int = 0

    @property
    def stored(self) -> int:
        """How many experts the layer's tensors hold."""
        return self.held or self.count


@dataclass(frozen=True, slots=True)
class StepSpec:
    """A linear layer behind the pooling of a vector, as sentence-transformers calls a Dense."""

    width: int
    activation: DenseActivation = "none"
    bias: bool = True


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """The result that an encoder returns of a text.

    pooling: the row or rows that the head takes.
    dense: width of a linear layer after pooling, or 0 without one. Its activation is
        ``activation``.
    labels: scores of a linear layer after that, or 0 if the vector itself is the result.
    normalized: the vector is divided by its length.
    steps: linear layers that a vector goes through before that.
    columns: of the vector only these first ones are the result, or 0 for all.
    """

    kind: OutputKind
    pooling: Pooling
    dense: int = 0
    activation: DenseActivation = "none"
    labels: int = 0
    normalized: bool = False
    steps: tuple[StepSpec, ...] = ()
    columns: int = 0

    @property
    def per_token(self) -> bool:
        """Whether each token has a result of its own."""
        return self.pooling == "none"


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One layer. Two layers with equal specs cost the same on the same device."""

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
    qk_norm: QkNorm = "none"
    rope: RopeSpec | None = None
    sliding_window: int | None = None
    """The number of positions that a query sees, itself included. None sees all."""
    score_scale: float | None = None
    """The factor of attention's scores. None is 1 / sqrt(head_dim)."""
    score_cap: float | None = None
    """Scores become cap * tanh(score / cap)."""
    sinks: bool = False
    """Each head has one more logit in the softmax, which adds no value."""
    experts: ExpertSpec | None = None
    """Experts instead of the MLP, which would be ``ffn`` wide."""
    bidirectional: bool = False
    """A position sees later ones too. A window of w then reaches w - 1 positions to either side."""
    enters_plain: bool = False
    """Attention takes the hidden state as it is, although the MLP has a norm before it."""
    position_buckets: int = 0
    """Rows of the table of biases that scores get by distance (model/position_bias.py), or 0."""

    @property
    def used_ffn(self) -> int:
        """The width of all MLPs that a token uses."""
        if self.experts is None:
            return self.ffn
        return self.experts.active * self.ffn + self.experts.shared_ffn

    @property
    def score_factor(self) -> float:
        """The factor of attention's scores."""
        return self.head_dim**-0.5 if self.score_scale is None else self.score_scale

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

        if not self.enters_plain:
            norm("attn_norm", self.hidden)
        linear("q", q_rows, self.hidden, self.qkv_bias)
        linear("k", kv_rows, self.hidden, self.qkv_bias)
        linear("v", kv_rows, self.hidden, self.qkv_bias)
        if self.qk_norm != "none":
            per_head = self.qk_norm == "head"
            shapes["q_norm.weight"] = (self.head_dim if per_head else q_rows,)
            shapes["k_norm.weight"] = (self.head_dim if per_head else kv_rows,)
        if self.sinks:
            shapes["sinks"] = (self.heads,)
        if self.position_buckets:
            shapes["position_bias.weight"] = (self.position_buckets, self.heads)
        linear("o", self.hidden, q_rows, self.out_bias)
        if self.norm_position == "both":
            norm("attn_out_norm", self.hidden)
            norm("mlp_out_norm", self.hidden)
        norm("mlp_norm", self.hidden)
        # Experts are stacked: the rows of a matrix are those of one expert after the other.
        stacked, bias = 1, self.mlp_bias
        if self.experts is not None:
            stacked, bias = self.experts.stored, self.experts.bias
            linear("router", self.experts.count, self.hidden, bias)
            self._shared_expert(shapes)
        if self.gated:
            linear("gate", stacked * self.ffn, self.hidden, bias)
        linear("up", stacked * self.ffn, self.hidden, bias)
        linear("down", stacked * self.hidden, self.ffn, bias)
        return shapes

    def _shared_expert(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Add the tensors of the MLP beside the experts. ``shared_mix`` is its gate."""
        width = 0 if self.experts is None else self.experts.shared_ffn
        if self.experts is None or not width:
            return
        shapes["shared_gate.weight"] = shapes["shared_up.weight"] = (width, self.hidden)
        shapes["shared_down.weight"] = (self.hidden, width)
        if self.experts.shared_gate:
            shapes["shared_mix.weight"] = (1, self.hidden)


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
    logit_cap: float | None = None
    """Logits become cap * tanh(logit / cap)."""
    token_types: int = 0
    """Rows of the table that is added by the part of a text a token is in, or 0."""
    embed_norm: bool = False
    """Embeddings are normed as layers are."""
    output: OutputSpec | None = None
    """The result of an encoder. None: the model generates text, and its head is an LM head."""

    @property
    def encodes(self) -> bool:
        """Whether whole texts go through once, without a KV cache, and nothing is generated."""
        return self.output is not None

    @property
    def output_width(self) -> int:
        """The values that the head returns: of a row, or of a text."""
        if self.output is None:
            return self.vocab
        if self.output.columns:
            return self.output.columns
        if self.output.steps:
            return self.output.steps[-1].width
        return self.output.labels or self.output.dense or self.hidden

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
        """Return the layer of a block."""
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
            if self.token_types:
                shapes["types.weight"] = (self.token_types, self.hidden)
            if self.embed_norm:
                self._norm(shapes, "embed_norm")
            return shapes
        if self.final_norm:
            self._norm(shapes, "norm")
        if self.output is not None:
            width = self.hidden
            for name, rows in (("dense", self.output.dense), ("labels", self.output.labels)):
                if rows:
                    shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (rows, width), (rows,)
                    width = rows
            for index, step in enumerate(self.output.steps):
                shapes[f"step_{index}.weight"] = (step.width, width)
                if step.bias:
                    shapes[f"step_{index}.bias"] = (step.width,)
                width = step.width
            return shapes
        if self.projected:
            shapes["project_out.weight"] = (self.embed_dim, self.hidden)
        shapes["lm_head.weight"] = (self.vocab, self.embed_dim)
        return shapes

    def _norm(self, shapes: dict[str, tuple[int, ...]], name: str) -> None:
        shapes[f"{name}.weight"] = (self.hidden,)
        if self.layers[-1].norm == "layernorm":
            shapes[f"{name}.bias"] = (self.hidden,)

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
            if plain.get("output") is not None:
                output = dict(plain["output"])
                output["steps"] = tuple(StepSpec(**one) for one in output.get("steps", ()))
                plain["output"] = OutputSpec(**output)
            spec = ModelSpec(layers=layers, **plain)
            _check(spec)
        except (KeyError, TypeError, ValueError) as error:
            raise UnsupportedModelError(f"malformed model description: {error}") from error
        return spec


QUANTIZED_TENSORS = frozenset(
    f"{name}.weight"
    for name in (
        "q", "k", "v", "o", "gate", "up", "down",
        "shared_gate", "shared_up", "shared_down", "tokens", "project_in", "project_out", "lm_head",
    )
)  # fmt: skip
"""Canonical names stored in the block's format. All other tensors are stored as fp32.

Among these are the small matrices of an encoder's head, and its table of token types."""


def _layer_from_dict(values: dict[str, Any]) -> LayerSpec:
    rope, experts = values.pop("rope", None), values.pop("experts", None)
    if rope is not None:
        factors = {name: tuple(rope[name]) for name in _FACTORS if name in rope}
        rope = RopeSpec(**dict(rope) | factors)
    if experts is not None:
        experts = ExpertSpec(**experts)
    return LayerSpec(rope=rope, experts=experts, **values)


_CHOICES: dict[str, tuple[str, ...]] = {
    "norm": get_args(NormKind),
    "norm_position": get_args(NormPosition),
    "activation": get_args(Activation),
    "scaling": get_args(RopeScaling),
    "qk_norm": get_args(QkNorm),
    "scoring": get_args(ExpertScoring),
    "pooling": get_args(Pooling),
    "kind": get_args(OutputKind),
}
_NUMBERS = frozenset(
    (
        "norm_eps", "theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast",
        "beta_slow", "attention_factor",
    )
)  # fmt: skip
_OPTIONAL_NUMBERS = frozenset(("score_scale", "score_cap", "logit_cap", "limit"))
_FACTORS = ("short_factors", "long_factors")
_COUNTS = frozenset(
    (
        "learned_positions", "position_offset", "original_context", "rotated", "shared_ffn",
        "first", "held", "dense", "labels", "token_types", "position_buckets", "columns",
    )
)  # fmt: skip
_SIZES = frozenset(
    (
        "vocab", "hidden", "embed_dim", "max_context", "heads", "kv_heads", "head_dim", "ffn",
        "count", "active", "width",
    )
)  # fmt: skip
MAX_SIZE = 1 << 24
"""The bound of each width, head count and token id. No real model has more."""
MAX_LAYERS = 1 << 12
MAX_STEPS = 8


def _check(spec: ModelSpec) -> None:
    """Refuse types and sizes that no real model has, before they are used for allocation."""
    if not 0 < len(spec.layers) <= MAX_LAYERS:
        raise UnsupportedModelError(f"malformed model description: {len(spec.layers)} layers")
    _check_fields(spec)
    if spec.output is not None:
        _check_output(spec, spec.output)
    for layer in set(spec.layers):
        _check_fields(layer)
        if (
            layer.hidden != spec.hidden
            or layer.heads % layer.kv_heads
            or (layer.bidirectional and spec.output is None)
            or (layer.position_buckets and not layer.bidirectional)
            or layer.position_buckets % 4
        ):
            raise UnsupportedModelError("malformed model description: inconsistent layer sizes")
        if layer.experts is not None:
            _check_experts(layer, layer.experts)
        if layer.rope is not None:
            _check_rope(layer.rope, layer.head_dim)


def _check_output(spec: ModelSpec, output: OutputSpec) -> None:
    _check_fields(output)
    for step in output.steps:
        _check_fields(step)
    if (
        output.activation not in get_args(DenseActivation)
        or (output.activation == "none") != (output.dense == 0)
        or output.per_token != (output.kind in ("tokens", "span"))
        or (output.kind == "vector") != (output.labels == 0)
        or (output.kind == "span" and output.labels != 2)
        or (output.steps and (output.kind != "vector" or output.dense))
        or len(output.steps) > MAX_STEPS
        or (output.columns and output.kind != "vector")
        or output.columns > replace(spec, output=replace(output, columns=0)).output_width
        or spec.projected
        or any(layer.experts or layer.sinks or layer.score_cap for layer in spec.layers)
    ):
        raise UnsupportedModelError("malformed model description: inconsistent output")


def _check_experts(layer: LayerSpec, experts: ExpertSpec) -> None:
    _check_fields(experts)
    if (
        experts.active > experts.count
        or experts.first + experts.stored > experts.count
        or not layer.gated
        or layer.norm_position != "pre"
    ):
        raise UnsupportedModelError("malformed model description: inconsistent experts")


def _check_rope(rope: RopeSpec, head_dim: int) -> None:
    _check_fields(rope)
    columns = rope.columns(head_dim)
    smallest = 4 if rope.scaling == "dynamic" else 2
    if columns % 2 or not smallest <= columns <= head_dim:
        raise UnsupportedModelError("malformed model description: head_dim cannot be rotated")
    if rope.scaling not in ("none", "linear") and not rope.original_context:
        raise UnsupportedModelError("malformed model description: original_context is missing")
    if rope.scaling == "yarn" and rope.theta <= 1:
        raise UnsupportedModelError(f"malformed model description: theta = {rope.theta}")
    if rope.scaling == "longrope" and any(
        len(factors) != columns // 2 for factors in (rope.short_factors, rope.long_factors)
    ):
        raise UnsupportedModelError("malformed model description: a factor for each pair is needed")


_Part: TypeAlias = ModelSpec | LayerSpec | RopeSpec | ExpertSpec | OutputSpec | StepSpec


def _check_fields(part: _Part) -> None:
    for field in fields(part):
        value = getattr(part, field.name)
        if isinstance(part, (OutputSpec, StepSpec)) and field.name == "activation":
            # A head has others than an MLP.
            if value in get_args(DenseActivation):
                continue
            raise UnsupportedModelError("malformed model description: an unknown activation")
        if not _is_valid(field.name, value):
            shown = repr(value)[:80]
            raise UnsupportedModelError(f"malformed model description: {field.name} = {shown}")


def _is_valid(name: str, value: Any) -> bool:
    if name in ("layers", "rope", "experts", "output", "steps"):
        return True
    if name in _CHOICES:
        return value in _CHOICES[name]
    if name in _NUMBERS:
        return _is_positive(value)
    if name in _OPTIONAL_NUMBERS:
        return value is None or _is_positive(value)
    if name in _FACTORS:
        return len(value) < MAX_SIZE and all(_is_positive(factor) for factor in value)
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


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_SIZE
