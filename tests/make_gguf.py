"""Make the GGUF files under tests/gguf from other fixtures, with llama.cpp's own converter.

Run by hand, in the environment of make_fixtures.py with the gguf package:

    /tmp/fixtures/bin/python tests/make_gguf.py LLAMA_CPP [name ...]

LLAMA_CPP is a checkout of llama.cpp, which has conversion/. Weights stay in the type that the
fixture stores. golden.npz has random blocks of all types, and gguf's values of them.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

TESTS = Path(__file__).parent
TARGET = TESTS / "gguf"
FIXTURES = ("llama", "llama-linear", "qwen3")
"""Of tests/fixtures. Of tests/families all are tried; the file of one that fails is left out."""
TYPES = (
    "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    "IQ4_NL", "IQ4_XS", "MXFP4",
)  # fmt: skip
HALVES = {
    "Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q2_K": (80, 82),
    "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip
"""Where the fp16 numbers are in a block. Random ones would often be NaN."""


def main(llama_cpp: Path, names: list[str]) -> None:
    TARGET.mkdir(exist_ok=True)
    sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py")]
    if not names or "golden" in names:
        make_golden()
    families = [path.name for path in sorted((TESTS / "families").iterdir()) if path.is_dir()]
    for name in names or [*FIXTURES, *families]:
        if name in ("golden", "__pycache__"):
            continue
        try:
            make_model(name)
        except Exception as error:  # The converter raises whatever it meets.
            (TARGET / f"{name}.gguf").unlink(missing_ok=True)
            print(f"{name}: left out: {type(error).__name__}: {error}")  # noqa: T201 - a command


def make_golden() -> None:
    """Write blocks uint8 [rows, bytes] of each type, and their values float32."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    random = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for name in TYPES:
        kind = GGMLQuantizationType[name]
        values, size_bytes = GGML_QUANT_SIZES[kind]
        count = 3 if values == 1 or values == 32 else 2
        blocks = random.integers(
            0, 256, (3, count * (8 if values == 1 else 1), size_bytes), np.uint8
        )
        for begin in HALVES.get(name, (0,) if values == 1 and name == "F16" else ()):
            halves = random.normal(0, 2.0, (*blocks.shape[:2], 1)).astype(np.float16)
            blocks[:, :, begin : begin + 2] = halves.view(np.uint8)
        if name == "BF16":
            blocks[:, :, 1] = blocks[:, :, 1] & 0x80 | 0x3F
        rows = np.ascontiguousarray(blocks.reshape(3, -1))
        arrays[f"{name}.rows"], arrays[f"{name}.values"] = rows, dequantize(rows, kind)
    np.savez_compressed(TARGET / "golden.npz", **arrays)


def make_model(name: str) -> None:
    import gguf
    import torch
    from conversion import get_model_class
    from conversion.base import TextModel
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    source = (TESTS / "fixtures" if name in FIXTURES else TESTS / "families") / name
    target = TARGET / f"{name}.gguf"
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(source, Path(folder) / name))
        config = json.loads((copy / "config.json").read_text())
        add_tokenizer(copy, config)
        adapt_config(config)
        (copy / "config.json").write_text(json.dumps(config))
        # The class of the model's type would add tokens.
        AutoTokenizer.from_pretrained = PreTrainedTokenizerFast.from_pretrained
        TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
        dtype = config.get("dtype", config.get("torch_dtype", "float32"))
        kind = {
            "float32": gguf.LlamaFileType.ALL_F32,
            "float16": gguf.LlamaFileType.MOSTLY_F16,
            "bfloat16": gguf.LlamaFileType.MOSTLY_BF16,
        }[dtype]
        (architecture,) = config["architectures"]
        with torch.inference_mode():
            model = get_model_class(architecture)(copy, kind, target)
            model.set_vocab = model._set_vocab_gpt2
            if model.model_arch == gguf.MODEL_ARCH.GEMMA3:
                # The converter leaves it out, because published models all have the same one.
                kinds = [kind == "sliding_attention" for kind in model.hparams["layer_types"]]
                model.gguf_writer.add_sliding_window_pattern(kinds)
            model.write()
    target.chmod(0o644)
    print(f"{target.name}: {target.stat().st_size / 1000:.0f} KB")  # noqa: T201 - a command


def adapt_config(config: dict[str, Any]) -> None:
    """Add what the converter looks for, and published configs have."""
    kind, rope = config["model_type"], config.get("rope_parameters") or {}
    if kind == "llama" and "original_max_position_embeddings" in rope:
        config["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    if kind == "gpt2":
        config["n_ctx"] = config["n_positions"]
    if kind == "ministral3":
        rope["mscale_all_dim"] = 0.0
    if kind == "granitemoehybrid":
        config["layer_types"] = ["attention"] * len(config["layer_types"])
        config["num_experts_per_tok"] = 0


def add_tokenizer(folder: Path, config: dict[str, Any]) -> None:
    """Give a model without tokenizer one with a token per byte, like that of make_fixtures."""
    if (folder / "tokenizer.json").exists():
        return
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = config.get("vocab_size") or config["text_config"]["vocab_size"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: vocab - 2]
    result = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.decoder = decoders.ByteLevel()
    result.add_special_tokens(["<s>", "</s>"])
    result.save(str(folder / "tokenizer.json"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
