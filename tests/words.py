"""Words a sentence of every page and of every package's docstrings: ``python -m tests.words``.

Tables, code blocks and headings are left out. A code span or a link's address counts as one word.
"""

from __future__ import annotations

import ast
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "model",
    "wire",
    "backends",
    "calibration",
    "agent",
    "planning",
    "coordinator",
    "testbed",
    "cli",
)
FOLDERS = ("docs", "deploy", *PACKAGES)
"""Where pages of the manual are, beside the two at the top. CHANGELOG.md is a list, not a page."""


def pages() -> list[Path]:
    """Every Markdown page of the manual, in order of its path."""
    found = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(found)]


def paragraphs(text: str) -> Iterator[str]:
    """The paragraphs and list items of a Markdown text; no tables, code blocks or headings."""
    lines: list[str] = []
    fenced = False
    for line in [*text.splitlines(), ""]:
        if line.lstrip().startswith("```"):
            fenced = not fenced
            continue
        item = re.match(r"\s*(?:[-*]|\d+\.)\s+(.*)", line)
        ends = not line.strip() or line.startswith(("#", "|", "!["))
        if (ends or item) and lines:
            yield " ".join(lines)
            lines = []
        if fenced or ends or (line.startswith("    ") and not lines and not item):
            continue
        lines.append(item[1] if item else line.strip())


def sentences(paragraph: str) -> list[str]:
    """The sentences of one paragraph, by full stops, question and exclamation marks."""
    text = re.sub(r"``[^`]*``|`[^`]*`", "Code", paragraph)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text).replace("**", "")
    parts = re.split(r"(?<=[.!?])[)\"]?\s+(?=[A-Z0-9(\"*])", text)
    return [part for part in parts if words(part)]


def words(sentence: str) -> int:
    """How many words a sentence has; a dash or a lone sign is none."""
    return sum(any(c.isalnum() for c in word) for word in sentence.split())


def lengths(text: str) -> list[tuple[int, str]]:
    """Words and text of each sentence of a Markdown text."""
    return [(words(s), s) for paragraph in paragraphs(text) for s in sentences(paragraph)]


def docstrings(source: str) -> Iterator[str]:
    """The docstrings of a module, its classes, functions and documented attributes."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            for statement in node.body:
                if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                    text = statement.value.value
                    if isinstance(text, str):
                        first, _, rest = text.partition("\n")
                        margin = min(
                            (len(i) - len(i.lstrip()) for i in rest.splitlines() if i.strip()),
                            default=0,
                        )
                        yield "\n".join([first, *(i[margin:] for i in rest.splitlines())])


def package_lengths(package: str) -> list[tuple[int, str]]:
    """Words and text of each sentence of a package's docstrings."""
    return [
        found
        for path in sorted((ROOT / package).rglob("*.py"))
        for text in docstrings(path.read_text(encoding="utf-8"))
        for found in lengths(text)
    ]


def row(name: str, found: list[tuple[int, str]]) -> str:
    """One line of the printed table."""
    counts = [count for count, _ in found]
    return f"{name:28} {len(counts):9} {statistics.fmean(counts):6.1f} {max(counts):8}"


def main() -> None:
    """Print the table; with ``--long N`` also every sentence of a page of more than N words."""
    limit = int(sys.argv[2]) if sys.argv[1:2] == ["--long"] else None
    lines = [f"{'':28} {'sentences':>9} {'words':>6} {'longest':>8}"]
    for path in pages():
        name, found = str(path.relative_to(ROOT)), lengths(path.read_text(encoding="utf-8"))
        lines.append(row(name, found))
        if limit is not None:
            lines += [f"    {count}: {text}" for count, text in found if count > limit]
    lines += [row(f"{package}/ docstrings", package_lengths(package)) for package in PACKAGES]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
