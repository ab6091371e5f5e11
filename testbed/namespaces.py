"""Network namespaces by system calls, because a helper process could outlive a killed parent."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from testbed.enter import CLONE_NEWNET, enter_network, last_error, libc, unshare

Result = TypeVar("Result")

_MS_BIND = 4096
_MNT_DETACH = 2
_THREAD_NETWORK = Path("/proc/thread-self/ns/net")
_OWN_NETWORK = Path("/proc/self/ns/net")


def create(path: Path) -> None:
    """Make a network namespace that lives until ``delete(path)``. Raises OSError."""

    def unshare_and_keep() -> None:
        unshare(CLONE_NEWNET)
        path.touch(exist_ok=False)
        if libc.mount(bytes(_THREAD_NETWORK), bytes(path), b"none", _MS_BIND, None):
            raise last_error(path)

    _in_thread(unshare_and_keep)


def delete(path: Path) -> None:
    """Remove a namespace, even a half-made one. Idempotent."""
    libc.umount2(bytes(path), _MNT_DETACH)
    path.unlink(missing_ok=True)


def inside(path: Path, call: Callable[[], Result]) -> Result:
    """Run ``call`` with the network at ``path``; its sockets stay there. Raises OSError."""

    def enter_and_call() -> Result:
        enter_network(path)
        return call()

    return _in_thread(enter_and_call)


@contextlib.contextmanager
def entered(path: Path) -> Iterator[None]:
    """Enter the network at ``path`` while the context is open. Raises OSError.

    The process may have no other thread, because that one would stay outside.
    """
    if threading.active_count() > 1:
        raise RuntimeError("this process has several threads, and the others would stay outside")
    with _OWN_NETWORK.open() as own:
        enter_network(path)
        try:
            yield
        finally:
            if libc.setns(own.fileno(), CLONE_NEWNET):
                raise last_error(None)


def _in_thread(call: Callable[[], Result]) -> Result:
    """Run ``call`` in a new thread, because a namespace belongs to a thread."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(call).result()
