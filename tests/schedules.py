"""Small cost graphs and their cheapest schedules by exhaustive search."""

from __future__ import annotations

import heapq
import itertools

from odt_plan.planner.cost_graph import CostGraph


def graph_of(
    costs: list[int],
    sizes: list[int],
    edges: list[tuple[int, int]],
    paging: tuple[int, int] | None = None,
) -> CostGraph:
    """A graph whose nodes are numbered in their order; paging: (out, in) per byte."""
    nodes = []
    for i, (c, b) in enumerate(zip(costs, sizes, strict=True)):
        node: dict[str, object] = {"id": i, "cost_cpu_s": c, "mem_bytes": b, "energy_J": c}
        if paging is not None:
            node |= {"pageout_J": paging[0] * b, "pagein_J": paging[1] * b}
        nodes.append(node)
    return CostGraph.model_validate({"nodes": nodes, "edges": edges}, strict=False)


def cheapest(graph: CostGraph, budget: int, *, paging: bool) -> float | None:
    """Least cost by Dijkstra over (nodes computed so far, memory, storage); None: infeasible.

    Any order of operations is allowed, also computing a node twice between two first computations.
    """
    nodes = graph.sequence
    n = len(nodes)
    size = [v.mem_bytes for v in nodes]
    place = {v.id: i for i, v in enumerate(nodes)}
    preds = [frozenset(place[p] for p in graph.operands[v.id]) for v in nodes]
    start = (0, frozenset[int](), frozenset[int]())
    best = {start: 0.0}
    serial = itertools.count()
    heap = [(0.0, next(serial), start)]
    while heap:
        cost, _, state = heapq.heappop(heap)
        if cost > best[state]:
            continue
        done, memory, storage = state
        if done == n:
            return cost
        used = sum(size[v] for v in memory)
        moves = [((done, memory - {v}, storage), 0.0) for v in memory]
        for v in range(min(done + 1, n)):
            if v in memory or used + size[v] > budget:
                continue
            if preds[v] <= memory:
                after = (max(done, v + 1), memory | {v}, storage)
                moves.append((after, nodes[v].cost("energy")))
            if paging and v in storage:
                moves.append(((done, memory | {v}, storage), nodes[v].pagein_J or 0.0))
        if paging:
            for v in memory - storage:
                moves.append(((done, memory, storage | {v}), nodes[v].pageout_J or 0.0))
        for after, price in moves:
            if cost + price < best.get(after, float("inf")):
                best[after] = cost + price
                heapq.heappush(heap, (cost + price, next(serial), after))
    return None
