"""The stages of the lexicographic objective, from an annotated graph to a placed schedule.

*Learn* chooses updates and precisions. With them fixed, the next stage chooses what is streamed by
rows, rebuilt and paged, for latency or whatever is asked for. The graph is then built with the
streamed blocks, solved once more for what is kept, and placed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..ir.autodiff import build_training
from ..ir.errors import InfeasibleError
from ..ir.graph import Graph
from ..ir.precision import Precision, lower
from ..ir.streaming import blocks, stream
from ..ir.training import Candidate, TrainingGraph, TrainingSpec
from .choices import Choices, score_of
from .cost import CostModel
from .demands import Demand, impose
from .importance import prior
from .linear import SolverOptions
from .milp import Milp, SolveResult
from .plan import ObjectiveName
from .precision import NOISE_WEIGHT
from .problem import Limits, Problem
from .schedule import Schedule, realize
from .solution import Solution
from .timeline import build_problem

#: Solve again with a tighter RAM limit at most this often when live bytes fit but no layout does.
LAYOUT_TRIES = 6


class ProvenInfeasibleError(InfeasibleError):
    """The solver has proven that no plan keeps the limits that were asked for."""


class LayoutError(InfeasibleError):
    """Live bytes fit into the RAM budget, but no layout was found.

    Attributes:
        over_bytes: What the best layout needs beyond the budget.
    """

    def __init__(self, ram_bytes: int, over_bytes: int) -> None:
        """Say how much RAM to add."""
        super().__init__(
            f"live bytes fit into {ram_bytes:,} B of RAM, but no layout was found in {LAYOUT_TRIES}"
            f" tries; allow {over_bytes:,} B more with --ram"
        )
        self.over_bytes = over_bytes


@dataclass(frozen=True)
class Decided:
    """What stages have fixed so far.

    Attributes:
        updates: The update set.
        precision: Of each layer and input of an annotated graph.
        chosen: Layers whose precision was the solver's choice.
        streamed: Blocks that run by rows.
    """

    updates: tuple[Candidate, ...]
    precision: Mapping[str, Precision]
    chosen: frozenset[str] = frozenset()
    streamed: tuple[str, ...] = ()

    def taking(self, problem: Problem, solution: Solution) -> Decided:
        """With the precisions of a solution."""
        free = {m.name: m.activity in solution.active for m in problem.mixed_layers}
        mixed: dict[str, Precision] = {n: "mixed" for n, yes in free.items() if yes}
        return replace(
            self, precision={**self.precision, **mixed}, chosen=self.chosen | free.keys()
        )


@dataclass(frozen=True)
class Scheduled:
    """The outcome of all stages.

    Attributes:
        decided: Decisions.
        training: The training graph that the schedule's steps name.
        schedule: Placed.
        bound: Proven bound of the last stage's objective, for the budget that was asked for.
    """

    decided: Decided
    training: TrainingGraph
    schedule: Schedule
    bound: float


@dataclass
class Stages:
    """Solves for one model under one set of limits.

    Attributes:
        forward: Imported graph, annotated or not.
        spec: Loss, optimizer, micro-batches.
        cost: Predicted costs.
        limits: Budgets.
        options: How to solve.
        importance: Score of every candidate.
        noise: Layer -> squared error of its i8 weights, relative to its result's square.
        progress: Told what goes on.
        demands: Decisions that are given.
        time_s: Solve time so far.
    """

    forward: Graph
    spec: TrainingSpec
    cost: CostModel
    limits: Limits
    options: SolverOptions
    importance: Mapping[Candidate, int]
    noise: Mapping[str, float]
    progress: Callable[[str], None]
    demands: tuple[Demand, ...] = ()
    time_s: float = field(default=0.0, init=False)

    def lowered(self, decided: Decided, mixed: Sequence[str] = ()) -> Graph:
        """The forward graph in its precisions, these layers mixed as well."""
        if not self.forward.quantization:
            return self.forward
        wanted: dict[str, Precision] = {**decided.precision, **dict.fromkeys(mixed, _MIXED)}
        return stream(lower(self.forward, wanted), decided.streamed)

    def problem(
        self,
        training: TrainingGraph,
        *,
        fixed: bool,
        limits: Limits | None = None,
        choices: Choices | None = None,
        rebuild: bool = True,
    ) -> Problem:
        """The planning problem of a training graph."""
        problem = build_problem(
            training,
            self.cost,
            limits or self.limits,
            self._scores(training),
            fixed_updates=fixed,
            choices=choices,
            rebuild=rebuild,
        )
        return impose(problem, self.demands)

    def achieved(self, training: TrainingGraph) -> dict[Candidate, int]:
        """Importance of the graph's updates in the precision that they have."""
        scores = self._scores(training)
        return {u.candidate: score_of(u, scores[u.candidate]) for u in training.updates}

    def noise_avoided(self, decided: Decided) -> float:
        """Score of the layers that were chosen to be mixed; a pin decides nothing."""
        mixed = [n for n in decided.chosen if decided.precision[n] == _MIXED]
        return float(sum(self._noise_gain(mixed).values()))

    def learn(
        self, start: Decided, *, fixed: bool, free: Sequence[str], limits: Limits | None = None
    ) -> tuple[Decided, float]:
        """The update set and the precisions with the highest score, and a bound on it.

        Args:
            start: All candidates, or the update set; precisions as far as they are given.
            fixed: The update set is given.
            free: Layers whose precision is to be chosen.
            limits: Tighter than those asked for.

        Raises:
            InfeasibleError: No choice keeps the limits.
        """
        problem = self.learn_problem(start, fixed=fixed, free=free, limits=limits)
        self.progress(f"choosing updates and precisions: {len(problem.slots)} slots")
        result = self._solve(problem, "learn")
        assert result.solution is not None
        updates = start.updates if fixed else tuple(result.solution.candidates(problem))
        return replace(start, updates=updates).taking(problem, result.solution), result.bound

    def learn_problem(
        self, start: Decided, *, fixed: bool, free: Sequence[str], limits: Limits | None = None
    ) -> Problem:
        """What ``learn`` solves."""
        lowered = self.lowered(start)
        training = build_training(lowered, self.spec, start.updates)
        choices = self._choices(start, lowered, free)
        if not fixed and (self.limits.cycles, self.limits.energy_j) != (None, None):
            choices = replace(choices, parts=tuple(self._parts(start, lowered, free)))
        return self.problem(training, fixed=fixed, limits=limits, choices=choices)

    def schedule_problem(self, start: Decided, free: Sequence[str]) -> Problem:
        """What ``schedule`` solves first: everything but the updates is to be chosen."""
        problem = self._streaming_problem(start, free, self.limits)
        if problem is None:
            training = build_training(self.lowered(start), self.spec, start.updates)
            problem = self.problem(training, fixed=True)
        return problem

    def schedule(self, start: Decided, name: ObjectiveName, free: Sequence[str]) -> Scheduled:
        """Decide all but the updates until the layout, too, keeps the RAM budget.

        The bound is that of the first solve: it holds for the budget that was asked for, later ones
        hold for tighter budgets only.

        Args:
            start: The update set, and precisions as far as they are given.
            name: What to optimize.
            free: Layers whose precision is to be chosen.

        Raises:
            InfeasibleError: No choice keeps the limits.
            LayoutError: One does, but no layout was found.
        """
        limits, over = self.limits, 0
        decided, bound = self._streaming(start, name, free, limits)
        for _ in range(LAYOUT_TRIES):
            training = build_training(self.lowered(decided), self.spec, decided.updates)
            problem, result = self._keep(training, name, limits, bound)
            bound = result.bound if bound is None else bound
            if result.solution is not None:
                enough = None if name == "ram" else self.limits.ram_bytes
                seed = self.options.seed
                schedule = realize(problem, result.solution, seed=seed, enough_bytes=enough)
                over = schedule.arena_bytes + schedule.state_bytes - self.limits.ram_bytes
                if over <= 0:
                    return Scheduled(decided, training, schedule, bound)
                self.progress(f"live bytes fit, the layout is {over:,} B over: tightening")
                limits = replace(limits, ram_bytes=limits.ram_bytes - max(over, 4))
            else:  # tightened below what these blocks need
                try:
                    other, _ = self._streaming(start, name, free, limits)
                except InfeasibleError:
                    break
                if other == decided:
                    break
                decided = other
        raise LayoutError(self.limits.ram_bytes, over)

    def _keep(
        self, training: TrainingGraph, name: ObjectiveName, limits: Limits, bound: float | None
    ) -> tuple[Problem, SolveResult]:
        """Choose what is kept, rebuilt and paged; with a bound that is known, or a new one.

        The much smaller problem without rebuilding comes first: if its value is within the gap of
        the bound, rebuilding has nothing to add.
        """
        problem = self.problem(training, fixed=True, limits=limits, rebuild=False)
        result = self._without_rebuilds(problem, name, bound)
        if result is not None:
            return problem, result
        problem = self.problem(training, fixed=True, limits=limits)
        self.progress(f"choosing what is kept: {len(problem.slots)} slots")
        return problem, (self._solve if bound is None else self._attempt)(problem, name)

    def _without_rebuilds(
        self, problem: Problem, name: ObjectiveName, bound: float | None = None
    ) -> SolveResult | None:
        """Decide without rebuilding activations; no result where rebuilding might be better.

        Unless a bound is known, it is that of the problem in which rebuilding takes nothing.
        """
        result = self._attempt(problem, name)
        if result.solution is not None and bound is None:
            least = Milp(problem, relaxed=True).solve(name, self.options, self.progress)
            self.time_s += least.time_s
            bound = least.bound
        if bound is None or not result.value <= bound * (1 + self.options.gap):
            return None
        return replace(result, bound=bound)

    def _streaming(
        self, start: Decided, name: ObjectiveName, free: Sequence[str], limits: Limits
    ) -> tuple[Decided, float | None]:
        """Choose what is streamed, and precisions that are left; nothing in a float graph."""
        problem = self._streaming_problem(start, free, limits, rebuild=False)
        if problem is None:
            return start, None
        result = self._without_rebuilds(problem, name)
        if result is None:
            problem = self._streaming_problem(start, free, limits)
            assert problem is not None
            self.progress(f"choosing what is streamed by rows: {len(problem.slots)} slots")
            result = self._solve(problem, name)
        assert result.solution is not None
        active = result.solution.active
        streamed = tuple(b.name for b in problem.streams if b.activity in active)
        decided = replace(start, streamed=streamed)
        return decided.taking(problem, result.solution), result.bound

    def _streaming_problem(
        self, start: Decided, free: Sequence[str], limits: Limits, *, rebuild: bool = True
    ) -> Problem | None:
        """What ``_streaming`` solves, if there is anything to choose."""
        lowered = self.lowered(start)
        choices = self._choices(start, lowered, free)
        if not choices.blocks and not free:
            return None
        training = build_training(lowered, self.spec, start.updates)
        return self.problem(training, fixed=True, limits=limits, choices=choices, rebuild=rebuild)

    def _choices(self, start: Decided, lowered: Graph, layers: Sequence[str]) -> Choices:
        """Layers that may be mixed and blocks that may be streamed."""
        found = blocks(lowered)
        mixed = None
        if layers:
            mixed = build_training(self.lowered(start, layers), self.spec, start.updates)
        return Choices(
            mixed, self._noise_gain(layers), found, stream(lowered, [b.name for b in found])
        )

    def _parts(
        self, start: Decided, lowered: Graph, layers: Sequence[str]
    ) -> Iterator[tuple[TrainingGraph, TrainingGraph | None]]:
        """Training graphs in which every split of a weight that is offered occurs."""
        splits: dict[str, dict[int | None, Candidate]] = {}
        for c in start.updates:
            splits.setdefault(c.param, {}).setdefault(c.channels, c)
        ranked = [list(found.values()) for found in splits.values()]
        mixed = self.lowered(start, layers) if layers else None
        for i in range(max(map(len, ranked))):
            chosen = [found[min(i, len(found) - 1)] for found in ranked]
            if any(c.channels is not None for c in chosen):
                split = build_training(lowered, self.spec, chosen)
                yield split, None if mixed is None else build_training(mixed, self.spec, chosen)

    def _scores(self, training: TrainingGraph) -> dict[Candidate, int]:
        """Importance of the graph's updates; a ratio given by hand is scored beside the rest."""
        wanted = [u.candidate for u in training.updates]
        scores = prior(self.forward, [*self.importance, *wanted])
        return {c: scores[c] for c in wanted}

    def _noise_gain(self, layers: Sequence[str]) -> dict[str, int]:
        """What it is worth that a layer is mixed: the noise of its i8 weights."""
        most: dict[str, int] = {}
        for c, score in self.importance.items():
            most[c.param] = max(most.get(c.param, 0), score)
        unit = NOISE_WEIGHT * sum(most.values())
        return {n: round(unit * self.noise.get(n, 0.0)) for n in layers}

    def _solve(self, problem: Problem, name: ObjectiveName) -> SolveResult:
        """Solve; raises InfeasibleError if there is no solution."""
        result = self._attempt(problem, name)
        if result.status == "infeasible":
            if problem.limits is not self.limits:  # tightened for the layout
                raise InfeasibleError(f"no plan fits {problem.limits.ram_bytes:,} B of RAM")
            raise ProvenInfeasibleError("no plan fits")
        return result

    def _attempt(self, problem: Problem, name: ObjectiveName) -> SolveResult:
        """Solve; without a solution the result is proven infeasible."""
        result = Milp(problem).solve(name, self.options, self.progress)
        self.time_s += result.time_s
        if result.solution is None and result.status != "infeasible":
            raise InfeasibleError(
                f"no plan found within {self.options.time_limit_s:g} s, and none excluded;"
                " raise --time-limit or the budgets"
            )
        return result


_MIXED: Precision = "mixed"
