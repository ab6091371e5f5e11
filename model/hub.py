"""Names of models on the Hugging Face Hub, and the cache that holds their files on this machine.

The cache is shared with every program that uses huggingface_hub. Nothing here opens a connection or
imports that library: ``model.hub_download`` does both.
"""

from __future__ import annotations

import hashlib
import os
import pwd
import re
import socket
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from model.bounded import read_json
from model.errors import HubError

MAIN = "main"
"""The revision of a name without one."""

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"

MODULES = "modules.json"
"""The steps of a sentence encoder. Each may have a folder with a config.json."""

SENTENCE_SETTINGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "xlm-roberta")
)
"""The names of sentence-transformers' file about texts, of which the first that is there counts."""

DESCRIPTIONS = (
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tool_use.jinja",
    "adapter_config.json",
    "quantize_config.json",
    "quant_config.json",
    MODULES,
    "config_sentence_transformers.json",
    *SENTENCE_SETTINGS,
)
"""The files beside weights that a model may need. Most have a few KB."""

_PART = r"[A-Za-z0-9][\w.-]{0,95}"
_NAME = re.compile(
    rf"(?:hf:/{{0,2}})?(?P<repo>{_PART}/{_PART})"
    r"(?:@(?P<revision>[\w][\w./-]{0,99}))?(?::(?P<file>[\w][\w./-]{0,199}))?",
    re.ASCII,
)
_ADDRESS = re.compile(r"(?:https?:/{1,2}(?:www\.)?(?:huggingface|hf)\.co|hf:)/{1,2}(?P<path>.+)")
_OLLAMA = re.compile(r"(?P<name>[a-z][a-z0-9.-]{0,60})(?::(?P<size>[a-z0-9._-]{1,60}))?", re.ASCII)
_PIECE_OF_GGUF = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-\d{5}\.gguf", re.IGNORECASE)
_QUANTIZATION = re.compile(
    r"(?:^|[-._])((?:UD-)?(?:[IT]?Q\d\w*|BF16|F16|F32|MXFP4\w*))$", re.IGNORECASE
)
_FOLDER = "models--"
_MAX_REF_BYTES = 100

OLLAMA_NAMES: Mapping[str, str] = {
    "deepseek-r1:1.5b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    "deepseek-r1:7b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
    "deepseek-r1:8b": "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B",
    "gemma2:2b": "google/gemma-2-2b-it",
    "gemma3": "google/gemma-3-4b-it",
    "gemma3:270m": "google/gemma-3-270m-it",
    "gemma3:1b": "google/gemma-3-1b-it",
    "gemma3:4b": "google/gemma-3-4b-it",
    "gpt-oss": "openai/gpt-oss-20b",
    "gpt-oss:20b": "openai/gpt-oss-20b",
    "llama3": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama3:8b": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama3.1": "meta-llama/Llama-3.1-8B-Instruct",
    "llama3.1:8b": "meta-llama/Llama-3.1-8B-Instruct",
    "llama3.2": "meta-llama/Llama-3.2-3B-Instruct",
    "llama3.2:1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama3.2:3b": "meta-llama/Llama-3.2-3B-Instruct",
    "mistral": "mistralai/Mistral-7B-Instruct-v0.3",
    "mistral:7b": "mistralai/Mistral-7B-Instruct-v0.3",
    "mixtral": "mistralai/Mixtral-8x7B-Instruct-v0.1",
    "mixtral:8x7b": "mistralai/Mixtral-8x7B-Instruct-v0.1",
    "phi3": "microsoft/Phi-3-mini-4k-instruct",
    "phi3.5": "microsoft/Phi-3.5-mini-instruct",
    "phi4-mini": "microsoft/Phi-4-mini-instruct",
    "qwen2.5": "Qwen/Qwen2.5-7B-Instruct",
    "qwen2.5:0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5:1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen2.5:3b": "Qwen/Qwen2.5-3B-Instruct",
    "qwen2.5:7b": "Qwen/Qwen2.5-7B-Instruct",
    "qwen3": "Qwen/Qwen3-8B",
    "qwen3:0.6b": "Qwen/Qwen3-0.6B",
    "qwen3:1.7b": "Qwen/Qwen3-1.7B",
    "qwen3:4b": "Qwen/Qwen3-4B",
    "qwen3:8b": "Qwen/Qwen3-8B",
    "qwen3:14b": "Qwen/Qwen3-14B",
    "qwen3:30b": "Qwen/Qwen3-30B-A3B",
    "smollm2": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "smollm2:135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2:360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2:1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "tinyllama": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "tinyllama:1.1b": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
}
"""Common names of Ollama's, and the repository on the hub with the same weights."""


# ---- names -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HubName:
    """A model on the hub, as ``ORG/NAME[@REVISION][:FILE]`` names it.

    revision: a branch, a tag or a commit; None means main.
    file: a GGUF file of the repository, or the quantization in its name, such as Q4_K_M.
    """

    repo: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repo}{revision}" + (f":{self.file}" if self.file else "")

    @property
    def folder(self) -> Path:
        """The folder of this repository in this machine's cache."""
        return cache_directory() / (_FOLDER + self.repo.replace("/", "--"))


def parse_name(text: str) -> HubName | None:
    """Return the name in ``text``, or None if it is none. Addresses of the hub are names too."""
    address = _ADDRESS.fullmatch(text)
    if address is not None and text.startswith("http"):
        parts = [part for part in address["path"].partition("?")[0].split("/") if part]
        text = "/".join(parts[:2])
        if len(parts) > 3 and parts[2] in ("tree", "blob", "resolve"):
            text += f"@{parts[3]}"
            if parts[-1].endswith(".gguf"):
                text += f":{'/'.join(parts[4:])}"
    elif address is not None:
        text = address["path"]
    match = _NAME.fullmatch(text)
    if match is None or ".." in text or "--" in match["repo"]:
        return None
    return HubName(match["repo"], match["revision"], match["file"])


def named_model(text: str) -> HubName | None:
    """Return the name in a user's ``text``, or None if it means a path on this machine.

    A path that exists is never a name. Nor is ``models/llama`` where a folder ``models`` is.
    """
    name = parse_name(text)
    if name is None or Path(text).exists():
        return None
    return None if Path(text).parent.is_dir() and not text.startswith(("hf:", "http")) else name


def ollama_advice(text: str) -> str | None:
    """Return what to give instead of a name of Ollama's such as llama3.2:1b; None for others."""
    match = _OLLAMA.fullmatch(text)
    if match is None:
        return None
    known = OLLAMA_NAMES.get(text) or OLLAMA_NAMES.get(text.removesuffix(":latest"))
    if known is not None:
        return f"{text} is Ollama's name for {known}: give that, as in `shoal pull {known}`"
    if match["size"] is None:
        return None
    return (
        f"{text} is a name of Ollama's: give the model's ORG/NAME on the hub, which"
        f" https://huggingface.co/models?search={match['name']} finds"
    )


# ---- this machine's cache ----------------------------------------------------------------------


def cache_directory() -> Path:
    """Return the folder of the cache on this machine, as huggingface_hub's settings say."""
    places = (
        ("HF_HUB_CACHE", ""),
        ("HUGGINGFACE_HUB_CACHE", ""),
        ("HF_HOME", "hub"),
        ("XDG_CACHE_HOME", "huggingface/hub"),
    )
    for variable, below in places:
        if os.environ.get(variable):
            return Path(os.path.expandvars(os.environ[variable]), below).expanduser()
    try:
        home = Path.home()
    except RuntimeError:  # A service's user may have no home.
        home = Path("/")
    return home / ".cache" / "huggingface" / "hub"


def cached_repo(path: Path) -> str | None:
    """Return ORG/NAME if ``path`` is a repository's folder in a cache, or lies in one."""
    for part in reversed(path.parts):
        if part.startswith(_FOLDER) and len(part) > len(_FOLDER):
            return part[len(_FOLDER) :].replace("--", "/")
    return None


def snapshot(folder: Path, revision: str | None = None) -> Path | None:
    """Return the snapshot of a revision in a repository's folder ``models--ORG--NAME``.

    revision: None means main, or the newest snapshot in a cache that does not know main.
    """
    try:
        snapshots = folder / "snapshots"
        found = [path for path in snapshots.iterdir() if _has_model(path)]
        ref = folder / "refs" / (revision or MAIN)
        commit = revision or ""
        if ref.is_file() and ref.stat().st_size <= _MAX_REF_BYTES:
            commit = ref.read_text(encoding="ascii").strip()
        for path in found:
            if path.name == commit or (len(commit) >= 7 and path.name.startswith(commit)):
                return path
        if revision is not None or not found:
            return None
        return max(found, key=lambda path: (path.stat().st_mtime_ns, path.name))
    except (OSError, ValueError):
        return None


def _has_model(folder: Path) -> bool:
    described = any((folder / name).exists() for name in (CONFIG, ADAPTER))
    return described or any(path.exists() for path in folder.rglob("*.gguf"))


def is_whole(folder: Path) -> bool:
    """Whether a model's folder has its config.json, and all weights that its index lists.

    An adapter's folder has no config.json.
    """
    if (folder / ADAPTER).exists():
        return True
    if not (folder / CONFIG).exists():
        return False
    if (folder / SINGLE).exists():
        return True
    if not (folder / INDEX).exists():
        return any(path.exists() for path in folder.glob("*.safetensors"))
    try:
        values = read_json(folder / INDEX)
        shards = set(values["weight_map"].values())
        return bool(shards) and all((folder / PurePosixPath(name).name).exists() for name in shards)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def lacks_weights(path: Path) -> bool:
    """Whether a model's folder has its config.json, and at most other descriptions beside it."""
    try:
        # A folder with a description is that of a sentence encoder's step.
        names = {item.name for item in path.iterdir() if not (item / CONFIG).is_file()}
    except OSError:
        return False
    return CONFIG in names and names <= {name.partition("/")[0] for name in DESCRIPTIONS}


def cached_model(name: HubName) -> Path | None:
    """Return the folder or the GGUF file of a model in this machine's cache.

    None: it is not here, or not whole. Raises HubError if ``name`` leaves a choice between files.
    """
    found = snapshot(name.folder, name.revision)
    return None if found is None else model_in(found, name)


def model_in(found: Path, name: HubName) -> Path | None:
    """Return the model in the snapshot ``found``: its folder, or the GGUF file that is meant."""
    if name.file is None and is_whole(found):
        return found
    files = sorted(
        path.relative_to(found).as_posix() for path in found.rglob("*.gguf") if path.exists()
    )
    if not files:
        return None
    try:
        chosen = choose_gguf(files, name)
    except HubError:
        if name.file is not None:
            return None  # The hub may have the file.
        raise
    return found / chosen[0] if _pieces(chosen[0]) in (None, len(chosen)) else None


def resolved(path: Path) -> Path:
    """Return the snapshot in place of a cache's folder models--ORG--NAME, and other paths as is."""
    if not path.name.startswith(_FOLDER):
        return path
    found, repo = snapshot(path), cached_repo(path)
    if found is None or repo is None:
        return path
    try:
        return model_in(found, HubName(repo)) or found
    except HubError as error:
        raise HubError(f"{path}: {error}") from error


def on_this_machine(model: Path) -> Path:
    """Return the path of what a request calls ``model``: an absolute path, or a hub's name.

    Raises HubError if a hub's name is not in the cache here.
    """
    name = None if model.is_absolute() else parse_name(str(model))
    if name is None:
        return resolved(model)
    found = cached_model(name)
    if found is None:
        raise HubError(
            f"{name} is not in {cache_directory()} on {socket.gethostname()}: run"
            f" `shoal pull {name}` there"
        )
    return found


def is_loaded_from(path: Path, text: str) -> bool:
    """Whether a model that was loaded from ``path`` is the one that a hub's name in ``text`` means.

    A name with a revision is compared by its path instead.
    """
    name = parse_name(text)
    if name is None or name.revision is not None or cached_repo(path) != name.repo:
        return False
    if name.file is None:
        return True
    return path.suffix == ".gguf" and _means(name.file, path.name, [path.name])


def user_name() -> str:
    """Return the name of the user that this process runs as, or its number without one."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def is_open_to_others(path: Path) -> bool:
    """Whether other users may enter a folder, as far as it exists."""
    existing = (folder for folder in (path, *path.parents) if folder.exists())
    return all(folder.stat().st_mode & stat.S_IXOTH for folder in existing)


def this_machine() -> str:
    """Return a text that two processes have in common only if they run on one machine."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    known = boot.read_text(encoding="ascii").strip() if boot.exists() else ""
    return hashlib.sha256(f"{socket.gethostname()} {known}".encode()).hexdigest()[:16]


# ---- GGUF files --------------------------------------------------------------------------------


def choose_gguf(files: Iterable[str], name: HubName) -> tuple[str, ...]:
    """Return the one GGUF model among a repository's ``files``, which may be in several pieces.

    Raises HubError that lists them if ``name`` does not say which.
    """
    models: dict[str, list[str]] = {}
    for file in sorted(files):
        plain = PurePosixPath(file).name.lower()
        if plain.endswith(".gguf") and not plain.startswith(("mmproj", "imatrix")):
            piece = _PIECE_OF_GGUF.fullmatch(file)
            models.setdefault(f"{piece['stem']}.gguf" if piece else file, []).append(file)
    chosen = models
    if name.file is not None:
        chosen = {key: value for key, value in models.items() if _means(name.file, key, value)}
    if len(chosen) == 1:
        return tuple(next(iter(chosen.values())))
    shown = ", ".join(map(quantization_of, models)) or "none"
    asked = f"has no GGUF file {name.file}" if name.file and not chosen else "has several models"
    example = quantization_of(next(iter(chosen or models), "Q4_K_M"))
    raise SeveralFiles(
        f"{name.repo} {asked}: {shown}; give one, as in `{name.repo}:{example}`",
        {key: tuple(value) for key, value in models.items()},
    )


class SeveralFiles(HubError):
    """A repository holds several GGUF models. ``models`` maps each to its files."""

    def __init__(self, message: str, models: Mapping[str, tuple[str, ...]]) -> None:
        super().__init__(message)
        self.models = models


def pieces_of(path: Path) -> list[Path]:
    """Return the files of a GGUF model, which ``path`` is the first of."""
    piece = _PIECE_OF_GGUF.fullmatch(path.name)
    if piece is None:
        return [path]
    start = f"{piece['stem']}-"
    siblings = (item for item in path.parent.iterdir() if item.name.startswith(start))
    return sorted(item for item in siblings if _PIECE_OF_GGUF.fullmatch(item.name))


def _means(asked: str, model: str, files: list[str]) -> bool:
    """Whether a user's ``asked`` is the model's file, or the quantization in its name."""
    if asked in (model, *files) or asked in [PurePosixPath(file).name for file in files]:
        return True
    stem = PurePosixPath(model).name.lower().removesuffix(".gguf")
    return re.search(rf"(?:^|[-._]){re.escape(asked.lower())}$", stem) is not None


def quantization_of(model: str) -> str:
    """Return the quantization in a GGUF file's name, such as Q4_K_M, else the name."""
    stem = PurePosixPath(model).name.removesuffix(".gguf")
    found = re.search(
        r"(?:^|[-._])((?:UD-)?(?:I?Q\d\w*|T?Q\d_\w+|BF16|F16|F32|MXFP4\w*))$", stem, re.I
    )
    return found[1] if found else model


def _pieces(file: str) -> int | None:
    """Return the number of pieces that a GGUF file's name states, or None for a whole file."""
    piece = _PIECE_OF_GGUF.fullmatch(file)
    return None if piece is None else int(file[-10:-5])


# ---- served names ------------------------------------------------------------------------------


def served_name(path: Path) -> str:
    """Return the name under which a model's folder or GGUF file is served.

    A folder in a hub's cache has the repository's name, not its commit's. A GGUF file has its own,
    and a folder that is just called ``model`` that of the folder above.
    """
    if path.suffix == ".gguf":
        piece = _PIECE_OF_GGUF.fullmatch(path.name)
        return piece["stem"] if piece else path.stem
    repo = cached_repo(path)
    if repo is not None:
        return repo.rpartition("/")[2]
    named = path.parent if path.name == "model" else path
    return named.name or "model"
