"""Models fetched from a local server that speaks the hub's API, into a cache of the test's own."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from model.checkpoint import Checkpoint
from model.errors import HubError
from model.hub import HubName, SeveralFiles, cached_model, parse_name, served_name, snapshot
from model.hub_download import fetch_config, look_up, needed_files, pull
from tests.hub_server import COMMIT, PIECE, Hub, Repo, serve, sha256

FIXTURES = Path(__file__).parents[1] / "fixtures"
NAME = HubName("org/tiny")
LARGE = bytes(range(256)) * (6 * PIECE // 256)
OTHER = "f" * 40


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with serve() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def fixture(name: str = "llama") -> dict[str, bytes]:
    files = (FIXTURES / name).iterdir()
    return {path.name: path.read_bytes() for path in files if path.suffix != ".npz"}


def sized(**files: bytes) -> dict[str, bytes]:
    return {name.replace("__", "."): content for name, content in files.items()}


def refusal(name: HubName = NAME) -> str:
    with pytest.raises(HubError) as caught:
        pull(name)
    message = str(caught.value)
    assert message.isprintable()
    return message


def partials(name: HubName = NAME) -> list[Path]:
    return list((name.folder / "blobs").glob("*.incomplete"))


# ---- what is fetched ---------------------------------------------------------------------------


def test_a_model_is_fetched_and_opened_under_its_name(hub: Hub) -> None:
    extra = {"README.md": b"text", "pytorch_model.bin": b"pickle", "onnx/model.onnx": b"graph"}
    hub.repos["org/tiny"] = Repo(fixture() | extra)
    told: list[tuple[int, int]] = []
    pulled = pull(NAME, lambda done, total: told.append((done, total)))
    assert Checkpoint.open(pulled.path).spec.layers
    assert pulled.path == NAME.folder / "snapshots" / COMMIT == cached_model(NAME)
    assert served_name(pulled.path) == "tiny"
    assert {path.name for path in pulled.path.iterdir()} == set(fixture())
    size = sum(map(len, fixture().values()))
    assert pulled.fetched_bytes == size
    assert told[-1] == (size, size)
    assert told == sorted(told)
    assert pull(NAME).fetched_bytes == 0


def test_the_cache_is_the_one_of_the_hubs_own_library(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are found without a request, and the server answers the library as the hub does."""
    from huggingface_hub import hf_hub_download, scan_cache_dir, try_to_load_from_cache

    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)  # Else a thread of it stays.
    hub.repos["org/tiny"] = Repo(fixture())
    path = pull(NAME).path
    cache = tmp_path / "hub"
    for name in fixture():
        assert try_to_load_from_cache(NAME.repo, name, cache_dir=cache) == str(path / name)
    asked = len(hub.fetched())
    for name in fixture():
        there = hf_hub_download(NAME.repo, name, cache_dir=cache, endpoint=hub.url)
        assert there == str(path / name)
    assert len(hub.fetched()) == asked
    (repo,) = scan_cache_dir(cache).repos
    assert (repo.repo_id, list(repo.refs)) == ("org/tiny", ["main"])
    shutil.rmtree(cache)
    for name in fixture():
        hf_hub_download(NAME.repo, name, cache_dir=cache, endpoint=hub.url)
    assert cached_model(NAME) == path
    assert pull(NAME).fetched_bytes == 0


def test_shards_come_with_their_index_and_single_files_without(hub: Hub) -> None:
    index = b'{"weight_map": {"a": "model-00001-of-00002.safetensors",'
    index += b' "b": "model-00002-of-00002.safetensors"}}'
    shards = {f"model-0000{n}-of-00002.safetensors": LARGE[n:] for n in (1, 2)}
    files = {**sized(config__json=b"{}"), "model.safetensors.index.json": index, **shards}
    hub.repos["org/tiny"] = Repo(files | {"consolidated.safetensors": LARGE})
    assert [file.path for file in needed_files(look_up(NAME))] == list(files)
    assert {path.name for path in pull(NAME).path.iterdir()} == set(files)
    hub.repos["org/tiny"] = Repo(files | {"model.safetensors": LARGE})
    assert [file.path for file in needed_files(look_up(NAME))] == [
        "config.json",
        "model.safetensors",
    ]


def test_one_gguf_file_of_several_must_be_named(hub: Hub) -> None:
    pieces = [f"Q8_0/tiny-Q8_0-0000{n}-of-00002.gguf" for n in (1, 2)]
    files = {name: LARGE + name.encode() for name in ["tiny-Q4_K_M.gguf", *pieces, "mmproj.gguf"]}
    hub.repos["org/tiny"] = Repo(files)
    message = refusal()
    assert "Q8_0, Q4_K_M" in message
    assert "`org/tiny:Q8_0`" in message
    with pytest.raises(SeveralFiles):
        pull(HubName("org/tiny", file="Q5_0"))
    for asked in ("Q4_K_M", "q4_k_m", "tiny-Q4_K_M.gguf"):
        path = pull(HubName("org/tiny", file=asked)).path
        assert (path.name, served_name(path)) == ("tiny-Q4_K_M.gguf", "tiny-Q4_K_M")
    whole = HubName("org/tiny", file="Q8_0")
    assert cached_model(whole) is None
    path = pull(whole).path
    assert path == cached_model(whole)
    assert served_name(path) == "tiny-Q8_0"
    with pytest.raises(SeveralFiles):  # Both are here now.
        cached_model(NAME)


def test_an_only_gguf_file_needs_no_name(hub: Hub) -> None:
    hub.repos["org/tiny"] = Repo({"config.json": b"{}", "tiny-Q4_0.gguf": LARGE})
    path = pull(NAME).path
    assert path.name == "tiny-Q4_0.gguf"
    assert cached_model(NAME) == path


def test_an_adapter_is_fetched_without_a_config(hub: Hub) -> None:
    files = sized(adapter_config__json=b"{}", adapter_model__safetensors=LARGE)
    hub.repos["org/tiny"] = Repo(files | {"training_args.bin": b"x"})
    path = pull(NAME).path
    assert {item.name for item in path.iterdir()} == set(files)
    assert cached_model(NAME) == path


def test_repositories_without_usable_weights(hub: Hub) -> None:
    hub.repos["org/tiny"] = Repo(sized(config__json=b"{}", pytorch_model__bin=b"x"))
    assert "only pickles (pytorch_model.bin)" in refusal()
    hub.repos["org/tiny"] = Repo(sized(config__json=b"{}"))
    assert "no weights in safetensors or GGUF" in refusal()
    assert "leave out `:Q4_0`" in refusal(HubName("org/tiny", file="Q4_0"))


def test_weights_that_nothing_here_can_run_are_not_fetched(hub: Hub) -> None:
    config = b'{"model_type": "mamba"}'
    hub.repos["org/tiny"] = Repo(sized(config__json=config, model__safetensors=LARGE))
    message = refusal()
    assert message.startswith("org/tiny is not fetched: config.json: mamba needs what is not impl")
    assert hub.fetched() == [f"/org/tiny/resolve/{COMMIT}/config.json"]


def test_only_the_config_is_fetched_to_plan(hub: Hub) -> None:
    hub.repos["org/tiny"] = Repo(fixture())
    folder, size_bytes = fetch_config(NAME)
    assert {path.name for path in folder.iterdir()} <= {"config.json", "generation_config.json"}
    assert size_bytes == sum(map(len, fixture().values()))
    assert all(path.endswith("config.json") for path in hub.fetched())
    assert cached_model(NAME) is None
    checkpoint = Checkpoint.open_to_plan(folder)
    assert not checkpoint.tensors
    assert checkpoint.spec == Checkpoint.open(pull(NAME).path).spec
    hub.status = 503
    assert fetch_config(NAME) == (folder, None)
    hub.status = None
    assert Checkpoint.open_to_plan(pull(NAME).path).tensors


def test_the_steps_of_a_sentence_encoder_are_fetched(hub: Hub) -> None:
    """Without them a decoder that embeds would be taken for one that generates."""
    home = Path(__file__).parents[1] / "encoders" / "qwen3-embed"
    paths = [path for path in home.rglob("*") if path.is_file() and path.name != "golden.npz"]
    files = {str(path.relative_to(home)): path.read_bytes() for path in paths}
    hub.repos["org/tiny"] = Repo(files | {"onnx/quantized/config.json": b"{}"})
    folder, _ = fetch_config(NAME)
    spec = Checkpoint.open_to_plan(folder).spec
    assert spec.output is not None
    assert Checkpoint.open(pull(NAME).path).spec == spec
    assert not any("quantized" in path for path in hub.fetched())


# ---- revisions ---------------------------------------------------------------------------------


def test_a_revision_is_fetched_beside_main_and_found_again(hub: Hub) -> None:
    hub.repos["org/tiny"] = Repo(fixture(), revisions={"refs/pr/3": OTHER, OTHER: OTHER})
    main = pull(NAME).path
    named = HubName("org/tiny", revision="refs/pr/3")
    assert cached_model(named) is None
    path = pull(named).path
    assert path.name == OTHER
    assert cached_model(named) == path
    assert cached_model(HubName("org/tiny", revision=OTHER[:8])) == path
    assert cached_model(NAME) == main
    message = refusal(HubName("org/tiny", revision="v9"))
    assert "org/tiny has no revision v9: give a branch, a tag or a commit" in message


def test_main_moves_when_the_new_commit_is_whole(hub: Hub) -> None:
    hub.repos["org/tiny"] = Repo(fixture())
    old = pull(NAME).path
    new = fixture() | {"generation_config.json": b'{"eos_token_id": 3}'}
    hub.repos["org/tiny"] = Repo(new, commit=OTHER)
    hub.damaged = {"generation_config.json"}
    refusal()
    assert cached_model(NAME) == old
    hub.damaged = set()
    pulled = pull(NAME)
    assert cached_model(NAME) == pulled.path
    assert pulled.path.name == OTHER
    assert pulled.fetched_bytes == len(new["generation_config.json"])


# ---- faults on the way -------------------------------------------------------------------------


def weights(hub: Hub, content: bytes = LARGE) -> Path:
    """Serve a model with large weights, and return where their blob will be."""
    hub.repos["org/tiny"] = Repo(sized(config__json=b"{}", model__safetensors=content))
    return NAME.folder / "blobs" / sha256(content)


def test_a_broken_connection_is_taken_up_where_it_broke(hub: Hub) -> None:
    blob = weights(hub)
    hub.breaks = [2 * PIECE, PIECE]
    pulled = pull(NAME)
    assert blob.read_bytes() == LARGE
    assert pulled.fetched_bytes == len(LARGE) + len(b"{}")
    ranges = [headers.get("range") for _, path, headers in hub.requests if "/storage/" in path]
    assert ranges[0] is None
    assert len(ranges) == 3
    assert all(text is not None for text in ranges[1:])


def test_a_connection_that_breaks_again_and_again(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = weights(hub)
    monkeypatch.setattr("model.hub_download._PAUSE_S", 0)
    hub.breaks = [PIECE, *[0] * 20]
    message = refusal()
    assert "broke off model.safetensors again and again, at 0.1 MiB of 0.4 MiB" in message
    assert "goes on where it was" in message
    assert blob.with_name(f"{blob.name}.incomplete").stat().st_size == PIECE
    hub.breaks = []
    assert pull(NAME).fetched_bytes == len(LARGE) - PIECE


def test_what_an_earlier_process_left_is_taken_up(hub: Hub) -> None:
    blob = weights(hub)
    blob.parent.mkdir(parents=True)
    blob.with_name(f"{blob.name}.incomplete").write_bytes(LARGE[: 3 * PIECE])
    pulled = pull(NAME)
    assert pulled.fetched_bytes == len(LARGE) - 3 * PIECE + len(b"{}")
    assert blob.read_bytes() == LARGE
    assert partials() == []


@pytest.mark.parametrize("left", [b"wrong" * PIECE, LARGE + b"more"])
def test_a_wrong_part_is_replaced(hub: Hub, left: bytes) -> None:
    blob = weights(hub)
    blob.parent.mkdir(parents=True)
    blob.with_name(f"{blob.name}.incomplete").write_bytes(left)
    pull(NAME)
    assert blob.read_bytes() == LARGE


def test_a_server_without_ranges_sends_all_again(hub: Hub) -> None:
    blob = weights(hub)
    hub.ignores_ranges, hub.breaks = True, [2 * PIECE]
    pull(NAME)
    assert blob.read_bytes() == LARGE


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_damaged_file_does_not_get_its_place(hub: Hub, file: str) -> None:
    weights(hub)
    hub.damaged = {file}
    message = refusal()
    assert message.startswith(f"org/tiny: {file} came damaged")
    assert "run the same command again" in message
    assert not (NAME.folder / "snapshots" / COMMIT / file).exists()
    assert partials() == []
    assert cached_model(NAME) is None
    hub.damaged = set()
    assert (pull(NAME).path / file).exists()


def test_a_disk_without_room_is_told_before_the_download(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights(hub)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    message = refusal()
    assert message.startswith("org/tiny needs 0.4 MiB more on the disk of ")
    assert "HF_HOME" in message
    assert hub.fetched() == []


def test_a_cache_that_may_not_be_written(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    weights(hub)

    def refuse(self: Path, *arguments: object, **named: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert "may not write to" in refusal()


# ---- refusals ----------------------------------------------------------------------------------


def test_an_unknown_or_private_model(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal().endswith(
        "has no model org/tiny: check the name, or if it is private, set HF_TOKEN or run"
        " `hf auth login`"
    )
    hub.repos["org/tiny"] = Repo(fixture(), tokens=("hf_mine",))
    assert "or if it is private" in refusal()
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert refusal().endswith("has no model org/tiny: check the name")
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    assert Checkpoint.open(pull(NAME).path).tensors


def test_a_gated_model_says_what_to_do(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["org/tiny"] = Repo(fixture(), gated=True, tokens=("hf_mine",))
    licence = f"accept its licence at {hub.url}/org/tiny"
    assert refusal() == (f"org/tiny is gated: {licence}, then set HF_TOKEN or run `hf auth login`")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    message = refusal()
    assert "the owner of your token has no access yet" in message
    assert licence in message
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    assert Checkpoint.open(pull(NAME).path).tensors


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (200, "does not answer like a hub"),
        (403, "forbids"),
        (418, "answers 418 for org/tiny: try again later"),
    ],
)
def test_other_refusals(hub: Hub, status: int, said: str) -> None:
    hub.status = status
    assert said in refusal()


def test_a_name_that_no_hub_has(hub: Hub) -> None:
    assert "org/tiny.git is no name that a hub can have" in refusal(HubName("org/tiny.git"))


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the cache is used all the same."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    message = refusal()
    assert "127.0.0.1:9 cannot be reached" in message
    assert "run `shoal pull org/tiny` where there is a network" in message
    assert f"copy its ~/.cache/huggingface/hub/models--org--tiny to {tmp_path / 'hub'}" in message
    with serve() as server, monkeypatch.context() as patch:
        patch.setenv("HF_ENDPOINT", server.url)
        server.repos["org/tiny"] = Repo(fixture())
        path = pull(NAME).path
    assert cached_model(NAME) == path
    # The folder is copied by a tool that follows links.
    shutil.copytree(NAME.folder, tmp_path / "other" / "models--org--tiny")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "other"))
    found = cached_model(NAME)
    assert found is not None
    assert Checkpoint.open(found).tensors


@pytest.mark.parametrize("path", ["../evil", "/etc/evil", "a/../../b"])
def test_a_hostile_list_of_files_is_refused(hub: Hub, path: str) -> None:
    hub.repos["org/tiny"] = Repo(fixture() | {path: b"x"})
    assert "does not answer like a hub" in refusal()
    assert not NAME.folder.exists()


def test_names_of_snapshots(hub: Hub) -> None:
    weights(hub)
    path = pull(NAME).path
    assert snapshot(NAME.folder) == path
    assert snapshot(NAME.folder, "none") is None
    assert parse_name("org/tiny") == NAME
