"""The weight files of a model's folder, and what an index says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from model.bounded import read_json
from model.errors import CheckpointError
from model.families.embedders import dense_folders
from model.given import INDEX as _INDEX
from model.given import SINGLE as _SINGLE
from model.given import kind_of_file, without_weights
from model.safetensors import SafetensorsFile, read_safetensors
from model.weights import StoredTensor

_SHOWN_NAMES = 3


def open_shards(directory: Path) -> dict[str, SafetensorsFile]:
    """Return the weight files by name. A single file wins over an index, as in transformers."""
    if (directory / _SINGLE).exists():
        return {_SINGLE: read_safetensors(directory / _SINGLE)}
    index = directory / _INDEX
    if index.exists():
        return {name: _open_shard(directory, name) for name in _shard_names(index)}
    raise without_weights(directory)


def open_steps(directory: Path) -> dict[str, SafetensorsFile]:
    """Return the files of the linear layers behind an embedder's pooling, in order."""
    found = {}
    for folder in dense_folders(directory):
        if not (folder / _SINGLE).exists():
            raise CheckpointError(
                f"{folder}: {_SINGLE} is missing; complete the download, or convert the model to "
                "safetensors"
            )
        found[f"{folder.name}/{_SINGLE}"] = read_safetensors(folder / _SINGLE)
    return found


def _open_shard(directory: Path, name: str) -> SafetensorsFile:
    if not (directory / name).exists():
        raise CheckpointError(
            f"{directory / name}: missing, but {_INDEX} lists it; complete the download"
        )
    return read_safetensors(directory / name)


def unread_files(directory: Path, shards: Mapping[str, SafetensorsFile]) -> str:
    """Return a line that names unread weights beside the others, or "" if there are none."""
    unread = {path.name for path in directory.glob("*.safetensors")} - shards.keys()
    index = directory / _INDEX
    if _SINGLE in shards and index.exists() and _listed(index) != {_SINGLE}:
        unread.add(_INDEX)
    read = some(sorted(shards))
    return f"{directory}: {some(sorted(unread))} ignored, the weights are {read}" * bool(unread)


def wrong_places(directory: Path, tensors: Mapping[str, StoredTensor]) -> str:
    """Return a line that names tensors in other files than the index in use says."""
    index = directory / _INDEX
    if (directory / _SINGLE).exists() or not index.exists():
        return ""
    wrong = [
        name
        for name, shard in _weight_map(index).items()
        if name in tensors and tensors[name].path.name != shard
    ]
    where = "not in the files that the index names, but read where they are"
    return f"{index}: {some(sorted(wrong))} {where}" * bool(wrong)


def _listed(index: Path) -> set[str]:
    """Return the files of an index that is not used, or none if it is damaged."""
    try:
        return set(_shard_names(index))
    except CheckpointError:
        return set()


def some(names: Sequence[str]) -> str:
    """Return the first of many names, and the number of further ones."""
    shown = [name if name.isprintable() else repr(name) for name in names[:_SHOWN_NAMES]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _shard_names(index: Path) -> list[str]:
    """Return an index's file names. They must be beside it, because a path could name any file."""
    return sorted(set(_weight_map(index).values()))


def _weight_map(index: Path) -> dict[str, str]:
    """Return the index's map of tensor names to names of files beside it."""
    try:
        values = read_json(index)
    except OSError as error:
        raise CheckpointError(f"{index}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        kind = kind_of_file(index)
        wrong = f"not an index, but {kind}" if kind else f"{error}; fetch it again"
        raise CheckpointError(f"{index}: {wrong}") from error
    weight_map = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map; fetch it again")
    for name in weight_map.values():
        plain = isinstance(name, str) and name.isprintable() and not set(name) & set("/\\:")
        if not plain or not name.endswith(".safetensors") or name.startswith("."):
            raise CheckpointError(
                f"{index}: lists {name!r}; only .safetensors files beside it are read"
            )
    return weight_map
