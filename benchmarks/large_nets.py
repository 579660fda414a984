"""Networks of hundreds of nodes as ONNX files: topologies alone, all weights are ConstantOfShape.

A plan depends on shapes, not on values, so these files are small, as are the light models that the
onnx package brings. ResNet-152 (He et al. 2016, v1.5: the stride is in the 3x3 layer) and the
encoder of BERT-base (Devlin et al. 2019) as exporters write them at opset 17: LayerNormalization as
one operator, GELU (by tanh) as a chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

OPSET = 17
IR_VERSION = 8
#: Light models of the onnx package that can be imported.
LIGHT = (
    "light_squeezenet", "light_vgg19", "light_resnet50", "light_shufflenet", "light_inception_v2",
    "light_densenet121",
)  # fmt: skip


def light(name: str) -> Path:
    """Path of a light model of the onnx package."""
    return Path(onnx.__file__).parent / "backend" / "test" / "data" / "light" / f"{name}.onnx"


class _Net:
    """A graph under construction; ``top`` is the value to go on from."""

    def __init__(self, name: str, shape: Sequence[int]) -> None:
        self.name, self.shape = name, tuple(shape)
        self.top = "input"
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []

    def add(self, op: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        self.top = f"{name}.out"
        self.nodes.append(helper.make_node(op, inputs, [self.top], name=name, **attributes))
        return self.top

    def weight(self, name: str, *shape: int, value: float = 0.01) -> str:
        """A weight whose file holds its shape alone."""
        fill = numpy_helper.from_array(np.array([value], np.float32))
        size = self.integers(f"{name}.shape", *shape)
        self.nodes.append(helper.make_node("ConstantOfShape", [size], [name], value=fill))
        return name

    def integers(self, name: str, *values: int) -> str:
        self.constants.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def scalar(self, name: str, value: float) -> str:
        self.constants.append(numpy_helper.from_array(np.array(value, np.float32), name))
        return name

    def model(self, *result: int) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            self.name,
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, self.shape)],
            [helper.make_tensor_value_info(self.top, TensorProto.FLOAT, result)],
            self.constants,
        )
        opset = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION)
        onnx.checker.check_model(model)
        return model


def resnet(blocks: Sequence[int], *, resolution: int = 224, classes: int = 1000) -> onnx.ModelProto:
    """ResNet of bottlenecks; (3, 8, 36, 3) blocks are ResNet-152, (3, 4, 6, 3) ResNet-50."""
    name = f"resnet{3 * sum(blocks) + 2}"
    net = _Net(name, (1, 3, resolution, resolution))

    def conv(name: str, before: int, after: int, kernel: int, stride: int = 1) -> None:
        edge = kernel // 2
        net.add(
            "Conv",
            [net.top, net.weight(f"{name}.weight", after, before, kernel, kernel)],
            name,
            kernel_shape=(kernel, kernel),
            strides=(stride, stride),
            pads=(edge,) * 4,
        )
        parts = (("scale", 1.0), ("shift", 0.0), ("mean", 0.0), ("var", 1.0))
        state = [net.weight(f"{name}.bn.{n}", after, value=v) for n, v in parts]
        net.add("BatchNormalization", [net.top, *state], f"{name}.bn")

    conv("stem", 3, 64, 7, 2)
    net.add("Relu", [net.top], "stem.act")
    pool = {"kernel_shape": (3, 3), "strides": (2, 2), "pads": (1, 1, 1, 1)}
    net.add("MaxPool", [net.top], "stem.pool", **pool)
    channels = 64
    for stage, count in enumerate(blocks):
        width = 64 << stage
        for i in range(count):
            block, source, stride = f"s{stage}b{i}", net.top, 2 if stage and not i else 1
            conv(f"{block}.conv1", channels, width, 1)
            net.add("Relu", [net.top], f"{block}.act1")
            conv(f"{block}.conv2", width, width, 3, stride)
            net.add("Relu", [net.top], f"{block}.act2")
            conv(f"{block}.conv3", width, 4 * width, 1)
            main = net.top
            if i == 0:
                net.top = source
                conv(f"{block}.skip", channels, 4 * width, 1, stride)
                source = net.top
            net.add("Add", [main, source], f"{block}.add")
            net.add("Relu", [net.top], f"{block}.act3")
            channels = 4 * width
    net.add("GlobalAveragePool", [net.top], "pool")
    net.add("Flatten", [net.top], "flatten")
    weights = [net.weight("fc.weight", classes, channels), net.weight("fc.bias", classes)]
    net.add("Gemm", [net.top, *weights], "fc", transB=1)
    return net.model(1, classes)


def randwire(
    nodes: int = 16, *, stages: int = 3, channels: int = 32, resolution: int = 56, seed: int = 0
) -> onnx.ModelProto:
    """Randomly wired stages (Xie et al. 2019): Watts-Strogatz graphs (4, 0.75) of separable convs.

    Nodes are in the order of their numbers, as an exporter writes them.
    """
    rng = np.random.default_rng(seed)
    net = _Net(f"randwire{nodes}", (1, 3, resolution, resolution))

    def separable(name: str, before: int, after: int, stride: int) -> str:
        net.add("Relu", [net.top], f"{name}.act")
        depthwise = [net.top, net.weight(f"{name}.dw.weight", before, 1, 3, 3)]
        shape = {"kernel_shape": (3, 3), "pads": (1,) * 4, "strides": (stride, stride)}
        net.add("Conv", depthwise, f"{name}.dw", group=before, **shape)
        pointwise = [net.top, net.weight(f"{name}.pw.weight", after, before, 1, 1)]
        return net.add("Conv", pointwise, f"{name}.pw", kernel_shape=(1, 1))

    def total(name: str, values: Sequence[str]) -> None:
        net.top = values[0]
        for i, v in enumerate(values[1:]):
            net.add("Add", [net.top, v], f"{name}.sum{i}")

    separable("stem", 3, channels, 1)
    for s in range(stages):
        source, before, after = net.top, channels << max(0, s - 1), channels << s
        ring = [(i, (i + d) % nodes) for i in range(nodes) for d in (1, 2)]
        edges = {
            (min(i, k), max(i, k))
            for i, j in ring
            if (k := int(rng.integers(nodes)) if rng.random() < 0.75 else j) != i
        }
        made: list[str] = []
        for i in range(nodes):
            total(f"s{s}n{i}", [made[a] for a, b in sorted(edges) if b == i] or [source])
            first = net.top == source
            size = (before, after, 2) if first else (after, after, 1)
            made.append(separable(f"s{s}n{i}", *size))
        total(f"s{s}", [v for i, v in enumerate(made) if all(a != i for a, _ in edges)])
    net.add("GlobalAveragePool", [net.top], "pool")
    net.add("Flatten", [net.top], "flatten")
    weights = [net.weight("fc.weight", 10, after), net.weight("fc.bias", 10)]
    net.add("Gemm", [net.top, *weights], "fc", transB=1)
    return net.model(1, 10)


def bert(
    layers: int = 12,
    *,
    width: int = 768,
    heads: int = 12,
    tokens: int = 128,
    classes: int = 2,
) -> onnx.ModelProto:
    """Encoder of BERT with pooler and classifier; its input are embedded tokens."""
    net = _Net(f"bert{layers}", (1, tokens, width))
    depth = width // heads

    def dense(name: str, before: int, after: int) -> str:
        product = net.add(
            "MatMul", [net.top, net.weight(f"{name}.weight", before, after)], f"{name}.product"
        )
        return net.add("Add", [product, net.weight(f"{name}.bias", after)], name)

    def norm(name: str) -> None:
        weights = [
            net.weight(f"{name}.scale", width, value=1.0),
            net.weight(f"{name}.shift", width),
        ]
        net.add("LayerNormalization", [net.top, *weights], name, epsilon=1e-12)

    def split(name: str, source: str, perm: tuple[int, ...]) -> str:
        net.top = source
        dense(name, width, width)
        size = net.integers(f"{name}.split.shape", 1, tokens, heads, depth)
        net.add("Reshape", [net.top, size], f"{name}.split")
        return net.add("Transpose", [net.top], f"{name}.heads", perm=perm)

    def gelu(name: str) -> None:
        x = net.top
        square = net.add("Mul", [x, x], f"{name}.square")
        cube = net.add("Mul", [square, x], f"{name}.cube")
        net.add("Mul", [cube, net.scalar(f"{name}.a", 0.044715)], f"{name}.ax3")
        net.add("Add", [x, net.top], f"{name}.inner")
        root = float(np.sqrt(2 / np.pi))
        net.add("Mul", [net.top, net.scalar(f"{name}.root", root)], f"{name}.scaled")
        net.add("Tanh", [net.top], f"{name}.tanh")
        net.add("Add", [net.top, net.scalar(f"{name}.one", 1.0)], f"{name}.plus")
        net.add("Mul", [x, net.top], f"{name}.product")
        net.add("Mul", [net.top, net.scalar(f"{name}.half", 0.5)], name)

    for i in range(layers):
        layer, source = f"l{i}", net.top
        q = split(f"{layer}.q", source, (0, 2, 1, 3))
        k = split(f"{layer}.k", source, (0, 2, 3, 1))
        v = split(f"{layer}.v", source, (0, 2, 1, 3))
        net.add("MatMul", [q, k], f"{layer}.scores")
        root = net.scalar(f"{layer}.root", depth**0.5)
        net.add("Div", [net.top, root], f"{layer}.scaled")
        net.add("Softmax", [net.top], f"{layer}.softmax", axis=-1)
        net.add("MatMul", [net.top, v], f"{layer}.mixed")
        net.add("Transpose", [net.top], f"{layer}.merged", perm=(0, 2, 1, 3))
        size = net.integers(f"{layer}.merged.shape", 1, tokens, width)
        net.add("Reshape", [net.top, size], f"{layer}.rows")
        dense(f"{layer}.o", width, width)
        net.add("Add", [net.top, source], f"{layer}.add1")
        norm(f"{layer}.norm1")
        source = net.top
        dense(f"{layer}.up", width, 4 * width)
        gelu(f"{layer}.gelu")
        dense(f"{layer}.down", 4 * width, width)
        net.add("Add", [net.top, source], f"{layer}.add2")
        norm(f"{layer}.norm2")
    first = numpy_helper.from_array(np.array(0, np.int64), "first")
    net.constants.append(first)
    net.add("Gather", [net.top, "first"], "cls", axis=1)
    dense("pooler", width, width)
    net.add("Tanh", [net.top], "pooler.act")
    dense("classifier", width, classes)
    return net.model(1, classes)
