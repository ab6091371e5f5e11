"""Make the tiny encoders under tests/encoders and what transformers computes with them.

Run by hand as tests/make_fixtures.py is:

    /tmp/fixtures/bin/python -m tests.make_encoders [name ...]

Each directory holds a random model as save_pretrained writes it, and golden.npz:

    tokens    int64 [n], of several texts, one behind the other
    lengths   int64 [texts]
    seconds   int64 [texts], where each text's second part begins, or its length
    hidden    float32 [n, hidden], after the last layer (and its norm), each text run alone
    output    float32, of the head: [texts, width], or [n, width] with a result for each token

Some have a tokenizer of word pieces, and the files of sentence-transformers.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

ENCODERS = Path(__file__).parent / "encoders"
VOCAB = 128
LENGTHS = (9, 1, 23, 5, 14)
SECONDS = (9, 1, 11, 3, 14)
"""Two of the texts are pairs."""

BERT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "vocab_size": VOCAB,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
ROBERTA = BERT | {"pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
DISTILBERT = {
    "dim": 32,
    "hidden_dim": 48,
    "n_layers": 3,
    "n_heads": 4,
    "max_position_embeddings": 64,
    "vocab_size": VOCAB,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
MODERNBERT = BERT | {
    "num_hidden_layers": 4,
    "global_attn_every_n_layers": 3,
    "local_attention": 8,
    "initializer_cutoff_factor": 3.0,
    "cls_token_id": 2,
    "sep_token_id": 3,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
QWEN3 = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "vocab_size": VOCAB,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 3,
    "pad_token_id": 0,
}
MPNET = BERT | {"pad_token_id": 1, "layer_norm_eps": 1e-5}
GEMMA3 = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "max_position_embeddings": 64,
    "vocab_size": VOCAB,
    "initializer_range": 0.3,
    "sliding_window": 8,
    "sliding_window_pattern": 3,
    "use_bidirectional_attention": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
COLOURS = {"id2label": {0: "red", 1: "green", 2: "blue"}}


@dataclass(frozen=True)
class Encoder:
    """How a fixture is made.

    head: the class that transformers builds.
    pooling: of the vector, written for sentence-transformers unless ``says_nothing``.
    """

    model_type: str
    options: dict[str, Any]
    head: Any = AutoModel
    pooling: str = ""
    normalized: bool = False
    dense: tuple[tuple[int, str, bool], ...] = ()
    """Width, activation and bias of linear layers behind the pooling."""
    says_nothing: bool = False
    old_names: bool = False


MODELS = {
    "minilm": Encoder("bert", BERT, pooling="mean", normalized=True),
    "bert": Encoder("bert", BERT, pooling="mean", says_nothing=True, old_names=True),
    "bert-class": Encoder("bert", BERT | COLOURS, AutoModelForSequenceClassification),
    "bert-tokens": Encoder("bert", BERT | COLOURS, AutoModelForTokenClassification),
    "bert-span": Encoder("bert", BERT, AutoModelForQuestionAnswering),
    "roberta": Encoder("roberta", ROBERTA, pooling="cls"),
    "roberta-class": Encoder("roberta", ROBERTA | COLOURS, AutoModelForSequenceClassification),
    "xlm-roberta-span": Encoder("xlm-roberta", ROBERTA, AutoModelForQuestionAnswering),
    "distilbert-class": Encoder(
        "distilbert", DISTILBERT | COLOURS, AutoModelForSequenceClassification
    ),
    "distilbert-span": Encoder("distilbert", DISTILBERT, AutoModelForQuestionAnswering),
    "modernbert": Encoder("modernbert", MODERNBERT, pooling="mean", normalized=True),
    "mpnet": Encoder("mpnet", MPNET, pooling="mean", normalized=True),
    "mpnet-class": Encoder("mpnet", MPNET | COLOURS, AutoModelForSequenceClassification),
    "gemma3-embed": Encoder(
        "gemma3_text",
        GEMMA3,
        pooling="mean",
        normalized=True,
        dense=((40, "Identity", False), (24, "Identity", False)),
    ),
    "bert-max": Encoder("bert", BERT, pooling="max", dense=((16, "Tanh", True),)),
    "bert-weighted": Encoder("bert", BERT, pooling="weightedmean"),
    "qwen3-embed": Encoder("qwen3", QWEN3, pooling="lasttoken", normalized=True),
}


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    for name in names or MODELS:
        make(name, MODELS[name])


def make(name: str, encoder: Encoder) -> None:
    torch.manual_seed(sum(name.encode()))
    config = CONFIG_MAPPING[encoder.model_type](**encoder.options)
    config._attn_implementation = "eager"
    model = encoder.head.from_config(config).eval().float()
    linears = dense_of(encoder, model.config.hidden_size)
    parameters = [*model.named_parameters(), *linears.named_parameters()]
    with torch.no_grad():
        for key, parameter in parameters:
            if key.endswith("bias"):
                parameter.normal_(0, 0.1)
            elif parameter.dim() == 1:
                parameter.add_(torch.empty_like(parameter).normal_(0, 0.2))
            parameter.copy_(parameter.half().float())
        golden = compute(model, linears, encoder)
    directory = ENCODERS / name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    model.half().save_pretrained(directory)
    np.savez_compressed(directory / "golden.npz", **golden)
    if encoder.pooling and not encoder.says_nothing:
        write_modules(directory, encoder, linears)
    if encoder.old_names:
        rename_norms(directory / "model.safetensors")
    if encoder.model_type in ("bert", "distilbert"):
        tokenizer().save(str(directory / "tokenizer.json"))
        (directory / "tokenizer_config.json").write_text('{"model_max_length": 64}\n')
    for path in directory.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def dense_of(encoder: Encoder, width: int) -> torch.nn.ModuleList:
    """The linear layers behind the pooling."""
    widths = [width, *(one[0] for one in encoder.dense)]
    return torch.nn.ModuleList(
        torch.nn.Linear(before, after, bias=bias)
        for before, (after, _, bias) in zip(widths, encoder.dense, strict=False)
    ).float()


def compute(model: Any, linears: Any, encoder: Encoder) -> dict[str, Any]:
    tokens = np.random.default_rng(1).integers(5, VOCAB, sum(LENGTHS))
    hidden, outputs, begin = [], [], 0
    for length, second in zip(LENGTHS, SECONDS, strict=True):
        ids = torch.tensor(tokens[None, begin : begin + length])
        begin += length
        inputs = {"input_ids": ids}
        if encoder.model_type == "bert":
            inputs["token_type_ids"] = (torch.arange(length) >= second).long()[None]
        result = model(**inputs, output_hidden_states=True)
        rows = result.last_hidden_state if encoder.pooling else result.hidden_states[-1]
        hidden.append(rows[0])
        outputs.append(output_of(result, rows[0], linears, encoder))
    return {
        "tokens": tokens,
        "lengths": np.array(LENGTHS),
        "seconds": np.array(SECONDS if encoder.model_type == "bert" else LENGTHS),
        "hidden": torch.cat(hidden).numpy(),
        "output": torch.cat(outputs).numpy(),
    }


def output_of(result: Any, rows: torch.Tensor, linears: Any, encoder: Encoder) -> torch.Tensor:
    """The head's result, as transformers gives it, or the vector as sentence-transformers does."""
    if encoder.head is AutoModelForQuestionAnswering:
        return torch.stack([result.start_logits[0], result.end_logits[0]], dim=1)
    if encoder.head is AutoModelForTokenClassification:
        return result.logits[0]
    if encoder.head is AutoModelForSequenceClassification:
        return result.logits
    weights = torch.arange(1, len(rows) + 1).float()[:, None]
    vector = {
        "mean": rows.mean(0),
        "cls": rows[0],
        "lasttoken": rows[-1],
        "max": rows.max(0).values,
        "weightedmean": (rows * weights).sum(0) / weights.sum(),
    }[encoder.pooling]
    for linear, (_, activation, _) in zip(linears, encoder.dense, strict=True):
        vector = getattr(torch.nn, activation)()(linear(vector))
    return (torch.nn.functional.normalize(vector, dim=0) if encoder.normalized else vector)[None]


def write_modules(directory: Path, encoder: Encoder, linears: Any) -> None:
    """Write what sentence-transformers reads beside a model."""
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling")]
    for linear, (width, activation, bias) in zip(linears, encoder.dense, strict=True):
        folder = f"{len(kinds)}_Dense"
        kinds.append((folder, "Dense"))
        write_dense(directory / folder, linear, width, activation, bias=bias)
    if encoder.normalized:
        kinds.append((f"{len(kinds)}_Normalize", "Normalize"))
    modules = [
        {
            "idx": index,
            "name": str(index),
            "path": path,
            "type": f"sentence_transformers.models.{kind}",
        }
        for index, (path, kind) in enumerate(kinds)
    ]
    (directory / "modules.json").write_text(json.dumps(modules, indent=1) + "\n")
    (directory / "1_Pooling").mkdir()
    names = (
        "cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens",
        "lasttoken",
    )  # fmt: skip
    chosen = {"cls": "cls_token"}.get(encoder.pooling, f"{encoder.pooling}_tokens")
    chosen = chosen if chosen in names else encoder.pooling
    pooling = {f"pooling_mode_{name}": name == chosen for name in names}
    text = json.dumps({"word_embedding_dimension": 32} | pooling, indent=1)
    (directory / "1_Pooling" / "config.json").write_text(text + "\n")


def write_dense(folder: Path, linear: Any, width: int, activation: str, *, bias: bool) -> None:
    from safetensors.torch import save_file

    folder.mkdir()
    tensors = {f"linear.{key}": value.half() for key, value in linear.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    part = "linear" if activation == "Identity" else "activation"
    values = {
        "in_features": linear.in_features,
        "out_features": width,
        "bias": bias,
        "activation_function": f"torch.nn.modules.{part}.{activation}",
    }
    (folder / "config.json").write_text(json.dumps(values, indent=1) + "\n")


def rename_norms(path: Path) -> None:
    """Name the weights of norms as BERT's first checkpoints do."""
    from safetensors.torch import load_file, save_file

    tensors = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for key, value in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})


def tokenizer() -> Tokenizer:
    """Word pieces of one letter, some words, and BERT's special tokens and pairs."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    pieces += [f"##{letter}" for letter in letters] + list(".,?!'-:")
    words = "the a is was in of to and it who what where when how river town ship bird house red"
    pieces += [word for word in words.split() if word not in pieces]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    if len(vocab) > VOCAB:
        raise SystemExit("too many word pieces")
    result = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))  # noqa: S106 - no password
    result.normalizer = normalizers.BertNormalizer(lowercase=True)
    result.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    result.decoder = decoders.WordPiece()
    result.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
