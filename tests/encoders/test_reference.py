"""The reference against what transformers computed for each random encoder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.checkpoint import Checkpoint
from model.errors import CheckpointError, UnsupportedModelError
from model.families import load_spec
from model.families.embedders import takes_lower_case
from model.position_bias import buckets_of
from model.reference import ReferenceModel
from model.spec import ModelSpec, OutputSpec
from model.texts import Texts, pooled, split
from tests.encoder_cases import ENCODERS, NAMES, Golden

ATOL = 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_hidden_rows_and_results_equal_transformers(name: str) -> None:
    golden = Golden.load(name)
    checkpoint = Checkpoint.open(ENCODERS / name)
    spec = checkpoint.spec
    blocks = [checkpoint.block(block) for block in range(spec.block_count)]
    body = ReferenceModel(spec, blocks[:-1]).encode(golden.tokens, golden.texts)
    head = ReferenceModel(spec, blocks[-1:], first_block=spec.head_block)
    if not spec.final_norm:
        np.testing.assert_allclose(body, golden.hidden, atol=ATOL)
    result = head.encode(body, golden.texts)
    np.testing.assert_allclose(result, golden.output, atol=ATOL)
    np.testing.assert_array_equal(result.argmax(axis=-1), golden.output.argmax(axis=-1))
    assert ModelSpec.from_dict(spec.to_dict()) == spec


def test_norms_by_their_old_names_are_read(tmp_path: Path) -> None:
    tensors = Checkpoint.open(ENCODERS / "bert").tensors
    assert any(name.endswith("LayerNorm.gamma") for name in tensors)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"is_decoder": True}, "is_decoder"),
        ({"architectures": ["BertForMultipleChoice"]}, "ForQuestionAnswering"),
        ({"hidden_act": "xielu"}, "hidden_act"),
    ],
)
def test_options_that_change_numbers_are_refused(
    tmp_path: Path, change: dict[str, object], said: str
) -> None:
    config = json.loads((ENCODERS / "bert" / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=said):
        load_spec(tmp_path)


def test_steps_of_sentence_transformers_that_are_unknown_are_refused(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(ENCODERS / "minilm", model)
    modules = json.loads((model / "modules.json").read_text())
    modules[2]["type"] = "sentence_transformers.models.WordWeights"
    (model / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UnsupportedModelError, match="WordWeights"):
        load_spec(model)
    (model / "modules.json").write_text(json.dumps(modules[:1]))
    with pytest.raises(CheckpointError, match="no Pooling step"):
        load_spec(model)
    modules[1]["path"] = "../1_Pooling"
    (model / "modules.json").write_text(json.dumps(modules[:2]))
    with pytest.raises(CheckpointError, match=r"modules.json: not a list of steps"):
        load_spec(model)


@pytest.mark.parametrize("name", ["minilm", "mpnet", "gemma3-embed"])
def test_a_text_is_as_long_at_most_as_the_model_was_trained_for(tmp_path: Path, name: str) -> None:
    model = Path(shutil.copytree(ENCODERS / name, tmp_path / name))
    length = model / "sentence_bert_config.json"
    length.write_text('{"max_seq_length": 16, "do_lower_case": false}')
    whole, cut = Checkpoint.open(ENCODERS / name), Checkpoint.open(model)
    assert whole.spec.max_context > 16
    assert cut.spec.max_context == 16
    for block in range(whole.spec.block_count):
        ours, theirs = cut.block(block), whole.block(block)
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[one], theirs[one]) for one in ours)
    length.write_text('{"max_seq_length": 100000}')
    assert load_spec(model).max_context == whole.spec.max_context
    length.write_text('{"max_seq_length": -1}')
    with pytest.raises(CheckpointError, match="max_seq_length -1 is not a number of tokens"):
        load_spec(model)


def test_the_length_that_a_tokenizer_names_counts_without_another(tmp_path: Path) -> None:
    model = Path(shutil.copytree(ENCODERS / "minilm", tmp_path / "minilm"))
    whole = load_spec(model).max_context
    for length, expected in ((20, 20), (int(1e30), whole), (1e30, whole), (None, whole)):
        text = json.dumps({"model_max_length": length})
        (model / "tokenizer_config.json").write_text(text)
        assert load_spec(model).max_context == expected
    (model / "tokenizer_config.json").write_text('{"model_max_length": 20}')
    (model / "sentence_bert_config.json").write_text('{"max_seq_length": 30}')
    assert load_spec(model).max_context == 30


def test_older_names_of_the_file_about_texts_are_read(tmp_path: Path) -> None:
    model = Path(shutil.copytree(ENCODERS / "roberta", tmp_path / "roberta"))
    text = '{"max_seq_length": 16, "do_lower_case": true}'
    (model / "sentence_roberta_config.json").write_text(text)
    assert load_spec(model).max_context == 16
    assert takes_lower_case(model)
    (model / "sentence_bert_config.json").write_text('{"max_seq_length": 17}')  # The first counts.
    assert load_spec(model).max_context == 17
    assert not takes_lower_case(model)


@pytest.mark.parametrize("name", ["minilm", "gemma3-embed"])
def test_a_vector_may_be_cut(tmp_path: Path, name: str) -> None:
    """truncate_dim keeps the first values as they are, also behind the division by the length."""
    model = Path(shutil.copytree(ENCODERS / name, tmp_path / name))
    golden, width = Golden.load(name), load_spec(model).output_width
    for kept, left in ((8, 8), (width, width), (1000, width), (None, width)):
        settings = json.dumps({"truncate_dim": kept})
        (model / "config_sentence_transformers.json").write_text(settings)
        checkpoint = Checkpoint.open(model)
        assert checkpoint.spec.output_width == left
        assert ModelSpec.from_dict(checkpoint.spec.to_dict()) == checkpoint.spec
        found = ReferenceModel.from_checkpoint(checkpoint).encode(golden.tokens, golden.texts)
        np.testing.assert_allclose(found, golden.output[:, :left], atol=ATOL)
    (model / "config_sentence_transformers.json").write_text('{"truncate_dim": "8"}')
    with pytest.raises(CheckpointError, match="truncate_dim '8' is not a number of values"):
        load_spec(model)


def changed_modules(directory: Path, name: str, change: Callable[[list[Any]], list[Any]]) -> Path:
    """A copy of a fixture with other steps."""
    model = Path(shutil.copytree(ENCODERS / name, directory / name))
    modules = json.loads((model / "modules.json").read_text())
    (model / "modules.json").write_text(json.dumps(change(modules)))
    return model


def test_steps_in_another_order_are_refused(tmp_path: Path) -> None:
    model = changed_modules(tmp_path, "gemma3-embed", lambda steps: [*steps[:2], *steps[:1:-1]])
    with pytest.raises(UnsupportedModelError, match=r"in the order .*Normalize, Dense"):
        load_spec(model)


@pytest.mark.parametrize(
    ("values", "error", "said"),
    [
        (
            {"activation_function": "torch.nn.modules.activation.GELU"},
            UnsupportedModelError,
            "GELU",
        ),
        ({"in_features": 31}, CheckpointError, "rows of 32 values"),
        ({"out_features": -1}, CheckpointError, "out_features"),
        ({"use_residual": True}, UnsupportedModelError, "use_residual = true"),
        (
            {"module_input_name": "token_embeddings"},
            UnsupportedModelError,
            "module_input_name = 'token_embeddings'",
        ),
    ],
)
def test_linear_steps_that_cannot_be_are_refused(
    tmp_path: Path, values: dict[str, object], error: type[Exception], said: str
) -> None:
    model = changed_modules(tmp_path, "gemma3-embed", lambda steps: steps)
    path = model / "2_Dense" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(error, match=said):
        load_spec(model)


def test_the_weights_of_a_linear_step_belong_to_the_model(tmp_path: Path) -> None:
    model = changed_modules(tmp_path, "gemma3-embed", lambda steps: steps)
    before = Checkpoint.open(model).fingerprint
    weights = model / "2_Dense" / "model.safetensors"
    os.utime(weights, (1, 1))
    assert Checkpoint.open(model).fingerprint != before
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"2_Dense: model.safetensors is missing"):
        Checkpoint.open(model)


@pytest.mark.parametrize(
    ("modes", "said"),
    [
        (("cls_token", "max_tokens"), "pooling cls_token, max_tokens is not implemented"),
        (("chance",), "pooling chance"),
    ],
)
def test_other_poolings_are_refused(tmp_path: Path, modes: tuple[str, ...], said: str) -> None:
    model = changed_modules(tmp_path, "minilm", lambda steps: steps)
    values = {f"pooling_mode_{name}": True for name in modes}
    (model / "1_Pooling" / "config.json").write_text(json.dumps(values))
    with pytest.raises(UnsupportedModelError, match=said):
        load_spec(model)


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [("first", [1, 7]), ("last", [4, 7]), ("mean", [2.5, 7]), ("max", [4, 7]),
     ("mean_sqrt_len", [5, 7]), ("weighted_mean", [3, 7])],
)  # fmt: skip
def test_a_text_has_one_row(pooling: str, expected: list[float]) -> None:
    rows = np.array([[1], [2], [3], [4], [7]], np.float32)
    np.testing.assert_allclose(pooled(rows, Texts.plain(4, 1), pooling)[:, 0], expected)


def test_far_distances_share_biases_as_in_mpnet() -> None:
    """The rows that transformers' MPNet takes for a token at these distances from the first."""
    rows = buckets_of(513, 32)
    at = [0, 1, 7, 8, 11, 12, 15, 16, 22, 23, 31, 32, 45, 46, 63, 64, 90, 91, 127, 128, 512]
    expected = [0, 1, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15, 15, 15]
    assert rows[:, 0][at].tolist() == expected
    assert rows[0][at].tolist() == [
        row + 16 if place else 0 for row, place in zip(expected, at, strict=True)
    ]


@pytest.mark.parametrize(
    "output",
    [
        OutputSpec("vector", "none"),
        OutputSpec("class", "first"),
        OutputSpec("span", "none", labels=3),
        OutputSpec("vector", "mean", dense=4),
        OutputSpec("vector", "mean", columns=33),
        OutputSpec("tokens", "none", labels=3, columns=2),
    ],
)
def test_outputs_that_make_no_sense_are_refused(output: OutputSpec) -> None:
    plain = load_spec(ENCODERS / "bert").to_dict() | {"output": asdict(output)}
    with pytest.raises(UnsupportedModelError, match="inconsistent output"):
        ModelSpec.from_dict(plain)


def test_layers_that_see_later_tokens_need_an_output() -> None:
    plain = load_spec(ENCODERS / "bert").to_dict() | {"output": None}
    with pytest.raises(UnsupportedModelError, match="inconsistent"):
        ModelSpec.from_dict(plain)


def test_texts_of_similar_length_share_passes() -> None:
    assert split([3, 9, 2, 30, 4], 10) == [[2, 0, 4], [1], [3]]
    assert split([], 10) == []


@pytest.mark.parametrize(
    ("lengths", "seconds"), [((), ()), ((3,), ()), ((0,), (0,)), ((3,), (4,)), ((3,), (-1,))]
)
def test_false_bounds_are_seen(lengths: tuple[int, ...], seconds: tuple[int, ...]) -> None:
    assert not Texts(lengths, seconds).are_sound
