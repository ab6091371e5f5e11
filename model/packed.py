"""Packed weights of other tools as the tensors that transformers' unquantized models have.

One module's parts (``q_proj.qweight``, ``q_proj.scales``, ...) become one StoredTensor
``q_proj.weight``. Families then need no change. A method is a function in ``_READERS``. Every
shape and type is checked against the others here, so that reading cannot fail later.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from model.errors import CheckpointError
from model.families.config import Config
from model.families.quantization import Quantization, positive, read_quantization
from model.packed_codes import (
    AwqMatrix,
    ByteMatrix,
    CodedMatrix,
    GptqMatrix,
    PackedMatrix,
    whole_group,
)
from model.packed_floats import FLOAT8, Float8Matrix, MlxMatrix, MxfpMatrix, Nf4Matrix
from model.weights import PlainTensor, StoredTensor

Plain = Mapping[str, PlainTensor]

_NUMBERS = ("F16", "BF16", "F32")
_OF_ACTIVATIONS = ("input_scale", "input_scale_ub", "activation_scale")
_MOST_BYTES = 1 << 20
"""A description of packed weights that is longer is no description."""


def unpacked(config: Config, tensors: Plain) -> dict[str, StoredTensor]:
    """Return a checkpoint's tensors with packed matrices in place of their parts.

    Raises UnsupportedModelError for a method that is not read, CheckpointError for parts that are
    missing or do not fit each other.
    """
    quantization = read_quantization(config)
    if quantization is None:
        return dict(tensors)
    return _READERS[quantization.method](quantization, _Parts(tensors))


class _Parts:
    """The stored tensors, from which readers take the parts of matrices."""

    def __init__(self, tensors: Plain) -> None:
        self._left = dict(tensors)
        self.whole: dict[str, StoredTensor] = {}
        """The matrices that were put together."""

    def modules(self, suffix: str) -> list[str]:
        """Return the modules, with a dot at the end, that have a tensor of this name."""
        ends = [name for name in self._left if f".{name}".endswith(f".{suffix}")]
        return [name.removesuffix(suffix) for name in ends]

    def peek(self, name: str) -> PlainTensor | None:
        return self._left.get(name)

    def take(self, name: str, *dtypes: str) -> PlainTensor:
        """Take out a tensor of one of these types. Raises CheckpointError."""
        tensor = self.take_any(name, *dtypes)
        if tensor is None:
            beside = sorted(one for one in self._left if one.startswith(name.rpartition(".")[0]))
            where = self._left[beside[0]].path if beside else "the checkpoint"
            raise CheckpointError(f"{where}: {name!r} is missing; is the download complete?")
        return tensor

    def take_any(self, name: str, *dtypes: str) -> PlainTensor | None:
        """As ``take``, or None if there is no such tensor."""
        tensor = self._left.pop(name, None)
        if tensor is not None and tensor.dtype not in dtypes:
            raise CheckpointError(
                f"{tensor.path}: {name!r} is stored as {tensor.dtype}, not {' or '.join(dtypes)}"
            )
        return tensor

    def drop(self, *names: str) -> None:
        """Forget tensors that the values do not depend on."""
        for name in names:
            self._left.pop(name, None)

    def all(self) -> dict[str, StoredTensor]:
        """Return the matrices, and the tensors that are no parts."""
        both = self._left.keys() & self.whole.keys()
        if both:
            name = min(both)
            raise CheckpointError(f"{self._left[name].path}: {name!r} is there packed and unpacked")
        return {**self._left, **self.whole}


def _gptq(quantization: Quantization, parts: _Parts) -> dict[str, StoredTensor]:
    settings = quantization.settings
    kind = settings.text("checkpoint_format", settings.text("format", "gptq"))
    for module in parts.modules("qweight"):
        words = parts.take(f"{module}qweight", "I32")
        zeros = parts.take(f"{module}qzeros", "I32")
        scales = parts.take(f"{module}scales", *_NUMBERS)
        order = parts.take_any(f"{module}g_idx", "I32", "I64")
        rank(words, 2)
        rank(scales, 2)
        bits = settings.size("bits", 4)
        columns = words.shape[0] * 32 // bits
        if order is not None:  # A module may have bits of its own.
            rank(order, 1)
            columns = order.shape[0]
            bits = words.shape[0] * 32 // max(columns, 1)
        if bits not in (2, 3, 4, 8):
            raise CheckpointError(f"{words.path}: {words.name!r} has {bits} bits, not 2, 3, 4 or 8")
        groups, rows = scales.shape
        group = _group(settings, words, columns, groups)
        shaped(words, (columns * bits // 32, rows))
        shaped(zeros, (groups, rows * bits // 32))
        if columns * bits % 32 or rows * bits % 32:
            raise CheckpointError(f"{words.path}: {words.name!r} has no whole words of 32 bits")
        parts.whole[f"{module}weight"] = GptqMatrix(
            source=words,
            label=f"GPTQ {bits} bits",
            rows=rows,
            columns=columns,
            bits=bits,
            group=group,
            stored_zeros=zeros,
            stored_scales=scales,
            groups=order,
            offset=0 if kind == "gptq_v2" else 1,
            declared_symmetric=settings.flag("sym", True),
        )
    return parts.all()


def _awq(quantization: Quantization, parts: _Parts) -> dict[str, StoredTensor]:
    settings = quantization.settings
    for key in ("bits", "w_bit"):
        if settings.has(key) and settings.size(key) != 4:
            raise settings.unsupported(key, settings.values[key], "AWQ has 4 bits")
    for module in parts.modules("qweight"):
        words = parts.take(f"{module}qweight", "I32")
        zeros = parts.take(f"{module}qzeros", "I32")
        scales = parts.take(f"{module}scales", *_NUMBERS)
        rank(words, 2)
        rank(scales, 2)
        columns, (groups, rows) = words.shape[0], scales.shape
        group = _group(settings, words, columns, groups)
        shaped(words, (columns, rows // 8))
        shaped(zeros, (groups, rows // 8))
        if rows % 8:
            raise CheckpointError(f"{scales.path}: {scales.name!r} has {rows} columns, not 8 n")
        parts.whole[f"{module}weight"] = AwqMatrix(
            source=words,
            label="AWQ 4 bits",
            rows=rows,
            columns=columns,
            bits=4,
            group=group,
            stored_zeros=zeros,
            stored_scales=scales,
        )
    return parts.all()


def _compressed_tensors(quantization: Quantization, parts: _Parts) -> dict[str, StoredTensor]:
    for module in parts.modules("weight_packed"):
        parts.whole[f"{module}weight"] = _packed_integers(parts, module)
    for module in parts.modules("weight_scale"):
        stored = parts.peek(f"{module}weight")
        if stored is not None and stored.dtype in FLOAT8:
            block = _block(_weights_of_first_group(quantization.settings), "block_structure")
            parts.whole[f"{module}weight"] = _float8(parts, module, "weight_scale", block)
        else:
            parts.whole[f"{module}weight"] = _whole_bytes(quantization, parts, module)
    for module in parts.modules("k_scale") + parts.modules("v_scale"):
        parts.drop(f"{module}k_scale", f"{module}v_scale")
    return parts.all()


def _packed_integers(parts: _Parts, module: str) -> CodedMatrix:
    words = parts.take(f"{module}weight_packed", "I32")
    scales = parts.take(f"{module}weight_scale", *_NUMBERS)
    shape = parts.take(f"{module}weight_shape", "I64", "I32")
    zeros = parts.take_any(f"{module}weight_zero_point", "I32")
    order = parts.take_any(f"{module}weight_g_idx", "I32", "I64")
    parts.drop(f"{module}input_scale", f"{module}input_zero_point")
    rank(words, 2)
    shaped(shape, (2,))
    rows, columns = (int(size) for size in shape.map())
    bits = words.shape[1] * 32 // max(columns, 1)
    if bits not in (2, 4, 8) or columns * bits % 32:
        raise CheckpointError(
            f"{words.path}: {words.name!r} has {bits} bits and {columns} columns; only whole words "
            "of 2, 4 and 8 bits are read"
        )
    shaped(words, (rows, columns * bits // 32))
    groups = _groups_of(scales, rows)
    if zeros is not None:
        shaped(zeros, (-(-rows * bits // 32), groups))
        if rows * bits % 32:
            raise CheckpointError(f"{zeros.path}: {zeros.name!r} has no whole words of 32 bits")
    if order is not None:
        shaped(order, (columns,))
    return PackedMatrix(
        source=words,
        label=f"compressed-tensors int{bits}",
        rows=rows,
        columns=columns,
        bits=bits,
        group=_even(scales, columns, groups),
        stored_scales=scales,
        stored_zeros=zeros,
        groups=order,
    )


def _whole_bytes(quantization: Quantization, parts: _Parts, module: str) -> CodedMatrix:
    stored = parts.take(f"{module}weight", "I8")
    scales = parts.take(f"{module}weight_scale", *_NUMBERS)
    zeros = parts.take_any(f"{module}weight_zero_point", "I8")
    parts.drop(f"{module}input_scale", f"{module}input_zero_point")
    rank(stored, 2)
    rows, columns = stored.shape
    groups = _groups_of(scales, rows)
    if zeros is not None and _groups_of(zeros, rows) != groups:
        raise CheckpointError(f"{zeros.path}: {zeros.name!r} has other groups than the scales")
    bits = _weights_of_first_group(quantization.settings).size("num_bits", 8)
    if bits not in (4, 8):
        bits = 8
    return ByteMatrix(
        source=stored,
        label=f"compressed-tensors int{bits}",
        rows=rows,
        columns=columns,
        bits=bits,
        group=_even(scales, columns, groups),
        stored_scales=scales,
        stored_zeros=zeros,
    )


def _fp8(quantization: Quantization, parts: _Parts) -> dict[str, StoredTensor]:
    block = _block(quantization.settings, "weight_block_size")
    for scale in ("weight_scale_inv", "weight_scale"):
        for module in parts.modules(scale):
            parts.whole[f"{module}weight"] = _float8(parts, module, scale, block)
    for module in parts.modules("k_scale") + parts.modules("v_scale"):
        parts.drop(f"{module}k_scale", f"{module}v_scale")
    return parts.all()


def _float8(parts: _Parts, module: str, scale: str, block: tuple[int, int]) -> Float8Matrix:
    stored = parts.take(f"{module}weight", *FLOAT8)
    scales = parts.take(f"{module}{scale}", *_NUMBERS, "F8_E8M0")
    # The scales of activations matter to arithmetic in fp8 alone.
    parts.drop(*(f"{module}{name}" for name in _OF_ACTIVATIONS))
    rank(stored, 2)
    rows, columns = stored.shape
    if math.prod(scales.shape) != 1:
        if scales.shape in ((rows,), (rows, 1)):
            block = 1, columns
        else:
            shaped(scales, (-(-rows // block[0]), -(-columns // block[1])))
    label = "fp8 (e4m3)" if stored.dtype == "F8_E4M3" else "fp8 (e5m2)"
    return Float8Matrix(stored, label, (rows, columns), scales, block)


def _mlx(quantization: Quantization, parts: _Parts) -> dict[str, StoredTensor]:
    for module in parts.modules("scales"):
        words = parts.take(f"{module}weight", "U32")
        scales = parts.take(f"{module}scales", *_NUMBERS)
        biases = parts.take(f"{module}biases", *_NUMBERS)
        settings = quantization.settings.nested(module.removesuffix(".")) or quantization.settings
        rank(words, 2)
        rank(scales, 2)
        rows, groups = scales.shape
        columns = groups * settings.size("group_size", 64)
        bits = words.shape[1] * 32 // max(columns, 1)
        if bits not in (2, 3, 4, 5, 6, 8) or bits != settings.size("bits"):
            raise CheckpointError(
                f"{words.path}: {words.name!r} has {bits} bits for {columns} columns, but config."
                f"json says {settings.size('bits')}"
            )
        shaped(words, (rows, columns * bits // 32))
        shaped(biases, (rows, groups))
        matrix = MlxMatrix(words, f"MLX {bits} bits", (rows, columns), scales, biases, bits)
        parts.whole[f"{module}weight"] = matrix
    return parts.all()


def _mxfp4(_quantization: Quantization, parts: _Parts) -> dict[str, StoredTensor]:
    """Matrices keep the names of their nibbles (``..._blocks``), as rows [experts, out, in]."""
    for start in [*parts.modules("gate_up_proj_blocks"), *parts.modules("down_proj_blocks")]:
        for name in (f"{start}gate_up_proj", f"{start}down_proj"):
            if parts.peek(f"{name}_blocks") is None:
                continue
            nibbles = parts.take(f"{name}_blocks", "U8")
            scales = parts.take(f"{name}_scales", "U8", "F8_E8M0")
            shaped(nibbles, (*scales.shape, 16))
            if len(scales.shape) < 2:
                raise CheckpointError(f"{scales.path}: {scales.name!r} is no matrix")
            size = (*scales.shape[:-1], scales.shape[-1] * 32)
            parts.whole[f"{name}_blocks"] = MxfpMatrix(nibbles, "MXFP4", size, scales)
    return parts.all()


def _bitsandbytes(_quantization: Quantization, parts: _Parts) -> dict[str, StoredTensor]:
    for kind in ("nf4", "fp4"):
        for module in parts.modules(f"weight.quant_state.bitsandbytes__{kind}"):
            parts.whole[f"{module}weight"] = _nf4(parts, module, kind)
    for module in parts.modules("SCB"):
        stored = parts.take(f"{module}weight", "I8")
        scales = parts.take(f"{module}SCB", "F32")
        parts.drop(f"{module}weight_format")
        rank(stored, 2)
        shaped(scales, stored.shape[:1])
        parts.whole[f"{module}weight"] = ByteMatrix(
            source=stored,
            label="bitsandbytes 8 bits",
            rows=stored.shape[0],
            columns=stored.shape[1],
            bits=8,
            group=whole_group(stored.shape[1]),
            stored_scales=scales,
            factor=1 / 127,
        )
    return parts.all()


def _nf4(parts: _Parts, module: str, kind: str) -> Nf4Matrix:
    described = parts.take(f"{module}weight.quant_state.bitsandbytes__{kind}", "U8")
    stored = parts.take(f"{module}weight", "U8")
    table = parts.take(f"{module}weight.quant_map", "F32")
    state = _state(described)
    nested_block = state.values.get("nested_blocksize")
    scales = parts.take(f"{module}weight.absmax", "U8" if nested_block else "F32")
    rows, columns = _sizes(state, "shape")
    block, count = state.size("blocksize"), rows * columns
    shaped(table, (16,))
    if math.prod(stored.shape) != -(-count // 2):
        raise CheckpointError(f"{stored.path}: {stored.name!r} has not {rows} x {columns} nibbles")
    if math.prod(scales.shape) != -(-count // block):
        raise CheckpointError(f"{scales.path}: {scales.name!r} has not one scale per {block}")
    nested = None
    if nested_block:
        tables = parts.take(f"{module}weight.nested_quant_map", "F32")
        outer = parts.take(f"{module}weight.nested_absmax", "F32")
        nested_size, offset = state.size("nested_blocksize"), state.values.get("nested_offset")
        shaped(tables, (256,))
        if math.prod(outer.shape) != -(-math.prod(scales.shape) // nested_size):
            raise CheckpointError(f"{outer.path}: {outer.name!r} has another number of scales")
        if not isinstance(offset, float) or not math.isfinite(offset):
            raise CheckpointError(f"{described.path}: {described.name!r} has no nested_offset")
        nested = tables, outer, offset, nested_size
    label = f"bitsandbytes {kind}"
    return Nf4Matrix(stored, label, (rows, columns), table, scales, block, nested)


def _state(described: PlainTensor) -> Config:
    """Return the description that bitsandbytes keeps as a tensor of JSON."""
    values: Any = None
    if math.prod(described.shape) <= _MOST_BYTES:
        try:
            values = json.loads(described.map().tobytes().decode())
        except (ValueError, RecursionError):
            values = None
    if not isinstance(values, dict):
        raise CheckpointError(f"{described.path}: {described.name!r} is no JSON object")
    return Config(described.path, values)


def _sizes(state: Config, key: str) -> tuple[int, int]:
    value = state.values.get(key)
    sizes = value if isinstance(value, list) else []
    if len(sizes) != 2 or not all(type(size) is int and 0 < size < 1 << 31 for size in sizes):
        raise CheckpointError(f"{state.path}: {key} of a packed matrix must be two sizes")
    return sizes[0], sizes[1]


def _weights_of_first_group(settings: Config) -> Config:
    """Return how compressed-tensors describes the weights of its first group of modules."""
    groups = settings.nested("config_groups")
    group = None if groups is None else groups.nested(next(iter(groups.values)))
    weights = None if group is None else group.nested("weights")
    return Config(settings.path, {}) if weights is None else weights


def _block(settings: Config, key: str) -> tuple[int, int]:
    value = settings.values.get(key)
    return (128, 128) if value is None else _sizes(settings, key)


def _group(settings: Config, words: PlainTensor, columns: int, groups: int) -> int:
    """Return the columns of a group. Raises CheckpointError if config and tensors disagree."""
    key = "q_group_size" if settings.has("q_group_size") else "group_size"
    group = positive(settings, key, whole_group(columns))
    if settings.has("dynamic") and groups and columns % groups == 0:
        group = columns // groups if groups > 1 else whole_group(columns)
    if -(-columns // group) != groups:
        raise CheckpointError(
            f"{words.path}: {words.name!r} has {groups} groups in {columns} columns, but config."
            f"json makes them {group} wide"
        )
    return group


def _groups_of(scales: PlainTensor, rows: int) -> int:
    """Return the groups in a row. Raises CheckpointError for scales of another shape."""
    shape = scales.shape
    if math.prod(shape) == 1:
        return 1
    if len(shape) not in (1, 2) or shape[0] != rows:
        raise CheckpointError(
            f"{scales.path}: {scales.name!r} has shape {list(shape)} for {rows} rows"
        )
    return shape[1] if len(shape) == 2 else 1


def _even(scales: PlainTensor, columns: int, groups: int) -> int:
    if not groups or columns % groups:
        raise CheckpointError(
            f"{scales.path}: {scales.name!r} has {groups} groups for {columns} columns"
        )
    return columns // groups if groups > 1 else whole_group(columns)


def rank(tensor: PlainTensor, axes: int) -> None:
    """Raise CheckpointError if a tensor has not this many axes, or is empty."""
    if len(tensor.shape) != axes or 0 in tensor.shape:
        raise CheckpointError(
            f"{tensor.path}: {tensor.name!r} has shape {list(tensor.shape)}, not {axes} sizes"
        )


def shaped(tensor: PlainTensor, shape: tuple[int, ...]) -> None:
    """Raise CheckpointError if a tensor has not this shape."""
    if tensor.shape != shape:
        raise CheckpointError(
            f"{tensor.path}: {tensor.name!r} has shape {list(tensor.shape)}, but its other parts "
            f"make it {list(shape)}"
        )


_READERS: Mapping[str, Callable[[Quantization, _Parts], dict[str, StoredTensor]]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "mlx": _mlx,
    "mxfp4": _mxfp4,
    "bitsandbytes": _bitsandbytes,
}
