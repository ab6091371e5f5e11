"""TensorFlow Lite's interpreter from any installed package, on the CPU or an Edge TPU."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from backends.base import BackendError

Codes = npt.NDArray[np.int8]

RUNTIMES = {
    "ai-edge-litert": "ai_edge_litert.interpreter",
    "tflite-runtime": "tflite_runtime.interpreter",
}
"""Distributions that contain the interpreter, in order of preference, and their modules."""

_PYCORAL = "pycoral.utils.edgetpu"
"""Google's pycoral. The package index has another project of that name, without this module."""

_ERRORS = (AttributeError, OSError, RuntimeError, SystemError, ValueError)
"""The errors of interpreters, of delegates, and of a runtime built for another numpy."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """An installed interpreter: the distribution's name and version, and its module."""

    name: str
    version: str
    module: Any

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


@dataclass(frozen=True, slots=True)
class Target:
    """An Edge TPU: its name in libedgetpu ("usb:0"), and the library to reach it through."""

    device: str
    library: str


def find_runtime(edge_tpu: bool = False) -> Runtime:
    """Return the preferred installed runtime. Raises BackendError that names what to install.

    edge_tpu: prefer the tflite-runtime that came with Google's pycoral, because it matches the
        libedgetpu that came with it.
    """
    names = list(RUNTIMES)
    if edge_tpu and _is_installed(_PYCORAL):
        names.reverse()
    failures = []
    for name in names:
        try:
            module = importlib.import_module(RUNTIMES[name])
            return Runtime(name, importlib.metadata.version(name), module)
        except ModuleNotFoundError:
            continue
        except (ImportError, importlib.metadata.PackageNotFoundError, *_ERRORS) as error:
            failures.append(f"{name} cannot be imported ({_first_line(error)})")
    hint = "pip install 'shoal-llm[coral]', or [coral-legacy] on Python 3.10 and 3.11"
    reason = "; ".join(failures) or f"neither {' nor '.join(RUNTIMES)} is installed"
    raise BackendError(f"{reason}: {hint}")


class Engine:
    """The matrix product of one .tflite file, on codes. One thread at a time.

    The runtime maps the file. Its name may be removed afterwards, but its contents must not change.
    Raises BackendError if the runtime or the device refuses the file.
    """

    def __init__(self, runtime: Runtime, path: Path, target: Target | None, threads: int) -> None:
        # The delegate must outlive the interpreter, which does not keep it alive.
        self._delegate = None if target is None else load_delegate(runtime, target)
        try:
            self._interpreter: Any = runtime.module.Interpreter(
                model_path=str(path),
                num_threads=threads,
                experimental_delegates=None if target is None else [self._delegate],
            )
            self._interpreter.allocate_tensors()
            (self._input,) = self._interpreter.get_input_details()
            (self._output,) = self._interpreter.get_output_details()
        except _ERRORS as error:
            where = "the CPU" if target is None else f"Edge TPU {target.device}"
            raise BackendError(
                f"{runtime} cannot run a product on {where}: {_first_line(error)}"
            ) from error
        self._rows = int(self._input["shape"][0])

    @property
    def width(self) -> int:
        """The number of codes of an input row."""
        return int(self._input["shape"][1])

    def run(self, codes: Codes) -> Codes:
        """Multiply int8 [n, K] to int8 [n, N]. Raises BackendError if the device fails."""
        try:
            if len(codes) != self._rows:
                self._interpreter.resize_tensor_input(self._input["index"], codes.shape)
                self._interpreter.allocate_tensors()
                self._rows = len(codes)
            self._interpreter.set_tensor(self._input["index"], codes)
            self._interpreter.invoke()
            result: Codes = self._interpreter.get_tensor(self._output["index"])
        except _ERRORS as error:
            raise BackendError(f"a product failed: {_first_line(error)}") from error
        return result

    def close(self) -> None:
        """Free the interpreter, then the device. Idempotent."""
        self._interpreter = None
        self._delegate = None


def load_delegate(runtime: Runtime, target: Target) -> Any:
    """Return libedgetpu's delegate, which hands compiled operators to a device.

    Raises BackendError if the library is missing or wrong, or the device cannot be opened.
    """
    try:
        return runtime.module.load_delegate(target.library, {"device": target.device})
    except OSError as error:
        raise BackendError(
            f"{target.library} cannot be loaded ({_first_line(error)}): install libedgetpu,"
            " docs/hardware.md says which"
        ) from error
    except AttributeError as error:
        raise BackendError(f"{target.library} is not libedgetpu: {_first_line(error)}") from error
    except _ERRORS as error:
        # The runtime's first line only repeats the library's name. The library's message follows.
        said = str(error).strip().partition("\n")[2].strip()
        raise BackendError(
            f"{target.library} cannot open Edge TPU {target.device}"
            f"{f' ({said[:200]})' if said else ''}: another process may be using it, or this user"
            " may not open it (its udev rules, docs/hardware.md)"
        ) from error


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
