"""Small ONNX files for the tests of importer, passes and report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

Dims = Sequence[int | str | None]


def node(op: str, inputs: str, output: str, name: str = "", **attrs: Any) -> NodeProto:
    """A node; operands and results are separated by spaces, ``-`` is an absent operand."""
    operands = ["" if i == "-" else i for i in inputs.split()]
    return helper.make_node(op, operands, output.split(), name=name or f"{op}_{output}", **attrs)


def model(
    nodes: Sequence[NodeProto],
    inputs: Mapping[str, Dims | None],
    outputs: Sequence[str],
    constants: Mapping[str, NDArray[Any]] | None = None,
    *,
    opset: int = 17,
    dtype: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """A model of float inputs; outputs carry no shape."""
    graph = helper.make_graph(
        list(nodes),
        "small",
        [helper.make_tensor_value_info(k, dtype, d) for k, d in inputs.items()],
        [helper.make_tensor_value_info(k, TensorProto.FLOAT, None) for k in outputs],
        [numpy_helper.from_array(np.asarray(a), k) for k, a in (constants or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def save(proto: onnx.ModelProto, folder: Path, name: str = "model.onnx") -> Path:
    """Write a model."""
    path = folder / name
    path.write_bytes(proto.SerializeToString())
    return path


def floats(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    """Standard normal float32."""
    return rng.standard_normal(shape).astype(np.float32)
