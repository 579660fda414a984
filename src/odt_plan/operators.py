"""What ``odt-plan ops`` prints: the table of supported operators."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from rich import box
from rich.table import Table

from .ir.onnx_support import Support, supported
from .ir.onnx_unroll import CONTROL_FLOW, DEFINED
from .report import console
from .tables import print_table

_HEADS = ("operator", "becomes", "gradient", "NumPy", "C", "int8", "opsets")
_PREFACE = """\
# Operators

Made by `odt-plan ops --markdown`; a test keeps it up to date. Every operator runs in NumPy and in
C with the same bits. *becomes*: the operators of the IR that it is written in, without Reshapes,
which are views. *gradient*: training passes it. *int8*: it computes on integers where scales are
known; others compute in f32 between i8 layers. `odt-plan check MODEL.onnx` judges the nodes of a
model one by one.
"""


def print_operators() -> None:
    """Print one row per ONNX operator, and how many there are."""
    out, rows = console(), supported()
    table = Table(*_HEADS, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*_cells(row))
    print_table(out, table)
    trained = sum(r.gradient for r in rows)
    out.print(f"{len(rows)} operators of ONNX; a gradient passes {trained} of them", soft_wrap=True)


def operators_record() -> list[dict[str, object]]:
    """What ``ops --json`` prints."""
    return [asdict(row) for row in supported()]


def markdown() -> Iterator[str]:
    """Lines of docs/ops.md."""
    yield _PREFACE
    yield f"| {' | '.join(_HEADS)} |"
    yield "|" + "---|" * len(_HEADS)
    for row in supported():
        yield f"| {' | '.join(_cells(row))} |"


def _cells(row: Support) -> tuple[str, ...]:
    if row.constant:
        becomes, runs = "a constant: its operands must be constants or shapes", ""
    elif row.operator in CONTROL_FLOW:
        becomes, runs = "what it runs: its course must follow from constants", "yes"
    elif row.operator in DEFINED:
        becomes, runs = "operators that onnx defines it by", "yes"
    else:
        becomes, runs = ", ".join(row.written_as) or "nothing", "yes"
    return (
        row.operator,
        becomes,
        "yes" if row.gradient else "",
        runs,
        runs,
        "yes" if row.int8 else "",
        f"{row.first_opset} {'on' if row.last_opset is None else f'to {row.last_opset}'}",
    )
