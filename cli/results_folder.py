"""The folder that a long command keeps its results in."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from cli.errors import CommandFailed


@contextlib.contextmanager
def results_folder(path: Path, command: str) -> Iterator[None]:
    """Make the folder of --out, and let no other command write results there meanwhile.

    Raises CommandFailed.
    """
    with contextlib.ExitStack() as stack:
        try:
            path.mkdir(parents=True, exist_ok=True)
            folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, folder)
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CommandFailed(
                f"--out {path}: another command keeps its results there: wait for it, or name "
                f"another --out for this `shoal {command}`"
            ) from error
        except OSError as error:
            raise CommandFailed(
                f"--out {path}: {(error.strerror or str(error)).lower()}"
            ) from error
        yield
