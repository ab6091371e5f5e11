"""Fits tables into narrow terminals. Nothing is cut, and no number is broken.

If a table is wider than the terminal, headers and text go on in further lines. If that is not
enough, the columns become several tables below one another. Each begins with the first columns,
which name the rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text


def fitting(table: Table, width: int, keys: int = 1) -> list[Table]:
    """``table`` as tables of at most ``width`` characters that hold all of its cells.

    Cells of a column stay on one line if it is ``no_wrap`` or justified to the right. Others may go
    on in the next line. The first ``keys`` columns are in every table.
    """
    columns = table.columns
    whole = _widths(table, columns, width)
    if whole is not None:
        return [_part(table, columns, whole)]
    head, rest = columns[:keys], columns[keys:]
    parts: list[Table] = []
    while rest:
        count = 1
        while count < len(rest) and _widths(table, [*head, *rest[: count + 1]], width):
            count += 1
        chosen = [*head, *rest[:count]]
        widths = (
            _widths(table, chosen, width)
            or _widths(table, chosen, width, break_cells=True)
            or _squeezed(table, chosen, width)
        )
        parts.append(_part(table, chosen, widths))
        rest = rest[count:]
    return parts or [_part(table, head, _squeezed(table, head, width))]


def _widths(
    table: Table, columns: Sequence[Column], width: int, *, break_cells: bool = False
) -> list[int] | None:
    """The width of each column, or None if they do not fit beside each other.

    break_cells: every cell may go on in the next line. Words stay whole.
    """
    # An empty column takes one character.
    naturals = [max(1, *map(_length, _texts(column))) for column in columns]
    widths = [
        min(_least(column, break_cells=break_cells), natural)
        for column, natural in zip(columns, naturals, strict=True)
    ]
    spare = width - _frame(table, len(columns)) - sum(widths)
    if spare < 0:
        return None
    for _ in range(spare):
        missing = [natural - given for natural, given in zip(naturals, widths, strict=True)]
        if max(missing) == 0:
            break
        widths[missing.index(max(missing))] += 1
    return widths


def _squeezed(table: Table, columns: Sequence[Column], width: int) -> list[int]:
    """The width of each column if there is no room for whole words."""
    widths = [_least(column) for column in columns]
    room = max(width - _frame(table, len(columns)), len(columns))
    while sum(widths) > room:
        widths[widths.index(max(widths))] -= 1
    return widths


def _least(column: Column, *, break_cells: bool = False) -> int:
    """The width below which a column would break a word, or a cell that must stay whole."""
    header, *cells = _texts(column)
    if column.overflow == "fold" and column.min_width is not None:
        return max(column.min_width, _longest_word(header))
    whole = not break_cells and (column.no_wrap or column.justify == "right")
    length = _length if whole else _longest_word
    return max([1, _longest_word(header), *map(length, cells)])


def _part(table: Table, columns: Sequence[Column], widths: Sequence[int]) -> Table:
    """These columns of ``table`` as a table of its own."""
    part = Table(box=table.box, pad_edge=table.pad_edge)
    for column, width in zip(columns, widths, strict=True):
        part.add_column(
            column.header,
            justify=column.justify,
            style=column.style,
            overflow="fold",
            width=width,
        )
    for row in zip(*(column.cells for column in columns), strict=True):
        part.add_row(*row)
    return part


def _frame(table: Table, count: int) -> int:
    """The width of ``count`` columns without their contents."""
    empty = Table(*(Column(width=1) for _ in range(count)), box=table.box, pad_edge=table.pad_edge)
    console = Console(width=1000)
    return Measurement.get(console, console.options, empty).maximum - count


def _texts(column: Column) -> list[str]:
    """Header and cells without markup."""
    return [Text.from_markup(str(cell)).plain for cell in (column.header, *column.cells)]


def _length(text: str) -> int:
    return max((Text(line).cell_len for line in text.splitlines()), default=0)


def _longest_word(text: str) -> int:
    return max((Text(word).cell_len for word in text.split()), default=0)
