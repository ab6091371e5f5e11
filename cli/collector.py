"""Keeps Python's garbage collector away from what a process imports."""

from __future__ import annotations

import gc


def resume() -> None:
    """Let the collector run again, but never look at what is there already.

    ``cli.__main__`` has stopped it. Imports make a hundred thousand objects that stay, and the
    collector would look at them again and again. Where it has not stopped, nothing changes.
    """
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
