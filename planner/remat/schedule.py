"""From a cost graph to the search and back to a checked schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

import numpy as np

from ...ir.errors import InfeasibleError, UsageError
from ..check_schedule import Replay, ScheduleStep, replay
from ..cost_graph import CostGraph, CostNode, Quantity, costs_exactly
from ..sizes import format_bytes
from .instance import Instance, Step, keep_all, trace
from .search import Mark, Options, Search

Status = Literal["optimal", "feasible"]
#: Share of the time limit for finding a budget that works.
_EXPLAIN = 0.5


@dataclass(frozen=True)
class Schedule:
    """A checked schedule of a cost graph and how good it is proven to be.

    Attributes:
        steps: Operations on node ids.
        replay: What executing them came to.
        budget_bytes: The budget.
        quantity: What was minimized.
        paging: Whether paging was offered.
        status: ``optimal``: proven within the gap.
        bound: No schedule costs less, whatever it makes again, when, in what order and how often; J
            or s. First computations are in the graph's order.
        bound_in_stages: None that makes a node at most once between two first computations, in
            their order, costs less.
        bound_where_used: None of these that computes nodes again only between the two first
            computations where they are read costs less.
        marks: Course of the search; costs in its integer unit.
    """

    steps: tuple[ScheduleStep, ...]
    replay: Replay
    budget_bytes: int
    quantity: Quantity
    paging: bool
    status: Status
    bound: float
    bound_in_stages: float
    bound_where_used: float
    marks: tuple[Mark, ...]

    @property
    def gap(self) -> float:
        """Relative gap between cost and bound."""
        cost = self.replay.cost
        return max(0.0, cost - self.bound) / cost if cost else 0.0

    @property
    def found(self) -> Mark:
        """When this schedule was found."""
        return next(m for m in self.marks if m.cost == self.marks[-1].cost)


def keep_all_peak(graph: CostGraph) -> int:
    """Peak bytes where everything is held until its last use and nothing is computed twice."""
    instance, _ = to_instance(graph, budget_bytes=0, paging=False, quantity="time")
    return trace(instance, keep_all(instance)).peak_bytes


def to_instance(
    graph: CostGraph, *, budget_bytes: int, paging: bool, quantity: Quantity
) -> tuple[Instance, Fraction]:
    """The search's problem and the cost of its unit.

    Raises:
        UsageError: The graph lacks the costs that are asked for.
    """
    if quantity == "energy" and not graph.has_energy:
        raise UsageError("the graph has nodes without energy_J; use --objective time")
    if paging and (quantity == "time" or not graph.has_paging):
        raise UsageError(
            "paging needs --objective energy and a graph whose nodes have energy_J, pagein_J and"
            " pageout_J; use --no-paging"
        )
    nodes = graph.sequence
    place = {n.id: i for i, n in enumerate(nodes)}
    values = [n.cost(quantity) for n in nodes]
    if paging:
        values += [n.pageout_J or 0.0 for n in nodes] + [n.pagein_J or 0.0 for n in nodes]
    integers, unit = costs_exactly(values, sum(values[: len(nodes)]))
    n = len(nodes)
    costs = [np.array(integers[i * n : (i + 1) * n], dtype=np.int64) for i in range(3)]
    zero, no = np.zeros(n, np.int64), np.zeros(n, np.bool_)
    operands = graph.operands
    return Instance(
        cost=costs[0],
        size_bytes=np.array([v.mem_bytes for v in nodes], dtype=np.int64),
        scratch_bytes=zero,
        preds=tuple(tuple(sorted(place[p] for p in operands[v.id])) for v in nodes),
        budget_bytes=budget_bytes,
        load_bytes=zero,
        last_stage=np.full(n, n - 1, np.int64),
        lazy=no,
        keep=no,
        page_out_cost=costs[1] if paging else None,
        page_in_cost=costs[2] if paging else None,
    ), unit


def schedule(
    graph: CostGraph,
    budget_bytes: int,
    *,
    paging: bool = False,
    quantity: Quantity = "energy",
    options: Options | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Schedule:
    """The cheapest schedule within a memory budget, and a proof of how good it is.

    Args:
        graph: The cost graph.
        budget_bytes: What results in memory may occupy at any time.
        paging: Offer to write results to storage and to read them back.
        quantity: What to minimize.
        options: How to search.
        progress: Called with a line about the state of the search.

    Raises:
        UsageError: The graph lacks the costs that are asked for.
        InfeasibleError: No schedule keeps the budget; names the node, the bytes and a budget that
            works.
    """
    options = options or Options()
    instance, unit = to_instance(graph, budget_bytes=budget_bytes, paging=paging, quantity=quantity)
    scale = float(unit)

    def tell(mark: Mark) -> None:
        if mark.cost is not None:
            gap = (mark.cost - mark.bound) / mark.cost if mark.cost else 0.0
            text = f"{mark.phase}: {mark.cost * scale:.6g}, bound {mark.bound * scale:.6g}"
            progress(f"{text}, gap {gap:.3%}")

    search = Search(instance, options, tell).run()
    if search.best is None:
        raise _infeasible(graph, instance, search, options)
    steps = tuple(_operations(instance, search.best, graph.sequence))
    found = replay(graph, steps, budget_bytes=budget_bytes, paging=paging, quantity=quantity)

    def real(bound: int) -> float:
        """A bound in J or s; equal in integers is equal but for the rounding of the unit."""
        return found.cost if bound >= (search.cost or 0) else min(bound * scale, found.cost)

    return Schedule(
        steps=steps,
        replay=found,
        budget_bytes=budget_bytes,
        quantity=quantity,
        paging=paging,
        status="optimal" if search.status == "optimal" else "feasible",
        bound=real(search.bound),
        bound_in_stages=real(search.bound_in_stages),
        bound_where_used=real(search.bound_where_used),
        marks=tuple(search.marks),
    )


def _operations(
    instance: Instance, steps: Sequence[Step], nodes: Sequence[CostNode]
) -> Iterator[ScheduleStep]:
    """Steps with explicit page-outs, right after the first computation, and drops."""
    last = trace(instance, steps).last_use
    dies: dict[int, list[int]] = {}
    for i, end in enumerate(last):
        dies.setdefault(end, []).append(steps[i].node)
    stored = {s.node for s in steps if s.kind == "load"}
    for i, (_, kind, v) in enumerate(steps):
        yield ScheduleStep(op="compute" if kind == "compute" else "page_in", node=nodes[v].id)
        if v in stored:
            stored.discard(v)
            yield ScheduleStep(op="page_out", node=nodes[v].id)
        for dead in dies.get(i, ()):
            yield ScheduleStep(op="drop", node=nodes[dead].id)


def _infeasible(
    graph: CostGraph, instance: Instance, search: Search, options: Options
) -> InfeasibleError:
    """Why there is no schedule, and the smallest budget that is known to work."""
    has = instance.budget_bytes
    worst = int(np.argmax(instance.need_bytes))
    least = int(instance.need_bytes[worst])
    node = graph.sequence[worst].label
    if search.status != "infeasible":
        return InfeasibleError(
            f"no schedule within {has:,} B found in {options.time_limit_s:g} s, and none excluded;"
            " raise --time-limit or --budget"
        )
    works = _smallest(instance, max(least, has + 1), options)
    if least > has:
        need = f"{node} alone needs {format_bytes(least)} (operands and result)"
        lower = f"{least:,} B"
    elif search.only_in_stages:
        return InfeasibleError(
            f"no schedule fits {format_bytes(has)} that makes a node at most once between two first"
            f" computations, and no other was found; a --budget that works is {works}"
        )
    else:
        need = "no order of dropping and computing again fits"
        lower = f"more than {has:,} B"
    return InfeasibleError(
        f"no schedule fits {format_bytes(has)}: {need}, {max(least - has, 1):,} B too few;"
        f" every schedule needs {lower}, a --budget that works is {works}"
    )


def _smallest(instance: Instance, least: int, options: Options) -> int:
    """A small budget with a schedule: ``least`` if that works, else found by bisection."""
    quick = replace(options, gap=1.0, time_limit_s=options.time_limit_s * _EXPLAIN / 8)

    def works(budget: int) -> bool:
        return Search(replace(instance, budget_bytes=budget), quick).run().best is not None

    low, high = least, trace(instance, keep_all(instance)).peak_bytes
    if works(low):
        return low
    for _ in range(7):
        middle = (low + high) // 2
        if works(middle):
            high = middle
        else:
            low = middle
    return high
