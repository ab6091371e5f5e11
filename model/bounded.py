"""Files of unknown origin are read up to a size, so that none of them can fill the memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 64 << 20


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """Read a file. Raises OSError, and ValueError for more than ``max_bytes``."""
    with path.open("rb") as file:
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
