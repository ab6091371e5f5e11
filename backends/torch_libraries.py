"""Torch's native libraries, mapped without holding up the other threads of the process.

``import torch`` maps hundreds of megabytes, and Python keeps its lock meanwhile: 0.2 to 0.6 s on
two idle x86 cores, 5.8 s where eight other processes were busy. An agent that sends no heartbeat
for so long counts as lost. A call by ctypes gives the lock up, and the import then finds the
libraries mapped.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
import threading
from pathlib import Path

_mapping = threading.Lock()


def map_libraries(package: str = "torch") -> None:
    """Map the libraries of an installed package that is not imported yet. Other threads go on.

    What does not map is left to the import, which says why.
    """
    with _mapping:
        if package in sys.modules:
            return
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            return
        folder = Path(found.origin).parent / "lib"
        # In the order and by the modes of torch's own import. libtorch_python is left to it,
        # because what that library does when it is mapped may need the lock.
        _map(folder / "libtorch_global_deps.so", os.RTLD_NOW | os.RTLD_GLOBAL)
        _map(folder / "libtorch.so", os.RTLD_NOW | os.RTLD_LOCAL)


def _map(library: Path, mode: int) -> None:
    if not library.exists():
        return
    # CDLL(library) itself would keep the lock.
    dlopen = ctypes.CDLL(None).dlopen
    dlopen.argtypes, dlopen.restype = [ctypes.c_char_p, ctypes.c_int], ctypes.c_void_p
    dlopen(os.fsencode(library), mode)
