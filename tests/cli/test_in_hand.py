"""What people have in hand: `shoal plan` and `shoal load` say in one line what it is.

The rows are files and folders as they are found on disks. A row whose text is OK is a model.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvicorn
from starlette.applications import Starlette

from api.admin import AdminRoutes
from api.common import HANDLERS
from cli.main import main
from coordinator.files.artifacts import ArtifactStore
from coordinator.loading.models import Models
from coordinator.loading.operations import Operations
from coordinator.loading.turns import Turns
from coordinator.quality.store import QualityStore
from coordinator.roster.members import Roster
from coordinator.story import Story
from wire.transport import bind

FIXTURES = Path(__file__).parents[1] / "fixtures"
VOCABULARIES = Path(__file__).parents[1] / "model" / "vocabularies"
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4' * 64}\nsize 162664\n"
DIGEST = "a" * 64

OK = "no agent has joined"
"""What `load` says of a model that it has read whole, where there is no device."""


def model(tmp: Path, name: str = "llama", **files: str | bytes | None) -> Path:
    """A good model's folder, with other contents in some files. None: without it."""
    given = Path(shutil.copytree(FIXTURES / name, tmp / "given"))
    return put(given, **files)


def put(folder: Path, **files: str | bytes | None) -> Path:
    """Write files. Of their names "__" is a dot, and "_0_" a slash."""
    for key, content in files.items():
        path = folder / key.replace("_0_", "/").replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def zipped(tmp: Path, member: str) -> Path:
    with zipfile.ZipFile(tmp / "given.zip", "w") as archive:
        archive.writestr(member, "x")
    return tmp / "given.zip"


def packed(tmp: Path, form: str) -> Path:
    return Path(shutil.make_archive(str(tmp / "packed"), form, model(tmp)))


def vocabulary(tmp: Path, name: str) -> Path:
    """A model's folder without tokenizer.json, whose vocabulary is in other files."""
    given = model(tmp, tokenizer__json=None)
    shutil.copytree(VOCABULARIES / name, given, dirs_exist_ok=True)
    settings = json.loads((given / "golden.json").read_text())["variants"][0]["settings"]
    return put(given, tokenizer_config__json=json.dumps(settings))


def repacked(tmp: Path, name: str) -> Path:
    """A model as a tool packed it, with the tokenizer of a fixture."""
    return Path(shutil.copytree(FIXTURES.parent / "packed" / name, model(tmp), dirs_exist_ok=True))


def ollama(tmp: Path) -> Path:
    layers = [{"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{DIGEST}"}]
    manifests = tmp / "given" / "models" / "manifests" / "registry.ollama.ai" / "library"
    put(manifests / "llama3.2", **{"1b": json.dumps({"layers": layers})})
    blobs = tmp / "given" / "models" / "blobs"
    blobs.mkdir()
    (blobs / f"sha256-{DIGEST}").write_bytes(b"GGUF\x03\0\0\0")
    return tmp / "given"


CONFIG = (FIXTURES / "llama" / "config.json").read_text()
LORA = json.dumps({"base_model_name_or_path": "meta-llama/Llama-3.2-1B", "peft_type": "LORA"})


def quantized(method: str, **settings: object) -> str:
    config = json.loads(CONFIG) | {"quantization_config": {"quant_method": method, **settings}}
    return json.dumps(config)


PULL = "a git-lfs pointer instead of the file itself: run `git lfs pull` in the clone"

PACKED = ("gptq", "awq", "compressed-int4", "compressed-fp8", "fp8", "mlx", "bitsandbytes")

Row = tuple[str, Callable[[Path], Path], str]
"""A name, what makes it, and a part of what both commands say."""

ROWS: list[Row] = [
    ("weights by git-lfs", lambda t: model(t, model__safetensors=POINTER), PULL),
    ("config by git-lfs", lambda t: model(t, config__json=POINTER), PULL),
    ("generation config by git-lfs", lambda t: model(t, generation_config__json=POINTER), PULL),
    ("zip of a model", lambda t: packed(t, "zip"), "it is a zip archive: unpack it"),
    ("tar of a model", lambda t: packed(t, "tar"), "it is a tar archive: unpack it"),
    ("tar.gz of a model", lambda t: packed(t, "gztar"), "it is a gzip archive: unpack it"),
    (
        "file that torch.save wrote",
        lambda t: zipped(t, "archive/data.pkl"),
        "it is a PyTorch pickle, which can run any code and is never read: get safetensors",
    ),
    (
        "pickles",
        lambda t: model(t, model__safetensors=None, pytorch_model__bin=b"PK\x03\x04"),
        "pickle checkpoints (pytorch_model.bin), which can run any code and are never read; con",
    ),
    (
        "state of a training run",
        lambda t: put(t / "given", optimizer__pt=b"x", rng_state__pth=b"x"),
        "a training run's state (optimizer.pt, rng_state.pth) without weights: give a saved",
    ),
    (
        "adapter alone",
        lambda t: put(t / "given", adapter_config__json=LORA, adapter_model__safetensors=b"x"),
        "an adapter (LoRA) of meta-llama/Llama-3.2-1B",
    ),
    (
        "adapter beside weights",
        lambda t: model(t, adapter_config__json=LORA, adapter_model__safetensors=b"x"),
        "give `--adapter {}` to merge it, or `--adapter none` to run the weights without it",
    ),
    (
        "weights of a method that is not read",
        lambda t: model(t, config__json=quantized("hqq")),
        "weights quantized by 'hqq' are not read; read are GPTQ, AWQ, compressed-tensors, fp8, MLX",
    ),
    (
        "AWQ's other version",
        lambda t: model(t, config__json=quantized("awq", version="gemv")),
        'version = "gemv" is not implemented; get the model in AWQ\'s gemm version, or as GPTQ',
    ),
    (
        "onnx",
        lambda t: put(t / "given", config__json=CONFIG, onnx_0_model__onnx=b"x"),
        "only weights of another framework (model.onnx), which are not read: get safetensors",
    ),
    (
        "keras",
        lambda t: put(t / "given", config__json=CONFIG, tf_model__h5=b"x"),
        "only weights of another framework (tf_model.h5)",
    ),
    (
        "maker's own format",
        lambda t: put(t / "given", params__json="{}", consolidated__safetensors=b"x"),
        "in its maker's own format (params.json, consolidated weights); get the one",
    ),
    (
        "maker's own names",
        lambda t: put(t / "given", config__json=CONFIG, consolidated__safetensors=b"x"),
        "weights under their maker's own names (consolidated.safetensors): get those for",
    ),
    (
        "llamafile",
        lambda t: put(t, given__llamafile=b"MZqFpD='" + bytes(99)) / "given.llamafile",
        "a llamafile, a program with a model in it: `unzip` it, and give its GGUF file",
    ),
    (
        "Modelfile",
        lambda t: put(t, Modelfile="# mine\nFROM llama3.2:1b\n") / "Modelfile",
        "a Modelfile of llama3.2:1b, Ollama's recipe, which has no weights: give that model",
    ),
    (
        "folder with a Modelfile",
        lambda t: put(t / "given", Modelfile="FROM ./x.gguf"),
        "a Modelfile of ./x.gguf, Ollama's recipe",
    ),
    ("Ollama's store", ollama, "give the file of one (llama3.2:1b is {}/models/blobs/sha256-"),
    ("web page", lambda t: model(t, config__json="<!DOCTYPE html>"), "a web page, not the file"),
    ("empty weights", lambda t: model(t, model__safetensors=b""), "too short for a safetensors"),
    (
        "half a download",
        lambda t: model(t, model__safetensors=None, model__safetensors__part=b"x"),
        "an unfinished download (model.safetensors.part); let it finish, or start it again",
    ),
]  # fmt: skip


GGUF = FIXTURES.parent / "gguf" / "llama.gguf"


def cached(tmp: Path) -> Path:
    """A model in a folder as huggingface_hub's cache has it."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp / "hub" / "models--org--llama"
    shutil.copytree(FIXTURES / "llama", folder / "snapshots" / commit)
    return put(folder, refs_0_main=commit)


READ: list[Row] = [
    ("a good model", lambda t: model(t), OK),
    ("GGUF file", lambda t: Path(shutil.copy(GGUF, t / "given.gguf")), OK),
    ("folder with a GGUF file", lambda t: put(t / "given", a__gguf=GGUF.read_bytes()), OK),
    ("file of Ollama's", lambda t: put(t, given=GGUF.read_bytes()) / "given", OK),
    ("folder of the hub's cache", cached, OK),
    *((name, lambda t, name=name: repacked(t, name), OK) for name in PACKED),
]
"""Rows that are read as they are."""

LOADED: list[Row] = [
    ("tokenizer by git-lfs", lambda t: model(t, tokenizer__json=POINTER), PULL),
    ("template by git-lfs", lambda t: model(t, chat_template__jinja=POINTER), PULL),
    (
        "no tokenizer",
        lambda t: model(t, tokenizer__json=None),
        "missing; load the tokenizer with transformers elsewhere and save_pretrained it, or fetch",
    ),
    ("tokenizer.model alone", lambda t: vocabulary(t, "llama"), OK),
    ("tekken.json alone", lambda t: vocabulary(t, "tekken"), OK),
    ("vocab.json and merges.txt", lambda t: vocabulary(t, "qwen2"), OK),
    (
        "vocab.json without merges.txt",
        lambda t: put(vocabulary(t, "gpt2"), merges__txt=None),
        "merges.txt: missing, which belongs to vocab.json; fetch it, too",
    ),
]
"""Rows about what only `load` reads: the tokenizer."""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A coordinator's API that no device has joined."""
    directory = tmp_path_factory.mktemp("state")
    started, servers = threading.Event(), list[uvicorn.Server]()

    async def serve() -> None:
        roster, story, turns = Roster("test"), Story(), Turns()
        store = ArtifactStore(directory)
        store.prepare()
        models = Models(story)
        operations = Operations(roster, store, QualityStore(directory), models, turns)
        routes = AdminRoutes("test", roster, operations, models, story).routes()
        app = Starlette(routes=routes, exception_handlers=HANDLERS)
        config = uvicorn.Config(app, log_level="critical", lifespan="off")
        servers.append(uvicorn.Server(config))
        started.set()
        await servers[0].serve(sockets=[listening])

    with bind("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=asyncio.run, args=(serve(),))
        thread.start()
        assert started.wait(60)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        servers[0].should_exit = True
        thread.join(30)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


def said(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """The one line that a command ends with."""
    assert main(command) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(("name", "make", "expected"), ROWS, ids=[row[0] for row in ROWS])
def test_both_commands_say_what_it_is(
    name: str,
    make: Callable[[Path], Path],
    expected: str,
    url: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = make(tmp_path)
    planned = said(capsys, "plan", str(given), f"--url={url}")
    assert expected.replace("{}", str(given)) in planned
    assert said(capsys, "load", str(given), f"--url={url}") == planned


@pytest.mark.parametrize(("name", "make", "expected"), READ, ids=[row[0] for row in READ])
def test_what_can_be_read_waits_for_devices(
    name: str,
    make: Callable[[Path], Path],
    expected: str,
    url: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = make(tmp_path)
    for command in ("plan", "load"):
        assert expected in said(capsys, command, str(given), f"--url={url}")


@pytest.mark.parametrize(("name", "make", "expected"), LOADED, ids=[row[0] for row in LOADED])
def test_loading_says_what_the_tokenizer_is(
    name: str,
    make: Callable[[Path], Path],
    expected: str,
    url: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert expected in said(capsys, "load", str(make(tmp_path)), f"--url={url}")
