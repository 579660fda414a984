"""The stages of the lexicographic objective, from an annotated graph to a placed schedule.

*Learn* chooses updates and precisions. With them fixed, the next stage chooses what is streamed by
rows, rebuilt and paged, for latency or whatever is asked for. The graph is then built with the
streamed blocks, solved once more for what is kept, and placed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import nan

from ..ir.autodiff import build_training
from ..ir.errors import InfeasibleError
from ..ir.graph import Graph
from ..ir.precision import Precision, lower
from ..ir.streaming import Block, blocks, stream
from ..ir.training import Candidate, TrainingGraph, TrainingSpec
from .bounds import bound
from .choice import ChoiceByCuts, Cut, Make
from .choices import Choices, score_of
from .cost import CostModel, code_bytes, flash_weights_bytes
from .decided import (
    LAYOUT_TRIES,
    MIXED,
    SLACK,
    Decided,
    Excess,
    LateError,
    LayoutError,
    OutOfTimeError,
    ProvenInfeasibleError,
    Scheduled,
)
from .demands import Demand, impose
from .footprint import measure
from .greedy import keeping
from .importance import SGD_WORTH, scores
from .linear import INF, SolverOptions, Status
from .milp import Milp, SolveResult, is_timed
from .objective import Goal, Weighted, wants
from .order import arranged
from .plan import ImportanceTable, ObjectiveName
from .precision import NOISE_WEIGHT
from .problem import Limits, Problem
from .progress import Watch
from .residency import Residency
from .schedule import realize
from .solution import Solution
from .timeline import Rebuilds, build_problem

#: Parts of the time left that go into choosing updates, into each try without rebuilding, and into
#: choosing what is streamed.
LEARN_SHARE, PLAIN_SHARE, STREAMING_SHARE, CUTS_SHARE = 0.6, 0.3, 0.6, 0.6
#: The same for one choice of updates by cuts.
CHOICE_SHARE = 0.3
#: Slots without rebuilds beyond which the whole model is left out where cuts have found a plan,
#: and the part of the time left that goes into cuts there.
LARGE_SLOTS, LARGE_SHARE = 1000, 0.9


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
        watch: Told what goes on; says when to end.
        demands: Decisions that are given.
        all_updated: The update set is given, and only forms of its state are to be chosen.
        sgd_worth: Part of an update's importance that is left as plain SGD.
        measured: Where the scores come from; None: the prior.
        ranks: The order that nodes run in, see ``planner.order``; None: that of the file.
        time_s: Solve time so far.
        cut_short: A solve ended before its gap was closed.
    """

    forward: Graph
    spec: TrainingSpec
    cost: CostModel
    limits: Limits
    options: SolverOptions
    importance: Mapping[Candidate, int]
    noise: Mapping[str, float]
    watch: Watch
    demands: tuple[Demand, ...] = ()
    all_updated: bool = False
    sgd_worth: float = SGD_WORTH
    measured: ImportanceTable | None = None
    ranks: Mapping[str, int] | None = None
    time_s: float = field(default=0.0, init=False)
    cut_short: bool = field(default=False, init=False)
    _lowered: dict[tuple[tuple[str, Precision], ...], Graph] = field(
        default_factory=dict, init=False
    )
    _blocks: dict[Graph, tuple[tuple[Block, ...], Graph]] = field(default_factory=dict, init=False)
    _arranged: dict[TrainingGraph, TrainingGraph] = field(default_factory=dict, init=False)

    def lowered(self, decided: Decided, mixed: Sequence[str] = ()) -> Graph:
        """The forward graph in its precisions, these layers mixed as well."""
        if not self.forward.quantization:
            return self.forward
        wanted: dict[str, Precision] = {**decided.precision, **dict.fromkeys(mixed, MIXED)}
        key = tuple(wanted.items())
        if key not in self._lowered:
            self._lowered[key] = lower(self.forward, wanted)
        lowered = self._lowered[key]
        return stream(lowered, decided.streamed) if decided.streamed else lowered

    def problem(
        self,
        training: TrainingGraph,
        *,
        fixed: bool,
        limits: Limits | None = None,
        choices: Choices | None = None,
        rebuild: bool | Rebuilds = True,
    ) -> Problem:
        """The planning problem of a training graph."""
        problem = build_problem(
            self._in_order(training),
            self.cost,
            limits or self.limits,
            self._scores(training),
            fixed_updates=fixed,
            choices=choices,
            rebuild=rebuild,
        )
        demands = self.demands
        if self.all_updated and not fixed:
            demands += tuple(Demand("update", name) for name in problem.choices)
        return impose(problem, demands)

    def _in_order(self, training: TrainingGraph) -> TrainingGraph:
        if self.ranks is None:
            return training
        if training not in self._arranged:
            self._arranged[training] = arranged(training, self.ranks)
        return self._arranged[training]

    def residency(self, training: TrainingGraph, goal: Goal, limits: Limits) -> Residency:
        """What is kept, rebuilt and paged, all else decided."""

        def build(rebuild: bool | Rebuilds) -> Problem:
            return self.problem(training, fixed=True, limits=limits, rebuild=rebuild)

        return Residency(build(False), build, goal)

    def achieved(self, training: TrainingGraph) -> dict[Candidate, int]:
        """Importance of the graph's updates in the precision that they have."""
        scores = self._scores(training)
        return {u.candidate: score_of(u, scores[u.candidate]) for u in training.updates}

    def noise_avoided(self, decided: Decided) -> float:
        """Score of the layers that were chosen to be mixed; a pin decides nothing."""
        mixed = [n for n in decided.chosen if decided.precision[n] == MIXED]
        return float(sum(self._noise_gain(mixed).values()))

    def learn(
        self,
        start: Decided,
        *,
        fixed: bool,
        free: Sequence[str],
        limits: Limits | None = None,
        goal: Goal = "learn",
        known: Sequence[Decided] = (),
        proven: float | None = None,
    ) -> tuple[Decided, float]:
        """The update set and the precisions with the highest score, and a bound on it.

        Not all activations may be offered to be made again, but the bound is of all plans.

        Args:
            start: All candidates, or the update set; precisions as far as they are given.
            fixed: The update set is given.
            free: Layers whose precision is to be chosen.
            limits: Tighter than those asked for.
            goal: What to optimize instead.
            known: Decisions of plans that are known; the first that keeps the limits with nothing
                rebuilt is where the solver starts.
            proven: A bound of all plans that is known.

        Raises:
            InfeasibleError: No choice keeps the limits.
            OutOfTimeError: None was found in time.
        """
        problem = self.learn_problem(start, fixed=fixed, free=free, limits=limits, goal=goal)
        self.tell(f"choosing updates and precisions: {len(problem.slots)} slots", goal)
        begins = (self._beginning(problem, k, fixed=fixed) for k in known)
        begin = next((b for b in begins if measure(problem, b).keeps(problem.limits)), None)
        result = self._solve(problem, goal, share=LEARN_SHARE, begin=begin)
        assert result.solution is not None
        if problem.left_out is None:
            proven = result.bound
        elif proven is None:
            proven = self.choice(problem, goal, fails=False).bound
        updates = start.updates if fixed else tuple(result.solution.candidates(problem))
        return replace(start, updates=updates).taking(problem, result.solution), proven

    def may_reach(self, problem: Problem, value: float) -> bool:
        """The whole model may learn more than this: the bound of its LP does not exclude it."""
        if self.watch.over():
            return False
        watch = self.watch.part(PLAIN_SHARE * self.watch.left_s, lambda _: None)
        options = replace(self.options, time_limit_s=watch.left_s)
        return Milp(problem, "learn").relaxation("learn", options, watch) > value

    def choice(
        self,
        problem: Problem,
        goal: Goal,
        cuts: Collection[Cut | Make] = (),
        *,
        fails: bool = True,
    ) -> SolveResult:
        """The best updates over few cuts of the timeline; the bound is one of all plans.

        Args:
            problem: The problem.
            goal: The objective.
            cuts: Where it counts what is held and made again.
            fails: Raise errors.

        Raises:
            InfeasibleError: No choice keeps the limits.
            OutOfTimeError: None was found in time.
        """
        self.tell(f"choosing updates: {len(problem.slots)} slots, {len(cuts)} cuts", goal)
        if self.watch.over() and not fails:
            return SolveResult("unknown", nan, bound(problem, goal), None, "", 0.0)
        result = self._solved(ChoiceByCuts(problem, cuts, goal), goal, CHOICE_SHARE)
        self.cut_short |= result.status in ("feasible", "unknown")
        if fails and result.status == "infeasible":
            raise self._no_plan(problem.limits)
        if fails and result.solution is None:
            raise self._out_of_time()
        return result

    def _beginning(self, problem: Problem, known: Decided, *, fixed: bool) -> Solution:
        """Decisions as a solution, nothing rebuilt."""
        mixed = [n for n in known.chosen if known.precision[n] == MIXED]
        return keeping(problem, () if fixed else known.updates, known.streamed, mixed)

    def learn_problem(
        self,
        start: Decided,
        *,
        fixed: bool,
        free: Sequence[str],
        limits: Limits | None = None,
        goal: Goal = "learn",
    ) -> Problem:
        """What ``learn`` solves."""
        lowered = self.lowered(start)
        training = build_training(lowered, self.spec, start.updates)
        choices = self.choices(start, lowered, free)
        timed = (self.limits.cycles, self.limits.energy_j) != (None, None) or goal != "learn"
        if not fixed and timed:
            choices = replace(choices, parts=tuple(self._parts(start, lowered, free)))
        return self.problem(training, fixed=fixed, limits=limits, choices=choices)

    def schedule_problem(self, start: Decided, free: Sequence[str]) -> Problem:
        """What ``schedule`` solves first: everything but the updates is to be chosen."""
        training = build_training(self.lowered(start), self.spec, start.updates)
        return self.problem(training, fixed=True, choices=self._streaming_choices(start, free))

    def schedule(self, start: Decided, goal: Goal, free: Sequence[str]) -> Scheduled:
        """Decide all but the updates until the layout, too, keeps the RAM budget.

        The bound is that of the first solve: it holds for the budget that was asked for, later ones
        hold for tighter budgets only. The model may hide more of the page transfers than a schedule
        can. Where that leaves a gap, or breaks a limit, what is best with transfers that are waited
        for is scheduled as well: it takes no longer than its model says.

        Args:
            start: The update set, and precisions as far as they are given.
            goal: What to optimize.
            free: Layers whose precision is to be chosen.

        Raises:
            InfeasibleError: No choice keeps the limits.
            LayoutError: One does, but no layout was found.
            LateError: One does, but not with what its transfers really hide.
            OutOfTimeError: None was found in time.
        """
        limits = self.limits
        if not self.cost.overlaps or not is_timed(goal, limits):
            return self._scheduled(start, goal, free, limits)
        waiting = replace(limits, wait_for_transfers=True)
        try:
            first = self._scheduled(start, goal, free, limits)
        except LateError as late:
            try:
                return replace(self._scheduled(start, goal, free, waiting), bound=late.bound)
            except OutOfTimeError:
                raise
            except InfeasibleError:
                raise late from None
        reached = self.reached(first, goal)
        timed = wants(goal, "latency", "energy") and first.schedule.transfer_cycles > 0
        if not timed or reached <= first.bound * (1 + self.options.gap):
            return first
        try:
            second = self._scheduled(start, goal, free, waiting)
        except InfeasibleError:
            return first
        best = min((first, second), key=lambda s: self.reached(s, goal))
        return replace(best, bound=first.bound)

    def reached(self, done: Scheduled, goal: Goal) -> float:
        """What a schedule reaches of an objective."""
        s = done.schedule
        figures: dict[ObjectiveName, float] = {
            "latency": s.cycles,
            "energy": self.cost.energy_j(s.cycles, s.transfer_cycles),
            "ram": max(s.live) + s.state_bytes,
            "learn": sum(self.achieved(done.training).values()) + self.noise_avoided(done.decided),
        }
        by_name = {n.name: n for n in done.training.graph.nodes}
        figures["flash"] = flash_weights_bytes(done.training) + code_bytes(
            [by_name[name] for step in s.steps for name in step.nodes], len(s.steps)
        )
        return goal.value(figures) if isinstance(goal, Weighted) else figures[goal]

    def _scheduled(
        self, start: Decided, goal: Goal, free: Sequence[str], limits: Limits
    ) -> Scheduled:
        """``schedule`` under one way to count transfers."""
        if self.watch.over():
            raise self._out_of_time()
        excess = Excess()
        decided, proven = self._streaming(start, goal, free, limits)
        for tried in range(LAYOUT_TRIES):
            if tried and self.watch.over():
                raise self._out_of_time()
            training = build_training(self.lowered(decided), self.spec, decided.updates)
            problem, result = self._keep(training, goal, limits, proven)
            proven = result.bound if proven is None else proven
            if result.solution is not None:
                result = self._moving_less(problem, goal, result)
                assert result.solution is not None
                enough = None if wants(goal, "ram") else self.limits.ram_bytes
                schedule = realize(
                    problem,
                    result.solution,
                    seed=self.options.seed,
                    enough_bytes=enough,
                    quick=self.watch.over() is not None,
                    hide_within=None if enough is None else self.limits,
                )
                excess = Excess.of(schedule, problem, self.limits)
                hides = schedule.transfer_cycles and not limits.wait_for_transfers
                if excess and not excess.ram_bytes and self.cost.overlaps and hides:
                    raise LateError(self.cost.latency_s(schedule.cycles), proven)
                if not excess:
                    return Scheduled(decided, training, schedule, proven)
                self.tell(f"{excess}: tightening", goal)
                limits = excess.off(limits, tried * schedule.arena_bytes // SLACK)
            else:  # tightened below what these blocks need
                try:
                    other, _ = self._streaming(start, goal, free, limits)
                except OutOfTimeError:
                    raise
                except InfeasibleError:
                    break
                if other == decided:
                    break
                decided = other
        raise LayoutError(self.limits, excess)

    def _moving_less(self, problem: Problem, goal: Goal, found: SolveResult) -> SolveResult:
        """Of solutions that are as good, one with few transfers, which a schedule can hide."""
        assert found.solution is not None
        modelled = self.cost.overlaps and not problem.limits.wait_for_transfers
        modelled = modelled and is_timed(goal, problem.limits)
        if not modelled or not found.solution.loads or self.watch.over():
            return found
        shy = Milp(problem, goal, shy=True)
        other = self._solved(shy, goal, PLAIN_SHARE, found.solution)
        return found if other.solution is None else other

    def most_gain(self, free: Sequence[str]) -> float:
        """Score without any limit, with these layers mixed."""
        most: dict[str, int] = {}
        for c, score in self.importance.items():
            most[c.param] = max(most.get(c.param, 0), score)
        return sum(most.values()) + sum(self._noise_gain(free).values())

    def _keep(
        self, training: TrainingGraph, goal: Goal, limits: Limits, proven: float | None
    ) -> tuple[Problem, SolveResult]:
        """Choose what is kept, rebuilt and paged; with a bound that is known, or a new one."""
        residency = self.residency(training, goal, limits)
        by_cuts = self._by_cuts(residency, goal) if residency.priced else None
        if by_cuts is not None:
            if by_cuts[1].status == "infeasible" and proven is None:
                raise self._no_plan(limits)
            if by_cuts[1].status == "infeasible" or self._within_gap(by_cuts[1]):
                return by_cuts
            if by_cuts[1].solution is not None and _large(residency):
                self.cut_short = True
                return by_cuts
        try:
            problem, result = self._decide(
                lambda rebuild: self.problem(training, fixed=True, limits=limits, rebuild=rebuild),
                "choosing what is kept",
                goal,
                proven,
            )
        except OutOfTimeError:
            if by_cuts is None or by_cuts[1].solution is None:
                raise
            self.cut_short = True
            return by_cuts
        if by_cuts is None:
            return (
                self._less_ram(residency, problem, result) if goal == "ram" else (problem, result)
            )
        proven = max(result.bound, by_cuts[1].bound)
        if by_cuts[1].value <= result.value or result.solution is None:
            problem, result = by_cuts
        return problem, replace(result, bound=proven)

    def _less_ram(
        self, residency: Residency, problem: Problem, result: SolveResult
    ) -> tuple[Problem, SolveResult]:
        """What is kept with less RAM than the whole model finds, and a bound on it."""
        if result.solution is None or self._within_gap(result) or self.watch.over():
            return problem, result
        watch = self.watch.part(CUTS_SHARE * self.watch.left_s, lambda _: None)
        low, less = residency.least_ram(round(result.value), self.options, watch)
        result = replace(result, bound=max(float(low), result.bound))
        if less is None:
            return problem, result
        ram = measure(*less).ram_bytes
        return less[0], replace(result, value=float(ram), solution=less[1])

    def _by_cuts(self, residency: Residency, goal: Goal) -> tuple[Problem, SolveResult]:
        """Choose what is kept by a program over few cuts of the timeline."""
        self.tell(f"choosing what is kept, by cuts: {len(residency.plain.slots)} slots", goal)
        share = LARGE_SHARE if _large(residency) else CUTS_SHARE
        watch = self.watch.part(share * self.watch.left_s, lambda _: None)
        found = residency.search(self.options, watch)
        self.time_s += watch.elapsed_s
        bound, value = residency.total(found.bound), residency.total(found.price)
        decided = residency.decided(found)
        if decided is None:
            status: Status = "infeasible" if found.bound == INF else "unknown"
            return residency.plain, SolveResult(status, nan, bound, None, "", watch.elapsed_s)
        self.watch.found(value, bound)
        problem, solution = decided
        return problem, SolveResult("feasible", value, bound, solution, "", watch.elapsed_s)

    def _within_gap(self, result: SolveResult) -> bool:
        return result.value <= result.bound * (1 + self.options.gap)

    def _streaming(
        self, start: Decided, goal: Goal, free: Sequence[str], limits: Limits
    ) -> tuple[Decided, float | None]:
        """Choose what is streamed, and precisions that are left; nothing in a float graph."""
        choices = self._streaming_choices(start, free)
        if choices is None:
            return start, None
        training = build_training(self.lowered(start), self.spec, start.updates)
        problem, result = self._decide(
            lambda rebuild: self.problem(
                training, fixed=True, limits=limits, choices=choices, rebuild=rebuild
            ),
            "choosing what is streamed by rows",
            goal,
            share=STREAMING_SHARE,
        )
        assert result.solution is not None
        active = result.solution.active
        streamed = tuple(b.name for b in problem.streams if b.activity in active)
        decided = replace(start, streamed=streamed)
        return decided.taking(problem, result.solution), result.bound

    def _decide(
        self,
        build: Callable[[bool], Problem],
        what: str,
        goal: Goal,
        proven: float | None = None,
        share: float = 1.0,
    ) -> tuple[Problem, SolveResult]:
        """Solve a problem, built with rebuilding or without; only with a bound may it fail.

        The much smaller problem without rebuilding comes first: if its value is within the gap of
        the bound, rebuilding has nothing to add. It is also what counts if the time is over then.
        """
        plain = build(False)
        self.tell(f"{what}, nothing rebuilt: {len(plain.slots)} slots", goal)
        first = self._without_rebuilds(plain, goal, proven)
        if first is not None and self._within_gap(first):
            return plain, first
        problem = build(True)
        self.tell(f"{what}: {len(problem.slots)} slots", goal)
        try:
            result = (self._solve if proven is None else self._attempt)(problem, goal, share)
        except OutOfTimeError:
            if first is None:
                raise
            self.cut_short = True
            return plain, first
        if problem.left_out is not None:
            of_all = bound(plain, goal) if first is None else first.bound
            result = replace(result, bound=of_all)
        if first is not None and not result.value < first.value:  # nan: no solution
            return plain, replace(first, bound=max(first.bound, result.bound))
        return problem, result

    def _without_rebuilds(
        self, problem: Problem, goal: Goal, proven: float | None
    ) -> SolveResult | None:
        """Decide without rebuilding activations, with a bound that holds for any rebuilding.

        Unless a bound is known, it is that of the problem in which rebuilding takes nothing.
        """
        result = self._solved(Milp(problem, goal), goal, PLAIN_SHARE)
        if result.solution is None:
            return None
        if proven is None:
            proven = 0.0
            if not self.watch.over():
                relaxed = Milp(problem, goal, relaxed=True)
                proven = self._solved(relaxed, goal, PLAIN_SHARE).bound
        return replace(result, bound=proven)

    def _streaming_choices(self, start: Decided, free: Sequence[str]) -> Choices | None:
        """What ``_streaming`` chooses from, if there is anything."""
        choices = self.choices(start, self.lowered(start), free)
        return choices if choices.blocks or free else None

    def choices(self, start: Decided, lowered: Graph, layers: Sequence[str]) -> Choices:
        """Layers that may be mixed and blocks that may be streamed."""
        if lowered not in self._blocks:
            known = blocks(lowered)
            self._blocks[lowered] = known, stream(lowered, [b.name for b in known])
        found, streamed = self._blocks[lowered]
        mixed = None
        if layers:
            mixed = build_training(self.lowered(start, layers), self.spec, start.updates)
        return Choices(mixed, self._noise_gain(layers), found, streamed)

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
        found = scores(self.forward, [*self.importance, *wanted], self.measured, self.sgd_worth)
        return {c: found[c] for c in wanted}

    def _noise_gain(self, layers: Sequence[str]) -> dict[str, int]:
        """What it is worth that a layer is mixed: the noise of its i8 weights."""
        most: dict[str, int] = {}
        for c, score in self.importance.items():
            most[c.param] = max(most.get(c.param, 0), score)
        unit = NOISE_WEIGHT * sum(most.values())
        return {n: round(unit * self.noise.get(n, 0.0)) for n in layers}

    def tell(self, text: str, goal: Goal) -> None:
        """Another stage begins."""
        self.watch.stage(text, "weighted" if isinstance(goal, Weighted) else goal)

    def _solve(
        self, problem: Problem, goal: Goal, share: float = 1.0, begin: Solution | None = None
    ) -> SolveResult:
        """Solve; raises InfeasibleError if there is no solution."""
        result = self._attempt(problem, goal, share, begin)
        if result.status == "infeasible":
            raise self._no_plan(problem.limits)
        return result

    def _no_plan(self, limits: Limits) -> InfeasibleError:
        if limits is not self.limits:  # tightened for the layout, or transfers wait
            return InfeasibleError(f"no plan fits {limits.ram_bytes:,} B of RAM")
        return ProvenInfeasibleError("no plan fits")

    def _attempt(
        self, problem: Problem, goal: Goal, share: float = 1.0, begin: Solution | None = None
    ) -> SolveResult:
        """Solve in a share of the time that is left; else the problem is proven infeasible."""
        result = self._solved(Milp(problem, goal), goal, share, begin)
        self.cut_short |= result.status in ("feasible", "unknown")
        if result.solution is None and result.status != "infeasible":
            raise self._out_of_time()
        return result

    def _solved(
        self, program: Milp, goal: Goal, share: float, begin: Solution | None = None
    ) -> SolveResult:
        """Whatever comes out in a share of the time that is left."""
        if self.watch.over():
            raise self._out_of_time()
        left_s = max(share * self.watch.left_s, 0.01)
        options = replace(self.options, time_limit_s=min(self.options.time_limit_s, left_s))
        result = program.solve(goal, options, self.watch, begin)
        self.time_s += result.time_s
        return result

    def _out_of_time(self) -> OutOfTimeError:
        return OutOfTimeError(
            f"no plan found within {self.watch.limit_s:g} s, and none excluded;"
            " raise --time-limit or the budgets"
        )


def _large(residency: Residency) -> bool:
    return len(residency.plain.slots) > LARGE_SLOTS
