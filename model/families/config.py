"""config.json with typed access. Messages name the file and the field."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.bounded import read_json
from model.errors import CheckpointError, UnsupportedModelError
from model.given import CONFIG, gguf_of, kind_of_file, require_model
from model.spec import MAX_LAYERS, MAX_SIZE, Activation

_MAX_CONFIG_BYTES = 16 << 20

_ACTIVATIONS: Mapping[str, Activation] = {
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclass(frozen=True, slots=True)
class Config:
    """config.json with typed access. Messages name the file and the field."""

    path: Path
    values: Mapping[str, Any]

    @property
    def model_type(self) -> str:
        return self.text("model_type")

    def has(self, key: str) -> bool:
        """Whether the key is present and not null."""
        return self.values.get(key) is not None

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "a string", value)
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """Return a positive count. Raises CheckpointError if it is not an int, or absurd."""
        value = self._get(key, default)
        if type(value) is not int or not 0 < value < MAX_SIZE:
            raise self._wrong(key, f"an integer in [1, {MAX_SIZE})", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a positive finite number."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, "a number", value)
        if not 0 < value < math.inf:
            raise self._wrong(key, "a positive number", value)
        return float(value)

    def numbers(self, key: str) -> tuple[float, ...]:
        """Return a list of positive finite numbers."""
        values = self._get(key, None)
        if not isinstance(values, list) or len(values) >= MAX_SIZE:
            raise self._wrong(key, "a list of numbers", values)
        return tuple(Config(self.path, {key: value}).number(key) for value in values)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if type(value) is not bool:
            raise self._wrong(key, "true or false", value)
        return value

    def tokens(self, key: str) -> tuple[int, ...]:
        """Return token ids from null, one id, or a list of them."""
        value = self.values.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(item) is int and 0 <= item < MAX_SIZE for item in ids):
            raise self._wrong(key, "a token id or a list of them", value)
        return tuple(ids)

    def strings(self, key: str) -> list[str]:
        """Return a list of strings, empty if the key is absent or null."""
        value = self.values.get(key) or []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise CheckpointError(f"{self.path}: {key} must be a list of strings")
        return value

    def bos_token(self) -> int | None:
        """Return bos_token_id, or the first of several."""
        tokens = self.tokens("bos_token_id")
        return tokens[0] if tokens else None

    def layer_count(self, key: str = "num_hidden_layers") -> int:
        """Return the number of layers."""
        count = self.size(key)
        if count > MAX_LAYERS:
            raise CheckpointError(f"{self.path}: {key} = {count} is absurd")
        return count

    def activation(self, key: str, default: str) -> Activation:
        name = self.text(key, default)
        if name not in _ACTIVATIONS:
            raise self.unsupported(key, name, f"known: {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[name]

    def unsupported(self, key: str, value: Any, advice: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self.path}: {key} = {json.dumps(value)[:80]} is not implemented; {advice}"
        )

    def lacking(self, feature: str) -> UnsupportedModelError:
        """Return the error for a model that needs a feature which is not implemented."""
        return UnsupportedModelError(
            f"{self.path}: {self.model_type} needs what is not implemented: {feature}"
        )

    def with_defaults(self, defaults: Mapping[str, Any]) -> Config:
        """Return the config with values for absent keys. A key that is null is present."""
        return Config(self.path, {**defaults, **self.values})

    def nested(self, key: str) -> Config | None:
        """Return an object inside the config, or None if it is absent or empty."""
        value = self.values.get(key)
        if not value:
            return None
        if not isinstance(value, dict):
            raise self._wrong(key, "an object", value)
        return Config(self.path, value)

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is None:
            raise CheckpointError(f"{self.path}: {key} is missing; is this a model's config.json?")
        return default

    def _wrong(self, key: str, expected: str, value: Any) -> CheckpointError:
        shown = repr(value)[:80]
        return CheckpointError(f"{self.path}: {key} must be {expected}, not {shown}")


def read_config(directory: Path) -> Config:
    """Read config.json of a model directory, or what a GGUF file says instead.

    Raises CheckpointError that names the fault, UnsupportedModelError for an unknown architecture
    of a GGUF file.
    """
    require_model(directory)
    gguf = gguf_of(directory)
    if gguf is not None:
        from model.gguf_map import read_values  # Slow to import, seldom used.

        return Config(gguf, read_values(gguf))
    return read_config_file(directory / CONFIG)


def read_config_file(path: Path) -> Config:
    """As ``read_config``, of a file by any name."""
    try:
        values = read_json(path, _MAX_CONFIG_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        kind = kind_of_file(path)
        what = f"{error}; fetch it again" if kind is None else f"it is {kind}"
        raise CheckpointError(f"{path}: {what}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: not a JSON object; fetch it again")
    return Config(path, values)
