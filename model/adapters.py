"""LoRA adapters, as PEFT writes them, merged into a checkpoint's tensors on reading.

A matrix W becomes W + scaling * B @ A when its block is read. So the merge takes the memory of one
matrix, and whatever quantizes the block sees the merged one. Whatever PEFT would compute otherwise
is refused by its name.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.bounded import read_json
from model.errors import CheckpointError, UnsupportedModelError
from model.families.config import Config
from model.given import ADAPTER, require_no_pipe, shown
from model.safetensors import SafetensorsFile, read_safetensors
from model.weights import PlainTensor, Rows, StoredTensor

WEIGHTS = "adapter_model.safetensors"
NO_ADAPTER = "none"
"""The name that a user gives to run a base model without the adapter in its folder."""

MERGED = " with LoRA"
"""The end of the type of merged tensors."""

_MAX_CONFIG_BYTES = 1 << 20
_PREFIX = "base_model.model."
_PREFIXES = ("model", "transformer", "decoder", "language_model")
"""The parts that names in checkpoints of one family begin with, or lack."""
_PARTS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")
_NUMBERS = ("F32", "F16", "BF16")
_CHANGED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of ``init_lora_weights`` whose adapters belong to a base with changed weights."""
_MOVED = {
    "use_dora": "DoRA (use_dora)",
    "use_qalora": "QA-LoRA (use_qalora)",
    "lora_bias": "a bias of lora_B (lora_bias)",
    "layer_replication": "repeated layers (layer_replication)",
    "target_parameters": "LoRA of fused experts (target_parameters)",
    "trainable_token_indices": "trained tokens (trainable_token_indices)",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "arrow_config": "routed adapters (arrow_config)",
    "use_bdlora": "block-diagonal LoRA (use_bdlora)",
}
"""Options that change what PEFT computes, and their names."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """The validated header and settings of an adapter's folder. Use ``open`` to get one."""

    directory: Path
    config: Config
    file: SafetensorsFile
    pairs: Mapping[str, tuple[PlainTensor, PlainTensor]] = field(default_factory=dict)
    """Maps a module to A [r, in] and B [out, r]. An embedding's are [r, rows] and [columns, r]."""
    embeddings: frozenset[str] = frozenset()
    """The modules of ``pairs`` that are embeddings."""
    whole: Mapping[str, PlainTensor] = field(default_factory=dict)
    """Maps a tensor to one that replaces it (modules_to_save, trained biases)."""

    @staticmethod
    def open(directory: Path) -> Adapter:
        """Read and check an adapter's settings and header.

        Raises CheckpointError for missing or damaged files, UnsupportedModelError for another kind
        of adapter and for options that change what PEFT computes.
        """
        require_no_pipe(directory)
        config = _read_config(directory)
        _refuse_options(config)
        path = directory / WEIGHTS
        if not path.exists():
            pickled = (directory / "adapter_model.bin").exists()
            raise CheckpointError(
                f"{shown(path)}: missing; "
                + (
                    "adapter_model.bin can run any code and is never read: save the adapter again "
                    "with peft's save_pretrained(..., safe_serialization=True)"
                    if pickled
                    else "is the download complete?"
                )
            )
        file = read_safetensors(path)
        pairs: dict[str, dict[str, PlainTensor]] = {}
        whole: dict[str, PlainTensor] = {}
        for name in file.entries:
            module, part = _place(file, name)
            if part in _PARTS:
                pairs.setdefault(module, {})[part] = PlainTensor(file, name)
            else:
                whole[f"{module}.{part}"] = PlainTensor(file, name)
        complete = {module: _pair(file, module, parts) for module, parts in pairs.items()}
        embeddings = frozenset(module for module in pairs if _PARTS[2] in pairs[module])
        return Adapter(directory, config, file, complete, embeddings, whole)

    def replaces(self, name: str) -> bool:
        """Whether the adapter has a whole tensor of this name."""
        return name in self.whole

    def feed(self, digest: Any) -> None:
        """Add all that identifies the adapter to a hash. Raises CheckpointError."""
        try:
            status = self.file.path.stat()
            text = self.config.path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{error.filename}: vanished while reading it") from error
        for part in (
            text,
            f"{status.st_size} {status.st_mtime_ns}".encode(),
            self.file.header,
        ):
            digest.update(hashlib.sha256(part).digest())

    def merged(self, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
        """Return a checkpoint's tensors with this adapter merged.

        Raises CheckpointError for modules that the checkpoint does not have, or of another shape.
        """
        result = dict(tensors)
        for name, tensor in self.whole.items():
            found = self._find(name, tensors, missing=name == "lm_head.weight")
            result[found] = tensor
        for module, (a, b) in self.pairs.items():
            name = self._find(f"{module}.weight", tensors)
            base = result[name]
            shape = (b.shape[0], a.shape[1])
            transposed = module in self.embeddings or self.config.flag("fan_in_fan_out", False)
            if shape[0] != shape[1] and base.shape in (shape, shape[::-1]):
                transposed = base.shape != shape
            if base.shape != (shape[::-1] if transposed else shape):
                raise CheckpointError(
                    f"{shown(self.file.path)}: its matrix for {name!r} has shape {list(shape)}, "
                    f"but the model's is {list(base.shape)}: it belongs to another model"
                )
            result[name] = MergedTensor(base, a, b, self.scaling(module), transposed)
        return result

    def scaling(self, module: str) -> float:
        """Return the factor on B @ A of a module."""
        rank = self._pattern("rank_pattern", module) or self.config.size("r", 8)
        alpha = self._pattern("alpha_pattern", module) or self.config.number("lora_alpha", 8)
        stored = self.pairs[module][0].shape[0]
        if rank != stored:
            raise CheckpointError(
                f"{shown(self.config.path)}: gives {module!r} the rank {rank:g}, but its matrices "
                f"have {stored}"
            )
        rooted = self.config.flag("use_rslora", False)
        return float(alpha / (math.sqrt(rank) if rooted else rank))

    def _pattern(self, key: str, module: str) -> float | None:
        """Return a module's value of a table of patterns. As in PEFT, a name matches its end."""
        table = self.config.nested(key)
        for pattern in table.values if table is not None else ():
            if table is not None and self._matches(key, pattern, module):
                return table.number(pattern)
        return None

    def _matches(self, key: str, pattern: str, module: str) -> bool:
        # A stranger's pattern may take forever, but not without nested or many repetitions.
        simple = len(re.findall(r"[*+{?]", pattern)) <= 3 and not re.search(r"\)[*+{?]", pattern)
        try:
            compiled = re.compile(rf"(.*\.)?({pattern.lstrip('^')})$") if simple else None
        except re.error:
            compiled = None
        if compiled is None:
            raise UnsupportedModelError(
                f"{shown(self.config.path)}: {key} has the pattern {pattern[:60]!r}, which is not "
                "read; merge the adapter with peft, and give the merged model"
            )
        return compiled.match(module) is not None

    def _find(
        self, name: str, tensors: Mapping[str, StoredTensor], *, missing: bool = False
    ) -> str:
        """Return the checkpoint's name of a tensor, which may lack some of the prefix or have more.

        missing: it may also be absent.
        """
        asked = name
        while True:
            if name in tensors:
                return name
            ends = [known for known in tensors if known.endswith(f".{name}")]
            if len(ends) == 1:
                return ends[0]
            first, _, rest = name.partition(".")
            if first not in _PREFIXES:
                break
            name = rest
        if missing:
            return asked
        raise CheckpointError(
            f"{shown(self.file.path)}: changes {asked!r}, which the model does not have; it is an "
            f"adapter of {self.base or 'another model'}"
        )

    @property
    def base(self) -> str:
        """The base model that the settings name, or ""."""
        return base_of(self.config.values)


@dataclass(frozen=True, slots=True)
class MergedTensor(StoredTensor):
    """A stored tensor plus ``scaling`` * b @ a, or its transpose."""

    base: StoredTensor
    a: PlainTensor
    b: PlainTensor
    scaling: float
    transposed: bool

    @property
    def path(self) -> Path:
        return self.base.path

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> str:
        return f"{self.base.dtype}{MERGED}"

    @property
    def readable(self) -> bool:
        return self.base.readable

    def float32(self, rows: Rows = slice(None)) -> npt.NDArray[np.float32]:
        a, b = self.a.float32(), self.b.float32()
        change: npt.NDArray[np.float32] = (a.T[rows] @ b.T) if self.transposed else (b[rows] @ a)
        change *= np.float32(self.scaling)
        change += self.base.float32(rows)
        return change


def base_of(values: Any) -> str:
    """Return the base model that an adapter's settings name, or ""."""
    named = values.get("base_model_name_or_path") if isinstance(values, Mapping) else None
    return named[:200] if isinstance(named, str) else ""


def _read_config(directory: Path) -> Config:
    path = directory / ADAPTER
    try:
        values = read_json(path, _MAX_CONFIG_BYTES)
    except FileNotFoundError:
        raise CheckpointError(
            f"{shown(directory)}: not an adapter: it has no {ADAPTER}; give the folder that peft's "
            "save_pretrained wrote"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{shown(path)}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{shown(path)}: {error}; fetch it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{shown(path)}: not a JSON object; fetch it again")
    return Config(path, values)


def _refuse_options(config: Config) -> None:
    kind = config.text("peft_type", "LORA")
    if kind != "LORA":
        raise UnsupportedModelError(
            f"{shown(config.path)}: adapters of the kind {kind[:40]!r} are not merged, only LORA; "
            "merge it with peft (merge_and_unload), and give the merged model"
        )
    init = config.values.get("init_lora_weights")
    changed = isinstance(init, str) and init.lower().startswith(_CHANGED_BASES)
    names = [name for key, name in _MOVED.items() if config.values.get(key)]
    if changed:
        names.append(f"init_lora_weights = {init!r}, which changes the base's weights too")
    if names:
        raise UnsupportedModelError(
            f"{shown(config.path)}: {names[0]} is not merged; merge it with peft "
            "(merge_and_unload), and give the merged model"
        )


def _place(file: SafetensorsFile, name: str) -> tuple[str, str]:
    """Return the module of the base model and the part of it that a tensor belongs to."""
    if file.entries[name].dtype not in _NUMBERS:
        raise CheckpointError(
            f"{shown(file.path)}: {name!r} is stored as {file.entries[name].dtype}, not as a float"
        )
    place = name.removeprefix(_PREFIX).replace(".modules_to_save.", ".")
    place = place.replace(".base_layer.", ".")
    for part in (*_PARTS, "weight", "bias"):
        if place.endswith(f".{part}") and "lora_" not in place.removesuffix(part):
            return place.removesuffix(f".{part}"), part
    raise UnsupportedModelError(
        f"{shown(file.path)}: {name!r} is no part of a LoRA that can be merged; merge it with peft "
        "(merge_and_unload), and give the merged model"
    )


def _pair(
    file: SafetensorsFile, module: str, parts: Mapping[str, PlainTensor]
) -> tuple[PlainTensor, PlainTensor]:
    names = _PARTS[2:] if _PARTS[2] in parts else _PARTS[:2]
    a, b = (parts.get(name) for name in names)
    if a is None or b is None or len(parts) != 2:
        raise CheckpointError(
            f"{shown(file.path)}: {module!r} needs both matrices of a LoRA; is the download "
            "complete?"
        )
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or 0 in a.shape:
        raise CheckpointError(
            f"{shown(file.path)}: the matrices of {module!r} have shapes {list(a.shape)} and "
            f"{list(b.shape)}, which do not fit each other"
        )
    return a, b
