"""Files of unknown origin are read up to a size, and a pipe among them is refused.

So none of them can fill the memory, or let its reader wait for ever.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

MAX_JSON_BYTES = 64 << 20


def open_file(path: Path) -> BinaryIO:
    """Open a file for reading. Raises OSError, also for what has a name and is no file."""
    # Opening a pipe would wait until somebody writes to it.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise OSError(errno.EINVAL, "a pipe or a device, not a file")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """Read a file. Raises OSError, and ValueError for more than ``max_bytes``."""
    with open_file(path) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"larger than {max_bytes >> 20} MiB, which no such file is")
    return data


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Read the JSON value in a file.

    Raises OSError, and ValueError for a file that is too large or holds no JSON. The message of the
    ValueError does not name the file.
    """
    data = read_bytes(path, max_bytes)
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("not valid JSON: nested too deep") from error
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}") from error
