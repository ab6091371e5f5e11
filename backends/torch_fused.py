"""The steps between a layer's products: by torch, or as one Triton kernel each.

    add_norm   add a part to the residual stream, normalize, and round for the next product
    place      normalize and turn queries and keys, and write keys and values to the cache
    activate   activate the MLP's rows, and multiply by the gate's counterpart

A token's pass has a hundred such steps, and each of torch's own kernels is over before the next one
starts. A Triton kernel is used where it passed a comparison with torch at load. The comparison runs
once for each shape, with each dtype that the products of the stage take and return. A kernel that
fails or differs is named in the log, and torch does its step.
"""

from __future__ import annotations

import importlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from backends.torch_matmul import TOLERANCE, give_up, load_triton, relative_error
from model.spec import LayerSpec

CHECKED_ROWS = (1, 3, 64)
"""The rows of a token, of several sequences' tokens, and of a prompt's chunk."""

_CHECKED_CONTEXT = 80

Rotary = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines, fp32 [context, turned columns / 2] each."""


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm's vectors, fp32 [width]. It is layer norm if it has a bias, else RMS norm."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    epsilon: float


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """RMS norms of each query and key head: fp32 [heads + kv_heads, head_dim]."""

    weights: torch.Tensor
    epsilon: float


@dataclass(frozen=True, slots=True)
class Cache:
    """Keys and values of one layer: [slots, kv_heads, context, head_dim] each."""

    keys: torch.Tensor
    values: torch.Tensor


class Places:
    """The slot and the position of each row of a pass."""

    def __init__(self, slots: torch.Tensor, positions: torch.Tensor) -> None:
        """``slots`` and ``positions`` are int64 [n], on the device."""
        self.slots = slots
        self.positions = positions
        self._angles: dict[int, Rotary] = {}

    def angles(self, rotary: Rotary) -> Rotary:
        """Return the rows' cosines and signed sines for ``_turn``: [n, 1, turned columns]."""
        key = id(rotary[0])
        if key not in self._angles:
            cos, sin = (table.index_select(0, self.positions)[:, None] for table in rotary)
            self._angles[key] = torch.cat([cos, cos], dim=2), torch.cat([-sin, sin], dim=2)
        return self._angles[key]


AddNorm = Callable[
    [torch.Tensor, torch.Tensor | None, Norm, torch.dtype], tuple[torch.Tensor, torch.Tensor]
]
Place = Callable[[torch.Tensor, torch.Tensor, Cache, Places, Rotary | None, HeadNorm | None], None]
Activate = Callable[[torch.Tensor, str, bool, torch.dtype], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Steps:
    """The functions that do the steps. Each has the arguments and results of torch's below."""

    add_norm: AddNorm
    place: Place
    activate: Activate


class Residual:
    """The residual stream of a pass: rows fp32 [n, hidden], and a part to be added to them.

    The part waits for the next norm, which adds it in the same kernel.
    """

    def __init__(self, rows: torch.Tensor) -> None:
        self._rows = rows
        self._part: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, part: torch.Tensor) -> None:
        """Add a part [n, hidden] of any dtype."""
        self.settled()
        self._part = part

    def replace(self, rows: torch.Tensor) -> None:
        self._rows, self._part = rows, None

    def settled(self) -> torch.Tensor:
        """Return the rows, with everything added."""
        if self._part is not None:
            self.replace(self._rows + self._part)
        return self._rows

    def normed(self, steps: Steps, norm: Norm, dtype: torch.dtype) -> torch.Tensor:
        """Return the norm of the rows in ``dtype``."""
        rows, result = steps.add_norm(self._rows, self._part, norm, dtype)
        self.replace(rows)
        return result


# ---- by torch -----------------------------------------------------------------------------------


def add_norm(
    hidden: torch.Tensor, part: torch.Tensor | None, norm: Norm, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return hidden + part, fp32 [n, width], and its norm in ``dtype``.

    Without a part, ``hidden`` may have any dtype and is returned as it is.
    """
    total = hidden if part is None else hidden + part
    rows, shape, weight = total.float(), norm.weight.shape, norm.weight
    if norm.bias is None:
        normed = functional.rms_norm(rows, shape, weight, norm.epsilon)
    else:
        normed = functional.layer_norm(rows, shape, weight, norm.bias, norm.epsilon)
    return total, normed.to(dtype)


def place(
    heads: torch.Tensor,
    query: torch.Tensor,
    cache: Cache,
    places: Places,
    rotary: Rotary | None,
    norm: HeadNorm | None,
) -> None:
    """Write heads [n, (H + 2 KV) * width] to ``query`` [n, H, width] and to the caches.

    Queries and keys are normalized, and turned by the angles of their positions.
    """
    kv_heads, width = cache.keys.shape[1], cache.keys.shape[3]
    parts = heads.unflatten(1, (-1, width))
    turned, value = parts.split((parts.shape[1] - kv_heads, kv_heads), dim=1)
    if norm is not None:
        turned = functional.rms_norm(turned.float(), (width,), None, norm.epsilon) * norm.weights
    if rotary is not None:
        turned = _turn(turned, *places.angles(rotary))
    query.copy_(turned[:, :-kv_heads])
    at = places.slots, slice(None), places.positions
    cache.keys[at] = turned[:, -kv_heads:].to(cache.keys.dtype)
    cache.values[at] = value.to(cache.values.dtype)


def _turn(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the first columns of heads [n, heads, width] in fp32, the dtype of cos and sin."""
    turned, rest = heads.split((cos.shape[2], heads.shape[2] - cos.shape[2]), dim=2)
    turned = turned * cos + turned.roll(cos.shape[2] // 2, dims=2) * sin
    return turned if rest.shape[2] == 0 else torch.cat([turned, rest.to(turned.dtype)], dim=2)


def activate(rows: torch.Tensor, kind: str, gated: bool, dtype: torch.dtype) -> torch.Tensor:
    """Return kind(rows) [n, F] in ``dtype``, or kind(gate) * up of rows [n, gate and up]."""
    if gated:
        gate, up = rows.chunk(2, dim=1)
        return (activated(gate, kind) * up).to(dtype)
    return activated(rows, kind).to(dtype)


def activated(rows: torch.Tensor, kind: str) -> torch.Tensor:
    """Return kind(rows) of any shape."""
    match kind:
        case "relu":
            return functional.relu(rows)
        case "silu":
            return functional.silu(rows)
        case "gelu":
            return functional.gelu(rows)
        case "gelu_tanh":
            return functional.gelu(rows, approximate="tanh")
        case _:
            raise ValueError(f"no activation {kind}")


BY_TORCH = Steps(add_norm, place, activate)


# ---- by Triton, where it is right ---------------------------------------------------------------


Checked = dict[tuple[object, ...], bool]

CHECKED: Checked = {}
"""The kernels that this process checked, by shape, and whether they were right."""


class StepChooser:
    """Chooses how the layers and the head of a stage do their steps. Each shape is checked once."""

    def __init__(self, device: torch.device, checked: Checked | None = None) -> None:
        """``checked`` has the results of earlier checks, to which it adds its own."""
        self._device = device
        self._kernels = load_kernels(device)
        self._right = {} if checked is None else checked
        self.checked_s = 0.0
        """The seconds that the checks took."""

    def layer(
        self,
        spec: LayerSpec,
        turned: int,
        dtype: torch.dtype,
        dtypes: Iterable[torch.dtype],
    ) -> Steps:
        """Return the steps of a layer that turns ``turned`` columns of its heads.

        ``dtypes`` are those of the layer's products. Queries and caches have ``dtype``.
        """
        if self._kernels is None:
            return BY_TORCH
        ours = by_triton(self._kernels)
        types = tuple(sorted(dtypes, key=str))
        head = spec.heads, spec.kv_heads, spec.head_dim, turned, spec.qk_norm == "head"
        checks = _Checks(self._device, types)
        mlp = spec.activation, spec.gated, spec.ffn
        place_right = self._passes(
            "place", (*head, dtype, types), lambda: checks.place(ours.place, *head, dtype)
        )
        activate_right = self._passes(
            "activate", (*mlp, types), lambda: checks.activate(ours.activate, *mlp)
        )
        return Steps(
            self.norm(spec.hidden, spec.norm == "layernorm", types).add_norm,
            ours.place if place_right else place,
            ours.activate if activate_right else activate,
        )

    def norm(self, width: int, centered: bool, dtypes: Iterable[torch.dtype]) -> Steps:
        """Return steps of which only ``add_norm`` is chosen."""
        if self._kernels is None:
            return BY_TORCH
        ours = by_triton(self._kernels)
        types = tuple(sorted(dtypes, key=str))
        checks = _Checks(self._device, types)
        right = self._passes(
            "add_norm",
            (width, centered, types),
            lambda: checks.add_norm(ours.add_norm, width, centered),
        )
        return Steps(ours.add_norm if right else add_norm, place, activate)

    def _passes(self, name: str, shape: tuple[object, ...], check: Callable[[], float]) -> bool:
        """Whether a kernel does a step like torch. The log names it if not."""
        key = self._device, name, *shape
        if key not in self._right:
            started_s = time.perf_counter()
            try:
                worst = check()
                if not worst <= 1:
                    raise ArithmeticError(f"its results are off by {worst:.2g} of what is allowed")
                self._right[key] = True
            except Exception as failure:
                # Triton's compiler, its C compiler and drivers raise exceptions without a common
                # base class. Any failure costs only this kernel.
                give_up(f"triton/{name}", failure)
                self._right[key] = False
            self.checked_s += time.perf_counter() - started_s
        return self._right[key]


def load_kernels(device: torch.device) -> Any | None:
    """Return the module of Triton kernels, or None if it is not usable."""
    if load_triton(device) is None:
        return None
    return importlib.import_module("backends.torch_fused_kernels")


def by_triton(kernels: Any) -> Steps:
    """Return the steps as kernels of the module ``backends.torch_fused_kernels``."""

    def add_norm(
        hidden: torch.Tensor, part: torch.Tensor | None, norm: Norm, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        result: tuple[torch.Tensor, torch.Tensor] = kernels.add_norm(
            hidden, part, norm.weight, norm.bias, norm.epsilon, dtype
        )
        return result

    def place(
        heads: torch.Tensor,
        query: torch.Tensor,
        cache: Cache,
        places: Places,
        rotary: Rotary | None,
        norm: HeadNorm | None,
    ) -> None:
        weights, epsilon = (None, 0.0) if norm is None else (norm.weights, norm.epsilon)
        at = places.slots, places.positions
        kernels.place(heads, *at, rotary, weights, epsilon, query, cache.keys, cache.values)

    return Steps(add_norm, place, kernels.activate)


class _Checks:
    """Comparisons of kernels with torch on random rows. Each returns error / tolerance."""

    def __init__(self, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> None:
        self._device = device
        self._dtypes = dtypes
        self._generator = torch.Generator().manual_seed(0)

    def add_norm(self, candidate: AddNorm, width: int, centered: bool) -> float:
        bias = self._random(width) if centered else None
        norm = Norm(self._random(width), bias, 1e-5)
        worst = 0.0
        for rows, dtype in self._cases():
            first, second = self._random(2, rows, width)
            for hidden, part in ((first, None), (first.to(dtype), None), (first, second.to(dtype))):
                total, normed = candidate(hidden, part, norm, dtype)
                expected, expected_normed = add_norm(hidden, part, norm, dtype)
                worst = _worst(worst, (total, expected), (normed, expected_normed))
        return worst

    def place(
        self,
        candidate: Place,
        heads: int,
        kv_heads: int,
        width: int,
        turned: int,
        normed: bool,
        dtype: torch.dtype,
    ) -> float:
        rotary = None
        if turned:
            angles = self._random(_CHECKED_CONTEXT, turned // 2)
            rotary = angles.cos(), angles.sin()
        norm = HeadNorm(self._random(heads + kv_heads, width), 1e-5) if normed else None
        worst = 0.0
        for rows, given in self._cases():
            positions = torch.arange(rows, device=self._device) + 1
            places = Places(positions % 2, positions)
            rows_of_heads = self._random(rows, (heads + 2 * kv_heads) * width).to(given)
            results = []
            for function in (candidate, place):
                shape = 2, kv_heads, _CHECKED_CONTEXT, width
                cache = Cache(*(torch.zeros(shape, dtype=dtype, device=self._device) for _ in "kv"))
                query = torch.zeros((rows, heads, width), dtype=dtype, device=self._device)
                function(rows_of_heads, query, cache, places, rotary, norm)
                results.append((query, cache.keys, cache.values))
            worst = _worst(worst, *zip(*results, strict=True))
        return worst

    def activate(self, candidate: Activate, kind: str, gated: bool, width: int) -> float:
        worst = 0.0
        for rows, dtype in self._cases():
            given = self._random(rows, width * (2 if gated else 1)).to(dtype)
            actual = candidate(given, kind, gated, dtype)
            # torch would round the activation before the product.
            worst = _worst(worst, (actual, activate(given.float(), kind, gated, dtype)))
        return worst

    def _cases(self) -> Iterator[tuple[int, torch.dtype]]:
        return itertools.product(CHECKED_ROWS, self._dtypes)

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator).to(self._device)


def _worst(worst: float, *pairs: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Return the largest error of (actual, expected), as a part of what its dtype allows."""
    for actual, expected in pairs:
        if actual.dtype != expected.dtype:
            raise TypeError(f"it returns {actual.dtype}, not {expected.dtype}")
        error = relative_error(actual, expected.float()) / TOLERANCE[actual.dtype]
        worst = error if math.isnan(error) else max(worst, error)
    return worst
