"""Make small vocabularies under tests/model/vocabularies, and what transformers makes of texts.

Run by hand, in an environment of its own, whenever a vocabulary is added or changed:

    python -m venv /tmp/fixtures
    /tmp/fixtures/bin/pip install transformers tokenizers sentencepiece protobuf
    /tmp/fixtures/bin/python tests/make_tokenizers.py [name ...]

texts.json has the texts. Each directory has the files of one vocabulary, and golden.json:

    variants    for each: the tokenizer_config.json, the ids of each text, and what they decode to
    reference   the ids of each text by the sentencepiece library, without special tokens
"""

from __future__ import annotations

import base64
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[1]
VOCABULARIES = Path(__file__).parent / "model" / "vocabularies"
CORPUS = ROOT / "model" / "passages.txt"
TEXTS = json.loads((VOCABULARIES / "texts.json").read_text())


def main(names: list[str]) -> None:
    for name in names or MAKERS:
        directory = VOCABULARIES / name
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        variants = MAKERS[name](directory)
        golden: dict[str, Any] = {"variants": [golden_of(directory, item) for item in variants]}
        if (directory / "tokenizer.model").exists():
            library = sentencepiece.SentencePieceProcessor(str(directory / "tokenizer.model"))
            golden["reference"] = [library.encode(text) for text in TEXTS]
        (directory / "golden.json").write_text(one_text_a_line(golden), encoding="ascii")
        size_bytes = sum(path.stat().st_size for path in directory.iterdir())
        print(f"{name}: {len(variants)} variants, {size_bytes / 1000:.0f} KB")  # noqa: T201 - a command


def golden_of(directory: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return what transformers makes of the texts with these settings."""
    with tempfile.TemporaryDirectory() as scratch:
        for path in directory.iterdir():
            shutil.copy(path, scratch)
        (Path(scratch) / "tokenizer_config.json").write_text(json.dumps(settings))
        tokenizer = AutoTokenizer.from_pretrained(scratch)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    decoded = [tokenizer.decode(found, clean_up_tokenization_spaces=False) for found in ids]
    return {"settings": settings, "ids": ids, "decoded": decoded}


def one_text_a_line(golden: dict[str, Any]) -> str:
    """Return JSON with a line for each text."""
    text = json.dumps(golden)
    return text.replace("], [", "],\n[").replace('", "', '",\n"') + "\n"


def corpus() -> str:
    return CORPUS.read_text(encoding="utf-8") + "\n".join(TEXTS * 3)


def train(directory: Path, **options: Any) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text"
        text.write_text(corpus(), encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(text), model_prefix=f"{scratch}/tokenizer", num_threads=1,
            character_coverage=0.985, minloglevel=2, hard_vocab_limit=False, **options
        )  # fmt: skip
        shutil.copy(f"{scratch}/tokenizer.model", directory)
    (directory / "tokenizer.model").chmod(0o644)


def added(*tokens: tuple[int, str], special: bool = True) -> dict[str, Any]:
    """Return the added_tokens_decoder of a tokenizer_config.json."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {str(index): {"content": token, "special": special, **flags} for index, token in tokens}


ENDS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
LLAMA_TOKENS = added((0, "<unk>"), (1, "<s>"), (2, "</s>"))


def llama(directory: Path) -> list[dict[str, Any]]:
    """As Llama 2: BPE with bytes, nothing normalized."""
    train(
        directory, model_type="bpe", vocab_size=460, byte_fallback=True, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    chat = added((460, "<|im_start|>"), (461, "<|im_end|>"))
    plain = {"tokenizer_class": "LlamaTokenizer", **ENDS, "added_tokens_decoder": LLAMA_TOKENS}
    return [
        plain | {"legacy": False, "add_bos_token": True, "add_eos_token": False},
        plain | {"legacy": True, "add_bos_token": True, "add_eos_token": True},
        plain | {"added_tokens_decoder": LLAMA_TOKENS | chat, "add_bos_token": True},
        {"tokenizer_class": "PreTrainedTokenizerFast", **ENDS, "add_bos_token": True},
        {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False},
        plain | {"add_prefix_space": False, "add_bos_token": True},
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **ENDS,
            "legacy": False,
            "add_bos_token": True,
        },
    ]


def gemma(directory: Path) -> list[dict[str, Any]]:
    """As Gemma: no space before a text, runs of spaces and lines as user-defined tokens."""
    runs = ["\n" * count for count in range(1, 4)] + ["\u2581" * count for count in range(2, 5)]
    train(
        directory, model_type="bpe", vocab_size=460, byte_fallback=True, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>",
        bos_piece="<bos>", allow_whitespace_only_pieces=True,
        user_defined_symbols=["<start_of_turn>", "<end_of_turn>", *runs],
    )  # fmt: skip
    names = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    tokens = added((0, "<pad>"), (1, "<eos>"), (2, "<bos>"), (3, "<unk>"))
    plain = {**names, "added_tokens_decoder": tokens, "add_bos_token": True}
    return [plain | {"tokenizer_class": "GemmaTokenizer"}, plain]


def unigram(directory: Path) -> list[dict[str, Any]]:
    """Unigram with rules of normalization, and unknown characters."""
    with tempfile.NamedTemporaryFile("w", suffix=".tsv") as rules:
        rules.write(_rules())
        rules.flush()
        train(
            directory, model_type="unigram", vocab_size=320, normalization_rule_tsv=rules.name,
            user_defined_symbols=["<|im_start|>"], control_symbols=["<|im_end|>"],
        )  # fmt: skip
    return [{**ENDS, "add_bos_token": True}, {**ENDS, "add_eos_token": True}]


def unigram_bytes(directory: Path) -> list[dict[str, Any]]:
    train(
        directory, model_type="unigram", vocab_size=500, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    return [{**ENDS, "add_bos_token": True}]


def bpe_rules(directory: Path) -> list[dict[str, Any]]:
    """BPE with rules of normalization, without bytes."""
    with tempfile.NamedTemporaryFile("w", suffix=".tsv") as rules:
        rules.write(_rules())
        rules.flush()
        train(directory, model_type="bpe", vocab_size=300, normalization_rule_tsv=rules.name)
    return [{**ENDS, "add_bos_token": True}]


def bpe_scores(directory: Path) -> list[dict[str, Any]]:
    """As Mistral 7B's first model: runs of spaces have low ids, but are merged last."""
    train(
        directory, model_type="bpe", vocab_size=460, byte_fallback=True, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((directory / "tokenizer.model").read_bytes())
    texts = {piece.piece for piece in model.pieces}
    counts = [count for count in (2, 3, 4, 8) if "\u2581" * count not in texts]
    for piece, count in zip(model.pieces[259:], counts, strict=False):
        piece.piece, piece.score = "\u2581" * count, -1e9
    (directory / "tokenizer.model").write_bytes(model.SerializeToString())
    return [{**ENDS, "add_bos_token": True}]


def _rules() -> str:
    """Return a few of the many rules of NFKC, so that the file stays small."""
    pairs = {"\ufb01": "fi", "\ufb02": "fl", "\u2167": "VIII", "\u00bd": "1\u20442"}
    pairs |= dict.fromkeys(("\u3000", "\u00a0", "\t"), " ")
    pairs |= {chr(0xFF21 + i): chr(0x41 + i) for i in range(26)}
    pairs |= {chr(0xFF41 + i): chr(0x61 + i) for i in range(26)}
    pairs |= {"e\u0301": "é", "\u200b": ""}
    lines = (
        " ".join(f"{ord(c):X}" for c in old) + "\t" + " ".join(f"{ord(c):X}" for c in new)
        for old, new in pairs.items()
    )
    return "\n".join(lines) + "\n"


def gpt2(directory: Path) -> list[dict[str, Any]]:
    byte_level(directory, ["<|endoftext|>"])
    plain = {"tokenizer_class": "GPT2Tokenizer"}
    ends = {f"{name}_token": "<|endoftext|>" for name in ("bos", "eos", "unk")}
    chat = added((0, "<|endoftext|>"), (300, "<|im_start|>"), (301, "<|im_end|>"))
    return [
        plain,
        plain | ends | {"add_prefix_space": True},
        plain | ends | {"add_bos_token": True, "added_tokens_decoder": chat},
    ]


def qwen2(directory: Path) -> list[dict[str, Any]]:
    byte_level(directory)
    chat = added((300, "<|endoftext|>"), (301, "<|im_start|>"), (302, "<|im_end|>"))
    chat |= added((303, "<think>"), special=False)
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None}
    plain = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": chat, **names}
    return [plain, plain | {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}]


def byte_level(directory: Path, special: Sequence[str] = ()) -> None:
    """Write vocab.json and merges.txt of 300 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=list(special), show_progress=False
    )
    tokenizer.train_from_iterator([corpus()], trainer)
    tokenizer.model.save(str(directory))


def tekken(directory: Path) -> list[dict[str, Any]]:
    """As Mistral's tekken.json: tokens as bytes by rank, behind the special ones."""
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "<pad>"]
    special += [f"<SPECIAL_{index}>" for index in range(len(special), 12)]
    with tempfile.TemporaryDirectory() as scratch:
        byte_level(Path(scratch))
        vocab = json.loads((Path(scratch) / "vocab.json").read_text())
    letters = {letter: byte for byte, letter in byte_letters().items()}
    merged = [token for token in vocab if len(token) > 1]
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [bytes(letters[letter] for letter in token) for token in merged]
    values = {
        "config": {
            "pattern": PATTERN, "num_vocab_tokens": len(tokens),
            "default_vocab_size": len(tokens) + len(special),
            "default_num_special_tokens": len(special), "version": "v7",
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
            for rank, token in enumerate(tokens)
        ],
        "special_tokens": [
            {"rank": rank, "token_str": token, "is_control": True}
            for rank, token in enumerate(special)
        ],
    }  # fmt: skip
    (directory / "tekken.json").write_text(json.dumps(values, separators=(",", ":")) + "\n")
    names = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    return [{"tokenizer_class": "TokenizersBackend", **names}]


PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_letters() -> dict[int, str]:
    """Return GPT-2's letter of each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + index) for index, byte in enumerate(others)
    }


MAKERS = {
    "llama": llama,
    "gemma": gemma,
    "unigram": unigram,
    "unigram-bytes": unigram_bytes,
    "bpe-rules": bpe_rules,
    "bpe-scores": bpe_scores,
    "gpt2": gpt2,
    "qwen2": qwen2,
    "tekken": tekken,
}


if __name__ == "__main__":
    main(sys.argv[1:])
