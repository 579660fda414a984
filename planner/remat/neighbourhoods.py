"""Large neighbourhood search: free some cells of the best schedule, solve, repeat (Shaw 1998)."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

import numpy as np

from .cells import Cells, steps_of
from .cpsat import solve
from .greedy import polish
from .instance import BoolArray, Instance, Step, trace
from .stage_model import StageModel

#: Deterministic time of one solve.
EFFORT = 0.3
#: Solves in a row that may fail to improve before the search ends.
PATIENCE = 16
#: Free cells to begin with; adapted to what is solved in time.
CELLS = 5000


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
        stages = StageModel(
            instance,
            cost - 1,
            depth=instance.nodes,
            around=cells,
            free=free,
        )
        better: list[Step] | None = None
        for _ in range(4):
            left = until - time.perf_counter()
            solved = solve(stages, seconds=left, seed=seed, threads=threads, effort=EFFORT)
            if solved.values is None:
                break
            candidate = steps_of(instance, stages.cells(solved.values))
            if not stages.refine(candidate):
                better = polish(instance, candidate)
                break
        if solved.status in ("unknown", "feasible"):
            size = max(300, size * 4 // 5)
        else:
            size = min(30_000, size * 9 // 8)
        if better is None:
            failed += 1
            continue
        best, failed = better, 0
        cost = trace(instance, best).cost
        cells = Cells.of(instance, best)
        found(best)
    return best


def _region(instance: Instance, rng: random.Random, size: int) -> BoolArray:
    """Cells of one to three clusters of related nodes, at all stages."""
    n = instance.nodes
    clusters = rng.choice((1, 2, 3))
    width = max(2, 2 * size // (n * clusters))
    wanted = set[int]().union(*(_cluster(instance, rng, width) for _ in range(clusters)))
    free = np.zeros((n + 1, n), np.bool_)
    free[:, sorted(wanted)] = True
    return free


def _cluster(instance: Instance, rng: random.Random, width: int) -> set[int]:
    """Up to ``width`` nodes around a random one."""
    centre = rng.randrange(instance.nodes)
    wanted = {centre}
    front = [centre]
    while len(wanted) < width and front:
        v = front.pop(rng.randrange(len(front)) if rng.random() < 0.3 else 0)
        for u in (*instance.preds[v], *instance.users[v]):
            if u not in wanted:
                wanted.add(u)
                front.append(u)
    return wanted
