"""The argument parser of ``shoal`` and all its commands, and how their help texts are laid out."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

DEFAULT_URL = "http://127.0.0.1:7421"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose help is made of sentences. Sub-commands are parsers of this class."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments, formatter_class=HelpFormatter, add_help=False)
        self.add_argument("-h", "--help", action="help", help="Show this help and exit.")

    def parse_known_args(  # type: ignore[override] # the stubs have overloads for namespaces
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Take a last word that may be left out also behind options.

        Before Python 3.12.7, ``shoal run MODEL --chat PROMPT`` would not find the prompt.
        """
        self._require_known(sys.argv[1:] if args is None else args)
        found, rest = super().parse_known_args(args, namespace)
        last = next((item for item in reversed(self._actions) if not item.option_strings), None)
        if last is None or last.nargs != "?" or getattr(found, last.dest) is not last.default:
            return found, rest
        if len(rest) == 1 and not rest[0].startswith("-"):
            setattr(found, last.dest, self._get_value(last, rest.pop()))
        return found, rest

    def _require_known(self, words: Sequence[str]) -> None:
        """Name an unknown option before a sub-command, or its value would be called a wrong one."""
        choices = {
            name
            for item in self._actions
            if isinstance(item, argparse._SubParsersAction)
            for name in item.choices
        }
        for word in words if choices else ():
            if word == "--" or word in choices:
                return
            name = word.partition("=")[0]
            if word.startswith("--") and not any(
                known.startswith(name) for known in self._option_string_actions
            ):
                self.error(f"unrecognized arguments: {word}")


class HelpFormatter(argparse.HelpFormatter):
    """Wraps paragraphs to the width of the terminal, and keeps indented lines such as examples."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines: list[str] = []
        paragraph: list[str] = []
        for line in [*text.splitlines(), ""]:
            if line and not line.startswith(" "):
                paragraph.append(line)
                continue
            lines += textwrap.wrap(" ".join(paragraph), width, break_on_hyphens=False)
            lines.append(line)
            paragraph = []
        return "\n".join(lines[:-1])


def add_url_argument(parser: argparse._ActionsContainer) -> None:
    """Add ``--url``, which commands that ask the coordinator share."""
    parser.add_argument(
        "--url",
        metavar="URL",
        help="The address of the coordinator's API. "
        f"Default: $SHOAL_COORDINATOR, else {DEFAULT_URL}.",
    )
