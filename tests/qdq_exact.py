"""Exact evaluation of a QDQ file: float64 by PyTorch, QuantizeLinear rounds ties to even.

An int32 bias is taken in steps of scale_x * scale_w as the integer kernels of every vendor take it;
the scale that the file repeats for it is that product rounded to fp32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import NodeProto, helper, numpy_helper
from torch.nn import functional

Array = NDArray[Any]


class Exact:
    """A QDQ file whose results are free of rounding but for QuantizeLinear's own."""

    def __init__(self, path: Path) -> None:
        """Read the file; its bias scales become exact products."""
        self.graph = onnx.load(path).graph
        self.constants = {t.name: numpy_helper.to_array(t) for t in self.graph.initializer}
        self.producer = {o: n for n in self.graph.node for o in n.output}
        for node in self.graph.node:
            if node.op_type in ("Conv", "Gemm") and len(node.input) > 2:
                self._exact_bias(node)

    def _exact_bias(self, node: NodeProto) -> None:
        bias, weight = (self.producer[node.input[i]] for i in (2, 1))
        x = self.producer[node.input[0]]
        while x.op_type != "DequantizeLinear":
            x = self.producer[x.input[0]]
        if self.constants[bias.input[0]].dtype == np.int32:
            scales = [self.constants[n.input[1]].astype(np.float64) for n in (x, weight)]
            rounded = self.constants[bias.input[1]]
            assert np.allclose(scales[0] * scales[1], rounded, rtol=1e-6, atol=0)
            self.constants[bias.input[1]] = np.asarray(scales[0] * scales[1])

    def run(self, x: Array) -> Array:
        """The first output; stored integers where the file's output is."""
        values = {k: torch.from_numpy(_wide(a)) for k, a in self.constants.items()}
        values[self.graph.input[0].name] = torch.from_numpy(_wide(x))
        for node in self.graph.node:
            operands = [values[i] for i in node.input if i]
            values[node.output[0]] = self._node(node, operands)
        result: Array = values[self.graph.output[0].name].numpy()
        return result

    def _node(self, node: NodeProto, operands: list[torch.Tensor]) -> torch.Tensor:
        attrs = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        x, op = operands[0], node.op_type
        if op in ("QuantizeLinear", "DequantizeLinear"):
            axis = attrs.get("axis", 1)
            form = [-1 if i == axis else 1 for i in range(x.dim())]
            scale, zero = (p.reshape(form if p.numel() > 1 else ()) for p in operands[1:])
            if op == "DequantizeLinear":
                return (x - zero) * scale
            info = np.iinfo(self.constants[node.input[2]].dtype)
            return torch.clamp(torch.round(x / scale) + zero, info.min, info.max)
        if op == "Conv":
            top, left, bottom, right = attrs.get("pads", (0, 0, 0, 0))
            x = functional.pad(x, (left, right, top, bottom))
            bias = operands[2] if len(operands) > 2 else None
            return functional.conv2d(
                x, operands[1], bias, attrs.get("strides", 1), groups=attrs.get("group", 1)
            )
        if op == "Gemm":
            w = operands[1].T if attrs.get("transB") else operands[1]
            return x @ w + operands[2]
        if op == "Clip":
            return torch.clamp(x, float(operands[1]), float(operands[2]))
        if op == "Pad":
            pads = operands[1].reshape(2, -1).T.flip(0).reshape(-1).tolist()
            value = float(operands[2]) if len(operands) > 2 else 0.0
            return functional.pad(x, [int(p) for p in pads], value=value)
        if op == "Squeeze":
            return x.squeeze(tuple(int(a) for a in operands[1]))
        kernel, strides = attrs.get("kernel_shape"), attrs.get("strides")
        simple: dict[str, Any] = {
            "Add": lambda: x + operands[1],
            "AveragePool": lambda: functional.avg_pool2d(x, kernel, strides),
            "Flatten": lambda: x.flatten(1),
            "GlobalAveragePool": lambda: x.mean(tuple(range(2, x.dim())), keepdim=True),
            "MatMul": lambda: x @ operands[1],
            "ReduceMean": lambda: x.mean(tuple(attrs["axes"]), keepdim=bool(attrs["keepdims"])),
            "Relu": lambda: torch.relu(x),
            "Reshape": lambda: x.reshape([int(d) for d in operands[1]]),
            "Softmax": lambda: torch.softmax(x, attrs.get("axis", -1)),
            "Transpose": lambda: x.permute(attrs["perm"]),
        }
        result: torch.Tensor = simple[op]()
        return result


def _wide(a: Array) -> Array:
    return np.array(a, np.float64)


def picture(shape: tuple[int, ...], seed: int) -> Array:
    """A smooth picture with an edge, as int8: waves of a few periods and a disk.

    Args:
        shape: [1, c, h, w], or [1, h, w, c] if the last axis is at most 3 wide.
        seed: Of the random numbers.
    """
    rng = np.random.default_rng(seed)
    last = shape[-1] <= 3
    h, w, c = shape[1:] if last else (*shape[2:], shape[1])
    y, x = np.linspace(0, 1, h)[:, None], np.linspace(0, 1, w)[None]
    waves = np.zeros((c, h, w))
    for plane in waves:
        for _ in range(6):
            fy, fx = rng.uniform(0.5, 6.0, 2)
            phase = rng.uniform(0, 2 * np.pi)
            plane += rng.standard_normal() * np.cos(2 * np.pi * (fy * y + fx * x) + phase)
    mixed = 0.7 * waves.mean(axis=0) + 0.3 * waves
    cy, cx, r = rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.8), rng.uniform(0.1, 0.3)
    mixed = np.where((y - cy) ** 2 + (x - cx) ** 2 < r * r, rng.uniform(-2, 2), mixed)
    stored = np.rint(mixed / np.abs(mixed).max() * 127).astype(np.int8)
    return np.ascontiguousarray(stored.transpose(1, 2, 0) if last else stored)[None]
