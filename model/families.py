"""The meaning of each architecture's config.json, and the names of its checkpoints' tensors.

A new architecture is one function that maps its config to features, one table of names and one line
in ``_FAMILIES``. An option that would change the numbers is honoured or refused. Options that only
concern training (dropout, initializer ranges, caching) are ignored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from model.bounded import read_json
from model.errors import CheckpointError, UnsupportedModelError
from model.given import CONFIG, require_model
from model.spec import MAX_LAYERS, MAX_SIZE, Activation, LayerSpec, ModelSpec, RopeScaling, RopeSpec

_MAX_CONFIG_BYTES = 16 << 20

_ACTIVATIONS: Mapping[str, Activation] = {
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_SCALINGS: Mapping[str, RopeScaling] = {
    "default": "none",
    "linear": "linear",
    "dynamic": "dynamic",
    "llama3": "llama3",
}


@dataclass(frozen=True, slots=True)
class Config:
    """config.json with typed access. Messages name the file and the field."""

    path: Path
    values: Mapping[str, Any]

    @property
    def model_type(self) -> str:
        return self.text("model_type")

    def has(self, key: str) -> bool:
        """Whether the key is present and not null."""
        return self.values.get(key) is not None

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "a string", value)
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """Return a positive count. Raises CheckpointError if it is not an int, or absurd."""
        value = self._get(key, default)
        if type(value) is not int or not 0 < value < MAX_SIZE:
            raise self._wrong(key, f"an integer in [1, {MAX_SIZE})", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a positive finite number."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, "a number", value)
        if not 0 < value < math.inf:
            raise self._wrong(key, "a positive number", value)
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if type(value) is not bool:
            raise self._wrong(key, "true or false", value)
        return value

    def tokens(self, key: str) -> tuple[int, ...]:
        """Return token ids from null, one id, or a list of them."""
        value = self.values.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(item) is int and 0 <= item < MAX_SIZE for item in ids):
            raise self._wrong(key, "a token id or a list of them", value)
        return tuple(ids)

    def activation(self, key: str, default: str) -> Activation:
        name = self.text(key, default)
        if name not in _ACTIVATIONS:
            raise self.unsupported(key, name, f"known: {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[name]

    def unsupported(self, key: str, value: Any, advice: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self.path}: {key} = {json.dumps(value)[:80]} is not implemented; {advice}"
        )

    def nested(self, key: str) -> Config | None:
        """Return an object inside the config, or None if it is absent or empty."""
        value = self.values.get(key)
        if not value:
            return None
        if not isinstance(value, dict):
            raise self._wrong(key, "an object", value)
        return Config(self.path, value)

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is None:
            raise CheckpointError(f"{self.path}: {key} is missing; is this a model's config.json?")
        return default

    def _wrong(self, key: str, expected: str, value: Any) -> CheckpointError:
        shown = repr(value)[:80]
        return CheckpointError(f"{self.path}: {key} must be {expected}, not {shown}")


@dataclass(frozen=True, slots=True)
class _Family:
    """One architecture: the reader of its config, and its tensor names relative to a prefix."""

    describe: Callable[[Config], ModelSpec]
    prefixes: tuple[str, ...]
    names: Mapping[str, str]
    """Maps a canonical module to the checkpoint's; ``{layer}`` stands for the layer's index."""


def read_config(directory: Path) -> Config:
    """Read config.json of a model directory. Raises CheckpointError that names the fault."""
    require_model(directory)
    return read_config_file(directory / CONFIG)


def load_spec(directory: Path) -> ModelSpec:
    """Return the features of the model in a directory, by the architecture in its config.json.

    eos tokens come from generation_config.json if it has any. ``max_context`` is
    max_position_embeddings. For `linear` and `dynamic` rotary scaling it is multiplied by the
    factor, because those configs state the trained context and the others the usable one.

    Raises UnsupportedModelError for an architecture or option that is not implemented,
    CheckpointError for a file that is missing or malformed.
    """
    return describe(read_config(directory), directory)


def describe(config: Config, directory: Path) -> ModelSpec:
    """Do the same as ``load_spec`` for a config that is already read."""
    family = _family(config)
    _refuse_foreign_options(config)
    spec = family.describe(config)
    generation = directory / "generation_config.json"
    eos = read_config_file(generation).tokens("eos_token_id") if generation.exists() else ()
    plain = spec.to_dict()
    plain["eos_tokens"] = eos or spec.eos_tokens
    return ModelSpec.from_dict(plain)


def tensor_sources(
    config: Config, spec: ModelSpec, block: int, available: Collection[str]
) -> dict[str, str]:
    """Return the checkpoint tensor from which each canonical tensor of a block is read.

    ``available`` decides between the prefixes that checkpoints of a family use. A tied head reads
    the token table.
    """
    family = _family(config)
    tokens = family.names["tokens"]
    prefix = next(
        (item for item in family.prefixes if f"{item}{tokens}.weight" in available),
        family.prefixes[0],
    )
    sources: dict[str, str] = {}
    for canonical in spec.block_tensors(block):
        module, _, kind = canonical.rpartition(".")
        if module == "lm_head":
            sources[canonical] = f"{prefix}{tokens}.weight" if spec.tied_head else "lm_head.weight"
        else:
            name = family.names[module].format(layer=block - 1)
            sources[canonical] = f"{prefix}{name}.{kind}"
    return sources


def _family(config: Config) -> _Family:
    model_type = config.model_type
    family = _FAMILIES.get(model_type)
    if family is None:
        raise config.unsupported("model_type", model_type, f"known: {', '.join(sorted(_FAMILIES))}")
    return family


def read_config_file(path: Path) -> Config:
    """As ``read_config``, of a file by any name."""
    try:
        values = read_json(path, _MAX_CONFIG_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; fetch it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: not a JSON object; fetch it again")
    return Config(path, values)


def _refuse_foreign_options(config: Config) -> None:
    """Refuse options of any architecture that would change the numbers."""
    for key in ("quantization_config", "compression_config"):
        if config.has(key):
            raise config.unsupported(
                key, "...", "give the unquantized checkpoint, quantization happens here"
            )
    for key in ("is_encoder_decoder", "add_cross_attention"):
        if config.flag(key, False):
            raise config.unsupported(key, True, "only decoders are")
    if not config.flag("is_causal", True):
        raise config.unsupported("is_causal", False, "only causal models are")
    if config.values.get("pruned_heads"):
        raise config.unsupported("pruned_heads", "...", "give a checkpoint without pruned heads")
    for name in _strings(config, "architectures"):
        if not name.endswith(("ForCausalLM", "LMHeadModel", "Model")):
            raise config.unsupported("architectures", name, "only causal language models are")


def _strings(config: Config, key: str) -> list[str]:
    value = config.values.get(key) or []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise CheckpointError(f"{config.path}: {key} must be a list of strings")
    return value


def _layer_count(config: Config) -> int:
    count = config.size("num_hidden_layers")
    if count > MAX_LAYERS:
        raise CheckpointError(f"{config.path}: num_hidden_layers = {count} is absurd")
    return count


def _first(tokens: tuple[int, ...]) -> int | None:
    return tokens[0] if tokens else None


def _opt(config: Config) -> ModelSpec:
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    if hidden % heads:
        raise CheckpointError(
            f"{config.path}: hidden_size {hidden} is no multiple of num_attention_heads {heads}"
        )
    if not config.flag("layer_norm_elementwise_affine", True):
        raise config.unsupported(
            "layer_norm_elementwise_affine", False, "only layer norms with weights are"
        )
    bias = config.flag("enable_bias", True)
    pre_norm = config.flag("do_layer_norm_before", True)
    layer = LayerSpec(
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn=config.size("ffn_dim"),
        norm="layernorm",
        norm_eps=1e-5,
        norm_position="pre" if pre_norm else "post",
        activation=config.activation("activation_function", "relu"),
        gated=False,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
    )
    context = config.size("max_position_embeddings")
    return ModelSpec(
        vocab=config.size("vocab_size"),
        hidden=hidden,
        embed_dim=config.size("word_embed_proj_dim", hidden),
        max_context=context,
        layers=(layer,) * _layer_count(config),
        learned_positions=context + 2,
        position_offset=2,
        final_norm=pre_norm and not config.flag("_remove_final_layer_norm", False),
        tied_head=config.flag("tie_word_embeddings", True),
        bos_token=_first(config.tokens("bos_token_id")),
        eos_tokens=config.tokens("eos_token_id"),
    )


def _llama(config: Config) -> ModelSpec:
    bias = config.flag("attention_bias", False)
    return _rotary_decoder(
        config, qkv_bias=bias, out_bias=bias, mlp_bias=config.flag("mlp_bias", False)
    )


def _mistral(config: Config) -> ModelSpec:
    # Absent means 4096 to the architecture's own config class. Newer checkpoints say null.
    window = config.values.get("sliding_window", 4096)
    windows = [None if window is None else config.size("sliding_window", 4096)]
    kinds = set(_strings(config, "layer_types"))
    if kinds and kinds != {"full_attention" if window is None else "sliding_attention"}:
        raise config.unsupported("layer_types", sorted(kinds), "mixed windows need another type")
    return _rotary_decoder(config, windows=windows * _layer_count(config))


def _qwen2(config: Config) -> ModelSpec:
    return _rotary_decoder(config, qkv_bias=True, windows=_qwen_windows(config))


def _qwen3(config: Config) -> ModelSpec:
    bias = config.flag("attention_bias", False)
    return _rotary_decoder(
        config,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        windows=_qwen_windows(config),
        head_dim=128,
    )


def _qwen_windows(config: Config) -> list[int | None]:
    """Return each layer's window by layer_types, or else for layers from max_window_layers on."""
    count = _layer_count(config)
    window = None
    if (
        config.flag("use_sliding_window", False)
        and config.values.get("sliding_window", 0) is not None
    ):
        window = config.size("sliding_window", 4096)
    kinds = _strings(config, "layer_types")
    if not kinds:
        # Zero full layers are valid here, so this is not a size.
        first = config.values.get("max_window_layers", 28)
        if type(first) is not int or first < 0:
            raise CheckpointError(f"{config.path}: max_window_layers must be a number of layers")
        return [window if layer >= first else None for layer in range(count)]
    if len(kinds) != count:
        raise CheckpointError(f"{config.path}: layer_types has {len(kinds)} of {count} layers")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise config.unsupported(
                "layer_types", kind, "known: full_attention, sliding_attention"
            )
        if kind == "sliding_attention" and window is None:
            raise CheckpointError(
                f"{config.path}: layer_types has sliding layers, but sliding_window is not in use"
            )
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _rotary_decoder(
    config: Config,
    *,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    windows: list[int | None] | None = None,
    head_dim: int | None = None,
) -> ModelSpec:
    """Describe pre-norm RMSNorm, rotary and gated MLP, which Llama and its relatives share."""
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    kv_heads = config.size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise CheckpointError(
            f"{config.path}: num_attention_heads {heads} is no multiple of "
            f"num_key_value_heads {kv_heads}"
        )
    head_dim = config.size("head_dim", head_dim or max(hidden // heads, 1))
    rope, context = _rope(config, head_dim)
    layers = tuple(
        LayerSpec(
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            ffn=config.size("intermediate_size"),
            norm="rmsnorm",
            norm_eps=config.number("rms_norm_eps", 1e-6),
            norm_position="pre",
            activation=config.activation("hidden_act", "silu"),
            gated=True,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            mlp_bias=mlp_bias,
            qk_norm=qk_norm,
            rope=rope,
            sliding_window=window,
        )
        for window in windows or [None] * _layer_count(config)
    )
    return ModelSpec(
        vocab=config.size("vocab_size"),
        hidden=hidden,
        embed_dim=hidden,
        max_context=context,
        layers=layers,
        learned_positions=0,
        position_offset=0,
        final_norm=True,
        tied_head=config.flag("tie_word_embeddings", False),
        bos_token=_first(config.tokens("bos_token_id")),
        eos_tokens=config.tokens("eos_token_id"),
    )


def _rope(config: Config, head_dim: int) -> tuple[RopeSpec, int]:
    """Return rotary parameters and usable context, from the old fields or ``rope_parameters``."""
    context = config.size("max_position_embeddings")
    scaling = (
        config.nested("rope_scaling") or config.nested("rope_parameters") or Config(config.path, {})
    )
    if any(isinstance(value, dict) for value in scaling.values.values()):
        raise config.unsupported("rope_parameters", "...", "one set for all layers is")
    for source in (config, scaling):
        if source.number("partial_rotary_factor", 1.0) != 1.0:
            raise config.unsupported(
                "partial_rotary_factor",
                source.values["partial_rotary_factor"],
                "only rotation of the whole head is",
            )
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    if kind not in _SCALINGS:
        raise config.unsupported("rope_type", kind, f"known: {', '.join(_SCALINGS)}")
    if head_dim % 2 or (kind == "dynamic" and head_dim < 4):
        raise CheckpointError(f"{config.path}: head_dim {head_dim} cannot be rotated")
    theta = scaling.number("rope_theta", config.number("rope_theta", 10000.0))
    if kind == "default":
        return RopeSpec(theta), context
    factor = scaling.number("factor")
    if factor < 1:
        raise CheckpointError(f"{config.path}: rope factor must be at least 1, not {factor}")
    if kind != "llama3":
        usable = min(int(context * factor), MAX_SIZE - 1)
        return RopeSpec(theta, _SCALINGS[kind], factor, context), usable
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    if low >= high:
        raise CheckpointError(f"{config.path}: low_freq_factor must be below high_freq_factor")
    trained = scaling.size("original_max_position_embeddings")
    return RopeSpec(theta, cast(RopeScaling, kind), factor, trained, low, high), context


_LAYER = "layers.{layer}."

_LLAMA_NAMES = {
    "tokens": "embed_tokens",
    "attn_norm": _LAYER + "input_layernorm",
    "q": _LAYER + "self_attn.q_proj",
    "k": _LAYER + "self_attn.k_proj",
    "v": _LAYER + "self_attn.v_proj",
    "q_norm": _LAYER + "self_attn.q_norm",
    "k_norm": _LAYER + "self_attn.k_norm",
    "o": _LAYER + "self_attn.o_proj",
    "mlp_norm": _LAYER + "post_attention_layernorm",
    "gate": _LAYER + "mlp.gate_proj",
    "up": _LAYER + "mlp.up_proj",
    "down": _LAYER + "mlp.down_proj",
    "norm": "norm",
}

_OPT_NAMES = {
    "tokens": "embed_tokens",
    "positions": "embed_positions",
    "project_in": "project_in",
    "attn_norm": _LAYER + "self_attn_layer_norm",
    "q": _LAYER + "self_attn.q_proj",
    "k": _LAYER + "self_attn.k_proj",
    "v": _LAYER + "self_attn.v_proj",
    "o": _LAYER + "self_attn.out_proj",
    "mlp_norm": _LAYER + "final_layer_norm",
    "up": _LAYER + "fc1",
    "down": _LAYER + "fc2",
    "norm": "final_layer_norm",
    "project_out": "project_out",
}

_FAMILIES: Mapping[str, _Family] = {
    "llama": _Family(_llama, ("model.", ""), _LLAMA_NAMES),
    "mistral": _Family(_mistral, ("model.", ""), _LLAMA_NAMES),
    "opt": _Family(_opt, ("model.decoder.", "decoder.", ""), _OPT_NAMES),
    "qwen2": _Family(_qwen2, ("model.", ""), _LLAMA_NAMES),
    "qwen3": _Family(_qwen3, ("model.", ""), _LLAMA_NAMES),
}
