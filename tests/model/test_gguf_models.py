"""GGUF files as llama.cpp's converter writes them, against the checkpoints that they come from.

``tests/make_gguf.py`` makes them.
"""

from __future__ import annotations

import re
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.checkpoint import Checkpoint
from model.encoder_ends import rms_norm
from model.errors import CheckpointError, UnsupportedModelError
from model.families import load_spec
from model.gguf_map import read_values
from model.given import gguf_of, require_model
from model.quantize import Format
from model.reference import ReferenceModel
from model.spec import ModelSpec, OutputSpec, Pooling
from model.texts import Texts
from model.tokenizer import Tokenizer
from tests.gguf_files import TINY, Gguf, plain, tiny
from tests.parity import Golden

TESTS = Path(__file__).parents[1]
SOURCES = {
    path.name: path
    for folder in ("fixtures", "families")
    for path in (TESTS / folder).iterdir()
    if (path / "config.json").exists()
}
FILES = [file for file in sorted((TESTS / "gguf").glob("*.gguf")) if file.stem in SOURCES]
ATOL = 1e-4
LOST: dict[str, str] = {
    "smollm3": "which layers have no rotary positions, other than each fourth",
    "gemma2": "a scale of scores of its own, a head of its own",
    "gemma3": "a scale of scores of its own",
    "gemma": "norms are rounded to 16 bits after one is added",
    "qwen3-yarn": "that its bounds are not rounded to columns",
    "starcoder2": "a window of all layers",
    "gpt_oss": "the limit of a clipped SwiGLU, other than 7",
}
"""What the format cannot say of a fixture. No published model needs it."""


def comparable(spec: ModelSpec, name: str) -> ModelSpec:
    """Return a spec without what only a tokenizer's settings say, and what the format loses."""
    layers = spec.layers
    if name == "starcoder2":
        layers = tuple(replace(layer, sliding_window=None) for layer in layers)
    if name == "smollm3":
        layers = tuple(replace(layer, rope=layers[0].rope) for layer in layers)
    if name == "gpt_oss":
        experts = [replace(layer.experts, limit=7.0) for layer in layers if layer.experts]
        layers = tuple(
            replace(layer, experts=own) for layer, own in zip(layers, experts, strict=True)
        )
    if name.startswith("gemma"):
        layers = tuple(replace(layer, score_scale=None) for layer in layers)
    if name == "qwen3-yarn":
        ropes = [replace(layer.rope, truncated=True) for layer in layers if layer.rope is not None]
        layers = tuple(replace(layer, rope=rope) for layer, rope in zip(layers, ropes, strict=True))
    if layers[0].rope is not None and layers[0].rope.scaling == "llama3":
        # Any context between two bounds gives the same frequencies, if none is in the band.
        rope = replace(layers[0].rope, original_context=0)
        layers = tuple(replace(layer, rope=rope) for layer in layers)
    spec = replace(spec, layers=layers, eos_tokens=(), bos_token=None)
    return replace(spec, tied_head=True) if name == "gemma2" else spec


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_a_converted_checkpoint_is_the_same_model(file: Path) -> None:
    source, converted = Checkpoint.open(SOURCES[file.stem]), Checkpoint.open(file)
    assert comparable(converted.spec, file.stem) == comparable(source.spec, file.stem)
    for block in range(source.spec.block_count):
        if (file.stem, block) == ("gemma2", source.spec.head_block):
            continue
        expected, found = source.block(block), converted.block(block)
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            # Gemma's factor of embeddings is rounded to the checkpoint's type, which is not stored.
            is_gemma = file.stem.startswith("gemma")
            rounded = 1e-3 if is_gemma and (name == "tokens.weight" or "norm" in name) else 0
            np.testing.assert_allclose(
                found[name], values, rtol=rounded, atol=0, err_msg=f"{block} {name}"
            )


@pytest.mark.parametrize(
    "file", [file for file in FILES if file.stem not in LOST], ids=lambda path: path.stem
)
def test_its_tokens_are_those_of_transformers(file: Path) -> None:
    golden = Golden.load(SOURCES[file.stem])
    model = ReferenceModel.from_checkpoint(Checkpoint.open(file))
    np.testing.assert_allclose(model.forward(golden.prompt), golden.logits, atol=ATOL)
    assert golden.agreeing(golden.run(model.forward)) == len(golden.continuation)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_its_tokenizer_is_that_of_the_checkpoint(name: str) -> None:
    file = TESTS / "gguf" / f"{name}.gguf"
    converted, original = Tokenizer.load(file), Tokenizer.load(SOURCES[file.stem])
    for text in ("The quick brown fox jumps.", "</s>é\n\t 日本 <s>!", ""):
        assert converted.encode(text) == original.encode(text)
        assert converted.encode(text, add_special=False) == original.encode(text, add_special=False)
        tokens = original.encode(text)
        assert converted.decode(tokens) == original.decode(tokens)
    messages = [{"role": "user", "content": "Hello"}]
    assert converted.apply_chat_template(messages) == original.apply_chat_template(messages)


# ---- where a model may be given ----------------------------------------------------------------


def test_a_folder_with_one_model(tmp_path: Path) -> None:
    file = Path(shutil.copy(TESTS / "gguf" / "llama.gguf", tmp_path / "Some-Model-Q8_0.gguf"))
    (tmp_path / "mmproj-model-f16.gguf").write_bytes(b"GGUF")
    (tmp_path / "README.md").write_text("# Some model")
    require_model(tmp_path)
    assert gguf_of(tmp_path) == file
    assert load_spec(tmp_path) == load_spec(file)
    assert Checkpoint.open(tmp_path).fingerprint == Checkpoint.open(file).fingerprint
    assert Tokenizer.load(tmp_path).encode("fox") == Tokenizer.load(file).encode("fox")


def test_safetensors_beside_a_gguf_file_win(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TESTS / "fixtures" / "qwen3", tmp_path / "qwen3"))
    shutil.copy(TESTS / "gguf" / "llama.gguf", folder / "a.gguf")
    shutil.copy(TESTS / "gguf" / "llama.gguf", folder / "b.gguf")
    assert gguf_of(folder) is None
    assert Checkpoint.open(folder).config.model_type == "qwen3"
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"2 GGUF models: give the path of one: a\.gguf, b"):
        Checkpoint.open(folder)
    (folder / "b.gguf").unlink()
    assert Checkpoint.open(folder).config.model_type == "llama"


def test_a_file_without_a_telling_name(tmp_path: Path) -> None:
    """Other programs keep models under their hashes."""
    blob = Path(shutil.copy(TESTS / "gguf" / "llama.gguf", tmp_path / "sha256-0123"))
    assert Checkpoint.open(blob).spec == Checkpoint.open(TESTS / "gguf" / "llama.gguf").spec


# ---- types -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "bits"), [("Q4_0", 4), ("Q5_0", 5), ("Q8_0", 8), ("MXFP4", 5)])
def test_codes_are_kept_with_rows_in_order(tmp_path: Path, kind: str, bits: int) -> None:
    checkpoint = Checkpoint.open(tiny(kind).write(tmp_path / "x.gguf"))
    fmt = Format(bits, "rtn", 32, symmetric=True)
    assert checkpoint.native_format(1) == fmt
    assert set(checkpoint.source_dtypes(1).values()) == {kind, "F32"}
    values, kept = checkpoint.block(1), checkpoint.own_codes(1)
    assert kept.keys() == {f"{name}.weight" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    for name, matrix in kept.items():
        assert matrix.format == fmt
        np.testing.assert_array_equal(matrix.dequantize(), values[name])


def test_no_codes_are_kept_of_other_types(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny("Q4_1").write(tmp_path / "x.gguf"))
    assert checkpoint.native_format(1) is None
    assert checkpoint.own_codes(1) == {}


def test_a_block_takes_its_own_memory(tmp_path: Path) -> None:
    """Opening a model reads no weights, and a block is read without the others."""
    path = tiny("Q8_0").write(tmp_path / "x.gguf")
    Checkpoint.open(path)
    tracemalloc.start()
    try:
        checkpoint = Checkpoint.open(path)
        opened = tracemalloc.get_traced_memory()[1]
        block = checkpoint.block(1)
        read = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert opened < 200_000
    assert read < opened + 2 * sum(values.nbytes for values in block.values()) + 200_000


# ---- whole texts -------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "pooling"), [(1, "mean"), (2, "first"), (3, "last")])
def test_a_file_with_a_pooling_is_an_embedder(
    tmp_path: Path, number: int, pooling: Pooling
) -> None:
    """As Qwen3-Embedding's files. Its layers stay causal, and vectors have the length 1."""
    tokens = np.arange(1, 12)
    path = tiny(llama__pooling_type=number).write(tmp_path / "x.gguf")
    checkpoint = Checkpoint.open(path)
    assert load_spec(path) == checkpoint.spec
    assert checkpoint.spec.output == OutputSpec("vector", pooling, normalized=True)
    plain_path = tiny().write(tmp_path / "plain.gguf")
    same = Checkpoint.open(plain_path)
    rows = ReferenceModel(same.spec, [same.block(0), same.block(1)]).forward(tokens)
    rows = rms_norm(rows, 1e-5) * same.block(2)["norm.weight"]
    vector = {"mean": rows.mean(axis=0), "first": rows[0], "last": rows[-1]}[pooling]
    found = ReferenceModel.from_checkpoint(checkpoint).encode(tokens, Texts((11,), (11,)))
    np.testing.assert_allclose(found[0], vector / np.linalg.norm(vector), atol=1e-5)


def test_what_a_file_says_about_whole_texts_is_not_left_out(tmp_path: Path) -> None:
    path = tiny(llama__pooling_type=4).write(tmp_path / "x.gguf")
    with pytest.raises(UnsupportedModelError, match="pooling of the type 4 is not implemented"):
        Checkpoint.open(path)
    path = tiny(llama__attention__causal=False).write(tmp_path / "x.gguf")
    with pytest.raises(UnsupportedModelError, match="is_causal = false is not implemented"):
        Checkpoint.open(path)
    path = tiny(llama__attention__causal=True, llama__pooling_type=0).write(tmp_path / "x.gguf")
    assert Checkpoint.open(path).spec.output is None


# ---- metadata ----------------------------------------------------------------------------------


def rope_of(tmp_path: Path, factors: list[float] | None = None, **changes: Any) -> Any:
    model = tiny(**changes)
    if factors is not None:
        model.tensors = {**model.tensors, "rope_freqs.weight": plain(factors)}
    return read_values(model.write(tmp_path / "x.gguf")).get("rope_scaling")


LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("theta", "head_dim", "factor", "original"),
    [(5e5, 64, 32.0, 8192), (5e5, 128, 8.0, 8192), (1e4, 64, 4.0, 777), (1e6, 64, 16.0, 32768)],
)
def test_factors_of_llama3_are_recognized(
    tmp_path: Path, theta: float, head_dim: int, factor: float, original: int
) -> None:
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original * frequencies / (2 * np.pi) - 1) / 3, 0, 1)
    factors = (1 / ((1 - smooth) / factor + smooth)).tolist()
    found = rope_of(
        tmp_path,
        factors,
        llama__rope__freq_base=theta,
        llama__attention__key_length=head_dim,
        llama__attention__value_length=head_dim,
    )
    expected = {"factor": factor, "original_max_position_embeddings": original}
    assert found == LLAMA3 | expected


def test_other_factors_stay_as_they_are(tmp_path: Path) -> None:
    found = rope_of(tmp_path, [1.0, 3.0, 2.0, 5.0])
    assert found["rope_type"] == "longrope"
    assert found["short_factor"] == found["long_factor"] == [1.0, 3.0, 2.0, 5.0]
    assert found["attention_factor"] == 1.0
    with pytest.raises(CheckpointError, match="does not fit the heads"):
        rope_of(tmp_path, [1.0, 2.0])


def test_linear_and_yarn_scaling(tmp_path: Path) -> None:
    assert rope_of(tmp_path) is None
    linear: dict[str, Any] = {
        "llama__rope__scaling__type": "linear",
        "llama__rope__scaling__factor": 2.5,
    }
    assert rope_of(tmp_path, **linear) == {"rope_type": "linear", "factor": 2.5}
    assert rope_of(tmp_path, llama__rope__scale_linear=4.0) == {
        "rope_type": "linear",
        "factor": 4.0,
    }
    yarn: dict[str, Any] = {
        "llama__rope__scaling__type": "yarn",
        "llama__rope__scaling__factor": 4.0,
        "llama__rope__scaling__original_context_length": 16,
        "llama__rope__scaling__yarn_beta_fast": 16.0,
    }
    assert rope_of(tmp_path, **yarn) == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 16.0,
    }
    with pytest.raises(UnsupportedModelError, match="rotary scaling 'spiral' is not implemented"):
        rope_of(tmp_path, llama__rope__scaling__type="spiral")


def test_numbers_are_short(tmp_path: Path) -> None:
    values = read_values(tiny().write(tmp_path / "x.gguf"))
    assert values["rms_norm_eps"] == 1e-05


def test_tokens_that_end_an_answer(tmp_path: Path) -> None:
    """As in llama.cpp, also those that no entry names, if they are control tokens."""
    vocabulary: dict[str, Any] = {
        "tokenizer__ggml__tokens": ["a", "<eos>", "<|im_end|>", "<end_of_turn>", "<|end|>"],
        "tokenizer__ggml__token_type": [1, 3, 3, 3, -1],
        "tokenizer__ggml__eos_token_id": 1,
        "tokenizer__ggml__eot_token_id": 3,
        "tokenizer__ggml__bos_token_id": 0,
    }
    spec = load_spec(tiny(**vocabulary).write(tmp_path / "x.gguf"))
    assert spec.eos_tokens == (1, 3, 2)
    assert spec.bos_token == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"general__architecture": "mamba"},
            "the architecture 'mamba' is not implemented for GGUF",
        ),
        ({"general__architecture": "lfm2"}, "for GGUF: it needs convolution layers; known: "),
        ({"general__architecture": "grok"}, "is not implemented for GGUF; known: ernie4_5"),
        ({"general__architecture": None}, "the architecture '' is not implemented"),
        ({"general__architecture": "clip"}, "reads pictures or sound; give the language model's"),
        ({"general__type": "mmproj"}, "reads pictures or sound"),
        ({"general__type": "adapter"}, "an adapter (LoRA) as GGUF, which is not read"),
        ({"general__architecture": 7}, "general.architecture in the metadata must be a text"),
    ],
)
def test_other_architectures_are_named(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises((UnsupportedModelError, CheckpointError), match=re.escape(said)):
        Checkpoint.open(tiny(**changes).write(tmp_path / "x.gguf"))


def test_a_tensor_that_no_name_is_known_for(tmp_path: Path) -> None:
    model = tiny()
    model.tensors = {**model.tensors, "blk.0.attn_gate.weight": plain([1.0])}
    with pytest.raises(UnsupportedModelError, match=r"'blk\.0.attn_gate\.weight' is not known of"):
        Checkpoint.open(model.write(tmp_path / "x.gguf"))


def test_a_window_of_all_layers(tmp_path: Path) -> None:
    spec = load_spec(tiny(llama__attention__sliding_window=17).write(tmp_path / "x.gguf"))
    assert [layer.sliding_window for layer in spec.layers] == [17]


def test_a_vocabulary_alone_is_no_model(tmp_path: Path) -> None:
    path = Gguf(dict(TINY), {}).write(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match=r"tensor 'token_embd\.weight' is missing"):
        Checkpoint.open(path)
