"""Draws the state table into docs/design.md, for ``make state-diagram``."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from coordinator.loading.state import TABLE, Nothing

BEGIN, END = "<!-- state table -->", "<!-- end of state table -->"


def mermaid() -> str:
    """The table as a mermaid state diagram. Each arrow has its events."""
    arrows: dict[tuple[str, str], list[str]] = {}
    for state, rows in TABLE.items():
        for event, (target, _) in rows.items():
            arrows.setdefault((state.__name__, target.__name__), []).append(event.__name__)
    lines = [f"    [*] --> {Nothing.__name__}"]
    lines += [
        f"    {source} --> {target}: {', '.join(events)}"
        for (source, target), events in arrows.items()
    ]
    return "\n".join(["```mermaid", "stateDiagram-v2", *lines, "```"])


def with_diagram(text: str) -> str:
    """``text`` with the diagram between its two markers."""
    marked = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    found = marked.search(text)
    if found is None:
        raise ValueError(f"the markers {BEGIN} and {END} are missing")
    return text[: found.start()] + f"{BEGIN}\n{mermaid()}\n{END}" + text[found.end() :]


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(with_diagram(page.read_text()))
