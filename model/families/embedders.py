"""The files of sentence-transformers beside a model: how a text's vector comes from its rows.

modules.json lists the steps: the model, pooling, and maybe the division by the length. A decoder
that has this file is an embedder, and generates nothing. Its layers stay causal.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from model.bounded import read_json
from model.errors import CheckpointError, UnsupportedModelError
from model.spec import ModelSpec, OutputSpec, Pooling

MODULES = "modules.json"
PROMPTS = "config_sentence_transformers.json"

_MAX_BYTES = 1 << 20
_POOLING: dict[str, Pooling] = {
    "cls": "first",
    "cls_token": "first",
    "mean": "mean",
    "mean_tokens": "mean",
    "lasttoken": "last",
}


def with_files(spec: ModelSpec, directory: Path) -> ModelSpec:
    """Return the model with the output that these files describe, or as it is without them.

    Raises UnsupportedModelError for a step that is not implemented, CheckpointError for a file that
    is missing or malformed.
    """
    modules = directory / MODULES
    if not modules.is_file() or (spec.output is not None and spec.output.kind != "vector"):
        return spec
    steps = [_step(modules, item) for item in _list(modules)]
    pooling: Pooling | None = None
    normalized = False
    for kind, path in steps:
        match kind:
            case "Transformer":
                continue
            case "Pooling":
                pooling = _pooling(directory / path / "config.json")
            case "Normalize":
                normalized = True
            case _:
                raise UnsupportedModelError(
                    f"{modules}: a step of type {kind} is not implemented; "
                    "known: Transformer, Pooling, Normalize"
                )
    if pooling is None:
        raise CheckpointError(f"{modules}: has no Pooling step; is the download complete?")
    output = OutputSpec("vector", pooling, normalized=normalized)
    return replace(spec, output=output, tied_head=False, logit_cap=None)


def _pooling(path: Path) -> Pooling:
    values = _object(path)
    prefix = "pooling_mode_"
    wanted = [key.removeprefix(prefix) for key, value in values.items() if value is True]
    wanted = [name for name in wanted if f"{prefix}{name}" in values]
    if isinstance(values.get("pooling_mode"), str):
        wanted = [values["pooling_mode"]]
    if len(wanted) != 1 or wanted[0] not in _POOLING or values.get("include_prompt") is False:
        raise UnsupportedModelError(
            f"{path}: pooling {', '.join(wanted) or 'of no kind'} is not implemented; "
            f"known: {', '.join(sorted(_POOLING))}, each alone and with its prompt"
        )
    return _POOLING[wanted[0]]


def _step(modules: Path, item: object) -> tuple[str, str]:
    """Return the type of a step, and its folder, which is inside the model's."""
    kind, path = (item.get("type"), item.get("path", "")) if isinstance(item, dict) else ("", ".")
    if isinstance(kind, str) and isinstance(path, str):
        inside = path.isprintable() and not set(path) & set("/\\:.")
        if kind and (path == "" or inside):
            return kind.rpartition(".")[2], path
    raise CheckpointError(f"{modules}: not a list of steps with type and path; fetch it again")


def _object(path: Path) -> dict[str, Any]:
    values = _read(path)
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: not a JSON object; fetch it again")
    return values


def _list(path: Path) -> list[Any]:
    values = _read(path)
    if not isinstance(values, list):
        raise CheckpointError(f"{path}: not a JSON list; fetch it again")
    return values


def _read(path: Path) -> Any:
    try:
        return read_json(path, _MAX_BYTES)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror or error}); complete the download"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; fetch it again") from error
