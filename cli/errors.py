"""The errors of commands and their exit codes.

    exit code   meaning
    0           success
    1           failure: one line on stderr has the cause and what to do
    2           an argument or setting is wrong, or a file that a service keeps
    3           no coordinator answers
    4           this machine or installation lacks something that the command needs
    129, 143    the terminal was closed, or the command was terminated
    130         interrupted (Ctrl-C)

An agent or coordinator that is terminated ends with 0, because stopping it is no failure. The units
in systemd/ do not restart after 2 and 4, because only a person can mend these. What may mend itself
ends with 1: another process that is about to end, or a file, a disk or a chip that may come later.
"""

from __future__ import annotations

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 3
EXIT_UNAVAILABLE = 4
EXIT_SIGNAL = 128
"""The exit code is this plus the number of the signal that ended the command."""


class CommandFailed(Exception):
    """A command failed. The message is one line for the user."""

    exit_code = EXIT_FAILED


class UsageError(CommandFailed):
    """An argument is wrong."""

    exit_code = EXIT_USAGE


class CoordinatorUnreachable(CommandFailed):
    """No coordinator answers."""

    exit_code = EXIT_UNREACHABLE


class Unavailable(CommandFailed):
    """This machine or installation lacks something that the command needs."""

    exit_code = EXIT_UNAVAILABLE


def failed(error: Exception) -> CommandFailed:
    """Return the command's error for one of its work: Unavailable if a backend lacks something."""
    from backends.base import BackendUnavailable

    if isinstance(error, BackendUnavailable):
        return Unavailable(f"{error}; `shoal doctor` says how to get it")
    return CommandFailed(str(error))
