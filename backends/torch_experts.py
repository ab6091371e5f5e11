"""Experts on a torch device: those that rows choose, from one stacked matrix for each projection.

On a CPU each chosen expert runs with its rows. A captured graph cannot depend on the choice. So on
a GPU few rows gather the weights of their experts, and many rows go through all experts in turn,
most of them with a weight of zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch.nn import functional

from backends.base import BackendError
from backends.torch_matmul import Linear
from backends.torch_packed import PackedWeight, held_bytes, plain_weight
from model.artifact import Tensor
from model.experts import CLIPPED_ALPHA
from model.quantize import QuantizedMatrix
from model.spec import ExpertSpec, LayerSpec

UNPACKED_WEIGHTS = 1 << 24
"""The weights that are unpacked at once, where all experts run in turn."""

Activate = Callable[[torch.Tensor], torch.Tensor]
Index: TypeAlias = slice | torch.Tensor


@dataclass(frozen=True, slots=True)
class StackedWeight:
    """A projection of all held experts: ``rows`` outputs of each, one expert after the other."""

    weight: PackedWeight | torch.Tensor
    bias: torch.Tensor | None
    rows: int
    dtype: torch.dtype

    @staticmethod
    def of(
        name: str,
        tensors: Mapping[str, Tensor],
        experts: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> StackedWeight:
        matrix = tensors[f"{name}.weight"]
        if not isinstance(matrix, QuantizedMatrix):
            raise BackendError(f"{name} must be a stored matrix")
        weight: PackedWeight | torch.Tensor
        if matrix.format.scheme == "float":
            weight = plain_weight([matrix], device, dtype)
        else:
            weight = PackedWeight.of([matrix], device)
        bias, rows = tensors.get(f"{name}.bias"), matrix.shape[0] // experts
        if bias is None:
            return StackedWeight(weight, None, rows, dtype)
        added = torch.from_numpy(np.array(bias, np.float32)).to(device, dtype)
        return StackedWeight(weight, added.unflatten(0, (experts, rows)), rows, dtype)

    @property
    def nbytes(self) -> int:
        held = self.weight.nbytes if isinstance(self.weight, PackedWeight) else 0
        if isinstance(self.weight, torch.Tensor):
            held = held_bytes(self.weight)
        return held + (0 if self.bias is None else held_bytes(self.bias))

    def product(self, x: torch.Tensor, experts: Index) -> torch.Tensor:
        """Multiply x [1 or e, n, columns] by e experts (numbers or a range): [e, n, rows]."""
        if isinstance(experts, slice):
            rows: Index = slice(experts.start * self.rows, experts.stop * self.rows)
        else:
            places = torch.arange(self.rows, device=experts.device)
            rows = (experts[:, None] * self.rows + places).flatten()
        if isinstance(self.weight, torch.Tensor):
            values = self.weight[rows].to(self.dtype)
        else:
            packed = self.weight
            part = PackedWeight(
                packed.columns,
                packed.bits,
                packed.group_size,
                packed.words[rows],
                packed.scales[rows],
                packed.zeros[rows],
            )
            values = part.dequantize(self.dtype)
        result = torch.matmul(x, values.unflatten(0, (-1, self.rows)).transpose(1, 2))
        return result if self.bias is None else result + self.bias[experts][:, None]


class TorchExperts:
    """The experts of a layer that this stage holds, with the MLP beside them."""

    def __init__(
        self,
        layer: LayerSpec,
        experts: ExpertSpec,
        tensors: Mapping[str, Tensor],
        beside: Mapping[str, Linear],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """``beside`` has ``shared_gate_up`` and ``shared_down``, or nothing."""
        self._layer, self._spec, self._beside, self._dtype = layer, experts, beside, dtype
        self._stacked = {
            name: StackedWeight.of(name, tensors, experts.stored, device, dtype)
            for name in ("gate", "up", "down")
        }
        self.chosen_alone = device.type == "cpu"
        """Whether the host may look at the choice, and run the chosen experts alone."""

    @property
    def nbytes(self) -> int:
        return sum(stacked.nbytes for stacked in self._stacked.values())

    def __call__(
        self, rows: torch.Tensor, vectors: Mapping[str, torch.Tensor], activate: Activate
    ) -> torch.Tensor:
        """Return the weighted outputs fp32 [n, hidden] of ``rows``, which are the MLP's inputs."""
        scores = functional.linear(
            rows.float(), vectors["router.weight"], vectors.get("router.bias")
        )
        chosen, weights = self._route(scores)
        narrow = rows.to(self._dtype)
        if self.chosen_alone:
            mixed = self._each(narrow, chosen, weights, activate)
        elif 2 * chosen.numel() <= self._spec.stored:
            mixed = self._gathered(narrow, chosen, weights, activate)
        else:
            mixed = self._all(narrow, chosen, weights, activate)
        if not self._beside:
            return mixed
        gate, up = self._beside["shared_gate_up"](narrow).chunk(2, dim=1)
        shared = self._beside["shared_down"](activate(gate) * up).float()
        if self._spec.shared_gate:
            shared = (
                shared * functional.linear(rows.float(), vectors["shared_mix.weight"]).sigmoid()
            )
        return mixed + shared

    def _route(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the experts of rows, counted from the first held one, and their weights.

        Experts of other members have a weight of zero.
        """
        spec = self._spec
        best, chosen = scores.topk(spec.active, dim=1)
        if spec.scoring == "topk_softmax" or spec.normalized:
            weights = best.softmax(dim=1)
        else:
            weights = scores.softmax(dim=1).gather(1, chosen)
        chosen = chosen - spec.first
        held = (chosen >= 0) & (chosen < spec.stored)
        return chosen.clamp(0, spec.stored - 1), weights * held

    def _run(self, x: torch.Tensor, experts: Index, activate: Activate) -> torch.Tensor:
        """Run x [1 or e, n, hidden] through e experts: fp32 [e, n, hidden]."""
        gate, up = (self._stacked[name].product(x, experts) for name in ("gate", "up"))
        limit = self._spec.limit
        if limit is None:
            inner = activate(gate) * up
        else:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            inner = gate * torch.sigmoid(CLIPPED_ALPHA * gate) * (up + 1)
        return self._stacked["down"].product(inner, experts).float()

    def _each(
        self, rows: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, activate: Activate
    ) -> torch.Tensor:
        mixed = torch.zeros(rows.shape, device=rows.device)
        for expert in torch.unique(chosen[weights > 0]).tolist():
            taken = (chosen == expert) & (weights > 0)
            places = taken.any(dim=1).nonzero()[:, 0]
            outputs = self._run(rows[places][None], slice(expert, expert + 1), activate)[0]
            mixed[places] += outputs * (weights * taken).sum(dim=1)[places, None]
        return mixed

    def _gathered(
        self, rows: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, activate: Activate
    ) -> torch.Tensor:
        """Run each row through its own experts, whose weights are copied together."""
        outputs = [
            self._run(rows[row : row + 1][None], chosen[row], activate)[:, 0]
            for row in range(len(rows))
        ]
        return (torch.stack(outputs) * weights[:, :, None]).sum(dim=1)

    def _all(
        self, rows: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, activate: Activate
    ) -> torch.Tensor:
        """Run all rows through all experts, a few at a time."""
        spec, layer = self._spec, self._layer
        by_expert = torch.zeros((len(rows), spec.stored), device=rows.device)
        by_expert.scatter_add_(1, chosen, weights)
        mixed = torch.zeros(rows.shape, device=rows.device)
        step = max(1, UNPACKED_WEIGHTS // (3 * layer.ffn * layer.hidden))
        for first in range(0, spec.stored, step):
            some = slice(first, min(first + step, spec.stored))
            outputs = self._run(rows[None], some, activate)
            mixed += (outputs * by_expert[:, some].T[:, :, None]).sum(dim=0)
        return mixed
