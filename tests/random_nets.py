"""Random networks: chains, branches and residuals of the operators that plans are made of."""

from __future__ import annotations

import nets
import numpy as np

from odt_plan.ir.calibrate import calibrate
from odt_plan.ir.graph import Graph, TensorType, Value

#: Behind a layer, or in place of one.
ACTIVATIONS = ("Relu", "Clip", "Sigmoid", "Tanh", "LeakyRelu")


def random_net(seed: int, nodes: int, *, quantized: bool = False) -> Graph:
    """A network of about so many nodes that ends in a classifier.

    Args:
        seed: The same network for the same seed and size.
        nodes: Forward nodes, at least 2; a residual or a branch may add one.
        quantized: With scales of random samples, so that layers may be i8, mixed or streamed.
    """
    return _Random(seed, nodes).build(quantized)


class _Random:
    def __init__(self, seed: int, nodes: int) -> None:
        self.rng = np.random.default_rng((seed, nodes))
        self.nodes = nodes
        self.g = Graph(f"random{seed}")

    def build(self, quantized: bool) -> Graph:
        g, rng = self.g, self.rng
        size, channels = int(rng.integers(4, 8)), int(rng.integers(1, 5))
        x = g.add_input("x", TensorType((1, channels, size, size)))
        shapes: dict[tuple[int, ...], list[Value]] = {x.type.shape: [x]}
        while len(g.nodes) < self.nodes - 2:
            x = self._next(x, shapes)
            shapes.setdefault(x.type.shape, []).append(x)
        if self.nodes > 3:
            x = g.add_node("GlobalAveragePool", (x,), name="pool").out
        g.outputs = [nets.dense(g, rng, nets.flat(g, x), "fc", int(rng.integers(2, 5)))]
        g.verify()
        if quantized:
            calibrate(g, rng.standard_normal((6, *g.inputs[0].type.shape[1:])).astype("f4"))
        return g

    def _next(self, x: Value, shapes: dict[tuple[int, ...], list[Value]]) -> Value:
        """One more node behind ``x``; an Add takes any earlier value of the same shape."""
        g, rng, i = self.g, self.rng, len(self.g.nodes)
        others = [v for v in shapes[x.type.shape] if v is not x]
        kind = rng.choice(["layer", "activation", "add", "pool"], p=[0.45, 0.3, 0.15, 0.1])
        if kind == "add" and others:
            other = others[int(rng.integers(len(others)))]
            return g.add_node("Add", (x, other), name=f"add{i}").out
        if kind == "pool" and min(x.type.shape[2:]) >= 4:
            return nets.pool(g, str(rng.choice(["MaxPool", "AveragePool"])), x, f"pool{i}")
        if kind == "activation":
            op = str(rng.choice(ACTIVATIONS))
            attrs = {"min": 0.0, "max": 6.0} if op == "Clip" else {}
            attrs |= {"alpha": 0.1} if op == "LeakyRelu" else {}
            return g.add_node(op, (x,), attrs, name=f"act{i}").out
        channels = x.type.shape[1]
        if rng.random() < 0.3:
            stride = 2 if min(x.type.shape[2:]) >= 4 and rng.random() < 0.2 else 1
            return nets.conv(g, rng, x, f"dw{i}", channels, stride=stride, group=channels)
        kernel = int(rng.choice([1, 3]))
        width = channels if rng.random() < 0.5 else int(rng.integers(2, 9))
        return nets.conv(g, rng, x, f"conv{i}", width, kernel=kernel)
