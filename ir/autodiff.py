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

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from .errors import UnsupportedModelError, UsageError
from .graph import Attr, Graph, Node, TensorType, Value
from .opdef import ParamSlot, get_op
from .training import TILE_BYTES, Candidate, TrainingGraph, TrainingSpec, Update


class GradBuilder:
    """Appends the gradient nodes of one forward node.

    Attributes:
        graph: The training graph under construction.
        node: The forward node that is being differentiated.
        channels: Leading input channels of the weight whose gradient is built; None: all.
    """

    def __init__(self, graph: Graph, node: Node, aux: dict[Node, list[Node]]) -> None:
        """Used by ``build_training`` only."""
        self.graph = graph
        self.node = node
        self.channels: int | None = None
        self._aux = aux

    def add(
        self,
        op: str,
        inputs: Iterable[Value | None],
        attrs: Mapping[str, Attr] | None = None,
        *,
        suffix: str,
    ) -> Value:
        """Append a backward node named ``<forward node>/<suffix>`` and return its first result."""
        name = f"{self.node.name}/{suffix}"
        return self.graph.add_node(op, inputs, attrs, name=name, phase="backward").out

    def aux(
        self,
        op: str,
        inputs: Sequence[Value],
        attrs: Mapping[str, Attr] | None = None,
        *,
        suffix: str,
    ) -> Value:
        """A node that runs in the forward phase, right after the node being differentiated.

        It condenses what backward needs (a sign mask, an argmax index, leading channels). An equal
        node made earlier is used again.
        """
        for old in self._aux.get(self.node, ()):
            if old.op == op and old.inputs == tuple(inputs) and old.attrs == dict(attrs or {}):
                return old.out
        name = f"{self.node.name}/{suffix}"
        node = self.graph.add_node(op, inputs, attrs, name=name, phase="forward")
        self._aux.setdefault(self.node, []).append(node)
        return node.out

    def leading_channels(self, x: Value, axis: int) -> Value:
        """The channels of ``x`` that the partial weight gradient needs; ``x`` itself for all."""
        k = self.channels
        if k is None or k == x.type.shape[axis]:
            return x
        rank = len(x.type.shape)
        attrs: dict[str, Attr] = {
            "starts": (0,) * rank,
            "sizes": tuple(k if i == axis else d for i, d in enumerate(x.type.shape)),
            "steps": (1,) * rank,
        }
        return self.aux("Slice", (x,), attrs, suffix=f"channels{k}")


def param_slots(graph: Graph) -> dict[str, list[tuple[Node, ParamSlot]]]:
    """Where each float constant is used as a trainable parameter.

    Returns:
        Constant name -> uses, for every constant all of whose uses are parameter slots.
    """
    uses: dict[str, list[tuple[Node, ParamSlot]]] = {}
    blocked: set[str] = set()
    for node in graph.nodes:
        slots = {s.index: s for s in get_op(node.op).params}
        for i, v in enumerate(node.inputs):
            if v is None or v.name not in graph.constants:
                continue
            if i in slots and v.type.dtype == "f32":
                uses.setdefault(v.name, []).append((node, slots[i]))
            else:
                blocked.add(v.name)
    return {name: u for name, u in uses.items() if name not in blocked}


def candidates(graph: Graph, ratios: Sequence[float] = (0.125, 0.25, 0.5, 1.0)) -> list[Candidate]:
    """All ways to update the parameters of a forward graph, in forward order.

    A weight offers ``max(1, floor(ratio x channels))`` leading input channels for each ratio below 1;
    equal counts are offered once. Parameters used twice (tied) are only updated whole.
    """
    result: list[Candidate] = []
    for name, uses in param_slots(graph).items():
        node, slot = uses[0]
        axis = slot.channel_axis(node) if len(uses) == 1 and slot.cold_index is not None else None
        if axis is not None:
            total = graph.values[name].type.shape[axis]
            counts = sorted({max(1, int(total * r)) for r in ratios if r < 1})
            result += [Candidate(name, k) for k in counts if k < total]
        result.append(Candidate(name))
    return result


def build_training(
    forward: Graph, spec: TrainingSpec, chosen: Sequence[Candidate]
) -> TrainingGraph:
    """Forward + loss + backward + update, backward pruned to what the chosen candidates need.

    Args:
        forward: Imported graph with one data input and one prediction; it is not modified.
        spec: Loss, optimizer, micro-batches.
        chosen: What to update. Several candidates of one parameter make the superset graph.

    Raises:
        UnsupportedModelError: A node on the way from the loss to a chosen parameter has no gradient.
        UsageError: A candidate names no trainable parameter, or none is chosen.
    """
    return _TrainingBuilder(forward, spec, chosen).build()


class _TrainingBuilder:
    def __init__(self, forward: Graph, spec: TrainingSpec, chosen: Sequence[Candidate]) -> None:
        if len(forward.inputs) != 1 or len(forward.outputs) != 1:
            raise UnsupportedModelError(
                f"{forward.name} has {len(forward.inputs)} inputs and {len(forward.outputs)} outputs;"
                " training needs one of each"
            )
        slots = param_slots(forward)
        for c in chosen:
            if c.param not in slots:
                raise UsageError(f"{c.param} is not a trainable parameter of {forward.name}")
        self.forward, self.spec, self.slots = forward, spec, slots
        self.chosen: dict[str, list[Candidate]] = {}
        for c in chosen:
            self.chosen.setdefault(c.param, []).append(c)
        self.superset = any(len(cs) > 1 for cs in self.chosen.values())
        self.graph = Graph(forward.name)
        self.map: dict[Value, Value] = {}
        self.cold: dict[str, Value] = {}
        self.aux: dict[Node, list[Node]] = {}
        self.grads: dict[Value, Value] = {}
        self.updates: list[Update] = []

    def build(self) -> TrainingGraph:
        prediction = self._copy_forward()
        sample = self.graph.inputs[0]
        forward_nodes = list(self.graph.nodes)
        self.hyper = self.graph.add_input("hyper", TensorType((2,)))
        logits, loss, target, seed = self._loss(prediction)
        needed = self._needed(forward_nodes)
        loss_nodes = [n for n in self.graph.nodes if n.phase == "loss"]
        self.graph.nodes = [n for n in self.graph.nodes if n.phase != "loss"]
        if logits in needed:
            self.grads[logits] = seed()
        skip = prediction.producer if logits is not prediction else None
        for node in reversed(forward_nodes):
            if node is not skip:
                self._differentiate(node, needed)
        self.graph.outputs = [loss, prediction]
        self.graph.nodes = self._ordered(forward_nodes, loss_nodes)
        self.graph.verify()
        return TrainingGraph(
            self.graph, self.spec, sample, target, self.hyper, prediction, loss, tuple(self.updates)
        )

    def _copy_forward(self) -> Value:
        g, f = self.graph, self.forward
        self.map[f.inputs[0]] = g.add_input(f.inputs[0].name, f.inputs[0].type)
        for name, data in f.constants.items():
            split = None if self.superset else self._split(name)
            if split is None:
                self.map[f.values[name]] = g.add_constant(name, data, f.values[name].type.dtype)
            else:
                k, axis = split
                hot, cold = np.split(data, [k], axis=axis)
                self.map[f.values[name]] = g.add_constant(f"{name}[:{k}]", np.ascontiguousarray(hot))
                self.cold[name] = g.add_constant(f"{name}[{k}:]", np.ascontiguousarray(cold))
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
        return self.map[f.outputs[0]]

    def _split(self, name: str) -> tuple[int, int] | None:
        """Hot channel count and axis of a partly updated weight."""
        k = self.chosen[name][0].channels if name in self.chosen else None
        if k is None:
            return None
        node, slot = self.slots[name][0]
        axis = slot.channel_axis(node)
        if axis is None or slot.cold_index is None or len(self.slots[name]) > 1:
            raise UsageError(f"{name} can only be updated whole")
        total = self.forward.values[name].type.shape[axis]
        if not 0 < k < total:
            raise UsageError(f"{name} has {total} input channels; {k} of them can't be updated")
        return k, axis

    def _loss(self, prediction: Value):  # type: ignore[no-untyped-def]
        g = self.graph
        if self.spec.loss == "mse":
            target = g.add_input("target", prediction.type)
            loss = g.add_node("MSE", (prediction, target), name="loss", phase="loss").out
            return prediction, loss, target, lambda: g.add_node(
                "MSEGrad", (prediction, target), name="loss/grad", phase="backward"
            ).out
        if len(prediction.type.shape) != 2:
            raise UnsupportedModelError(
                f"cross entropy needs a prediction [batch, classes]; {prediction.name} is"
                f" {prediction.type}; use --loss mse"
            )
        target = g.add_input("target", TensorType((prediction.type.shape[0],), "i32"))
        producer = prediction.producer
        if producer is not None and producer.op == "Softmax" and producer.inputs[0] is not None:
            logits, probs = producer.inputs[0], prediction
        else:
            logits = prediction
            probs = g.add_node(
                "Softmax", (prediction,), {"axis": -1}, name="loss/softmax", phase="loss"
            ).out
        loss = g.add_node("CrossEntropy", (probs, target), name="loss", phase="loss").out
        return logits, loss, target, lambda: g.add_node(
            "SoftmaxCrossEntropyGrad", (probs, target), name="loss/grad", phase="backward"
        ).out

    def _needed(self, nodes: Sequence[Node]) -> set[Value]:
        """Values whose gradient some chosen parameter upstream needs."""
        needed: set[Value] = set()
        for node in nodes:
            trained = any(self._trained(node, s) for s in get_op(node.op).params)
            if trained or any(v in needed for v in node.operands()):
                needed.update(node.outputs)
        if not needed:
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
        if dy is None or node.out not in needed:
            return
        op = get_op(node.op)
        if op.vjp is None:
            raise UnsupportedModelError(
                f"node {node.name}: {node.op} has no gradient; freeze everything before it"
            )
        builder = GradBuilder(self.graph, node, self.aux)
        chosen = [(s, name) for s in op.params if (name := self._trained(node, s)) is not None]
        for slot, name in chosen:
            if slot.role != "weight":
                self._update(builder, slot, name, dy)
        need = [v is not None and v in needed for v in node.inputs]
        if any(need):
            parts = op.vjp(builder, node, dy, need)
            for v, d, wanted in zip(node.inputs, parts, need, strict=True):
                if v is not None and d is not None and wanted:
                    self._contribute(builder, v, d)
        for slot, name in chosen:
            if slot.role == "weight":
                self._update(builder, slot, name, dy)

    def _contribute(self, builder: GradBuilder, v: Value, d: Value) -> None:
        old = self.grads.get(v)
        self.grads[v] = d if old is None else builder.add("Add", (old, d), suffix=f"sum/{v.name}")

    def _update(self, builder: GradBuilder, slot: ParamSlot, name: str, dy: Value) -> None:
        if len(self.slots[name]) > 1:
            raise UnsupportedModelError(f"{name} is shared by several nodes; it can't be trained yet")
        node = builder.node
        op = get_op(node.op)
        assert op.vjp is not None
        for candidate in self.chosen[name]:
            value = self._param_value(candidate, node, slot)
            builder.channels = candidate.channels
            need = [i == slot.index for i in range(len(node.inputs))]
            before = len(self.graph.nodes)
            grad = op.vjp(builder, node, dy, need)[slot.index]
            builder.channels = None
            assert grad is not None and grad.producer is not None, (node.name, name)
            # A view or a gradient that others read as well is an ordinary tensor, never streamed.
            fresh = grad.producer in self.graph.nodes[before:] and not get_op(grad.producer.op).view
            if grad.type != value.type:
                raise UnsupportedModelError(
                    f"node {node.name}: gradient {grad.type} of {name} is not {value.type}"
                )
            self._apply(candidate, slot, node, value, grad, grad.producer if fresh else None)

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
        return self.graph.add_state(f"{whole.name}[:{candidate.channels}]", TensorType(shape))

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
        states = tuple(g.add_state(f"{value.name}.{s}", value.type) for s in spec.state_slots)
        accumulator, accumulate_node, source = None, None, grad
        if spec.micro_batches > 1:
            accumulator = g.add_state(f"{value.name}.accumulated", value.type)
            accumulate_node = g.add_node(
                "Accumulate", (accumulator, grad), name=f"{value.name}/accumulate", phase="update"
            )
            source = accumulate_node.out
        attrs: dict[str, Attr] = {"gradient_scale": 1.0 / spec.micro_batches}
        if spec.optimizer == "momentum":
            attrs["momentum"] = spec.momentum
        elif spec.optimizer == "adam":
            attrs |= {"beta1": spec.beta1, "beta2": spec.beta2, "epsilon": spec.epsilon}
        kind = {"sgd": "SGD", "momentum": "Momentum", "adam": "Adam"}[spec.optimizer]
        apply_node = g.add_node(
            kind,
            (value, source, *states, self.hyper),
            attrs,
            name=f"{value.name}/update",
            outputs=[f"{v.name}'" for v in (value, *states)],
            phase="update",
        )
        rows = value.type.shape[0] if value.type.shape else 1
        tile = rows
        if grad_node is not None and get_op(grad_node.op).rows_kernel is not None:
            tile = max(1, min(rows, TILE_BYTES // (value.type.nbytes // rows)))
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

    def _ordered(self, forward_nodes: list[Node], loss_nodes: list[Node]) -> list[Node]:
        aux = {n for nodes in self.aux.values() for n in nodes}
        forward = set(forward_nodes)
        result: list[Node] = []
        for node in forward_nodes:
            result += [node, *self.aux.get(node, ())]
        result += loss_nodes
        result += [n for n in self.graph.nodes if n not in aux and n not in forward]
        return result
