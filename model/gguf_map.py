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

from model import gguf_configs as configs
from model.errors import CheckpointError, UnsupportedModelError
from model.gguf import Alternating, GgufFile, GgufTensor, read_parts
from model.gguf_configs import Values
from model.gguf_metadata import GgufMetadata
from model.gguf_types import READ_TYPES
from model.weights import StoredTensor

_LAYER = re.compile(r"blk\.(\d{1,6})\.(.+)")
_UNREAD = re.compile(r"rope_freqs\.weight|rope_factors_(long|short)\.weight|.*\.attn_rot_embd")
"""Tensors that become a part of the config, or that it makes redundant."""


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
    model = GgufMetadata(files)
    architecture = _architecture(model)
    values = architecture.config(model) | configs.whole_texts(model)
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
    model = GgufMetadata(read_parts(path))
    return _architecture(model).config(model) | configs.whole_texts(model)


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

    config: Callable[[GgufMetadata], Values]
    names: Mapping[str, str]
    layers: str = "model.layers."
    paired: bool = False
    norm_added: float = 0.0
    transposed: Collection[str] = ()

    def tensors(self, model: GgufMetadata, values: Values, key: str) -> dict[str, StoredTensor]:
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

    def tensors(self, model: GgufMetadata, values: Values, key: str) -> dict[str, StoredTensor]:
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


_ARCHITECTURES: Mapping[str, _Architecture] = {
    "llama": _Architecture(configs.llama, _MIXTRAL_NAMES, paired=True),
    "qwen2moe": _Architecture(configs.qwen_moe("qwen2_moe", normalized=False), _QWEN_MOE_NAMES),
    "qwen3moe": _Architecture(configs.qwen_moe("qwen3_moe", normalized=True), _QWEN_MOE_NAMES),
    "granitemoe": _Architecture(configs.granitemoe, _GRANITEMOE_NAMES, paired=True),
    "qwen2": _Architecture(configs.plain("qwen2"), _LLAMA_NAMES),
    "qwen3": _Architecture(configs.plain("qwen3"), _LLAMA_NAMES),
    "gemma": _Architecture(configs.gemma, _LLAMA_NAMES, norm_added=1.0),
    "gemma2": _Architecture(configs.gemma2, _SANDWICH_NAMES, norm_added=1.0),
    "gemma3": _Architecture(configs.gemma3, _SANDWICH_NAMES, norm_added=1.0),
    "phi3": _Architecture(configs.phi3, _PHI3_NAMES),
    "granite": _Architecture(configs.granite, _LLAMA_NAMES, paired=True),
    "minicpm": _Architecture(configs.minicpm, _LLAMA_NAMES, paired=True),
    "smollm3": _Architecture(configs.smollm3, _LLAMA_NAMES, paired=True),
    "starcoder2": _Architecture(configs.starcoder2, _STARCODER2_NAMES),
    "stablelm": _Architecture(configs.stablelm, _LLAMA_NAMES),
    "gpt-oss": _GptOss(configs.gpt_oss, _GPT_OSS_NAMES),
    "mistral3": _Architecture(configs.mistral3, _LLAMA_NAMES, paired=True),
    "ernie4_5": _Architecture(configs.ernie, _LLAMA_NAMES),
    "glm4": _Architecture(configs.plain("glm4"), _GLM4_NAMES),
    "olmo2": _Architecture(configs.olmo2, _OUTPUT_NORM_NAMES),
    "exaone4": _Architecture(configs.exaone4, _OUTPUT_NORM_NAMES),
    "gpt2": _Architecture(
        configs.gpt2,
        _GPT2_NAMES,
        layers="transformer.h.",
        transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
    ),
}


def _architecture(model: GgufMetadata) -> _Architecture:
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
