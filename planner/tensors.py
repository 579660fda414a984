"""Storage tensors: values that share bytes, found once per training graph.

Views and in-place results are the same storage as their operand, so residency, recomputation and
lifetimes are decided per storage tensor, never per value.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.graph import Node, Value
from ..ir.opdef import get_op, inplace_operands
from ..ir.training import TrainingGraph, Update
from .plan import ALIGNMENT_BYTES, Space


def aligned(n: int) -> int:
    """Bytes rounded up to the arena's alignment."""
    return -(-n // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


@dataclass(frozen=True, eq=False)
class Tensor:
    """One storage tensor of the arena.

    Attributes:
        index: Position in ``Storage.tensors``.
        values: The values that live in it, in the order they are written; views included.
        writers: Nodes that write it, in order (views run no code and are left out). Empty for the
            samples, which the caller writes.
        bytes: Aligned size.
        rebuildable: All writers are forward nodes that may run again.
        state: An optimizer tensor whose home is the storage: it is here for an update's step only.
    """

    index: int
    values: tuple[Value, ...]
    writers: tuple[Node, ...]
    bytes: int
    rebuildable: bool
    state: bool = False

    @property
    def is_forward(self) -> bool:
        """Made in forward only: samples, activations, auxiliary tensors, the prediction."""
        return not self.state and all(w.phase == "forward" for w in self.writers)

    @property
    def source(self) -> Node | Value:
        """Its last writer; a sample itself."""
        return self.writers[-1] if self.writers else self.values[0]

    @property
    def name(self) -> str:
        """Name of the final value."""
        return self.values[-1].name


class Storage:
    """Where every value of a training graph lives.

    Attributes:
        training: The analysed graph.
        tensors: Arena tensors.
        of: Value -> its arena tensor.
        space: Value -> space, for every value that has storage of its own.
        update_of: Node -> the update step that executes it (gradient, accumulate and apply nodes).
        aliases: Output value -> operand value whose bytes it takes over (views and in-place).
        followers: Node or sample -> the views that are to follow it, in order.
        paged: Optimizer tensors whose home is the storage.
        refused: (node, its operand, what else reads that): it would take the operand's bytes over
            if nothing else read them.
    """

    def __init__(self, training: TrainingGraph) -> None:
        """Analyse a training graph."""
        self.training = training
        graph = training.graph
        self.update_of: dict[Node, Update] = {}
        self.space: dict[Value, Space] = dict.fromkeys(graph.values.values(), "flash")
        tiles: set[Value] = set()
        for u in training.updates:
            self.space.update(dict.fromkeys(u.resident, "state"))
            for n in (u.grad_node, u.accumulate_node, u.apply_node):
                if n is not None:
                    self.update_of[n] = u
            for n in (u.accumulate_node, u.apply_node):
                if n is not None:
                    self.space.update(dict.fromkeys(n.outputs, "state"))
            if u.grad_node is not None:
                tiles.update(u.grad_node.outputs)
        self.space.update(dict.fromkeys((training.hyper, *training.targets), "io"))
        for v in graph.values.values():
            if v.producer is not None and v not in tiles and self.space[v] == "flash":
                self.space[v] = "arena"
        self.paged = {v for u in training.updates for v in u.paged}
        self.space.update(dict.fromkeys((*training.samples, *self.paged), "arena"))
        for v in tiles:
            del self.space[v]
        self.aliases: dict[Value, Value] = {}
        self.followers: dict[Node | Value, list[Node]] = {}
        self.refused: list[tuple[Node, Value, tuple[Node, ...]]] = []
        self._group()
        self._follow()

    def _group(self) -> None:
        graph = self.training.graph
        order = {n: i for i, n in enumerate(graph.nodes)}
        consumers = graph.consumers()
        groups: dict[Value, list[Value]] = {v: [v] for v in self.training.samples}
        groups |= {v: [v] for u in self.training.updates for v in u.paged}
        root = {v: v for v in self.training.samples}
        for node in graph.nodes:
            for v in node.outputs:
                if self.space.get(v) != "arena":
                    continue
                source = self._takes_over(node, v, groups, root, consumers, order)
                if source is None:
                    root[v] = v
                    groups[v] = [v]
                else:
                    self.aliases[v] = source
                    root[v] = root[source]
                    groups[root[v]].append(v)
        self.tensors: list[Tensor] = []
        self.of: dict[Value, Tensor] = {}
        for values in groups.values():
            writers = tuple(
                n for v in values if (n := v.producer) is not None and not get_op(n.op).view
            )
            rebuildable = (
                bool(writers)
                and values[0].producer is not None
                and all(n.phase == "forward" and not get_op(n.op).stateful for n in writers)
            )
            tensor = Tensor(
                len(self.tensors),
                tuple(values),
                writers,
                aligned(max(v.type.nbytes for v in values)),
                rebuildable,
                state=values[0] in self.paged,
            )
            self.tensors.append(tensor)
            self.of.update(dict.fromkeys(values, tensor))

    def _follow(self) -> None:
        for node in self.training.graph.nodes:
            if get_op(node.op).view and self.space.get(node.out) == "arena":
                source = node.inputs[0]
                assert source is not None, node.name
                while source.producer is not None and get_op(source.producer.op).view:
                    source = source.producer.inputs[0]
                    assert source is not None, node.name
                self.followers.setdefault(source.producer or source, []).append(node)

    def _takes_over(
        self,
        node: Node,
        out: Value,
        groups: dict[Value, list[Value]],
        root: dict[Value, Value],
        consumers: dict[Value, list[Node]],
        order: dict[Node, int],
    ) -> Value | None:
        """The operand whose bytes ``out`` takes over, or None."""
        op = get_op(node.op)
        if out is not node.out:
            return None
        if op.view:
            source = node.inputs[0]
            return source if source is not None and self.space.get(source) == "arena" else None
        for i in inplace_operands(node):
            source = node.inputs[i] if i < len(node.inputs) else None
            if source is None or self.space.get(source) != "arena":
                continue
            if source.type.stored != out.type.stored:
                continue
            if sum(v is source for v in node.operands()) > 1:
                continue
            group = groups[root[source]]
            if group[-1] is not source and not all(
                get_op(v.producer.op).view for v in group[group.index(source) + 1 :] if v.producer
            ):
                continue
            members = set(group)
            readers = {
                n
                for v in group
                for n in consumers[v]
                if n is not node and not any(o in members for o in n.outputs)
            }
            # A forward tensor may have to be rebuilt for any of its readers, so nobody else may
            # want the version that is overwritten; a gradient is made once, in a fixed order.
            if node.phase != "forward" and all(
                v.producer is not None and v.producer.phase != "forward" for v in group
            ):
                readers = {n for n in readers if order[n] > order[node]}
            if not readers:
                return source
            self.refused.append((node, source, tuple(sorted(readers, key=order.__getitem__))))
        return None
