"""NVIDIA GPUs, Jetson included, by PyTorch. ``torch_cpu`` is the same code on any CPU.

They are two entries of the registry, so that ``torch_cuda`` never falls back to the CPU unnoticed.
torch is imported on request, because every error of that import has its own remedy.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.base import (
    Backend,
    BackendUnavailable,
    Capabilities,
    HardwareAbsent,
    StageOptions,
)
from backends.checks import check_blocks
from backends.torch_capture import DEVICE
from backends.torch_libraries import map_libraries
from model.spec import ModelSpec

if TYPE_CHECKING:
    from backends.encoder import EncoderStage
    from backends.torch_stage import TorchStage

GPU_CONTAINER_BITS = {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 8: 8, 16: 16, 32: 32}
CPU_CONTAINER_BITS = GPU_CONTAINER_BITS | {16: 32}
"""A CPU, or an exact stage, multiplies in fp32, so that its results equal the reference."""

READ_PROBE_BYTES = 1 << 30
"""Larger than the cache of any GPU, so that the probe reads memory."""

READ_PROBES = 5

_DEVICE_TREE = Path("/proc/device-tree/compatible")


class TorchCudaBackend(Backend):
    """The first GPU that CUDA shows (CUDA_VISIBLE_DEVICES chooses)."""

    @classmethod
    def probe(cls) -> Capabilities:
        torch = _torch("torch_cuda")
        check_gpu(torch)
        gpu = torch.cuda.get_device_properties(0)
        parts = [
            str(torch.__version__),
            f"CUDA {torch.version.cuda}",
            f"{gpu.name} sm_{gpu.major}{gpu.minor}",
            triton_version(),
        ]
        return Capabilities(
            "torch_cuda",
            ", ".join(parts),
            GPU_CONTAINER_BITS,
            exact_container_bits=CPU_CONTAINER_BITS,
            shares=True,
        )

    @classmethod
    def memory_bytes(cls) -> tuple[int, int] | None:
        torch = _torch("torch_cuda")
        check_gpu(torch)
        if is_integrated(torch.cuda.get_device_properties(0)):
            # The GPU shares memory with the CPU. The system's available memory already lacks CUDA's
            # part.
            return None
        with DEVICE.shared():
            free, total = torch.cuda.mem_get_info(0)
        return int(free), int(total)

    @classmethod
    def memory_read_bytes_per_s(cls) -> float | None:
        torch = _torch("torch_cuda")
        check_gpu(torch)
        with DEVICE.shared():
            return _read_bytes_per_s(torch)

    def load(
        self, spec: ModelSpec, artifacts: Sequence[tuple[int, Path]], options: StageOptions
    ) -> TorchStage:
        check_blocks(spec, [block for block, _ in artifacts], options)
        torch = _torch("torch_cuda")
        check_gpu(torch)
        return _load(torch, spec, artifacts, options, "cuda:0")

    def load_encoder(
        self, spec: ModelSpec, artifacts: Sequence[tuple[int, Path]], options: StageOptions
    ) -> EncoderStage:
        check_blocks(spec, [block for block, _ in artifacts], options)
        torch = _torch("torch_cuda")
        check_gpu(torch)
        return _load_encoder(torch, spec, artifacts, options, "cuda:0")


class TorchCpuBackend(Backend):
    """The processor, by the GPU backend's code without graphs. Slower than ``onnx_cpu``."""

    @classmethod
    def probe(cls) -> Capabilities:
        torch = _torch("torch_cpu")
        return Capabilities("torch_cpu", str(torch.__version__), CPU_CONTAINER_BITS, shares=True)

    def load(
        self, spec: ModelSpec, artifacts: Sequence[tuple[int, Path]], options: StageOptions
    ) -> TorchStage:
        check_blocks(spec, [block for block, _ in artifacts], options)
        torch = _torch("torch_cpu")
        torch.set_num_threads(options.threads)
        return _load(torch, spec, artifacts, options, "cpu")

    def load_encoder(
        self, spec: ModelSpec, artifacts: Sequence[tuple[int, Path]], options: StageOptions
    ) -> EncoderStage:
        check_blocks(spec, [block for block, _ in artifacts], options)
        torch = _torch("torch_cpu")
        torch.set_num_threads(options.threads)
        return _load_encoder(torch, spec, artifacts, options, "cpu")


def is_integrated(gpu: Any, device_tree: Path = _DEVICE_TREE) -> bool:
    """Whether a GPU has no memory of its own, by CUDA's report or because the board is a Jetson."""
    if getattr(gpu, "is_integrated", 0):
        return True
    try:
        return b"nvidia,tegra" in device_tree.read_bytes()
    except OSError:
        return False


def _read_bytes_per_s(torch: Any) -> float:
    free, _ = torch.cuda.mem_get_info(0)
    size_bytes = min(READ_PROBE_BYTES, free // 4)
    values = torch.ones(size_bytes // 4, dtype=torch.int32, device="cuda:0")
    best_s = math.inf
    for _ in range(READ_PROBES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        values.amax()
        end.record()
        end.synchronize()
        best_s = min(best_s, start.elapsed_time(end) / 1e3)
    del values
    torch.cuda.empty_cache()
    return float(size_bytes // 4 * 4 / best_s)


def _load(
    torch: Any,
    spec: ModelSpec,
    artifacts: Sequence[tuple[int, Path]],
    options: StageOptions,
    device: str,
) -> TorchStage:
    from backends.torch_stage import TorchStage

    return TorchStage(spec, artifacts, options, torch.device(device))


def _load_encoder(
    torch: Any,
    spec: ModelSpec,
    artifacts: Sequence[tuple[int, Path]],
    options: StageOptions,
    device: str,
) -> EncoderStage:
    from backends.torch_encoder import load_encoder

    return load_encoder(spec, artifacts, options, torch.device(device))


def _torch(backend: str) -> Any:
    """Return the module torch. Raises BackendUnavailable that names what to install."""
    map_libraries()
    try:
        import torch
    except ModuleNotFoundError as error:
        board = " (Jetson: NVIDIA's build for its JetPack)" if backend == "torch_cuda" else ""
        raise BackendUnavailable(
            backend, f"{error.name} is not installed: pip install torch{board}"
        ) from error
    except (ImportError, OSError) as error:
        # A wheel for another JetPack or CUDA. The first line names the missing library.
        raise BackendUnavailable(
            backend, f"torch does not load ({_line(error)}); install the build for this system"
        ) from error
    if not hasattr(torch.nn.functional, "rms_norm"):
        raise BackendUnavailable(
            backend, f"torch {torch.__version__} is too old; install 2.4 or newer"
        )
    return torch


def check_gpu(torch: Any) -> None:
    """Raise BackendUnavailable unless a kernel runs on the first GPU.

    HardwareAbsent: there is none now, or others use all of it.
    """
    if torch.version.cuda is None:
        raise BackendUnavailable(
            "torch_cuda",
            f"this torch ({torch.__version__}) is built without CUDA; install a build with it from "
            "pytorch.org, or NVIDIA's for the board's JetPack",
        )
    try:
        with DEVICE.shared(), warnings.catch_warnings():
            # Warnings of old drivers and unknown GPUs. Errors follow.
            warnings.simplefilter("ignore")
            torch.cuda.init()
            if int(torch.ones(1, device="cuda:0").add(1).item()) != 2:
                raise RuntimeError("the GPU computes wrongly")
    except (RuntimeError, AssertionError) as error:
        raise HardwareAbsent("torch_cuda", f"no usable GPU: {_line(error)}") from error


def triton_version() -> str:
    """Return Triton's version, which decides the speed of quantized layers.

    Triton is not imported, because that may fail.
    """
    if importlib.util.find_spec("triton") is None:
        return "no Triton"
    try:
        found = f"Triton {importlib.metadata.version('triton')}"
    except importlib.metadata.PackageNotFoundError:
        found = "Triton"
    # Triton compiles the launchers of its kernels on the machine that runs them.
    compilers = (os.environ.get("CC"), "gcc", "clang")
    if not any(shutil.which(name) for name in compilers if name):
        found += " without a C compiler"
    return found


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200].rstrip(" .") if lines else type(error).__name__
