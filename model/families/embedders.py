"""The files of sentence-transformers beside a model: how a text's vector comes from its rows.

modules.json lists the steps: the model, pooling, maybe linear layers, and maybe the division by the
length. A decoder that has this file is an embedder, and generates nothing. Its layers stay causal.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from model.bounded import read_json
from model.errors import CheckpointError, UnsupportedModelError
from model.families.config import Config
from model.hub import SENTENCE_SETTINGS
from model.spec import POOLING_KEY, DenseActivation, ModelSpec, OutputSpec, Pooling, StepSpec

MODULES = "modules.json"
PROMPTS = "config_sentence_transformers.json"

_MAX_BYTES = 1 << 20
_POOLING: dict[str, Pooling] = {
    "cls": "first",
    "cls_token": "first",
    "max": "max",
    "max_tokens": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "mean_tokens": "mean",
    "lasttoken": "last",
    "weightedmean": "weighted_mean",
    "weightedmean_tokens": "weighted_mean",
}
_ACTIVATIONS: dict[str, DenseActivation] = {"Identity": "none", "ReLU": "relu", "Tanh": "tanh"}
_VECTOR_NAME = "sentence_embedding"
_ORDER = ("Transformer", "Pooling", "Dense", "Normalize")


def with_files(spec: ModelSpec, directory: Path) -> ModelSpec:
    """Return the model with the output that these files describe, or as it is without them.

    Raises UnsupportedModelError for a step that is not implemented, CheckpointError for a file that
    is missing or malformed.
    """
    modules = directory / MODULES
    if not modules.is_file() or (spec.output is not None and spec.output.kind != "vector"):
        return spec
    pooling: Pooling | None = None
    normalized = False
    dense: list[StepSpec] = []
    width = spec.hidden
    kinds = _steps(modules)
    for kind, path in kinds:
        match kind:
            case "Pooling":
                pooling = _pooling(directory / path / "config.json")
            case "Dense":
                dense.append(_dense(directory / path / "config.json", width))
                width = dense[-1].width
            case "Normalize":
                normalized = True
    if pooling is None:
        raise CheckpointError(f"{modules}: has no Pooling step; is the download complete?")
    output = OutputSpec("vector", pooling, normalized=normalized, steps=tuple(dense))
    output = replace(output, columns=_columns(directory / PROMPTS, width))
    length = _most_tokens(directory, spec.max_context)
    return replace(spec, output=output, tied_head=False, logit_cap=None, max_context=length)


def with_pooling(spec: ModelSpec, config: Config) -> ModelSpec:
    """Return the model as an embedder if its GGUF file has a pooling.

    Its vectors are divided by their length, as llama.cpp's server does.
    """
    pooling = _POOLING.get(config.text(POOLING_KEY, ""))
    if spec.output is not None or pooling is None:
        return spec
    output = OutputSpec("vector", pooling, normalized=True)
    return replace(spec, output=output, tied_head=False, logit_cap=None)


def _columns(path: Path, width: int) -> int:
    """Return how many of a vector's values are kept (truncate_dim), or 0 for all."""
    kept = _object(path).get("truncate_dim") if path.is_file() else None
    if kept is None:
        return 0
    if type(kept) is not int or kept < 1:
        raise CheckpointError(f"{path}: truncate_dim {kept!r:.40} is not a number of values")
    return 0 if kept >= width else kept


def _settings(directory: Path) -> tuple[Path, dict[str, Any]]:
    """Return the file about texts, and what is in it: nothing if there is none."""
    paths = [directory / name for name in SENTENCE_SETTINGS]
    path = next((path for path in paths if path.is_file()), None)
    return (paths[0], {}) if path is None else (path, _object(path))


def _most_tokens(directory: Path, context_tokens: int) -> int:
    """Return the longest text that the model was trained for, within its context.

    Where the file about texts says nothing, the tokenizer's settings count.
    """
    path, values = _settings(directory)
    length = values.get("max_seq_length")
    if length is None:
        path = directory / "tokenizer_config.json"
        own = _object(path).get("model_max_length") if path.is_file() else None
        return min(own, context_tokens) if type(own) is int and own > 0 else context_tokens
    if type(length) is not int or length < 1:
        raise CheckpointError(f"{path}: max_seq_length {length!r:.40} is not a number of tokens")
    return min(length, context_tokens)


def takes_lower_case(directory: Path) -> bool:
    """Whether all texts become lower case, whatever the tokenizer's own files say.

    Raises CheckpointError for a file that is malformed.
    """
    return _settings(directory)[1].get("do_lower_case") is True


def dense_folders(directory: Path) -> list[Path]:
    """Return the folders with the weights of linear layers behind the pooling, in order.

    Raises as ``with_files``.
    """
    modules = directory / MODULES
    if not modules.is_file():
        return []
    return [directory / path for kind, path in _steps(modules) if kind == "Dense"]


def _steps(modules: Path) -> list[tuple[str, str]]:
    """Return the type and the folder of each step. Raises as ``with_files``."""
    steps = [_step(modules, item) for item in _list(modules)]
    for kind, _ in steps:
        if kind not in _ORDER:
            raise UnsupportedModelError(
                f"{modules}: a step of type {kind} is not implemented; known: {', '.join(_ORDER)}"
            )
    kinds = [kind for kind, _ in steps]
    once = [kind for kind in kinds if kind != "Dense"]
    if kinds != sorted(kinds, key=_ORDER.index) or len(set(once)) < len(once):
        raise UnsupportedModelError(
            f"{modules}: steps in the order {', '.join(kinds)} are not implemented; they must come "
            f"as {', '.join(_ORDER)}"
        )
    return steps


def _dense(path: Path, width: int) -> StepSpec:
    """Return a linear layer that takes rows of this width. Raises as ``with_files``."""
    values = _object(path)
    name = str(values.get("activation_function", "torch.nn.modules.activation.Tanh"))
    activation = _ACTIVATIONS.get(name.rpartition(".")[2])
    if activation is None:
        raise UnsupportedModelError(
            f"{path}: the activation {name} is not implemented; known: {', '.join(_ACTIVATIONS)}"
        )
    if values.get("use_residual") is True:
        raise UnsupportedModelError(
            f"{path}: use_residual = true is not implemented; only steps without it are"
        )
    for key in ("module_input_name", "module_output_name"):
        if values.get(key, _VECTOR_NAME) != _VECTOR_NAME:
            raise UnsupportedModelError(
                f"{path}: {key} = {values[key]!r:.40} is not implemented; only {_VECTOR_NAME} is"
            )
    inward, outward, bias = (values.get(key) for key in ("in_features", "out_features", "bias"))
    bias = True if bias is None else bias
    if inward != width or type(outward) is not int or outward < 1 or type(bias) is not bool:
        raise CheckpointError(
            f"{path}: in_features, out_features and bias do not fit rows of {width} values"
        )
    return StepSpec(outward, activation, bias)


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
