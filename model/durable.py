"""Small files that survive a power cut whole, with either the old or the new contents.

The administrator changes some of them in a service's state directory. The service may have been
taken over, so links in its directory are not followed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path


def replace_text(
    path: Path,
    text: str,
    *,
    mode: int = 0o600,
    prepare: Callable[[int], None] = lambda descriptor: None,
    lasts: bool = False,
) -> None:
    """Write ``text`` as ``replace_bytes`` does, in UTF-8."""
    replace_bytes(path, text.encode(), mode=mode, prepare=prepare, lasts=lasts)


def replace_bytes(
    path: Path,
    data: bytes,
    *,
    mode: int = 0o600,
    prepare: Callable[[int], None] = lambda descriptor: None,
    lasts: bool = False,
) -> None:
    """Write ``data`` beside ``path``, through to the disk, then rename it to ``path``.

    ``prepare`` is called with the new file's descriptor before anything is written. It may change
    the owner, for instance. ``lasts``: no power cut brings the old contents back after the return,
    which takes a slow card twice the time. Raises OSError, and then leaves ``path`` unchanged.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            prepare(descriptor)
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        temporary.replace(path)
    except BaseException:  # Interrupted or failed: no partial file remains.
        temporary.unlink(missing_ok=True)
        raise
    if lasts:
        sync_names(path.parent)


def sync_names(directory: Path) -> None:
    """Bring the names in a directory through to the disk, where its file system can do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, mode: int = 0o600) -> Iterator[None]:
    """Hold the lock of a file of its own, as ``open_lock`` opens it. Others wait meanwhile."""
    lock = open_lock(path, mode)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def open_lock(path: Path, mode: int = 0o600) -> int:
    """Open a file to lock, which is made if need be. Raises OSError, also if ``path`` is a link."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        lock = os.open(path, flags | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError:
        return os.open(path, flags)
    hand_over(lock, path.parent)
    return lock


def hand_over(descriptor: int, directory: Path) -> None:
    """Give a new file that the administrator writes to the owner of its directory."""
    if os.geteuid() == 0:
        owner = directory.stat()
        with contextlib.suppress(PermissionError):  # A container's root may not do this.
            os.fchown(descriptor, owner.st_uid, owner.st_gid)
