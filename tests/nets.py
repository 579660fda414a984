"""Small networks in IR for the tests of planner, checker and back ends."""

from __future__ import annotations

import numpy as np

from odt_plan.ir.graph import Attr, Graph, TensorType, Value


def _weights(g: Graph, rng: np.random.Generator, name: str, *shape: int) -> Value:
    data = rng.standard_normal(shape).astype(np.float32) / np.float32(np.sqrt(shape[-1] * 2))
    return g.add_constant(name, data)


def conv(
    g: Graph,
    rng: np.random.Generator,
    x: Value,
    name: str,
    channels: int,
    kernel: int = 3,
    stride: int = 1,
    group: int = 1,
) -> Value:
    """Conv with bias and same padding, over as many axes as ``x`` has behind its channels."""
    rank = len(x.type.shape) - 2
    w = _weights(g, rng, f"{name}.weight", channels, x.type.shape[1] // group, *[kernel] * rank)
    b = _weights(g, rng, f"{name}.bias", channels)
    attrs: dict[str, Attr] = {
        "strides": (stride,) * rank,
        "pads": (kernel // 2,) * (2 * rank),
        "dilations": (1,) * rank,
        "group": group,
    }
    return g.add_node("Conv", (x, w, b), attrs, name=name).out


def pool(g: Graph, op: str, x: Value, name: str, size: int = 2) -> Value:
    """MaxPool or AveragePool without overlap."""
    rank = len(x.type.shape) - 2
    attrs: dict[str, Attr] = {"kernel_shape": (size,) * rank, "strides": (size,) * rank}
    return g.add_node(op, (x,), attrs, name=name).out


def product(g: Graph, rng: np.random.Generator, x: Value, name: str, units: int) -> Value:
    """MatMul, then Add of a bias: what exporters write for a dense layer over the last axis."""
    w = _weights(g, rng, f"{name}.weight", x.type.shape[-1], units)
    b = _weights(g, rng, f"{name}.bias", units)
    y = g.add_node("MatMul", (x, w), name=name).out
    return g.add_node("Add", (y, b), name=f"{name}.add").out


def flat(g: Graph, x: Value) -> Value:
    """Reshape to [batch, features]."""
    batch = x.type.shape[0]
    return g.add_node("Reshape", (x,), {"shape": (batch, x.type.size // batch)}, name="flatten").out


def relu(g: Graph, x: Value, name: str) -> Value:
    """Relu."""
    return g.add_node("Relu", (x,), name=name).out


def dense(g: Graph, rng: np.random.Generator, x: Value, name: str, units: int) -> Value:
    """Gemm with bias, weights [units, features]."""
    w = _weights(g, rng, f"{name}.weight", units, x.type.shape[1])
    b = _weights(g, rng, f"{name}.bias", units)
    return g.add_node("Gemm", (x, w, b), {"trans_b": 1}, name=name).out


def mlp(widths: tuple[int, ...] = (8, 16, 12, 4), seed: int = 0, batch: int = 1) -> Graph:
    """Gemm + Relu layers."""
    rng, g = np.random.default_rng(seed), Graph("mlp")
    x = g.add_input("x", TensorType((batch, widths[0])))
    for i, units in enumerate(widths[1:]):
        x = dense(g, rng, x, f"fc{i}", units)
        if i < len(widths) - 2:
            x = relu(g, x, f"relu{i}")
    g.outputs = [x]
    g.verify()
    return g


def cnn(layers: int = 3, channels: int = 4, size: int = 6, seed: int = 0, batch: int = 1) -> Graph:
    """A chain of Conv + Relu, then flatten and Gemm."""
    rng, g = np.random.default_rng(seed), Graph("cnn")
    x = g.add_input("x", TensorType((batch, 2, size, size)))
    for i in range(layers):
        x = relu(g, conv(g, rng, x, f"conv{i}", channels), f"relu{i}")
    g.outputs = [dense(g, rng, flat(g, x), "fc", 3)]
    g.verify()
    return g


def resnet(
    blocks: int = 2, channels: int = 4, size: int = 6, seed: int = 0, batch: int = 1
) -> Graph:
    """Residual blocks: fan-out and Add."""
    rng, g = np.random.default_rng(seed), Graph("resnet")
    x = g.add_input("x", TensorType((batch, 2, size, size)))
    x = relu(g, conv(g, rng, x, "stem", channels), "stem.relu")
    for i in range(blocks):
        y = relu(g, conv(g, rng, x, f"b{i}.conv1", channels), f"b{i}.relu1")
        y = conv(g, rng, y, f"b{i}.conv2", channels)
        x = relu(g, g.add_node("Add", (y, x), name=f"b{i}.add").out, f"b{i}.relu2")
    x = g.add_node("GlobalAveragePool", (x,), name="pool").out
    g.outputs = [dense(g, rng, flat(g, x), "fc", 3)]
    g.verify()
    return g


def views() -> Graph:
    """Views of the sample and of an activation, which come back with paging and recomputation."""
    rng, g = np.random.default_rng(0), Graph("views")
    x = g.add_input("x", TensorType((1, 96)))
    y = g.add_node("Reshape", (x,), {"shape": (1, 6, 4, 4)}, name="unflatten").out
    for i in range(2):
        y = relu(g, conv(g, rng, y, f"conv{i}", 6), f"relu{i}")
    y = g.add_node("Reshape", (y,), {"shape": (1, 96)}, name="flatten").out
    for name, units in (("a", 8), ("b", 96), ("c", 96)):
        y = relu(g, dense(g, rng, y, name, units), f"{name}.relu")
    g.outputs = [dense(g, rng, y, "fc", 3)]
    g.verify()
    return g
