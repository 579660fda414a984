"""The order of operators: the topological order of a training graph that needs the least RAM.

An order is sought for two extremes, and taken only if neither gets worse: everything that backward
reads is *kept*, or it is *dropped* and there only while a step reads it. What is live after some
steps depends on which have run, not on their order, so the best order is a path over sets of steps
(the dynamic program of Ahn et al., "Ordering Chaos", MLSys 2020), and its peak the least maximum
along one. The search goes through these sets in the order of the peak that they need, starting at a
lower bound, so that whatever ends it leaves a bound for all orders. A step that frees at least what
it makes and stays below that peak is taken at once and nothing beside it: whatever comes later has
then no less room.

Orders are those in which every tensor can still be rebuilt where the file's order allows it, and in
which tensors made for backward alone (masks, indices) follow what they are made from at once: when
they are made is for the planner to decide. Sums of gradients stay those of the file's order, so
every order trains bit for bit the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from itertools import product

from ..ir.graph import Node
from ..ir.opdef import get_op
from ..ir.training import TrainingGraph
from .order_steps import Steps, bits, steps_of

#: Sets of steps that a search may reach; then the best of ``BEAM`` partial orders is followed.
STATES, BEAM = 20_000, 16
#: The part of a peak by which another order has to be better: it takes a search of its own.
WORTH = 1 / 1000


@dataclass(frozen=True)
class Found:
    """What a search for the least peak comes to.

    Attributes:
        order: Positions in ``Steps.nodes``.
        peak: Live bytes of the order.
        bound: No order has a lower peak; the peak itself unless the search was given up.
    """

    order: tuple[int, ...]
    peak: int
    bound: int


def least_peak(steps: Steps, states: int = STATES) -> Found:
    """An order with the least peak; where that takes too long, a good one and a bound."""
    order, bound = _search(steps, states)
    if order is None:
        every = (tuple(range(len(steps.nodes))), _beam(steps))
        order = min(every, key=steps.peak)
    return Found(order, steps.peak(order), bound)


def _choices(
    steps: Steps, done: int, live: int, ready: int, peak: int
) -> list[tuple[int, int, int]]:
    """What may run next: bytes during, bytes after, step; one alone where nothing is lost by it."""
    found = []
    for k in bits(ready):
        during, after = steps.run(done, live, k)
        if steps.at_once[k] or (after <= live and during <= peak):
            return [(during, after, k)]
        found.append((during, after, k))
    return found


def _search(steps: Steps, states: int) -> tuple[tuple[int, ...] | None, int]:
    """The best order, or None after so many sets of steps; and a bound on all orders' peaks."""
    n = len(steps.nodes)
    bound, reached = steps.unavoidable, 0
    came: dict[int, tuple[int, int]] = {}  # set -> the set before, the step between
    needs: dict[int, int] = {0: bound}
    heap = [(bound, 0, steps.given, 0, steps.ready(0, range(n)))]
    closed: set[int] = set()
    while True:
        need, _, live, done, ready = heappop(heap)
        bound = max(bound, need)
        while done not in closed:  # as far as one step alone is to be taken
            closed.add(done)
            if not ready:
                return _path(came, done), bound
            if (reached := reached + 1) > states:
                return None, bound
            choices = _choices(steps, done, live, ready, bound)
            ahead = None
            for during, after, k in choices:
                now, peak = done | 1 << k, max(bound, during)
                if now in closed or needs.get(now, peak + 1) <= peak:
                    continue
                needs[now], came[now] = peak, (done, k)
                then = ready ^ 1 << k | steps.ready(now, steps.then[k])
                if len(choices) == 1 and peak == bound:
                    ahead = after, now, then
                else:
                    heappush(heap, (peak, -now.bit_count(), after, now, then))
            if ahead is None:
                break
            live, done, ready = ahead


def _path(came: Mapping[int, tuple[int, int]], done: int) -> tuple[int, ...]:
    order = []
    while done:
        done, k = came[done]
        order.append(k)
    return tuple(reversed(order))


def _beam(steps: Steps) -> tuple[int, ...]:
    """An order found by following the best partial orders step by step."""
    n = len(steps.nodes)
    front = [(0, steps.given, 0, steps.ready(0, range(n)))]
    came: dict[int, tuple[int, int]] = {}
    for _ in range(n):
        found: dict[int, tuple[int, int, int, int]] = {}
        for most, live, done, ready in front:
            for during, after, k in _choices(steps, done, live, ready, most):
                now, peak = done | 1 << k, max(most, during)
                if now not in found or peak < found[now][0]:
                    then = ready ^ 1 << k | steps.ready(now, steps.then[k])
                    found[now], came[now] = (peak, after, now, then), (done, k)
        front = sorted(found.values())[:BEAM]
    return _path(came, front[0][2])


@dataclass(frozen=True)
class Peaks:
    """Live bytes at the peak, at the two extremes of what a plan may keep.

    Attributes:
        kept: Everything that backward reads is kept.
        dropped: Nothing is, and making it again takes nothing.
    """

    kept: int
    dropped: int


@dataclass(frozen=True)
class Order:
    """What came of the search for a better order.

    Attributes:
        ranks: Node name -> position; None: the order of the file stays.
        given: Peaks of the order of the file.
        found: Peaks of the order that is taken.
        bound: No order has a lower peak; each by itself.
    """

    ranks: Mapping[str, int] | None
    given: Peaks
    found: Peaks
    bound: Peaks


def best_order(training: TrainingGraph, states: int = STATES) -> Order:
    """The order whose two peaks are least in sum, of those that make neither larger.

    Where forward leaves no choice, backward has none that is worth a search, and the order stays.
    Forward and backward come from the best order at one extreme each, or from the file.
    """
    kept = steps_of(training)
    dropped, plain = kept.dropped(), tuple(range(len(kept.nodes)))
    given = Peaks(kept.peak(plain), dropped.peak(plain))
    if kept.is_chain:
        return Order(None, given, given, Peaks(kept.unavoidable, dropped.unavoidable))
    searches = [least_peak(s, states) for s in (kept, dropped)]
    parts = [
        {tuple(k for k in o if kept.forward >> k & 1 == phase): 0 for o in orders}
        for orders in [[plain, *(s.order for s in searches)]]
        for phase in (1, 0)
    ]
    best, order = given, plain
    for forward, backward in product(*parts):
        found = Peaks(kept.peak(forward + backward), dropped.peak(forward + backward))
        better = found.kept + found.dropped < best.kept + best.dropped
        if better and found.kept <= given.kept and found.dropped <= given.dropped:
            best, order = found, forward + backward
    ranks = {kept.nodes[k].name: i for i, k in enumerate(order)}
    part = min(best.kept / given.kept, best.dropped / given.dropped)
    bound = Peaks(*(s.bound for s in searches))
    return Order(ranks if part < 1 - WORTH else None, given, best, bound)


def arranged(training: TrainingGraph, ranks: Mapping[str, int]) -> TrainingGraph:
    """The same nodes in the order of these ranks, as far as their dependences allow.

    Nodes without a rank, such as those of other candidates, follow what is before them in the file.
    """
    steps, graph = steps_of(training), training.graph
    wanted, rank = [], -1
    for k, node in enumerate(steps.nodes):
        rank = ranks.get(node.name, rank)
        wanted.append((rank, k))
    ready = [wanted[k] for k, mask in enumerate(steps.after) if not mask]
    heapify(ready)
    update_of = {u.apply_node if u.accumulate_node is None else u.accumulate_node: u
                 for u in training.updates}  # fmt: skip
    views: dict[Node | None, list[Node]] = {}
    for node in graph.nodes:
        if get_op(node.op).view and node.inputs[0] is not None:
            views.setdefault(node.inputs[0].producer, []).append(node)
    done, order = 0, _with_views(None, views)
    while ready:
        _, k = heappop(ready)
        done |= 1 << k
        node = steps.nodes[k]
        update = update_of.get(node)
        if update is not None and update.grad_node is not None:
            order.append(update.grad_node)
        order += [node, *_with_views(node, views)]
        for j in steps.then[k]:
            if not steps.after[j] & ~done:
                heappush(ready, wanted[j])
    result = copy(graph)
    result.nodes = order
    result.verify()
    return replace(training, graph=result)


def _with_views(node: Node | None, views: Mapping[Node | None, Sequence[Node]]) -> list[Node]:
    """Views of a node's result, and views of these."""
    return [n for view in views.get(node, ()) for n in (view, *_with_views(view, views))]
