"""The metadata and the tensors of a GGUF model, with typed access. Messages name the file."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from model.errors import CheckpointError, UnsupportedModelError
from model.gguf import GgufEntry, GgufFile, GgufTensor, Strings, short_number
from model.spec import MAX_SIZE

_ENDS = frozenset(
    (
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>",
        "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|return|>", "<|call|>",
        "[|endofturn|]", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<end_of_utterance>",
    )
)  # fmt: skip
"""Control tokens that end an answer, whether the metadata names them or not. As in llama.cpp."""
_CONTROL = 3


class GgufMetadata:
    """The metadata and the tensors of all files of a model, with typed access."""

    def __init__(self, files: tuple[GgufFile, ...]) -> None:
        self.path = files[0].path
        self.metadata = files[0].metadata
        self._digest = files[0].digest
        self.places: dict[str, GgufFile] = {}
        for file in files:
            for name in file.entries:
                if name in self.places:
                    raise CheckpointError(
                        f"{file.path}: tensor {name!r} is also in {self.places[name].path.name}"
                    )
                self.places[name] = file
        self.name = self.text("general.architecture", "")

    def entry(self, name: str) -> GgufEntry:
        """Return a tensor's place. Raises CheckpointError if there is none."""
        if name not in self.places:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is missing; is the download complete?"
            )
        return self.places[name].entries[name]

    def numbers(self, name: str) -> list[float]:
        """Return the values of a small tensor."""
        entry = self.entry(name)
        if len(entry.shape) != 1 or entry.shape[0] > MAX_SIZE:
            raise CheckpointError(f"{self.path}: tensor {name!r} has the shape {entry.shape}")
        values = GgufTensor(self.places[name], name, entry.shape).float32()
        return [short_number(value) for value in values]

    def text(self, key: str, default: str) -> str:
        value = self.metadata.get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "a text", value)
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """Return a count that all layers share."""
        value = self._value(key, default)
        if isinstance(value, np.ndarray):
            if len(set(value.tolist())) != 1:
                raise UnsupportedModelError(
                    f"{self.path}: {key} differs between layers, which is not implemented"
                )
            value = value[0].item()
        if type(value) is not int or not 0 <= value < MAX_SIZE:
            raise self._wrong(key, f"an integer in [0, {MAX_SIZE})", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, "a number", value)
        return short_number(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.metadata.get(self._key(key), default)
        if type(value) is not bool:
            raise self._wrong(key, "true or false", value)
        return value

    def has(self, key: str) -> bool:
        return self._key(key) in self.metadata

    def token(self, name: str) -> int | None:
        """Return the id of a special token, or None."""
        value = self.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if value is None or value == 0xFFFFFFFF:
            return None
        if type(value) is not int or not 0 <= value < MAX_SIZE:
            raise self._wrong(f"tokenizer.ggml.{name}_token_id", "a token", value)
        return value

    def end_tokens(self) -> list[int]:
        """Return the tokens that end an answer, that of the metadata first."""
        named = [self.token(name) for name in ("eos", "eot", "eom")]
        tokens, kinds = (self.metadata.get(f"tokenizer.ggml.{key}") for key in _TOKEN_LISTS)
        known: list[int] = []
        if isinstance(tokens, Strings) and isinstance(kinds, np.ndarray):
            control = set(np.flatnonzero(kinds == _CONTROL).tolist())
            known = [index for index in _texts_that_end(tokens, self._digest) if index in control]
        return [token for token in dict.fromkeys([*named, *known]) if token is not None]

    def windows(self, period: int) -> list[bool]:
        """Return which layers have a sliding window: by the metadata, or all but each n-th."""
        count = self.size("block_count")
        pattern = self.metadata.get(self._key("attention.sliding_window_pattern"), period)
        if isinstance(pattern, np.ndarray):
            if len(pattern) < count:
                raise self._wrong("attention.sliding_window_pattern", f"{count} flags", pattern)
            return [bool(value) for value in pattern[:count]]
        if type(pattern) is not int or pattern < 0:
            raise self._wrong("attention.sliding_window_pattern", "a number of layers", pattern)
        return [pattern > 0 and (layer + 1) % pattern != 0 for layer in range(count)]

    def _value(self, key: str, default: Any) -> Any:
        value = self.metadata.get(self._key(key), default)
        if value is None:
            raise CheckpointError(
                f"{self.path}: the metadata has no {self._key(key)}; get another conversion"
            )
        return value

    def _key(self, key: str) -> str:
        return f"{self.name}.{key}"

    def _wrong(self, key: str, expected: str, value: Any) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: {key} in the metadata must be {expected}, not {str(value)[:80]}"
        )


_TOKEN_LISTS = ("tokens", "token_type")


@functools.lru_cache(maxsize=32)
def _texts_that_end(tokens: Strings, _digest: str) -> tuple[int, ...]:
    """Return the tokens whose texts are in _ENDS, once for each header: a load asks many times."""
    return tuple(index for index, token in enumerate(tokens) if token in _ENDS)
