"""Tables that lose nothing on a narrow terminal."""

from __future__ import annotations

from textwrap import wrap
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Column, Table

#: Names and heads may be folded down to so many characters; numbers are not.
_FOLDED = 12
_ANY_WIDTH = 1 << 16


def print_table(out: Console, table: Table) -> None:
    """Print a table whole.

    Where the terminal is too narrow, names and heads are folded; where that is not enough, each row
    becomes a few lines, one for each column.
    """
    whole = out.measure(table, options=out.options.update(width=_ANY_WIDTH)).maximum
    least = [_least(c) for c in table.columns]
    over = whole - out.width
    if over > sum(_width(c) - w for c, w in zip(table.columns, least, strict=True)):
        _print_rows(out, table)
        return
    for column, width in zip(table.columns, least, strict=True):
        column.overflow, column.no_wrap = "fold", column.justify == "right"
        if over > 0 and column.no_wrap:  # rich folds heads and cells alike: here heads alone
            column.header = Text("\n".join(wrap(str(column.header), width)))
    out.print(table)


def _width(column: Column) -> int:
    return max(cell_len(str(cell)) for cell in (column.header, *column.cells))


def _least(column: Column) -> int:
    """Width that leaves numbers whole [characters]."""
    numbers = [cell_len(str(c)) for c in column.cells] if column.justify == "right" else []
    return max([*numbers, min(_FOLDED, _width(column))])


def _print_rows(out: Console, table: Table) -> None:
    heads = [str(c.header) for c in table.columns]
    for first, *rest in zip(*(c.cells for c in table.columns), strict=True):
        out.print(Text(str(first), "bold"), soft_wrap=True)
        for head, cell in zip(heads[1:], rest, strict=True):
            if told := str(cell):
                label = f"  {head}: " if head else "  "
                out.print(Text.assemble((label, "dim"), told), soft_wrap=True)
    out.print()
