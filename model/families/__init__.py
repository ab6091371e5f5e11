"""The meaning of each architecture's config.json, and the names of its checkpoints' tensors.

A new architecture is one function that maps its config to features, one table of names and one line
in ``_FAMILIES``. An option that would change the numbers is honoured or refused. Options that only
concern training (dropout, initializer ranges, caching) are ignored.

``config`` reads values, ``sources`` says where a tensor is read and what is done to it. The other
modules hold the families.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from model.families.config import Config, read_config, read_config_file
from model.families.decoder import LLAMA_NAMES, llama, mistral, qwen2, qwen3, smollm3
from model.families.gemma import GEMMA2_NAMES, gemma2, gemma3, gemma_sources
from model.families.olmo import OLMO_NAMES, exaone4, olmo2, olmo3
from model.families.opt import OPT_NAMES, opt
from model.families.quantization import read_quantization
from model.families.sources import Piece, Source
from model.spec import ModelSpec

__all__ = [
    "Config",
    "Piece",
    "Source",
    "describe",
    "load_spec",
    "read_config",
    "read_config_file",
    "tensor_sources",
]

Sources = dict[str, Source]
"""Maps the canonical tensors of a block to where they are read."""


def _unchanged(_config: Config, _spec: ModelSpec, _block: int, sources: Sources) -> Sources:
    return sources


@dataclass(frozen=True, slots=True)
class _Family:
    """One architecture: the reader of its config, and its tensor names relative to a prefix.

    adapt: given a block's sources by ``names``, returns those that its transforms need. A module
        that ``names`` lacks has no source before.
    """

    describe: Callable[[Config], ModelSpec]
    prefixes: tuple[str, ...]
    names: Mapping[str, str]
    """Maps a canonical module to the checkpoint's; ``{layer}`` stands for the layer's index."""
    adapt: Callable[[Config, ModelSpec, int, Sources], Sources] = _unchanged


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
    _refuse_foreign_options(config)
    config = language_part(config)
    spec = _family(config).describe(config)
    generation = directory / "generation_config.json"
    eos = read_config_file(generation).tokens("eos_token_id") if generation.exists() else ()
    plain = spec.to_dict()
    plain["eos_tokens"] = eos or spec.eos_tokens
    return ModelSpec.from_dict(plain)


def tensor_sources(
    config: Config, spec: ModelSpec, block: int, available: Collection[str]
) -> Sources:
    """Return where each canonical tensor of a block is read, and what is done to it.

    ``available`` decides between the prefixes that checkpoints of a family use. A tied head reads
    the token table.
    """
    config = language_part(config)
    family = _family(config)
    tokens = family.names["tokens"]
    prefix = next(
        (item for item in family.prefixes if f"{item}{tokens}.weight" in available),
        family.prefixes[0],
    )
    sources: Sources = {}
    for canonical in spec.block_tensors(block):
        module, _, kind = canonical.rpartition(".")
        if module == "lm_head":
            name = f"{prefix}{tokens}.weight" if spec.tied_head else "lm_head.weight"
            if name not in available and f"language_model.{name}" in available:
                name = f"language_model.{name}"
            sources[canonical] = (Piece(name),)
        elif module in family.names:
            name = family.names[module].format(layer=block - 1)
            sources[canonical] = (Piece(f"{prefix}{name}.{kind}"),)
    return family.adapt(config, spec, block, sources)


def language_part(config: Config) -> Config:
    """Return the config of the language model in a model that also sees, or the config itself.

    It is in text_config there. Some fields are about the whole model, and stand beside it.
    """
    own = config.nested("text_config")
    if own is None or config.values.get("model_type") not in _TEXT_TYPES:
        return config
    whole = {key: config.values[key] for key in _OF_THE_WHOLE if config.has(key)}
    model_type = {"model_type": _TEXT_TYPES[config.model_type]}
    return Config(config.path, model_type | dict(own.values) | whole)


def _family(config: Config) -> _Family:
    model_type = config.model_type
    if model_type in _LACKING:
        raise config.lacking(_LACKING[model_type])
    family = _FAMILIES.get(model_type)
    if family is None:
        raise config.unsupported("model_type", model_type, f"known: {', '.join(sorted(_FAMILIES))}")
    return family


def _refuse_foreign_options(config: Config) -> None:
    """Refuse options of any architecture that would change the numbers."""
    read_quantization(config)
    for key in ("is_encoder_decoder", "add_cross_attention"):
        if config.flag(key, False):
            raise config.unsupported(key, True, "only decoders are")
    if not config.flag("is_causal", True):
        raise config.unsupported("is_causal", False, "only causal models are")
    if config.values.get("pruned_heads"):
        raise config.unsupported("pruned_heads", "...", "give a checkpoint without pruned heads")
    causal = ["ForCausalLM", "LMHeadModel", "Model"]
    if config.values.get("model_type") in _TEXT_TYPES:
        causal.append("ForConditionalGeneration")
    for name in config.strings("architectures"):
        if not name.endswith(tuple(causal)):
            raise config.unsupported("architectures", name, "only causal language models are")


NESTED_PREFIXES = ("model.", "language_model.model.", "model.language_model.", "")
"""The prefixes of a language model that may be a part of another model."""

_TEXT_TYPES = {"gemma3": "gemma3_text"}
"""Models whose language model is described in text_config, with its type where that has none."""
_OF_THE_WHOLE = ("bos_token_id", "eos_token_id", "tie_word_embeddings", "dtype", "torch_dtype")

_PARALLEL = "attention and MLP that take the same rows (parallel residual)"
_GEMMA_3N = "embeddings per layer, alternating updates (AltUp) and shared keys and values"
_LACKING = {
    "cohere": _PARALLEL,
    "cohere2": _PARALLEL,
    "gemma3n": _GEMMA_3N,
    "gemma3n_text": _GEMMA_3N,
    "gemma4": "embeddings per layer, shared keys and values and heads of two widths",
    "gemma4_text": "embeddings per layer, shared keys and values and heads of two widths",
    "recurrent_gemma": "recurrent layers (RG-LRU)",
}
"""What known architectures need that no backend implements."""

_FAMILIES: Mapping[str, _Family] = {
    "exaone4": _Family(exaone4, ("model.", ""), OLMO_NAMES),
    "gemma2": _Family(gemma2, ("model.", ""), GEMMA2_NAMES, gemma_sources),
    "gemma3_text": _Family(gemma3, NESTED_PREFIXES, GEMMA2_NAMES, gemma_sources),
    "llama": _Family(llama, ("model.", ""), LLAMA_NAMES),
    "mistral": _Family(mistral, ("model.", ""), LLAMA_NAMES),
    "olmo2": _Family(olmo2, ("model.", ""), OLMO_NAMES),
    "olmo3": _Family(olmo3, ("model.", ""), OLMO_NAMES),
    "opt": _Family(opt, ("model.decoder.", "decoder.", ""), OPT_NAMES),
    "qwen2": _Family(qwen2, ("model.", ""), LLAMA_NAMES),
    "qwen3": _Family(qwen3, ("model.", ""), LLAMA_NAMES),
    "smollm3": _Family(smollm3, ("model.", ""), LLAMA_NAMES),
}
