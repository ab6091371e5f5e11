"""Names the files of other programs by what is in them, and says what to do with them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from model.bounded import read_json

_ZIP = b"PK\x03\x04"
_TAR, _TAR_AT = b"ustar", 257
_LLAMAFILE = b"MZqFpD"
_MODELFILE = "Modelfile"

_STATES = re.compile(
    r"(optimizer|scheduler|scaler|rng_state\w*|training_args|trainer_state)\.(bin|pt|pth)"
)
"""The pickles beside the weights of a training run."""

_MAX_MANIFESTS = 200
_MAX_MANIFEST_BYTES = 1 << 20
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_OLLAMA_MODEL = "application/vnd.ollama.image.model"


def kind_of_archive(head: bytes) -> str | None:
    """Name an archive by its first bytes, with the advice; None if it is none that is known."""
    if head[_TAR_AT : _TAR_AT + len(_TAR)] == _TAR:
        return "a tar archive: unpack it"
    if head.startswith(_LLAMAFILE):
        return "a llamafile, a program with a model in it: `unzip` it, and give its GGUF file"
    first = _first_member(head) if head.startswith(_ZIP) else ""
    if first.endswith("/data.pkl"):
        return "a PyTorch pickle, which can run any code and is never read: get safetensors"
    return "a zip archive: unpack it" if first else None


def _first_member(head: bytes) -> str:
    """Return the name of a zip archive's first file, or "" if it cannot be read."""
    length = int.from_bytes(head[26:28], "little")
    name = head[30 : 30 + length].decode("utf-8", "replace")
    return name if len(name) == length and name.isprintable() else ""


def is_modelfile(path: Path) -> bool:
    return path.name == _MODELFILE


def modelfile_advice(path: Path) -> str:
    """Say what to give instead of Ollama's recipe for a model."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            lines = file.read(_MAX_MANIFEST_BYTES).splitlines()
    except OSError:
        lines = []
    named = next((line.split()[1:2] for line in lines if line.upper().startswith("FROM ")), [])
    of = f" of {_printable(named[0])}" if named else ""
    return f"a Modelfile{of}, Ollama's recipe, which has no weights: give that model instead"


def folder_advice(directory: Path, names: frozenset[str]) -> str | None:
    """Describe a folder of Ollama's, and say what to give; None for other folders."""
    store = directory / "models" if "models" in names and "blobs" not in names else directory
    if (store / "manifests").is_dir() and (store / "blobs").is_dir():
        found = [_printable(f"{name} is {path}") for name, path in ollama_models(store)]
        more = f" and {len(found) - 2} more" if len(found) > 2 else ""
        if not found:
            return "Ollama's store, without a model"
        return f"Ollama's store of models: give the file of one ({'; '.join(found[:2])}{more})"
    return modelfile_advice(directory / _MODELFILE) if _MODELFILE in names else None


def ollama_models(store: Path) -> Iterator[tuple[str, Path]]:
    """Yield the name and the GGUF file of each model in Ollama's store that is whole."""
    manifests = sorted((store / "manifests").glob("*/*/*/*"))
    for manifest in manifests[:_MAX_MANIFESTS]:
        try:
            values = read_json(manifest, _MAX_MANIFEST_BYTES)
            layers = values["layers"]
            digests = [x["digest"] for x in layers if x["mediaType"] == _OLLAMA_MODEL]
            found = _DIGEST.fullmatch(digests[0])
        except (OSError, ValueError, TypeError, LookupError):
            continue
        blob = store / "blobs" / f"sha256-{found[1]}" if found else None
        if blob is not None and blob.is_file():
            yield f"{manifest.parent.name}:{manifest.name}", blob


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:300]


def is_only_state(files: list[str]) -> bool:
    """Whether these pickles are what a training run keeps beside its weights."""
    return all(map(_STATES.fullmatch, files))
