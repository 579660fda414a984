"""The search: greedy plans, then solves of growing scope that share incumbent and bound."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from .cells import Cells, steps_of
from .cpsat import solve
from .greedy import RULES, greedy, polish
from .instance import Instance, Step, trace
from .neighbourhoods import improve
from .stage_model import StageModel
from .zones import Zones

Outcome = Literal["optimal", "feasible", "infeasible", "unknown"]
#: Deterministic time of one solve of a restricted model; one that needs more ends their row.
EFFORT = 4.0
#: Zones that need more deterministic time than this wait until schedules have been improved.
QUICK = 0.5


@dataclass(frozen=True)
class Options:
    """How to search.

    Attributes:
        gap: Relative gap at which to stop.
        time_limit_s: Wall clock limit.
        seed: Random seed; same input and seed, same schedule, unless time runs out.
        threads: Threads of the solver.
    """

    gap: float = 0.0
    time_limit_s: float = 60.0
    seed: int = 0
    threads: int = 1


@dataclass(frozen=True)
class Mark:
    """The state of the search at some time.

    Attributes:
        seconds: Wall clock since it began.
        cpu_seconds: Processor time of this process since then.
        cost: Cost of the best schedule; None: there is none yet.
        bound: Proven lower bound for every schedule.
        phase: What changed them.
    """

    seconds: float
    cpu_seconds: float
    cost: int | None
    bound: int
    phase: str


@dataclass
class Search:
    """One search.

    Attributes:
        instance: The problem.
        options: How to search.
        progress: Called at each change.
        best: Best schedule so far.
        bound: Proven lower bound on the cost of every schedule.
        bound_in_stages: The same for schedules that make a node at most once between two first
            computations, in node order.
        bound_where_used: The same for those of them that compute nodes again only in stages that
            read them.
        status: What is proven.
        only_in_stages: ``infeasible`` is proven only of schedules that make a node at most once
            between two first computations.
        marks: What happened when.
    """

    instance: Instance
    options: Options
    progress: Callable[[Mark], None] = lambda _: None
    best: list[Step] | None = None
    cost: int | None = None
    bound: int = 0
    bound_in_stages: int = 0
    bound_where_used: int = 0
    status: Outcome = "unknown"
    only_in_stages: bool = False
    marks: list[Mark] = field(default_factory=list)
    seconds: float = 0.0

    def run(self) -> Search:
        """Search until the gap is proven or time is up; returns itself."""
        self.begin, self.begin_cpu = time.perf_counter(), time.process_time()
        self._phases()
        self._mark("end")
        self.seconds = time.perf_counter() - self.begin
        return self

    def _phases(self) -> None:
        self.until = self.begin + self.options.time_limit_s
        self._proven(self.instance.once_cost, "begin")
        if (self.instance.need_bytes[~self.instance.lazy] > self.instance.budget_bytes).any():
            self.status = "infeasible"
            return
        self.zones = [Zones(self.instance), Zones(self.instance, gently=True)]
        for phase in (
            self._greedy,
            self._coarse,
            self._next_to_readers,
            self._coarse_at_peak,
            self._where_used,
            self._neighbourhoods,
            self._fine,
            self._whole,
        ):
            if self._done():
                break
            phase()
        if self.status != "infeasible" and self.cost is not None:
            self.status = "optimal" if self._closed() else "feasible"

    # -- phases -----------------------------------------------------------------------------------

    def _greedy(self) -> None:
        for rule in RULES:
            steps = greedy(self.instance, rule, self.options.seed)
            if steps is not None:
                self._found(polish(self.instance, steps), "greedy")
            if self._done():
                break

    def _coarse(self) -> None:
        self._bounds(self.zones[0], QUICK, self.until)

    def _next_to_readers(self) -> None:
        self._depth(1)

    def _coarse_at_peak(self) -> None:
        self._bounds(self.zones[1], QUICK, self.until)

    def _fine(self) -> None:
        best = max(self.zones, key=lambda zones: zones.proven)
        self._bounds(best, float("inf"), self._share(0.7))

    def _bounds(self, zones: Zones, effort: float, until: float) -> None:
        """Bounds of finer and finer zones; their solutions may be schedules, too."""
        while not (self._done() or zones.exhausted or zones.effort > effort):
            left = until - time.perf_counter()
            if left <= 0:
                break
            bound, steps = zones.bound(
                self._most(),
                least=self.bound,
                seconds=left,
                seed=self.options.seed,
                threads=self.options.threads,
            )
            if bound > self._most() and self.best is None:
                self.status = "infeasible"
            if steps is not None:
                self._found(polish(self.instance, steps), "zones")
            self._proven(bound, "zones")

    def _where_used(self) -> None:
        """Restrictions from narrow to wide; what they prove is no bound of the whole problem."""
        nodes, depth = self.instance.nodes, 2
        while not self._done():
            before = self.cost
            closed = self._depth(depth)
            if depth >= nodes or (self.cost == before and not closed):
                break
            if closed:
                depth = min(nodes, depth + max(1, depth // 2))

    def _depth(self, depth: int) -> bool:
        known = None if self.best is None else Cells.of(self.instance, self.best)
        stages = StageModel(self.instance, self._most(), depth=depth, known=known)
        return self._solve(stages, self._share(0.5), f"depth {depth}", EFFORT)

    def _neighbourhoods(self) -> None:
        if self.best is None or self.bound_where_used >= self._most() + 1:
            return
        improve(
            self.instance,
            self.best,
            until=self._share(0.5),
            seed=self.options.seed,
            threads=self.options.threads,
            found=lambda steps: self._found(steps, "neighbourhoods"),
        )

    def _whole(self) -> None:
        if self.bound_in_stages <= self._most():
            self._solve(StageModel(self.instance, self._most(), depth=None), self.until, "whole")

    def _solve(
        self, stages: StageModel, until: float, phase: str, effort: float | None = None
    ) -> bool:
        """Solve, add the memory rows that the solution breaks, repeat; True: proven."""
        while True:
            solved = solve(
                stages,
                seconds=until - time.perf_counter(),
                seed=self.options.seed,
                threads=self.options.threads,
                effort=effort,
                least=self.bound_in_stages,
            )
            self._told(stages, solved.bound)
            if solved.values is None:
                if solved.status == "infeasible" and self.best is None and stages.depth is None:
                    self.status, self.only_in_stages = "infeasible", True
                return solved.status == "infeasible"
            steps = steps_of(self.instance, stages.cells(solved.values))
            fits = trace(self.instance, steps).peak_bytes <= self.instance.budget_bytes
            if fits:
                self._found(polish(self.instance, steps), phase)
                return solved.status == "optimal"
            if not stages.refine(steps) or time.perf_counter() >= until:
                return False

    # -- incumbent and bound ----------------------------------------------------------------------

    def _most(self) -> int:
        """Cost of a schedule that would be an improvement."""
        if self.cost is not None:
            return self.cost - 1
        x = self.instance  # what no schedule without needless steps exceeds
        most = x.once_cost + x.nodes * int(x.cost.sum())
        if x.page_in_cost is not None and x.page_out_cost is not None:
            most += x.nodes * int(x.page_in_cost.sum()) + int(x.page_out_cost.sum())
        return most

    def _share(self, share: float) -> float:
        now = time.perf_counter()
        return now + share * (self.until - now)

    def _found(self, steps: list[Step], phase: str) -> None:
        known = trace(self.instance, steps)
        assert known.peak_bytes <= self.instance.budget_bytes
        if self.cost is None or known.cost < self.cost:
            self.best, self.cost = steps, known.cost
            self._mark(phase)

    def _told(self, stages: StageModel, bound: int) -> None:
        """Take over the bound of a model for the schedules that it holds."""
        if stages.depth is None:
            self.bound_in_stages = max(self.bound_in_stages, bound)
        elif stages.depth >= self.instance.nodes:
            self.bound_where_used = max(self.bound_where_used, bound)
        self.bound_where_used = max(self.bound_where_used, self.bound_in_stages)

    def _proven(self, bound: int, phase: str) -> None:
        bound = bound if self.cost is None else min(bound, self.cost)
        if bound > self.bound:
            self.bound = bound
            self.bound_in_stages = max(self.bound_in_stages, bound)
            self.bound_where_used = max(self.bound_where_used, bound)
            self._mark(phase)

    def _mark(self, phase: str) -> None:
        cpu = time.process_time() - self.begin_cpu
        mark = Mark(time.perf_counter() - self.begin, cpu, self.cost, self.bound, phase)
        self.marks.append(mark)
        self.progress(mark)

    def _closed(self) -> bool:
        return self.cost is not None and self.cost - self.bound <= self.options.gap * self.cost

    def _done(self) -> bool:
        return self._closed() or time.perf_counter() >= self.until or self.status == "infeasible"
