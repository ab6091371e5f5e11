"""The reference against what transformers computed for each random encoder."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from model.checkpoint import Checkpoint
from model.errors import CheckpointError, UnsupportedModelError
from model.families import load_spec
from model.reference import ReferenceModel
from model.spec import ModelSpec, OutputSpec
from model.texts import Texts, split
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


@pytest.mark.parametrize(
    "output",
    [
        OutputSpec("vector", "none"),
        OutputSpec("class", "first"),
        OutputSpec("span", "none", labels=3),
        OutputSpec("vector", "mean", dense=4),
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
