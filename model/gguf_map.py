"""Reads a GGUF file as a checkpoint of transformers: its config, and its tensors by their names.

llama.cpp's conversion of a checkpoint is undone here: names, rows of q and k whose rotary pairs lie
side by side, norms with one added, transposed matrices. The families (``model.families``) then read
the config as if config.json had it. A new architecture is one entry in ``_ARCHITECTURES``.
Source: the conversion scripts of llama.cpp.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.errors import CheckpointError, UnsupportedModelError
from model.gguf import (
    Alternating,
    GgufEntry,
    GgufFile,
    GgufTensor,
    Strings,
    read_parts,
    short_number,
)
from model.gguf_types import READ_TYPES
from model.spec import MAX_LAYERS, MAX_SIZE
from model.weights import StoredTensor

Values = dict[str, Any]
"""The values that config.json would hold."""

_LAYER = re.compile(r"blk\.(\d{1,6})\.(.+)")
_UNREAD = re.compile(r"rope_freqs\.weight|rope_factors_(long|short)\.weight|.*\.attn_rot_embd")
"""Tensors that become a part of the config, or that it makes redundant."""

_ENDS = frozenset(
    (
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>",
        "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|return|>", "<|call|>",
        "[|endofturn|]", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<end_of_utterance>",
    )
)  # fmt: skip
"""Control tokens that end an answer, whether the metadata names them or not. As in llama.cpp."""
_CONTROL = 3


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A model in GGUF files: what config.json would say, and the tensors of a checkpoint.

    fingerprint: SHA-256 over each file's name, size, modification time and header.
    """

    values: Values
    tensors: Mapping[str, StoredTensor]
    fingerprint: str


def read_model(path: Path) -> GgufModel:
    """Read the headers of a model's file, and of the others if it is split.

    Raises CheckpointError for a damaged file, UnsupportedModelError that names the architecture.
    """
    files = read_parts(path)
    model = _Model(files)
    architecture = _architecture(model)
    values = architecture.config(model)
    tensors = {
        name: tensor
        for key in model.places
        if not _UNREAD.fullmatch(key)
        for name, tensor in architecture.tensors(model, values, key).items()
    }
    for name, tensor in tensors.items():
        if not tensor.readable:
            raise UnsupportedModelError(
                f"{tensor.path}: tensor {name!r} is stored as {tensor.dtype}, which is not read; "
                f"get another quantization, known: {', '.join(READ_TYPES)}"
            )
    return GgufModel(values, tensors, _fingerprint(files))


def read_values(path: Path) -> Values:
    """Return what config.json would say. Raises as ``read_model``."""
    model = _Model(read_parts(path))
    return _architecture(model).config(model)


class _Model:
    """The metadata and the tensors of all files of a model, with typed access."""

    def __init__(self, files: tuple[GgufFile, ...]) -> None:
        self.path = files[0].path
        self.metadata = files[0].metadata
        self.places: dict[str, GgufFile] = {}
        for file in files:
            for name in file.entries:
                if name in self.places:
                    raise CheckpointError(
                        f"{file.path}: tensor {name!r} is also in {self.places[name].path.name}"
                    )
                self.places[name] = file
        self.name = self.text("general.architecture", "")

    def entry(self, name: str) -> GgufEntry:
        """Return a tensor's place. Raises CheckpointError if there is none."""
        if name not in self.places:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is missing; is the download complete?"
            )
        return self.places[name].entries[name]

    def numbers(self, name: str) -> list[float]:
        """Return the values of a small tensor."""
        entry = self.entry(name)
        if len(entry.shape) != 1 or entry.shape[0] > MAX_SIZE:
            raise CheckpointError(f"{self.path}: tensor {name!r} has the shape {entry.shape}")
        values = GgufTensor(self.places[name], name, entry.shape).float32()
        return [short_number(value) for value in values]

    def text(self, key: str, default: str) -> str:
        value = self.metadata.get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "a text", value)
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """Return a count that all layers share."""
        value = self._value(key, default)
        if isinstance(value, np.ndarray):
            if len(set(value.tolist())) != 1:
                raise UnsupportedModelError(
                    f"{self.path}: {key} differs between layers, which is not implemented"
                )
            value = value[0].item()
        if type(value) is not int or not 0 <= value < MAX_SIZE:
            raise self._wrong(key, f"an integer in [0, {MAX_SIZE})", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, "a number", value)
        return short_number(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.metadata.get(self._key(key), default)
        if type(value) is not bool:
            raise self._wrong(key, "true or false", value)
        return value

    def has(self, key: str) -> bool:
        return self._key(key) in self.metadata

    def token(self, name: str) -> int | None:
        """Return the id of a special token, or None."""
        value = self.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if value is None or value == 0xFFFFFFFF:
            return None
        if type(value) is not int or not 0 <= value < MAX_SIZE:
            raise self._wrong(f"tokenizer.ggml.{name}_token_id", "a token", value)
        return value

    def end_tokens(self) -> list[int]:
        """Return the tokens that end an answer, that of the metadata first."""
        named = [self.token(name) for name in ("eos", "eot", "eom")]
        tokens, kinds = (self.metadata.get(f"tokenizer.ggml.{key}") for key in _TOKEN_LISTS)
        known: list[int | None] = []
        if isinstance(tokens, Strings) and isinstance(kinds, np.ndarray):
            control = {index for index, kind in enumerate(kinds.tolist()) if kind == _CONTROL}
            known = [
                index
                for index, token in enumerate(tokens if control else ())
                if index in control and token in _ENDS
            ]
        return [token for token in dict.fromkeys(named + known) if token is not None]

    def windows(self, period: int) -> list[bool]:
        """Return which layers have a sliding window: by the metadata, or all but each n-th."""
        count = self.size("block_count")
        pattern = self.metadata.get(self._key("attention.sliding_window_pattern"), period)
        if isinstance(pattern, np.ndarray):
            if len(pattern) < count:
                raise self._wrong("attention.sliding_window_pattern", f"{count} flags", pattern)
            return [bool(value) for value in pattern[:count]]
        if type(pattern) is not int or pattern < 0:
            raise self._wrong("attention.sliding_window_pattern", "a number of layers", pattern)
        return [pattern > 0 and (layer + 1) % pattern != 0 for layer in range(count)]

    def _value(self, key: str, default: Any) -> Any:
        value = self.metadata.get(self._key(key), default)
        if value is None:
            raise CheckpointError(
                f"{self.path}: the metadata has no {self._key(key)}; get another conversion"
            )
        return value

    def _key(self, key: str) -> str:
        return f"{self.name}.{key}"

    def _wrong(self, key: str, expected: str, value: Any) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: {key} in the metadata must be {expected}, not {str(value)[:80]}"
        )


_TOKEN_LISTS = ("tokens", "token_type")


# ---- tensors -----------------------------------------------------------------------------------

_LLAMA_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Modules outside layers by their whole names, those of layers by the rest."""
_OUTPUT_NORM_NAMES = _LLAMA_NAMES | {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_SANDWICH_NAMES = _OUTPUT_NORM_NAMES | {"ffn_norm": "pre_feedforward_layernorm"}
_PHI3_NAMES = _LLAMA_NAMES | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_GLM4_NAMES = _LLAMA_NAMES | {
    "ffn_up": "mlp.gate_up_proj",
    "post_attention_norm": "post_self_attn_layernorm",
    "post_ffw_norm": "post_mlp_layernorm",
}
_STARCODER2_NAMES = _LLAMA_NAMES | {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}
_QWEN_MOE_NAMES = _LLAMA_NAMES | {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{expert}.gate_proj",
    "ffn_up_exps": "mlp.experts.{expert}.up_proj",
    "ffn_down_exps": "mlp.experts.{expert}.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_MIXTRAL_NAMES = _LLAMA_NAMES | {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{expert}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{expert}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{expert}.w2",
}
_GPT_OSS_NAMES = _LLAMA_NAMES | {
    "post_attention_norm": "post_attention_layernorm",
    "attn_sinks": "self_attn.sinks",
    "ffn_gate_inp": "mlp.router",
    "ffn_gate_exps": "mlp.experts.gate_up_proj",
    "ffn_up_exps": "mlp.experts.gate_up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}
_GRANITEMOE_NAMES = _LLAMA_NAMES | {
    "ffn_gate_inp": "block_sparse_moe.router.layer",
    "ffn_gate_exps": "block_sparse_moe.experts.{expert}.gate_proj",
    "ffn_up_exps": "block_sparse_moe.experts.{expert}.up_proj",
    "ffn_down_exps": "block_sparse_moe.experts.{expert}.down_proj",
}
_GPT2_NAMES = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}


@dataclass(frozen=True, slots=True)
class _Architecture:
    """How a checkpoint of one architecture was converted.

    config: returns what config.json would hold.
    paired: rows of q and k have their rotary pairs side by side.
    norm_added: what the conversion added to the weights of norms.
    transposed: modules of layers whose matrices transformers stores [in, out].
    """

    config: Callable[[_Model], Values]
    names: Mapping[str, str]
    layers: str = "model.layers."
    paired: bool = False
    norm_added: float = 0.0
    transposed: Collection[str] = ()

    def tensors(self, model: _Model, values: Values, key: str) -> dict[str, StoredTensor]:
        """Return a stored tensor under the names that transformers gives it, or its parts."""
        module, _, kind = key.rpartition(".")
        layer = _LAYER.fullmatch(module)
        module = module if layer is None else layer[2]
        if module not in self.names or kind not in ("weight", "bias"):
            raise UnsupportedModelError(
                f"{model.path}: tensor {key!r} is not known of the architecture {model.name!r}; "
                "get the model's safetensors"
            )
        prefix = "" if layer is None else f"{self.layers}{layer[1]}."
        name = f"{prefix}{self.names[module]}.{kind}"
        file, shape = model.places[key], model.entry(key).shape
        if _EXPERT in name:
            return _experts(file, key, name)
        if module == "ffn_gate_inp_shexp":
            shape = (1, *shape)[-2:]  # A matrix of one row, which the file has as a vector.
        is_norm = module.endswith("norm") and kind == "weight"
        turned = module in self.transposed and kind == "weight" and len(shape) == 2
        tensor = GgufTensor(
            file,
            key,
            shape[::-1] if turned else shape,
            pairs=values["head_dim"] if self.paired and module in ("attn_q", "attn_k") else 0,
            transposed=turned,
            add=-self.norm_added if is_norm else 0.0,
        )
        if tensor.pairs and shape[0] % tensor.pairs:
            raise CheckpointError(
                f"{model.path}: tensor {key!r} has {shape[0]} rows, no multiple of the "
                f"{tensor.pairs} rows of a head"
            )
        return {name: tensor}


@dataclass(frozen=True, slots=True)
class _GptOss(_Architecture):
    """Experts stay in one tensor. Gate and up are one, as packed codes are (``_blocks``)."""

    def tensors(self, model: _Model, values: Values, key: str) -> dict[str, StoredTensor]:
        if key.endswith(("ffn_up_exps.weight", "ffn_up_exps.bias")):
            return {}  # It is read with the gate.
        found = super(_GptOss, self).tensors(model, values, key)
        ((name, tensor),) = found.items()
        module, _, kind = name.rpartition(".")
        if module.endswith(".sinks"):
            return {module: tensor}
        if not module.endswith("_proj") or ".experts." not in module:
            return found
        if "ffn_gate_exps" in key:
            other = key.replace("ffn_gate_exps", "ffn_up_exps")
            shape = model.entry(key).shape
            if model.entry(other).shape != shape or len(shape) < 2:
                raise CheckpointError(f"{model.path}: tensor {other!r} does not fit {key!r}")
            gate = GgufTensor(model.places[key], key, shape)
            tensor = Alternating(gate, GgufTensor(model.places[other], other, shape))
        return {f"{module}_{'blocks' if kind == 'weight' else 'bias'}": tensor}


_EXPERT = "{expert}"


def _experts(file: GgufFile, key: str, name: str) -> dict[str, StoredTensor]:
    """Return the tensors of a layer's experts, which the file has in one of one more axis."""
    shape = file.entries[key].shape
    if len(shape) not in (2, 3) or shape[0] > _MAX_EXPERTS:
        raise CheckpointError(f"{file.path}: tensor {key!r} has the shape {list(shape)}")
    rows = math.prod(shape[1:-1])
    return {
        name.replace(_EXPERT, str(expert)): GgufTensor(
            file, key, shape[1:], part=(expert * rows, (expert + 1) * rows)
        )
        for expert in range(shape[0])
    }


_MAX_EXPERTS = 1 << 12


# ---- configs -----------------------------------------------------------------------------------


def _decoder(model: _Model, model_type: str) -> Values:
    """Return what the configs of decoders like Llama have in common."""
    heads, hidden = model.size("attention.head_count"), model.size("embedding_length")
    if not heads or not hidden:
        raise CheckpointError(f"{model.path}: the metadata has no heads, or no width")
    layers = model.size("block_count")
    if not 0 < layers <= MAX_LAYERS:
        raise CheckpointError(f"{model.path}: {layers} layers in the metadata are absurd")
    head_dim = model.size("attention.key_length", max(hidden // heads, 1))
    if model.size("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError(
            f"{model.path}: values of another width than keys are not implemented"
        )
    if not head_dim or head_dim % 2:
        raise CheckpointError(f"{model.path}: heads of {head_dim} columns cannot be rotated")
    ends, expert_width = model.end_tokens(), model.size("expert_feed_forward_length", 0)
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": model.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": model.size("feed_forward_length", expert_width or None),
        "max_position_embeddings": model.size("context_length"),
        "vocab_size": model.entry("token_embd.weight").shape[0],
        "tie_word_embeddings": "output.weight" not in model.places,
        "attention_bias": "blk.0.attn_q.bias" in model.places,
        "mlp_bias": "blk.0.ffn_up.bias" in model.places,
        "bos_token_id": model.token("bos"),
        "eos_token_id": ends or None,
    } | _rope(model, head_dim)


def _rms(model: _Model) -> Values:
    return {"rms_norm_eps": model.number("attention.layer_norm_rms_epsilon")}


def _rope(model: _Model, head_dim: int) -> Values:
    values: Values = {"rope_theta": model.number("rope.freq_base", 10000.0)}
    turned = model.size("rope.dimension_count", head_dim)
    if turned != head_dim:
        values["partial_rotary_factor"] = turned / head_dim
    scaling = _rope_scaling(model, turned, values["rope_theta"])
    if scaling is not None:
        values["rope_scaling"] = scaling
    return values


def _rope_scaling(model: _Model, columns: int, theta: float) -> Values | None:
    kind = model.metadata.get(f"{model.name}.rope.scaling.type", "none")
    trained = model.size("rope.scaling.original_context_length", model.size("context_length"))
    if "rope_factors_long.weight" in model.places:
        return {
            "rope_type": "longrope",
            "long_factor": model.numbers("rope_factors_long.weight"),
            "short_factor": model.numbers("rope_factors_short.weight"),
            "original_max_position_embeddings": trained,
        }
    if "rope_freqs.weight" in model.places:
        return _llama3_scaling(model, columns, theta, trained)
    if kind == "none":
        old = model.number("rope.scale_linear", 1.0)
        return None if old == 1 else {"rope_type": "linear", "factor": old}
    if kind == "linear":
        return {"rope_type": "linear", "factor": model.number("rope.scaling.factor")}
    if kind != "yarn":
        raise UnsupportedModelError(
            f"{model.path}: rotary scaling {str(kind)[:40]!r} is not implemented"
        )
    scaling: Values = {
        "rope_type": "yarn",
        "factor": model.number("rope.scaling.factor"),
        "original_max_position_embeddings": trained,
    }
    for name, keys in _YARN.items():
        for key in keys:
            if model.has(f"rope.scaling.{key}"):
                scaling[name] = model.number(f"rope.scaling.{key}")
    # llama.cpp compares it with an mscale of 1.
    for_all = model.number("rope.scaling.yarn_log_multiplier", 0.0)
    return scaling | ({"mscale": 1.0, "mscale_all_dim": for_all} if for_all else {})


_YARN = {
    "attention_factor": ("attn_factor", "yarn_attn_factor"),
    "beta_fast": ("yarn_beta_fast",),
    "beta_slow": ("yarn_beta_slow",),
}


def _llama3_scaling(model: _Model, columns: int, theta: float, trained: int) -> Values:
    """Return the parameters of llama3 scaling that make the factors in ``rope_freqs``.

    The file has only the factors. Parameters that give the same ones are as good. If none are
    found, the factors stand as they are: longrope with equal factors for short and long texts.
    """
    factors = np.array(model.numbers("rope_freqs.weight"))
    if len(factors) * 2 != columns or not np.isfinite(factors).all() or (factors < 1).any():
        raise CheckpointError(f"{model.path}: tensor 'rope_freqs.weight' does not fit the heads")
    frequencies = theta ** -(np.arange(0, columns, 2) / columns)
    largest = float(factors.max())
    for low, high in _LLAMA3_BANDS:
        for original in (*_CONTEXTS, *_trained_context(factors, frequencies, low, high)):
            turns = original * frequencies / (2 * math.pi)
            smooth = np.clip((turns - low) / (high - low), 0, 1)
            if np.allclose(1 / ((1 - smooth) / largest + smooth), factors, rtol=1e-5, atol=0):
                return {
                    "rope_type": "llama3",
                    "factor": largest,
                    "low_freq_factor": low,
                    "high_freq_factor": high,
                    "original_max_position_embeddings": original,
                }
    return {
        "rope_type": "longrope",
        "short_factor": factors.tolist(),
        "long_factor": factors.tolist(),
        "attention_factor": 1.0,
        "original_max_position_embeddings": trained,
    }


_LLAMA3_BANDS = ((1.0, 4.0), (1.0, 32.0))
"""The low_freq_factor and high_freq_factor of known models."""
_CONTEXTS = (8192, 4096, 16384, 32768)


def _trained_context(
    factors: npt.NDArray[np.float64], frequencies: npt.NDArray[np.float64], low: float, high: float
) -> list[int]:
    """Return the trained context that gives these factors, if any does.

    It follows from the factor in the middle of the band. If no factor is in the band, the context
    has bounds, and each one between them gives the same factors.
    """
    largest, waves = factors.max(), 2 * math.pi / frequencies
    if largest == 1:
        return []
    smooth = (1 / factors - 1 / largest) / (1 - 1 / largest)
    middle = int(np.abs(smooth - 0.5).argmin())
    if 0.01 < smooth[middle] < 0.99:
        context = (low + (high - low) * smooth[middle]) * waves[middle]
    else:
        context = math.ceil(high * waves[smooth > 0.5].max(initial=0))
    return [round(context)] if 0.5 < context < MAX_SIZE - 1 else []


def _ropes_by_kind(model: _Model, values: Values, theta: float, sliding_theta: float) -> Values:
    """Return the rotary parameters by kind of layer, in place of those of all layers.

    theta, sliding_theta: where the file has none. Scaling is for layers without a window.
    """
    del values["rope_theta"]
    full = values.pop("rope_scaling", None) or {"rope_type": "default"}
    return {
        "full_attention": full | {"rope_theta": model.number("rope.freq_base", theta)},
        "sliding_attention": {
            "rope_type": "default",
            "rope_theta": model.number("rope.freq_base_swa", sliding_theta),
        },
    }


def _layer_types(sliding: list[bool]) -> list[str]:
    return ["sliding_attention" if item else "full_attention" for item in sliding]


def _llama(model: _Model) -> Values:
    """Return the config of Llama, Mistral or Mixtral, which one architecture stands for."""
    values = _decoder(model, "llama") | _rms(model)
    window = model.size("attention.sliding_window", 0)
    if window:
        values |= {"model_type": "mistral", "sliding_window": window}
    return values | ({"model_type": "mixtral"} | _routed(model) if _has_experts(model) else {})


def _has_experts(model: _Model) -> bool:
    return model.size("expert_count", 0) > 0


def _routed(model: _Model) -> Values:
    return {
        "num_local_experts": model.size("expert_count"),
        "num_experts_per_tok": model.size("expert_used_count"),
    }


def _gpt_oss(model: _Model) -> Values:
    values = _decoder(model, "gpt_oss") | _rms(model) | _routed(model)
    scaling = values.get("rope_scaling")
    if scaling is not None:  # The file cannot say it, and all published models have it.
        values["rope_scaling"] = scaling | {"truncate": False}
    return values | {
        "intermediate_size": model.size("expert_feed_forward_length"),
        "sliding_window": model.size("attention.sliding_window", 128),
        "layer_types": _layer_types(model.windows(2)),
    }


def _qwen_moe(model_type: str, *, normalized: bool) -> Callable[[_Model], Values]:
    """Return the reader of a config whose files do not say whether weights are normalized."""

    def config(model: _Model) -> Values:
        shared = model.size("expert_shared_feed_forward_length", 0)
        width = model.size("expert_feed_forward_length")
        return (
            _decoder(model, model_type)
            | _rms(model)
            | _routed(model)
            | {
                "moe_intermediate_size": width,
                "norm_topk_prob": model.flag("expert_weights_norm", normalized),
            }
            | ({"shared_expert_intermediate_size": shared} if shared else {})
        )

    return config


def _granitemoe(model: _Model) -> Values:
    values = _granite(model) | _routed(model)
    shared = model.size("expert_shared_feed_forward_length", 0)
    if shared:
        return values | {"model_type": "granitemoeshared", "shared_intermediate_size": shared}
    return values | {"model_type": "granitemoe"}


def _mistral3(model: _Model) -> Values:
    """Return the config of Ministral 3, or of Mistral Small 3, which scales no queries."""
    values = _decoder(model, "mistral") | _rms(model)
    beta = model.number("attention.temperature_scale", 0.0)
    if not beta:
        return values | {"sliding_window": model.size("attention.sliding_window", 0) or None}
    scaling = values.get("rope_scaling") or {"rope_type": "default"}
    return values | {
        "model_type": "ministral3",
        "rope_scaling": scaling | {"llama_4_scaling_beta": beta},
    }


def _ernie(model: _Model) -> Values:
    values = _decoder(model, "ernie4_5") | _rms(model)
    return values | {"use_bias": values["attention_bias"]}


def _plain(model_type: str) -> Callable[[_Model], Values]:
    """Return the reader of a config without options of its own."""
    return lambda model: _decoder(model, model_type) | _rms(model)


def _gemma(model: _Model) -> Values:
    return _decoder(model, "gemma") | _rms(model) | {"hidden_activation": "gelu_pytorch_tanh"}


def _gemma2(model: _Model) -> Values:
    values = _gemma(model)
    return values | {
        "model_type": "gemma2",
        "query_pre_attn_scalar": _query_scalar(values, 46),
        "attn_logit_softcapping": model.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": model.number("final_logit_softcapping", 30.0),
        "sliding_window": model.size("attention.sliding_window", 4096),
        "layer_types": _layer_types(model.windows(2)),
    }


def _gemma3(model: _Model) -> Values:
    values = _gemma(model)
    window = model.size("attention.sliding_window", 0)
    cap = model.number("final_logit_softcapping", 0.0)
    return values | {
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": _query_scalar(values, 62),
        "rope_parameters": _ropes_by_kind(model, values, 1e6, 10000.0),
        "final_logit_softcapping": cap or None,
        "sliding_window": window or None,
        "layer_types": _layer_types(model.windows(6 if window else 1)),
    }


def _query_scalar(values: Values, largest: int) -> int:
    """Return the scalar of scores. The files lack it; only the largest model has its own."""
    if values["num_hidden_layers"] == largest:
        return int(values["hidden_size"] // values["num_attention_heads"])
    return int(values["head_dim"])


def _phi3(model: _Model) -> Values:
    values = _decoder(model, "phi3") | _rms(model)
    trained = model.size("rope.scaling.original_context_length", model.size("context_length"))
    return values | {
        "original_max_position_embeddings": trained,
        "sliding_window": model.size("attention.sliding_window", 0) or None,
    }


def _granite(model: _Model) -> Values:
    values = _decoder(model, "granite") | _rms(model)
    if not _has_experts(model):  # The metadata of Granite 4 has another width.
        values["intermediate_size"] = _mlp_width(model)
    return values | {
        "attention_multiplier": model.number("attention.scale", 1 / values["head_dim"] ** 0.5),
        "embedding_multiplier": model.number("embedding_scale", 1.0),
        "residual_multiplier": model.number("residual_scale", 1.0),
        "logits_scaling": model.number("logit_scale", 1.0),
    }


def _minicpm(model: _Model) -> Values:
    values = _decoder(model, "minicpm") | _rms(model)
    root, hidden = values["num_hidden_layers"] ** 0.5, values["hidden_size"]
    return values | {
        "scale_emb": model.number("embedding_scale", 12.0),
        "scale_depth": _rounded(model.number("residual_scale", 1.4 / root) * root),
        "dim_model_base": round(hidden / model.number("logit_scale", hidden / 256)),
    }


def _mlp_width(model: _Model) -> int:
    return model.entry("blk.0.ffn_up.weight").shape[0]


def _rounded(value: float) -> float:
    """Undo the rounding of a quotient to float32."""
    return float(f"{value:.6g}")


def _starcoder2(model: _Model) -> Values:
    return _decoder(model, "starcoder2") | {
        "norm_epsilon": model.number("attention.layer_norm_epsilon"),
        "use_bias": "blk.0.attn_q.bias" in model.places,
        "hidden_act": "gelu_pytorch_tanh",
    }


def _stablelm(model: _Model) -> Values:
    return _decoder(model, "stablelm") | {
        "layer_norm_eps": model.number("attention.layer_norm_epsilon"),
        "use_qkv_bias": "blk.0.attn_q.bias" in model.places,
        "use_parallel_residual": model.flag("use_parallel_residual", False),
        "qk_layernorm": "blk.0.attn_q_norm.weight" in model.places,
    }


def _gpt2(model: _Model) -> Values:
    values = _decoder(model, "gpt2")
    names = {
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
    }
    return {name: values[known] for name, known in names.items()} | {
        "model_type": "gpt2",
        "n_inner": _mlp_width(model),  # The metadata has four times the hidden width.
        "layer_norm_epsilon": model.number("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
        **{key: values[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")},
        "tie_word_embeddings": values["tie_word_embeddings"],
    }


def _olmo2(model: _Model) -> Values:
    values = _decoder(model, "olmo2") | _rms(model)
    window = model.size("attention.sliding_window", 0)
    if not window:
        return values
    theta = values["rope_theta"]
    return values | {
        "model_type": "olmo3",
        "sliding_window": window,
        "layer_types": _layer_types(model.windows(4)),
        "rope_parameters": _ropes_by_kind(model, values, theta, theta),
    }


def _exaone4(model: _Model) -> Values:
    values = _decoder(model, "exaone4") | _rms(model)
    window = model.size("attention.sliding_window", 0)
    kinds = _layer_types(model.windows(4 if window else 1))
    return values | {"sliding_window": window or None, "layer_types": kinds}


def _smollm3(model: _Model) -> Values:
    return _decoder(model, "smollm3") | _rms(model) | {"no_rope_layer_interval": 4}


_ARCHITECTURES: Mapping[str, _Architecture] = {
    "llama": _Architecture(_llama, _MIXTRAL_NAMES, paired=True),
    "qwen2moe": _Architecture(_qwen_moe("qwen2_moe", normalized=False), _QWEN_MOE_NAMES),
    "qwen3moe": _Architecture(_qwen_moe("qwen3_moe", normalized=True), _QWEN_MOE_NAMES),
    "granitemoe": _Architecture(_granitemoe, _GRANITEMOE_NAMES, paired=True),
    "qwen2": _Architecture(_plain("qwen2"), _LLAMA_NAMES),
    "qwen3": _Architecture(_plain("qwen3"), _LLAMA_NAMES),
    "gemma": _Architecture(_gemma, _LLAMA_NAMES, norm_added=1.0),
    "gemma2": _Architecture(_gemma2, _SANDWICH_NAMES, norm_added=1.0),
    "gemma3": _Architecture(_gemma3, _SANDWICH_NAMES, norm_added=1.0),
    "phi3": _Architecture(_phi3, _PHI3_NAMES),
    "granite": _Architecture(_granite, _LLAMA_NAMES, paired=True),
    "minicpm": _Architecture(_minicpm, _LLAMA_NAMES, paired=True),
    "smollm3": _Architecture(_smollm3, _LLAMA_NAMES, paired=True),
    "starcoder2": _Architecture(_starcoder2, _STARCODER2_NAMES),
    "stablelm": _Architecture(_stablelm, _LLAMA_NAMES),
    "gpt-oss": _GptOss(_gpt_oss, _GPT_OSS_NAMES),
    "mistral3": _Architecture(_mistral3, _LLAMA_NAMES, paired=True),
    "ernie4_5": _Architecture(_ernie, _LLAMA_NAMES),
    "glm4": _Architecture(_plain("glm4"), _GLM4_NAMES),
    "olmo2": _Architecture(_olmo2, _OUTPUT_NORM_NAMES),
    "exaone4": _Architecture(_exaone4, _OUTPUT_NORM_NAMES),
    "gpt2": _Architecture(
        _gpt2,
        _GPT2_NAMES,
        layers="transformer.h.",
        transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
    ),
}


def _architecture(model: _Model) -> _Architecture:
    kind = model.text("general.type", "model")
    if kind == "adapter":
        raise UnsupportedModelError(
            f"{model.path}: an adapter (LoRA) as GGUF, which is not read; "
            "get the adapter's safetensors, or a merged model"
        )
    if kind == "mmproj" or model.name == "clip":
        raise UnsupportedModelError(
            f"{model.path}: the part of a model that reads pictures or sound; "
            "give the language model's file"
        )
    known = _ARCHITECTURES.get(model.name)
    if known is None:
        needed = _MISSING.get(model.name)
        feature = "" if needed is None else f": it needs {needed}"
        raise UnsupportedModelError(
            f"{model.path}: the architecture {model.name[:80]!r} is not implemented for GGUF"
            f"{feature}; known: {', '.join(sorted(_ARCHITECTURES))}"
        )
    return known


_MISSING: Mapping[str, str] = {
    **dict.fromkeys(("qwen3next", "qwen35", "qwen35moe"), "gated-delta attention"),
    **dict.fromkeys(
        ("mamba", "mamba2", "jamba", "falcon-h1", "granitehybrid", "nemotron_h", "plamo2"),
        "state-space layers",
    ),
    **dict.fromkeys(("lfm2", "lfm2moe"), "convolution layers"),
    **dict.fromkeys(("rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"), "recurrent layers"),
    **dict.fromkeys(
        ("deepseek2", "minicpm3", "plm", "mistral4"), "latent attention (compressed keys)"
    ),
    **dict.fromkeys(("gemma3n", "gemma4"), "embeddings of each layer"),
    **dict.fromkeys(
        ("bert", "nomic-bert", "modern-bert", "jina-bert-v2", "gemma-embedding", "neo-bert"),
        "attention to later tokens, and pooling",
    ),
    **dict.fromkeys(("qwen2vl", "qwen3vl", "qwen3vlmoe"), "positions of pictures (M-RoPE)"),
    **dict.fromkeys(
        ("phi2", "falcon", "gptneox", "gptj", "command-r"), "parallel attention and MLP"
    ),
    **dict.fromkeys(("bloom", "mpt"), "attention biased by distance (ALiBi)"),
}
"""The feature that an architecture needs and this project lacks."""


def _fingerprint(files: tuple[GgufFile, ...]) -> str:
    digest = hashlib.sha256()
    for file in files:
        try:
            status = file.path.stat()
        except OSError as error:
            raise CheckpointError(f"{file.path}: vanished while reading it") from error
        line = f"{file.path.name}\n{status.st_size} {status.st_mtime_ns} {file.digest}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
