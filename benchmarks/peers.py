"""Schedules of other planners' own cost graphs, beside what their formulations reached.

The peers' figures are read from the README of the instances at run time.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from odt_plan.ir.errors import InfeasibleError
from odt_plan.planner.cost_graph import load_cost_graph
from odt_plan.planner.remat.schedule import Schedule, keep_all_peak, schedule
from odt_plan.planner.remat.search import Mark, Options

from .models import shared
from .results import put

TITLE = "### `odt-plan schedule` on other planners' cost graphs"
COLUMNS = 13


@dataclass(frozen=True)
class Row:
    """One run of a peer: seconds to its solution and in all, overhead in percent."""

    instance: str
    budget: str
    paging: bool
    solver: str
    overhead: float | None
    first_s: float | None
    end_s: float
    status: str

    @property
    def case(self) -> tuple[str, str, bool]:
        """What it was run on."""
        return self.instance, self.budget, self.paging


def recorded(readme: Path) -> list[Row]:
    """The rows of the table of results."""
    rows = []
    for text in readme.read_text(encoding="utf-8").splitlines():
        cells = [c.strip() for c in text.strip().strip("|").split("|")]
        if len(cells) != 7 or not cells[1].replace(".", "", 1).isdigit():
            continue
        first, end = (c.strip() for c in cells[5].split("/"))
        overhead, begin = (None if c == "-" else float(c) for c in (cells[4], first))
        times = overhead, begin, float(end)
        rows.append(Row(cells[0], cells[1], cells[2] == "yes", cells[3], *times, cells[6]))
    return rows


def _told(rows: list[Row]) -> str:
    """The peers' best solution, the fastest of those that reached it, and who proved it first."""
    solved = [r for r in rows if r.overhead is not None]
    if not solved:
        return "none | "
    best = min(r.overhead for r in solved if r.overhead is not None)
    reached = [r for r in solved if r.overhead == best]
    first = min(reached, key=lambda r: (r.end_s, r.solver))
    proofs = [r for r in reached if r.status in ("OPTIMAL", "Optimal")]
    proof = min((r.end_s for r in proofs), default=None)
    proven = "not proven" if proof is None else f"proven in {proof:g}"
    return f"{best:.4f} ({first.solver.split()[0]}) | {first.end_s:g}, {proven}"


def peers_table() -> Iterator[str]:
    """Markdown rows: each instance at each budget."""
    limit = float(os.environ.get("ODT_PLAN_PEERS_SECONDS", "60"))
    only = os.environ.get("ODT_PLAN_PEERS_ONLY", "").split(",")
    yield TITLE
    yield ""
    yield (
        f"One thread, time limit {limit:g} s of wall clock. CPU seconds are this process's own:"
        " a busy machine changes them little; the peers' seconds are wall clock as recorded with"
        " the instances. CPU s until: a schedule as good as the peers' best, our best, a proven gap"
        " of 1 %, the end. Overhead and bound: beyond computing each node once. Bound and gap,"
        " (cost - bound) / cost, are of every schedule in the graph's order of first computations;"
        " proven *in stages*: only among those that make a node at most once between two of these;"
        " *where used*: only among those of them that compute again where a result is read. Every"
        " schedule was replayed within its budget."
    )
    yield ""
    yield (
        "| instance | budget | paging | peers' best % | peers' s | ours % | bound % | gap % |"
        " proven | CPU s until peers' / best / 1 % / end | wall s | load | peak B of budget B |"
    )
    yield "|" + "---|" * COLUMNS
    folder = shared()
    if folder is None or not (folder / "instances").is_dir():
        yield "| no instances at hand |" + " |" * (COLUMNS - 1)
        return
    rows = recorded(folder / "instances" / "README.md")
    for case in dict.fromkeys(r.case for r in rows):
        if any(o in f"{case[0]}:{case[1]}" for o in only):
            known = [r for r in rows if r.case == case]
            yield _measured(folder / "instances" / f"{case[0]}.json", case, known, limit)


def _measured(path: Path, case: tuple[str, str, bool], known: list[Row], limit: float) -> str:
    name, share, paging = case
    graph = load_cost_graph(path)
    budget = int(Fraction(share) * keep_all_peak(graph))
    head = f"| {name} | {share} | {'yes' if paging else 'no'} | {_told(known)} |"
    begin, cpu = time.perf_counter(), time.process_time()
    load = f"{os.getloadavg()[0]:.0f}"
    try:
        found = schedule(graph, budget, paging=paging, options=Options(time_limit_s=limit))
    except InfeasibleError as e:
        wall, spent = time.perf_counter() - begin, time.process_time() - cpu
        line = f"{head} none | | | {str(e).split(';')[0]} | {spent:.2f} | {wall:.2f} | {load} | |"
    else:
        proven = "yes" if found.status == "optimal" else "no"
        if found.status != "optimal" and found.bound_in_stages >= found.replay.cost:
            proven = "in stages"
        elif found.status != "optimal" and found.bound_where_used >= found.replay.cost:
            proven = "where used"
        end, r = found.marks[-1], found.replay
        best = min((k.overhead for k in known if k.overhead is not None), default=None)
        mark = "**" if best is not None and 100 * r.overhead < best - 5e-5 else ""
        assert r.peak_bytes <= budget
        times = _until(found, best), _cpu(found.found), _until_gap(found, 0.01), _cpu(end)
        line = (
            f"{head} {mark}{100 * r.overhead:.4f}{mark} |"
            f" {100 * (found.bound / r.once_cost - 1):.4f} | {100 * found.gap:.4f} | {proven} |"
            f" {' / '.join(times)} | {end.seconds:.1f} | {load} |"
            f" {r.peak_bytes:,} of {budget:,} |"
        )
    print(line, file=sys.stderr, flush=True)
    return line


def _cpu(mark: Mark | None) -> str:
    return "-" if mark is None else f"{mark.cpu_seconds:.2f}"


def _until(found: Schedule, percent: float | None) -> str:
    """CPU seconds until the overhead was no more than that of a peer, which has four decimals."""
    if percent is None:
        return "-"
    unit = found.replay.cost / (found.marks[-1].cost or 1)
    enough = found.replay.once_cost * (1 + (percent + 5e-5) / 100)
    return _cpu(next((m for m in found.marks if m.cost and m.cost * unit <= enough), None))


def _until_gap(found: Schedule, gap: float) -> str:
    closed = (m for m in found.marks if m.cost is not None and m.cost - m.bound <= gap * m.cost)
    return _cpu(next(closed, None))


def main() -> None:
    """Run the table and put it into RESULTS.md, in place of the one that is there."""
    put(TITLE, [*peers_table()])


if __name__ == "__main__":
    main()
