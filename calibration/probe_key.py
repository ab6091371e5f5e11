"""Tells whether a backend must be probed again, because what it depends on has changed."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from importlib.machinery import PathFinder
from pathlib import Path

from backends import registry
from calibration.machine import hardware_id, kernel_id
from wire.versions import shoal_version


def probe_key(backend: str) -> str:
    """Return a digest of all that probing depends on. Empty if it must be probed at each start.

    That is the machine since its start, shoal itself, the files of the libraries, and the compilers
    on PATH. An accelerator may be plugged in or out, so such a backend has no key.
    """
    kernel = kernel_id()
    libraries = [_files_of(name) for name in registry.LIBRARIES.get(backend, ())]
    if not (kernel and libraries and all(libraries)):
        return ""
    modules = sorted(Path(registry.__file__).parent.glob("*.py"))
    tools = (shutil.which(tool) for tool in registry.TOOLS)
    paths = [
        *modules,
        *(path for files in libraries for path in files),
        *(Path(tool) for tool in tools if tool is not None),
    ]
    content = [
        kernel,
        hardware_id(),
        sys.version,
        shoal_version(),
        [(str(path), _identity(path)) for path in paths],
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _files_of(library: str) -> list[Path]:
    """Return files that an installation of the library replaces. Empty if it is not found.

    Nothing is imported.
    """
    spec = PathFinder.find_spec(library)
    if spec is None or spec.origin is None:
        return []
    package = Path(spec.origin).parent
    beside = package.parent.glob(f"{library}-*.dist-info")
    return [Path(spec.origin), *sorted(package.glob("*/*.so")), *sorted(beside)]


def _identity(path: Path) -> tuple[int, ...]:
    """Return what tells a file from an earlier one of the same name."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
