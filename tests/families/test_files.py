"""Weights that do not fit a family's config.json, and those that old versions stored besides."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from model.checkpoint import Checkpoint
from model.errors import CheckpointError, UnsupportedModelError
from model.reference import ReferenceModel
from model.safetensors import read_safetensors, write_safetensors
from tests.parity import FAMILIES


def copied(name: str, directory: Path, **added: np.ndarray) -> Path:
    """Copy a fixture, with further tensors."""
    model = Path(shutil.copytree(FAMILIES / name, directory / name))
    if added:
        file = read_safetensors(model / "model.safetensors")
        tensors = {key: file.float32(key) for key in file.entries}
        write_safetensors(model / "model.safetensors", tensors | added)
    return model


def test_the_causal_masks_of_old_gpt2_checkpoints_are_left_out(tmp_path: Path) -> None:
    mask = np.tril(np.ones((1, 1, 4, 4), np.float32))
    model = copied("gpt2", tmp_path, **{"transformer.h.0.attn.bias": mask})
    expected = ReferenceModel.from_checkpoint(Checkpoint.open(FAMILIES / "gpt2"))
    actual = ReferenceModel.from_checkpoint(Checkpoint.open(model))
    np.testing.assert_array_equal(actual.forward([1, 2, 3]), expected.forward([1, 2, 3]))


def test_a_tensor_that_gpt2_does_not_have_is_refused(tmp_path: Path) -> None:
    added = {"transformer.h.1.attn.q_norm.weight": np.ones(8, np.float32)}
    with pytest.raises(UnsupportedModelError, match=r"'transformer\.h\.1\.attn\.q_norm\.weight'"):
        Checkpoint.open(copied("gpt2", tmp_path, **added))


def test_a_part_that_is_tied_and_has_another_head_is_refused(tmp_path: Path) -> None:
    model = copied("mistral3-sees", tmp_path)
    config = json.loads((model / "config.json").read_text())
    config["tie_word_embeddings"] = True
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"'language_model\.lm_head\.weight'.*differ"):
        Checkpoint.open(model)


def test_fused_matrices_of_another_size_are_refused(tmp_path: Path) -> None:
    model = copied("phi3", tmp_path)
    config = json.loads((model / "config.json").read_text())
    config["num_key_value_heads"] = 4
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"qkv_proj.* has no rows up to 96"):
        Checkpoint.open(model)
    config["num_key_value_heads"] = 1
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"qkv_proj.* 64 rows, but .* makes it 48"):
        Checkpoint.open(model)
