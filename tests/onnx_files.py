"""Small ONNX files for the tests of importer, passes and report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from odt_plan.ir.graph import Graph
from odt_plan.ir.import_options import ImportOptions
from odt_plan.ir.interpreter import run
from odt_plan.ir.onnx_import import import_model

Array = NDArray[Any]
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


def outputs(graph: Graph, feeds: Mapping[str, Array]) -> list[Array]:
    """The graph's results, by the interpreter."""
    env = run(graph, feeds)
    return [env[v.name] for v in graph.outputs]


def runtime(path: Path, feeds: Mapping[str, Array]) -> list[Array]:
    """The file's results, by onnxruntime; skips where it is absent."""
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    # layers as the file states them: fused into integers, sums of u8 x i8 saturate where the CPU
    # has no 8-bit dot product
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    result: list[Array] = session.run(None, dict(feeds))
    return result


def assert_close(got: Array, want: Array, tolerance: float = 1e-5) -> None:
    """Equal shapes; the largest difference is at most ``tolerance`` of the largest value."""
    assert got.shape == want.shape
    assert np.array_equal(np.isnan(got), np.isnan(want))
    got, want = np.nan_to_num(got), np.nan_to_num(want)
    assert np.abs(got - want).max(initial=0) <= tolerance * max(1.0, np.abs(want).max(initial=0))


def agrees(path: Path, batch: int = 1, **options: Any) -> Graph:
    """Import, compare with onnxruntime on seeded inputs, return the graph."""
    graph = import_model(path, ImportOptions(batch=batch, **options))
    rng = np.random.default_rng(0)
    feeds = {v.name: floats(rng, *v.type.shape) for v in graph.inputs}
    for got, want in zip(outputs(graph, feeds), runtime(path, feeds), strict=True):
        assert_close(got, want)
    return graph


def export(graph: Graph, folder: Path) -> Path:
    """A network in IR as a model file; parameters, nodes and values keep their names."""
    constants = dict(graph.constants)
    nodes = []
    for n in graph.nodes:
        operands = [v.name for v in n.operands()]
        attrs: dict[str, Any] = dict(n.attrs)
        if n.op == "Gemm":
            attrs = {"transB": attrs["trans_b"]}
        elif n.op == "Reshape":
            operands.append(f"{n.name}.shape")
            constants[operands[-1]] = np.array(attrs.pop("shape"), np.int64)
        elif n.op == "Clip":
            for name in ("min", "max"):
                operands.append(f"{n.name}.{name}")
                constants[operands[-1]] = np.array(attrs.pop(name), np.float32)
        nodes.append(node(n.op, " ".join(operands), n.out.name, n.name, **attrs))
    inputs = {v.name: v.type.shape for v in graph.inputs}
    return save(model(nodes, inputs, [v.name for v in graph.outputs], constants), folder)
