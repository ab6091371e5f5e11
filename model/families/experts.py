"""Decoders with a mixture of experts: Qwen2-MoE, Qwen3-MoE, Mixtral, Granite-MoE.

Checkpoints hold experts one by one, or all experts of a layer in one tensor. Both are read.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from model.errors import CheckpointError
from model.families.config import Config
from model.families.decoder import qwen_windows, rotary_decoder, with_layers
from model.families.sources import Piece, Source
from model.spec import ExpertSpec, LayerSpec, ModelSpec

Sources = dict[str, Source]
Fused = tuple[str, str]
"""Names of the tensors with gate and up, and with down, of all experts."""


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """Names of a layer's experts in a checkpoint, relative to the layer.

    homes: modules that hold router and experts, the usual one first.
    routers: modules of the router, in a home.
    each: gate, up and down of one expert, in ``experts.<number>`` of a home.
    fused: tensors [experts, 2 * ffn, hidden] and [experts, hidden, ffn], in a home.
    """

    homes: tuple[str, ...]
    routers: tuple[str, ...]
    each: tuple[str, str, str]
    fused: tuple[Fused, ...] = (("experts.gate_up_proj", "experts.down_proj"),)

    def sources(self, prefix: str, layer: LayerSpec, available: Collection[str]) -> Sources:
        """Return where the tensors of a layer's experts are read; none of a layer without."""
        if layer.experts is None:
            return {}
        places = [(home, router) for home in self.homes for router in self.routers]
        home, router = next(
            (place for place in places if f"{prefix}{'.'.join(place)}.weight" in available),
            places[0],
        )
        home = f"{prefix}{home}."
        sources: Sources = {"router.weight": (Piece(f"{home}{router}.weight"),)}
        if layer.experts.shared_ffn:
            for name in ("gate", "up", "down"):
                stored = f"{home}shared_expert.{name}_proj.weight"
                sources[f"shared_{name}.weight"] = (Piece(stored),)
            if layer.experts.shared_gate:
                sources["shared_mix.weight"] = (Piece(f"{home}shared_expert_gate.weight"),)
        fused = next((pair for pair in self.fused if home + pair[0] in available), None)
        if fused is not None:
            return sources | self._fused(home, fused, layer, layer.experts)
        for name, module in zip(("gate", "up", "down"), self.each, strict=True):
            sources[f"{name}.weight"] = tuple(
                Piece(f"{home}experts.{expert}.{module}.weight")
                for expert in range(layer.experts.count)
            )
        return sources

    def _fused(self, home: str, pair: Fused, layer: LayerSpec, experts: ExpertSpec) -> Sources:
        gate_up, down = (home + name for name in pair)
        ffn, numbers = layer.ffn, range(experts.count)
        return {
            "gate.weight": tuple(Piece(gate_up, index=i, rows=(0, ffn, 1)) for i in numbers),
            "up.weight": tuple(Piece(gate_up, index=i, rows=(ffn, 2 * ffn, 1)) for i in numbers),
            "down.weight": tuple(Piece(down, index=i) for i in numbers),
        }


QWEN_MOE = ExpertNames(("mlp",), ("gate",), ("gate_proj", "up_proj", "down_proj"))
MIXTRAL = ExpertNames(("block_sparse_moe", "mlp"), ("gate",), ("w1", "w3", "w2"))
GRANITEMOE = ExpertNames(
    ("block_sparse_moe",),
    ("router.layer", "router"),
    ("gate_proj", "up_proj", "down_proj"),
    (
        ("input_linear.weight", "output_linear.weight"),
        ("experts.gate_up_proj", "experts.down_proj"),
    ),
)


def qwen3_moe(config: Config) -> ModelSpec:
    bias = config.flag("attention_bias", False)
    window = None
    if config.flag("use_sliding_window", False) and config.has("sliding_window"):
        window = config.size("sliding_window")
    spec = rotary_decoder(
        config,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="head",
        windows=[window] * config.layer_count(),
    )
    return _with_experts(config, spec, _qwen_experts(config, 128))


def qwen2_moe(config: Config) -> ModelSpec:
    spec = rotary_decoder(
        config, qkv_bias=config.flag("qkv_bias", True), windows=_qwen2_moe_windows(config)
    )
    experts = replace(
        _qwen_experts(config, 60),
        shared_ffn=config.size("shared_expert_intermediate_size", 5632),
        shared_gate=True,
    )
    return _with_experts(config, spec, experts)


def mixtral(config: Config) -> ModelSpec:
    config = config.with_defaults({"rms_norm_eps": 1e-5})
    window = config.size("sliding_window") if config.has("sliding_window") else None
    spec = rotary_decoder(config, windows=[window] * config.layer_count(), theta=1e6)
    experts = ExpertSpec(expert_count(config, 8), config.size("num_experts_per_tok", 2))
    return checked(config, with_experts(spec, experts))


def granitemoe(config: Config) -> ModelSpec:
    bias = config.flag("attention_bias", False)
    spec = rotary_decoder(config, qkv_bias=bias, out_bias=bias)
    spec = with_layers(spec, score_scale=config.number("attention_multiplier", 1.0))
    experts = ExpertSpec(
        expert_count(config, 8), config.size("num_experts_per_tok", 2), "topk_softmax"
    )
    return checked(config, with_experts(spec, experts))


def expert_count(config: Config, default: int) -> int:
    """Return how many experts a layer has; versions of configs differ in its name."""
    return config.size("num_experts", config.size("num_local_experts", default))


def with_experts(spec: ModelSpec, experts: ExpertSpec) -> ModelSpec:
    """Return a model whose layers all have such experts."""
    return replace(spec, layers=tuple(replace(one, experts=experts) for one in spec.layers))


def checked(config: Config, spec: ModelSpec) -> ModelSpec:
    """Return the model. Raises CheckpointError if a row takes more experts than there are."""
    for layer in spec.layers:
        experts = layer.experts
        if experts is not None and experts.active > experts.count:
            raise CheckpointError(
                f"{config.path}: num_experts_per_tok {experts.active} exceeds the "
                f"{experts.count} experts"
            )
    return spec


def _qwen_experts(config: Config, count: int) -> ExpertSpec:
    return ExpertSpec(
        expert_count(config, count),
        config.size("num_experts_per_tok", 8 if count == 128 else 4),
        normalized=config.flag("norm_topk_prob", False),
    )


def _with_experts(config: Config, spec: ModelSpec, experts: ExpertSpec) -> ModelSpec:
    """Give experts to the layers that have them by decoder_sparse_step and mlp_only_layers."""
    step, dense = config.size("decoder_sparse_step", 1), config.values.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise CheckpointError(f"{config.path}: mlp_only_layers must be a list of numbers")
    width = config.size("moe_intermediate_size")
    layers = tuple(
        layer
        if number in dense or (number + 1) % step
        else replace(layer, experts=experts, ffn=width)
        for number, layer in enumerate(spec.layers)
    )
    return checked(config, replace(spec, layers=layers))


def _qwen2_moe_windows(config: Config) -> list[int | None]:
    """Return each layer's window. Without layer_types the first, third, ... have one."""
    if config.strings("layer_types") or not config.flag("use_sliding_window", False):
        return qwen_windows(config)
    if not config.has("sliding_window"):
        return [None] * config.layer_count()
    window, last = config.size("sliding_window"), config.values.get("max_window_layers", 28)
    return [
        window if (layer + 1) % 2 and layer < last else None
        for layer in range(config.layer_count())
    ]
