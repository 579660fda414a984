"""First plans for fixed updates: results are evicted when memory runs out, and had back when read.

This is the greedy engine of bare graphs (``planner.remat``) on the tensors of a problem. Its nodes
are the forward tensors in the order of their last writers, then the steps of backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from .remakes import Prices, Remade, Remakes
from .remat.greedy import RULES, Rule, greedy
from .remat.instance import Instance, Step

#: Rules of eviction that are tried at most, and how often each one, with less memory after a miss.
TRIED, TRIES = RULES[:4], 3
#: Parts of their prices at which wanted tensors are made again, and rules.
GUIDES = ((0.3, RULES[0]), (0.1, RULES[1]), (0.01, RULES[0]))
#: Nodes in all tries together; two rules are tried in any case.
WORK = 2000


def evicting(remakes: Remakes, prices: Prices) -> Iterator[Remade]:
    """Plans that keep the RAM budget, by several rules; there may be none."""
    graph = _Graph(remakes, prices)
    pairs = [(early, rule) for rule in TRIED for early in (True, False)]
    for early, rule in pairs[: max(2, WORK // graph.nodes)]:
        yield from _fitting(graph, early, rule)


def guided(remakes: Remakes, prices: Prices, wish: Remade) -> Iterator[Remade]:
    """Plans that keep the RAM budget, and rather make again what one does that exceeds it."""
    again = {i for tensors in wish.again.values() for i in tensors}
    for part, rule in GUIDES:
        cheap = tuple(c * (part if i in again else 1.0) for i, c in enumerate(prices.again))
        yield from _fitting(_Graph(remakes, replace(prices, again=cheap)), True, rule)


def _fitting(graph: _Graph, early: bool, rule: Rule) -> Iterator[Remade]:
    """The plan by one rule, with less memory after a miss; or none."""
    instance = graph.instance(early)
    budget = instance.budget_bytes
    for _ in range(TRIES):
        steps = greedy(replace(instance, budget_bytes=budget), rule)
        if steps is None:
            return
        made = graph.made(steps)
        over = graph.r.over(made)
        if over <= 0:
            yield made
            return
        budget -= over


class _Graph:
    def __init__(self, remakes: Remakes, prices: Prices) -> None:
        self.r, self.prices = remakes, prices
        self.order = sorted(range(len(remakes.tensors)), key=lambda i: remakes.order[i])
        self.n = len(self.order)
        self.steps = [s.index for s in remakes.steps]
        self.nodes = self.n + len(self.steps)

    def instance(self, early: bool) -> Instance:
        """The graph; auxiliary tensors are made in forward, or at their first read."""
        r, n, p = self.r, self.n, self.prices
        total = self.nodes
        at = np.zeros(n, np.int64)
        at[self.order] = np.arange(n)
        preds = [tuple(int(at[j]) for j in r.operands[i]) for i in self.order]
        preds += [tuple(sorted(int(at[i]) for i in r.read_by.get(k, ()))) for k in self.steps]
        last = np.arange(total)
        behind = np.searchsorted(self.steps, r.until[self.order], side="right")
        last[:n] = np.where(r.can[self.order] & (behind > 0), n + behind - 1, last[:n])
        load = np.zeros(total, np.int64)
        load[n:] = r.static[self.steps]
        lazy = np.zeros(total, bool)
        lazy[:n] = r.auxiliary[self.order] & (not early)

        def of_tensors(values: Sequence[float]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
            result = np.zeros(total, np.int64)
            result[:n] = np.round(np.asarray(values)[self.order])
            return result

        return Instance(
            cost=of_tensors(p.again),
            size_bytes=of_tensors(r.size.tolist()),
            scratch_bytes=of_tensors(r.scratch.tolist()),
            preds=tuple(preds),
            budget_bytes=r.problem.limits.ram_bytes - r.state,
            load_bytes=load,
            last_stage=last,
            lazy=lazy,
            keep=np.zeros(total, bool),
            page_out_cost=of_tensors(p.store) if r.pages else None,
            page_in_cost=of_tensors(p.load) if r.pages else None,
        )

    def made(self, steps: Sequence[Step]) -> Remade:
        """What a schedule of the graph makes again; forward's tensors stay through forward."""
        r, n = self.r, self.n
        result = Remade(late=set(np.flatnonzero(r.auxiliary).tolist()))
        stages: dict[int, list[Step]] = {}
        for s in steps:
            if s.node < n and s.stage >= n:
                stages.setdefault(s.stage, []).append(s)
            elif s.node < n and s.kind == "compute":
                result.late.discard(self.order[s.node])
        for stage, done in stages.items():
            step = self.steps[stage - n]
            again = {self.order[s.node] for s in done if s.kind == "compute"}
            if again:
                result.again[step] = sorted(again, key=lambda i: r.order[i])
            for s in done:
                if s.kind == "load":
                    i = self.order[s.node]
                    users = [u for u in result.again.get(step, ()) if i in r.operands[u]]
                    result.loaded.setdefault(step, []).append((i, users[0] if users else None))
                    result.late.discard(i)
        return result
