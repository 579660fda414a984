"""A schedule as cells: what is held into, computed and loaded in each stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .instance import Instance, Step, trace


@dataclass
class Cells:
    """A schedule as 0/1 cells: held int8[n + 1, n], computed and loaded int8[n, n]."""

    held: NDArray[np.int8]
    computed: NDArray[np.int8]
    loaded: NDArray[np.int8]

    @classmethod
    def of(cls, instance: Instance, steps: Sequence[Step]) -> Cells:
        """Cells of steps in which each stage makes a node at most once, in node order."""
        n = instance.nodes
        cells = cls(*(np.zeros((n + k, n), np.int8) for k in (1, 0, 0)))
        last = trace(instance, steps).last_use
        for i, (stage, kind, v) in enumerate(steps):
            (cells.computed if kind == "compute" else cells.loaded)[stage, v] = 1
            end = n if instance.keep[v] and last[i] == len(steps) - 1 else steps[last[i]].stage
            cells.held[stage + 1 : end + 1, v] = 1
        return cells


def steps_of(instance: Instance, cells: Cells) -> list[Step]:
    """Steps of a schedule's cells, without those that nobody needs."""
    made = cells.computed + 2 * cells.loaded
    steps = [
        Step(int(t), "compute" if made[t, v] == 1 else "load", int(v))
        for t, v in np.argwhere(made > 0)
    ]
    return needed(instance, steps)


def needed(instance: Instance, steps: Sequence[Step]) -> list[Step]:
    """Without results that are never read; first computations stay where they are mandatory."""
    first: dict[int, int] = {}
    for i, s in enumerate(steps):
        first.setdefault(s.node, i)
    read = set(map(int, np.flatnonzero(instance.keep)))
    stored: set[int] = set()
    kept: list[Step] = []
    for i in range(len(steps) - 1, -1, -1):
        s = steps[i]
        mandatory = first[s.node] == i and (not instance.lazy[s.node] or s.node in stored)
        if s.node not in read and not mandatory:
            continue
        kept.append(s)
        read.discard(s.node)
        if s.kind == "load":
            stored.add(s.node)
        else:
            read.update(instance.preds[s.node])
    return kept[::-1]
