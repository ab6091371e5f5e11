"""The program of a child process that tests whether libedgetpu works here (edgetpu_devices).

    python -m backends.edgetpu_check LIBRARY DEVICE [COMPILED PLAIN ...]

It exits with 0, or with 1 after one line on stdout. The library may end it in other ways. Other
output of the library or the runtime goes to stderr.
"""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path

import numpy as np

from backends.base import BackendError
from backends.edgetpu_runtime import Engine, Runtime, Target, find_runtime, load_delegate

ROWS = 3
"""More than one, because the batch of a compiled file is set at run time."""


def check(target: Target, files: list[Path]) -> None:
    """Raise BackendError if the device cannot be opened or its results differ from the CPU's."""
    runtime = find_runtime(edge_tpu=True)
    if not files:
        load_delegate(runtime, target)
        return
    for compiled, plain in zip(files[::2], files[1::2], strict=True):
        _compare(runtime, target, compiled, plain)


def _compare(runtime: Runtime, target: Target, compiled: Path, plain: Path) -> None:
    with (
        closing(Engine(runtime, plain, None, 1)) as cpu,
        closing(Engine(runtime, compiled, target, 1)) as tpu,
    ):
        if cpu.width != tpu.width:
            raise BackendError(f"{compiled} is not what {plain} was compiled to: compile it again")
        codes = np.random.default_rng(0).integers(-127, 128, (ROWS, cpu.width)).astype(np.int8)
        difference = np.abs(tpu.run(codes).astype(np.int16) - cpu.run(codes))
    if difference.max() > 1:
        wrong = np.count_nonzero(difference > 1) / difference.size
        raise BackendError(
            f"Edge TPU {target.device} computes something else than the CPU: {100 * wrong:.1f} % of"
            f" a product's outputs differ, by up to {difference.max()} of 255 codes"
        )


def main() -> int:
    library, device, *files = sys.argv[1:]
    try:
        check(Target(device, library), [Path(file) for file in files])
    except BackendError as error:
        sys.stdout.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
