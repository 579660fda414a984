"""The command ``diff``."""

from __future__ import annotations

from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .commands import print_json
from .options import Json, Quiet

if TYPE_CHECKING:
    from rich.console import Console

    from .planner.plan_diff import Figure, PlanDiff

#: Figures that are shown even where they are the same.
_MAIN = ("RAM", "flash", "latency", "energy", "importance")
_NOT_THERE = "-"
#: Names of a list that are shown.
_SHOWN = 6


def diff(
    before: Annotated[Path, typer.Argument(metavar="BEFORE.json", help="A plan written by -o.")],
    after: Annotated[Path, typer.Argument(metavar="AFTER.json", help="Another one.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Tell what differs between two plans: settings, figures, and decisions by name.

    The exit code is 0 whether they differ or not; `same` in --json tells.
    """
    from .planner.plan import load_plan
    from .planner.plan_diff import compare_plans

    found = compare_plans(load_plan(before), load_plan(after))
    if as_json:
        print_json(_record(found))
    elif not quiet:
        _print(found, before, after)


def _record(found: PlanDiff) -> dict[str, object]:
    figures = [
        {**asdict(f), "change": f.change, "relative": f.relative} for f in found.figures
    ]
    return {"same": found.same, **asdict(found), "figures": figures}


def _print(found: PlanDiff, before: Path, after: Path) -> None:
    from rich.text import Text

    from .report import console

    out = console()
    if found.same:
        out.print(Text("the plans are the same"), soft_wrap=True)
        return
    if not found.same_model:
        told = "the models differ; layers and tensors are compared by their names"
        out.print(Text(told, "yellow"), soft_wrap=True)
    names = _told_apart(before, after)
    _table(out, ("setting", *names), [
        (s.field, *(_NOT_THERE if v is None else _words(v) for v in (s.before, s.after)))
        for s in found.settings
    ])  # fmt: skip
    figures = [f for f in found.figures if f.name in _MAIN or f.differs]
    _table(out, ("figure", *names, "change", ""), [_cells(f) for f in figures], figures=True)
    shared = [d for d in found.decisions if found.same_model or None not in (d.before, d.after)]
    _table(out, ("decision", "of", *names), [
        (d.subject, d.name, d.before or _NOT_THERE, d.after or _NOT_THERE) for d in shared
    ])  # fmt: skip
    for line in _lines(found, before, after):
        out.print(Text(line), soft_wrap=True)


def _told_apart(before: Path, after: Path) -> tuple[str, str]:
    """The ends of two paths that tell them apart; a table has no room for long ones."""
    pairs = zip(before.parts, after.parts, strict=False)
    shared = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    first, second = (str(Path(*p.parts[shared:] or p.parts[-1:])) for p in (before, after))
    return first, second


def _lines(found: PlanDiff, before: Path, after: Path) -> list[str]:
    """What is told in words: names of one plan only, peak, steps, order and addresses."""
    lines = []
    for path, other in ((before, "after"), (after, "before")):
        alone = [d.name for d in found.decisions if getattr(d, other) is None]
        if alone and not found.same_model:
            shown = ", ".join(dict.fromkeys(alone[:_SHOWN]))
            lines.append(f"decisions only in {path}: {len(alone)}, as about {shown}")
    if found.peaks[0] != found.peaks[1]:
        lines.append(f"peak at {found.peaks[0]}; then at {found.peaks[1]}")
    if found.steps[0] != found.steps[1]:
        lines.append(f"steps: {found.steps[0]}; then {found.steps[1]}")
    if found.order:
        lines.append(f"nodes at another place in the order: {found.order}")
    if found.addresses:
        lines.append(f"buffers at another address: {found.addresses}")
    return lines


def _table(
    out: Console, heads: tuple[str, ...], rows: list[tuple[str, ...]], *, figures: bool = False
) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from .tables import print_table

    if not rows:
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, head in enumerate(heads):
        table.add_column(Text(head), justify="right" if figures and i else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    print_table(out, table)


def _words(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or _NOT_THERE
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _cells(f: Figure) -> tuple[str, ...]:
    relative = "" if not f.relative else f"{f.relative:+.1%}"
    change = "" if not f.change else f"{'+' if f.change > 0 else '-'}{_amount(f, abs(f.change))}"
    return f.name, _amount(f, f.before), _amount(f, f.after), change, relative


def _amount(f: Figure, value: float | None) -> str:
    from .planner.sizes import format_joules, format_seconds

    if value is None:
        return _NOT_THERE
    if f.unit == "s":
        return format_seconds(value)
    if f.unit == "J":
        return format_joules(value)
    return f"{value:,.0f} {f.unit}".rstrip()
