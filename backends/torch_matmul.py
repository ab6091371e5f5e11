"""Products with quantized weights on a torch device: several ways, chosen by measuring.

A *form* is a way to keep a matrix. It has one or more kernels. The first matrix of each layout is
kept in every possible form, and every kernel is compared with the plain one. It is timed at the
rows of a token, of a few tokens and of a prompt's chunk. The form that serves a chat fastest keeps
all matrices of that layout, and its fastest kernel at each number of rows multiplies:

    packed    codes and scales as stored. Kernels: Triton multiplies without unpacking (gemv for few
              rows, gemm for many in fp16); Triton unpacks, then torch multiplies; torch does both
              (always works)
    int4      torch's own 4-bit product. On CUDA it takes bfloat16 alone (an error of 0.4 % of a
              product's largest, see TOLERANCE), so never where a stage must be exact. For many
              rows Triton unpacks its tiles, then torch multiplies
    unpacked  unpacked once at load, where the stage's memory has room for it

torch._weight_int8pack_mm is not among them. It takes one scale per row, and ours have one per
group.

Source: https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/native/cuda/int4mm.cu
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch.nn import functional

from backends.torch_packed import (
    STRIP_WEIGHT_BYTES,
    STRIP_WEIGHTS,
    UNPACKED_WEIGHTS,
    Int4Weight,
    PackedWeight,
    held_bytes,
)
from backends.torch_timing import seconds

log = logging.getLogger(__name__)

FEW_ROWS = 8
"""Up to this many rows, reading the weights limits the speed of a product."""

MEASURED_ROWS = (1, FEW_ROWS, 64)
"""The rows of a token, of several sequences' tokens, and of a prompt's chunk."""

CLEARLY_FASTER = 0.95
"""A candidate that takes less than this part of an earlier one's time replaces it."""

_LAST_RESORT_S = 1e9
"""Stands for the time of torch unpacking and multiplying, where there are other kernels."""

PROMPT_CHUNKS = 1 / 16
"""The chunks of prompts for each token, where a chat's prompts have four times its answers' rows.

A form's cost is the time of a token plus this part of a chunk's.
"""

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""The largest error of a kernel against fp32, relative to the largest result.

fp16 rounds a weight and a result by 2^-11 each, bfloat16 by 2^-9.
"""

INT4_TOLERANCE = 2e-2
"""bfloat16 rounds inputs, scales, zeros and results by 2^-9 each, which random signs average."""

Candidate = TypeVar("Candidate")

_OPERATOR_ERRORS = (RuntimeError, AttributeError, TypeError, ValueError, MemoryError)
"""The errors of a torch operator that fails, is absent or takes other arguments.

An operator also fails for lack of memory or of an implementation.
"""

_IMPORT_ERRORS = (ImportError, OSError, RuntimeError, AttributeError, TypeError, ValueError)
"""The errors of a broken or unfitting Triton, at its import and when its kernels are declared.

Parts may be missing or fail to load, the driver may be missing, or its interface may differ.
"""

GEMV_SHAPES = ((1, 256), (4, 256), (4, 512), (8, 1024))
"""Warps of a Triton program for few rows, and the words of a row that it takes in one step."""

GEMM_OUTPUTS = (16, 64)
"""Outputs of a Triton program that multiplies many rows."""

Kernel = Callable[[torch.Tensor, Any], torch.Tensor]
"""Multiplies x [n, K] by a matrix [N, K] in the kernel's form, to [n, N] of x's dtype."""


@dataclass(frozen=True, slots=True)
class Form:
    """A way to keep a packed matrix, and its kernels by name.

    takes: the dtypes of kernels that do not take the block's own.
    """

    name: str
    convert: Callable[[PackedWeight], Any]
    kernels: Mapping[str, Kernel]
    tolerance: float
    takes: Mapping[str, torch.dtype] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Choice:
    """The form of a layout, and the kernel for each of MEASURED_ROWS with its seconds."""

    form: Form
    kernels: tuple[str, ...]
    seconds: tuple[float, ...] | None = None
    """None: there was no choice."""

    @property
    def cost(self) -> float:
        """The seconds of a token and of its part of a prompt."""
        if self.seconds is None:
            return math.inf
        return self.seconds[0] + PROMPT_CHUNKS * self.seconds[-1]


class Linear:
    """A matrix with its bias: rows [n, K] of any dtype to [n, N] of one of ``dtypes``.

    A product converts rows that do not have the dtype which it ``takes``.
    """

    def __init__(
        self,
        weight: Any,
        kernels: tuple[Kernel, ...],
        bias: torch.Tensor | None,
        nbytes: int,
        takes: tuple[torch.dtype, ...],
    ) -> None:
        """``kernels`` and the dtypes that they take are for each of MEASURED_ROWS."""
        self._weight = weight
        self._kernels = kernels
        self._bias = bias
        self._takes = takes
        self.nbytes = nbytes + (0 if bias is None else held_bytes(bias))

    @property
    def dtypes(self) -> frozenset[torch.dtype]:
        """The dtypes that products of any number of rows take and return."""
        results = set(self._takes)
        if self._bias is not None:
            results |= {torch.promote_types(each, self._bias.dtype) for each in self._takes}
        return frozenset(results)

    def takes(self, rows: int) -> torch.dtype:
        """Return the dtype in which a product of ``rows`` rows takes them as they are.

        It is not the block's where torch's 4-bit product takes bfloat16, or where fp16 does not
        hold the weights.
        """
        return self._takes[_measured(rows)]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        index = _measured(len(x))
        result = self._kernels[index](x.to(self._takes[index]), self._weight)
        if self._bias is None:
            return result
        if result.dtype == self._bias.dtype:
            result += self._bias
            return result
        return result + self._bias


def _measured(rows: int) -> int:
    """Return the index into MEASURED_ROWS of the kernel for ``rows`` rows."""
    return 0 if rows == 1 else 1 if rows <= FEW_ROWS else 2


def unpacked_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    """Return the product with a matrix that is stored as plain numbers."""
    takes = (weight.dtype,) * len(MEASURED_ROWS)
    return Linear(weight, (_multiply_unpacked,) * 3, bias, held_bytes(weight), takes)


Choices = dict[tuple[object, ...], Choice]

CHOICES: Choices = {}
"""The choices of this process. A later stage of the same layouts loads faster, and rounds alike."""


class KernelChooser:
    """Makes packed matrices into ``Linear``, and measures each layout once."""

    def __init__(
        self, device: torch.device, *, exact: bool, roomy: bool, choices: Choices | None = None
    ) -> None:
        """``roomy`` means that matrices may take more memory than their packed codes.

        ``choices`` are earlier ones, to which it adds its own.
        """
        self._device = device
        self._exact = exact
        self._roomy = roomy
        self._choices = {} if choices is None else choices
        self.scratch_bytes = 0
        """The memory that the chosen kernels take while they run, on a CPU."""
        self.chosen_s = 0.0
        """The seconds that it took to choose."""

    def linear(self, weight: PackedWeight, bias: torch.Tensor | None, dtype: torch.dtype) -> Linear:
        layout = (
            *(self._device, self._exact, self._roomy, dtype),
            *(weight.shape, weight.bits, weight.group_size, weight.scales.dtype),
        )
        if layout not in self._choices:
            started_s = time.perf_counter()
            choice = self._choose(weight, dtype)
            self.chosen_s += time.perf_counter() - started_s
            self._choices[layout] = choice
            log.info(
                "%d x %d at %d bits: kept %s, multiplied by %s",
                *weight.shape,
                weight.bits,
                choice.form.name,
                _with_times(choice.kernels, choice.seconds),
            )
        choice = self._choices[layout]
        held = choice.form.convert(weight)
        if isinstance(held, PackedWeight):
            rows, columns = weight.shape
            strip = min(rows * columns, STRIP_WEIGHTS)
            self.scratch_bytes = max(self.scratch_bytes, STRIP_WEIGHT_BYTES * strip)
        kernels = tuple(choice.form.kernels[name] for name in choice.kernels)
        takes = tuple(choice.form.takes.get(name, dtype) for name in choice.kernels)
        return Linear(held, kernels, bias, weight_bytes(held), takes)

    def _choose(self, weight: PackedWeight, dtype: torch.dtype) -> Choice:
        forms = [
            form
            for form in candidate_forms(self._device, dtype, exact=self._exact)
            if form.name == "packed" or _may_keep(form, weight, roomy=self._roomy)
        ]
        plain = forms[0]
        if len(forms) == 1 and len(plain.kernels) == 1:
            return Choice(plain, tuple(plain.kernels) * len(MEASURED_ROWS))
        samples = _Samples(weight)
        measured = [self._measure(form, weight, dtype, samples) for form in forms]
        choices = [choice for choice in measured if choice is not None]
        if not choices:
            return Choice(plain, ("torch",) * len(MEASURED_ROWS))
        return choices[_fastest({index: choice.cost for index, choice in enumerate(choices)})]

    def _measure(
        self, form: Form, weight: PackedWeight, dtype: torch.dtype, samples: _Samples
    ) -> Choice | None:
        """Return the best kernels of a form, or None if none is right."""
        try:
            held = form.convert(weight)
        except _OPERATOR_ERRORS as error:
            give_up(form.name, error)
            return None
        times = {
            name: [_LAST_RESORT_S] * len(MEASURED_ROWS)
            if name == "torch" and len(form.kernels) > 1
            else self._times(form, name, held, form.takes.get(name, dtype), samples)
            for name in form.kernels
        }
        del held
        fastest = tuple(
            _fastest({name: each[index] for name, each in times.items()})
            for index in range(len(MEASURED_ROWS))
        )
        best_s = tuple(times[name][index] for index, name in enumerate(fastest))
        return None if math.inf in best_s else Choice(form, fastest, best_s)

    def _times(
        self, form: Form, name: str, held: Any, takes: torch.dtype, samples: _Samples
    ) -> list[float]:
        """Return seconds at each of MEASURED_ROWS, or infinities if the kernel fails."""
        kernel, times = form.kernels[name], []
        try:
            for x, expected in samples.of(takes):
                with warnings.catch_warnings():
                    # Compiler warnings that no user here can act on.
                    warnings.simplefilter("ignore")
                    error = relative_error(kernel(x, held), expected)
                if not error <= form.tolerance:
                    raise ArithmeticError(f"its results are off by {error:.2g}")
                call = functools.partial(kernel, x)
                times.append(seconds(call, held, weight_bytes(held), self._device))
        except Exception as failure:
            # Triton's compiler, its C compiler and drivers raise exceptions without a common base
            # class. Any failure costs only this kernel.
            give_up(f"{form.name}/{name}", failure)
            return [math.inf] * len(MEASURED_ROWS)
        log.debug("%s", _with_times((f"{form.name}/{name}",) * 3, times))
        return times


class _Samples:
    """Random rows, and their products with a matrix in fp32."""

    def __init__(self, weight: PackedWeight) -> None:
        self._weight = weight
        self._samples: dict[torch.dtype, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def of(self, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return rows in ``dtype`` with their products, for each of MEASURED_ROWS."""
        if dtype not in self._samples:
            generator = torch.Generator().manual_seed(0)
            shape, device = (MEASURED_ROWS[-1], self._weight.columns), self._weight.words.device
            rows = torch.randn(shape, generator=generator).to(device, dtype)
            products = _multiply_plainly(rows.float(), self._weight)
            self._samples[dtype] = [(rows[:n], products[:n]) for n in MEASURED_ROWS]
        return self._samples[dtype]


def _fastest(times_s: Mapping[Candidate, float]) -> Candidate:
    """Return the first candidate that no other beats clearly, so that noise decides little."""
    best, *others = times_s
    for name in others:
        if times_s[name] < CLEARLY_FASTER * times_s[best]:
            best = name
    return best


def candidate_forms(device: torch.device, dtype: torch.dtype, *, exact: bool) -> list[Form]:
    """Return the forms to measure. The first is ``packed``, whose plain kernel always works."""
    kernels: dict[str, Kernel] = {"torch": _multiply_plainly}
    triton_kernels = load_triton(device)
    if triton_kernels is not None:
        kernels["triton-unpack"] = functools.partial(_multiply_after, triton_kernels.unpack)
        for shape in GEMV_SHAPES:
            name = "x".join(map(str, shape))
            kernels[f"triton-gemv-{name}"] = functools.partial(
                _multiply_by, triton_kernels.gemv, *shape
            )
        for outputs in GEMM_OUTPUTS if dtype == torch.float16 else ():
            kernels[f"triton-gemm-{outputs}"] = functools.partial(
                _multiply_by, triton_kernels.gemm, outputs
            )
    tolerance = TOLERANCE[dtype]
    forms = [Form("packed", _as_is, kernels, tolerance)]
    if device.type == "cpu" and dtype == torch.float32:
        forms.append(Form("int4", _int4_cpu, {"int4": _multiply_int4_cpu}, tolerance))
    elif device.type == "cuda" and not exact and torch.cuda.get_device_capability(device) >= (8, 0):
        int4: dict[str, Kernel] = {"int4": _multiply_int4_cuda}
        if triton_kernels is not None:
            int4["triton-unpack"] = functools.partial(
                _multiply_after_tiles, triton_kernels.unpack_tiles
            )
        takes = {"int4": torch.bfloat16}
        forms.append(Form("int4", _int4_cuda, int4, INT4_TOLERANCE, takes))
    unpack = functools.partial(_unpacked, dtype=dtype)
    forms.append(Form("unpacked", unpack, {"torch": _multiply_unpacked}, tolerance))
    return forms


@functools.cache
def load_triton(device: torch.device) -> Any | None:
    """Return the module of Triton kernels, or None with one log line if it is not usable."""
    if device.type != "cuda":
        return None
    try:
        return importlib.import_module("backends.torch_kernels")
    except _IMPORT_ERRORS as error:
        log.warning(
            "no Triton kernels (%s: %s): quantized layers will be slow; install triton and gcc",
            type(error).__name__,
            first_line(error),
        )
        return None


def weight_bytes(held: Any) -> int:
    """Return the bytes of a matrix in its form."""
    if isinstance(held, PackedWeight):
        return held.nbytes
    if isinstance(held, Int4Weight):
        return held_bytes(held.tiles) + held_bytes(held.scales_and_offsets)
    return held_bytes(held)


# ---- forms --------------------------------------------------------------------------------------


def _as_is(weight: PackedWeight) -> PackedWeight:
    return weight


def _may_keep(form: Form, weight: PackedWeight, *, roomy: bool) -> bool:
    rows, columns = weight.shape
    if form.name == "unpacked":
        return roomy
    if weight.bits != 4 or columns % weight.group_size:
        return False
    if form.convert is _int4_cpu:
        # Its fp32 scales and offsets take more than a plan charges.
        return roomy and rows % 16 == 0
    return rows % 8 == 0 and columns % 32 == 0


def _unpacked(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    values = torch.empty(weight.shape, dtype=dtype, device=weight.words.device)
    for rows in weight.strips():
        values[rows] = weight.dequantize(dtype, rows)
    return values


def _int4_cpu(weight: PackedWeight) -> Int4Weight:
    tiles = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes(), 2)
    return Int4Weight(tiles, scales_and_offsets(weight, torch.float32), weight.group_size)


def _int4_cuda(weight: PackedWeight) -> Int4Weight:
    pairs = torch.empty(
        (weight.shape[0], weight.columns // 2), dtype=torch.uint8, device=weight.words.device
    )
    for rows in weight.strips():
        codes = weight.codes(rows)
        # The first of two codes goes to the high half of a byte.
        pairs[rows] = ((codes[:, ::2] << 4) | codes[:, 1::2]).to(torch.uint8)
    inner_tiles = next(tiles for tiles in (8, 4, 2) if weight.columns % (16 * tiles) == 0)
    tiles = torch.ops.aten._convert_weight_to_int4pack(pairs, inner_tiles)
    return Int4Weight(tiles, scales_and_offsets(weight, torch.bfloat16), weight.group_size)


def scales_and_offsets(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """Return [G, N, 2] so that value = (code - 8) * scale + offset."""
    scales = weight.scales.float()
    offsets = (8 - weight.zeros.float()) * scales
    return torch.stack([scales.T, offsets.T], dim=-1).to(dtype).contiguous()


# ---- kernels ------------------------------------------------------------------------------------


def _multiply_plainly(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    parts = [functional.linear(x, weight.dequantize(x.dtype, rows)) for rows in weight.strips()]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _multiply_after(
    unpack: Callable[[PackedWeight, torch.dtype], torch.Tensor],
    x: torch.Tensor,
    weight: PackedWeight,
) -> torch.Tensor:
    parts = [
        functional.linear(x, unpack(weight.part(rows), x.dtype))
        for rows in weight.strips(UNPACKED_WEIGHTS)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _multiply_after_tiles(
    unpack: Callable[[Int4Weight, torch.dtype], torch.Tensor], x: torch.Tensor, weight: Int4Weight
) -> torch.Tensor:
    parts = [functional.linear(x, unpack(strip, x.dtype)) for strip in weight.strips()]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _multiply_by(multiply: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
    *shape, x, weight = arguments
    return multiply(x, weight, *shape)


def _multiply_int4_cpu(x: torch.Tensor, weight: Int4Weight) -> torch.Tensor:
    product: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
        x.contiguous(), weight.tiles, weight.group_size, weight.scales_and_offsets
    )
    return product


def _multiply_int4_cuda(x: torch.Tensor, weight: Int4Weight) -> torch.Tensor:
    product: torch.Tensor = torch.ops.aten._weight_int4pack_mm(
        x.contiguous(), weight.tiles, weight.group_size, weight.scales_and_offsets
    )
    return product


def _multiply_unpacked(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return functional.linear(x, weight)


# ---- measuring ----------------------------------------------------------------------------------


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference relative to the largest value. NaN if ``actual`` has one."""
    scale = expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((actual.float() - expected).abs().max() / scale)


def _with_times(names: Sequence[str], times_s: Sequence[float] | None) -> str:
    if times_s is None:
        return ", ".join(names)
    return ", ".join(
        f"{name} ({1e6 * each:.0f} us for {rows})"
        for name, each, rows in zip(names, times_s, MEASURED_ROWS, strict=True)
    )


def give_up(what: str, error: Exception) -> None:
    """Say in the log why a kernel or a form is not used."""
    log.warning("%s is not used (%s: %s)", what, type(error).__name__, first_line(error))


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else "no message"
