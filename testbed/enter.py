"""Becomes a command on a host of a testbed.

    enter.py [--group DIR]... [--net FILE] [--host NAME] [--cores 0,1] [--ready FD] -- COMMAND...

The process joins the control groups and the network, takes the host's name and its cores, and
executes the command under the same process number. FD closes when the command starts. Run this
file by its path (``python -I -S``), so that it starts in about 20 ms. It imports only the standard
library.
"""

from __future__ import annotations

import ctypes
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

CLONE_NEWNET = 0x40000000
CLONE_NEWUTS = 0x04000000

libc = ctypes.CDLL(None, use_errno=True)


def enter_network(path: Path) -> None:
    """Move the calling thread into the network namespace at ``path``. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(descriptor, CLONE_NEWNET):
            raise last_error(path)
    finally:
        os.close(descriptor)


def unshare(flags: int) -> None:
    """Give the calling thread namespaces of its own. Raises OSError."""
    if libc.unshare(flags):
        raise last_error(None)


def last_error(path: Path | None) -> OSError:
    """The error of the C library's last call."""
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), path and str(path))


def main(arguments: Sequence[str]) -> None:
    split = arguments.index("--")
    options, command = arguments[:split], arguments[split + 1 :]
    for name, value in zip(options[::2], options[1::2], strict=True):
        if name == "--group":
            (Path(value) / "cgroup.procs").write_text(str(os.getpid()))
        elif name == "--net":
            enter_network(Path(value))
        elif name == "--host":
            unshare(CLONE_NEWUTS)
            socket.sethostname(value)
        elif name == "--cores":
            os.sched_setaffinity(0, map(int, value.split(",")))
        elif name == "--ready":
            os.set_inheritable(int(value), False)
        else:
            raise ValueError(name)
    try:
        os.execvp(command[0], list(command))  # noqa: S606 - becoming the command is its purpose
    except OSError as error:
        raise OSError(error.errno, error.strerror, command[0]) from None


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except OSError as error:
        sys.exit(f"{error.filename or 'testbed host'}: {(error.strerror or str(error)).lower()}")
