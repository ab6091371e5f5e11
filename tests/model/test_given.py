"""Paths that are no model directory: the message names what is there, and what to do."""

from __future__ import annotations

import json
import os
import pwd
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from model.checkpoint import Checkpoint
from model.errors import CheckpointError, ModelError, TokenizerError
from model.families import load_spec
from model.hub import parse_name
from model.tokenizer import Tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures"
POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4" * 64 + b"\nsize 162664\n"
)
GGUF = b"GGUF\x03\x00\x00\x00" + b"{" + bytes(100)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    directory = tmp_path / "llama"
    shutil.copytree(FIXTURES / "llama", directory)
    return directory


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cached(hub: Path, name: str, *commits: str) -> Path:
    """A model in a hub's cache, with links to blobs as the hub's client makes them."""
    folder = hub / f"models--{name.replace('/', '--')}"
    (folder / "blobs").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commits[0])
    for commit in commits:
        snapshot = folder / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for path in (FIXTURES / "llama").iterdir():
            blob = folder / "blobs" / f"{commit}-{path.name}"
            shutil.copy(path, blob)
            (snapshot / path.name).symlink_to(Path("..", "..", "blobs", blob.name))
    return folder


def refusal(given: Path, open_model: Callable[[Path], object] = Checkpoint.open) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_model(given)
    message = str(caught.value)
    assert message.isprintable()
    assert "header" not in message
    return message


def put(directory: Path, **files: bytes) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (directory / name.replace("__", ".")).write_bytes(data)
    return directory


@pytest.mark.parametrize(
    "given",
    ["meta-llama/Llama-3.2-1B", "Qwen/Qwen2.5-0.5B-Instruct", "hf://Qwen/Qwen2.5-0.5B-Instruct",
     "https://huggingface.co/meta-llama/Llama-3.2-1B/tree/main", "https://hf.co/facebook/opt-125m"],
)  # fmt: skip
@pytest.mark.parametrize("open_model", [Checkpoint.open, load_spec])
def test_a_hubs_name_is_told_from_a_path(given: str, open_model: Callable[[Path], object]) -> None:
    name = parse_name(given)
    assert name is not None
    message = refusal(Path(given), open_model)
    assert "the name of a model on a hub" in message
    assert f"shoal pull {name.repo}" in message


def test_a_hubs_name_that_was_fetched_is_found_in_the_cache(own_cache: Path) -> None:
    folder = cached(own_cache, "meta-llama/Llama-3.2-1B", COMMIT)
    message = refusal(Path("meta-llama/Llama-3.2-1B"))
    assert message.endswith(f"give {folder / 'snapshots' / COMMIT}")


@pytest.mark.parametrize("text", ["./a/b", "/a/b", "a/b/c", "../a", "a", "~/a", "", "a b/c"])
def test_a_path_is_no_hubs_name(text: str) -> None:
    assert parse_name(text) is None


def test_a_wrong_path_says_how_far_it_is_right(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = refusal(tmp_path / "models" / "llama")
    assert f"({tmp_path} has no models)" in message
    assert f"on {os.uname().nodename}" in message
    assert "has no weights" in refusal(llama / "config.json" / "weights")
    assert "shoal pull ORG/NAME" in refusal(Path("gpt2"))
    monkeypatch.chdir(tmp_path)
    assert f"({llama} has no lama)" in refusal(Path("llama/lama"))
    assert "only outside quotes" in refusal(Path("~/models/llama"))
    gone = tmp_path / "gone"
    gone.symlink_to(tmp_path / "nowhere")
    assert f"a link to {tmp_path / 'nowhere'}, which does not exist" in refusal(gone)
    assert "cannot be read" in refusal(tmp_path / ("x" * 300))


@pytest.mark.parametrize("below", ["", "snapshots", "refs", "blobs"])
def test_a_folder_of_the_hubs_cache_names_the_snapshot(own_cache: Path, below: str) -> None:
    older = "f" * 40
    folder = cached(own_cache, "facebook/opt-125m", COMMIT, older)
    message = refusal(folder / below)
    assert "of the hub's cache" in message
    assert message.endswith(str(folder / "snapshots" / COMMIT))
    assert Checkpoint.open(folder / "snapshots" / older).spec.layers


def test_the_hubs_cache_itself_and_broken_ones(own_cache: Path) -> None:
    folder = cached(own_cache, "facebook/opt-125m", COMMIT)
    assert str(folder / "snapshots" / COMMIT) in refusal(own_cache)
    snapshot = folder / "snapshots" / COMMIT
    (folder / "blobs" / f"{COMMIT}-model.safetensors").unlink()
    assert "model.safetensors is a link to a file that is missing" in refusal(snapshot)
    (folder / "blobs" / f"{COMMIT}-config.json").unlink()
    assert "config.json is a link to a file that is missing" in refusal(snapshot)
    assert "without a snapshot: run `shoal pull facebook/opt-125m`" in refusal(folder)


def test_gguf_files_and_folders(tmp_path: Path, llama: Path) -> None:
    folder = put(tmp_path / "gguf", model_q4__gguf=GGUF[:20], README__md=b"# A model")
    for given in (folder, folder / "model_q4.gguf"):
        assert "model_q4.gguf: too short for a GGUF file" in refusal(given)
    put(folder, mmproj__gguf=GGUF, other__gguf=GGUF)
    assert refusal(folder).endswith(
        "a folder with 2 GGUF models: give the path of one: model_q4.gguf, other.gguf"
    )
    (llama / "model.safetensors").unlink()
    put(llama, a__gguf=GGUF, b__gguf=GGUF, c__gguf=GGUF, d__gguf=GGUF)
    assert "give the path of one: a.gguf, b.gguf, c.gguf and 1 more" in refusal(llama)
    put(llama, model__safetensors=GGUF)
    assert "not a safetensors file, but a GGUF file" in refusal(llama)


def test_an_adapter_names_its_base(tmp_path: Path, llama: Path) -> None:
    config = json.dumps({"base_model_name_or_path": "meta-llama/Llama\x1b[2J-3.2-1B"}).encode()
    weights = (llama / "model.safetensors").read_bytes()
    lora = put(tmp_path / "lora", adapter_config__json=config, adapter_model__safetensors=weights)
    message = refusal(lora)
    assert "an adapter (LoRA) of meta-llama/Llama?[2J-3.2-1B without its base model" in message
    assert f"run `shoal load 'meta-llama/Llama?[2J-3.2-1B' --adapter {lora}`" in message
    (llama / "model.safetensors").unlink()
    put(llama, adapter_config__json=b"[]", adapter_model__safetensors=weights)
    assert "an adapter (LoRA) without its base model" in refusal(llama)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "model.safetensors.index.json"]
)
def test_a_pointer_of_git_lfs_is_named(llama: Path, name: str) -> None:
    if name.endswith("index.json"):
        (llama / "model.safetensors").unlink()
    (llama / name).write_bytes(POINTER)
    message = refusal(llama)
    assert name in message
    assert "git-lfs pointer instead of the file itself: run `git lfs pull`" in message
    assert "git-lfs pointer" in refusal(llama / name)


def test_pointers_of_a_tokenizer_are_named(llama: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (llama / name).write_bytes(POINTER)
        with pytest.raises(TokenizerError, match=rf"{name}: .*git-lfs pointer"):
            Tokenizer.load(llama)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"<!DOCTYPE html><html>", "a web page, not the file: the download failed"),
        (b"\n<HTML><body>", "a web page"),
        (b'{"error": "Repository not found"}', "an answer of a server"),
        (b"Entry not found", "a refusal of the hub"),
        (b"PK\x03\x04" + bytes(99), "a zip archive or a PyTorch pickle"),
        (b"\x80\x02}q\x00(X\x04" + bytes(99), "a pickle, which can run any code"),
        (b"\x1f\x8b\x08" + bytes(99), "a gzip archive"),
        (b"\x00\xff" * 90, "not a safetensors file, nor its beginning"),
        (b"", "too short for a safetensors file"),
    ],
)
def test_weights_that_are_something_else(llama: Path, data: bytes, said: str) -> None:
    (llama / "model.safetensors").write_bytes(data)
    assert said in refusal(llama)


def test_truncated_weights_are_told_from_foreign_ones(llama: Path) -> None:
    path = llama / "model.safetensors"
    data = path.read_bytes()
    for size_bytes in (9, 100, 600):
        path.write_bytes(data[:size_bytes])
        with pytest.raises(CheckpointError, match=rf"has {size_bytes} bytes, .*fetch it again"):
            Checkpoint.open(llama)
    # Lengths of headers whose bytes are a pickle's magic.
    for length in (0x0280, 0x0480):
        path.write_bytes(length.to_bytes(8, "little") + b'{"__metadata__"')
        with pytest.raises(CheckpointError, match=rf"its header alone {length}; truncated"):
            Checkpoint.open(llama)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "not a model: it has no config.json, nor anything else"),
        (
            {"pytorch_model__bin": b"PK\x03\x04"},
            "pickle checkpoints (pytorch_model.bin), which can",
        ),
        ({"model__safetensors": b"x"}, "weights without config.json; is the download complete?"),
        ({"tokenizer__json": b"{}"}, "not a model: it has no config.json (expected a directory as"),
        ({"params__json": b"{}", "consolidated_00__pth": b"x"}, "in its maker's own format"),
        ({"model_index__json": b"{}"}, "a pipeline of diffusers"),
        ({"tf_model__h5": b"x"}, "weights of another framework (tf_model.h5)"),
        ({"model__safetensors__part": b"x"}, "an unfinished download (model.safetensors.part)"),
        ({"model-00001-of-00002__safetensors": b"x"}, "without model.safetensors.index.json"),
    ],
)
def test_a_folder_without_a_config(tmp_path: Path, files: dict[str, bytes], said: str) -> None:
    assert said in refusal(put(tmp_path / "given", **files))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pytorch_model.bin", "pickle checkpoints (pytorch_model.bin), which can run any code"),
        ("model-00001-of-00002.safetensors", "without model.safetensors.index.json; complete the"),
        ("weights.safetensors", "no model.safetensors, but weights.safetensors: is it the whole"),
        ("model.safetensors.incomplete", "an unfinished download (model.safetensors.incomplete)"),
    ],
)
def test_a_folder_without_the_usual_weights(llama: Path, name: str, said: str) -> None:
    (llama / "model.safetensors").rename(llama / name)
    assert said in refusal(llama)


def test_a_folder_of_models_names_them(tmp_path: Path, llama: Path) -> None:
    assert refusal(tmp_path).endswith(f"no config.json, but folders in it have: give {llama}")
    nested = tmp_path / "org" / "opt"
    shutil.copytree(FIXTURES / "opt-pre", nested)
    assert refusal(tmp_path).endswith(f"give {llama} or {nested}")


def test_a_file_of_a_model_names_the_folder(llama: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert refusal(llama / name).endswith(f"give the folder that it is in, {llama}")
    alone = tmp_path / "model.safetensors"
    shutil.copy(llama / "model.safetensors", alone)
    assert "weights alone are no model" in refusal(alone)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert "neither a folder nor a file" in refusal(pipe)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")
def test_a_closed_folder_names_who_may_not_read_it(llama: Path) -> None:
    llama.chmod(0o700)
    os.seteuid(pwd.getpwnam("nobody").pw_uid)
    try:
        assert "the user nobody may not read it" in refusal(llama)
    finally:
        os.seteuid(0)


@pytest.mark.parametrize(
    ("name", "open_model"),
    [
        ("config.json", Checkpoint.open),
        ("model.safetensors", Checkpoint.open),
        ("model.gguf", Checkpoint.open),
        ("adapter_config.json", lambda given: Checkpoint.open(FIXTURES / "llama", given)),
        ("tokenizer.json", Tokenizer.load),
        ("tokenizer_config.json", Tokenizer.load),
        ("chat_template.jinja", Tokenizer.load),
    ],
)
def test_nobody_waits_for_a_pipe(
    llama: Path, name: str, open_model: Callable[[Path], object]
) -> None:
    if name == "model.gguf":
        (llama / "model.safetensors").unlink()
    (llama / name).unlink(missing_ok=True)
    os.mkfifo(llama / name)
    with pytest.raises(ModelError, match=f"{name}: a pipe, not a file"):
        open_model(llama)


def test_every_message_is_a_models_error() -> None:
    with pytest.raises(ModelError):
        load_spec(Path("a\0b"))
