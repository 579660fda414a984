"""Onnx's optimizers (domain ``ai.onnx.preview.training``), carried out by the project's own.

They are Adagrad, Adam and Momentum of a list of tensors, with terms that training here has no use
for: L2 regularization, a decay of the step size, Nesterov's step. Those are nodes before and after
the update; the scalars that depend on the time step are made here, as training makes them outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, helper
from onnx.backend.base import BackendRep, namedtupledict

from ..ir.errors import UnsupportedModelError, UsageError
from ..ir.graph import Array, Graph, TensorType, Value
from ..ir.interpreter import run

DOMAIN = "ai.onnx.preview.training"
#: Operator -> its tensors per parameter, beside the parameter and its gradient.
STATES = {"Adagrad": 1, "Adam": 2, "Momentum": 1}


def has_optimizers(model: ModelProto) -> bool:
    """All nodes of the model are optimizers that are known here."""
    nodes = model.graph.node
    return bool(nodes) and all(n.domain == DOMAIN and n.op_type in STATES for n in nodes)


class OptimizerRep(BackendRep):
    """A model of optimizers, ready to run."""

    def __init__(self, model: ModelProto) -> None:
        """Of a model for which ``has_optimizers`` holds."""
        self._model = model
        self._path = Path(model.graph.name or "model")

    def run(self, inputs: Sequence[Any], **kwargs: Any) -> tuple[Any, ...]:
        """Carry out the updates.

        Args:
            inputs: One array for each input of the model, float32 but for the time steps.
            kwargs: None are known.

        Returns:
            New parameters and optimizer tensors, by position and by name.

        Raises:
            UsageError: Too many or too few inputs.
            UnsupportedModelError: Tensors that are not float32, or an unknown mode.
        """
        graph = self._model.graph
        if len(inputs) != len(graph.input):
            raise UsageError(f"{self._path}: {len(inputs)} inputs; it has {len(graph.input)}")
        env = {v.name: np.asarray(x) for v, x in zip(graph.input, inputs, strict=True)}
        for node in graph.node:
            results = self._updated(node, [env[i] for i in node.input])
            env |= zip(node.output, results, strict=True)
        names = [o.name for o in graph.output]
        named: tuple[Any, ...] = namedtupledict("Outputs", names)(*(env[n] for n in names))
        return named

    def _updated(self, node: NodeProto, operands: Sequence[Array]) -> list[Array]:
        """Results of one node: all parameters, then all of each kind of optimizer tensor."""
        rate, time, *tensors = operands
        kinds = 2 + STATES[node.op_type]
        count = len(tensors) // kinds
        where = f"{self._path}: {node.name or node.op_type} ({node.op_type})"
        if count * kinds != len(tensors):
            raise UsageError(f"{where}: {len(tensors)} tensors are not {kinds} for each parameter")
        if any(x.dtype != np.float32 for x in tensors):
            raise UnsupportedModelError(f"{where}: only float32 is supported")
        attrs = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        mode = attrs.get("mode", b"standard").decode()
        if mode not in ("standard", "nesterov"):
            raise UnsupportedModelError(f"{where}: the mode {mode} is not known")
        results = [
            _Update(node.op_type, attrs, float(rate), int(time)).run(tensors[i::count])
            for i in range(count)
        ]
        return [r for kind in zip(*results, strict=True) for r in kind]


class _Update:
    """One update of one parameter as a graph."""

    def __init__(self, op: str, attrs: dict[str, Any], rate: float, time: int) -> None:
        self.op, self.attrs, self.rate, self.time = op, attrs, rate, time
        self.graph = Graph(op)

    def run(self, tensors: Sequence[Array]) -> list[Array]:
        """New parameter and optimizer tensors of a parameter, its gradient and its tensors."""
        g = self.graph
        w, grad, *states = (
            g.add_input(f"operand{i}", TensorType(x.shape)) for i, x in enumerate(tensors)
        )
        feeds = {v.name: x for v, x in zip(g.inputs, tensors, strict=True)}
        if norm := self._number("norm_coefficient", 0.0):
            grad = self._emit("Add", self._times(w, norm), grad)
        new, *moments = getattr(self, f"_{self.op.lower()}")(w, grad, states)
        if post := self._number("norm_coefficient_post", 0.0):
            new = self._times(new, 1.0 - post)
        env = run(g, feeds)
        return [env[v.name] for v in (new, *moments)]

    def _adagrad(self, w: Value, grad: Value, states: Sequence[Value]) -> tuple[Value, ...]:
        rate = self.rate / (1.0 + self.time * self._number("decay_factor", 0.0))
        attrs = {"epsilon": self._number("epsilon", 0.0)}
        return self._update("Adagrad", (w, grad, *states), rate, **attrs)

    def _adam(self, w: Value, grad: Value, states: Sequence[Value]) -> tuple[Value, ...]:
        alpha, beta = self._number("alpha", 0.9), self._number("beta", 0.999)
        rate = self.rate
        if self.time > 0:
            rate *= (1.0 - beta**self.time) ** 0.5 / (1.0 - alpha**self.time)
        attrs = {"beta1": alpha, "beta2": beta, "epsilon": self._number("epsilon", 0.0)}
        return self._update("Adam", (w, grad, *states), rate, **attrs)

    def _momentum(self, w: Value, grad: Value, states: Sequence[Value]) -> tuple[Value, ...]:
        alpha = self._number("alpha", 0.0)
        scale = self._number("beta", 0.0) if self.time > 0 else 1.0
        attrs = {"momentum": alpha, "gradient_scale": scale}
        new, moment = self._update("Momentum", (w, grad, *states), self.rate, **attrs)
        if self.attrs.get("mode") == b"nesterov":  # along the gradient and the new moment
            (half,) = self._update("SGD", (w, grad), self.rate)
            (new,) = self._update("SGD", (half, moment), self.rate * alpha)
        return new, moment

    def _update(
        self, op: str, operands: Sequence[Value], rate: float, **attrs: float
    ) -> tuple[Value, ...]:
        """Nodes of an optimizer whose step size is final: no correction is left to it."""
        factors = [rate, 1.0, self.time + 1, *([rate] if op == "Adam" else [])]
        data = np.array(factors, np.float32)
        hyper = self.graph.add_constant(f"hyper{len(self.graph.nodes)}", data)
        return self.graph.add_node(op, (*operands, hyper), attrs, name=op).outputs

    def _times(self, x: Value, factor: float) -> Value:
        data = np.array(factor, np.float32)
        return self._emit("Mul", x, self.graph.add_constant(f"factor of {x.name}", data))

    def _emit(self, op: str, *operands: Value) -> Value:
        return self.graph.add_node(op, operands, name=op).out

    def _number(self, key: str, default: float) -> float:
        return float(self.attrs.get(key, default))
