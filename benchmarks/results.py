"""benchmarks/RESULTS.md, table by table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

RESULTS = Path(__file__).with_name("RESULTS.md")


def put(title: str, table: Sequence[str]) -> None:
    """Put a table into the file, in place of the one of that title, else at its end.

    Args:
        title: Its heading, the first line of the table.
        table: Markdown lines.
    """
    lines = RESULTS.read_text(encoding="utf-8").splitlines()
    begin = lines.index(title) if title in lines else len(lines)
    later = (i for i in range(begin + 1, len(lines)) if lines[i].startswith("### "))
    end = next(later, len(lines))
    before = lines[:begin] if begin < len(lines) else [*lines, ""]
    text = "\n".join([*before, *table, "", *lines[end:]]).rstrip("\n") + "\n"
    write(text)


def write(text: str) -> None:
    """Write the file whole."""
    temporary = RESULTS.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(RESULTS)
