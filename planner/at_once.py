"""The first plan: heuristics for updates, blocks and residency, placed; no solver is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..ir.autodiff import build_training
from ..ir.training import TrainingGraph
from .bounds import bound
from .cuts import ANY
from .decided import LAYOUT_TRIES, SLACK, Decided, Excess, Scheduled
from .footprint import measure
from .greedy import blocks_to_stream, choose_updates, keeping
from .objective import Goal, wants
from .plan import ObjectiveName
from .problem import Limits, Problem
from .progress import Watch
from .remakes import Found
from .residency import Residency
from .schedule import Schedule, realize
from .solution import Solution
from .stages import Stages


@dataclass(frozen=True)
class Effort:
    """What cuts may take to find what is kept.

    Attributes:
        share: Part of the time left.
        rounds: Programs that are solved.
        gap: Relative, what counts as none; None: that which was asked for.
        thorough: A long search for a layout follows short ones that are all over the limits.
    """

    share: float
    rounds: int
    gap: float | None = None
    thorough: bool = False


#: For a plan at once, and for any that fits.
QUICK, FIT = Effort(0.1, 8), Effort(0.1, 40, gap=ANY, thorough=True)
#: Told a problem, and what a search has found of it, where that is no plan.
Miss = Callable[[Residency, Found, Watch], None]
#: Budgets that are tried where RAM is to be least.
BISECTIONS = 8


def at_once(
    stages: Stages, start: Decided, goal: Goal, *, fixed: bool, free: Sequence[str] = ()
) -> Scheduled | None:
    """A placed schedule without any solver; None: the heuristics found none.

    They know nothing of demands, and so find nothing where decisions are given.

    Args:
        stages: Of the model and its limits.
        start: All candidates, or the update set; precisions as far as they are given.
        goal: What its bound is of.
        fixed: The update set is given.
        free: Layers whose precision could still be chosen: the bound is to hold for them too.
    """
    if stages.demands:
        return None
    stages.tell("planning by heuristics", goal)
    problem = _plain_problem(stages, start, fixed=fixed)

    def decide(limits: Limits) -> Decided | None:
        tight = replace(problem, limits=limits)
        if fixed:
            return replace(start, streamed=tuple(blocks_to_stream(tight)))
        chosen = choose_updates(tight)
        if chosen is None:
            return None
        return replace(start, updates=tuple(chosen[0]), streamed=tuple(chosen[1]))

    loose = bool(problem.streams or free)
    return _placed(stages, decide, goal, QUICK, fixed=fixed, loose=loose)


def fitting(
    stages: Stages,
    decided: Decided,
    goal: Goal,
    *,
    loose: bool,
    miss: Miss | None = None,
) -> Scheduled | None:
    """A placed schedule of these updates and streamed blocks; None: none was found that fits.

    Args:
        stages: Of the model and its limits.
        decided: All but what is kept, rebuilt and paged.
        goal: What its bound is of.
        loose: Blocks or precisions could have been chosen otherwise.
        miss: Told what a search has proven that has found no plan.
    """
    return _placed(stages, lambda _: decided, goal, FIT, fixed=True, loose=loose, miss=miss)


def _placed(
    stages: Stages,
    decide: Callable[[Limits], Decided | None],
    goal: Goal,
    effort: Effort,
    *,
    fixed: bool,
    loose: bool,
    miss: Miss | None = None,
) -> Scheduled | None:
    """Decide, keep or drop, and place, with less RAM after a layout that is over the limits.

    The bound is that of the first try, if its updates are all that there are: it holds for the RAM
    that was asked for, and for all that can be chosen.
    """
    limits, least = stages.limits, 0.0
    over: tuple[Decided, TrainingGraph, Problem, Solution] | None = None  # of all the RAM

    def realized(kept: Problem, solution: Solution, *, quick: bool) -> Schedule:
        ram = wants(goal, "ram")
        return realize(
            kept,
            solution,
            seed=stages.options.seed,
            enough_bytes=None if ram else stages.limits.ram_bytes,
            quick=quick,
            hide_within=None if ram else stages.limits,
        )

    for _ in range(LAYOUT_TRIES):
        decided = decide(limits)
        if decided is None:
            break
        training = build_training(stages.lowered(decided), stages.spec, decided.updates)
        residency = stages.residency(training, goal, limits)
        found, proven = _keep_all_or_drop(stages, residency, effort, miss)
        miss = None  # less RAM would tell less
        if found is None:
            break
        kept, solution = found
        if limits is not stages.limits:
            proven = least if fixed else 0.0
        least = 0.0 if loose else max(proven, bound(kept, goal))
        schedule = realized(kept, solution, quick=True)
        excess = Excess.of(schedule, kept, stages.limits)
        if not excess:
            return Scheduled(decided, training, schedule, least, loose)
        over = over or (decided, training, kept, solution)
        limits = excess.off(limits, schedule.arena_bytes // SLACK)
        # hardly another plan; the last tries evict
        effort = replace(effort, rounds=effort.rounds // 2)
    if over is None or not effort.thorough:
        return None
    decided, training, kept, solution = over
    schedule = realized(kept, solution, quick=False)
    if Excess.of(schedule, kept, stages.limits):
        return None
    return Scheduled(decided, training, schedule, least, loose)


def tightened(stages: Stages, done: Scheduled, goal: Goal, free: Sequence[str]) -> Scheduled:
    """The schedule with the bound of its update set that takes no solver."""
    problem = _plain_problem(stages, replace(done.decided, streamed=()), fixed=True, free=free)
    return replace(done, bound=bound(problem, goal), loose=False)


def reference(stages: Stages, plain: Decided) -> dict[ObjectiveName, float]:
    """What plain training takes: these updates, everything kept, whatever the limits."""
    training = build_training(stages.lowered(plain), stages.spec, plain.updates)
    problem = stages.problem(training, fixed=True, rebuild=False)
    found = measure(problem, keeping(problem, (), ()))
    return {
        "learn": float(sum(stages.achieved(training).values())),
        "latency": float(found.cycles),
        "energy": found.energy_j,
        "ram": float(found.ram_bytes),
        "flash": float(found.flash_bytes),
    }


def bound_of_all(stages: Stages, start: Decided, goal: Goal, free: Sequence[str]) -> float:
    """Bound on an objective over all choices of updates and precisions, without a solver."""
    return bound(_plain_problem(stages, start, fixed=False, free=free), goal)


def _plain_problem(
    stages: Stages, start: Decided, *, fixed: bool, free: Sequence[str] = ()
) -> Problem:
    """The problem without rebuilding."""
    lowered = stages.lowered(start)
    training = build_training(lowered, stages.spec, start.updates)
    choices = stages.choices(start, lowered, free)
    return stages.problem(training, fixed=fixed, choices=choices, rebuild=False)


def _keep_all_or_drop(
    stages: Stages, residency: Residency, effort: Effort, miss: Miss | None
) -> tuple[tuple[Problem, Solution] | None, float]:
    """Fixed decisions that keep the limits, with as little rebuilt and paged as that takes.

    With a bound on the objective of all such decisions.
    """
    plain = residency.plain
    solution = keeping(plain, (), ())
    needs = measure(plain, solution)
    if residency.goal == "ram":
        return _little_ram(residency, (plain, solution)), 0.0
    if needs.keeps(plain.limits):
        return (plain, solution), 0.0
    watch = stages.watch.part(effort.share * stages.watch.left_s, lambda _: None)
    timed = plain.limits.cycles is not None or plain.limits.energy_j is not None
    options = stages.options
    if effort.gap is not None and not timed:
        options = replace(options, gap=effort.gap)
        first = residency.first(1)
        if first is not None and (decided := residency.decided(first)) is not None:
            return decided, 0.0
    best = residency.search(options, watch, effort.rounds)
    decided = residency.decided(best)
    if decided is None and miss is not None:
        miss(residency, best, watch)
    return decided, residency.total(best.bound) if residency.priced else 0.0


def _little_ram(
    residency: Residency, every: tuple[Problem, Solution]
) -> tuple[Problem, Solution] | None:
    """Decisions that evict for as little RAM as bisection finds; at first everything is kept."""
    plain, kept = residency.plain, measure(*every)
    best = every if kept.keeps(plain.limits) else None
    low, high = int(bound(plain, "ram")), min(kept.ram_bytes, plain.limits.ram_bytes + 4)
    for _ in range(BISECTIONS):
        limits = replace(plain.limits, ram_bytes=(low + high) // 2)
        part = Residency(replace(plain, limits=limits), residency.build, residency.goal)
        found = part.first()
        decided = None if found is None else residency.decided(found)
        if decided is None:
            low = limits.ram_bytes
        else:
            best, high = decided, measure(*decided).ram_bytes
    return best
