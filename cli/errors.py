"""How a command ends.

exit code   meaning
0           it worked
1           it was tried and did not work; one line on stderr says why and what to do
2           the command line itself is wrong
3           no coordinator answers
130         interrupted (Ctrl-C)
"""

from __future__ import annotations

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 3
EXIT_INTERRUPTED = 130


class CommandFailed(Exception):
    """A command did not work; the message is one line for the user."""

    exit_code = EXIT_FAILED


class UsageError(CommandFailed):
    """An argument is wrong."""

    exit_code = EXIT_USAGE


class CoordinatorUnreachable(CommandFailed):
    """No coordinator answers."""

    exit_code = EXIT_UNREACHABLE
