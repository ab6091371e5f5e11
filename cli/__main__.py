"""``shoal`` and ``python -m cli``: Ctrl-C is quiet from the first import on."""

from __future__ import annotations

import signal
import sys


def run() -> int:
    """The command's exit code."""
    try:
        from cli.main import main

        return main()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(run())
