"""How a command ends.

exit code   meaning
0           it worked
1           it was tried and did not work; one line on stderr says why and what to do
2           the command line itself is wrong
3           no coordinator answers
4           this machine or installation lacks what the command needs
129, 143    the terminal was closed, or the command was terminated
130         interrupted (Ctrl-C)

An agent or coordinator that is terminated has done what it was for, and ends with 0. The units in
systemd/ do not restart after 2 and 4: only a person can change what is wrong then.
"""

from __future__ import annotations

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 3
EXIT_UNAVAILABLE = 4
EXIT_SIGNAL = 128
"""Plus the number of the signal that ended the command."""


class CommandFailed(Exception):
    """A command did not work; the message is one line for the user."""

    exit_code = EXIT_FAILED


class UsageError(CommandFailed):
    """An argument is wrong."""

    exit_code = EXIT_USAGE


class CoordinatorUnreachable(CommandFailed):
    """No coordinator answers."""

    exit_code = EXIT_UNREACHABLE


class Unavailable(CommandFailed):
    """This machine or installation lacks what the command needs."""

    exit_code = EXIT_UNAVAILABLE
