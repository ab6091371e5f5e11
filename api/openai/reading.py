"""How the text of a chat's answer is read."""

from __future__ import annotations

from dataclasses import dataclass

from api.formats.parts import Parser
from api.formats.tool_format import ToolFormat
from api.openai.tools import Tools


@dataclass(frozen=True, slots=True)
class Reading:
    """How the text of a chat's answer is read.

    opened: the answer begins inside of thoughts.
    split: thoughts are told apart from the text.
    """

    format: ToolFormat
    tools: Tools
    opened: bool
    split: bool

    def parser(self) -> Parser:
        return self.format.parser(self.tools.offered, opened=self.opened, split=self.split)

    @property
    def markers(self) -> frozenset[str]:
        """The special tokens that the parser needs."""
        needed = self.tools.offered or self.format.has_thoughts
        return self.format.markers if needed else frozenset()
