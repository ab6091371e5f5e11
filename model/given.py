"""Recognizes what a user named as a model, before it is read as one.

Everything that opens a model calls ``require_model`` first, here and on the coordinator. Users also
give the name of a model on a hub, a GGUF file, or a folder of pointers. "config.json is missing"
would not help them. So the messages say what is at the path, and what to do.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import socket
import stat
from collections.abc import Iterable
from pathlib import Path

from model import hub
from model.bounded import read_json
from model.errors import CheckpointError
from model.foreign import (
    folder_advice,
    is_modelfile,
    is_only_state,
    kind_of_archive,
    modelfile_advice,
)

CONFIG = hub.CONFIG
SINGLE = hub.SINGLE
INDEX = hub.INDEX
ADAPTER = "adapter_config.json"

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_FOREIGN = ("*.h5", "*.msgpack", "*.onnx", "*.tflite", "*.npz", "*.mlmodelc", "*.engine")
"""Weights of other frameworks. A folder of transformers never has these alone."""
_UNFINISHED = ("*.incomplete", "*.part", "*.partial", "*.crdownload", "*.aria2", "*.tmp")

MAX_HEADER_BYTES = 100_000_000
"""The longest header that the format's own library accepts.

The header of a model with 1000 layers has about 1 MB.
"""
_HEAD_BYTES = 512
_MAX_SHOWN = 3
_MAX_FOLDERS = 200
_MAX_ADAPTER_BYTES = 1 << 20

_GGUF = b"GGUF"
_NO_MODELS = ("mmproj", "imatrix")
"""The start of the names of GGUF files that are no models, but go with one."""
_PART_OF_GGUF = re.compile(r"-\d{5}-of-\d{5}(?=\.gguf$)", re.IGNORECASE)

_POINTER = b"version https://git-lfs.github.com/spec/"
_KINDS: tuple[tuple[bytes, str], ...] = (
    (_POINTER, "a git-lfs pointer instead of the file itself: run `git lfs pull` in the clone"),
    (b"GGUF", "a GGUF file, llama.cpp's format: give it alone, with a name that ends in .gguf"),
    (b"ggml", "a GGML file, an old format of llama.cpp: get the model's safetensors"),
    (b"PK\x03\x04", "a zip archive or a PyTorch pickle, which is never read: get safetensors"),
    (b"\x80\x02", "a pickle, which can run any code and is never read: get safetensors"),
    (b"\x80\x03", "a pickle, which can run any code and is never read: get safetensors"),
    (b"\x80\x04", "a pickle, which can run any code and is never read: get safetensors"),
    (b"\x80\x05", "a pickle, which can run any code and is never read: get safetensors"),
    (b"\x1f\x8b", "a gzip archive: unpack it"),
    (b"BZh", "a bzip2 archive: unpack it"),
    (b"\xfd7zXZ\x00", "an xz archive: unpack it"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive: unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it"),
    (b"\x89HDF\r\n", "an HDF5 file (Keras, TensorFlow), which is not read: get safetensors"),
    (b"<!doctype html", "a web page, not the file: the download failed, fetch it again"),
    (b"<html", "a web page, not the file: the download failed, fetch it again"),
    (b"<?xml", "an answer of a server, not the file: the download failed, fetch it again"),
    (b'{"error', "an answer of a server, not the file: the download failed, fetch it again"),
    (b"Invalid username or password", "a refusal of the hub: log in there, and fetch it again"),
    (b"Access to model", "a refusal of the hub: ask for access there, and fetch it again"),
    (b"Entry not found", "a refusal of the hub: it has no such file"),
    (b"Repository not found", "a refusal of the hub: it has no such model"),
)
"""The first bytes of a file, without regard to case, and the kind of file."""

_ONE_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(?::[\w.-]{1,40})?")


def require_model(given: Path) -> None:
    """Check that ``given`` is a folder with a config.json, or a GGUF model, by its first bytes.

    Raises CheckpointError. Its one line says what was given instead, and what to do.
    """
    try:
        kind = given.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(_absent(given)) from None
    except (OSError, ValueError) as error:
        raise _unreadable(given, error) from error
    if gguf_of(given) is not None:
        return
    if not stat.S_ISDIR(kind):
        raise CheckpointError(_file(given))
    names = _names(given)
    try:
        found = CONFIG in names and (given / CONFIG).exists()
        pointer = found and foreign_kind(_head(given / CONFIG))
    except OSError as error:
        raise _unreadable(given, error) from error
    if pointer:
        raise CheckpointError(f"{shown(given / CONFIG)}: it is {pointer}")
    if not found:
        raise CheckpointError(f"{shown(given)}: {_folder(given, names)}")


def gguf_of(given: Path) -> Path | None:
    """Return the GGUF file that a path stands for, or None if it is no GGUF model.

    It is a file that begins like one, or the only such model of a folder without safetensors. Of a
    split model it is the first part. Raises CheckpointError for a folder with several models.
    """
    try:
        if given.is_file():
            return given if _head(given).startswith(_GGUF) else None
        names = _names(given)
        if names & {SINGLE, INDEX}:
            return None
        models = _gguf_models(names)
        if len(models) > 1 and CONFIG in names and _some(given, "*.safetensors"):
            return None
    except OSError as error:
        raise _unreadable(given, error) from error
    if len(models) > 1:
        shown_names = _listed([shown(Path(name)) for name in models.values()])
        raise CheckpointError(
            f"{shown(given)}: a folder with {len(models)} GGUF models: "
            f"give the path of one: {shown_names}"
        )
    return next((given / name for name in models.values()), None)


def _gguf_models(names: Iterable[str]) -> dict[str, str]:
    """Return the GGUF models among a folder's names: the whole file's name to the first part's."""
    models: dict[str, str] = {}
    for name in sorted(names):
        if name.lower().endswith(".gguf") and not name.lower().startswith(_NO_MODELS):
            models.setdefault(_PART_OF_GGUF.sub("", name), name)
    return models


def without_weights(directory: Path) -> CheckpointError:
    """Return the error for a model's folder without model.safetensors and index."""
    names = _names(directory)
    known = _other_weights(directory, names)
    files = _some(directory, *_FOREIGN) or _some(directory / "onnx", "*.onnx")
    if known is None and files:
        known = f"only weights of another framework ({files}), which are not read: get safetensors"
    if known is None:
        known = f"no {SINGLE} and no {INDEX}; is the download complete?"
    return CheckpointError(f"{shown(directory)}: {known}")


def foreign_kind(head: bytes) -> str | None:
    """Name the foreign kind of a file by its first bytes, and the advice; None if it is none."""
    length_bytes = int.from_bytes(head[:8], "little")
    if length_bytes <= MAX_HEADER_BYTES and head[8:9] in (b"", b"{"):
        return None  # A header's length may look like any magic.
    archive = kind_of_archive(head)
    if archive is not None:
        return archive
    start = head.lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    for magic, kind in _KINDS:
        if head.startswith(magic) or (magic[:1].isascii() and start.startswith(magic.lower())):
            return kind
    return None


def kind_of_file(path: Path) -> str | None:
    """Name the kind of a file that could not be used, as ``foreign_kind``. None if unreadable."""
    try:
        return foreign_kind(_head(path))
    except OSError:
        return None


def not_absolute(text: str) -> str:
    """Return the message for a text that is neither an absolute path nor a hub's name."""
    advice = hub.ollama_advice(text)
    return f"{shown(Path(text))} is no absolute path" if advice is None else advice


def shown(path: Path) -> str:
    """Return a path for a message of one line."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(path))[:500]


# ---- nothing is there --------------------------------------------------------------------------


def _absent(given: Path) -> str:
    text = str(given)
    name = hub.named_model(text)
    if name is not None:
        return (
            f"{shown(given)}: no such directory on {socket.gethostname()}, but the name of a model"
            f" on a hub: {_fetch(name)}"
        )
    if given.is_symlink():
        return f"{shown(given)}: a link to {shown(given.readlink())}, which does not exist"
    message = f"{shown(given)}: no such directory on {socket.gethostname()}"
    if text.startswith("~"):
        return f"{message}: the shell expands ~ only outside quotes; give the whole path"
    advice = hub.ollama_advice(text)
    if advice is not None:
        return f"{shown(given)}: no such directory; {advice}"
    if len(given.parts) == 1 and _ONE_NAME.fullmatch(text):
        return (
            f"{message}: give the path of a model's folder, or a hub's model with its owner, as in"
            f" `shoal pull ORG/NAME`"
        )
    missing = given.absolute()
    for parent in missing.parents:
        try:
            if parent.exists():
                break
        except OSError as error:
            return str(_unreadable(parent, error))
        missing = parent
    else:
        return f"{message}; give the path of a model"
    return (
        f"{message}; give the path of a model ({shown(parent)} has no {shown(Path(missing.name))})"
    )


def _fetch(name: hub.HubName) -> str:
    """Say how to get a hub's model onto this machine, or where it already is."""
    snapshot = hub.snapshot(name.folder, name.revision)
    if snapshot is not None:
        return f"it is in this machine's cache, give {shown(snapshot)}"
    return f"run `shoal pull {name}`"


# ---- a file ------------------------------------------------------------------------------------


def _file(given: Path) -> str:
    what = f"{shown(given)}: a file, not a model's folder"
    if given.is_file() and is_modelfile(given):
        return f"{shown(given)}: {modelfile_advice(given)}"
    if not given.is_file():
        return f"{shown(given)}: neither a folder nor a file; give the path of a model's folder"
    try:
        head = _head(given)
    except OSError as error:
        return str(_unreadable(given, error))
    kind = foreign_kind(head)
    if kind is None and given.suffix == ".gguf":
        kind = "no GGUF file, nor its beginning: fetch it again"
    if kind is not None:
        return f"{what}: it is {kind}"
    folder = given.absolute().parent
    if (folder / CONFIG).exists():
        return f"{what}: give the folder that it is in, {shown(folder)}"
    if given.suffix == ".safetensors":
        return f"{what}: weights alone are no model; put its {CONFIG} and tokenizer.json beside it"
    return f"{what}; give the path of a folder as save_pretrained writes it"


# ---- a folder without config.json --------------------------------------------------------------


def _folder(given: Path, names: frozenset[str]) -> str:
    """Describe a folder without a readable config.json."""
    if not names:
        return (
            f"not a model: it has no {CONFIG}, nor anything else; give the path of a model's folder"
        )
    if (given / CONFIG).is_symlink():
        return f"{CONFIG} is a link to a file that is missing; fetch the model again"
    cache = _cache_folder(given, names)
    if cache is not None:
        return cache
    if ADAPTER in names:
        return _adapter(given)
    if "model_index.json" in names:
        return "a pipeline of diffusers (pictures, sound), not a language model"
    if "params.json" in names and _some(given, "consolidated*"):
        return (
            "a checkpoint in its maker's own format (params.json, consolidated weights);"
            " get the one that is converted for transformers"
        )
    other = _other_weights(given, names)
    if other is not None:
        return other
    if names & {SINGLE, INDEX}:
        return f"weights without {CONFIG}; is the download complete?"
    advice = folder_advice(given, names)
    if advice is not None:
        return advice
    models = _models_below(given, names)
    if models:
        return (
            f"not a model: it has no {CONFIG}, but folders in it have: give {' or '.join(models)}"
        )
    if ".git" in names and len(names - {".git", ".gitattributes"}) == 0:
        return (
            "a git clone without its files; run `git checkout HEAD -- .` and `git lfs pull` in it"
        )
    files = _some(given, *_FOREIGN)
    if files:
        return f"weights of another framework ({files}), which are not read: get safetensors"
    return (
        f"not a model: it has no {CONFIG} "
        "(expected a directory as Hugging Face's save_pretrained writes it)"
    )


def _cache_folder(given: Path, names: frozenset[str]) -> str | None:
    """Say what to give instead of a folder of the hub's cache that holds snapshots."""
    if "snapshots" in names or given.name.startswith("models--"):
        snapshot = hub.snapshot(given)
        if snapshot is not None:
            return f"a folder of the hub's cache: give the snapshot in it, {shown(snapshot)}"
        repo = hub.cached_repo(given)
        again = "fetch the model again" if repo is None else f"run `shoal pull {repo}`"
        return f"a folder of the hub's cache without a snapshot: {again}"
    parent = given.absolute().parent
    if given.name in ("snapshots", "blobs", "refs") and parent.name.startswith("models--"):
        snapshot = hub.snapshot(parent)
        if snapshot is not None:
            return f"a part of the hub's cache: give the snapshot, {shown(snapshot)}"
    root = given / "hub" if "hub" in names else given
    cached = sorted(name for name in _names(root) if name.startswith("models--"))
    found = [hub.snapshot(root / name) for name in cached]
    snapshots = [item for item in found if item is not None]
    if snapshots:
        return f"the hub's cache, not one model: give {_listed(list(map(shown, snapshots)))}"
    return None


def _adapter(given: Path) -> str:
    """Describe an adapter's folder by the base model that its config names."""
    base = ""
    with contextlib.suppress(OSError, ValueError):
        values = read_json(given / ADAPTER, _MAX_ADAPTER_BYTES)
        named = values.get("base_model_name_or_path") if isinstance(values, dict) else None
        base = shown(Path(named[:100])) if isinstance(named, str) and named else ""
    return (
        f"an adapter (LoRA){base and f' of {base}'} without its base model: run `shoal load "
        f"{shlex.quote(base or 'BASE')} --adapter {shlex.quote(shown(given))}`"
    )


def _models_below(given: Path, names: frozenset[str]) -> list[str]:
    """Return the folders in this one, or one level deeper, that are models."""
    found: list[str] = []
    for name in sorted(names)[:_MAX_FOLDERS]:
        folder = given / name
        try:
            below = [folder, *(folder / inner for inner in sorted(_names(folder))[:_MAX_FOLDERS])]
            found += [shown(path) for path in below if (path / CONFIG).is_file()]
        except (OSError, CheckpointError):
            continue
        if len(found) > _MAX_SHOWN:
            return [*found[:_MAX_SHOWN], "another"]
    return found


# ---- a folder without weights ------------------------------------------------------------------


def _other_weights(directory: Path, names: frozenset[str]) -> str | None:
    """Describe weights other than safetensors with the usual names, and say what to do."""
    if names & {SINGLE, INDEX}:
        link = next(directory / name for name in (SINGLE, INDEX) if name in names)
        if not link.exists() and link.is_symlink():
            return f"{link.name} is a link to a file that is missing; fetch the model again"
        return None
    files = _some(directory, "*.gguf")
    if files:
        return f"parts of models as GGUF ({files}), but no model: give the path of a model"
    if ADAPTER in names:
        return _adapter(directory)
    unfinished = _some(directory, *_UNFINISHED) or _some(
        directory / ".cache" / "huggingface" / "download", "*.incomplete"
    )
    if unfinished:
        return f"an unfinished download ({unfinished}); let it finish, or start it again"
    files = _some(directory, "*-of-*.safetensors")
    if files:
        return f"shards ({files}) without {INDEX}; complete the download"
    files = _some(directory, "consolidated*.safetensors")
    if files:
        return (
            f"weights under their maker's own names ({files}):"
            f" get those for transformers, {SINGLE} or shards with {INDEX}"
        )
    files = _some(directory, "*.safetensors")
    if files:
        return f"no {SINGLE}, but {files}: is it the whole model? Then rename it to {SINGLE}"
    files = _some(directory, *_PICKLES)
    if files and is_only_state([name for p in _PICKLES for name in _matching(directory, p)]):
        return f"a training run's state ({files}) without weights: give a saved model's folder"
    if files:
        return (
            f"pickle checkpoints ({files}), which can run any code and are never read; "
            "convert them: load the model with transformers in a place you trust and "
            "save_pretrained(..., safe_serialization=True)"
        )
    return None


# ---- helpers -----------------------------------------------------------------------------------


def _names(directory: Path) -> frozenset[str]:
    """Return a folder's names, or none if it is no folder.

    Raises CheckpointError if it is unreadable, or has a pipe: its reader would wait for ever.
    """
    try:
        paths = list(directory.iterdir())
        pipe = next((path for path in paths if path.is_fifo()), None)
    except (FileNotFoundError, NotADirectoryError):
        return frozenset()
    except OSError as error:
        raise _unreadable(directory, error) from error
    if pipe is not None:
        raise CheckpointError(f"{shown(pipe)}: a pipe, not a file; remove it")
    return frozenset(path.name for path in paths)


def require_no_pipe(directory: Path) -> None:
    """Raise CheckpointError if a folder has a pipe, or is unreadable."""
    _names(directory)


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEAD_BYTES)


def _some(directory: Path, *patterns: str) -> str:
    """Return the first names that match, for a message, or "" if there are none."""
    found = sorted({name for pattern in patterns for name in _matching(directory, pattern)})
    return _listed([shown(Path(name)) for name in found])


def _matching(directory: Path, pattern: str) -> list[str]:
    return [path.name for path in directory.glob(pattern)]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
    return ", ".join(names[:_MAX_SHOWN]) + more


def _unreadable(path: Path, error: OSError | ValueError) -> CheckpointError:
    if isinstance(error, PermissionError):
        return CheckpointError(
            f"{shown(path)}: the user {hub.user_name()} may not read it on {socket.gethostname()};"
            " give it the right to, or put the model where it may"
        )
    reason = error.strerror if isinstance(error, OSError) else None
    return CheckpointError(f"{shown(path)}: cannot be read: {reason or error}; give another path")
