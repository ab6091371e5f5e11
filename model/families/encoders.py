"""Encoders: BERT, RoBERTa, XLM-RoBERTa, CamemBERT, MPNet, DistilBERT and ModernBERT, with heads.

The head is read from ``architectures`` in config.json. A model without one gives a vector, and the
files of sentence-transformers beside it say how (model/families/embedders.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from model.errors import CheckpointError
from model.families.config import Config
from model.families.decoder import LAYER
from model.families.sources import Piece, Source, stacked
from model.spec import DenseActivation, LayerSpec, ModelSpec, OutputSpec, RopeSpec

_BERT_LAYER = "encoder.layer.{layer}."
BERT_NAMES = {
    "tokens": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "types": "embeddings.token_type_embeddings",
    "embed_norm": "embeddings.LayerNorm",
    "q": _BERT_LAYER + "attention.self.query",
    "k": _BERT_LAYER + "attention.self.key",
    "v": _BERT_LAYER + "attention.self.value",
    "o": _BERT_LAYER + "attention.output.dense",
    "attn_norm": _BERT_LAYER + "attention.output.LayerNorm",
    "up": _BERT_LAYER + "intermediate.dense",
    "down": _BERT_LAYER + "output.dense",
    "mlp_norm": _BERT_LAYER + "output.LayerNorm",
}

_DISTIL_LAYER = "transformer.layer.{layer}."
DISTILBERT_NAMES = {
    "tokens": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "embed_norm": "embeddings.LayerNorm",
    "q": _DISTIL_LAYER + "attention.q_lin",
    "k": _DISTIL_LAYER + "attention.k_lin",
    "v": _DISTIL_LAYER + "attention.v_lin",
    "o": _DISTIL_LAYER + "attention.out_lin",
    "attn_norm": _DISTIL_LAYER + "sa_layer_norm",
    "up": _DISTIL_LAYER + "ffn.lin1",
    "down": _DISTIL_LAYER + "ffn.lin2",
    "mlp_norm": _DISTIL_LAYER + "output_layer_norm",
}

MPNET_NAMES = BERT_NAMES | {
    "q": _BERT_LAYER + "attention.attn.q",
    "k": _BERT_LAYER + "attention.attn.k",
    "v": _BERT_LAYER + "attention.attn.v",
    "o": _BERT_LAYER + "attention.attn.o",
    "attn_norm": _BERT_LAYER + "attention.LayerNorm",
    "position_bias": "encoder.relative_attention_bias",
}

MODERNBERT_NAMES = {
    "tokens": "embeddings.tok_embeddings",
    "embed_norm": "embeddings.norm",
    "attn_norm": LAYER + "attn_norm",
    "q": LAYER + "attn.Wqkv",
    "k": LAYER + "attn.Wqkv",
    "v": LAYER + "attn.Wqkv",
    "o": LAYER + "attn.Wo",
    "mlp_norm": LAYER + "mlp_norm",
    "gate": LAYER + "mlp.Wi",
    "up": LAYER + "mlp.Wi",
    "down": LAYER + "mlp.Wo",
    "norm": "final_norm",
}

ENCODERS = frozenset(
    ("bert", "camembert", "distilbert", "modernbert", "mpnet", "roberta", "xlm-roberta")
)

PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")

VECTOR = OutputSpec("vector", "mean")
"""The mean of all rows, which sentence-transformers takes of a model that says nothing."""

_BARE = ("Model", "ForMaskedLM", "ForPreTraining")
_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def bert(config: Config) -> ModelSpec:
    return _bert(config, dense="tanh", offset=0)


def roberta(config: Config) -> ModelSpec:
    """Describe RoBERTa and its relatives, whose positions begin behind that of padding."""
    padding = config.tokens("pad_token_id")
    return _bert(config, dense="tanh", offset=1 + (padding[0] if padding else 1))


def mpnet(config: Config) -> ModelSpec:
    """Describe MPNet: BERT without token types, whose scores have biases by distance."""
    buckets = config.size("relative_attention_num_buckets", 32)
    if buckets != 32:
        raise config.unsupported("relative_attention_num_buckets", buckets, "only 32 are")
    spec = _bert(config, dense="tanh", offset=2)  # The code of MPNet fixes padding at token 1.
    layer = replace(spec.layers[0], position_buckets=buckets)
    return replace(spec, layers=(layer,) * len(spec.layers), token_types=0)


def distilbert(config: Config) -> ModelSpec:
    plain = config.with_defaults(
        {
            "hidden_size": config.size("dim", 768),
            "num_attention_heads": config.size("n_heads", 12),
            "num_hidden_layers": config.layer_count("n_layers"),
            "intermediate_size": config.size("hidden_dim", 3072),
            "hidden_act": config.text("activation", "gelu"),
            "type_vocab_size": 1,
        }
    )
    return replace(_bert(plain, dense="relu", offset=0), token_types=0)


def modernbert(config: Config) -> ModelSpec:
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    for key in ("norm_bias", "attention_bias", "mlp_bias"):
        if config.flag(key, False):
            raise config.unsupported(key, True, "only ModernBERT without these biases is")
    kind = _kind(config)
    if kind != "Model":
        raise config.lacking(f"a head with a norm ({kind}); vectors of this model work")
    layer = LayerSpec(
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=_head_dim(config, hidden, heads),
        ffn=config.size("intermediate_size"),
        norm="layernorm",
        norm_eps=config.number("norm_eps", 1e-5),
        norm_position="pre",
        activation=config.activation("hidden_activation", "gelu"),
        gated=True,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        bidirectional=True,
    )
    layers = tuple(
        replace(layer, rope=RopeSpec(theta), sliding_window=window, enters_plain=not index)
        for index, (theta, window) in enumerate(_modern_layers(config))
    )
    spec = _encoder(config, layers, config.size("max_position_embeddings"), VECTOR)
    return replace(spec, final_norm=True)


def _encoder(
    config: Config, layers: tuple[LayerSpec, ...], max_context: int, output: OutputSpec
) -> ModelSpec:
    """Describe what encoders have in common: no tokens of their own, and a norm after the table."""
    (hidden,) = {layer.hidden for layer in layers}
    return ModelSpec(
        vocab=config.size("vocab_size"),
        hidden=hidden,
        embed_dim=hidden,
        max_context=max_context,
        layers=layers,
        learned_positions=0,
        position_offset=0,
        final_norm=False,
        tied_head=False,
        bos_token=None,
        eos_tokens=(),
        embed_norm=True,
        output=output,
    )


def _modern_layers(config: Config) -> list[tuple[float, int | None]]:
    """Return the rotary base and the window of each layer."""
    count, every = config.layer_count(), config.size("global_attn_every_n_layers", 3)
    kinds = config.strings("layer_types") or [
        "sliding_attention" if index % every else "full_attention" for index in range(count)
    ]
    if len(kinds) != count:
        raise CheckpointError(f"{config.path}: layer_types has {len(kinds)} of {count} layers")
    window = config.size("local_attention", 128) // 2 + 1
    ropes = config.nested("rope_parameters")
    thetas: dict[str, float] = {}
    for kind, key, default in (
        ("full_attention", "global_rope_theta", 160000.0),
        ("sliding_attention", "local_rope_theta", 10000.0),
    ):
        own = None if ropes is None else ropes.nested(kind)
        if own is not None and own.text("rope_type", "default") != "default":
            raise config.unsupported("rope_type", own.text("rope_type"), "only default is")
        thetas[kind] = config.number(key, default)
        if own is not None:
            thetas[kind] = own.number("rope_theta", thetas[kind])
    for kind in kinds:
        if kind not in thetas:
            raise config.unsupported("layer_types", kind, f"known: {', '.join(thetas)}")
    return [(thetas[kind], window if kind == "sliding_attention" else None) for kind in kinds]


def _bert(config: Config, *, dense: DenseActivation, offset: int) -> ModelSpec:
    """Describe BERT's layers: norms after attention and MLP, learned positions.

    dense: the activation between the first row and the scores of a text's classes.
    offset: the row of the first position.
    """
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    places = config.text("position_embedding_type", "absolute")
    if places != "absolute":
        raise config.unsupported("position_embedding_type", places, "only absolute is")
    if config.flag("is_decoder", False):
        raise config.unsupported("is_decoder", True, "this architecture is an encoder here")
    layer = LayerSpec(
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=_head_dim(config, hidden, heads),
        ffn=config.size("intermediate_size"),
        norm="layernorm",
        norm_eps=config.number("layer_norm_eps", 1e-12),
        norm_position="post",
        activation=config.activation("hidden_act", "gelu"),
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        bidirectional=True,
    )
    positions = config.size("max_position_embeddings", 512)
    if positions <= offset:
        raise CheckpointError(f"{config.path}: max_position_embeddings {positions} is too small")
    layers = (layer,) * config.layer_count()
    return replace(
        _encoder(config, layers, positions - offset, _output(config, hidden, dense)),
        learned_positions=positions,
        position_offset=offset,
        token_types=config.size("type_vocab_size", 2),
    )


def _output(config: Config, hidden: int, dense: DenseActivation) -> OutputSpec:
    match _kind(config):
        case "ForSequenceClassification":
            problem_type(config)
            return OutputSpec("class", "first", hidden, dense, labels=len(label_names(config)))
        case "ForTokenClassification":
            return OutputSpec("tokens", "none", labels=len(label_names(config)))
        case "ForQuestionAnswering":
            if len(label_names(config)) != 2:
                raise config.unsupported("num_labels", len(label_names(config)), "a span has 2")
            return OutputSpec("span", "none", labels=2)
    return VECTOR


def label_names(config: Config) -> tuple[str, ...]:
    """Return the names of the classes, by id2label or else by their number."""
    named = config.values.get("id2label")
    if not isinstance(named, dict) or not named:
        return tuple(f"LABEL_{index}" for index in range(config.size("num_labels", 2)))
    names = [named.get(str(index)) for index in range(len(named))]
    texts = [name for name in names if isinstance(name, str)]
    # JSON may hold halves of characters, which no answer can.
    if len(texts) < len(names) or any("\ud800" <= char <= "\udfff" for char in "".join(texts)):
        raise CheckpointError(f"{config.path}: id2label must name the classes 0, 1, 2 and so on")
    return tuple(texts)


def problem_type(config: Config) -> str:
    """Return what the scores of a text's classes mean, "" if config.json does not say it."""
    name = config.text("problem_type", "")
    if name and name not in PROBLEM_TYPES:
        raise CheckpointError(
            f"{config.path}: problem_type must be one of {', '.join(PROBLEM_TYPES)}, "
            f"not {name[:80]!r}"
        )
    return name


def _kind(config: Config) -> str:
    """Return which head the model has: "Model" for none, or the end of its class's name."""
    for name in config.strings("architectures"):
        head = next((end for end in _HEADS if name.endswith(end)), None)
        if head is not None:
            return head
        if not name.endswith(_BARE):
            known = ", ".join((*_HEADS, *_BARE))
            raise config.unsupported("architectures", name, f"encoders end with {known}")
    return "Model"


def _head_dim(config: Config, hidden: int, heads: int) -> int:
    if hidden % heads:
        raise CheckpointError(
            f"{config.path}: the width {hidden} is no multiple of the {heads} heads"
        )
    return hidden // heads


def encoder_sources(
    config: Config, spec: ModelSpec, block: int, sources: Mapping[str, Source]
) -> dict[str, Source]:
    """Add the sources of a head, whose tensors are named by task and architecture."""
    if config.model_type == "modernbert":
        return _modern_sources(spec, block, sources)
    if spec.block_kind(block) == "head" and spec.output is not None:
        return dict(sources) | _head_sources(config, spec.output, set(spec.block_tensors(block)))
    return dict(sources)


def _head_sources(config: Config, output: OutputSpec, tensors: set[str]) -> dict[str, Source]:
    labels = "classifier"
    if output.kind == "span":
        labels = "qa_outputs"
    dense = "bert.pooler.dense"
    if config.model_type == "distilbert":
        dense = "pre_classifier"
    elif config.model_type != "bert":
        dense = "classifier.dense"
        labels = labels if output.per_token else "classifier.out_proj"
    modules = {"dense": dense, "labels": labels}
    return {
        name: (Piece(f"{modules[module]}.{name.rpartition('.')[2]}"),)
        for name in tensors
        if (module := name.rpartition(".")[0]) in modules
    }


def _modern_sources(
    spec: ModelSpec, block: int, sources: Mapping[str, Source]
) -> dict[str, Source]:
    """Divide the fused matrices. Norms have no bias, so theirs is the weight times zero."""
    parts = dict(sources)
    if spec.block_kind(block) == "layer":
        shapes = spec.block_tensors(block)
        parts = stacked(sources, shapes, "qkv", ("gate", "up"))
    for name, source in parts.items():
        if name.endswith("norm.bias"):
            (piece,) = source
            weight = piece.name.removesuffix("bias") + "weight"
            parts[name] = (replace(piece, name=weight, scale=0.0),)
    return parts
