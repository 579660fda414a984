"""The exact trade-off between one limit and one objective: few solves, bounds on every point.

The best plan under a limit is monotone in the limit, and that is used three times. A plan that
takes ``u`` is valid for every budget from ``u`` on. A bound that is proven for a budget holds for
every smaller one. So a budget between what a plan takes and the budget that its bound was proven
for is answered already, and is not solved if the answer is within the gap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from glob import escape
from math import floor, inf, nextafter
from typing import Literal

from .ir.errors import InfeasibleError, OdtPlanError, UnsupportedModelError, UsageError
from .planner.importance import source_of_importance
from .planner.known import Known
from .planner.pipeline import Request
from .planner.plan import ALIGNMENT_BYTES
from .planner.sizes import LARGEST_BYTES, format_bytes, format_seconds
from .sweep import Executor, Figures, Outcome, Task, pack

XName = Literal["ram", "flash", "latency"]
YName = Literal["learn", "latency", "energy"]
Status = Literal["optimal", "feasible", "infeasible", "not found", "failed"]
#: A limit that no plan keeps; the explanation then tells the smallest that works.
_NOTHING: dict[XName, float] = {"ram": 1, "flash": 1, "latency": 1e-12}
#: Gap of the least x that the range ends with: it is where budgets are spread to, no point's value.
_END_GAP = 0.05
#: Rounding of bounds in solvers.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Point:
    """One budget of the curve.

    Attributes:
        budget: Limit on x, in bytes or seconds.
        figures: Of the best plan known for it; None: there is none.
        value: Of y: score, seconds or joules.
        bound: Proven for every plan within the budget.
        gap: Relative, |bound - value| / |value|.
        status: ``optimal``: within the gap that was asked for; ``not found``: no plan within the
            time limit or no layout, and none is excluded.
        made_for: Budget that the plan was solved for; None: for another question.
        seconds: Wall clock of the budget's own solve, 0 if it was answered without.
        reason: Why there is no plan.
    """

    budget: float
    figures: Figures | None
    value: float | None
    bound: float | None
    gap: float | None
    status: Status
    made_for: float | None
    seconds: float
    reason: str


@dataclass(frozen=True)
class Curve:
    """A trade-off.

    Attributes:
        model: File name.
        device: Id.
        x: What is limited.
        y: What is optimized under it.
        own_budget: What the device offers of x, less its reserve; None for latency.
        points: By rising budget.
        solves: Plans that were asked for, the ends of the range included.
        seconds: Their wall clock, summed.
        importance: Where the scores of updates come from.
    """

    model: str
    device: str
    x: XName
    y: YName
    own_budget: int | None
    points: tuple[Point, ...]
    solves: int
    seconds: float
    importance: str


class Tracer:
    """Finds one curve; ``curve`` tells at any time what is known."""

    def __init__(
        self,
        request: Request,
        x: XName,
        y: YName,
        *,
        points: int = 10,
        low: float | None = None,
        high: float | None = None,
    ) -> None:
        """Set up.

        Args:
            request: Model, device, what to train, and the limits other than x.
            x: What is limited.
            y: What is optimized.
            points: Number of budgets, both ends included.
            low: Smallest budget; None: the smallest that any plan keeps.
            high: Largest; None: that beyond which y no longer improves.

        Raises:
            UsageError: Model and options contradict each other.
        """
        if x == y:
            raise UsageError(f"--x and --y are both {x}; a trade-off is between two things")
        if low is not None and high is not None and low >= high:
            raise UsageError(f"--from {low:g} is not below --to {high:g}")
        if points < 2:
            raise UsageError(f"--points: {points} is no curve; give 2 or more")
        self._request = replace(
            request, objective=y, with_baselines=False, with_relaxations=False
        )
        self._task = pack(self._request, request.model.name)
        self._x, self._y = x, y
        self._count, self._low, self._high = points, low, high
        self._sign = 1.0 if y == "learn" else -1.0  # of "more is better"
        self._clock_hz = request.device.clock_hz.value
        self._budgets: list[float] = []
        #: Budget -> outcome of its own solve. Unlimited is a budget, too.
        self._solved: dict[float, Outcome] = {}
        #: Plans that other questions brought.
        self._others: list[Outcome] = []
        self._least: float | None = None
        self._solves, self._seconds = 0, 0.0

    def run(
        self,
        executor: Executor,
        on_round: Callable[[int], None] = lambda _: None,
        on_done: Callable[[], None] = lambda: None,
    ) -> Curve:
        """Find the range, then solve round by round what is not answered yet.

        The rounds halve the range, and what is solved in one depends on earlier rounds alone: the
        curve is the same with any number of workers.

        Args:
            executor: Makes the plans.
            on_round: Told before a round of tasks how many there are.
            on_done: Called after each.

        Raises:
            InfeasibleError: No budget works; says why.
        """
        self._executor, self._on_round, self._on_done = executor, on_round, on_done
        low, high = self._range()
        self._budgets = self._spread(low, high)
        for batch in _halvings(len(self._budgets)):
            todo = [b for i in batch if not self._answered(b := self._budgets[i])]
            if todo:
                self._ask([self._warm(b) for b in todo], todo)
        return self.curve()

    def curve(self) -> Curve:
        """What is known."""
        r = self._request
        reserve, own = r.device.reserve, None
        if self._x == "ram":
            own = max(n for _, n in r.device.ram_budgets)  # a budget is of one region
        elif self._x == "flash":
            own = max(0, r.device.flash_bytes - reserve.flash_bytes)
        return Curve(
            r.model.name,
            r.device.id,
            self._x,
            self._y,
            own,
            tuple(p for b in self._budgets if (p := self._point(b)) is not None),
            self._solves,
            self._seconds,
            source_of_importance(r.importance),
        )

    # -- the range --------------------------------------------------------------------------------

    def _range(self) -> tuple[float, float]:
        questions: dict[float, Request] = {}
        if self._high is None:
            questions[inf] = self._at(inf)
        if self._low is None:
            questions[0.0] = self._at(_NOTHING[self._x])
        if questions:
            self._ask(list(questions.values()), list(questions))
        high = self._high if self._high is not None else self._upper_end()
        if self._low is not None:
            return self._low, max(self._low, high)
        return min(self._lower_end(), high), high

    def _upper_end(self) -> float:
        """Least x with which the y of the unlimited plan is reached."""
        plan = self._solved[inf].figures
        if plan is None:
            raise _raised(self._solved[inf])
        gap = max(self._request.gap, _END_GAP)
        request = replace(self._at(inf), objective=self._x, gap=gap)
        if self._y == "learn":
            pins = [f"{escape(n)}=mixed" for n in plan.mixed]
            request = replace(request, train=plan.updates, precision=(*request.precision, *pins))
        elif self._y == "latency":
            request = replace(request, latency_s=_seconds(plan.cycles, self._clock_hz))
        else:
            request = replace(request, energy_j=plan.energy_j * (1 + _ROUNDING))
        self._ask([request], [None])
        return min(self._use(p) for _, _, p in self._plans())

    def _lower_end(self) -> float:
        """The smallest budget that works, from the explanation why none does."""
        nothing = self._solved.pop(0.0)
        for short in nothing.shortfalls:
            if short.limit == self._x:
                self._least = short.needs
                return short.works if short.works is not None else short.needs
        error = _raised(nothing)
        raise type(error)(f"{error}; the smallest budget is not known, give --from")

    def _spread(self, low: float, high: float) -> list[float]:
        """Budgets from low to high, both included."""
        steps = self._count - 1
        inner = [low + (high - low) * i / steps for i in range(1, steps)]
        if self._x != "latency":
            inner = [float(floor(b / ALIGNMENT_BYTES) * ALIGNMENT_BYTES) for b in inner]
        return sorted({low, high, *(b for b in inner if low < b < high)})

    # -- solving ----------------------------------------------------------------------------------

    def _at(self, budget: float) -> Request:
        """The request for one budget."""
        if self._x == "latency":
            return replace(self._request, latency_s=None if budget == inf else budget)
        limit = LARGEST_BYTES if budget == inf else int(budget)
        if self._x == "ram":
            return replace(self._request, ram_bytes=limit)
        return replace(self._request, flash_bytes=limit)

    def _warm(self, budget: float) -> Request:
        """The request for one budget, with what earlier rounds tell of it."""
        best, bound = self._best(budget), self._tightest(budget, reordered=False)
        unit = self._clock_hz if self._y == "latency" else 1.0  # its stage counts cycles
        known = Known(bound=None if bound is None else unit * bound)
        if best is not None and not best[2].reordered:
            known = replace(known, plan=best[1].plan, value=unit * self._value(best[2]))
        return replace(self._at(budget), known=known)

    def _ask(
        self, requests: Sequence[Request], budgets: Sequence[float | None]
    ) -> None:
        """Run requests; outcomes are kept under their budgets.

        Raises:
            UsageError, UnsupportedModelError: What is wrong with one request is wrong with all.
        """
        self._on_round(len(requests))
        tasks = [self._named(r, b) for r, b in zip(requests, budgets, strict=True)]

        def done(i: int, outcome: Outcome) -> None:
            budget = budgets[i]
            self._solves += 1
            self._seconds += outcome.seconds
            if budget is not None:
                self._solved[budget] = outcome
            elif outcome.figures is not None:
                self._others.append(outcome)
            self._on_done()

        self._executor.run(tasks, done)
        for outcome in self._solved.values():
            if outcome.exit_code in (UsageError.exit_code, UnsupportedModelError.exit_code):
                raise _raised(outcome)
            if outcome.figures is not None and self._y not in outcome.figures.stages:
                raise UsageError(
                    f"--y {self._y}: --train leaves nothing to choose, so it is the same for every"
                    " budget; choose --y latency or energy, or leave --train out"
                )

    def _named(self, request: Request, budget: float | None) -> Task:
        what = "" if budget is None else f", {self._x} {format_x(self._x, budget)}"
        return replace(self._task, name=f"{self._task.name}{what}", request=request)

    # -- what is known ----------------------------------------------------------------------------

    def _use(self, plan: Figures) -> float:
        if self._x == "latency":
            return _seconds(plan.cycles, self._clock_hz)
        return plan.ram_bytes if self._x == "ram" else plan.flash_bytes

    def _value(self, plan: Figures) -> float:
        if self._y == "learn":
            return plan.learn
        return plan.latency_s if self._y == "latency" else plan.energy_j

    def _bound(self, plan: Figures) -> float:
        """The bound of a plan's solve in the unit of y."""
        bound = plan.stages[self._y].bound
        return bound / self._clock_hz if self._y == "latency" else bound

    def _plans(self) -> Iterator[tuple[float | None, Outcome, Figures]]:
        for budget, outcome in (*self._solved.items(), *((None, o) for o in self._others)):
            if outcome.figures is not None:
                yield budget, outcome, outcome.figures

    def _best(self, budget: float) -> tuple[float | None, Outcome, Figures] | None:
        """The best plan that keeps a budget, of equal ones the smallest."""
        fit = [p for p in self._plans() if self._use(p[2]) <= budget]
        return max(
            fit,
            key=lambda f: (self._sign * self._value(f[2]), -self._use(f[2]), f[0] or inf),
            default=None,
        )

    def _tightest(self, budget: float, *, reordered: bool) -> float | None:
        """The tightest bound that holds for a budget: that of it, or of a larger one.

        It is of plans in the file's order of operators, or of reordered ones.

        Bounds are those of the planner's model, which can be a little stricter than its schedules
        (docs/design.md, known limits). One that a known plan beats is not used.
        """
        bounds = []
        for b, outcome in self._solved.items():
            if b < budget or outcome.figures is None or outcome.figures.reordered != reordered:
                continue
            bound, best = self._bound(outcome.figures), self._best(b)
            assert best is not None
            excess = self._sign * (self._value(best[2]) - bound)
            if excess <= _ROUNDING * abs(bound):
                bounds.append(bound)
        return min(bounds, key=lambda v: self._sign * v, default=None)

    def _answered(self, budget: float) -> bool:
        """Nothing is left to solve for this budget."""
        if budget in self._solved or self._impossible(budget):
            return True
        point = self._point(budget)
        return point is not None and point.status == "optimal"

    def _impossible(self, budget: float) -> bool:
        """It is proven that no plan keeps this budget."""
        least = self._least or 0.0
        for outcome in self._solved.values():
            needs = [s.needs for s in outcome.shortfalls if s.limit == self._x]
            least = max(least, *needs, 0.0)
        return budget < least and self._best(budget) is None

    def _point(self, budget: float) -> Point | None:
        """What is known of a budget; None: nothing yet."""
        own = self._solved.get(budget)
        seconds = own.seconds if own is not None else 0.0
        best = self._best(budget)
        if best is None:
            return self._unplanned(budget, own, seconds)
        made_for, _, plan = best
        value, bound = self._value(plan), self._tightest(budget, reordered=plan.reordered)
        if bound is None and own is not None:  # a reordered plan of another budget is better
            bound = self._tightest(budget, reordered=not plan.reordered)
        if bound is None:
            return None
        gap = max(0.0, self._sign * (bound - value)) / max(abs(value), 1e-9)
        within = gap <= max(self._request.gap, _ROUNDING)
        status: Status = "optimal" if within else "feasible"
        return Point(budget, plan, value, bound, gap, status, made_for, seconds, "")

    def _unplanned(self, budget: float, own: Outcome | None, seconds: float) -> Point | None:
        if own is None and not self._impossible(budget):
            return None
        status: Status = "infeasible"
        reason = f"no plan fits: {self._x} is too small, as for a larger budget"
        if own is not None:
            reason = own.reason
            if own.exit_code != InfeasibleError.exit_code:
                status = "failed"
            elif not own.shortfalls:
                status = "not found"
        return Point(budget, None, None, None, None, status, None, seconds, reason)


def format_x(x: XName, budget: float) -> str:
    """A budget with its unit."""
    if budget == inf:
        return "unlimited"
    return format_seconds(budget) if x == "latency" else format_bytes(int(budget))


def _seconds(cycles: int, clock_hz: float) -> float:
    """Seconds that are at least so many whole cycles, also after rounding."""
    s = cycles / clock_hz
    while int(s * clock_hz) < cycles:
        s = nextafter(s, inf)
    return s


def _halvings(count: int) -> Iterator[list[int]]:
    """Indices 0 to count - 1 in rounds: the ends, then the middles of what is between."""
    yield sorted({0, count - 1})
    spans = [(0, count - 1)]
    while spans := [s for s in spans if s[1] - s[0] > 1]:
        yield [(a + b) // 2 for a, b in spans]
        spans = [half for a, b in spans for half in ((a, (a + b) // 2), ((a + b) // 2, b))]


def _raised(outcome: Outcome) -> OdtPlanError:
    """The error of an outcome."""
    kinds = (UsageError, InfeasibleError, UnsupportedModelError)
    kind = next((k for k in kinds if k.exit_code == outcome.exit_code), OdtPlanError)
    return kind(outcome.reason)
