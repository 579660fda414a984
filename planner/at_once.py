"""The first plan: heuristics for updates, blocks and residency, placed; no solver is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..ir.autodiff import build_training
from ..ir.training import Candidate, TrainingGraph
from .baselines import greedy
from .bounds import bound
from .decided import LAYOUT_TRIES, Decided, Excess, Scheduled
from .footprint import measure
from .greedy import blocks_to_stream, choose_updates, keeping
from .objective import Goal, wants
from .plan import ObjectiveName
from .problem import Limits, Problem
from .schedule import realize
from .solution import Solution
from .stages import Stages


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
    limits, problem = stages.limits, _plain_problem(stages, start, fixed=fixed)
    for _ in range(LAYOUT_TRIES):
        tight = replace(problem, limits=limits)
        if fixed:
            decided = replace(start, streamed=tuple(blocks_to_stream(tight)))
        elif (chosen := choose_updates(tight)) is None:
            return None
        else:
            decided = replace(start, updates=tuple(chosen[0]), streamed=tuple(chosen[1]))
        training = build_training(stages.lowered(decided), stages.spec, decided.updates)
        found = _keep_all_or_drop(stages, training, limits)
        if found is None:
            return None
        schedule = realize(
            *found,
            seed=stages.options.seed,
            quick=True,
            hide_within=None if wants(goal, "ram") else stages.limits,
        )
        excess = Excess.of(schedule, found[0], stages.limits)
        if not excess:
            # the bound is to hold for all that can be chosen
            loose = bool(problem.streams or free)
            least = 0.0 if loose else bound(found[0], goal)
            return Scheduled(decided, training, schedule, least, loose)
        limits = excess.off(limits)
    return None


def tightened(stages: Stages, done: Scheduled, goal: Goal, free: Sequence[str]) -> Scheduled:
    """The schedule with the bound of its update set that takes no solver."""
    problem = _plain_problem(stages, replace(done.decided, streamed=()), fixed=True, free=free)
    return replace(done, bound=bound(problem, goal), loose=False)


def reference(
    stages: Stages, updates: Sequence[Candidate], start: Decided
) -> dict[ObjectiveName, float]:
    """What plain training takes: these updates, everything kept, whatever the limits."""
    training = build_training(stages.lowered(start), stages.spec, updates)
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
    stages: Stages, training: TrainingGraph, limits: Limits
) -> tuple[Problem, Solution] | None:
    """Fixed decisions that keep the limits, with as little rebuilt and paged as that takes."""
    for rebuild in (False, True):
        problem = stages.problem(training, fixed=True, limits=limits, rebuild=rebuild)
        solution = greedy(problem) if rebuild else keeping(problem, (), ())
        if measure(problem, solution).keeps(limits):
            return problem, solution
    return None
