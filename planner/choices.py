"""What the solver may choose about the i8 layers of a training graph, as parts of its problem.

The training graph has every layer in i8 (or as pinned) and every block of layers in separate steps.
Two kinds of choices are laid over its slots, so that the graph isn't needed once per combination:

- a layer with weights may be *mixed*: f32 weights and arithmetic on the same i8 activations. Its
  slots then have other costs, its updates other state, its constants another size.
- a block of frozen layers may be *streamed* by rows: its slots and inner tensors vanish, and line
  buffers stand in the first of its slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..ir.graph import Graph, Node
from ..ir.opdef import get_op, inplace_operands
from ..ir.training import TrainingGraph, Update
from .cost import CostModel
from .problem import ALWAYS, Form, MixedLayer, MixedUpdate, Slot, SplitCost, StreamChoice
from .tensors import Storage, aligned

if TYPE_CHECKING:
    from ..ir.streaming import Block

#: Part of the importance of an f32 update that an i8 update of the same weights has.
I8_UPDATE = 0.95


@dataclass(frozen=True)
class Choices:
    """The other forms of layers and blocks.

    Attributes:
        mixed: The training graph with all layers of ``gain`` mixed; the same updates.
        gain: Layer that may be mixed -> score of the quantization noise that this avoids.
        blocks: Blocks that may be streamed.
        streamed: The forward graph with all of them streamed.
        parts: Where updates are chosen under a limit of time: training graphs with one candidate
            of each parameter, whose weights are split, and the same with the layers of ``gain``
            mixed.
    """

    mixed: TrainingGraph | None = None
    gain: Mapping[str, int] | None = None
    blocks: tuple[Block, ...] = ()
    streamed: Graph | None = None
    parts: tuple[tuple[TrainingGraph, TrainingGraph | None], ...] = ()


def kernels(*nodes: Node) -> tuple[str, ...]:
    """C functions that these nodes call, each once."""
    symbols = (c.symbol for n in nodes if (c := get_op(n.op).c) is not None)
    return tuple(dict.fromkeys(symbols))


def update_nodes(update: Update, node: Node, *, last_micro: bool) -> tuple[Node, ...]:
    """The nodes that an update step executes."""
    if last_micro or update.grad_node is None:
        return (node,)
    return update.grad_node, node


class MixedForms:
    """Costs of nodes and updates where their layer is mixed."""

    def __init__(
        self, choices: Choices, cost: CostModel, new_activity: Callable[[str], int]
    ) -> None:
        """Give every layer its activity."""
        self._cost = cost
        self._gain = choices.gain or {}
        self._nodes: dict[str, Node] = {}
        self._updates: dict[object, Update] = {}
        if choices.mixed is not None:
            self._nodes = {n.name: n for n in choices.mixed.graph.nodes}
            self._updates = {u.candidate: u for u in choices.mixed.updates}
        self.choice = {layer: new_activity(layer) for layer in self._gain}

    def layer(self, node: Node) -> str | None:
        """The layer with a choice that a forward or backward node belongs to."""
        if node.name in self.choice:
            return node.name
        owner = node.name.rpartition("/")[0]
        return owner if owner in self.choice and node.phase != "forward" else None

    def of_node(self, node: Node, micro: int) -> Form | None:
        """The form of a step that runs one node; None if mixing its layer changes nothing."""
        layer, other = self.layer(node), self._nodes.get(node.name)
        if layer is None or other is None or other.op == node.op:
            return None
        return Form(
            self.choice[layer],
            self._cost.node_cycles(other) * micro,
            aligned(get_op(other.op).workspace(other)),
            kernels(other),
        )

    def of_update(self, update: Update, micro: int, *, last_micro: bool) -> Form | None:
        """The form of an update step."""
        layer, other = update.owner.name, self._updates.get(update.candidate)
        if layer not in self.choice or other is None:
            return None
        consumer = other.apply_node if last_micro else other.accumulate_node or other.apply_node
        if last_micro:
            return Form(self.choice[layer], self._cost.node_cycles(consumer), 0, kernels(consumer))
        nodes = update_nodes(other, consumer, last_micro=False)
        scratch = aligned(get_op(consumer.op).workspace(consumer)) + aligned(other.tile_bytes)
        if other.grad_node is not None:
            scratch += aligned(get_op(other.grad_node.op).workspace(other.grad_node))
        cycles = self._cost.update_cycles(other) * micro
        return Form(self.choice[layer], cycles, scratch, kernels(*nodes))

    def layers(self, training: TrainingGraph, slots: Sequence[Slot]) -> tuple[MixedLayer, ...]:
        """The choices, with the flash that they add."""
        nodes = {n.name: n for n in training.graph.nodes}
        again: dict[str, set[int]] = {}
        for s in slots:
            if s.rebuild:
                again.setdefault(s.node.name, set()).add(s.activity)
        return tuple(
            MixedLayer(
                name,
                activity,
                self._gain[name],
                _constant_bytes(self._nodes[name]) - _constant_bytes(nodes[name]),
                tuple(sorted(again.get(name, ()))),
            )
            for name, activity in self.choice.items()
        )

    def update(self, update: Update, activity: int, importance: int) -> MixedUpdate | None:
        """What an update adds."""
        layer, other = update.owner.name, self._updates.get(update.candidate)
        if layer not in self.choice or other is None:
            return None
        more = sum(aligned(v.type.nbytes) for v in other.resident)
        less = sum(aligned(v.type.nbytes) for v in update.resident)
        extra = importance - score_of(update, importance)
        padding = split_padding(other) - split_padding(update)
        return MixedUpdate(activity, self.choice[layer], more - less, extra, padding)


def score_of(update: Update, importance: int) -> int:
    """Importance of an update in the precision that it has; int32 biases lose nothing."""
    if update.value.type.dtype != "i8":
        return importance
    return max(1, round(I8_UPDATE * importance))


def split_padding(update: Update) -> int:
    """Flash that the split of a partly updated weight adds to the whole tensor's."""
    whole = next((v for v in update.owner.operands() if v.name == update.candidate.param), None)
    if update.candidate.channels is None or whole is None:
        return 0  # whole, or split in this graph already
    part, total = update.value.type.nbytes, whole.type.nbytes
    return aligned(part) + aligned(total - part) - aligned(total)


def split_costs(
    choices: Choices, training: TrainingGraph, cost: CostModel, activity: Mapping[Update, int]
) -> dict[str, tuple[SplitCost, ...]]:
    """Node -> what the partial updates of its weight add to its cycles.

    Args:
        choices: Has the graphs in which weights are split.
        training: The superset graph, whose weights are whole.
        cost: Predicted costs.
        activity: Of every update of ``training``.
    """
    by_name = [
        {} if g is None else {n.name: n for n in g.graph.nodes} for g in (training, choices.mixed)
    ]
    activities: dict[tuple[str, int | None], list[int]] = {}
    for u, a in activity.items():
        activities.setdefault((u.candidate.param, u.candidate.channels), []).append(a)
    found: dict[str, list[SplitCost]] = {}
    for pair in choices.parts:
        split = [{} if g is None else {n.name: n for n in g.graph.nodes} for g in pair]
        for u in pair[0].updates:
            if u.candidate.channels is None:
                continue
            updates = activities.pop((u.candidate.param, u.candidate.channels), [])
            for name, node in split[0].items():
                if node.phase == "update" or u.value not in node.operands():
                    continue
                more = [
                    cost.node_cycles(s[name]) - cost.node_cycles(w[name]) if name in s else 0
                    for s, w in zip(split, by_name, strict=True)
                ]
                costs = found.setdefault(name, [])
                costs += (SplitCost(a, more[0], more[1]) for a in updates if any(more))
    return {name: tuple(costs) for name, costs in found.items()}


def _constant_bytes(node: Node) -> int:
    return sum(aligned(v.type.nbytes) for v in node.operands() if v.producer is None)


def stream_choices(
    choices: Choices,
    storage: Storage,
    slots: Sequence[Slot],
    cost: CostModel,
    mixed: Mapping[str, int],
    new_activity: Callable[[str], int],
) -> tuple[StreamChoice, ...]:
    """The blocks that may be streamed in this problem.

    Args:
        choices: Blocks and their streamed nodes.
        storage: Of the training graph.
        slots: Its timeline.
        cost: Predicted costs.
        mixed: Layer -> activity of its choice: a streamed block has i8 layers.
        new_activity: Makes the activity of a block.
    """
    if choices.streamed is None:
        return ()
    nodes = {n.name: n for n in choices.streamed.nodes}
    values = storage.training.graph.values
    micro = storage.training.spec.micro_batches
    result: list[StreamChoice] = []
    for block in choices.blocks:
        names = set(block.nodes)
        own = [s for s in slots if s.node.name in names and not s.rebuild]
        target = storage.of[values[block.result]]
        source = storage.of[values[block.source]]
        inner = {
            t
            for s in own
            for v in s.node.outputs
            if (t := storage.of[v]) is not target and t is not source
        }
        excludes = {
            s.activity
            for s in slots
            if s not in own
            and (
                inner.intersection((*s.reads, *s.writes))
                or s.node.name in names
                or (s.node.phase != "forward" and _owner(s.node) in names)
                or (s.update is not None and s.update.owner.name in names)
            )
        }
        if ALWAYS in excludes:
            continue
        node = nodes[block.name]
        scratch = aligned(get_op(node.op).workspace(node))
        outside = any(
            source in s.reads for s in slots if s not in own and s.activity not in excludes
        )
        takes_over = _takes_over(node) and not outside
        if target is source and not takes_over:
            scratch += target.bytes
        excludes |= {mixed[n] for n in names if n in mixed}
        result.append(
            StreamChoice(
                block.name,
                new_activity(block.name),
                tuple(s.index for s in own),
                tuple(sorted(inner, key=lambda t: t.index)),
                None if target is source or takes_over else target,
                source if takes_over and target is not source else None,
                scratch,
                cost.node_cycles(node) * micro,
                kernels(node),
                tuple(sorted(excludes)),
            )
        )
    return tuple(result)


def _owner(node: Node) -> str:
    return node.name.rpartition("/")[0]


def _takes_over(node: Node) -> bool:
    """The streamed block writes its result over its operand."""
    source = node.inputs[0]
    return (
        bool(inplace_operands(node))
        and source is not None
        and source.type.stored == node.out.type.stored
    )
