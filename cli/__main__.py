"""The entry point of ``shoal`` and ``python -m cli``."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import threading

NUMPY_THREADS_SLEEP = ("OPENBLAS_THREAD_TIMEOUT", "4")
"""numpy's threads sleep after 2**4 ticks without work. Otherwise each of them spins for 2**26 ticks
when a process starts, and after each product."""


def run() -> int:
    """Run the command and return its exit code. Ctrl-C is quiet from the first import on."""
    os.environ.setdefault(*NUMPY_THREADS_SLEEP)
    _stand_in_for_closed_streams()
    gc.disable()  # It would look at modules, which stay. cli.collector.resume enables it.
    try:
        from cli.main import main
        from cli.service.signals import ignore_until_the_end

        code = main()
        ignore_until_the_end()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        code = 128 + signal.SIGINT
    # Python's own end waits for the other threads, unless they are daemons.
    if threading.active_count() == 1 or any(thread.daemon for thread in threading.enumerate()):
        _end_at_once(code)
    return code


def _stand_in_for_closed_streams() -> None:
    """Write to nowhere where standard output or error was closed from the start."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))


def _end_at_once(code: int) -> None:
    """End the process without finalizing the interpreter.

    To take all modules apart takes as long as to import some of them. And a stopped agent does not
    wait for measurements or loads. Their threads may return from native code while the interpreter
    ends. Such a thread is unwound through C++, which aborts.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # The reader has gone away.
            code = code or 1
    os._exit(code)


if __name__ == "__main__":
    sys.exit(run())
