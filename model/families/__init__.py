"""The meaning of each architecture's config.json, and the names of its checkpoints' tensors.

A new architecture is one function that maps its config to features, one table of names and one line
in ``_FAMILIES``. An option that would change the numbers is honoured or refused. Options that only
concern training (dropout, initializer ranges, caching) are ignored.

``config`` reads values, ``sources`` says where a tensor is read and what is done to it. The other
modules hold the families.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from model.families.config import Config, read_config, read_config_file
from model.families.decoder import (
    LLAMA_NAMES,
    ernie,
    interleaved,
    llama,
    ministral3,
    mistral,
    qwen2,
    qwen3,
    smollm3,
)
from model.families.embedders import with_files, with_pooling
from model.families.encoders import (
    BERT_NAMES,
    DISTILBERT_NAMES,
    ENCODERS,
    MODERNBERT_NAMES,
    MPNET_NAMES,
    bert,
    distilbert,
    encoder_sources,
    label_names,
    modernbert,
    mpnet,
    problem_type,
    roberta,
)
from model.families.experts import (
    GRANITEMOE,
    MIXTRAL,
    QWEN_MOE,
    ExpertNames,
    granitemoe,
    mixtral,
    qwen2_moe,
    qwen3_moe,
)
from model.families.fused import (
    GLM4_NAMES,
    GLM_NAMES,
    PHI3_NAMES,
    glm,
    glm4,
    glm_sources,
    phi3,
    phi3_sources,
)
from model.families.gemma import GEMMA2_NAMES, gemma, gemma2, gemma3, gemma_sources
from model.families.gpt_oss import GPT_OSS, gpt_oss, gpt_oss_sources
from model.families.layernorm import (
    GPT2_NAMES,
    STARCODER2_NAMES,
    gpt2,
    gpt2_sources,
    stablelm,
    starcoder2,
)
from model.families.olmo import OLMO_NAMES, exaone4, olmo2, olmo3
from model.families.opt import OPT_NAMES, opt
from model.families.quantization import read_quantization
from model.families.scaled import (
    GRANITE_HYBRID_NAMES,
    granite,
    granite_hybrid,
    granite_hybrid_sources,
    granite_sources,
    minicpm,
    minicpm_sources,
)
from model.families.sources import Piece, Source, changed
from model.families.unsupported import missing_feature
from model.spec import ModelSpec

__all__ = [
    "Config",
    "Piece",
    "Source",
    "describe",
    "label_names",
    "load_spec",
    "problem_type",
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
    experts: ExpertNames | None = None
    """The names of the tensors of layers with experts."""


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
    own = language_part(config)
    family = _family(own)
    _refuse_foreign_options(config)
    spec = with_pooling(with_files(family.describe(own), directory), own)
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
        elif module.startswith("step_"):  # As model.checkpoint names the files of its folder.
            sources[canonical] = (Piece(f"{module}.linear.{kind}"),)
    if family.experts is not None and spec.block_kind(block) == "layer":
        layer = spec.layer(block)
        sources |= family.experts.sources(f"{prefix}layers.{block - 1}.", layer, available)
    sources = _turned(spec, block, family.adapt(config, spec, block, sources))
    if config.model_type in ENCODERS:
        sources = {
            name: tuple(_old_named(piece, available) for piece in source)
            for name, source in sources.items()
        }
    return sources


_OLD_NAMES = {"weight": "gamma", "bias": "beta"}


def _old_named(piece: Piece, available: Collection[str]) -> Piece:
    """Return a piece of a layer norm by the name that BERT's first checkpoints give it."""
    module, _, kind = piece.name.rpartition(".")
    old = f"{module}.{_OLD_NAMES.get(kind, kind)}"
    return replace(piece, name=old) if piece.name not in available and old in available else piece


def _turned(spec: ModelSpec, block: int, sources: Sources) -> Sources:
    """Order the rows of q and k so that a head which turns in part looks like one that turns whole.

    Neighbouring pairs (``Piece.pairs``) come out in this order by themselves.
    """
    rope = spec.layer(block).rope if spec.block_kind(block) == "layer" else None
    if rope is None or not rope.rotated or any(piece.pairs for piece in sources["q.weight"]):
        return sources
    turned = spec.layer(block).head_dim, rope.rotated
    return sources | changed(sources, ("q", "k", "q_norm", "k_norm"), turned=turned)


def language_part(config: Config) -> Config:
    """Return the config of the language model in a model that also sees, or the config itself.

    It is in text_config there. Some fields are about the whole model, and stand beside it.
    """
    own = config.nested("text_config")
    if own is None or config.model_type not in _TEXT_TYPES:
        return config
    whole = {key: config.values[key] for key in _OF_THE_WHOLE if config.has(key)}
    model_type = {"model_type": _TEXT_TYPES[config.model_type]}
    return Config(config.path, model_type | dict(own.values) | whole)


def _family(config: Config) -> _Family:
    model_type = config.model_type
    family = _FAMILIES.get(model_type)
    if family is not None:
        return family
    feature = missing_feature(config)
    if feature is not None:
        raise config.lacking(feature)
    known = ", ".join(sorted({*_FAMILIES, *_TEXT_TYPES}))
    raise config.unsupported("model_type", model_type, f"known: {known}")


def _refuse_foreign_options(config: Config) -> None:
    """Refuse options of any architecture that would change the numbers."""
    read_quantization(config)
    for key in ("is_encoder_decoder", "add_cross_attention"):
        if config.flag(key, False):
            raise config.unsupported(key, True, "models without cross-attention are")
    if config.model_type in ENCODERS:
        return
    if not config.flag("is_causal", True):
        raise config.unsupported("is_causal", False, "only causal models are")
    if config.values.get("pruned_heads"):
        raise config.unsupported("pruned_heads", "...", "give a checkpoint without pruned heads")
    causal = ["ForCausalLM", "LMHeadModel", "Model"]
    if config.model_type in _TEXT_TYPES:
        causal.append("ForConditionalGeneration")
    for name in config.strings("architectures"):
        if not name.endswith(tuple(causal)):
            raise config.unsupported("architectures", name, "only causal language models are")


_DECODER = ("model.", "")
"""The prefixes of most checkpoints: with a head, and without."""

NESTED_PREFIXES = ("model.", "language_model.model.", "model.language_model.", "")
"""The prefixes of a language model that may be a part of another model."""

_TEXT_TYPES = {"gemma3": "gemma3_text", "mistral3": "mistral"}
"""Models whose language model is described in text_config, with its type where that has none."""
_OF_THE_WHOLE = ("bos_token_id", "eos_token_id", "tie_word_embeddings", "dtype", "torch_dtype")

_FAMILIES: Mapping[str, _Family] = {
    "bert": _Family(bert, ("bert.", ""), BERT_NAMES, encoder_sources),
    "camembert": _Family(roberta, ("roberta.", ""), BERT_NAMES, encoder_sources),
    "distilbert": _Family(distilbert, ("distilbert.", ""), DISTILBERT_NAMES, encoder_sources),
    "ernie4_5": _Family(ernie, _DECODER, LLAMA_NAMES, interleaved),
    "exaone4": _Family(exaone4, _DECODER, OLMO_NAMES),
    "gemma": _Family(gemma, _DECODER, LLAMA_NAMES, gemma_sources),
    "gemma2": _Family(gemma2, _DECODER, GEMMA2_NAMES, gemma_sources),
    "gemma3_text": _Family(gemma3, NESTED_PREFIXES, GEMMA2_NAMES, gemma_sources),
    "glm": _Family(glm, _DECODER, GLM_NAMES, glm_sources),
    "glm4": _Family(glm4, _DECODER, GLM4_NAMES, glm_sources),
    "gpt2": _Family(gpt2, ("transformer.", ""), GPT2_NAMES, gpt2_sources),
    "granite": _Family(granite, _DECODER, LLAMA_NAMES, granite_sources),
    "granitemoehybrid": _Family(
        granite_hybrid, _DECODER, GRANITE_HYBRID_NAMES, granite_hybrid_sources
    ),
    "gpt_oss": _Family(gpt_oss, _DECODER, LLAMA_NAMES, gpt_oss_sources, GPT_OSS),
    "granitemoe": _Family(granitemoe, _DECODER, LLAMA_NAMES, granite_sources, GRANITEMOE),
    "mixtral": _Family(mixtral, _DECODER, LLAMA_NAMES, experts=MIXTRAL),
    "qwen2_moe": _Family(qwen2_moe, _DECODER, LLAMA_NAMES, experts=QWEN_MOE),
    "qwen3_moe": _Family(qwen3_moe, _DECODER, LLAMA_NAMES, experts=QWEN_MOE),
    "llama": _Family(llama, _DECODER, LLAMA_NAMES),
    "minicpm": _Family(minicpm, _DECODER, LLAMA_NAMES, minicpm_sources),
    "ministral": _Family(mistral, _DECODER, LLAMA_NAMES),
    "ministral3": _Family(ministral3, NESTED_PREFIXES, LLAMA_NAMES),
    "mistral": _Family(mistral, NESTED_PREFIXES, LLAMA_NAMES),
    "olmo2": _Family(olmo2, _DECODER, OLMO_NAMES),
    "olmo3": _Family(olmo3, _DECODER, OLMO_NAMES),
    "modernbert": _Family(modernbert, ("model.", ""), MODERNBERT_NAMES, encoder_sources),
    "mpnet": _Family(mpnet, ("mpnet.", ""), MPNET_NAMES, encoder_sources),
    "opt": _Family(opt, ("model.decoder.", "decoder.", ""), OPT_NAMES),
    "phi3": _Family(phi3, _DECODER, PHI3_NAMES, phi3_sources),
    "qwen2": _Family(qwen2, _DECODER, LLAMA_NAMES),
    "qwen3": _Family(qwen3, _DECODER, LLAMA_NAMES),
    "roberta": _Family(roberta, ("roberta.", ""), BERT_NAMES, encoder_sources),
    "smollm3": _Family(smollm3, _DECODER, LLAMA_NAMES),
    "stablelm": _Family(stablelm, _DECODER, LLAMA_NAMES),
    "starcoder2": _Family(starcoder2, _DECODER, STARCODER2_NAMES),
    "xlm-roberta": _Family(roberta, ("roberta.", ""), BERT_NAMES, encoder_sources),
}
