"""Damaged and changed ONNX files: small valid models, and mutants of them by number."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import Message
from numpy.random import Generator
from numpy.typing import NDArray
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from .models import shared

#: Larger public models take too long for thousands of mutants.
MAX_SEED_BYTES = 300_000
#: Folders of the onnx package whose models are small.
PACKAGE_FOLDERS = ("pytorch-converted", "pytorch-operator", "simple")
#: Sizes, axes and counts that are likely to be wrong.
ODD = (0, -1, 1, 2, 3, 7, 64, -2, -(2**31), 2**31 - 1, 2**31, 2**40, 2**63 - 1)
OPS = (
    *("Relu", "Sigmoid", "Softmax", "Add", "Mul", "Div", "MatMul", "Gemm", "Conv", "MaxPool"),
    *("AveragePool", "GlobalAveragePool", "Concat", "Reshape", "Transpose", "Flatten", "Slice"),
    *("Pad", "ReduceMean", "Squeeze", "Unsqueeze", "BatchNormalization", "LayerNormalization"),
    *("Clip", "Cast", "Shape", "Gather", "Constant", "Identity", "Dropout", "NoSuchOperator", ""),
    *("QuantizeLinear", "DequantizeLinear", "ConstantOfShape", "Range", "Expand", "Tile", "If"),
)

Mutation = Callable[[ModelProto, Generator], None]


def mutant(number: int) -> tuple[str, bytes]:
    """Mutant of this number, the same for the same number: what was done to which seed, and it."""
    rng = np.random.default_rng(number)
    seeds = all_seeds()
    name = sorted(seeds)[int(rng.integers(len(seeds)))]
    data = seeds[name]
    done = []
    if rng.random() < 0.75:
        proto = ModelProto.FromString(data)
        for _ in range(int(rng.choice((1, 2, 3), p=(0.7, 0.2, 0.1)))):
            change = MUTATIONS[int(rng.integers(len(MUTATIONS)))]
            change(proto, rng)
            done.append(change.__name__.strip("_"))
        data = proto.SerializeToString()
    if not done or rng.random() < 0.05:
        done.append("bytes")
        data = _bytes(data, rng)
    return f"{name}: {', '.join(done)}", data


# -- seeds -----------------------------------------------------------------------------------------


@cache
def all_seeds() -> dict[str, bytes]:
    """Valid files: own ones, those of the onnx package, small public models where present.

    Own ones stand several times, so that two of three mutants are theirs.
    """
    package = Path(onnx.__file__).parent / "backend" / "test" / "data"
    seeds = {
        f"{path.parent.name}": path.read_bytes()
        for folder in PACKAGE_FOLDERS
        for path in sorted((package / folder).glob("*/model.onnx"))
    }
    public = shared()
    for path in sorted((public / "models").glob("*.onnx")) if public else ():
        if path.stat().st_size <= MAX_SEED_BYTES:
            seeds[path.stem] = path.read_bytes()
    own = {"cnn": _cnn(), "mlp": _mlp(), "rows": _rows(), "shapes": _shapes(), "qdq": _qdq()}
    own |= {"cells": _cells(), "images": _images(), "places": _places(), "graphs": _graphs()}
    for i in range(2 * len(seeds) // len(own)):
        seeds |= {f"{k} {i}": v.SerializeToString() for k, v in own.items()}
    return seeds


def _model(
    nodes: list[NodeProto], shape: list[int | str], constants: dict[str, Any], opset: int
) -> ModelProto:
    graph = helper.make_graph(
        nodes,
        "seed",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(a), k) for k, a in constants.items()],
    )
    for i, n in enumerate(graph.node):
        n.name = f"{n.op_type.lower()}{i}"
    sets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=sets, ir_version=8)


def _floats(*shape: int) -> NDArray[np.float32]:
    size = int(np.prod(shape))
    return np.sin(np.arange(1, size + 1, dtype=np.float32)).reshape(shape) / 2


def _cnn() -> ModelProto:
    node = helper.make_node
    constants = {
        "w1": _floats(4, 1, 3, 3),
        "b1": _floats(4),
        "w2": _floats(4, 1, 3, 3),
        "s": np.abs(_floats(4)) + 1,
        "w3": _floats(3, 16),
        "b3": _floats(3),
    }
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["a"], pads=[1, 1, 1, 1]),
        node("Relu", ["a"], ["b"]),
        node("MaxPool", ["b"], ["c"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["c", "w2"], ["d"], group=4, auto_pad="SAME_UPPER", strides=[2, 2]),
        node("BatchNormalization", ["d", "s", "b1", "b1", "s"], ["e"], epsilon=1e-3),
        node("AveragePool", ["e"], ["f"], kernel_shape=[1, 1]),
        node("Flatten", ["f"], ["g"]),
        node("Gemm", ["g", "w3", "b3"], ["h"], transB=1, alpha=0.5),
        node("Softmax", ["h"], ["y"], axis=-1),
    ]
    return _model(nodes, ["N", 1, 8, 8], constants, 11)


def _mlp() -> ModelProto:
    node = helper.make_node
    constants = {
        "w1": _floats(6, 5),
        "b1": _floats(5),
        "w2": _floats(5, 4),
        "low": np.float32(-1),
        "high": np.float32(1),
    }
    nodes = [
        node("MatMul", ["x", "w1"], ["a"]),
        node("Add", ["a", "b1"], ["b"]),
        node("Clip", ["b", "low", "high"], ["c"]),
        node("MatMul", ["c", "w2"], ["d"]),
        node("Sigmoid", ["d"], ["e"]),
        node("Tanh", ["d"], ["f"]),
        node("Concat", ["e", "f"], ["g"], axis=1),
        node("LeakyRelu", ["g"], ["y"], alpha=0.2),
    ]
    return _model(nodes, ["batch", 6], constants, 13)


def _rows() -> ModelProto:
    node = helper.make_node
    constants = {
        "w": _floats(6, 6),
        "g": np.ones(6, np.float32),
        "b": _floats(6),
        "one": _floats(6),
        "axes": np.array([1]),
        "pads": np.array([0, 1, 0, 0, 1, 0]),
    }
    nodes = [
        node("LayerNormalization", ["x", "g", "b"], ["n"], axis=-1),
        node("MatMul", ["n", "w"], ["q"]),
        node("Transpose", ["n"], ["t"], perm=[0, 2, 1]),
        node("MatMul", ["q", "t"], ["scores"]),
        node("Softmax", ["scores"], ["p"], axis=-1),
        node("MatMul", ["p", "n"], ["o"]),
        node("Add", ["o", "x"], ["r"]),
        node("Pad", ["r", "pads"], ["padded"]),
        node("ReduceMean", ["padded"], ["m"], axes=[1], keepdims=1),
        node("Squeeze", ["m", "axes"], ["z"]),
        node("Mul", ["z", "one"], ["y"]),
    ]
    return _model(nodes, [1, 4, 6], constants, 17)


def _shapes() -> ModelProto:
    node = helper.make_node
    constants = {
        "zero": np.array(0),
        "minus": np.array([-1]),
        "ax": np.array([0]),
        "starts": np.array([0, 1]),
        "ends": np.array([2, 9]),
        "on": np.array([1, 2]),
        "steps": np.array([1, 2]),
        "c": _floats(1),
    }
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Gather", ["s", "zero"], ["n"], axis=0),
        node("Unsqueeze", ["n", "ax"], ["u"]),
        node("Concat", ["u", "minus"], ["to"], axis=0),
        node("Slice", ["x", "starts", "ends", "on", "steps"], ["part"]),
        node("Relu", ["part"], ["r"]),
        node("Constant", [], ["k"], value=numpy_helper.from_array(_floats(1), "k")),
        node("Sub", ["r", "k"], ["d"]),
        node("Reshape", ["d", "to"], ["f"]),
        node("Mul", ["f", "c"], ["y"]),
    ]
    return _model(nodes, ["N", 3, 6], constants, 13)


def _qdq() -> ModelProto:
    node = helper.make_node
    weight = (np.arange(8 * 3) % 7 - 3).astype(np.int8).reshape(3, 8)
    constants = {
        "s": np.float32(0.05),
        "z": np.uint8(120),
        "w": weight,
        "ws": np.float32(0.1),
        "wz": np.int8(0),
        "b": _floats(3),
    }
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        node("DequantizeLinear", ["w", "ws", "wz"], ["wd"]),
        node("Gemm", ["d", "wd", "b"], ["g"], transB=1),
        node("QuantizeLinear", ["g", "s", "z"], ["gq"]),
        node("DequantizeLinear", ["gq", "s", "z"], ["y"]),
    ]
    return _model(nodes, [1, 8], constants, 13)


def _cells() -> ModelProto:
    """Recurrent layers, one of them in both directions."""
    node = helper.make_node
    constants = {
        "w1": _floats(2, 12, 4),
        "r1": _floats(2, 12, 3),
        "b1": _floats(2, 24),
        "w2": _floats(1, 9, 6),
        "r2": _floats(1, 9, 3),
        "w3": _floats(1, 2, 3),
        "r3": _floats(1, 2, 2),
        "to": np.array([0, 0, -1]),
        "one": np.array([1]),
        "first": np.array([0]),
    }
    nodes = [
        node("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
        node("LSTM", ["t", "w1", "r1", "b1"], ["a"], hidden_size=3, direction="bidirectional"),
        node("Transpose", ["a"], ["b"], perm=[0, 2, 1, 3]),
        node("Reshape", ["b", "to"], ["c"]),
        node("GRU", ["c", "w2", "r2"], ["d"], hidden_size=3, linear_before_reset=1),
        node("Squeeze", ["d", "one"], ["e"]),
        node("RNN", ["e", "w3", "r3"], ["", "f"], hidden_size=2, activations=["Relu"]),
        node("Squeeze", ["f", "first"], ["y"]),
    ]
    return _model(nodes, [1, 5, 4], constants, 14)


def _images() -> ModelProto:
    """What nets for images have beside convolutions."""
    node = helper.make_node
    constants = {
        "w": _floats(2, 3, 3, 3),
        "s": _floats(3),
        "none": np.array([], np.float32),
        "size": np.array([1, 3, 6, 5]),
        "slope": _floats(3, 1, 1),
        "parts": np.array([1, 2]),
    }
    nodes = [
        node("ConvTranspose", ["x", "w"], ["a"], strides=[2, 2], output_padding=[1, 0]),
        node("InstanceNormalization", ["a", "s", "s"], ["b"]),
        node("PRelu", ["b", "slope"], ["c"]),
        node("Resize", ["c", "", "", "size"], ["d"], mode="linear"),
        node("LRN", ["d"], ["e"], size=3),
        node("HardSwish", ["e"], ["f"]),
        node("Split", ["f", "parts"], ["g", "h"], axis=1),
        node("Mul", ["g", "h"], ["i"]),
        node("GlobalMaxPool", ["i"], ["j"]),
        node("Flatten", ["j"], ["k"]),
        node("LogSoftmax", ["k"], ["y"], axis=1),
    ]
    return _model(nodes, [1, 2, 4, 3], constants, 14)


def _places() -> ModelProto:
    """Positions, masks and reductions."""
    node = helper.make_node
    constants = {
        "k": np.array([3]),
        "entries": np.array([2, 0, -1]),
        "zero": np.float32(0),
        "last": np.array(-1),
        "power": np.float32(2),
        "times": np.array([1, 1, 2]),
    }
    nodes = [
        node("TopK", ["x", "k"], ["a", "i"], axis=2),
        node("GatherElements", ["x", "i"], ["b"], axis=2),
        node("Greater", ["b", "zero"], ["m"]),
        node("Where", ["m", "a", "b"], ["c"]),
        node("CumSum", ["c", "last"], ["e"]),
        node("Tile", ["e", "times"], ["f"]),
        node("Pow", ["f", "power"], ["g"]),
        node("ReduceL2", ["g"], ["h"], axes=[1], keepdims=0),
        node("ArgMax", ["x"], ["j"], axis=1, keepdims=0),
        node("Cast", ["j"], ["n"], to=TensorProto.FLOAT),
        node("Einsum", ["h", "n"], ["o"], equation="bi,bi->b"),
        node("Gather", ["x", "entries"], ["p"], axis=1),
        node("ReduceLogSumExp", ["p"], ["q"], axes=[1, 2], keepdims=0),
        node("Max", ["o", "q"], ["y"]),
    ]
    return _model(nodes, [1, 4, 6], constants, 13)


def _graphs() -> ModelProto:
    """A Loop of two rounds, and an If whose condition is a constant."""
    node, info = helper.make_node, helper.make_tensor_value_info
    inner = helper.make_graph(
        [node("Identity", ["go"], ["on"]), node("MatMul", ["h", "w"], ["n"]),
         node("Tanh", ["n"], ["after"])],
        "round",
        [info("i", TensorProto.INT64, []), info("go", TensorProto.BOOL, []),
         info("h", TensorProto.FLOAT, None)],
        [info("on", TensorProto.BOOL, []), info("after", TensorProto.FLOAT, None)],
    )  # fmt: skip
    branches = [
        helper.make_graph(
            [node(op, ["looped"], [f"{op}_out"])], op, [],
            [info(f"{op}_out", TensorProto.FLOAT, None)],
        )
        for op in ("Relu", "Neg")
    ]  # fmt: skip
    nodes = [
        node("Loop", ["count", "yes", "x"], ["looped"], body=inner),
        node("If", ["yes"], ["taken"], then_branch=branches[0], else_branch=branches[1]),
        node("Add", ["taken", "x"], ["y"]),
    ]
    constants = {"count": np.array(2), "yes": np.array(True), "w": _floats(4, 4)}
    return _model(nodes, [1, 4], constants, 13)


# -- mutations -------------------------------------------------------------------------------------


def _bytes(data: bytes, rng: Generator) -> bytes:
    """A few bytes set, taken out, put in, or everything behind one cut off."""
    result = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        at = int(rng.integers(len(result))) if result else 0
        kind = rng.integers(8)
        if kind < 5 and result:
            result[at] = int(rng.integers(256))
        elif kind == 5:
            del result[at : at + int(rng.integers(1, 9))]
        elif kind == 6:
            result[at:at] = rng.bytes(int(rng.integers(1, 9)))
        else:
            del result[at:]
    return bytes(result)


def _one(items: Any, rng: Generator) -> Any:
    return items[int(rng.integers(len(items)))] if len(items) else None


def _names(proto: ModelProto) -> list[str]:
    graph = proto.graph
    found = {n for node in graph.node for n in (*node.input, *node.output)}
    found |= {t.name for t in graph.initializer} | {v.name for v in graph.input}
    return [*sorted(found), "", "ghost"]


def _drop_node(proto: ModelProto, rng: Generator) -> None:
    if proto.graph.node:
        del proto.graph.node[int(rng.integers(len(proto.graph.node)))]


def _double_node(proto: ModelProto, rng: Generator) -> None:
    if node := _one(proto.graph.node, rng):
        copy = proto.graph.node.add()
        copy.CopyFrom(node)
        if rng.random() < 0.5:
            copy.output[:] = [f"{o}'" for o in node.output]


def _swap_nodes(proto: ModelProto, rng: Generator) -> None:
    if nodes := list(proto.graph.node):
        i, j = (int(rng.integers(len(nodes))) for _ in range(2))
        nodes[i], nodes[j] = nodes[j], nodes[i]
        kept = [NodeProto.FromString(n.SerializeToString()) for n in nodes]
        del proto.graph.node[:]
        proto.graph.node.extend(kept)


def _bypass_node(proto: ModelProto, rng: Generator) -> None:
    """Its readers read its first operand."""
    node = _one(proto.graph.node, rng)
    if node and node.input and node.output:
        old, new = node.output[0], node.input[0]
        for other in proto.graph.node:
            other.input[:] = [new if i == old else i for i in other.input]


def _rename_operand(proto: ModelProto, rng: Generator) -> None:
    if (node := _one(proto.graph.node, rng)) and node.input:
        node.input[int(rng.integers(len(node.input)))] = _one(_names(proto), rng)


def _operands(proto: ModelProto, rng: Generator) -> None:
    """One more, or one less."""
    if node := _one(proto.graph.node, rng):
        if rng.random() < 0.5 and node.input:
            del node.input[-1]
        else:
            node.input.append(_one(_names(proto), rng))


def _rename_result(proto: ModelProto, rng: Generator) -> None:
    if (node := _one(proto.graph.node, rng)) and node.output:
        node.output[int(rng.integers(len(node.output)))] = _one(_names(proto), rng)


def _results(proto: ModelProto, rng: Generator) -> None:
    if node := _one(proto.graph.node, rng):
        if rng.random() < 0.3 and node.output:
            del node.output[-1]
        else:
            node.output.append(f"extra{rng.integers(3)}")


def _operator(proto: ModelProto, rng: Generator) -> None:
    if node := _one(proto.graph.node, rng):
        node.op_type = str(_one(OPS, rng))


def _domain(proto: ModelProto, rng: Generator) -> None:
    if node := _one(proto.graph.node, rng):
        node.domain = str(_one(("com.example", "ai.onnx", "ai.onnx.ml", "com.microsoft"), rng))
        if rng.random() < 0.5:
            proto.opset_import.append(helper.make_opsetid(node.domain, int(rng.integers(0, 4))))


def _attribute(proto: ModelProto, rng: Generator) -> None:
    """A number of an attribute; or the attribute gone, new, of another kind."""
    node = _one(proto.graph.node, rng)
    if node is None:
        return
    a: AttributeProto | None = _one(node.attribute, rng)
    kind = rng.integers(6)
    if a is None or kind == 0:
        key = str(_one(("axis", "axes", "pads", "strides", "group", "alpha", "perm", "mode"), rng))
        value = _one((int(_one(ODD, rng)), [1, 1], 0.5, "reflect", [2**40] * 4), rng)
        node.attribute.append(helper.make_attribute(key, value))
    elif kind == 1:
        node.attribute.remove(a)
    elif kind == 2:
        a.type = int(rng.integers(0, 15))
    elif a.type == AttributeProto.INT:
        a.i = int(_one(ODD, rng))
    elif a.type == AttributeProto.FLOAT:
        a.f = float(_one((0.0, -1.0, 1e30, np.nan, np.inf, 1e-30), rng))
    elif a.type == AttributeProto.STRING:
        a.s = bytes(_one((b"", b"SAME_LOWER", b"VALID", b"\xff\xfe", b"tanh"), rng))
    elif a.type == AttributeProto.INTS:
        if a.ints and rng.random() < 0.8:
            a.ints[int(rng.integers(len(a.ints)))] = int(_one(ODD, rng))
        else:
            a.ints.append(int(_one(ODD, rng)))
    elif a.type == AttributeProto.TENSOR:
        _damage(a.t, rng)


def _opset(proto: ModelProto, rng: Generator) -> None:
    if rng.random() < 0.2:
        del proto.opset_import[:]
    elif proto.opset_import:
        proto.opset_import[0].version = int(_one((*range(1, 30), 0, -1, 2**40), rng))


def _format(proto: ModelProto, rng: Generator) -> None:
    proto.ir_version = int(_one((0, 1, 3, 4, 8, 10, 99, -1), rng))


def _weight(proto: ModelProto, rng: Generator) -> None:
    if t := _one(proto.graph.initializer, rng):
        _damage(t, rng)


def _damage(t: TensorProto, rng: Generator) -> None:
    kind = rng.integers(8)
    if kind == 0:
        t.raw_data = t.raw_data[: int(rng.integers(len(t.raw_data) + 1))]
    elif kind == 1 and t.dims:
        t.dims[int(rng.integers(len(t.dims)))] = int(_one(ODD, rng))
    elif kind == 2:
        t.dims.append(int(_one((1, 1, 2, 0, -1, 2**40), rng)))
    elif kind == 3:
        t.data_type = int(rng.integers(0, 26))
    elif kind == 4 and len(t.raw_data) >= 4:
        data = bytearray(t.raw_data)
        data[:4] = np.array(_one((np.nan, np.inf, 1e30, 0), rng), np.float32).tobytes()
        t.raw_data = bytes(data)
    elif kind == 5:
        t.data_location = TensorProto.EXTERNAL
        for key, values in (
            ("location", ("../w.bin", "/etc/passwd", "w.bin", "", "model.onnx")),
            ("offset", ("0", "-1", "x", str(2**62))),
            ("length", ("16", "-1", "", str(2**62))),
        ):
            t.external_data.add(key=key, value=str(_one(values, rng)))
    elif kind == 6 and t.dims:
        del t.dims[-1]
    else:
        t.name = str(_one(("x", "w1", "", "other"), rng))


def _drop_weight(proto: ModelProto, rng: Generator) -> None:
    if proto.graph.initializer:
        del proto.graph.initializer[int(rng.integers(len(proto.graph.initializer)))]


def _double_weight(proto: ModelProto, rng: Generator) -> None:
    if t := _one(proto.graph.initializer, rng):
        copy = proto.graph.initializer.add()
        copy.CopyFrom(t)


def _declared(proto: ModelProto, rng: Generator) -> None:
    """Type or name of an input or output of the model."""
    v = _one([*proto.graph.input, *proto.graph.output], rng)
    if v is None:
        return
    tensor = v.type.tensor_type
    kind = rng.integers(6)
    if kind == 0:
        tensor.elem_type = int(rng.integers(0, 26))
    elif kind == 1:
        tensor.ClearField("shape")
    elif kind == 2:
        v.name = str(_one(_names(proto), rng))
    elif kind == 3:
        tensor.shape.dim.add(dim_value=int(_one(ODD, rng)))
    elif tensor.shape.dim:
        d = tensor.shape.dim[int(rng.integers(len(tensor.shape.dim)))]
        if kind == 4:
            d.dim_value = int(_one(ODD, rng))
        else:
            d.dim_param = str(_one(("N", "other", ""), rng))


def _value_info(proto: ModelProto, rng: Generator) -> None:
    """A recorded shape of a value between, right or wrong."""
    dims = [int(_one(ODD, rng)) for _ in range(int(rng.integers(5)))]
    info = helper.make_tensor_value_info(str(_one(_names(proto), rng)), 1, None)
    for d in dims:
        info.type.tensor_type.shape.dim.add(dim_value=d)
    proto.graph.value_info.append(info)


def _declare(proto: ModelProto, rng: Generator) -> None:
    """One more input or output."""
    info = helper.make_tensor_value_info(str(_one(_names(proto), rng)), 1, [1, 4])
    (proto.graph.input if rng.random() < 0.5 else proto.graph.output).append(info)


def _forget(proto: ModelProto, rng: Generator) -> None:
    """A whole field of the graph."""
    graph: Message = proto.graph
    graph.ClearField(str(_one(("input", "output", "initializer", "name"), rng)))


MUTATIONS: tuple[Mutation, ...] = (
    *(_drop_node, _double_node, _swap_nodes, _bypass_node, _rename_operand, _operands),
    *(_rename_result, _results, _operator, _domain, _attribute, _attribute, _attribute),
    *(_opset, _format, _weight, _weight, _drop_weight, _double_weight, _declared, _declared),
    *(_value_info, _declare, _forget),
)
