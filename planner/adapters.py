"""What adapters add to the timeline of a problem in which updates are chosen.

A plan has no adapter that it does not update (``ir.adapters``), but the superset graph has all of
them. Here is what that graph does for their sake alone, so that it counts for those that are
chosen:

- In forward an adapter's steps have the activity of its update, and its tensors have no window:
  they are made and read under that activity.
- In backward the gradient that passes through an adapter into its input is no slot. Its cycles
  belong to the slot that makes the gradient which it is added to, where the adapter is chosen.

The bytes that this gradient takes are left out, and so is what an adapter adds where its layer's
result is made again. So the problem asks for no more than plans do, and bounds hold for all of
them; a choice that does not fit for these bytes is made again, with less RAM.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ..ir.adapters import Adapter, adapters_by_param
from ..ir.graph import Node, Value
from ..ir.opdef import get_op
from ..ir.training import TrainingGraph, Update
from .cost import CostModel
from .problem import SplitCost
from .tensors import aligned


class AdapterSteps:
    """The steps of a training graph that are there for one adapter each.

    Attributes:
        forward: Node -> the adapter.
        passing: Backward nodes through which the gradient of an adapter's input passes it: from
            ``Adapter.down`` on, and its sum with that of the input's other readers.
        entries: Those that read ``Adapter.down``.
    """

    def __init__(self, training: TrainingGraph, adapters: Sequence[Adapter]) -> None:
        """Find them by the names that the adapters know; none where updates are no choice."""
        nodes = {n.name: n for n in training.graph.nodes}
        self.forward = {nodes[name]: a for a in adapters for name in a.nodes}
        ways = [(f"{name}/", a) for a in adapters for name in a.way]
        updated = {u.grad_node for u in training.updates}
        self.passing: dict[Node, Adapter] = {
            n: a
            for n in training.graph.nodes
            for prefix, a in ways
            if n.phase == "backward" and n not in updated and n.name.startswith(prefix)
        }
        self.entries = {
            n for n, a in self.passing.items() if a.down in {v.name for v in n.operands()}
        }

    def cycles(
        self, cost: CostModel, activities: Mapping[Adapter, Sequence[int]]
    ) -> Iterator[tuple[str, SplitCost]]:
        """Name of the node that makes a gradient, and what an adapter adds to it.

        Args:
            cost: Predicted costs.
            activities: Of an adapter's updates, in each form.
        """
        sums = {a: n for n, a in self.passing.items() if n.op == "Add"}
        for node, adapter in self.passing.items():
            more, slot = cost.node_cycles(node), self._maker(sums[adapter].inputs[0])
            for a in activities[adapter]:
                yield slot.name, SplitCost(a, more, more)

    def _maker(self, gradient: Value | None) -> Node:
        """The node that makes a gradient, without what passes adapters."""
        node = None if gradient is None else gradient.producer
        assert node is not None, gradient
        there = node not in self.passing and not get_op(node.op).view
        return node if there else self._maker(node.inputs[0])


def uncounted_bytes(training: TrainingGraph) -> int:
    """The most that a plan of these adapters takes at a step beyond what the choice has counted."""
    passing = AdapterSteps(training, training.graph.adapters).passing
    return max((aligned(v.type.nbytes) for n in passing for v in n.outputs), default=0)


def together(training: TrainingGraph) -> list[list[Update]]:
    """Updates that are one decision: all of an adapter in one form, any other alone."""
    adapters = adapters_by_param(training.graph)
    found: dict[object, list[Update]] = {}
    for u in training.updates:
        adapter = adapters.get(u.candidate.param)
        key = (adapter, u.candidate.saved, u.candidate.state) if adapter else u.candidate
        found.setdefault(key, []).append(u)
    return list(found.values())
