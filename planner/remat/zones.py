"""Bounds from a coarse model: runs of stages are merged to zones, and refined where it matters.

Only the last stage of a zone has a memory row; within a zone a node is made at most once for all
its readers, and memory knows no limit. That is a relaxation of every schedule. Few zones around the
peak are a small model that often proves as much as the stages themselves: a computation that an LP
spreads over many stages, to have its operands for part of their price, is one variable here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .cells import Cells, needed
from .cpsat import solve
from .instance import Instance, Step, keep_all, trace
from .stage_model import StageModel

#: Deterministic time of the first solve; doubled where neither way to search suffices.
EFFORT = 0.5


@dataclass
class Zones:
    """Zones of stages, from coarse to fine.

    Attributes:
        instance: The problem.
        gently: Begin with more zones around the peak, and refine only one zone at a time; else
            refine all that exceed the budget.
        ends: Last stages of zones.
        made: (last stage of a zone, node that is made again in it) for which there is a memory row.
        effort: Deterministic time of the next solve.
        from_below: Whether it is to raise the bound rather than to find solutions.
        proven: Best bound so far.
        exhausted: Finer zones would not prove more.
    """

    instance: Instance
    gently: bool = False
    ends: set[int] = field(default_factory=set)
    made: set[tuple[int, int]] = field(default_factory=set)
    effort: float = EFFORT
    from_below: bool = False
    proven: int = 0
    exhausted: bool = False

    def __post_init__(self) -> None:
        """Begin with the stages around the one in which keeping all needs most."""
        peak = int(np.argmax(trace(self.instance, keep_all(self.instance)).live_bytes))
        last, near = self.instance.nodes - 1, int(self.gently)
        self.ends |= {last, *range(max(peak - near, 0), min(peak + near, last) + 1)}

    def bound(
        self, most: int, *, least: int, seconds: float, seed: int, threads: int
    ) -> tuple[int, list[Step] | None]:
        """A bound for every schedule, up to ``most + 1``, and a schedule within the budget or None.

        Each call refines the zones, or has the next one search in another way.
        """
        n = self.instance.nodes
        zone = np.searchsorted(np.array(sorted(self.ends)), np.arange(n))
        model = StageModel(self.instance, most, depth=None, loose=True, zone=zone)
        model.demand({(int(zone[t]), v) for t, v in self.made})
        solved = solve(
            model,
            seconds=seconds,
            seed=seed,
            threads=threads,
            effort=self.effort,
            least=least,
            from_below=self.from_below,
        )
        if solved.status in ("unknown", "feasible"):  # the other way, or with more effort
            self.effort *= 1 + self.from_below
            self.from_below = not self.from_below
        self.proven = max(self.proven, solved.bound)
        if solved.values is None:
            return solved.bound, None
        steps, uncounted = self._executed(zone.tolist(), model.cells(solved.values))
        live = trace(self.instance, steps).live_bytes
        fits = bool(live.max() <= self.instance.budget_bytes)
        if solved.status == "optimal":
            before = len(self.ends), len(self.made)
            if fits:
                self.ends |= uncounted
            else:
                self._refine(zone.tolist(), steps, live.tolist())
            self.exhausted = before == (len(self.ends), len(self.made))
        return solved.bound, steps if fits else None

    def _executed(self, zone: list[int], cells: Cells) -> tuple[list[Step], set[int]]:
        """Steps that do what a coarse solution says, and stages whose steps it hasn't counted."""
        x = self.instance
        memory: set[int] = set()
        ever: set[int] = set()
        steps: list[Step] = []
        uncounted: set[int] = set()
        for t, z in enumerate(zone):
            begins, ends = t == 0 or zone[t - 1] < z, t in self.ends
            if begins:
                memory &= set(np.flatnonzero(cells.held[z]).tolist())
                counted = set(np.flatnonzero(cells.computed[z] & (np.array(zone) < z)).tolist())
            wanted = [] if x.lazy[t] and not cells.computed[z, t] else [t]
            if ends:  # what the next zone begins with
                wanted += np.flatnonzero(cells.held[z + 1]).tolist()
            for v in self._missing(wanted, memory, cells, z):
                loads = bool(cells.loaded[z, v]) and v in ever
                steps.append(Step(t, "load" if loads else "compute", v))
                if not loads and v in ever and v not in counted:
                    uncounted.add(t)
                counted.discard(v)
                memory.add(v)
                ever.add(v)
        return needed(x, steps), uncounted

    def _missing(self, wanted: list[int], memory: set[int], cells: Cells, z: int) -> list[int]:
        found: set[int] = set()
        stack = list(wanted)
        while stack:
            v = stack.pop()
            if v in found or v in memory:
                continue
            found.add(v)
            if not cells.loaded[z, v]:
                stack += self.instance.preds[v]
        return sorted(found)

    def _refine(self, zone: list[int], steps: Sequence[Step], live: list[int]) -> None:
        """End a zone where the budget is exceeded most; watch what is made again at its end."""
        worst: dict[int, tuple[int, int]] = {}
        for s, used in zip(steps, live, strict=True):
            if used <= self.instance.budget_bytes:
                continue
            z = zone[s.stage]
            if s.stage not in self.ends:
                worst[z] = max(worst.get(z, (0, 0)), (used, s.stage))
            elif zone[s.node] < z:
                self.made.add((s.stage, s.node))
        chosen = sorted(worst.values(), reverse=True)
        self.ends |= {stage for _, stage in (chosen[:1] if self.gently else chosen)}
