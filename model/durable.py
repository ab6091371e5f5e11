"""Small files that a power cut leaves whole: the old text or the new one, never a part."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def replace_text(
    path: Path,
    text: str,
    *,
    mode: int = 0o600,
    prepare: Callable[[int], None] = lambda descriptor: None,
) -> None:
    """Write ``text`` beside ``path``, through to the disk, then rename it to ``path``.

    ``prepare`` is called with the descriptor of the new file before anything is written, for
    instance to change its owner. Raises OSError; ``path`` is as it was then.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(descriptor, mode)
            prepare(descriptor)
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        temporary.replace(path)
    except BaseException:  # Interrupted or failed, however: no part of a file is left behind.
        temporary.unlink(missing_ok=True)
        raise
