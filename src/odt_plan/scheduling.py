"""``odt-plan schedule``: a bare cost graph in, a checked schedule with a proof out."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

from .ir.errors import OdtPlanError, UsageError
from .ir.whole_file import whole_file
from .output import unwritable
from .planner.cost_graph import CostGraph, Quantity, load_cost_graph
from .planner.remat.schedule import Schedule, keep_all_peak, schedule
from .planner.remat.search import Options
from .planner.sizes import format_bytes, format_joules, format_seconds, parse_bytes

_FRACTION = re.compile(r"(0?\.[0-9]+|1\.0*)|([0-9]+(?:\.[0-9]+)?) ?%")


@dataclass(frozen=True)
class ScheduleOptions:
    """Options of the command."""

    graph: Path
    budget: str
    paging: bool
    objective: Quantity | None
    gap: float
    time_limit_s: float
    seed: int
    threads: int
    output: Path | None
    as_json: bool
    quiet: bool


def run_schedule(options: ScheduleOptions) -> None:
    """Read, search, check, write, report.

    Raises:
        UsageError: A wrong graph or budget.
        InfeasibleError: No schedule keeps the budget.
        OdtPlanError: The schedule can't be written.
    """
    if options.output is not None and not options.output.parent.is_dir():
        raise OdtPlanError(
            f"{options.output}: can't write: {options.output.parent} is no folder; choose another"
        )
    graph = load_cost_graph(options.graph)
    peak = keep_all_peak(graph)
    budget = parse_budget(options.budget, peak)
    quantity = options.objective or ("energy" if graph.has_energy else "time")
    with Status("searching", console=_progress_console(options)) as status:
        found = schedule(
            graph,
            budget,
            paging=options.paging,
            quantity=quantity,
            options=Options(options.gap, options.time_limit_s, options.seed, options.threads),
            progress=status.update,
        )
    record = _record(graph, found, peak, options)
    if options.output is not None:
        _write(options.output, json.dumps(record, indent=1) + "\n")
    if options.as_json:
        sys.stdout.write(json.dumps(record, indent=1) + "\n")
    elif not options.quiet:
        _report(graph, found, peak, options)


def parse_budget(text: str, keep_all_bytes: int) -> int:
    """Bytes of a size, or of a share of the keep-all peak such as ``0.5`` or ``50%``.

    Raises:
        UsageError: Neither, zero, or more than 100 %.
    """
    match = _FRACTION.fullmatch(text.strip())
    if match is None:
        return parse_bytes(text, "--budget")
    share = Fraction(match[1]) if match[1] else Fraction(match[2]) / 100
    budget = int(share * keep_all_bytes)
    if budget <= 0 or share > 1:
        raise UsageError(
            f"--budget: {text} of {keep_all_bytes:,} B is {budget:,} B;"
            " write a share above 0 and up to 1.0, or a size such as 320KB"
        )
    return budget


def _record(
    graph: CostGraph, found: Schedule, peak: int, options: ScheduleOptions
) -> dict[str, object]:
    """The schedule file: what was asked, what is claimed, the operations."""
    r = found.replay
    return {
        "schedule_version": 1,
        "graph": graph.name,
        "budget_bytes": found.budget_bytes,
        "keep_all_bytes": peak,
        "paging": found.paging,
        "objective": found.quantity,
        "status": found.status,
        "cost": r.cost,
        "bound": found.bound,
        "gap": found.gap,
        "overhead": r.overhead,
        "bound_in_stages": found.bound_in_stages,
        "bound_where_used": found.bound_where_used,
        "peak_bytes": r.peak_bytes,
        "computed": r.computed,
        "recomputed": r.recomputed,
        "paged_out": r.paged_out,
        "paged_in": r.paged_in,
        "seed": options.seed,
        "seconds": found.marks[-1].seconds,
        "steps": [[s.op, s.node] for s in found.steps],
    }


def _progress_console(options: ScheduleOptions) -> Console:
    """Standard error; silent where it is no terminal, or on request."""
    console = Console(stderr=True, highlight=False)
    return Console(quiet=True) if options.quiet or not console.is_terminal else console


def _report(graph: CostGraph, found: Schedule, peak: int, options: ScheduleOptions) -> None:
    r, end = found.replay, found.marks[-1]
    amount = format_joules if found.quantity == "energy" else format_seconds
    table = Table.grid(padding=(0, 1))
    table.add_column(style="bold")

    def line(label: str, text: str) -> None:
        table.add_row(Text(label), Text(text))

    of = f"{found.budget_bytes / peak:.1%} of the {peak:,} B that keeping all takes"
    paging = "with" if found.paging else "no"
    line("graph", f"{options.graph.name} ({graph.name}): {len(graph.nodes)} nodes")
    line("budget", f"{format_bytes(found.budget_bytes)}, {of}; {paging} paging")
    step = found.steps[r.peak_step]
    where = f"at step {r.peak_step} of {len(found.steps)}: {step.op} node {step.node}"
    share = f"{r.peak_bytes / found.budget_bytes:.1%} of the budget"
    line("peak", f"{r.peak_bytes:,} B, {share}, {where}")
    more = f"{r.overhead:.4%} more than computing each node once"
    line(found.quantity, f"{amount(r.cost)} as given by the graph's costs, {more}")
    counts = f"{r.recomputed} of them again; {r.paged_out} page-outs, {r.paged_in} page-ins"
    line("steps", f"{r.computed} computations, {counts}")
    bound = f"bound for every schedule {found.bound:.9g}, gap {found.gap:.4%}"
    line("objective", f"{found.quantity} {r.cost:.9g}, {bound}")
    for restricted, which in (
        (found.bound_in_stages, "make a node at most once between two first computations"),
        (found.bound_where_used, "also compute again only right where it is read"),
    ):
        if restricted > found.bound:
            proven = "optimal" if restricted >= r.cost else f"bound {restricted:.9g}"
            line("", f"{proven} among schedules that {which}")
    times = format_seconds(found.found.seconds), format_seconds(end.seconds)
    when = "found after {}, {} in all".format(*times)
    line("solver", f"{found.status}, seed {options.seed}, {when}; replayed by the checker")
    if options.output is not None:
        line("written", str(options.output))
    plain = Console(highlight=False)
    (plain if plain.is_terminal else Console(highlight=False, width=160)).print(table)


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    try:
        with whole_file(path) as file:
            file.write(text.encode())
    except OSError as e:
        raise unwritable(path, e) from None
