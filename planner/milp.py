"""The joint model as a mixed-integer linear program, solved through ortools.math_opt.

Variables, in the notation of docs/design.md: A (activity of slots; the update choices U, the rebuild
choices R and auxiliary choices F are among them), H (a tensor is held into an event), P (it is
paged in right before an event), O (it is paged out once), X (it is resident at an event's slot).
All memory rows are linear: update choice is a knapsack, and it needs their LP bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal

import numpy as np
from ortools.math_opt import model_pb2
from ortools.math_opt.python import mathopt

from ..ir.errors import OdtPlanError
from ..ir.opdef import get_op
from .cost import flash_weights_bytes
from .plan import CODE_BYTES_PER_KERNEL, CODE_BYTES_PER_STEP
from .problem import ALWAYS, Problem, Retention
from .solution import Solution

ObjectiveName = Literal["learn", "latency", "energy", "ram", "flash"]
SolverName = Literal["highs", "scip", "cp-sat"]
_SOLVERS = {
    "highs": mathopt.SolverType.HIGHS,
    "scip": mathopt.SolverType.GSCIP,
    "cp-sat": mathopt.SolverType.CP_SAT,
}


@dataclass(frozen=True)
class SolverOptions:
    """How to solve: open solvers only.

    Attributes:
        solver: ``highs``, ``scip`` or ``cp-sat``.
        gap: Relative gap at which to stop.
        time_limit_s: Wall clock limit of one solve.
        seed: Random seed.
        threads: Threads of SCIP and CP-SAT; HiGHS runs in one.
    """

    solver: SolverName = "highs"
    gap: float = 1e-3
    time_limit_s: float = 60.0
    seed: int = 0
    threads: int = 1


@dataclass(frozen=True)
class SolveResult:
    """Outcome of one solve.

    Attributes:
        status: ``optimal`` (within the gap), ``feasible``, ``infeasible`` (proven) or ``unknown``
            (the time limit came first).
        value: Objective of the solution in the objective's unit.
        bound: Proven bound on the objective of the whole problem.
        solution: Decisions, None without a solution.
        peak_node: Name of the node at whose slot most RAM is needed.
        time_s: Solve time.
    """

    status: Literal["optimal", "feasible", "infeasible", "unknown"]
    value: float
    bound: float
    solution: Solution | None
    peak_node: str
    time_s: float

    @property
    def gap(self) -> float:
        """Relative gap |bound - value| / |value|."""
        return abs(self.bound - self.value) / max(abs(self.value), 1e-9)


@dataclass
class _Columns:
    """Sparse rows and bounded columns, collected as flat lists and handed over at once."""

    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    integer: list[bool] = field(default_factory=list)
    row_lower: list[float] = field(default_factory=list)
    row_upper: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    cols: list[int] = field(default_factory=list)
    coefs: list[float] = field(default_factory=list)

    def var(self, *, integer: bool, upper: float = 1.0) -> int:
        self.lower.append(0.0)
        self.upper.append(upper)
        self.integer.append(integer)
        return len(self.lower) - 1

    def row(self, terms: Iterable[tuple[int, float]], lower: float, upper: float) -> None:
        merged: dict[int, float] = {}
        for c, a in terms:
            merged[c] = merged.get(c, 0.0) + a
        r = len(self.row_lower)
        self.row_lower.append(lower)
        self.row_upper.append(upper)
        self.rows += [r] * len(merged)
        self.cols += merged.keys()
        self.coefs += merged.values()


INF = float("inf")


class Milp:
    """The program of one problem; constraints are methods, one each."""

    def __init__(self, problem: Problem) -> None:
        """Build variables and constraints."""
        self.problem = problem
        self.c = _Columns()
        self.one = self.c.var(integer=False)
        self.c.lower[self.one] = 1.0
        self.a = [
            self.one if a.kind == "always" else self.c.var(integer=a.kind != "needed")
            for a in problem.activities
        ]
        self.held: list[list[int]] = []
        self.resident: list[list[int]] = []
        self.loaded: list[dict[int, int]] = []
        self.stored: list[int | None] = []
        for r in problem.retentions:
            self._retention_variables(r)
        self.peak = self.c.var(integer=False, upper=INF)
        self._activities()
        self._one_candidate_each()
        for i, r in enumerate(problem.retentions):
            self._supply(i, r)
        self._memory_rows()
        self._flash_row()
        self._storage_row()
        self._latency_row()
        self._energy_row()

    # -- variables --------------------------------------------------------------------------------

    def _retention_variables(self, r: Retention) -> None:
        n = len(r.events)
        first = self.c.var(integer=True, upper=1.0 if r.window is not None else 0.0)
        self.held.append([first, *(self.c.var(integer=True) for _ in range(n - 1))])
        self.resident.append([self.c.var(integer=False) for _ in range(n)])
        loads = {j: self.c.var(integer=True) for j, e in enumerate(r.events) if e.may_load}
        self.loaded.append(loads)
        self.stored.append(self.c.var(integer=True) if loads else None)

    # -- constraints ------------------------------------------------------------------------------

    def _activities(self) -> None:
        """A needed backward node runs if one of its readers runs."""
        for a in self.problem.activities:
            for b in a.implied_by:
                self.c.row([(self.a[a.index], 1.0), (self.a[b], -1.0)], 0.0, INF)

    def _one_candidate_each(self) -> None:
        """At most one candidate per parameter, and at least one update in all."""
        chosen = [a for acts in self.problem.choices.values() for a in acts if a != ALWAYS]
        for acts in self.problem.choices.values():
            if len(acts) > 1:
                self.c.row([(self.a[a], 1.0) for a in acts], 0.0, 1.0)
        if chosen:
            self.c.row([(self.a[a], 1.0) for a in chosen], 1.0, INF)

    def _supply(self, i: int, r: Retention) -> None:
        """What is read or held on has been held, loaded or completed right then."""
        n = len(r.events)
        for j, e in enumerate(r.events):
            sources = [(self.held[i][j], 1.0)]
            if j in self.loaded[i]:
                sources.append((self.loaded[i][j], 1.0))
            if not e.writes:
                self.c.row([*sources, (self.a[e.activity], -1.0)], 0.0, INF)
            x = self.resident[i][j]
            self.c.row([(x, 1.0), (self.a[e.activity], -1.0)], 0.0, INF)
            if j + 1 < n:
                held_on = self.held[i][j + 1]
                made = [(self.a[e.activity], 1.0)] if e.writes else []
                self.c.row([*sources, *made, (held_on, -1.0)], 0.0, INF)
                self.c.row([(x, 1.0), (held_on, -1.0)], 0.0, INF)
        stored = self.stored[i]
        if stored is not None:
            for load in self.loaded[i].values():
                self.c.row([(stored, 1.0), (load, -1.0)], 0.0, INF)
            self.c.row([(self.a[r.page_out_activity], 1.0), (stored, -1.0)], 0.0, INF)

    def _memory_rows(self) -> None:
        """Live arena bytes + state bytes <= peak <= RAM, at every slot."""
        p = self.problem
        live: list[list[tuple[int, float]]] = [[] for _ in p.slots]
        for s in p.slots:
            if s.scratch_bytes:
                live[s.index].append((self.a[s.activity], s.scratch_bytes))
        for begin, end, size in p.fixed:
            for k in range(begin, end + 1):
                live[k].append((self.one, size))
        for t in p.transients:
            self._transient_rows(t.begin, t.segments, t.tensor.bytes, live)
        for i, r in enumerate(p.retentions):
            self._retention_rows(i, r, live)
        state = [(self.a[a], float(b)) for a, b in p.state_bytes.items()]
        self.live = live
        for terms in live:
            self.c.row([*terms, *state, (self.peak, -1.0)], -INF, 0.0)
        self.c.row([(self.peak, 1.0)], -INF, p.limits.ram_bytes)

    def _transient_rows(
        self,
        begin: int,
        segments: tuple[tuple[int, tuple[int, ...]], ...],
        size: int,
        live: list[list[tuple[int, float]]],
    ) -> None:
        k = begin
        known: dict[tuple[int, ...], int] = {}
        for last, acts in segments:
            if len(acts) == 1:
                v = self.a[acts[0]]
            elif acts in known:
                v = known[acts]
            else:
                v = known[acts] = self.c.var(integer=False)
                for a in acts:
                    self.c.row([(v, 1.0), (self.a[a], -1.0)], 0.0, INF)
            for slot in range(k, last + 1):
                live[slot].append((v, size))
            k = last + 1

    def _retention_rows(self, i: int, r: Retention, live: list[list[tuple[int, float]]]) -> None:
        size = r.tensor.bytes
        k = 0
        if r.window is not None:
            for slot in range(r.window[0], r.window[1] + 1):
                live[slot].append((self.one, size))
            k = r.window[1] + 1
        for j, e in enumerate(r.events):
            for slot in range(k, e.slot):
                live[slot].append((self.held[i][j], size))
            if e.writes:
                for slot in range(e.begin, e.slot):
                    live[slot].append((self.a[e.activity], size))
            live[e.slot].append((self.resident[i][j], size))
            k = e.slot + 1

    def _flash_row(self) -> None:
        """Weights + code of the kernels and steps that are used <= flash."""
        p = self.problem
        terms: list[tuple[int, float]] = []
        kernels: dict[str, set[int]] = {}
        for s in p.slots:
            steps = 1 + len(p.storage.followers.get(s.node, ()))
            terms.append((self.a[s.activity], CODE_BYTES_PER_STEP * steps))
            nodes = [s.node]
            if s.update is not None and s.update.grad_node is not None and not s.last_micro:
                nodes.append(s.update.grad_node)
            for n in nodes:
                c = get_op(n.op).c
                if c is not None:
                    kernels.setdefault(c.symbol, set()).add(self.a[s.activity])
        for acts in kernels.values():
            if self.one in acts:
                terms.append((self.one, CODE_BYTES_PER_KERNEL))
                continue
            used = self.c.var(integer=False)
            for a in acts:
                self.c.row([(used, 1.0), (a, -1.0)], 0.0, INF)
            terms.append((used, CODE_BYTES_PER_KERNEL))
        terms += [(v, CODE_BYTES_PER_STEP) for v in self._transfers()]
        fixed = flash_weights_bytes(p.training) + CODE_BYTES_PER_STEP * len(
            p.storage.followers.get(None, ())
        )
        self.flash = [*terms, (self.one, float(fixed))]
        self.c.row(self.flash, -INF, p.limits.flash_bytes)

    def _transfers(self) -> list[int]:
        loads = [v for loads in self.loaded for v in loads.values()]
        return [*(s for s in self.stored if s is not None), *loads]

    def _storage_row(self) -> None:
        """Paged tensors together <= storage."""
        pages = [
            (s, float(r.tensor.bytes))
            for s, r in zip(self.stored, self.problem.retentions, strict=True)
            if s is not None
        ]
        if pages:
            self.c.row(pages, -INF, self.problem.limits.storage_bytes)

    def _latency_row(self) -> None:
        """Cycles of all active slots and transfers <= latency limit."""
        p = self.problem
        self.page_cycles: list[tuple[int, float]] = []
        for i, r in enumerate(p.retentions):
            stored = self.stored[i]
            if stored is None:
                continue
            n = p.micro_batches
            self.page_cycles.append((stored, n * p.cost.write_cycles(r.tensor.bytes)))
            read = n * p.cost.read_cycles(r.tensor.bytes)
            self.page_cycles += [(v, read) for v in self.loaded[i].values()]
        self.cycles = [(self.a[s.activity], float(s.cycles)) for s in p.slots] + self.page_cycles
        if p.limits.cycles is not None:
            self.c.row(self.cycles, -INF, p.limits.cycles)

    def _energy_row(self) -> None:
        """Energy of computing and of transfers <= energy limit."""
        p = self.problem
        per_cycle = p.cost.energy_j(1, 0)
        extra = p.cost.energy_j(1, 1) - per_cycle if p.cost.storage is not None else 0.0
        self.energy = [(v, c * per_cycle) for v, c in self.cycles]
        self.energy += [(v, c * extra) for v, c in self.page_cycles]
        if p.limits.energy_j is not None:
            self.c.row(self.energy, -INF, p.limits.energy_j)

    # -- solving ----------------------------------------------------------------------------------

    def objective(self, name: ObjectiveName) -> list[tuple[int, float]]:
        """Terms of an objective; learn is maximized, all others minimized."""
        if name == "learn":
            return [(self.a[a], float(g)) for a, g in self.problem.gain.items()]
        if name == "ram":
            return [(self.peak, 1.0)]
        return {"latency": self.cycles, "energy": self.energy, "flash": self.flash}[name]

    def solve(
        self,
        name: ObjectiveName,
        options: SolverOptions,
        on_message: Callable[[str], None] | None = None,
    ) -> SolveResult:
        """Solve for one objective.

        Raises:
            OdtPlanError: The solver failed.
        """
        model = mathopt.Model.from_model_proto(self._proto(name))
        parameters = mathopt.SolveParameters(
            relative_gap_tolerance=options.gap,
            time_limit=timedelta(seconds=options.time_limit_s),
            random_seed=options.seed,
            # math_opt's HiGHS runs in one thread and refuses the parameter
            threads=None if options.solver == "highs" else options.threads,
        )
        try:
            result = mathopt.solve(
                model,
                _SOLVERS[options.solver],
                params=parameters,
                msg_cb=None
                if on_message is None
                else lambda lines: [on_message(line) for line in lines] and None,
            )
        except Exception as e:  # the binding raises types of its own, by solver and version
            raise OdtPlanError(f"solver {options.solver} failed: {e}; try another --solver") from None
        reason = result.termination.reason
        seconds = result.solve_stats.solve_time.total_seconds()
        bounds = result.termination.objective_bounds
        if not result.has_primal_feasible_solution():
            proven = mathopt.TerminationReason.INFEASIBLE
            status = "infeasible" if reason == proven else "unknown"
            return SolveResult(status, float("nan"), bounds.dual_bound, None, "", seconds)  # type: ignore[arg-type]
        values = np.zeros(len(self.c.lower))
        for v, x in result.variable_values().items():
            values[v.id] = x
        value = float(sum(coef * values[col] for col, coef in self.objective(name)))
        optimal = reason == mathopt.TerminationReason.OPTIMAL
        return SolveResult(
            "optimal" if optimal else "feasible",
            value,
            bounds.dual_bound,
            self._solution(values),
            self._peak_node(values),
            seconds,
        )

    def _proto(self, name: ObjectiveName) -> model_pb2.ModelProto:
        c = self.c
        proto = model_pb2.ModelProto()
        n, m = len(c.lower), len(c.row_lower)
        proto.variables.ids.extend(range(n))
        proto.variables.lower_bounds.extend(c.lower)
        proto.variables.upper_bounds.extend(c.upper)
        proto.variables.integers.extend(c.integer)
        proto.linear_constraints.ids.extend(range(m))
        proto.linear_constraints.lower_bounds.extend(c.row_lower)
        proto.linear_constraints.upper_bounds.extend(c.row_upper)
        order = np.lexsort((c.cols, c.rows))
        proto.linear_constraint_matrix.row_ids.extend(np.asarray(c.rows)[order].tolist())
        proto.linear_constraint_matrix.column_ids.extend(np.asarray(c.cols)[order].tolist())
        proto.linear_constraint_matrix.coefficients.extend(np.asarray(c.coefs)[order].tolist())
        terms: dict[int, float] = {}
        for col, coef in self.objective(name):
            terms[col] = terms.get(col, 0.0) + coef
        proto.objective.maximize = name == "learn"
        proto.objective.linear_coefficients.ids.extend(sorted(terms))
        proto.objective.linear_coefficients.values.extend(terms[k] for k in sorted(terms))
        return proto

    def _peak_node(self, values: np.ndarray) -> str:  # type: ignore[type-arg]
        live = [sum(b * values[v] for v, b in terms) for terms in self.live]
        return self.problem.slots[int(np.argmax(live))].node.name

    def _solution(self, values: np.ndarray) -> Solution:  # type: ignore[type-arg]
        p = self.problem
        active = frozenset(a.index for a in p.activities if values[self.a[a.index]] > 0.5)
        loads = frozenset(
            (r.tensor.index, r.events[j].slot)
            for i, r in enumerate(p.retentions)
            for j, v in self.loaded[i].items()
            if values[v] > 0.5
        )
        return Solution(active, loads)
