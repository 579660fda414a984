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


def ending(g: Graph, op: str) -> Graph:
    """The same graph with one more operator behind its output."""
    g.outputs = [g.add_node(op, g.outputs, name="last").out]
    g.verify()
    return g


def relu(g: Graph, x: Value, name: str) -> Value:
    """Relu."""
    return g.add_node("Relu", (x,), name=name).out


def dense(g: Graph, rng: np.random.Generator, x: Value, name: str, units: int) -> Value:
    """Gemm with bias, weights [units, features]."""
    w = _weights(g, rng, f"{name}.weight", units, x.type.shape[1])
    b = _weights(g, rng, f"{name}.bias", units)
    return g.add_node("Gemm", (x, w, b), {"trans_b": 1}, name=name).out


def norm(g: Graph, rng: np.random.Generator, x: Value, name: str) -> Value:
    """LayerNormalization of the last axis, with scales around 1."""
    size = x.type.shape[-1]
    scale = rng.uniform(0.5, 1.5, size).astype(np.float32)
    operands = (x, g.add_constant(f"{name}.scale", scale), _weights(g, rng, f"{name}.bias", size))
    attrs: dict[str, Attr] = {"axis": -1, "epsilon": 1e-5}
    return g.add_node("LayerNormalization", operands, attrs, name=name).out


def attention(g: Graph, rng: np.random.Generator, x: Value, name: str) -> Value:
    """Self-attention of one head with its residual sum: [batch, rows, width]."""
    width = x.type.shape[-1]
    weights = ((n, _weights(g, rng, f"{name}.{n}.weight", width, width)) for n in "qkv")
    q, k, v = (g.add_node("MatMul", (x, w), name=f"{name}.{n}").out for n, w in weights)
    k = g.add_node("Transpose", (k,), {"perm": (0, 2, 1)}, name=f"{name}.turn").out
    y = g.add_node("MatMul", (q, k), name=f"{name}.scores").out
    y = g.add_node("Softmax", (y,), {"axis": -1}, name=f"{name}.softmax").out
    y = g.add_node("MatMul", (y, v), name=f"{name}.mix").out
    return g.add_node("Add", (product(g, rng, y, f"{name}.o", width), x), name=f"{name}.add").out


def transformer(
    blocks: int = 1, rows: int = 5, width: int = 8, seed: int = 0, batch: int = 1
) -> Graph:
    """Transformer blocks with normalization behind the sums, then Gemm of the first row."""
    rng, g = np.random.default_rng(seed), Graph("transformer")
    x = g.add_input("x", TensorType((batch, rows, 6)))
    x = product(g, rng, x, "embed", width)
    for i in range(blocks):
        x = norm(g, rng, attention(g, rng, x, f"b{i}"), f"b{i}.norm1")
        y = g.add_node("Tanh", (product(g, rng, x, f"b{i}.up", 2 * width),), name=f"b{i}.tanh").out
        y = product(g, rng, y, f"b{i}.down", width)
        x = norm(g, rng, g.add_node("Add", (x, y), name=f"b{i}.sum").out, f"b{i}.norm2")
    first: dict[str, Attr] = {"starts": (0, 0, 0), "sizes": (batch, 1, width), "steps": (1, 1, 1)}
    x = g.add_node("Slice", (x,), first, name="first").out
    g.outputs = [dense(g, rng, flat(g, x), "fc", 3)]
    g.verify()
    return g


def recurrent(steps: int = 5, size: int = 6, seed: int = 0, batch: int = 1) -> Graph:
    """LSTM, reverse GRU, RNN with their input products, then Gemm of the last state."""
    rng, g = np.random.default_rng(seed), Graph("recurrent")
    x = g.add_input("x", TensorType((steps, batch, 4)))
    layers: tuple[tuple[str, int, dict[str, Attr]], ...] = (
        ("LSTM", 4, {"reverse": 0, "cells": 0}),
        ("GRU", 3, {"reverse": 1, "linear_before_reset": 1}),
        ("RNN", 1, {"reverse": 0, "activation": "Tanh"}),
    )
    for op, gates, attrs in layers:
        name = op.lower()
        rows: dict[str, Attr] = {"shape": (steps * batch, x.type.shape[2])}
        x = g.add_node("Reshape", (x,), rows, name=f"{name}.rows").out
        x = dense(g, rng, x, f"{name}.product", gates * size)
        stacked: dict[str, Attr] = {"shape": (steps, batch, gates * size)}
        x = g.add_node("Reshape", (x,), stacked, name=f"{name}.stacked").out
        operands = [x, _weights(g, rng, f"{name}.R", gates * size, size)]
        if op == "GRU":
            operands.append(_weights(g, rng, "gru.bias", size))
        x = g.add_node(op, operands, attrs, name=name).out
    last: dict[str, Attr] = {
        "starts": (steps - 1, 0, 0),
        "sizes": (1, batch, size),
        "steps": (1, 1, 1),
    }
    x = g.add_node("Slice", (x,), last, name="last").out
    x = g.add_node("Reshape", (x,), {"shape": (batch, size)}, name="flatten").out
    g.outputs = [dense(g, rng, x, "fc", 3)]
    g.verify()
    return g


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


def bottlenecks(size: int = 14, seed: int = 0, batch: int = 1) -> Graph:
    """MobileNetV2 in small: a separable block, two inverted bottlenecks, a wide 1x1 layer."""
    rng, g = np.random.default_rng(seed), Graph("bottlenecks")
    x = g.add_input("x", TensorType((batch, 3, size, size)))
    x = relu(g, conv(g, rng, x, "stem", 6, stride=2), "stem.relu")
    x = relu(g, conv(g, rng, x, "b0.depthwise", 6, group=6), "b0.relu")
    x = conv(g, rng, x, "b0.project", 4, kernel=1)
    for i, stride in ((1, 2), (2, 1)):
        y = relu(g, conv(g, rng, x, f"b{i}.expand", 12, kernel=1), f"b{i}.relu1")
        y = relu(g, conv(g, rng, y, f"b{i}.depthwise", 12, stride=stride, group=12), f"b{i}.relu2")
        y = conv(g, rng, y, f"b{i}.project", 4, kernel=1)
        x = g.add_node("Add", (x, y), name=f"b{i}.add").out if stride == 1 else y
    x = relu(g, conv(g, rng, x, "head", 16, kernel=1), "head.relu")
    x = g.add_node("GlobalAveragePool", (x,), name="pool").out
    g.outputs = [dense(g, rng, flat(g, x), "fc", 3)]
    g.verify()
    return g


def functions(size: int = 6) -> Graph:
    """Elementwise functions between layers: trained slopes, computed and constant conditions."""
    rng, g = np.random.default_rng(0), Graph("functions")

    def add(op: str, *operands: Value | None, **attrs: Attr) -> Value:
        return g.add_node(op, operands, attrs, name=f"n{len(g.nodes)}").out

    x = conv(g, rng, g.add_input("x", TensorType((1, 2, size, size))), "conv0", 4)
    x = add("PRelu", x, g.add_constant("slope", np.full((4, 1, 1), 0.2, np.float32)))
    y = conv(g, rng, x, "conv1", 4)
    y = add("Max", add("GeluErf", y), add("Mul", x, g.add_constant("half", np.float32([0.5]))))
    above = add("And", add("Greater", y, x), add("Not", add("Equal", x, y)))
    y = add("Where", above, add("Softplus", y), add("Mish", x))
    y = conv(g, rng, y, "conv2", 4)
    kept = np.packbits(rng.random((size, size)) < 0.7, axis=None, bitorder="little")
    mask = g.add_constant("mask", kept, "bits", shape=(size, size))
    y = add("Where", mask, add("Elu", y, gamma=1.0, alpha=0.5, rate=2.0), None, off=-0.5)
    y = add("Sqrt", add("Exp", add("Tanh", y)))
    y = add("Pow", y, g.add_constant("power", np.float32([3.0])))
    y = add("Add", add("Abs", add("Sin", y)), add("Expand", add("Log", y), shape=y.type.shape))
    y = add("Swish", conv(g, rng, y, "conv3", 4), alpha=1.5)
    g.outputs = [dense(g, rng, flat(g, add("Softsign", add("Min", y, x))), "fc", 3)]
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


def spatial(size: int = 6, seed: int = 0, batch: int = 1) -> Graph:
    """Down and up again, through all normalizations over channels."""
    rng, g = np.random.default_rng(seed), Graph("spatial")
    x = g.add_input("x", TensorType((batch, 2, size, size)))
    x = conv(g, rng, x, "down", 6, stride=2)
    scale, bias = (_weights(g, rng, f"norm.{n}", 6) for n in ("scale", "bias"))
    x = g.add_node("GroupNormalization", (x, scale, bias), {"num_groups": 3}, name="norm").out
    x = g.add_node("LRN", (relu(g, x, "relu"),), {"size": 3, "alpha": 0.5}, name="lrn").out
    w, b = _weights(g, rng, "up.weight", 6, 4, 3, 3), _weights(g, rng, "up.bias", 4)
    up: dict[str, Attr] = {"strides": (2, 2), "pads": (1, 1, 1, 1), "output_padding": (1, 0)}
    x = g.add_node("ConvTranspose", (x, w, b), up, name="up").out
    height, width = x.type.shape[2:]
    at = np.concatenate([np.arange(2 * n) * (n - 1) / (2 * n - 1) for n in (height, width)])
    table = g.add_constant("positions", at.astype(np.float32))
    wide: dict[str, Attr] = {"sizes": (2 * height, 2 * width), "mode": "linear"}
    x = g.add_node("Resize", (x, table), wide, name="wide").out
    x = pool(g, "MaxPool", conv(g, rng, x, "last", 3), "pool", 2)
    scale = _weights(g, rng, "rms.scale", x.type.shape[-1])
    x = g.add_node("RMSNormalization", (x, scale), {"axis": -1}, name="rms").out
    x = g.add_node("LpNormalization", (flat(g, x),), {"epsilon": 1e-24}, name="unit").out
    g.outputs = [dense(g, rng, x, "fc", 3)]
    g.verify()
    return g


def batch_normalized(batch: int = 4, size: int = 5, seed: int = 0) -> Graph:
    """Two layers normalized by the statistics of the batch."""
    rng, g = np.random.default_rng(seed), Graph("batch-normalized")
    x = g.add_input("x", TensorType((batch, 2, size, size)))
    for i in range(2):
        x = conv(g, rng, x, f"conv{i}", 4)
        scale, mean, var = (rng.uniform(0.5, 1.5, 4).astype(np.float32) for _ in range(3))
        parts = {"scale": scale, "bias": mean - scale, "mean": mean, "var": var}
        operands = [g.add_constant(f"bn{i}.{n}", a) for n, a in parts.items()]
        attrs: dict[str, Attr] = {"epsilon": 1e-3, "momentum": 0.8}
        x = g.add_node("BatchNormTraining", (x, *operands), attrs, name=f"bn{i}").out
        x = relu(g, x, f"relu{i}")
    g.outputs = [dense(g, rng, flat(g, x), "fc", 3)]
    g.verify()
    return g


def tokens(entries: int = 20, length: int = 5) -> Graph:
    """Rows of a table, by ids that the sample holds, through two layers."""
    rng, g = np.random.default_rng(0), Graph("tokens")
    ids = g.add_input("ids", TensorType((1, length), "i32"))
    table = _weights(g, rng, "table", entries, 4)
    x = g.add_node("Gather", (table, ids), {"axis": 0}, name="gather").out
    x = relu(g, dense(g, rng, flat(g, x), "fc0", 6), "relu0")
    g.outputs = [dense(g, rng, x, "fc", 3)]
    g.verify()
    return g


def two_branches(size: int = 6) -> Graph:
    """Pictures through convolutions, numbers through a layer and a view, then a sum."""
    rng, g = np.random.default_rng(0), Graph("branches")
    picture = g.add_input("picture", TensorType((1, 2, size, size)))
    facts = g.add_input("Facts", TensorType((1, 12, 8)))
    y = g.add_node("Reshape", (facts,), {"shape": (1, 96)}, name="row").out
    y = relu(g, dense(g, rng, y, "right", 5), "relu3")
    x = relu(g, conv(g, rng, picture, "conv0", 4), "relu0")
    for i in (1, 2):
        x = relu(g, conv(g, rng, x, f"conv{i}", 4), f"relu{i}")
    x = dense(g, rng, flat(g, x), "left", 5)
    x = g.add_node("Add", (x, y), name="sum").out
    g.outputs = [dense(g, rng, x, "fc", 3)]
    g.verify()
    return g
