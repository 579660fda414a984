"""The search: greedy plans, then solves of growing scope that share incumbent and bound."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from .cpsat import solve
from .greedy import RULES, greedy, polish
from .instance import Instance, Step, trace
from .neighbourhoods import improve
from .relaxation import lp_bound
from .stage_model import StageModel, steps_of

Outcome = Literal["optimal", "feasible", "infeasible", "unknown"]
#: Variables up to which the whole model is solved without its linear relaxation before.
TINY = 3000
#: Depths of the first restricted models.
DEPTHS = (1, 3)
#: Variables up to which a model is solved as a whole, not by neighbourhoods.
SMALL = 9000


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
        bound: Proven lower bound.
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
        bound: Proven lower bound on the cost of any schedule that makes a node at most once per
            stage, in node order.
        optimal_where_used: The best schedule is proven to be a cheapest one among those that
            compute nodes again only in stages that read them.
        marks: What happened when.
    """

    instance: Instance
    options: Options
    progress: Callable[[Mark], None] = lambda _: None
    best: list[Step] | None = None
    cost: int | None = None
    bound: int = 0
    optimal_where_used: bool = False
    status: Outcome = "unknown"
    marks: list[Mark] = field(default_factory=list)
    seconds: float = 0.0
    _relaxed: bool = False

    def run(self) -> Search:
        """Search until the gap is proven or time is up; returns itself."""
        self.begin, self.begin_cpu = time.perf_counter(), time.process_time()
        self._phases()
        self._mark("end")
        self.seconds = time.perf_counter() - self.begin
        return self

    def _phases(self) -> None:
        self.until = self.begin + self.options.time_limit_s
        self.bound = self.instance.once_cost
        if (self.instance.need_bytes[~self.instance.lazy] > self.instance.budget_bytes).any():
            self.status = "infeasible"
            return
        self._greedy()
        if not self._done():
            self._where_used()
        if not self._done():
            self._whole()
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

    def _where_used(self) -> None:
        """Restrictions from narrow to wide; what they prove is no bound of the whole problem."""
        nodes = self.instance.nodes
        for depth in (*(d for d in DEPTHS if d < nodes), nodes):
            stages = StageModel(self.instance, self._most(), depth=depth)
            widest = depth == nodes
            if stages.variables > SMALL and not self._relaxed:
                self._relaxation(0.3)
            if stages.variables > SMALL and self.best is not None:
                break
            closed = self._solve(stages, self._share(0.6 if widest else 0.2), f"depth {depth}")
            self.optimal_where_used = closed and widest and self.best is not None
            if self._done():
                return
        if not self.optimal_where_used and self.best is not None:
            self._neighbourhoods(0.7)

    def _whole(self) -> None:
        if not self._relaxed:
            self._relaxation(0.5)
        if not self._done():
            stages = StageModel(self.instance, self._most(), depth=None)
            self._solve(stages, self.until, "whole", whole=True)

    def _relaxation(self, share: float) -> None:
        """The bound of the linear relaxation, unless the model is so small that it is solved."""
        self._relaxed = True
        stages = StageModel(self.instance, self._most(), depth=None)
        if stages.variables > TINY:
            bound = lp_bound(stages, self._share(share) - time.perf_counter())
            if bound is not None:
                self._proven(bound, "relaxation")

    def _neighbourhoods(self, share: float) -> None:
        assert self.best is not None
        improve(
            self.instance,
            self.best,
            until=self._share(share),
            seed=self.options.seed,
            threads=self.options.threads,
            found=lambda steps: self._found(steps, "neighbourhoods"),
        )

    def _solve(self, stages: StageModel, until: float, phase: str, *, whole: bool = False) -> bool:
        """Solve, add the memory rows that the solution breaks, repeat; True: proven."""
        while True:
            solved = solve(
                stages,
                seconds=until - time.perf_counter(),
                seed=self.options.seed,
                threads=self.options.threads,
                least=self.bound,
            )
            if whole:
                self._proven(solved.bound, phase)
            if solved.values is None:
                if solved.status == "infeasible" and self.best is None and whole:
                    self.status = "infeasible"
                return solved.status == "infeasible"
            steps = steps_of(self.instance, stages.cells(solved.values))
            if not stages.refine(steps):
                self._found(steps, phase)
                return solved.status == "optimal"
            if solved.status == "feasible" and time.perf_counter() >= until:
                return False

    # -- incumbent and bound ----------------------------------------------------------------------

    def _most(self) -> int:
        """Cost of a schedule that would be an improvement."""
        if self.cost is not None:
            return self.cost - 1
        return self.instance.once_cost + 4 * int(self.instance.cost.sum())

    def _share(self, share: float) -> float:
        now = time.perf_counter()
        return now + share * (self.until - now)

    def _found(self, steps: list[Step], phase: str) -> None:
        known = trace(self.instance, steps)
        assert known.peak_bytes <= self.instance.budget_bytes
        if self.cost is None or known.cost < self.cost:
            self.best, self.cost = steps, known.cost
            self._mark(phase)

    def _proven(self, bound: int, phase: str) -> None:
        bound = bound if self.cost is None else min(bound, self.cost)
        if bound > self.bound:
            self.bound = bound
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
