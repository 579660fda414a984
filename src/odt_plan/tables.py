"""Tables that lose nothing on a narrow terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Column, Table

#: Names may be folded down to so many characters; numbers are not.
_FOLDED = 12
_ANY_WIDTH = 1 << 16


def print_table(out: Console, table: Table) -> None:
    """Print a table whole.

    Where the terminal is too narrow, names are folded; where that is not enough, each row becomes
    a few lines, one for each column.
    """
    widths = [_width(c) for c in table.columns]
    whole = out.measure(table, options=out.options.update(width=_ANY_WIDTH)).maximum
    numbers = [c.justify == "right" for c in table.columns]
    least = [w if n else min(w, _FOLDED) for w, n in zip(widths, numbers, strict=True)]
    if whole - sum(widths) + sum(least) > out.width:
        _print_rows(out, table)
        return
    for column, number in zip(table.columns, numbers, strict=True):
        column.overflow, column.no_wrap = "fold", number
    out.print(table)


def _width(column: Column) -> int:
    return max(cell_len(str(cell)) for cell in (column.header, *column.cells))


def _print_rows(out: Console, table: Table) -> None:
    heads = [str(c.header) for c in table.columns]
    for first, *rest in zip(*(c.cells for c in table.columns), strict=True):
        out.print(Text(str(first), "bold"), soft_wrap=True)
        for head, cell in zip(heads[1:], rest, strict=True):
            if told := str(cell):
                label = f"  {head}: " if head else "  "
                out.print(Text.assemble((label, "dim"), told), soft_wrap=True)
    out.print()
