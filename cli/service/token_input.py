"""Takes the token that a user gives: from a file, standard input, a terminal, or SHOAL_TOKEN.

A token on a command line would land in the shell's history, in sudo's log and in the list of
processes. So commands take ``--token-file -``, and ask for it.
"""

from __future__ import annotations

import getpass
import re
import sys
from pathlib import Path

from wire.invite import LARGEST_FILE_BYTES, PREFIX, Invite, TokenWrong, parse_invite, read_invite

STANDARD_INPUT = Path("-")

_TOKEN = re.compile(rf"\b{PREFIX}\.[\w-]+\.[\w-]+", re.ASCII)


def given_invite(path: Path | None) -> Invite | None:
    """Read the token from a file, where "-" is standard input, or from SHOAL_TOKEN.

    Text around the token on standard input is ignored, so all that `shoal token create` has
    printed may be pasted. Returns None if nothing is given. Raises TokenError.
    """
    if path != STANDARD_INPUT:
        return read_invite(path)
    if sys.stdin.isatty():
        text = getpass.getpass("Paste the token (it is not shown): ")
    else:
        text = sys.stdin.read(LARGEST_FILE_BYTES)
    found = set(_TOKEN.findall(text))
    if len(found) > 1:
        raise TokenWrong("standard input: several tokens: give one")
    return parse_invite(found.pop() if found else text, "standard input")
