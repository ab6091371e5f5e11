"""All experts of a layer as one operator of ONNX Runtime, QMoE.

It takes rows and the router's scores, runs the chosen experts, and adds up their outputs. So a
layer with experts needs no cut. At 4 and 8 bits it has the kernels of MatMulNBits since version
1.31. ``onnx_experts`` runs what it does not take.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from backends.onnx_matrix import INT8_ACTIVATIONS, PackedMatrix
from model.experts import CLIPPED_ALPHA
from model.quantize import Format
from model.spec import ExpertSpec, LayerSpec

if TYPE_CHECKING:
    from backends.onnx_graph import BlockWeights, Graph

AnyArray = npt.NDArray[Any]

OPERATOR_BITS = (4, 8)
"""The widths of codes that the operator multiplies as MatMulNBits does."""


def fits(layer: LayerSpec, fmt: Format, containers: Mapping[int, int]) -> bool:
    """Whether the operator's kernels take a layer's experts, stored in ``fmt``."""
    experts = layer.experts
    if experts is None or containers[fmt.bits] not in OPERATOR_BITS:
        return False
    # Zero points of a single group have another layout.
    widths = layer.hidden, layer.ffn
    whole = all(not width % fmt.group_size and width > fmt.group_size for width in widths)
    return whole and (layer.activation == "silu" or experts.limit is not None)


def add_experts(
    graph: Graph, experts: ExpertSpec, weights: BlockWeights, value: str, scores: str
) -> str:
    """Append the experts that rows ``value`` take by ``scores`` [b, n, count]. Return their sum."""
    held = experts.stored
    gate, up, down = (_packed(weights, name) for name in ("gate", "up", "down"))
    scores, factors, active = _routed(graph, experts, scores)
    raised_scales = _paired(gate.scales, up.scales, held)
    lowered_scales = _by_expert(down.scales, held)
    graph.count_scales(raised_scales, lowered_scales)
    inputs = {
        0: value,
        1: scores,
        2: graph.weight(_paired(gate.codes, up.codes, held)),
        3: graph.weight(raised_scales),
        5: graph.weight(_by_expert(down.codes, held)),
        6: graph.weight(lowered_scales),
    }
    bias = weights.vectors.get
    gate_bias, up_bias, down_bias = bias("gate.bias"), bias("up.bias"), bias("down.bias")
    if gate_bias is not None and up_bias is not None:
        pairs = _paired(gate_bias[:, None], up_bias[:, None], held)
        inputs[4] = graph.weight(pairs[:, :, 0])
    if down_bias is not None:
        inputs[7] = graph.weight(down_bias.reshape(held, -1))
    if gate.zero_points is not None and up.zero_points is not None:
        inputs[11] = graph.weight(_paired(gate.zero_points, up.zero_points, held))
    if down.zero_points is not None:
        inputs[12] = graph.weight(_by_expert(down.zero_points, held))
    if factors:
        inputs[14] = factors
    clipped: dict[str, Any] = {"activation_alpha": 1.0, "activation_beta": 0.0}
    if experts.limit is not None:
        clipped = {"activation_alpha": CLIPPED_ALPHA, "activation_beta": 1.0}
        clipped["swiglu_limit"] = experts.limit
    return graph.node(
        "QMoE",
        [inputs.get(place, "") for place in range(max(inputs) + 1)],
        domain="com.microsoft",
        k=active,
        activation_type="swiglu",
        swiglu_fusion=1,
        normalize_routing_weights=int(not factors),
        expert_weight_bits=down.bits,
        block_size=down.block_size,
        accuracy_level=INT8_ACTIVATIONS,
        **clipped,
    )[0]


def _packed(weights: BlockWeights, name: str) -> PackedMatrix:
    matrix = weights.matrices[f"{name}.weight"]
    assert isinstance(matrix, PackedMatrix)  # noqa: S101 - all others have sessions of their own
    return matrix


def _routed(graph: Graph, experts: ExpertSpec, scores: str) -> tuple[str, str, int]:
    """Return scores [rows, held], factors alike, and how many experts a row takes at most.

    Without factors ("") the operator takes a softmax over the best scores.
    """
    (scores,) = graph.node("Reshape", [scores, graph.integers(-1, experts.count)])
    over_chosen = experts.scoring == "topk_softmax" or experts.normalized
    factors = "" if over_chosen else graph.node("Softmax", [scores], axis=-1)[0]
    if experts.stored == experts.count:
        return scores, factors, experts.active
    # A member chooses among all experts. Those of other members have the factor 0 here.
    best, chosen = graph.node("TopK", [scores, graph.integers(experts.active)], 2, axis=-1)
    if over_chosen:
        (best,) = graph.node("Softmax", [best], axis=-1)
    else:
        (best,) = graph.node("GatherElements", [factors, chosen], axis=-1)
    (zeros,) = graph.node("Mul", [scores, graph.weight(np.zeros(1, np.float32))])
    (factors,) = graph.node("ScatterElements", [zeros, chosen, best], axis=-1)
    bounds = [graph.integers(bound) for bound in (experts.first, experts.first + experts.stored, 1)]
    (factors,) = graph.node("Slice", [factors, *bounds])
    return factors, factors, min(experts.active, experts.stored)


def _by_expert(array: AnyArray, held: int) -> AnyArray:
    """Return stacked rows as [held, rows, any]."""
    return array.reshape(held, len(array) // held, -1)


def _paired(gate: AnyArray, up: AnyArray, held: int) -> AnyArray:
    """Return [held, 2 x rows, any], in which the rows of ``gate`` and ``up`` take turns."""
    pairs = np.stack([_by_expert(gate, held), _by_expert(up, held)], axis=2)
    return pairs.reshape(held, 2 * pairs.shape[1], -1)
