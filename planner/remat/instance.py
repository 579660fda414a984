"""A rematerialization problem in integers, and what a sequence of steps costs in it.

Node ``v`` is computed for the first time in *stage* ``v``. Between two first computations any
earlier node may be computed again (Checkmate's stages, arXiv 1910.02653) or loaded from storage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
Kind = Literal["compute", "load"]


class Step(NamedTuple):
    """One step: ``node`` is computed, or loaded from storage, in a stage."""

    stage: int
    kind: Kind
    node: int


@dataclass(frozen=True)
class Instance:
    """A frozen rematerialization problem; all arrays have one entry per node, in stage order.

    Attributes:
        cost: Cost of computing a node once.
        size_bytes: Bytes of its result.
        scratch_bytes: Bytes that are occupied beside operands and result while it is computed.
        preds: Operands of each node, all of them earlier nodes.
        budget_bytes: What all live results, scratch and load may occupy at any time.
        load_bytes: Bytes that other things occupy during each stage.
        last_stage: Last stage in which the node may be computed; its own: never again.
        lazy: The first computation is optional: it is made when something needs it.
        keep: The result has to be in memory at the end.
        page_out_cost: Cost of writing a result to storage, once; None: there is no storage.
        page_in_cost: Cost of reading it back.
    """

    cost: IntArray
    size_bytes: IntArray
    scratch_bytes: IntArray
    preds: tuple[tuple[int, ...], ...]
    budget_bytes: int
    load_bytes: IntArray
    last_stage: IntArray
    lazy: BoolArray
    keep: BoolArray
    page_out_cost: IntArray | None = None
    page_in_cost: IntArray | None = None

    @property
    def nodes(self) -> int:
        """Number of nodes and of stages."""
        return len(self.cost)

    @cached_property
    def users(self) -> tuple[tuple[int, ...], ...]:
        """Nodes that read each node, ascending."""
        found: list[list[int]] = [[] for _ in self.preds]
        for u, operands in enumerate(self.preds):
            for v in operands:
                found[v].append(u)
        return tuple(map(tuple, found))

    @cached_property
    def once_cost(self) -> int:
        """Cost of computing each node that is not lazy once: a trivial lower bound."""
        return int(self.cost[~self.lazy].sum())

    @cached_property
    def need_bytes(self) -> IntArray:
        """Least bytes with which each node can be computed: operands, result, scratch, load."""
        operands = [sum(int(self.size_bytes[v]) for v in p) for p in self.preds]
        own = self.size_bytes + self.scratch_bytes + self.load_bytes
        return own + np.array(operands, dtype=np.int64)

    @property
    def pages(self) -> bool:
        """There is a storage to page to."""
        return self.page_in_cost is not None


class Trace(NamedTuple):
    """What a sequence of steps amounts to.

    Attributes:
        cost: Total, page-outs included.
        live_bytes: Occupied bytes during each step, int64[steps].
        last_use: Last step that needs the result of each step; the step itself if none does.
    """

    cost: int
    live_bytes: IntArray
    last_use: list[int]

    @property
    def peak_bytes(self) -> int:
        """Largest of the occupied bytes."""
        return int(self.live_bytes.max(initial=0))


def trace(instance: Instance, steps: Sequence[Step]) -> Trace:
    """Execute steps in which every result dies after its last use.

    Raises:
        ValueError: An operand is not there, or a node is loaded that was never computed.
    """
    n = len(steps)
    copy = [-1] * instance.nodes
    last = list(range(n))
    stored: set[int] = set()
    cost = 0
    for i, (_, kind, v) in enumerate(steps):
        if kind == "compute":
            cost += int(instance.cost[v])
            for p in instance.preds[v]:
                if copy[p] < 0:
                    raise ValueError(f"step {i}: operand {p} of {v} was never computed")
                last[copy[p]] = i
        else:
            assert instance.page_in_cost is not None
            if copy[v] < 0:
                raise ValueError(f"step {i}: {v} is loaded but was never computed")
            cost += int(instance.page_in_cost[v])
            stored.add(v)
        copy[v] = i
    if instance.page_out_cost is not None:
        cost += sum(int(instance.page_out_cost[v]) for v in stored)
    for v in np.flatnonzero(instance.keep).tolist():
        last[copy[v]] = n - 1
    nodes = np.fromiter((s.node for s in steps), np.int64, n)
    size = instance.size_bytes[nodes]
    change = np.zeros(n + 1, np.int64)
    change[:n] = size
    np.subtract.at(change, np.asarray(last, dtype=np.int64) + 1, size)
    live = np.cumsum(change[:n])
    live += instance.load_bytes[np.fromiter((s.stage for s in steps), np.int64, n)]
    computed = np.fromiter((s.kind == "compute" for s in steps), np.bool_, n)
    live += instance.scratch_bytes[nodes] * computed
    return Trace(cost, live, last)


def keep_all(instance: Instance) -> list[Step]:
    """Every node once, in order; lazy ones too."""
    return [Step(v, "compute", v) for v in range(instance.nodes)]
