"""Writes a smaller model as a folder that Hugging Face's libraries read, and shoal too."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from compression.cuts import Cut, Shape, cut_spec
from compression.errors import CompressionError
from compression.network import require_plain
from model.checkpoint import Checkpoint
from model.errors import ModelError
from model.families import Config, Piece, describe, tensor_sources
from model.families.quantization import read_quantization
from model.given import CONFIG, INDEX, SINGLE, gguf_of
from model.safetensors import write_safetensors
from model.spec import ModelSpec

Array = npt.NDArray[Any]

_FIELDS = {
    "layers": ("num_hidden_layers", "n_layer"),
    "heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads",),
    "ffn": ("intermediate_size", "ffn_dim"),
}
"""The names of sizes in config.json."""
_BY_LAYER = ("layer_types", "no_rope_layers")
"""Lists in config.json with one value for each layer."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".msgpack", ".h5")
_MAX_COPIED_BYTES = 256 << 20


def check_source(checkpoint: Checkpoint) -> None:
    """Raise CompressionError unless the weights are stored as they are used, in plain types.

    The model must be one that ``network`` computes, and config.json must be able to describe a
    smaller one.
    """
    if checkpoint.spec.encodes:
        raise CompressionError(
            f"{checkpoint.directory}: it encodes texts: only models that generate can be compressed"
        )
    require_plain(checkpoint.spec)
    if gguf_of(checkpoint.directory) is not None:
        raise CompressionError(f"{checkpoint.directory}: a GGUF file: give the original folder")
    if checkpoint.native_formats() or read_quantization(checkpoint.config) is not None:
        raise CompressionError(f"{checkpoint.directory}: it is quantized: give the original folder")
    for block in range(checkpoint.spec.block_count):
        for canonical, source in _sources(checkpoint, checkpoint.spec, block).items():
            if source != (Piece(source[0].name),):
                raise CompressionError(
                    f"{checkpoint.directory}: {checkpoint.config.model_type} stores {canonical} "
                    "fused or scaled: only families that store matrices as they are used can be "
                    "compressed"
                )
    spec = checkpoint.spec
    first = spec.layers[0]
    cut_config(checkpoint, Cut((0,), (tuple(range(first.kv_heads)),), ((0,),)))


def can_cut_heads(checkpoint: Checkpoint) -> bool:
    """Say if config.json can describe fewer heads of the same width. OPT's cannot."""
    spec = checkpoint.spec
    first = spec.layers[0]
    if first.kv_heads < 2:
        return False
    smaller = Cut(
        tuple(range(len(spec.layers))),
        (tuple(range(first.kv_heads - 1)),) * len(spec.layers),
        (tuple(range(first.ffn)),) * len(spec.layers),
    )
    try:
        cut_config(checkpoint, smaller)
    except CompressionError:
        return False
    return True


def cut_config(checkpoint: Checkpoint, cut: Cut) -> dict[str, Any]:
    """Return config.json of the smaller model. Raises CompressionError if none describes it."""
    spec, values = checkpoint.spec, dict(checkpoint.config.values)
    shape = cut.shape
    first = spec.layers[0]
    group = first.heads // first.kv_heads
    sizes = {
        "layers": shape.layers,
        "heads": shape.kv_heads * group,
        "kv_heads": shape.kv_heads,
        "ffn": shape.ffn,
    }
    for what, size in sizes.items():
        for name in _FIELDS[what]:
            if name in values:
                values[name] = size
    if first.head_dim * first.heads != spec.hidden or shape.kv_heads != first.kv_heads:
        values["head_dim"] = first.head_dim
    for name in _BY_LAYER:
        if isinstance(values.get(name), list) and len(values[name]) >= len(spec.layers):
            values[name] = [values[name][layer] for layer in cut.layers]
    wanted = cut_spec(spec, cut)
    try:
        found = describe(Config(checkpoint.config.path, values), checkpoint.directory)
    except ModelError as error:
        raise _not_described(checkpoint, shape) from error
    if found != wanted:
        raise _not_described(checkpoint, shape)
    return values


def write_folder(
    checkpoint: Checkpoint,
    cut: Cut,
    blocks: Sequence[Mapping[str, Array]],
    directory: Path,
    about: str,
) -> None:
    """Write the smaller model's folder, whole or not at all. An older one is replaced.

    blocks: its canonical tensors. They are stored in the types of the original.
    about: the text of README.md.

    Raises CompressionError, CheckpointError and OSError.
    """
    config = cut_config(checkpoint, cut)
    tensors, bfloat16 = _named(checkpoint, cut, blocks, config)
    directory.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=".partial-", dir=directory.parent))
    try:
        made.chmod(0o755)
        write_safetensors(made / SINGLE, tensors, {"format": "pt"}, bfloat16)
        (made / SINGLE).chmod(0o644)
        (made / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (made / "README.md").write_text(about, encoding="utf-8")
        for path in sorted(checkpoint.directory.iterdir()):
            if _is_copied(path):
                shutil.copyfile(path, made / path.name)
        if directory.exists():
            shutil.rmtree(directory)
        made.rename(directory)
    except BaseException:  # Whatever it is, no half a folder stays.
        shutil.rmtree(made, ignore_errors=True)
        raise


def _named(
    checkpoint: Checkpoint, cut: Cut, blocks: Sequence[Mapping[str, Array]], config: dict[str, Any]
) -> tuple[dict[str, Array], frozenset[str]]:
    """The tensors by their names in the file, and which of them hold bf16 patterns."""
    spec = cut_spec(checkpoint.spec, cut)
    origin = [0, *(layer + 1 for layer in cut.layers), checkpoint.spec.head_block]
    smaller = replace(checkpoint, config=Config(checkpoint.config.path, config))
    tensors: dict[str, Array] = {}
    bfloat16 = set()
    for block, tensors_of_block in enumerate(blocks):
        names = _sources(smaller, spec, block)
        before = _sources(checkpoint, checkpoint.spec, origin[block])
        for canonical, values in tensors_of_block.items():
            name = names[canonical][0].name
            dtype = checkpoint.tensors[before[canonical][0].name].dtype
            if dtype == "BF16":
                bfloat16.add(name)
            tensors[name] = stored(values, dtype)
    return tensors, frozenset(bfloat16)


def _sources(checkpoint: Checkpoint, spec: ModelSpec, block: int) -> dict[str, tuple[Piece, ...]]:
    return tensor_sources(checkpoint.config, spec, block, checkpoint.tensors)


def stored(values: Array, dtype: str) -> Array:
    """Return values as they are stored: fp16, fp32, or the patterns of bf16 (to nearest even)."""
    wide = np.ascontiguousarray(values, np.float32)
    if dtype == "F16":
        return wide.astype(np.float16)
    if dtype == "BF16":
        patterns = wide.view(np.uint32)
        odd = (patterns >> 16) & 1
        return ((patterns + 0x7FFF + odd) >> 16).astype(np.uint16)
    return wide


def _is_copied(path: Path) -> bool:
    if path.name in (CONFIG, INDEX, "README.md") or path.name.startswith("."):
        return False
    weights = path.suffix in _WEIGHTS or path.name.endswith(".index.json")
    return path.is_file() and not weights and path.stat().st_size <= _MAX_COPIED_BYTES


def _not_described(checkpoint: Checkpoint, shape: Shape) -> CompressionError:
    return CompressionError(
        f"{checkpoint.directory}: no config.json of {checkpoint.config.model_type} describes "
        f"{shape}"
    )
