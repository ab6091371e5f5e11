"""gpt-oss: experts with biases and a clipped SwiGLU, attention sinks, alternating windows."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from model.errors import CheckpointError
from model.experts import CLIPPED_ALPHA
from model.families.config import Config
from model.families.decoder import rotary_decoder
from model.families.experts import ExpertNames, checked, expert_count, with_experts
from model.families.sources import Piece, Source
from model.spec import ExpertSpec, LayerSpec, ModelSpec

Sources = dict[str, Source]

_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""The rotary scaling of a config without any, as of the published models."""

_WINDOWS = ("full_attention", "sliding_attention")


@dataclass(frozen=True, slots=True)
class GptOssNames(ExpertNames):
    """All experts of a layer are in one tensor, whose rows alternate between gate and up.

    Plain numbers are stored [experts, in, out], and codes (``_blocks``) [experts, out, in].
    """

    def sources(self, prefix: str, layer: LayerSpec, available: Collection[str]) -> Sources:
        experts = layer.experts
        if experts is None:
            return {}
        home, ((gate_up, down),) = f"{prefix}{self.homes[0]}.", self.fused
        router = f"{home}{self.routers[0]}"
        sources: Sources = {
            "router.weight": (Piece(f"{router}.weight"),),
            "router.bias": (Piece(f"{router}.bias"),),
        }
        plain = f"{home}{gate_up}_blocks" not in available
        ending = "" if plain else "_blocks"
        numbers, all_rows = range(experts.count), 2 * layer.ffn
        for canonical, name, rows in (
            ("gate", gate_up, (0, all_rows, 2)),
            ("up", gate_up, (1, all_rows, 2)),
            ("down", down, None),
        ):
            sources[f"{canonical}.weight"] = tuple(
                Piece(f"{home}{name}{ending}", index=i, transposed=plain, rows=rows)
                for i in numbers
            )
            sources[f"{canonical}.bias"] = tuple(
                Piece(f"{home}{name}_bias", index=i, rows=rows) for i in numbers
            )
        return sources


GPT_OSS = GptOssNames(("mlp",), ("router",), ("", "", ""))


def gpt_oss(config: Config) -> ModelSpec:
    config = config.with_defaults({"rms_norm_eps": 1e-5})
    if not (config.nested("rope_scaling") or config.nested("rope_parameters")):
        config = Config(config.path, {**config.values, "rope_scaling": _ROPE})
    bias = config.flag("attention_bias", True)
    if config.number("swiglu_alpha", CLIPPED_ALPHA) != CLIPPED_ALPHA:
        raise config.unsupported(
            "swiglu_alpha", config.values["swiglu_alpha"], f"only {CLIPPED_ALPHA} is"
        )
    spec = rotary_decoder(
        config,
        qkv_bias=bias,
        out_bias=bias,
        windows=_windows(config),
        head_dim=64,
        theta=150000.0,
    )
    experts = ExpertSpec(
        expert_count(config, 128),
        config.size("num_experts_per_tok", 4),
        "topk_softmax",
        bias=True,
        limit=config.number("swiglu_limit", 7.0),
    )
    layers = tuple(replace(layer, sinks=True) for layer in spec.layers)
    return checked(config, with_experts(replace(spec, layers=layers), experts))


def gpt_oss_sources(_config: Config, spec: ModelSpec, block: int, sources: Sources) -> Sources:
    """Add the sinks, whose name has no ending."""
    if spec.block_kind(block) != "layer":
        return sources
    name = sources["q.weight"][0].name.replace("q_proj.weight", "sinks")
    return sources | {"sinks": (Piece(name),)}


def _windows(config: Config) -> list[int | None]:
    count, kinds = config.layer_count(), config.strings("layer_types")
    kinds = kinds or [_WINDOWS[1 - layer % 2] for layer in range(count)]
    if len(kinds) != count or set(kinds) - set(_WINDOWS):
        raise CheckpointError(f"{config.path}: layer_types must name {count} known kinds of layers")
    window = config.size("sliding_window", 128)
    return [window if kind == "sliding_attention" else None for kind in kinds]
