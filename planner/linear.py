"""Mixed-integer linear programs: collected as flat arrays, solved through ortools.math_opt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from math import ceil, floor
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from ortools.math_opt import model_pb2
from ortools.math_opt.python import mathopt

from ..ir.errors import OdtPlanError
from .progress import Watch
from .solver_log import read_line
from .solving import Left, run

SolverName = Literal["auto", "highs", "scip", "cp-sat"]
Status = Literal["optimal", "feasible", "infeasible", "unknown"]
_SOLVERS = {
    "highs": mathopt.SolverType.HIGHS,
    "scip": mathopt.SolverType.GSCIP,
    "cp-sat": mathopt.SolverType.CP_SAT,
}
#: ``auto`` is CP-SAT up to so many columns, beyond HiGHS (benchmarks/RESULTS.md).
LARGE = 1600
INF = float("inf")
#: Largest value of a column that CP-SAT looks at; left to itself it takes 10^7 for all there is.
LARGEST = 1e13
#: What a bound of whole numbers may be off.
ROUNDING = 1e-6
#: Part of a gap that ``Effort.below`` leaves unsought, so that no rounding takes a proof beyond it.
WITHIN = 1 - 1e-6
#: A linear expression: (column, coefficient) terms; columns may repeat.
Terms = Iterable[tuple[int, float]]


@dataclass(frozen=True)
class SolverOptions:
    """How to solve: open solvers only.

    Attributes:
        solver: ``auto``, ``highs``, ``scip`` or ``cp-sat``. CP-SAT proves the joint plan of
            ResNet-8 several times faster than the others, HiGHS that of MobileNetV2.
        gap: Relative gap at which to stop.
        time_limit_s: Wall clock limit: of one solve here, of the whole run in ``pipeline``.
        seed: Random seed.
        threads: Threads of SCIP and CP-SAT; HiGHS runs in one.
    """

    solver: SolverName = "auto"
    gap: float = 1e-3
    time_limit_s: float = 60.0
    seed: int = 0
    threads: int = 1


@dataclass(frozen=True)
class LinearResult:
    """Outcome of a solve.

    Attributes:
        status: ``optimal`` (within the gap), ``feasible``, ``infeasible`` (proven) or ``unknown``
            (the time limit came first).
        bound: Proven bound on the objective.
        values: Value per column, None without a solution.
        time_s: Solve time.
        reduced_costs: Per column; None for programs with integers.
    """

    status: Status
    bound: float
    values: NDArray[np.float64] | None
    time_s: float
    reduced_costs: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Effort:
    """What HiGHS may leave out; the result's bound is to be read with that in mind.

    Attributes:
        below: Only solutions of a minimized objective below this are sought: without one, the
            program is called infeasible, and of the bound only its minimum with ``below`` holds.
        root_only: End with what is found at the root of the search tree.
    """

    below: float = INF
    root_only: bool = False

    def tell(self, parameters: mathopt.SolveParameters, *, minimize: bool) -> None:
        """Set the options of the solver."""
        assert minimize or self.below == INF
        highs = parameters.highs
        highs.bool_options["mip_allow_restart"] = False
        if self.below < INF:
            highs.double_options["objective_bound"] = self.below
        if self.root_only:
            highs.int_options["mip_max_nodes"] = 1


@dataclass
class LinearProgram:
    """Bounded columns and sparse rows, handed to the solver at once."""

    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    integer: list[bool] = field(default_factory=list)
    row_lower: list[float] = field(default_factory=list)
    row_upper: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    coefficients: list[float] = field(default_factory=list)

    def column(self, *, integer: bool, lower: float = 0.0, upper: float = 1.0) -> int:
        """Add a variable and return its index."""
        self.lower.append(lower)
        self.upper.append(upper)
        self.integer.append(integer)
        return len(self.lower) - 1

    def row(self, terms: Terms, lower: float = -INF, upper: float = INF) -> None:
        """Add ``lower <= terms <= upper``."""
        total = summed(terms)
        self.rows += [len(self.row_lower)] * len(total)
        self.columns += total.keys()
        self.coefficients += total.values()
        self.row_lower.append(lower)
        self.row_upper.append(upper)

    def empty_rows(self, count: int, lower: float = -INF, upper: float = INF) -> int:
        """Add empty rows with equal bounds and return the index of the first."""
        first = len(self.row_lower)
        self.row_lower += [lower] * count
        self.row_upper += [upper] * count
        return first

    def terms(self, rows: ArrayLike, columns: ArrayLike, coefficients: ArrayLike) -> None:
        """Add terms to rows that exist; no column may occur in a row twice."""
        self.rows += np.asarray(rows).tolist()
        self.columns += np.asarray(columns).tolist()
        self.coefficients += np.asarray(coefficients, float).tolist()

    def solve(
        self,
        objective: Terms,
        options: SolverOptions,
        *,
        maximize: bool,
        watch: Watch | None = None,
        unit: float = 1.0,
        hint: Mapping[int, float] | None = None,
        effort: Effort | None = None,
    ) -> LinearResult:
        """Optimize.

        Args:
            objective: What to optimize.
            options: How.
            maximize: Its sense.
            watch: Told bounds as they are found; carries the wish to stop.
            unit: What 1 of the objective is for those who watch.
            hint: Column -> value of a solution to start from; columns may be missing.
            effort: What HiGHS may leave out.

        Raises:
            OdtPlanError: The solver failed or is not part of this ortools build.
        """
        solver = options.solver
        if solver == "auto":
            solver = "cp-sat" if len(self.lower) <= LARGE else "highs"
        watch = watch or Watch()
        total = summed(objective)
        program = self._in_integers() if solver == "cp-sat" else self
        model = mathopt.Model.from_model_proto(program._proto(total, maximize))
        parameters = mathopt.SolveParameters(
            relative_gap_tolerance=options.gap,
            time_limit=timedelta(seconds=options.time_limit_s),
            random_seed=options.seed,
            # math_opt's HiGHS runs in one thread and refuses the parameter
            threads=None if solver == "highs" else options.threads,
        )
        parameters.cp_sat.mip_max_bound = LARGEST
        # its LP presolve replaces columns by fractions of others, whether they are integers or
        # not: it called programs infeasible that have solutions, and made halves of 0 or 1 (9.15)
        parameters.cp_sat.mip_presolve_level = 0
        parameters.cp_sat.mip_compute_true_objective_bound = False  # forgets columns that are fixed
        if effort is not None:
            effort.tell(parameters, minimize=not maximize)
        start = None
        if hint is not None:
            start = mathopt.SolutionHint({model.get_variable(c): x for c, x in hint.items()})
        logged = _Logged(maximize, unit, watch)
        try:
            result = run(model, _SOLVERS[solver], parameters, start, logged.read, watch)
        except Exception as e:  # the binding raises types of its own, by solver and version
            raise OdtPlanError(f"solver {solver} failed: {e}; try another --solver") from None
        tighter = min if maximize else max
        limit = self._box_bound(total, maximize)
        if isinstance(result, Left):
            status: Status = "unknown" if result.values is None else "feasible"
            return LinearResult(status, tighter(logged.bound, limit), result.values, result.time_s)
        seconds = result.solve_stats.solve_time.total_seconds()
        bound = tighter(result.termination.objective_bounds.dual_bound, limit)
        if abs(bound) < INF and all(program.integer) and all(a == round(a) for a in total.values()):
            bound = floor(bound + ROUNDING) if maximize else ceil(bound - ROUNDING)
        reason = result.termination.reason
        if not result.has_primal_feasible_solution():
            proven = reason == mathopt.TerminationReason.INFEASIBLE
            return LinearResult("infeasible" if proven else "unknown", bound, None, seconds)
        values = self._per_column(result.variable_values())
        costs = None
        if result.has_dual_feasible_solution():
            costs = self._per_column(result.reduced_costs())
        optimal = reason == mathopt.TerminationReason.OPTIMAL
        return LinearResult("optimal" if optimal else "feasible", bound, values, seconds, costs)

    def _in_integers(self) -> LinearProgram:
        """The program as CP-SAT takes it: all columns are integers, if the rows are of such."""
        bounds = [*self.lower, *self.upper, *self.row_lower, *self.row_upper]
        data = np.array([b for b in bounds if abs(b) < INF] + self.coefficients)
        whole = bool((data == np.round(data)).all())
        return replace(self, integer=[True] * len(self.integer)) if whole else self

    def _per_column(self, found: Mapping[mathopt.Variable, float]) -> NDArray[np.float64]:
        values = np.zeros(len(self.lower))
        for variable, x in found.items():
            values[variable.id] = x
        return values

    def _box_bound(self, objective: Mapping[int, float], maximize: bool) -> float:
        """Bound on the objective by the bounds of its columns alone."""
        sign = 1.0 if maximize else -1.0
        ends = (self.upper[c] if a * sign > 0 else self.lower[c] for c, a in objective.items())
        return sum(a * x for (_, a), x in zip(objective.items(), ends, strict=True) if a)

    def _proto(self, total: Mapping[int, float], maximize: bool) -> model_pb2.ModelProto:
        proto = model_pb2.ModelProto()
        proto.variables.ids.extend(range(len(self.lower)))
        proto.variables.lower_bounds.extend(self.lower)
        proto.variables.upper_bounds.extend(self.upper)
        proto.variables.integers.extend(self.integer)
        proto.linear_constraints.ids.extend(range(len(self.row_lower)))
        proto.linear_constraints.lower_bounds.extend(self.row_lower)
        proto.linear_constraints.upper_bounds.extend(self.row_upper)
        order = np.lexsort((self.columns, self.rows))
        matrix = proto.linear_constraint_matrix
        matrix.row_ids.extend(np.asarray(self.rows)[order].tolist())
        matrix.column_ids.extend(np.asarray(self.columns)[order].tolist())
        matrix.coefficients.extend(np.asarray(self.coefficients)[order].tolist())
        proto.objective.maximize = maximize
        proto.objective.linear_coefficients.ids.extend(sorted(total))
        proto.objective.linear_coefficients.values.extend(total[c] for c in sorted(total))
        return proto


class _Logged:
    """What a solver's log has told."""

    def __init__(self, maximize: bool, unit: float, watch: Watch) -> None:
        self._maximize, self._unit, self._watch = maximize, unit, watch
        self.bound = INF if maximize else -INF

    def read(self, lines: Sequence[str]) -> None:
        """Read more lines, in the thread of the solver."""
        for line in lines:
            if (known := read_line(line, maximize=self._maximize)) is None:
                continue
            best, bound = (None if x is None else x * self._unit for x in known)
            if known[1] is not None:  # a logged figure is rounded in its last digits
                slack = 1e-6 * abs(known[1])
                self.bound = known[1] + (slack if self._maximize else -slack)
            self._watch.found(best, bound)


def summed(terms: Terms) -> dict[int, float]:
    """Coefficient per column."""
    total: dict[int, float] = {}
    for c, a in terms:
        total[c] = total.get(c, 0.0) + a
    return total
