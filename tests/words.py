"""Words per sentence of every page and of every package's prose: ``python -m tests.words``.

A package's prose is its docstrings, its comments and the messages of its errors. Tables, code
blocks, headings and shapes are left out. A code span or a link's address counts as one word.
"""

from __future__ import annotations

import ast
import io
import re
import statistics
import sys
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "model",
    "wire",
    "backends",
    "calibration",
    "agent",
    "planning",
    "paper",
    "coordinator",
    "api",
    "testbed",
    "evaluation",
    "studies",
    "compression",
    "cli",
    "benchmarks",
    "examples",
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


_FIELD = r"\n(?=(?:``[^`\n]+``|\w+)(?:, (?:``[^`\n]+``|\w+))*: )"
"""The start of a line that describes a field."""


def docstrings(source: str) -> Iterator[str]:
    """The docstrings of a module, its classes, functions and documented attributes.

    A line that begins with a name and a colon describes a field, and is a paragraph of its own.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            for statement in node.body:
                if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                    text = statement.value.value
                    if isinstance(text, str):
                        text = text.replace("\n" + " " * statement.col_offset, "\n")
                        yield re.sub(_FIELD, "\n\n", text)


def comments(source: str) -> Iterator[str]:
    """The comments of a file; lines of comment below one another are one text.

    Left out are shapes (``# [n, d]``) and the codes of checkers. The reason after a code counts.
    """
    block: list[str] = []
    last = (0, 0)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        row, column = token.start
        alone = not token.line[:column].strip()
        if block and not (alone and last == (row - 1, column)):
            yield "\n".join(block)
            block = []
        last = token.start
        text = re.sub(
            r"^#+!?\s?((noqa|type|pragma|mypy|fmt)\b\S*( [A-Z]+\d+,?)*)?", "", token.string
        )
        if not re.fullmatch(r"\s*\[.*\]\S*", text):
            block.append(text.strip(" -"))
    yield "\n".join(block)


def messages(source: str) -> Iterator[str]:
    """The texts of raised errors. A value that is filled in counts as one word."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            for argument in node.exc.args:
                if isinstance(argument, ast.JoinedStr):
                    yield "".join(
                        str(part.value) if isinstance(part, ast.Constant) else "value"
                        for part in argument.values
                    )
                elif isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield argument.value


Prose = Callable[[str], Iterator[str]]
"""One of the kinds of prose in a file: `docstrings`, `comments` or `messages`."""
PROSE: tuple[Prose, ...] = (docstrings, comments, messages)


def package_lengths(package: str, prose: Prose = docstrings) -> list[tuple[int, str]]:
    """Words and text of each sentence of one kind of a package's prose."""
    return [
        found
        for path in sorted((ROOT / package).rglob("*.py"))
        for text in prose(path.read_text(encoding="utf-8"))
        for found in lengths(text)
    ]


def row(name: str, found: list[tuple[int, str]]) -> str:
    """One line of the printed table."""
    counts = [count for count, _ in found]
    return f"{name:28} {len(counts):9} {statistics.fmean(counts):6.1f} {max(counts):8}"


def main() -> None:
    """Print the table; with ``--long N`` also every sentence of more than N words."""
    limit = int(sys.argv[2]) if sys.argv[1:2] == ["--long"] else None
    found = {str(p.relative_to(ROOT)): lengths(p.read_text(encoding="utf-8")) for p in pages()}
    for package in PACKAGES:
        for prose in PROSE:
            found[f"{package}/ {prose.__name__}"] = package_lengths(package, prose)
    lines = [f"{'':28} {'sentences':>9} {'words':>6} {'longest':>8}"]
    for name, counted in found.items():
        lines.append(row(name, counted) if counted else f"{name:28} {0:9}")
        if limit is not None:
            lines += [f"    {count}: {text}" for count, text in counted if count > limit]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
