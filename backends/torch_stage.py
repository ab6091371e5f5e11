"""A stage on a torch device. On a GPU, tokens and chunks of prompts run as captured graphs.

The stage of a share cuts its layers where the team adds up partial rows. All rows of a prompt's
chunk run at once and eagerly there, because all members must add up the same rows.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path

import numpy as np
import torch

from backends.base import (
    Array,
    BackendError,
    Stage,
    StageOptions,
    Tokens,
)
from backends.checks import check_inputs, check_rows
from backends.torch_capture import DEVICE
from backends.torch_cuts import Cut, without_team
from backends.torch_experts import TorchExperts
from backends.torch_fused import CHECKED, Cache, Residual, StepChooser
from backends.torch_layers import (
    EmbeddingTail,
    Head,
    Layer,
    Pass,
    PromptPass,
    TokenPass,
)
from backends.torch_matmul import CHOICES, FEW_ROWS, KernelChooser, Linear, unpacked_linear
from backends.torch_packed import PackedWeight, held_bytes, plain_weight
from backends.torch_tokens import TokenRunner
from model.artifact import Tensor, read_block
from model.costs import kv_bytes, stage_buffer_bytes
from model.quantize import QuantizedMatrix
from model.rotary import rotary_table
from model.spec import QUANTIZED_TENSORS, ModelSpec

log = logging.getLogger(__name__)

PROMPT_ROWS = 64
"""The rows of a prompt that run at once, as in plans."""

_JOINED = {
    "qkv": ("q", "k", "v"),
    "gate_up": ("gate", "up"),
    "shared_gate_up": ("shared_gate", "shared_up"),
}
"""Matrices that see the same rows, and are multiplied as one."""


class TorchStage(Stage):
    """Blocks on one device, with the KV cache of every slot."""

    def __init__(
        self,
        spec: ModelSpec,
        artifacts: Sequence[tuple[int, Path]],
        options: StageOptions,
        device: torch.device,
    ) -> None:
        """Load the blocks. Raises BackendError, and CheckpointError for a damaged artifact."""
        self._spec = spec
        self._options = options
        self._device = device
        self._open = True
        self._cut = None
        if options.team_sum is not None:
            self._cut = Cut(options.team_sum, device, spec.hidden)
        started_s = time.perf_counter()
        loader = _Loader(spec, artifacts, options, device, self._cut)
        for block, path in artifacts:
            loader.add(block, path)
        self._tokens = loader.tokens
        self._tail = loader.tail
        self._layers = loader.layers
        self._head = loader.head
        self._width = spec.hidden if loader.tokens is None else spec.embed_dim
        self._decoder = TokenRunner(
            self._token_pass,
            self._chunk_pass,
            device,
            (self._width, spec.hidden if loader.head is None else spec.vocab, spec.hidden),
            options.context_tokens,
            self._cut,
        )
        estimate = stage_buffer_bytes(
            spec,
            [block for block, _ in artifacts],
            min(PROMPT_ROWS, options.context_tokens),
            options.context_tokens,
        )
        loaded_s = time.perf_counter() - started_s
        used = self._warm_up() or estimate + loader.scratch_bytes
        self._memory_bytes = loader.memory_bytes + used
        log.info(
            "loaded in %.1f s, of which choosing kernels %.1f s and checking steps %.1f s; first "
            "passes and captures %.1f s",
            loaded_s,
            *loader.checks_s,
            time.perf_counter() - started_s - loaded_s,
        )

    @property
    def memory_bytes(self) -> int:
        return self._memory_bytes

    def forward(
        self, slot: int, position: int, inputs: Array | Tokens, *, logits: int = 1
    ) -> Array:
        rows = self._check([slot], [position], inputs, len(inputs) if inputs.ndim else 0)
        chunk = PROMPT_ROWS if self._cut is None else rows
        with self._running([slot], [position]):
            if rows == 1 and (logits or self._head is None):
                result = self._decoder.run([slot], [position], self._rows(inputs)).fetch()
                return self._finite(result, [slot])
            results = [
                self._prompt(slot, position + first, self._rows(inputs[first : first + chunk]))
                for first in range(0, rows, chunk)
            ]
            if self._head is None:
                hidden = np.concatenate([_to_host(result) for result in results])
                return self._finite(hidden, [slot])
            if not logits:
                return np.empty((0, self._spec.vocab), np.float32)
            last = results[-1] if logits <= len(results[-1]) else torch.cat(results)
            return self._finite(_to_host(self._head(Residual(last[-logits:]))), [slot])

    def decode(
        self, slots: Sequence[int], positions: Sequence[int], inputs: Array | Tokens
    ) -> Array:
        count = len(slots)
        if not 0 < count == len(set(slots)) == len(positions) == len(inputs):
            raise BackendError("the rows of a pass must have different slots")
        self._check(slots, positions, inputs, 1)
        with self._running(slots, positions):
            result = self._decoder.run(slots, positions, self._rows(inputs)).fetch()
            return self._finite(result, slots)

    def close(self) -> None:
        self._open = False
        with DEVICE.shared():
            self._tokens, self._tail, self._layers, self._head = None, None, [], None
            self._decoder.close()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    def _check(
        self, slots: Sequence[int], positions: Sequence[int], inputs: Array | Tokens, rows: int
    ) -> int:
        if not self._open:
            raise BackendError("the stage is closed")
        for slot, position in zip(slots, positions, strict=True):
            check_rows(slot, position, rows, self._options.slots, self._options.context_tokens)
        check_inputs(inputs, self._spec, tokens=self._tokens is not None)
        return rows

    @contextmanager
    def _running(self, slots: Sequence[int], positions: Sequence[int]) -> Iterator[None]:
        """Run a pass. Raises BackendError, and what the team's sum raises.

        A pass that ends at a sum has stored rows that ``_finite`` did not check. They are cleared.
        """
        with torch.inference_mode(), DEVICE.shared():
            try:
                with translated("cannot run the stage", self._cut):
                    yield
            finally:
                if self._cut is not None and self._cut.failed:
                    self._cut.failed = False
                    for slot, position in zip(slots, positions, strict=True):
                        for layer in self._layers:
                            layer.empty(slot, position)

    def _finite(self, result: Array, slots: Sequence[int]) -> Array:
        """Return the result. Raises BackendError if values left the range of fp16.

        A token's pass multiplies masked positions by zero, which does not remove infinities. So the
        slot is emptied, because the next sequence would inherit them. With several slots none is
        emptied, because only one may be faulty. That shows when each runs alone.
        """
        if math.isfinite(float(result.sum())):
            return result
        for layer in self._layers if len(slots) == 1 else ():
            layer.empty(slots[0])
        raise BackendError(
            "the stage's results are not finite: this model's values leave the range of 16 bits; "
            "load it at 32 bits, or on a device that computes in fp32"
        )

    def _rows(self, inputs: Array | Tokens) -> Array:
        """Return the rows for the device: hidden rows, or rows of the mapped token table."""
        if self._tokens is None:
            return np.asarray(inputs, np.float32)
        return self._tokens.dequantize(np.asarray(inputs, np.int64))

    def _prompt(self, slot: int, position: int, rows: Array) -> torch.Tensor:
        """Run all rows [n, width] through all blocks but the head: hidden fp32 [n, hidden]."""
        size = FEW_ROWS if len(rows) <= FEW_ROWS else PROMPT_ROWS
        result = self._decoder.run_chunk(slot, position, rows, size)
        if result is not None:
            return result
        hidden = torch.from_numpy(np.array(rows)).to(self._device)
        return self._body(hidden, PromptPass(slot, position, len(rows), self._device)).settled()

    def _chunk_pass(self, hidden: torch.Tensor, rows: Pass) -> torch.Tensor:
        return self._body(hidden, rows).settled()

    def _token_pass(self, hidden: torch.Tensor, rows: TokenPass) -> torch.Tensor:
        stream = self._body(hidden, rows)
        return stream.settled() if self._head is None else self._head(stream)

    def _body(self, hidden: torch.Tensor, rows: Pass) -> Residual:
        if self._tail is not None:
            hidden = self._tail(hidden, rows)
        stream = Residual(hidden)
        for layer in self._layers:
            layer(stream, rows)
        return stream

    def _warm_up(self) -> int:
        """Run a chunk and a token; return the extra bytes they take on a GPU, or 0 on a CPU.

        This compiles, captures and allocates now, so that the first answer is not delayed or ended.
        """
        if self._device.type != "cuda":
            return 0
        count = min(PROMPT_ROWS, self._options.context_tokens)
        with (
            # Peaks are those of the process, so other stages must not allocate meanwhile.
            DEVICE.exclusive(),
            translated("cannot run the stage"),
            torch.inference_mode(),
            without_team(self._cut),
        ):
            torch.cuda.reset_peak_memory_stats(self._device)
            before_bytes = torch.cuda.memory_allocated(self._device)
            last = self._prompt(0, 0, np.zeros((count, self._width), np.float32))[-1:]
            if self._head is not None:
                self._head(Residual(last))
            del last
            self._decoder.run([0], [0], np.zeros((1, self._width), np.float32))
            torch.cuda.current_stream(self._device).synchronize()
            # The runs before a capture leave memory that only another capture could use.
            torch.cuda.empty_cache()
            return int(torch.cuda.max_memory_allocated(self._device) - before_bytes)


class _Loader:
    """Brings artifacts to the device, block by block."""

    def __init__(
        self,
        spec: ModelSpec,
        artifacts: Sequence[tuple[int, Path]],
        options: StageOptions,
        device: torch.device,
        cut: Cut | None,
    ) -> None:
        self._spec = spec
        self._options = options
        self._device = device
        self._cut = cut
        roomy = _has_room(spec, artifacts, options, device)
        self._chooser = KernelChooser(device, exact=options.exact, roomy=roomy, choices=CHOICES)
        self._steps = StepChooser(device, CHECKED)
        self._rotary: dict[object, tuple[torch.Tensor, torch.Tensor]] = {}
        self.tokens: QuantizedMatrix | None = None
        self.tail: EmbeddingTail | None = None
        self.layers: list[Layer] = []
        self.head: Head | None = None
        self.memory_bytes = 0

    @property
    def scratch_bytes(self) -> int:
        return self._chooser.scratch_bytes

    @property
    def checks_s(self) -> tuple[float, float]:
        """The seconds that choosing kernels took, and those of checking steps."""
        return self._chooser.chosen_s, self._steps.checked_s

    def add(self, block: int, path: Path) -> None:
        fmt, tensors = read_block(path, self._spec, block)
        dtype = compute_dtype(self._device, fmt.bits, exact=self._options.exact)
        context = f"cannot load {self._spec.block_name(block)}"
        with DEVICE.shared(), translated(context), torch.inference_mode():
            kind = self._spec.block_kind(block)
            if kind == "embedding":
                self._add_embedding(tensors, dtype)
            elif kind == "layer":
                self._add_layer(block, tensors, dtype)
            else:
                names = [name for name in ("project_out", "lm_head") if f"{name}.weight" in tensors]
                linears = {name: self._linear(tensors, (name,), dtype) for name in names}
                self._add_head(linears, self._vectors(tensors))

    def _add_embedding(self, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
        table, vectors = tensors["tokens.weight"], self._vectors(tensors)
        if not isinstance(table, QuantizedMatrix):
            raise BackendError("the token table must be a stored matrix")
        self.tokens = table
        self.memory_bytes += table.stored_bytes
        projection = None
        if self._spec.projected:
            projection = self._linear(tensors, ("project_in",), dtype)
        positions = vectors.get("positions.weight")
        self.tail = EmbeddingTail(projection, positions, self._spec.position_offset)

    def _add_layer(self, block: int, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
        layer = self._spec.layer(block)
        names: tuple[str, ...] = ("qkv", "o", "gate_up" if layer.gated else "up", "down")
        if layer.experts is not None:
            beside = ("shared_gate_up", "shared_down") if layer.experts.shared_ffn else ()
            names = ("qkv", "o", *beside)
        linears = {name: self._linear(tensors, _JOINED.get(name, (name,)), dtype) for name in names}
        shape = (self._options.slots, layer.kv_heads, self._options.context_tokens, layer.head_dim)
        # Filling the cache shows a lack of memory now, and not in the middle of a text.
        cache = Cache(*(torch.zeros(shape, dtype=dtype, device=self._device) for _ in range(2)))
        self.memory_bytes += held_bytes(cache.keys) + held_bytes(cache.values)
        rotary = None
        if layer.rope is not None:
            key = layer.rope, layer.head_dim
            if key not in self._rotary:
                tables = rotary_table(layer.rope, layer.head_dim, self._options.context_tokens)
                cos, sin = (torch.from_numpy(table).to(self._device) for table in tables)
                self._rotary[key] = cos, sin
                self.memory_bytes += held_bytes(cos) + held_bytes(sin)
            rotary = self._rotary[key]
        turned = 0 if rotary is None else 2 * rotary[0].shape[1]
        dtypes = {dtype}.union(*(linear.dtypes for linear in linears.values()))
        if (
            self._cut is not None
            or layer.norm_position != "pre"
            or layer.experts is not None
            or layer.qk_norm == "width"
        ):
            # The team's sums, norms that are the stream or a part of it, rows of a router, or heads
            # that were normalized together.
            dtypes.add(torch.float32)
        steps = self._steps.layer(layer, turned, dtype, dtypes)
        vectors = self._vectors(tensors)
        experts = None
        if layer.experts is not None:
            experts = TorchExperts(
                layer,
                layer.experts,
                tensors,
                {name: linear for name, linear in linears.items() if name.startswith("shared")},
                self._device,
                dtype,
            )
            self.memory_bytes += experts.nbytes
        self.layers.append(
            Layer(layer, linears, vectors, cache, rotary, dtype, steps, self._cut, experts)
        )

    def _add_head(self, linears: dict[str, Linear], vectors: dict[str, torch.Tensor]) -> None:
        dtypes = set[torch.dtype]().union(*(linear.dtypes for linear in linears.values()))
        steps = self._steps.norm(self._spec.hidden, "norm.bias" in vectors, dtypes)
        self.head = Head(self._spec, linears, vectors, steps)

    def _linear(
        self, tensors: Mapping[str, Tensor], names: Sequence[str], dtype: torch.dtype
    ) -> Linear:
        """Stack the matrices ``names`` with their biases, unless those follow a cut."""
        matrices = []
        for name in names:
            matrix = tensors[f"{name}.weight"]
            if not isinstance(matrix, QuantizedMatrix):
                raise BackendError(f"{name} must be a stored matrix")
            matrices.append(matrix)
        bias = None
        if f"{names[0]}.bias" in tensors and not self._is_cut(names[0]):
            parts = [np.array(tensors[f"{name}.bias"], np.float32) for name in names]
            bias = torch.from_numpy(np.concatenate(parts)).to(self._device, dtype)
        if matrices[0].format.scheme == "float":
            linear = unpacked_linear(plain_weight(matrices, self._device, dtype), bias)
        else:
            linear = self._chooser.linear(PackedWeight.of(matrices, self._device), bias, dtype)
        self.memory_bytes += linear.nbytes
        return linear

    def _vectors(self, tensors: Mapping[str, Tensor]) -> dict[str, torch.Tensor]:
        """Return all tensors but matrices and the biases that they add, fp32 on the device."""
        vectors = {}
        for name, tensor in tensors.items():
            matrix = name.removesuffix(".bias")
            added = f"{matrix}.weight" in QUANTIZED_TENSORS and not self._is_cut(matrix)
            if isinstance(tensor, QuantizedMatrix) or added:
                continue
            vectors[name] = torch.from_numpy(np.array(tensor, np.float32)).to(self._device)
            self.memory_bytes += held_bytes(vectors[name])
        return vectors

    def _is_cut(self, matrix: str) -> bool:
        """Whether the team adds up the products with the matrix."""
        return self._cut is not None and matrix in ("o", "down")


def _to_host(values: torch.Tensor) -> Array:
    array: Array = values.cpu().numpy()
    return array


def compute_dtype(device: torch.device, bits: int, *, exact: bool) -> torch.dtype:
    """Return the dtype in which a block of ``bits`` multiplies and caches."""
    half = device.type == "cuda" and bits < 32 and not exact
    return torch.float16 if half else torch.float32


def _has_room(
    spec: ModelSpec,
    artifacts: Sequence[tuple[int, Path]],
    options: StageOptions,
    device: torch.device,
) -> bool:
    """Whether the stage's memory holds all its matrices as plain numbers."""
    if options.memory_bytes is None:
        return False
    item_bytes = compute_dtype(device, 16, exact=options.exact).itemsize
    needed = stage_buffer_bytes(
        spec,
        [block for block, _ in artifacts],
        min(PROMPT_ROWS, options.context_tokens),
        options.context_tokens,
    )
    for block, path in artifacts:
        weights = sum(prod(shape) for shape in spec.block_tensors(block).values())
        # A block stored at 32 bits stays so.
        stored_bytes = path.stat().st_size if path.is_file() else 0
        needed += max(item_bytes * weights, stored_bytes)
        needed += options.slots * kv_bytes(spec, block, options.context_tokens)
    return needed <= options.memory_bytes


@contextmanager
def translated(context: str, cut: Cut | None = None) -> Iterator[None]:
    """Turn torch's exceptions into BackendError with one line of advice, but not those of a sum."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise BackendError(
            f"{context}: the GPU is out of memory; use fewer bits, a shorter context, or give the "
            "device less with --memory"
        ) from error
    except (RuntimeError, MemoryError) as error:
        if cut is not None and cut.failed:
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise BackendError(f"{context}: {lines[0][:300]}") from error
