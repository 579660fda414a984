"""The joint model as a mixed-integer linear program.

Variables, in the notation of docs/design.md: A (activity of slots; the update choices U, the
rebuild choices R and auxiliary choices F are among them), H (a tensor is held into an event), P (it
is paged in right before an event), O (it is paged out once), X (it is resident at an event).
All memory rows are linear: update choice is a knapsack, and it needs their LP bound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..ir.opdef import get_op
from .cost import flash_weights_bytes
from .linear import LinearProgram, SolverOptions, Status
from .plan import CODE_BYTES_PER_KERNEL, CODE_BYTES_PER_STEP, ObjectiveName
from .problem import ALWAYS, Problem, Retention
from .solution import Solution


@dataclass(frozen=True)
class SolveResult:
    """Outcome of one solve.

    Attributes:
        status: See ``linear.LinearResult``.
        value: Objective of the solution in the objective's unit; what its schedule takes can be
            less, by decisions that cost something and change nothing.
        bound: Proven bound on the objective of the whole problem.
        solution: Decisions, None without a solution.
        peak_node: Name of the node at whose slot most RAM is needed.
        time_s: Solve time.
    """

    status: Status
    value: float
    bound: float
    solution: Solution | None
    peak_node: str
    time_s: float


class Milp:
    """The program of one problem; constraints are methods, one each."""

    def __init__(self, problem: Problem) -> None:
        """Build variables and constraints."""
        self.problem = problem
        self.c = LinearProgram()
        self.one = self.c.column(integer=False, lower=1.0)
        self.a = [
            self.one if a.kind == "always" else self.c.column(integer=a.kind != "needed")
            for a in problem.activities
        ]
        self.held: list[list[int]] = []
        self.resident: list[list[int]] = []
        self.loaded: list[dict[int, int]] = []
        self.stored: list[int | None] = []
        for r in problem.retentions:
            self._retention_variables(r)
        self.peak = self.c.column(integer=False, upper=float("inf"))
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
        first = self.c.column(integer=True, upper=1.0 if r.window is not None else 0.0)
        self.held.append([first, *(self.c.column(integer=True) for _ in range(n - 1))])
        self.resident.append([self.c.column(integer=False) for _ in range(n)])
        loads = {j: self.c.column(integer=True) for j, e in enumerate(r.events) if e.may_load}
        self.loaded.append(loads)
        self.stored.append(self.c.column(integer=True) if loads else None)

    # -- constraints ------------------------------------------------------------------------------

    def _activities(self) -> None:
        """A needed backward node runs if one of its readers runs."""
        for a in self.problem.activities:
            for b in a.implied_by:
                self.c.row([(self.a[a.index], 1.0), (self.a[b], -1.0)], lower=0.0)

    def _one_candidate_each(self) -> None:
        """At most one candidate per parameter, and at least one update in all."""
        chosen = [a for acts in self.problem.choices.values() for a in acts if a != ALWAYS]
        for acts in self.problem.choices.values():
            if len(acts) > 1:
                self.c.row([(self.a[a], 1.0) for a in acts], 0.0, 1.0)
        if chosen:
            self.c.row([(self.a[a], 1.0) for a in chosen], lower=1.0)

    def _supply(self, i: int, r: Retention) -> None:
        """What is read or held on has been held, loaded or completed right then."""
        n = len(r.events)
        for j, e in enumerate(r.events):
            sources = [(self.held[i][j], 1.0)]
            if j in self.loaded[i]:
                sources.append((self.loaded[i][j], 1.0))
            if not e.writes:
                self.c.row([*sources, (self.a[e.activity], -1.0)], lower=0.0)
            x = self.resident[i][j]
            self.c.row([(x, 1.0), (self.a[e.activity], -1.0)], lower=0.0)
            if j + 1 < n:
                held_on = self.held[i][j + 1]
                made = [(self.a[e.activity], 1.0)] if e.writes else []
                self.c.row([*sources, *made, (held_on, -1.0)], lower=0.0)
                self.c.row([(x, 1.0), (held_on, -1.0)], lower=0.0)
        stored = self.stored[i]
        if stored is not None:
            for load in self.loaded[i].values():
                self.c.row([(stored, 1.0), (load, -1.0)], lower=0.0)
            self.c.row([(self.a[r.page_out_activity], 1.0), (stored, -1.0)], lower=0.0)

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
            self.c.row([*terms, *state, (self.peak, -1.0)], upper=0.0)
        self.c.row([(self.peak, 1.0)], upper=p.limits.ram_bytes)

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
                v = known[acts] = self.c.column(integer=False)
                for a in acts:
                    self.c.row([(v, 1.0), (self.a[a], -1.0)], lower=0.0)
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
            used = self.c.column(integer=False)
            for a in acts:
                self.c.row([(used, 1.0), (a, -1.0)], lower=0.0)
            terms.append((used, CODE_BYTES_PER_KERNEL))
        for stored, loads, r in zip(self.stored, self.loaded, p.retentions, strict=True):
            writer = r.tensor.writers[-1] if r.tensor.writers else None
            steps = 1 + len(p.storage.followers.get(writer, ()))  # a load shows its views again
            terms += [(v, CODE_BYTES_PER_STEP * steps) for v in loads.values()]
            if stored is not None:
                terms.append((stored, CODE_BYTES_PER_STEP))
        fixed = flash_weights_bytes(p.training) + CODE_BYTES_PER_STEP * len(
            p.storage.followers.get(None, ())
        )
        self.flash = [*terms, (self.one, float(fixed))]
        self.c.row(self.flash, upper=p.limits.flash_bytes)

    def _storage_row(self) -> None:
        """Paged tensors together <= storage."""
        pages = [
            (s, float(r.tensor.bytes))
            for s, r in zip(self.stored, self.problem.retentions, strict=True)
            if s is not None
        ]
        if pages:
            self.c.row(pages, upper=self.problem.limits.storage_bytes)

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
            self.c.row(self.cycles, upper=p.limits.cycles)

    def _energy_row(self) -> None:
        """Energy of computing and of transfers <= energy limit.

        Counted in the energy of one computing cycle: coefficients in joules would be too small for
        solvers that scale rows to integers.
        """
        p = self.problem
        self.joules_per_unit = p.cost.energy_j(1, 0)
        self.energy = list(self.cycles)
        if self.page_cycles:
            extra = p.cost.energy_j(1, 1) / self.joules_per_unit - 1.0
            self.energy += [(v, c * extra) for v, c in self.page_cycles]
        if p.limits.energy_j is not None:
            self.c.row(self.energy, upper=p.limits.energy_j / self.joules_per_unit)

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
        objective = self.objective(name)
        r = self.c.solve(objective, options, maximize=name == "learn", on_message=on_message)
        if r.values is None:
            return SolveResult(r.status, float("nan"), r.bound, None, "", r.time_s)
        unit = self.joules_per_unit if name == "energy" else 1.0
        bound = min(r.bound, self._most()) if name == "learn" else max(r.bound, 0.0)
        value = unit * float(sum(a * r.values[c] for c, a in objective))
        solution, peak = self._solution(r.values), self._peak_node(r.values)
        return SolveResult(r.status, value, unit * bound, solution, peak, r.time_s)

    def _most(self) -> float:
        """Importance without any limit; a solver that ran out of time may know no bound at all."""
        p = self.problem
        return sum(max(p.gain[a] for a in acts) for acts in p.choices.values())

    def _peak_node(self, values: NDArray[np.float64]) -> str:
        live = [sum(b * values[v] for v, b in terms) for terms in self.live]
        return self.problem.slots[int(np.argmax(live))].node.name

    def _solution(self, values: NDArray[np.float64]) -> Solution:
        p = self.problem
        active = frozenset(a.index for a in p.activities if values[self.a[a.index]] > 0.5)
        loads = frozenset(
            (r.tensor.index, r.events[j].slot)
            for i, r in enumerate(p.retentions)
            for j, v in self.loaded[i].items()
            if values[v] > 0.5
        )
        return Solution(active, loads)
