"""``shoal`` and ``python -m cli``: how the process begins and ends, whatever the command is."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading


def run() -> int:
    """The command's exit code. Ctrl-C is quiet from the first import on."""
    try:
        from cli.main import main

        code = main()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        code = 128 + signal.SIGINT
    if any(thread.daemon for thread in threading.enumerate()):
        _end_at_once(code)
    return code


def _end_at_once(code: int) -> None:
    """End without the interpreter's own end.

    An agent that is stopped does not wait for what it measures or loads. A thread that comes back
    from native code into an interpreter that is ending is unwound through C++, which aborts.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # Nobody reads it any more.
            code = code or 1
    os._exit(code)


if __name__ == "__main__":
    sys.exit(run())
