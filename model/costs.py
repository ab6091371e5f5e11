"""The costs of a block: bytes on disk and on the wire, bytes while it runs, operations per token.

Every figure is computed from the spec alone. So a planner can price blocks that are not quantized
yet.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from model.experts import STACKED
from model.quantize import INTEGER_BITS, Format
from model.spec import QUANTIZED_TENSORS, LayerSpec, ModelSpec

BUFFER_FACTOR = 3
"""The buffers of ONNX Runtime 1.31 over the live intermediates (measured at hidden size 2048)."""


def stored_bytes(spec: ModelSpec, block: int, fmt: Format) -> int:
    """Return the bytes of the block's tensors in its artifact, without a header of 1-4 KB.

    The figure is exact while scales fit fp16. A matrix whose largest scale leaves [2^-20, 65504]
    takes two bytes more per group.
    """
    return sum(
        _stored_matrix(shape, fmt) if name in QUANTIZED_TENSORS else 4 * prod(shape)
        for name, shape in spec.block_tensors(block).items()
    )


def executed_bytes(spec: ModelSpec, block: int, fmt: Format, container_bits: int) -> int:
    """Return the bytes of the block's weights as kernels keep them at ``container_bits``.

    All experts count, because any may be chosen next. ``read_bytes`` counts those that are chosen.

    In an integer container each group has a zero, and four bytes each for its scale, a copy of the
    scale and the sum of its codes (measured with onnxruntime 1.31). 16 and 32 hold plain numbers.
    The token table is charged as stored, because only looked-up rows are unpacked.
    """
    return sum(
        _executed_tensor(name, shape, fmt, container_bits)
        for name, shape in spec.block_tensors(block).items()
    )


def read_bytes(spec: ModelSpec, block: int, fmt: Format, container_bits: int, rows: int = 1) -> int:
    """Return the bytes of weights that a pass of ``rows`` rows reads at least.

    It is ``executed_bytes`` without the experts that no row takes. Rows are assumed to choose
    uniformly and apart from each other: real rows meet more often.
    """
    part = 1.0
    if spec.block_kind(block) == "layer" and (experts := spec.layer(block).experts) is not None:
        part = 1 - (1 - experts.active / experts.count) ** rows
    total = 0.0
    for name, shape in spec.block_tensors(block).items():
        total += _executed_tensor(name, shape, fmt, container_bits) * (
            part if name in STACKED else 1.0
        )
    return round(total)


def on_chip_layer_bytes(layer: LayerSpec) -> int:
    """Return the bytes of a layer's matrices in a chip's own memory: one per weight."""
    return sum(prod(shape) for name, shape in layer.tensors().items() if name in QUANTIZED_TENSORS)


def kv_bytes(spec: ModelSpec, block: int, tokens: int, item_bytes: int = 4) -> int:
    """Return the bytes of keys and values of ``tokens`` positions.

    It is 0 for embedding and head, and for encoders, which run whole texts and keep nothing.

    A sliding window is charged in full, because the cache keeps all positions to be able to roll
    back.
    """
    if spec.block_kind(block) != "layer" or spec.encodes:
        return 0
    layer = spec.layer(block)
    return 2 * layer.kv_heads * layer.head_dim * tokens * item_bytes


def stage_buffer_bytes(
    spec: ModelSpec, blocks: Iterable[int], rows: int, context_tokens: int
) -> int:
    """Return the bytes besides weights and KV cache to run ``rows`` rows through ``blocks``.

    Blocks reuse buffers, so the largest block decides. The runtime's arena holds BUFFER_FACTOR
    times the live bytes.
    """
    return BUFFER_FACTOR * max(_live_bytes(spec, block, rows, context_tokens) for block in blocks)


def used_weights(layer: LayerSpec) -> dict[str, float]:
    """Return how many weights of each matrix of a layer a token uses.

    Of experts these are the chosen ones. If a device holds some of them, it is the mean over tokens
    whose choice is uniform.
    """
    experts = layer.experts
    part = 1.0 if experts is None else experts.active / experts.count
    return {
        name: prod(shape) * (part if name in STACKED else 1.0)
        for name, shape in layer.tensors().items()
        if name in QUANTIZED_TENSORS
    }


def block_flops(spec: ModelSpec, block: int, context_tokens: int) -> int:
    """Return the floating-point operations of one token that sees ``context_tokens`` positions.

    There are two per weight of each matrix product that the token uses, and two per element of
    scores and of weighted values. Norms, activations and rotations are left out (below 1 %).
    """
    if spec.block_kind(block) != "layer":
        return 2 * sum(
            prod(shape)
            for name, shape in spec.block_tensors(block).items()
            if name in QUANTIZED_TENSORS and name != "tokens.weight"
        )
    layer = spec.layer(block)
    matrices = round(sum(used_weights(layer).values()))
    if layer.experts is not None:
        matrices += layer.experts.count * layer.hidden  # The router.
    seen = min(context_tokens, layer.sliding_window or context_tokens)
    return 2 * matrices + 4 * layer.heads * layer.head_dim * seen


def hop_bytes(spec: ModelSpec, bits: int = 16) -> int:
    """Return the bytes of one hidden row on a link at ``bits``, without framing.

    32 bits are raw fp32. 16 and 8 bits are fp16 or int8 values with one fp32 scale.
    """
    return spec.hidden * bits // 8 + (0 if bits == 32 else 4)


def _executed_tensor(name: str, shape: tuple[int, ...], fmt: Format, container_bits: int) -> int:
    if name not in QUANTIZED_TENSORS:
        return 4 * prod(shape)
    if name == "tokens.weight":
        rows, columns = shape
        return _stored_matrix((rows, columns), fmt)
    if fmt.scheme == "float" or container_bits not in INTEGER_BITS:
        return prod(shape) * container_bits // 8
    rows, columns = shape
    groups = fmt.groups(columns)
    codes = rows * groups * (fmt.group_size * container_bits // 8 + 12)
    return codes + rows * -(-groups * container_bits // 8)


def _stored_matrix(shape: tuple[int, ...], fmt: Format) -> int:
    rows, columns = shape
    if fmt.scheme == "float":
        return rows * columns * fmt.bits // 8
    groups = fmt.groups(columns)
    codes = rows * groups * (fmt.group_size * fmt.bits // 8)
    if fmt.scheme == "truncate":
        return codes + 4
    zeros = 0 if fmt.symmetric else rows * -(-groups * fmt.bits // 8)
    return codes + 2 * rows * groups + zeros


def _live_bytes(spec: ModelSpec, block: int, rows: int, context_tokens: int) -> int:
    """Return the bytes of fp32 intermediates while the block computes ``rows`` rows at once."""
    kind = spec.block_kind(block)
    if kind == "embedding":
        return 4 * rows * (spec.hidden + spec.embed_dim)
    if kind == "head":
        if spec.encodes:
            return 4 * rows * (2 * spec.hidden + spec.output_width)
        # Logits are computed for one row only.
        return 4 * (rows * 2 * spec.hidden + spec.embed_dim + spec.vocab)
    layer = spec.layer(block)
    heads = (2 * layer.heads + 2 * layer.kv_heads) * layer.head_dim  # q, k, v and the output
    scores = layer.heads * context_tokens
    mlp = (2 if layer.gated else 1) * layer.used_ffn
    if layer.experts is not None:  # Rows of each chosen expert, before and after it.
        mlp += 2 * layer.experts.active * layer.hidden
    return 4 * rows * (3 * layer.hidden + max(heads + scores, mlp))
