"""Model directories whose files contradict each other: read as transformers does, or refused."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from model.checkpoint import Checkpoint
from model.errors import CheckpointError
from model.safetensors import read_safetensors, write_safetensors

FIXTURES = Path(__file__).parents[1] / "fixtures"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

Tensors = dict[str, npt.NDArray[Any]]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / "llama", tmp_path / "llama"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / "mistral", tmp_path / "mistral"))


def tensors_of(*paths: Path) -> Tensors:
    files = [read_safetensors(path) for path in paths]
    return {name: np.array(file.map(name)) for file in files for name in file.entries}


def bfloat16_of(*paths: Path) -> frozenset[str]:
    entries = [entry for path in paths for entry in read_safetensors(path).entries.values()]
    return frozenset(entry.name for entry in entries if entry.dtype == "BF16")


def put_whole(sharded: Path) -> None:
    """Put a model of zeros beside the shards, in one file."""
    shards = sorted(sharded.glob("model-*.safetensors"))
    zeros = {name: np.zeros_like(array) for name, array in tensors_of(*shards).items()}
    write_safetensors(sharded / SINGLE, zeros, bfloat16=bfloat16_of(*shards))


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("shards_are_there", [True, False])
def test_a_whole_file_wins_over_an_index(
    sharded: Path, shards_are_there: bool, caplog: pytest.LogCaptureFixture
) -> None:
    put_whole(sharded)
    if not shards_are_there:
        for shard in sharded.glob("model-*.safetensors"):
            shard.unlink()
    checkpoint = Checkpoint.open(sharded)
    Checkpoint.open(sharded)
    assert not checkpoint.block(0)["tokens.weight"].any()
    (line,) = lines(caplog)
    assert "ignored, the weights are model.safetensors" in line
    assert ("model-00001-of" in line) == shards_are_there
    assert INDEX in line or "more" in line


@pytest.mark.parametrize("text", ["", "{}", '{"weight_map": {"a": "../b.safetensors"}}'])
def test_a_damaged_index_beside_a_whole_file_is_ignored(
    llama: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    (llama / INDEX).write_text(text)
    Checkpoint.open(llama)
    assert [INDEX in line for line in lines(caplog)] == [True]


def test_an_index_of_the_whole_file_is_no_contradiction(
    llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = read_safetensors(llama / SINGLE).entries
    (llama / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, SINGLE)}))
    Checkpoint.open(llama)
    assert not lines(caplog)


def test_a_whole_file_that_lacks_tensors_is_named(sharded: Path) -> None:
    tensors = tensors_of(*sharded.glob("model-*.safetensors"))
    tensors.pop("model.norm.weight")
    write_safetensors(sharded / SINGLE, tensors)
    with pytest.raises(CheckpointError, match=r"is in none of its files \(model\.safetensors\)"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("name", ["consolidated.safetensors", "model-00001-of-00009.safetensors"])
def test_weights_beside_the_model_are_named(
    llama: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(llama / SINGLE, llama / name)
    assert Checkpoint.open(llama).spec == Checkpoint.open(FIXTURES / "llama").spec
    (line,) = lines(caplog)
    assert f"{name} ignored" in line


@pytest.mark.parametrize("fixture", ["llama", "sharded"])
def test_an_adapter_beside_a_model_is_not_left_out_in_silence(
    fixture: str, request: pytest.FixtureRequest
) -> None:
    directory: Path = request.getfixturevalue(fixture)
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: adapters .* merge it"):
        Checkpoint.open(directory)


def test_an_index_that_has_tensors_in_the_wrong_files_is_named(
    sharded: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = json.loads((sharded / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    moved = {"model.norm.weight", "lm_head.weight"}
    for name in moved:
        index["weight_map"][name] = files[0]
        assert name not in read_safetensors(sharded / files[0]).entries
    index["weight_map"].setdefault("x", files[-1])
    (sharded / INDEX).write_text(json.dumps(index))
    np.testing.assert_array_equal(
        Checkpoint.open(sharded).block(0)["tokens.weight"],
        Checkpoint.open(FIXTURES / "mistral").block(0)["tokens.weight"],
    )
    (line,) = lines(caplog)
    assert all(name in line for name in moved)
    assert "not in the files that the index names" in line


@pytest.mark.parametrize("change", ["none", "one value", "rows", "width"])
def test_a_head_that_config_json_denies(
    tmp_path: Path, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    directory = Path(shutil.copytree(FIXTURES / "qwen2", tmp_path / "qwen2"))
    path = directory / SINGLE
    tensors = tensors_of(path)
    assert "lm_head.weight" not in tensors
    head = tensors["model.embed_tokens.weight"].copy()
    if change == "one value":
        head[-1, -1] += 1
    elif change == "rows":
        head = head[:-1]
    elif change == "width":
        head = head.astype(np.float64)
    write_safetensors(path, tensors | {"lm_head.weight": head}, bfloat16=bfloat16_of(path))
    if change in ("none", "width"):
        Checkpoint.open(directory)
        assert not lines(caplog)
    else:
        with pytest.raises(CheckpointError, match="the weights have both and they differ"):
            Checkpoint.open(directory)


def test_layers_that_config_json_does_not_have_are_named(
    llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = llama / "config.json"
    config = json.loads(path.read_text())
    config["num_hidden_layers"] -= 1
    path.write_text(json.dumps(config))
    Checkpoint.open(llama)
    (line,) = lines(caplog)
    assert f"model.layers.{config['num_hidden_layers']}." in line
    assert "not used: config.json describes no such part" in line


@pytest.mark.parametrize("directory", sorted(FIXTURES.iterdir()), ids=lambda path: path.name)
def test_models_that_say_one_thing_are_loaded_without_a_word(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Checkpoint.open(directory)
    assert not lines(caplog)
