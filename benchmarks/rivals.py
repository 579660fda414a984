"""Checkmate's and POET's programs under open solvers, beside ours: same machine, same conditions.

The programs are built from the papers' formulations, with the papers' symbols, by `checkmate` and
`poet`. Every solve runs in a fresh process with one thread and ends at the same gap; what counts is
that process's processor time, which a busy machine changes little.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from math import gcd
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from odt_plan.ir.errors import InfeasibleError
from odt_plan.planner.check_program import CheckError
from odt_plan.planner.check_schedule import Replay, ScheduleStep, replay
from odt_plan.planner.cost_graph import CostGraph, load_cost_graph
from odt_plan.planner.linear import INF, LinearProgram, SolverName, SolverOptions
from odt_plan.planner.progress import Watch
from odt_plan.planner.remat.schedule import keep_all_peak, schedule
from odt_plan.planner.remat.search import Options

from .models import shared
from .results import put

TITLE = "### Checkmate's and POET's programs under open solvers, and `odt-plan schedule`"
#: Relative gap of the total cost at which every solve ends: the solvers' own default.
GAP = 1e-4
#: What the budget counts in the programs, and what computing each node once costs: scales at which
#: the solvers' absolute tolerances are 1e-9 of the budget, 1e-8 of the cost.
ROOM, ONCE = 1000.0, 100.0
#: Percentage points of overhead that count as none.
AS_GOOD = 1e-4
#: Wall clock seconds per second of processor time after which a solve is ended on a busy machine.
PATIENCE = 6.0
BOTH: tuple[SolverName, ...] = ("highs", "scip")
#: Instance, budget as a share of what keeping everything takes, paging, and the solvers.
CASES: tuple[tuple[str, str, bool, tuple[SolverName, ...]], ...] = (
    ("poet_transformer_a72", "0.9", False, BOTH),
    ("poet_transformer_a72", "0.9", True, BOTH),
    ("poet_linear_m0", "0.5", False, BOTH),
    ("poet_linear_m0", "0.5", True, BOTH),
    ("cm_unet", "0.5", False, ("scip",)),
    ("poet_vgg16_a72", "0.7", False, ("highs",)),
    ("poet_vgg16_a72", "0.5", False, ("scip",)),
    ("poet_vgg16_a72", "0.5", True, ("highs",)),
    ("cm_fcn8", "0.8", False, ("scip",)),
    ("rl_n100", "0.9", False, ("scip",)),
    ("poet_resnet18_a72", "0.5", False, ("highs",)),
    ("poet_resnet18_a72", "0.5", True, ("highs",)),
    ("cm_unet", "0.8", False, ("scip",)),
    ("poet_bert_a72", "0.5", False, ("highs",)),
    ("rl_n250", "0.9", False, ("highs",)),
    ("cm_mobilenet", "0.5", False, ("highs",)),
    ("poet_resnet18_cifar_m4", "0.5", False, ("highs",)),
    ("poet_resnet18_cifar_m4", "0.5", True, ("highs",)),
)

_Grid = NDArray[np.int64]


@dataclass
class StageProgram:
    """A time-expanded program: stage ``t`` ends with the first computation of node ``t``.

    Checkmate (Jain et al., "Checkmate: Breaking the Memory Wall with Optimal Tensor
    Rematerialization", MLSys 2020), with its partition that advances the frontier, eq. 2 to 9::

        min  sum_t,i C_i R[t,i]
        R[t,j] <= R[t,i] + S[t,i]                      for edges (i, j)
        S[t,i] <= R[t-1,i] + S[t-1,i]
        R[i,i] = 1;  S[t,i] = 0 for i >= t;  R[t,i] = 0 for i > t
        U[t,0]   = sum_i M_i S[t,i] + M_0 R[t,0]
        U[t,k+1] = U[t,k] - sum_(i in DEPS(k) + {k}) M_i FREE[t,i,k] + M_(k+1) R[t,k+1]
        U[t,k] <= budget
        FREE[t,i,k] = 1 if and only if hazards(t,i,k) = 0, with
        hazards(t,i,k) = (1 - R[t,k]) + S[t+1,i] + sum_(j in USERS(i), j > k) R[t,j]:
            1 - FREE <= hazards <= kappa (1 - FREE),  kappa the largest value of hazards

    POET (Patil et al., "POET: Training Neural Networks on Tiny Devices with Integrated
    Rematerialization and Paging", ICML 2022) adds a storage: ``S`` is ``S_ram`` and::

        min  ... + sum_t,i In_i M_in[t,i] + Out_i M_out[t,i]
        S_ram[t,i] <= R[t-1,i] + S_ram[t-1,i] + M_in[t-1,i]
        S_sd[t,i] <= S_sd[t-1,i] + M_out[t-1,i]
        M_in[t,i] <= S_sd[t,i];  M_out[t,i] <= S_ram[t,i]

    Its limit of run time is left out, as it is in ours.

    Attributes:
        graph: What to schedule.
        budget_bytes: What results in memory may occupy.
        paging: POET's program, else Checkmate's.
        whole: Memory in whole units of bytes, as CP-SAT needs it; else in ``ROOM`` per budget.
    """

    graph: CostGraph
    budget_bytes: int
    paging: bool
    whole: bool = False
    c: LinearProgram = field(default_factory=LinearProgram)

    def __post_init__(self) -> None:
        """Build variables and rows."""
        nodes = self.graph.sequence
        n = len(nodes)
        place = {v.id: i for i, v in enumerate(nodes)}
        self.deps = [[place[p] for p in self.graph.operands[v.id]] for v in nodes]
        self.users: list[list[int]] = [[] for _ in nodes]
        for j, deps in enumerate(self.deps):
            for i in deps:
                self.users[i].append(j)
        unit = gcd(*(v.mem_bytes for v in nodes)) or 1
        self.room = float(self.budget_bytes // unit) if self.whole else ROOM
        scale = unit if self.whole else self.budget_bytes / ROOM
        self.size = [v.mem_bytes / scale for v in nodes]
        past, until = np.tri(n, n, -1, bool), np.tri(n, n, 0, bool)
        self.r, self.s = self._grid(until), self._grid(past)
        for i in range(n):
            self.c.lower[self.r[i, i]] = 1.0
        once = ONCE / sum(v.cost("energy") for v in nodes)
        self.objective = self._priced(self.r, [once * v.cost("energy") for v in nodes])
        if self.paging:
            self.sd, self.m_in, self.m_out = (self._grid(past) for _ in range(3))
            self.objective += self._priced(self.m_in, [once * (v.pagein_J or 0.0) for v in nodes])
            self.objective += self._priced(self.m_out, [once * (v.pageout_J or 0.0) for v in nodes])
        for t in range(n):
            self._correct(t)
            self._memory(t)

    def _grid(self, allowed: NDArray[np.bool_]) -> _Grid:
        """A 0/1 column per stage and node where it is allowed, -1 elsewhere."""
        grid = np.full(allowed.shape, -1, np.int64)
        for t, i in zip(*np.nonzero(allowed), strict=True):
            grid[t, i] = self.c.column(integer=True)
        return grid

    def _priced(self, grid: _Grid, prices: Sequence[float]) -> list[tuple[int, float]]:
        return [(int(grid[t, i]), prices[i]) for t, i in zip(*np.nonzero(grid >= 0), strict=True)]

    def _sum(self, *columns: int, times: float = 1.0) -> list[tuple[int, float]]:
        """Terms of the columns that there are."""
        return [(int(c), times) for c in columns if c >= 0]

    def _correct(self, t: int) -> None:
        """Operands are there; what is held has been there in the stage before."""
        for j in range(t + 1):
            for i in self.deps[j]:
                there = self._sum(self.r[t, i], self.s[t, i])
                self.c.row([*there, (int(self.r[t, j]), -1.0)], lower=0.0)
        for i in range(t):
            before = self._sum(self.r[t - 1, i], self.s[t - 1, i])
            if self.paging:
                before += self._sum(self.m_in[t - 1, i])
                stored = self._sum(self.sd[t - 1, i], self.m_out[t - 1, i])
                self.c.row([*stored, (int(self.sd[t, i]), -1.0)], lower=0.0)
                self.c.row([(int(self.sd[t, i]), 1.0), (int(self.m_in[t, i]), -1.0)], lower=0.0)
                self.c.row([(int(self.s[t, i]), 1.0), (int(self.m_out[t, i]), -1.0)], lower=0.0)
            self.c.row([*before, (int(self.s[t, i]), -1.0)], lower=0.0)

    def _memory(self, t: int) -> None:
        """The recurrence of U through a stage."""
        used = [self.c.column(integer=self.whole, upper=self.room) for _ in range(t + 1)]
        first = [(int(self.s[t, i]), self.size[i]) for i in range(t)]
        first.append((int(self.r[t, 0]), self.size[0]))
        self.c.row([(used[0], -1.0), *first], 0.0, 0.0)
        for k in range(t):
            freed = [(self._free(t, i, k), -self.size[i]) for i in (*self.deps[k], k)]
            made = (int(self.r[t, k + 1]), self.size[k + 1])
            self.c.row([(used[k], 1.0), (used[k + 1], -1.0), *freed, made], 0.0, 0.0)

    def _free(self, t: int, i: int, k: int) -> int:
        """FREE[t,i,k]: i is dropped right after k."""
        free = self.c.column(integer=True)
        kept = self._sum(self.s[t + 1, i]) if t + 1 < len(self.s) else []
        later = [int(self.r[t, j]) for j in self.users[i] if k < j <= t]
        hazards = [(int(self.r[t, k]), -1.0), *kept, *self._sum(*later)]  # without the 1
        kappa = 1.0 + len(kept) + len(later)
        self.c.row([*hazards, (free, 1.0)], lower=0.0)
        self.c.row([*hazards, (free, kappa)], upper=kappa - 1.0)
        return free

    def steps(self, values: NDArray[np.float64]) -> Iterator[ScheduleStep]:
        """The operations of a solution, for the replay.

        What is paged out is so at the beginning of its stage, what is paged in at the end.
        """
        nodes, memory = self.graph.sequence, set[int]()

        def on(grid: _Grid, t: int) -> list[int]:
            if t >= len(grid):
                return []
            return [i for i, c in enumerate(grid[t].tolist()) if c >= 0 and values[c] > 0.5]

        for t in range(len(nodes)):
            for i in on(self.m_out, t) if self.paging else []:
                yield ScheduleStep(op="page_out", node=nodes[i].id)
            computed, held = on(self.r, t), set(on(self.s, t + 1))
            for k in computed:
                if k not in memory:
                    yield ScheduleStep(op="compute", node=nodes[k].id)
                    memory.add(k)
                for i in (*self.deps[k], k):
                    needed = i in held or any(j > k and j in computed for j in self.users[i])
                    if i in memory and not needed:
                        yield ScheduleStep(op="drop", node=nodes[i].id)
                        memory.discard(i)
            for i in sorted(memory - held):
                yield ScheduleStep(op="drop", node=nodes[i].id)
            memory &= held
            for i in on(self.m_in, t) if self.paging else []:
                if i in held - memory:
                    yield ScheduleStep(op="page_in", node=nodes[i].id)
                    memory.add(i)


@dataclass(frozen=True)
class State:
    """What a solve knew at some time: processor seconds, overhead in percent, gap of the cost."""

    cpu_s: float
    overhead: float | None
    gap: float


@dataclass(frozen=True)
class Run:
    """A solve.

    Attributes:
        states: Its course; of a rival's program only its end.
        end: Why it ended.
        replayed: What the replay of its schedule says; empty: no schedule.
    """

    states: tuple[State, ...]
    end: str
    replayed: str

    @cached_property
    def last(self) -> State:
        """The end."""
        return self.states[-1]

    def until(self, other: State) -> State | None:
        """When it had a schedule as good as another's, proven within ``GAP``.

        If it never had, then within the other's gap.
        """
        enough = INF if other.overhead is None else other.overhead + AS_GOOD
        good = [s for s in self.states if s.overhead is not None and s.overhead <= enough]
        for gap in (GAP, other.gap):
            if (first := next((s for s in good if s.gap <= gap), None)) is not None:
                return first
        return None


@dataclass(frozen=True)
class Case:
    """What to solve."""

    path: Path
    share: str
    paging: bool
    limit_s: float

    def load(self) -> tuple[CostGraph, int]:
        """The graph and the budget in bytes."""
        graph = load_cost_graph(self.path)
        return graph, int(Fraction(self.share) * keep_all_peak(graph))


def run_rival(case: Case, solver: SolverName) -> Run:
    """Solve a rival's program in this process; building it is not counted."""
    graph, budget = case.load()
    program = StageProgram(graph, budget, case.paging, whole=solver == "cp-sat")
    watch, begin = Watch(), time.process_time()

    def guard() -> None:
        while time.process_time() - begin < case.limit_s:
            time.sleep(0.2)
        watch.stop()

    threading.Thread(target=guard, daemon=True).start()
    options = SolverOptions(solver, GAP, case.limit_s * PATIENCE, threads=1)
    found = program.c.solve(program.objective, options, maximize=False, watch=watch)
    cpu_s = time.process_time() - begin
    end = {"optimal": "optimal", "infeasible": "infeasible"}.get(found.status, "time limit")
    if found.values is None:
        return Run((State(cpu_s, None, INF),), end, "")
    cost = sum(a * found.values[c] for c, a in program.objective)
    state = State(cpu_s, cost - ONCE, max(0.0, cost - found.bound) / cost)
    try:
        done = replay(
            graph, list(program.steps(found.values)), budget_bytes=budget, paging=case.paging
        )
    except CheckError as e:
        return Run((state,), end, f"breaks: {e}")
    return Run((state,), end, "" if 100 * done.overhead <= cost - ONCE + 1e-4 else _costs(done))


def _costs(done: Replay) -> str:
    return f"costs {100 * done.overhead:.4f} % more when replayed"


def run_ours(case: Case) -> Run:
    """`odt-plan schedule` in this process; its course is what it marks itself."""
    graph, budget = case.load()
    options = Options(gap=GAP, time_limit_s=case.limit_s)
    try:
        found = schedule(graph, budget, paging=case.paging, options=options)
    except InfeasibleError as e:
        return Run((State(0.0, None, INF),), "infeasible", str(e).split(";")[0])
    unit = 100 * found.replay.cost / (found.marks[-1].cost or 1) / found.replay.once_cost
    states = [
        State(m.cpu_seconds, m.cost * unit - 100, (m.cost - m.bound) / m.cost)
        for m in found.marks
        if m.cost
    ]
    return Run(tuple(states), "optimal" if found.status == "optimal" else "time limit", "")


def _serve(pipe: Connection, run: Callable[..., Run], arguments: Sequence[object]) -> None:
    pipe.send(run(*arguments))


def fresh(run: Callable[..., Run], *arguments: object) -> Run:
    """Run in a process of its own, which is ended once it has answered.

    Raises:
        RuntimeError: It died without an answer.
    """
    context = get_context("spawn")
    pipe, far = context.Pipe()
    process = context.Process(target=_serve, args=(far, run, arguments), daemon=True)
    process.start()
    far.close()
    try:
        answer = pipe.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{run.__name__}{arguments}: exit code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
    assert isinstance(answer, Run)
    return answer


def _shown(state: State) -> str:
    if state.overhead is None:
        return "none | "
    return f"{state.overhead:.4f} | {100 * state.gap:.4f}"


def row(name: str, case: Case, rival: str, theirs: Run, ours: Run) -> str:
    """A row of the table."""
    same = ours.until(theirs.last)
    ratio = "-"
    if same is not None:
        ran_out = "> " if theirs.end == "time limit" else ""
        ratio = f"{ran_out}{theirs.last.cpu_s / max(same.cpu_s, 0.01):,.0f}"
    note = f" ({theirs.replayed})" if theirs.replayed else ""
    spent = "-" if same is None else f"{same.cpu_s:.2f}"
    return (
        f"| {name} | {case.share} | {rival} | {_shown(theirs.last)} | {theirs.last.cpu_s:.1f} |"
        f" {theirs.end}{note} | {_shown(ours.last)} | {ours.last.cpu_s:.2f} | {spent} | {ratio} |"
    )


def rivals_table(
    cases: Sequence[tuple[str, str, bool, tuple[SolverName, ...]]] = CASES,
) -> Iterator[str]:
    """Markdown rows: each instance and solver."""
    limit = float(os.environ.get("ODT_PLAN_RIVALS_SECONDS", "60"))
    only = os.environ.get("ODT_PLAN_RIVALS_ONLY", "").split(",")
    yield TITLE
    yield ""
    yield (
        "Checkmate's program (Jain et al. 2020), or with paging POET's (Patil et al. 2022), written"
        " from the papers for `ortools.math_opt`; each solve in a fresh process, one thread, until"
        f" a relative gap of {GAP:.0e} of the total cost or {limit:g} s of processor time. Overhead"
        " in percent is beyond computing each node once; gaps in percent are (cost - bound) / cost."
        " Their seconds are those of the solver alone, ours are all. *Same*: CPU s until ours had a"
        f" schedule as good (but for {AS_GOOD:g} percentage points), proven within {GAP:.0e}, or if"
        " it never got there within the gap that theirs ended with. Ratio: theirs by ours, of which"
        " 0.01 s counts at least; `>`: theirs had run out of time. Their bounds are of schedules in"
        " stages, ours of all. Every schedule was replayed within its budget."
    )
    yield ""
    yield (
        "| instance | budget | rival | its overhead % | its gap % | its CPU s | its end |"
        " ours % | our gap % | our CPU s | same CPU s | ratio |"
    )
    yield "|" + "---|" * 12
    folder = shared()
    if folder is None or not (folder / "instances").is_dir():
        yield "| no instances at hand |" + " |" * 11
        return
    for name, share, paging, solvers in cases:
        if not any(o in f"{name}:{share}" for o in only):
            continue
        case = Case(folder / "instances" / f"{name}.json", share, paging, limit)
        ours = fresh(run_ours, case)
        for solver in solvers:
            rival = f"{'POET' if paging else 'Checkmate'}, {solver}"
            line = row(name, case, rival, fresh(run_rival, case, solver), ours)
            print(line, file=sys.stderr, flush=True)
            yield line


def main() -> None:
    """Run the table and put it into RESULTS.md, in place of the one that is there."""
    put(TITLE, [*rivals_table()])


if __name__ == "__main__":
    main()
