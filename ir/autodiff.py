"""Reverse-mode automatic differentiation from graph to graph, and the whole training graph.

Gradient rules (``OpDef.vjp``) build IR nodes through a ``GradBuilder``. What backward needs of
forward is the set of edges that cross the phases: derived, never declared.

``build_training`` serves two callers with one code path. With one candidate per parameter it makes
the graph that a plan executes: a partly updated weight is split into its hot leading channels (RAM)
and its cold rest (flash). With several candidates per parameter it makes the superset graph from
which the planner chooses; weights stay whole there, and every candidate has its own gradient and
update nodes.
"""

from __future__ import annotations

import zlib
from collections.abc import Container, Sequence

import numpy as np

from .adapters import without_unused
from .candidates import candidates, param_slots, saves
from .errors import UnsupportedModelError, UsageError
from .grad_builder import GradBuilder
from .graph import Attr, Graph, Node, TensorType, Value
from .losses import Ending, add_losses
from .opdef import ParamSlot, get_op
from .ops.qtypes import scales_constant
from .parameter_steps import part, steps
from .predictions import check_predictions
from .training import (
    STATE_SLOTS,
    Candidate,
    OptimizerName,
    TrainingGraph,
    TrainingSpec,
    Update,
)

__all__ = ["GradBuilder", "build_training", "candidates", "param_slots"]

#: Layers whose gradient runs through time.
RECURRENT = ("GRU", "LSTM", "RNN")
#: Bits of a positive int32, which a parameter's stream of random numbers is told by in C.
_POSITIVE = 2**31 - 1


def build_training(
    forward: Graph, spec: TrainingSpec, chosen: Sequence[Candidate]
) -> TrainingGraph:
    """Forward + loss + backward + update, backward pruned to what the chosen candidates need.

    Args:
        forward: Imported graph of data inputs and predictions; it is not modified. Adapters of
            which nothing is updated are left out.
        spec: Losses, optimizer, micro-batches.
        chosen: What to update. Several candidates of one parameter make the superset graph.

    Raises:
        UnsupportedModelError: A node between a chosen parameter and the loss has no gradient, or
            a prediction does not suit its loss.
        UsageError: A candidate names no trainable parameter, can't be had in that part, or does not
            reach the loss; or none is chosen.
    """
    return _TrainingBuilder(forward, spec, chosen).build()


class _TrainingBuilder:
    def __init__(self, forward: Graph, spec: TrainingSpec, chosen: Sequence[Candidate]) -> None:
        check_predictions(forward)
        forward = without_unused(forward, {c.param for c in chosen})
        if spec.bptt is not None and not any(n.op in RECURRENT for n in forward.nodes):
            raise UsageError(f"--bptt: {forward.name} has no recurrent layer; leave it out")
        self.forward, self.spec, self.slots = forward, spec, param_slots(forward)
        self.chosen: dict[str, list[Candidate]] = {}
        for c in chosen:
            self._check(c)
            if c in self.chosen.setdefault(c.param, []):
                raise UsageError(f"{c.param} is chosen twice in the same way")
            self.chosen[c.param].append(c)
        self.superset = any(len(cs) > 1 for cs in self.chosen.values())
        self.graph = Graph(forward.name)
        self.graph.unchanged, self.graph.merged = forward.unchanged, forward.merged
        self.graph.adapters, self.graph.orders = forward.adapters, forward.orders
        self.map: dict[Value, Value] = {}
        self.cold: dict[str, Value] = {}
        self.aux: dict[Node, list[Node]] = {}
        self.grads: dict[Value, Value] = {}
        self.updates: list[Update] = []

    def _check(self, candidate: Candidate) -> None:
        name, k = candidate.param, candidate.channels
        if name not in self.slots:
            raise UsageError(f"{name} is not a trainable parameter of {self.forward.name}")
        if candidate.saved not in saves(self.forward, self.slots[name], whole=k is None):
            raise UsageError(f"the input for {candidate} can't be kept as {candidate.saved}")
        if candidate.state != "keep" and not self.spec.state_slots:
            raise UsageError(f"{self.spec.optimizer} has no state of {name} to keep elsewhere")
        if k is None:
            return
        node, slot = self.slots[name][0]
        axis = slot.channel_axis(node)
        if axis is None or slot.cold_index is None or len(self.slots[name]) > 1:
            raise UsageError(f"{name} can only be updated whole")
        total = self.forward.values[name].type.shape[axis]
        if not 0 < k < total:
            raise UsageError(f"{name} has {total} input channels; {k} of them can't be updated")

    def build(self) -> TrainingGraph:
        predictions = self._copy_forward()
        samples = tuple(self.graph.inputs)
        forward_nodes = list(self.graph.nodes)
        size = 4 if self.spec.optimizer == "adam" else 3
        self.hyper = self.graph.add_input("hyper", TensorType((size,)))
        ends, loss = add_losses(self.graph, predictions, self.spec, self.forward.loss)
        passed = [*forward_nodes, *(n for end in ends for n in end.nodes)]
        needed = self._needed(passed)
        loss_nodes = [n for n in self.graph.nodes if n.phase == "loss"]
        self.graph.nodes = [n for n in self.graph.nodes if n.phase != "loss"]
        self.ends = {v for end in ends for v in _stored_forms(end.start)}
        for node in reversed(passed):
            self._seed(node, ends, needed)
            self._differentiate(node, needed)
        updated = {u.candidate.param for u in self.updates}
        if missing := [name for name in self.chosen if name not in updated]:
            raise UsageError(f"the loss does not depend on {', '.join(missing)}; freeze them")
        self.graph.outputs = [loss, *predictions]
        self.graph.nodes = self._ordered(forward_nodes, loss_nodes)
        self.graph.verify()
        return TrainingGraph(
            self.graph,
            self.spec,
            samples,
            tuple(end.target for end in ends),
            self.hyper,
            predictions,
            loss,
            tuple(self.updates),
        )

    def _seed(self, node: Node, ends: Sequence[Ending], needed: Container[Value]) -> None:
        """Begin backward where losses read what a node makes."""
        for end in ends:
            start = end.loss if end.nodes else end.start
            if start in node.outputs and end.start in needed:
                d, old = end.seed(), self.grads.get(start)
                if old is not None:
                    name = f"{start.name}/grad/sum"
                    d = self.graph.add_node("Add", (old, d), name=name, phase="backward").out
                self.grads[start] = d

    def _copy_forward(self) -> tuple[Value, ...]:
        g, f = self.graph, self.forward
        self.map |= {v: g.add_input(v.name, v.type) for v in f.inputs}
        for name, data in f.constants.items():
            split = None if self.superset else self._split(name)
            if split is None:
                t = f.values[name].type
                self.map[f.values[name]] = g.add_constant(
                    name, data, t.dtype, t.quant, shape=t.shape
                )
            else:
                k, axis = split
                hot, cold = np.split(data, [k], axis=axis)
                hot, cold = np.ascontiguousarray(hot), np.ascontiguousarray(cold)
                quant, end = f.values[name].type.quant, data.shape[axis]
                self.map[f.values[name]] = g.add_constant(
                    f"{name}[:{k}]", hot, None, part(quant, axis, 0, k)
                )
                self.cold[name] = g.add_constant(
                    f"{name}[{k}:]", cold, None, part(quant, axis, k, end)
                )
        for node in f.nodes:
            inputs = [None if v is None else self.map[v] for v in node.inputs]
            for slot in get_op(node.op).params:
                v = node.inputs[slot.index] if slot.index < len(node.inputs) else None
                if v is not None and v.name in self.cold and slot.cold_index is not None:
                    inputs += [None] * (slot.cold_index + 1 - len(inputs))
                    inputs[slot.cold_index] = self.cold[v.name]
            new = g.add_node(
                node.op, inputs, node.attrs, name=node.name, outputs=[v.name for v in node.outputs]
            )
            self.map.update(zip(node.outputs, new.outputs, strict=True))
        return tuple(self.map[v] for v in f.outputs)

    def _split(self, name: str) -> tuple[int, int] | None:
        """Hot channel count and axis of a partly updated weight."""
        k = self.chosen[name][0].channels if name in self.chosen else None
        if k is None:
            return None
        node, slot = self.slots[name][0]
        axis = slot.channel_axis(node)
        assert axis is not None, name  # _check
        return k, axis

    def _needed(self, nodes: Sequence[Node]) -> set[Value]:
        """Values whose gradient some chosen parameter upstream needs."""
        needed: set[Value] = set()
        for node in nodes:
            slots = (s for s in get_op(node.op).params if s.role != "statistic")
            trained = any(self._trained(node, s) for s in slots)
            if trained or any(v in needed for v in node.operands()):
                needed.update(node.outputs)
        if not self.chosen:
            raise UsageError("no parameter is chosen for training")
        return needed

    def _trained(self, node: Node, slot: ParamSlot) -> str | None:
        """The name of the chosen parameter in this slot."""
        if slot.index >= len(node.inputs) or node.inputs[slot.index] is None:
            return None
        for name in self.chosen:
            if self.map[self.forward.values[name]] is node.inputs[slot.index]:
                return name
        return None

    def _differentiate(self, node: Node, needed: set[Value]) -> None:
        dy = self.grads.pop(node.out, None)
        op = get_op(node.op)
        builder = GradBuilder(self.graph, node, self.aux, self.forward.quantization, self.ends)
        builder.bptt = self.spec.bptt
        chosen = [(s, name) for s in op.params if (name := self._trained(node, s)) is not None]
        for slot, name in chosen:
            if slot.role == "statistic":
                self._observe(builder, slot, name)
        chosen = [(slot, name) for slot, name in chosen if slot.role != "statistic"]
        if dy is not None and node.out in needed:
            if op.vjp is None:
                raise UnsupportedModelError(
                    f"node {node.name}: {node.op} has no gradient; freeze everything before it"
                )
            # A bias may change before the input's gradient is built, whose rule never reads it, so
            # that dy can be consumed at once; weights and scales may not.
            for slot, name in chosen:
                if slot.role == "bias":
                    self._update(builder, slot, name, dy)
            need = [v is not None and v in needed for v in node.inputs]
            if any(need):
                parts = op.vjp(builder, node, dy, need)
                for v, d, wanted in zip(node.inputs, parts, need, strict=True):
                    if v is not None and d is not None and wanted:
                        self._contribute(builder, v, d)
            for slot, name in chosen:
                if slot.role != "bias":
                    self._update(builder, slot, name, dy)
        for slot, name in chosen:
            self._update_shared(slot, name, node)

    def _contribute(self, builder: GradBuilder, v: Value, d: Value) -> None:
        old = self.grads.get(v)
        self.grads[v] = d if old is None else builder.add("Add", (old, d), suffix=f"sum/{v.name}")

    def _observe(self, builder: GradBuilder, slot: ParamSlot, name: str) -> None:
        """Update a running statistic, which no gradient reaches."""
        node = builder.node
        value = node.inputs[slot.index]
        assert value is not None, name
        if len(self.slots[name]) > 1:
            raise UsageError(f"{name} is a running statistic of several nodes; freeze it")
        seen = builder.add(slot.observed, (node.inputs[0],), suffix=f"observed/{name}")
        producer = seen.producer
        assert producer is not None, name
        builder.forget(producer)
        self._apply(self.chosen[name][0], slot, node, value, seen, producer)

    def _update(self, builder: GradBuilder, slot: ParamSlot, name: str, dy: Value) -> None:
        node = builder.node
        op = get_op(node.op)
        assert op.vjp is not None
        shared = len(self.slots[name]) > 1  # has one gradient, whatever becomes of it
        for candidate in self.chosen[name][: 1 if shared else None]:
            value = self._param_value(candidate, node, slot)
            builder.channels, builder.saved = candidate.channels, candidate.saved
            need = [i == slot.index for i in range(len(node.inputs))]
            before = len(self.graph.nodes)
            grad = op.vjp(builder, node, dy, need)[slot.index]
            builder.channels, builder.saved = None, "f32"
            assert grad is not None, (node.name, name)
            producer = grad.producer
            assert producer is not None, (node.name, name)
            if grad.type != TensorType(value.type.shape):
                raise UnsupportedModelError(
                    f"node {node.name}: gradient {grad.type} of {name} does not fit {value.type}"
                )
            if shared:
                self._contribute(builder, value, grad)
                continue
            inside = producer in self.graph.nodes[before:] and not get_op(producer.op).view
            if inside:  # a tile, which nobody else can read
                builder.forget(producer)
            self._apply(candidate, slot, node, value, grad, producer if inside else None)

    def _update_shared(self, slot: ParamSlot, name: str, node: Node) -> None:
        """Update a parameter of several nodes where backward has passed the first of them."""
        uses = self.slots[name]
        if len(uses) == 1 or node.name != uses[0][0].name:
            return
        value = node.inputs[slot.index]
        grad = None if value is None else self.grads.pop(value, None)
        if value is not None and grad is not None:
            for candidate in self.chosen[name]:
                self._apply(candidate, slot, node, value, grad, None)

    def _param_value(self, candidate: Candidate, node: Node, slot: ParamSlot) -> Value:
        whole = node.inputs[slot.index]
        assert whole is not None
        if candidate.channels is None or not self.superset:
            return whole
        axis = slot.channel_axis(node)
        assert axis is not None, candidate
        shape = tuple(
            candidate.channels if i == axis else d for i, d in enumerate(whole.type.shape)
        )
        t, k = whole.type, candidate.channels
        kept = TensorType(shape, t.dtype, part(t.quant, axis, 0, k))
        name = f"{whole.name}[:{k}]"
        return self.graph.values.get(name) or self.graph.add_state(name, kept)

    def _apply(
        self,
        candidate: Candidate,
        slot: ParamSlot,
        owner: Node,
        value: Value,
        grad: Value,
        grad_node: Node | None,
    ) -> None:
        g, spec = self.graph, self.spec
        name = value.name
        if self.superset:  # other candidates have the same value
            forms = (candidate.saved, candidate.state)
            name = " ".join([name, *(f for f in forms if f not in ("f32", "keep"))])
        learned = slot.role != "statistic"
        optimizer: OptimizerName = "sgd" if candidate.state == "sgd" else spec.optimizer
        slots = STATE_SLOTS[optimizer] if learned else ()
        states = tuple(g.add_state(f"{name}.{s}", grad.type) for s in slots)
        accumulator, accumulate_node, source = None, None, grad
        if spec.micro_batches > 1:
            accumulator = g.add_state(f"{name}.accumulated", grad.type)
            accumulate_node = g.add_node(
                "Accumulate", (accumulator, grad), name=f"{name}/accumulate", phase="update"
            )
            source = accumulate_node.out
        attrs: dict[str, Attr] = {"gradient_scale": 1.0 / spec.micro_batches}
        if optimizer == "momentum":
            attrs["momentum"] = spec.momentum
        elif optimizer == "adagrad":
            attrs["epsilon"] = spec.epsilon
        elif optimizer == "adam":
            attrs |= {"beta1": spec.beta1, "beta2": spec.beta2, "epsilon": spec.epsilon}
        kind = {"sgd": "SGD"}.get(optimizer, optimizer.capitalize())
        inputs = [value, source, *states, self.hyper]
        if not learned:
            kind, inputs = "RunningAverage", [value, source]
            attrs = {"gradient_scale": attrs["gradient_scale"]}
            attrs["momentum"] = owner.float_attr("momentum", 0.9)
        if value.type.dtype != "f32":
            kind = f"Q{kind}"
            inputs.append(self._scales(value, owner, slot))
            attrs |= {
                "qas": int(spec.qas),
                "rounding": spec.rounding,
                "stream": zlib.crc32(candidate.param.encode()) & _POSITIVE,
            }
        apply_node = g.add_node(
            kind,
            inputs,
            attrs,
            name=f"{name}/update",
            outputs=[f"{v.name}'" for v in (value, *states)],
            phase="update",
        )
        rows = value.type.shape[0] if value.type.shape else 1
        tile = rows
        if grad_node is not None and get_op(grad_node.op).rows_kernel is not None:
            tile = max(1, min(rows, spec.tile_bytes // (grad.type.nbytes // rows)))
        self.updates.append(
            Update(
                candidate,
                slot.role,
                owner,
                value,
                grad,
                grad_node,
                accumulate_node,
                apply_node,
                accumulator,
                states,
                tile,
            )
        )

    def _scales(self, value: Value, owner: Node, slot: ParamSlot) -> Value:
        """The real value of one stored step of each row of an updated integer tensor."""
        whole = owner.inputs[slot.index]
        assert whole is not None, value.name
        if slot.role == "weight":  # rows of a part that runs over input channels are all there
            same = value.type.shape[0] == whole.type.shape[0]
            return scales_constant(self.graph, whole if same else value)
        return self.graph.add_constant(f"{value.name}/scale", steps(owner, slot).astype(np.float32))

    def _ordered(self, forward_nodes: list[Node], loss_nodes: list[Node]) -> list[Node]:
        aux = {n for nodes in self.aux.values() for n in nodes}
        forward = set(forward_nodes)
        result: list[Node] = []
        for node in (*forward_nodes, *loss_nodes):
            result += [node, *self.aux.get(node, ())]
        for node in (n for owner in loss_nodes for n in self.aux.get(owner, ())):
            node.phase = "loss"
        result += [n for n in self.graph.nodes if n not in aux and n not in forward]
        return result


def _stored_forms(value: Value) -> set[Value]:
    """A value, and what it is merely another form of: by a view or dequantization."""
    found, node = {value}, value.producer
    while node is not None and (get_op(node.op).view or node.op == "Dequantize"):
        found.add(source := next(node.operands()))
        node = source.producer
    return found
