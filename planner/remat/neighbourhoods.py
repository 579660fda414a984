"""Large neighbourhood search: free some cells of the best schedule, solve, repeat (Shaw 1998)."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

import numpy as np

from .cpsat import solve
from .instance import BoolArray, Instance, Step, trace
from .stage_model import Cells, StageModel, steps_of

#: Deterministic time of one solve.
EFFORT = 1.0
#: Solves in a row that may fail to improve before the search ends.
PATIENCE = 24
#: Free cells to begin with; adapted to what is solved in time.
CELLS = 2000


def improve(
    instance: Instance,
    steps: Sequence[Step],
    *,
    until: float,
    seed: int,
    threads: int,
    found: Callable[[list[Step]], None],
) -> list[Step]:
    """The best schedule that repeated local solves reach.

    Args:
        instance: The problem.
        steps: A schedule within the budget.
        until: ``time.perf_counter`` at which to stop.
        seed: Random seed.
        threads: Threads of each solve.
        found: Called with each better schedule.
    """
    rng = random.Random(seed)
    best, cost = list(steps), trace(instance, steps).cost
    cells = Cells.of(instance, best)
    size, failed = CELLS, 0
    while failed < PATIENCE and time.perf_counter() < until:
        free = _region(instance, rng, size)
        stages = StageModel(instance, cost - 1, depth=instance.nodes, around=cells, free=free)
        better: list[Step] | None = None
        for _ in range(4):
            left = until - time.perf_counter()
            solved = solve(stages, seconds=left, seed=seed, threads=threads, effort=EFFORT)
            if solved.values is None:
                break
            candidate = steps_of(instance, stages.cells(solved.values))
            if not stages.refine(candidate):
                better = candidate
                break
        if solved.status in ("unknown", "feasible"):
            size = max(300, size * 3 // 4)
        else:
            size = min(20_000, size * 5 // 4)
        if better is None:
            failed += 1
            continue
        best, failed = better, 0
        cost = trace(instance, best).cost
        cells = Cells.of(instance, best)
        found(best)
    return best


def _region(instance: Instance, rng: random.Random, size: int) -> BoolArray:
    """Cells of a run of nodes at all stages, or of all nodes in a window of stages."""
    n = instance.nodes
    free = np.zeros((n + 1, n), np.bool_)
    if rng.random() < 0.35:
        width = max(2, min(n, 2 * size // n))
        a = rng.randrange(max(1, n + 1 - width))
        free[a : a + width] = True
        return free
    width = max(2, size * 2 // n)
    centre = rng.randrange(n)
    wanted = {centre}
    front = [centre]
    while len(wanted) < min(width, n) and front:
        v = front.pop(rng.randrange(len(front)) if rng.random() < 0.3 else 0)
        for u in (*instance.preds[v], *instance.users[v], v - 1, v + 1):
            if 0 <= u < n and u not in wanted:
                wanted.add(u)
                front.append(u)
    free[:, sorted(wanted)] = True
    return free
