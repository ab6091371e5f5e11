"""Names of models on a hub, and what this machine's cache has for them. No connection is opened."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from model.errors import HubError
from model.hub import (
    DESCRIPTIONS,
    OLLAMA_NAMES,
    HubName,
    cache_directory,
    cached_model,
    cached_repo,
    choose_gguf,
    is_loaded_from,
    is_open_to_others,
    is_whole,
    lacks_weights,
    named_model,
    ollama_advice,
    on_this_machine,
    parse_name,
    pieces_of,
    resolved,
    served_name,
    snapshot,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "f" * 40


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def put(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def cached(cache: Path, commit: str, *names: str, repo: str = "org/tiny") -> Path:
    folder = cache / f"models--{repo.replace('/', '--')}"
    return put(folder / "snapshots" / commit, *names)


# ---- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Qwen/Qwen3-0.6B", HubName("Qwen/Qwen3-0.6B")),
        ("Qwen/Qwen3-0.6B@v1.0", HubName("Qwen/Qwen3-0.6B", "v1.0")),
        ("Qwen/Qwen3-0.6B@refs/pr/3", HubName("Qwen/Qwen3-0.6B", "refs/pr/3")),
        ("unsloth/X-GGUF:Q4_K_M", HubName("unsloth/X-GGUF", None, "Q4_K_M")),
        ("unsloth/X-GGUF@main:a/b.gguf", HubName("unsloth/X-GGUF", "main", "a/b.gguf")),
        ("hf://Qwen/Qwen3-0.6B", HubName("Qwen/Qwen3-0.6B")),
        ("hf:/Qwen/Qwen3-0.6B:Q8_0", HubName("Qwen/Qwen3-0.6B", None, "Q8_0")),
        ("https://huggingface.co/Qwen/Qwen3-0.6B", HubName("Qwen/Qwen3-0.6B")),
        ("https:/hf.co/Qwen/Qwen3-0.6B/tree/v2", HubName("Qwen/Qwen3-0.6B", "v2")),
        (
            "https://huggingface.co/o/n/resolve/main/n-Q4_0.gguf?download=true",
            HubName("o/n", "main", "n-Q4_0.gguf"),
        ),
    ],
)
def test_names(text: str, name: HubName) -> None:
    assert parse_name(text) == name
    assert parse_name(str(name)) == name


@pytest.mark.parametrize(
    "text",
    ["", "gpt2", "./org/tiny", "/org/tiny", "../org/tiny", "a/b/c", "org/ti ny", "org/tiny@",
     "org/tiny@../x", "org/tiny@a/../b", "org/tiny:", "org/tiny:../x", "-x/y", "a--b/c",
     "~/models/llama", "org/tiny\n", "https://example.org/org/tiny", "llama3.2:1b"],
)  # fmt: skip
def test_what_is_no_name(text: str) -> None:
    assert parse_name(text) is None


def test_a_path_on_this_machine_is_no_name(tmp_path: Path) -> None:
    assert named_model("org/tiny") == HubName("org/tiny")
    (tmp_path / "org").mkdir()
    assert named_model("org/tiny") is None
    assert named_model("hf://org/tiny") == HubName("org/tiny")


def test_ollamas_names() -> None:
    assert "`shoal pull meta-llama/Llama-3.2-1B-Instruct`" in str(ollama_advice("llama3.2:1b"))
    assert "Qwen/Qwen3-8B" in str(ollama_advice("qwen3:latest"))
    assert "search=solar finds" in str(ollama_advice("solar:10.7b"))
    for text in ("opt-350m", "Qwen/Qwen3-0.6B", "models"):
        assert ollama_advice(text) is None
    for known, repo in OLLAMA_NAMES.items():
        assert parse_name(repo) == HubName(repo)
        assert repo in str(ollama_advice(known))


# ---- the cache ---------------------------------------------------------------------------------


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """As huggingface_hub says, whose own constant is read at import."""
    settings = {
        "HF_HUB_CACHE": ("/a", "/a"),
        "HUGGINGFACE_HUB_CACHE": ("/b", "/b"),
        "HF_HOME": ("~/c", str(Path("~/c/hub").expanduser())),
        "XDG_CACHE_HOME": ("$ROOT/d", "/root-of-it/d/huggingface/hub"),
    }
    monkeypatch.setenv("ROOT", "/root-of-it")
    for variable, (value, _) in settings.items():
        monkeypatch.setenv(variable, value)
    for variable, (_, place) in settings.items():
        assert str(cache_directory()) == place
        monkeypatch.delenv(variable)
    assert cache_directory() == Path.home() / ".cache" / "huggingface" / "hub"


def test_a_snapshot_is_that_of_main_else_the_newest(cache: Path) -> None:
    old = cached(cache, COMMIT, "config.json")
    new = cached(cache, OTHER, "config.json")
    cached(cache, "e" * 40, "README.md")
    os.utime(old, (1, 1))
    folder = old.parents[1]
    assert snapshot(folder) == new
    put(folder / "refs")
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "refs" / "v2").write_text(OTHER)
    assert snapshot(folder) == old
    assert snapshot(folder, "v2") == new
    assert snapshot(folder, COMMIT[:10]) == old
    assert snapshot(folder, COMMIT[:3]) is None
    assert snapshot(folder, "v3") is None
    assert snapshot(cache / "models--org--none") is None
    (folder / "refs" / "main").write_text("x" * 1000)
    assert snapshot(folder) == new


def test_a_model_is_whole_with_every_shard_of_its_index(cache: Path) -> None:
    path = cached(cache, COMMIT, "config.json", "model-00001-of-00002.safetensors")
    index = path / "model.safetensors.index.json"
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    index.write_text(json.dumps({"weight_map": dict(zip("ab", shards, strict=True))}))
    assert not is_whole(path)
    assert cached_model(HubName("org/tiny")) is None
    put(path, shards[1])
    assert cached_model(HubName("org/tiny")) == path
    for damaged in (
        "",
        "[]",
        '{"weight_map": {}}',
        '{"weight_map": [1]}',
        '{"weight_map": {"a": 1}}',
    ):
        index.write_text(damaged)
        assert not is_whole(path)
    (path / "config.json").unlink()
    put(path, "model.safetensors")
    assert not is_whole(path)


def test_a_link_to_a_lost_blob_is_not_there(cache: Path) -> None:
    path = cached(cache, COMMIT, "config.json")
    (path / "model.safetensors").symlink_to(path / "lost")
    (path / "tiny-Q4_0.gguf").symlink_to(path / "lost")
    assert cached_model(HubName("org/tiny")) is None
    assert cached_model(HubName("org/tiny", file="Q4_0")) is None


def test_no_file_is_described_twice() -> None:
    assert len(set(DESCRIPTIONS)) == len(DESCRIPTIONS)


def test_weights_are_lacking_beside_descriptions_only(tmp_path: Path) -> None:
    path = put(tmp_path / "model", "config.json", "tokenizer.json")
    put(path / "additional_chat_templates", "tool_use.jinja")
    assert lacks_weights(path)
    put(path, "pytorch_model.bin")
    assert not lacks_weights(path)
    assert not lacks_weights(tmp_path / "none")
    assert not lacks_weights(put(tmp_path / "empty"))


def test_a_folder_of_the_cache_stands_for_its_snapshot(cache: Path, tmp_path: Path) -> None:
    path = cached(cache, COMMIT, "config.json", "model.safetensors")
    assert resolved(path.parents[1]) == path
    assert resolved(path) == path
    assert resolved(tmp_path / "other") == tmp_path / "other"
    gguf = cached(cache, COMMIT, "a-Q4_0.gguf", repo="org/a")
    assert resolved(gguf.parents[1]) == gguf / "a-Q4_0.gguf"
    put(gguf, "a-Q8_0.gguf")
    with pytest.raises(HubError, match="has several models: Q4_0, Q8_0"):
        resolved(gguf.parents[1])
    empty = put(cache / "models--org--empty")
    assert resolved(empty) == empty


def test_a_coordinator_finds_names_in_its_cache(cache: Path, tmp_path: Path) -> None:
    path = cached(cache, COMMIT, "config.json", "model.safetensors")
    assert on_this_machine(Path("org/tiny")) == path
    assert on_this_machine(path.parents[1]) == path
    assert on_this_machine(tmp_path) == tmp_path
    with pytest.raises(HubError) as caught:
        on_this_machine(Path("org/none@v1:Q4_0"))
    assert str(caught.value) == (
        f"org/none@v1:Q4_0 is not in {cache} on {socket.gethostname()}: run"
        " `shoal pull org/none@v1:Q4_0` there"
    )


def test_a_cache_below_a_private_folder_is_not_open_to_others(tmp_path: Path) -> None:
    assert is_open_to_others(Path("/usr/not/there"))
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    assert not is_open_to_others(private / "huggingface" / "hub")


# ---- files and served names --------------------------------------------------------------------


def test_a_gguf_file_is_chosen_by_its_quantization() -> None:
    pieces = tuple(f"Q6_K/x-Q6_K-0000{n}-of-00002.gguf" for n in (1, 2))
    kinds = "Q4_K_M", "IQ4_XS", "UD-Q4_K_XL", "BF16"
    files = [*(f"x-{kind}.gguf" for kind in kinds), "mmproj-F16.gguf", *pieces, "config.json"]
    for asked, chosen in (
        ("q4_k_m", ("x-Q4_K_M.gguf",)),
        ("UD-Q4_K_XL", ("x-UD-Q4_K_XL.gguf",)),
        ("Q4_K_XL", ("x-UD-Q4_K_XL.gguf",)),
        ("x-BF16.gguf", ("x-BF16.gguf",)),
        ("Q6_K", pieces),
        ("x-Q6_K-00001-of-00002.gguf", pieces),
    ):
        assert choose_gguf(files, HubName("o/x", file=asked)) == chosen
    for unclear in (None, "Q4", "F16", "Q5_0"):
        with pytest.raises(HubError, match="Q6_K, BF16, IQ4_XS, Q4_K_M, UD-Q4_K_XL; give one"):
            choose_gguf(files, HubName("o/x", file=unclear))


def test_the_pieces_of_a_gguf_model(tmp_path: Path) -> None:
    names = [f"a-0000{n}-of-00002.gguf" for n in (1, 2)]
    folder = put(tmp_path / "x", *names, "a.gguf", "b-00001-of-00002.gguf")
    assert pieces_of(folder / names[0]) == [folder / name for name in names]
    assert pieces_of(folder / "a.gguf") == [folder / "a.gguf"]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/srv/llama-3.2-1b", "llama-3.2-1b"),
        ("/srv/tiny/model", "tiny"),
        ("/hub/models--Qwen--Qwen3-0.6B/snapshots/0123", "Qwen3-0.6B"),
        ("/hub/models--Qwen--Qwen3-0.6B", "Qwen3-0.6B"),
        ("/hub/models--gpt2/snapshots/0123", "gpt2"),
        ("/hub/models--o--n/snapshots/0123/n-Q4_0.gguf", "n-Q4_0"),
        ("/srv/n-Q4_0-00001-of-00003.gguf", "n-Q4_0"),
        ("/", "model"),
    ],
)
def test_served_names(path: str, name: str) -> None:
    assert served_name(Path(path)) == name


def test_a_loaded_model_is_known_by_its_hubs_name() -> None:
    folder = Path("/hub/models--o--n/snapshots/0123")
    assert cached_repo(folder) == "o/n"
    assert cached_repo(Path("/srv/n")) is None
    assert is_loaded_from(folder, "o/n")
    assert is_loaded_from(folder / "n-Q4_0.gguf", "o/n:q4_0")
    for text in ("o/n:Q8_0", "o/m", "o/n@v1", "n"):
        assert not is_loaded_from(folder / "n-Q4_0.gguf", text)
