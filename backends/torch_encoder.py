"""Layers of an encoder on a torch device.

Products take the rows of all texts one behind the other, and attention takes texts side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from backends.base import Array, BackendError, StageOptions
from backends.encoder import EncoderLayers, EncoderStage, LayerFile, read_encoder, see, side_by_side
from backends.torch_capture import DEVICE
from backends.torch_fused import activated
from backends.torch_matmul import CHOICES, KernelChooser, Linear, unpacked_linear
from backends.torch_packed import PackedWeight, held_bytes, plain_weight
from backends.torch_stage import compute_dtype, translated
from model.quantize import QuantizedMatrix
from model.rotary import rotary_table
from model.spec import QUANTIZED_TENSORS, LayerSpec, ModelSpec
from model.texts import Texts

_STACKS = {"qkv": ("q", "k", "v"), "raise": ("gate", "up")}
"""Matrices that take the same rows, and are multiplied as one."""

Rotary = tuple[torch.Tensor, torch.Tensor]


def load_encoder(
    spec: ModelSpec,
    artifacts: Sequence[tuple[int, Path]],
    options: StageOptions,
    device: torch.device,
) -> EncoderStage:
    """Load a stage of an encoder. Raises BackendError, CheckpointError."""
    ends, files, buffer_bytes = read_encoder(spec, artifacts, options)
    layers = TorchEncoderLayers(files, options, device) if files else None
    return EncoderStage(spec, ends, layers, options, buffer_bytes)


class TorchEncoderLayers(EncoderLayers):
    """Layers on one device. The residual stream is fp32."""

    def __init__(
        self, files: Sequence[LayerFile], options: StageOptions, device: torch.device
    ) -> None:
        self._device = device
        # Passes have many rows, for which plain numbers are as good as packed ones or better.
        chooser = KernelChooser(device, exact=options.exact, roomy=False, choices=CHOICES)
        self._layers = []
        self._memory_bytes = 0
        self._rotary: dict[object, Rotary] = {}
        for file in files:
            context = f"cannot load layer {file.block - 1}"
            with DEVICE.shared(), translated(context), torch.inference_mode():
                rotary = self._tables(file.layer, options.context_tokens)
                layer = _Layer(file, chooser, rotary, device, exact=options.exact)
            self._layers.append(layer)
            self._memory_bytes += layer.nbytes
        self._memory_bytes += chooser.scratch_bytes
        self._memory_bytes += sum(
            held_bytes(table) for tables in self._rotary.values() for table in tables
        )

    @property
    def memory_bytes(self) -> int:
        return self._memory_bytes

    def run(self, hidden: Array, texts: Texts) -> Array:
        with (
            torch.inference_mode(),
            DEVICE.shared(),
            translated("cannot run the stage"),
        ):
            view = _View(texts, self._device)
            rows = torch.from_numpy(hidden).to(self._device)
            for layer in self._layers:
                rows = layer(rows, view)
            result: Array = rows.cpu().numpy()
            return result

    def close(self) -> None:
        self._layers, self._rotary = [], {}
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _tables(self, layer: LayerSpec, context_tokens: int) -> Rotary | None:
        if layer.rope is None:
            return None
        key = layer.rope, layer.head_dim
        if key not in self._rotary:
            cos, sin = (
                torch.from_numpy(np.ascontiguousarray(table, np.float32)).to(self._device)
                for table in rotary_table(layer.rope, layer.head_dim, context_tokens)
            )
            self._rotary[key] = cos, sin
        return self._rotary[key]


class _View:
    """How the rows of a pass lie side by side, and what each sees."""

    def __init__(self, texts: Texts, device: torch.device) -> None:
        self._texts = texts
        self._device = device
        rows, places = side_by_side(texts)
        self.rows = torch.from_numpy(rows).to(device)
        self.places = torch.from_numpy(places).to(device)
        self.longest = rows.shape[1]
        self._masks: dict[object, torch.Tensor | None] = {}

    def mask(
        self, layer: LayerSpec, dtype: torch.dtype, biases: Array | None
    ) -> torch.Tensor | None:
        """Return what is added to scores, or None if each row sees all of its text."""
        table = None if biases is None else biases.tobytes()  # Layers may have equal ones.
        key = layer.bidirectional, layer.sliding_window, dtype, table
        if key not in self._masks:
            mask = see(layer, self._texts, biases)
            self._masks[key] = None
            if mask.any():
                self._masks[key] = torch.from_numpy(mask).to(self._device, dtype)
        return self._masks[key]


class _Layer:
    """One layer."""

    def __init__(
        self,
        file: LayerFile,
        chooser: KernelChooser,
        rotary: Rotary | None,
        device: torch.device,
        *,
        exact: bool,
    ) -> None:
        self._spec = layer = file.layer
        self._biases = file.biases
        self._rotary = rotary
        self._dtype = compute_dtype(device, file.bits, exact=exact)
        names = ("qkv", "o", "raise" if layer.gated else "up", "down")
        self._linears: dict[str, Linear] = {
            name: self._linear(file, _STACKS.get(name, (name,)), chooser, device) for name in names
        }
        self._vectors = {
            name: torch.from_numpy(np.array(tensor, np.float32)).to(device)
            for name, tensor in file.tensors.items()
            if isinstance(tensor, np.ndarray) and not _is_bias_of_matrix(name)
        }
        self.nbytes = sum(linear.nbytes for linear in self._linears.values())
        self.nbytes += sum(map(held_bytes, self._vectors.values()))

    def __call__(self, hidden: torch.Tensor, view: _View) -> torch.Tensor:
        inward = self._spec.norm_position in ("pre", "both")
        rows = hidden
        if inward and not self._spec.enters_plain:
            rows = self._norm("attn_norm", hidden)
        hidden = self._left("attn", hidden, self._attention(rows, view))
        rows = self._norm("mlp_norm", hidden) if inward else hidden
        return self._left("mlp", hidden, self._mlp(rows))

    def _linear(
        self, file: LayerFile, names: Sequence[str], chooser: KernelChooser, device: torch.device
    ) -> Linear:
        matrices = [_matrix(file.tensors, name) for name in names]
        bias = None
        if f"{names[0]}.bias" in file.tensors:
            parts = [np.array(file.tensors[f"{name}.bias"], np.float32) for name in names]
            bias = torch.from_numpy(np.concatenate(parts)).to(device, self._dtype)
        if matrices[0].format.scheme == "float":
            return unpacked_linear(plain_weight(matrices, device, self._dtype), bias)
        return chooser.linear(PackedWeight.of(matrices, device), bias, self._dtype)

    def _left(self, part: str, hidden: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
        """Return the hidden state after a part, in fp32."""
        product = product.float()
        match self._spec.norm_position:
            case "post":
                return self._norm(f"{part}_norm", hidden + product)
            case "both":
                return hidden + self._norm(f"{part}_out_norm", product)
            case "output":
                return hidden + self._norm(f"{part}_norm", product)
        return hidden + product

    def _norm(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        weight, epsilon = self._vectors[f"{name}.weight"], self._spec.norm_eps
        if self._spec.norm == "layernorm":
            bias = self._vectors[f"{name}.bias"]
            return functional.layer_norm(rows, rows.shape[-1:], weight, bias, epsilon)
        return functional.rms_norm(rows, rows.shape[-1:], weight, epsilon)

    def _attention(self, rows: torch.Tensor, view: _View) -> torch.Tensor:
        layer, width = self._spec, self._spec.head_dim
        counts = (layer.heads, layer.kv_heads, layer.kv_heads)
        q, k, v = self._linears["qkv"](rows).split([count * width for count in counts], dim=1)
        if layer.qk_norm == "width":
            q, k = self._rms("q_norm", q), self._rms("k_norm", k)
        q, k, v = (
            part.unflatten(1, (-1, width))[view.rows].transpose(1, 2) for part in (q, k, v)
        )  # [texts, heads, longest, width]
        if layer.qk_norm == "head":
            q, k = self._rms("q_norm", q), self._rms("k_norm", k)
        if self._rotary is not None:
            q, k = (self._turned(part, view.longest) for part in (q, k))
        group = layer.heads // layer.kv_heads
        if group > 1:
            k, v = (part.repeat_interleave(group, dim=1) for part in (k, v))
        mixed = functional.scaled_dot_product_attention(
            q.to(self._dtype),
            k.to(self._dtype),
            v.to(self._dtype),
            attn_mask=view.mask(layer, self._dtype, self._biases),
            scale=layer.score_factor,
        )
        mixed = mixed.transpose(1, 2).flatten(2).flatten(0, 1)
        return self._linears["o"](mixed.index_select(0, view.places))

    def _rms(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        weight = self._vectors[f"{name}.weight"]
        return functional.rms_norm(rows.float(), rows.shape[-1:], weight, self._spec.norm_eps)

    def _turned(self, heads: torch.Tensor, longest: int) -> torch.Tensor:
        """Rotate pairs (i, i + width / 2) of each head by their positions."""
        if self._rotary is None:
            raise BackendError("the layer has no rotary embedding")
        cos, sin = (table[:longest] for table in self._rotary)
        first, second = heads.float().chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def _mlp(self, rows: torch.Tensor) -> torch.Tensor:
        if not self._spec.gated:
            return self._linears["down"](
                activated(self._linears["up"](rows), self._spec.activation)
            )
        gate, up = self._linears["raise"](rows).chunk(2, dim=1)
        return self._linears["down"](activated(gate, self._spec.activation) * up)


def _matrix(tensors: Mapping[str, object], name: str) -> QuantizedMatrix:
    matrix = tensors[f"{name}.weight"]
    if not isinstance(matrix, QuantizedMatrix):
        raise BackendError(f"{name} must be a stored matrix")
    return matrix


def _is_bias_of_matrix(name: str) -> bool:
    return name.endswith(".bias") and f"{name.removesuffix('.bias')}.weight" in QUANTIZED_TENSORS
