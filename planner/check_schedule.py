"""Replays a schedule of a cost graph and trusts nobody: bytes and cost by execution.

It imports nothing of the search; a schedule is a list of operations on node ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum
from typing import Literal

from pydantic import BaseModel, ConfigDict

from .check_program import CheckError
from .cost_graph import CostGraph, Quantity

Operation = Literal["compute", "drop", "page_out", "page_in"]


class ScheduleStep(BaseModel):
    """One operation on the result of a node."""

    model_config = ConfigDict(frozen=True, strict=True)

    op: Operation
    node: int


@dataclass(frozen=True)
class Replay:
    """What executing a schedule came to.

    Attributes:
        cost: Total, in the unit of the quantity (J or s).
        once_cost: Cost of computing each node once.
        peak_bytes: Largest number of bytes in memory at any time.
        peak_step: Step at which it was reached first.
        computed: Computations.
        recomputed: Computations that were not the first of their node.
        paged_out: Writes to storage.
        paged_in: Reads from it.
    """

    cost: float
    once_cost: float
    peak_bytes: int
    peak_step: int
    computed: int
    recomputed: int
    paged_out: int
    paged_in: int

    @property
    def overhead(self) -> float:
        """Cost beyond computing each node once, relative to that; 0 where that is free."""
        return self.cost / self.once_cost - 1 if self.once_cost else 0.0


def replay(
    graph: CostGraph,
    steps: Sequence[ScheduleStep],
    *,
    budget_bytes: int | None = None,
    paging: bool = False,
    quantity: Quantity = "energy",
) -> Replay:
    """Execute a schedule.

    Args:
        graph: The cost graph.
        steps: Operations in order.
        budget_bytes: What results in memory may occupy; None: no limit.
        paging: There is a storage to page to.
        quantity: Which costs to add up.

    Raises:
        CheckError: An operand that is not in memory, a result that is there already, a first
            computation out of order, a page-in of what was never written, a node that was never
            computed, or a budget that is exceeded; names step and node.
    """
    nodes = {n.id: n for n in graph.nodes}
    memory: set[int] = set()
    storage: set[int] = set()
    ever: list[int] = []
    order = [n.id for n in graph.sequence]
    costs: list[float] = []
    count = dict.fromkeys(("compute", "drop", "page_out", "page_in"), 0)
    live = peak = peak_step = 0
    for i, step in enumerate(steps):
        where = f"step {i} ({step.op} {step.node})"
        if step.node not in nodes:
            raise CheckError(f"{where}: no such node")
        node, here = nodes[step.node], step.node in memory
        count[step.op] += 1
        if step.op in ("page_out", "page_in") and not paging:
            raise CheckError(f"{where}: pages, but there is no storage")
        if step.op in ("compute", "page_in"):
            if here:
                raise CheckError(f"{where}: is in memory already")
            if step.op == "compute":
                if missing := [p for p in graph.operands[step.node] if p not in memory]:
                    raise CheckError(f"{where}: operand {missing[0]} is not in memory")
                if step.node not in ever:
                    if order[len(ever)] != step.node:
                        raise CheckError(f"{where}: {order[len(ever)]} has to come first")
                    ever.append(step.node)
                costs.append(node.cost(quantity))
            else:
                if step.node not in storage:
                    raise CheckError(f"{where}: was never written to storage")
                costs.append(node.pagein_J or 0.0)
            memory.add(step.node)
            live += node.mem_bytes
            if live > peak:
                peak, peak_step = live, i
            if budget_bytes is not None and live > budget_bytes:
                raise CheckError(f"{where}: {live:,} B in memory, the budget is {budget_bytes:,} B")
        elif not here:
            raise CheckError(f"{where}: is not in memory")
        elif step.op == "page_out":
            costs.append(node.pageout_J or 0.0)
            storage.add(step.node)
        else:
            memory.remove(step.node)
            live -= node.mem_bytes
    if len(ever) < len(order):
        raise CheckError(f"node {order[len(ever)]} was never computed")
    return Replay(
        cost=fsum(costs),
        once_cost=fsum(n.cost(quantity) for n in graph.nodes),
        peak_bytes=peak,
        peak_step=peak_step,
        computed=count["compute"],
        recomputed=count["compute"] - len(order),
        paged_out=count["page_out"],
        paged_in=count["page_in"],
    )
