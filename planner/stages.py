"""The stages of the lexicographic objective, from an annotated graph to a placed schedule.

*Learn* chooses updates and precisions. With them fixed, the next stage chooses what is streamed by
rows, rebuilt and paged, for latency or whatever is asked for. The graph is then built with the
streamed blocks, solved once more for what is kept, and placed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import nan

from ..ir.autodiff import build_training
from ..ir.errors import InfeasibleError
from ..ir.graph import Graph
from ..ir.precision import Precision, lower
from ..ir.streaming import Block, blocks, stream
from ..ir.training import Candidate, TrainingGraph, TrainingSpec
from .bounds import bound
from .choice import ChoiceByCuts, Cut, Make, Unfit
from .choices import Choices, score_of
from .core import Tree
from .cost import CostModel, code_bytes, flash_weights_bytes
from .decided import (
    MIXED,
    Decided,
    OutOfTimeError,
    ProvenInfeasibleError,
    Scheduled,
)
from .demands import Demand, impose
from .footprint import measure
from .greedy import keeping
from .importance import SGD_WORTH, scores
from .linear import SolverOptions
from .milp import Milp, SolveResult
from .objective import Goal, Weighted
from .order import arranged
from .plan import ImportanceTable, ObjectiveName
from .precision import NOISE_WEIGHT
from .problem import Limits, Problem
from .progress import Watch
from .remakes import Found
from .residency import Kept, Residency
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
        result = self.solve(problem, goal, share=LEARN_SHARE, begin=begin)
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
        unfit: Collection[Unfit] = (),
        *,
        gap: float | None = None,
        tree: Tree | None = None,
        share: float = CHOICE_SHARE,
        fails: bool = True,
    ) -> SolveResult:
        """The best updates over few cuts of the timeline; the bound is one of all plans.

        Args:
            problem: The problem.
            goal: The objective.
            cuts: Where it counts what is held and made again.
            unfit: What is not to be chosen.
            gap: Relative, what counts as nothing; None: that which was asked for.
            tree: Of fewer cuts and at least as much RAM; becomes that of these.
            share: Of the time that is left.
            fails: Raise errors.

        Raises:
            InfeasibleError: No choice keeps the limits.
            OutOfTimeError: None was found in time.
        """
        self.tell(f"choosing updates: {len(problem.slots)} slots, {len(cuts)} cuts", goal)
        if self.watch.over() and not fails:
            return SolveResult("unknown", nan, bound(problem, goal), None, "", 0.0)
        program = ChoiceByCuts(problem, cuts, goal, unfit)
        program.tree = tree
        result = self.solved(program, goal, share, gap=gap)
        self.cut_short |= result.status in ("feasible", "unknown")
        if fails and result.status == "infeasible":
            raise self.no_plan(problem.limits)
        if fails and result.solution is None:
            raise self.out_of_time()
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
        return self.problem(training, fixed=True, choices=self.streaming_choices(start, free))

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

    def most_gain(self, free: Sequence[str]) -> float:
        """Score without any limit, with these layers mixed."""
        return sum(self._most().values()) + sum(self._noise_gain(free).values())

    def _most(self) -> dict[str, int]:
        """Parameter -> the best score of its candidates, or of its adapter's."""
        most: dict[str, int] = {}
        for c, score in self.importance.items():
            most[c.param] = max(most.get(c.param, 0), score)
        for a in self.forward.adapters:
            of_adapter = sum(most.pop(p, 0) for p in a.params)
            most[a.choice] = max(most.get(a.choice, 0), of_adapter)
        return most

    def streaming_choices(self, start: Decided, free: Sequence[str]) -> Choices | None:
        """Blocks and precisions that are left to choose, if there are any."""
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
        unit = NOISE_WEIGHT * sum(self._most().values())
        return {n: round(unit * self.noise.get(n, 0.0)) for n in layers}

    def tell(self, text: str, goal: Goal) -> None:
        """Another stage begins."""
        self.watch.stage(text, "weighted" if isinstance(goal, Weighted) else goal)

    def solve(
        self, problem: Problem, goal: Goal, share: float = 1.0, begin: Solution | None = None
    ) -> SolveResult:
        """Solve; raises InfeasibleError if there is no solution."""
        result = self.attempt(problem, goal, share, begin)
        if result.status == "infeasible":
            raise self.no_plan(problem.limits)
        return result

    def no_plan(self, limits: Limits) -> InfeasibleError:
        """What is raised where it is proven that no plan keeps these limits."""
        if limits is not self.limits:  # tightened for the layout, or transfers wait
            return InfeasibleError(f"no plan fits {limits.ram_bytes:,} B of RAM")
        return ProvenInfeasibleError("no plan fits")

    def attempt(
        self, problem: Problem, goal: Goal, share: float = 1.0, begin: Solution | None = None
    ) -> SolveResult:
        """Solve in a share of the time that is left; else the problem is proven infeasible."""
        result = self.solved(Milp(problem, goal), goal, share, begin)
        self.cut_short |= result.status in ("feasible", "unknown")
        if result.solution is None and result.status != "infeasible":
            raise self.out_of_time()
        return result

    def solved(
        self,
        program: Milp,
        goal: Goal,
        share: float,
        begin: Solution | None = None,
        gap: float | None = None,
    ) -> SolveResult:
        """Whatever comes out in a share of the time that is left, within a gap."""
        if self.watch.over():
            raise self.out_of_time()
        limit_s = min(self.options.time_limit_s, max(share * self.watch.left_s, 0.01))
        options = replace(self.options, time_limit_s=limit_s, gap=gap or self.options.gap)
        result = program.solve(goal, options, self.watch, begin)
        self.time_s += result.time_s
        return result

    def by_cuts(self, residency: Residency, share: float, begin: Found | None = None) -> Kept:
        """Choose what is kept over few cuts of the timeline, in a share of the time that is left.

        Args:
            residency: With updates and blocks fixed.
            share: Of the time.
            begin: The cuts to begin with; None: none are known.
        """
        goal = residency.goal
        self.tell(f"choosing what is kept, by cuts: {len(residency.plain.slots)} slots", goal)
        watch = self.watch.part(share * self.watch.left_s, lambda _: None)
        kept = residency.kept(self.options, watch, begin)
        self.time_s += watch.elapsed_s
        if kept.result.solution is not None:
            self.watch.found(kept.result.value, kept.result.bound)
        return kept

    def out_of_time(self) -> OutOfTimeError:
        """What is raised where the time is over before there is a plan."""
        return OutOfTimeError(
            f"no plan found within {self.watch.limit_s:g} s, and none excluded;"
            " raise --time-limit or the budgets"
        )
