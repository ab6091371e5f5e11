"""The table of backends: name -> module and class. A backend is imported when it is selected."""

from __future__ import annotations

import contextlib
import importlib

from backends.base import Backend, BackendError, BackendUnavailable, Capabilities

BACKENDS: dict[str, str] = {
    "onnx_cpu": "backends.onnx_cpu:OnnxCpuBackend",
    "torch_cuda": "backends.torch_cuda:TorchCudaBackend",
    "torch_cpu": "backends.torch_cuda:TorchCpuBackend",
    "edgetpu": "backends.edgetpu:EdgeTpuBackend",
    "tflite_cpu": "backends.edgetpu:TfliteCpuBackend",
}

LIBRARIES: dict[str, tuple[str, ...]] = {"onnx_cpu": ("onnxruntime", "onnx", "numpy")}
"""Backends that need no hardware but the processor -> the libraries that their probe depends on."""

TOOLS = ("edgetpu_compiler",)
"""The programs on PATH that ``makers`` depends on."""


def backend_class(name: str) -> type[Backend]:
    """Return the backend called ``name``. Raises BackendUnavailable that names the known ones."""
    module_name, class_name = require_known(name).split(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise BackendUnavailable(name, f"cannot import {error.name or module_name}") from error
    found: type[Backend] = getattr(module, class_name)
    return found


def require_known(name: str) -> str:
    """Return ``module:class`` of the backend ``name`` without import. Raises BackendUnavailable."""
    location = BACKENDS.get(name)
    if location is None:
        raise BackendUnavailable(name, f"unknown; known are {', '.join(sorted(BACKENDS))}")
    return location


def probe_all() -> dict[str, Capabilities | BackendUnavailable]:
    """Return each backend's capabilities, or why it is not available."""
    results: dict[str, Capabilities | BackendUnavailable] = {}
    for name in BACKENDS:
        try:
            results[name] = backend_class(name).probe()
        except BackendUnavailable as reason:
            results[name] = reason
    return results


def makers() -> dict[str, str]:
    """Return the backends whose files can be made here, with the version of the tool."""
    found: dict[str, str] = {}
    for name in BACKENDS:
        with contextlib.suppress(BackendError):
            version = backend_class(name).maker()
            if version is not None:
                found[name] = version
    return found
