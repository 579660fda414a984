"""Type inference by onnx, and evaluation of the nodes that do not depend on run-time data.

Each constant that is found makes more shapes known, and each shape more nodes constant, so both
are repeated until nothing changes.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from .graph import Array, TensorType
from .obstacles import Obstacle
from .onnx_guard import (
    MAX_INFERRED_ELEMENTS,
    is_sound,
    leave_readable,
    without_unsafe_slices,
)
from .onnx_origin import dequantize, origins_of, run_node
from .onnx_scopes import STANDARD_DOMAINS, subgraphs
from .onnx_unroll import Unroller
from .provenance import Origin
from .qdq import moved
from .quantization import Quantization

#: All results of constant folding together may not be larger: such a model fits no small device.
MAX_FOLDED_ELEMENTS = 3 * 2**26
#: Longer vectors are not followed by inference; none of them is a shape.
MAX_PROPAGATED_ELEMENTS = 2**16
#: Begins the reason of what onnx's inference finds.
INCONSISTENT = "is inconsistent"
#: Results may be much larger than the operands: folded only where inference knows how large.
_GROWING = frozenset(
    {
        *("CenterCropPad", "ConstantOfShape", "EyeLike", "Expand", "MaxUnpool", "OneHot", "Pad"),
        *("Resize", "Tile", "Upsample"),
    }
)
_RANDOM = ("Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomUniform")
#: ONNX element type -> dtype name of the IR.
ELEMENT_TYPES: dict[int, str] = {
    TensorProto.FLOAT: "f32",
    TensorProto.DOUBLE: "f64",
    TensorProto.FLOAT16: "f16",
    TensorProto.INT64: "i64",
    TensorProto.INT32: "i32",
    TensorProto.UINT8: "u8",
    TensorProto.INT8: "i8",
    TensorProto.BOOL: "bits",
}


@dataclass(frozen=True, eq=False)
class Folded:
    """What is known of a model.

    Attributes:
        types: Static types by value name.
        stored: Meaning as i8 of constants that the file stores as 8-bit integers.
        origins: Where folded constants come from.
        errors: The inconsistencies that inference found.
        kept: Nodes that stand for graphs and could not be written out, and why.
    """

    types: dict[str, TensorType]
    stored: dict[str, Quantization]
    origins: dict[str, Origin]
    errors: list[Obstacle]
    kept: dict[str, str]


def infer_and_fold(
    proto: ModelProto,
    constants: dict[str, Array],
    opset: int,
    copied: Collection[str] = (),
    origins: Mapping[str, Origin] | None = None,
) -> Folded:
    """Infer types, fold constant nodes and write out nodes that stand for graphs, to the end.

    Args:
        proto: The model; folded nodes are replaced by initializers in place, large initializers by
            inputs of their type, and what stands for a graph by its nodes.
        constants: Initializers; folded values are added in place.
        opset: Version of the standard operator set.
        copied: Results of nodes that count as tensors of the file.
        origins: Where initializers come from that are no tensors of the file as they are.
    """
    stored: dict[str, Quantization] = {}
    origins = dict(origins or {})
    errors: list[Obstacle] = []
    leave_readable(proto, constants)
    types: dict[str, TensorType] = {}
    room = MAX_FOLDED_ELEMENTS
    _write_defaults(proto)
    unroller = Unroller(proto, opset)
    while True:
        shown = without_unsafe_slices(proto, types)
        inferred, errors = _infer(shown)
        _write_casts(proto, inferred)
        known = types
        types = {k: t for k, t in _static_types(inferred) if is_sound(t.shape)}
        rest: list[NodeProto] = []
        folded: dict[str, Array] = {}
        for node in proto.graph.node:
            values = _evaluate(node, constants, proto, types, room)
            if values is None:
                rest.append(node)
            else:
                folded |= values
                room -= sum(a.size for a in values.values())
                constants |= values
                stored |= _meaning(node, constants, stored)
                made = origins_of(node, list(proto.opset_import), constants, origins)
                origins |= {k: o for k, o in made.items() if k not in copied}
        if folded:
            del proto.graph.node[:]
            proto.graph.node.extend(rest)
        evaluate = partial(_evaluate, proto=proto, types=types, room=room)
        unrolled = unroller.sweep(constants, types, evaluate)
        if not folded and not unrolled and (shown is proto or types == known):
            return Folded(types, stored, origins, errors, unroller.kept)
        for k, a in folded.items():
            if a.size > MAX_INFERRED_ELEMENTS:
                kind = onnx.helper.np_dtype_to_tensor_dtype(a.dtype)
                proto.graph.input.append(onnx.helper.make_tensor_value_info(k, kind, a.shape))
            else:
                a = np.ascontiguousarray(a).reshape(a.shape)
                proto.graph.initializer.append(numpy_helper.from_array(a, k))


def _write_defaults(proto: ModelProto) -> None:
    """Attributes that onnx's inference of an operator's definition must find in the node."""
    for node in proto.graph.node:
        if node.op_type == "MeanVarianceNormalization" and not node.attribute:
            node.attribute.append(onnx.helper.make_attribute("axes", (0, 2, 3)))


def _write_casts(proto: ModelProto, inferred: ModelProto) -> None:
    """CastLike is a Cast where the element type of operand 1 is known."""
    graph = inferred.graph
    kinds = {t.name: t.data_type for t in graph.initializer}
    for v in (*graph.input, *graph.value_info, *graph.output):
        kinds[v.name] = v.type.tensor_type.elem_type
    for node in proto.graph.node:
        standard = node.op_type == "CastLike" and node.domain in STANDARD_DOMAINS
        if standard and len(node.input) == 2 and (to := kinds.get(node.input[1])):
            node.op_type = "Cast"
            del node.input[1]
            node.attribute.append(onnx.helper.make_attribute("to", to))


def _propagates(proto: ModelProto) -> bool:
    """Whether onnx may follow integers through the shapes of a model.

    It writes them out, every vector of a known length that it comes by, and takes all memory where
    a file has a long one. Without it folding takes more rounds, within limits.
    """
    try:
        inferred = onnx.shape_inference.infer_shapes(proto)
    except Exception:  # said again by the strict run
        return False
    lists = {o for n in proto.graph.node if n.op_type in ("Range", "Tile") for o in n.output}
    for name, t in _static_types(inferred):
        lists.discard(name)
        if len(t.shape) == 1 and t.size > MAX_PROPAGATED_ELEMENTS:
            return False
    return not lists


def _infer(proto: ModelProto) -> tuple[ModelProto, list[Obstacle]]:
    """Shape inference by onnx; inconsistencies become obstacles of the nodes that they are in."""
    follow = _propagates(proto)
    try:
        return onnx.shape_inference.infer_shapes(
            proto, check_type=True, strict_mode=True, data_prop=follow
        ), []
    except Exception as e:  # onnx raises InferenceError, TypeError and RuntimeError here
        text = str(e)
    found = re.findall(r"\(op_type:([^,)]*)(?:, node name: ([^)]*))?\): *([^\n]*)", text)
    obstacles = [
        Obstacle(name or op, op, f"{INCONSISTENT}: {_plain(reason)}")
        for op, name, reason in found
        if "No schema registered" not in reason and "No Op registered" not in reason
    ]
    if not found:
        obstacles = [Obstacle(proto.graph.name or "model", "graph", _plain(text.splitlines()[0]))]
    try:
        return onnx.shape_inference.infer_shapes(proto, data_prop=follow), obstacles
    except Exception:  # the strict run has said why; conversion goes on with what it infers itself
        return proto, obstacles


def _plain(text: str) -> str:
    return re.sub(r"\[\w+\] *", "", text).strip()


def _static_types(proto: ModelProto) -> Iterator[tuple[str, TensorType]]:
    for v in (*proto.graph.input, *proto.graph.value_info, *proto.graph.output):
        t = v.type.tensor_type
        sizes = tuple(d.dim_value for d in t.shape.dim)
        if t.HasField("shape") and all(s > 0 for s in sizes):
            yield v.name, TensorType(sizes, ELEMENT_TYPES.get(t.elem_type, "f32"))


def _evaluate(
    node: NodeProto,
    constants: Mapping[str, Array],
    proto: ModelProto,
    types: Mapping[str, TensorType],
    room: int,
) -> dict[str, Array] | None:
    """Results of a node that does not depend on run-time data, or None.

    None also where they may have more than ``room`` elements.
    """
    if node.domain not in STANDARD_DOMAINS or node.op_type.startswith(_RANDOM):
        return None
    if any(True for _ in subgraphs(node)):
        return None
    if not any(node.output):
        return None
    if not node.output[0] and node.op_type in ("Shape", "Size"):
        return None
    if node.op_type in ("Shape", "Size") and node.input and node.input[0] in types:
        shape = types[node.input[0]].shape
        span = {a.name: a.i for a in node.attribute}
        dims = shape[slice(span.get("start", 0), span.get("end", len(shape)))]
        data = dims if node.op_type == "Shape" else int(np.prod(shape))
        return {node.output[0]: np.array(data, np.int64)}
    names = [i for i in node.input if i]
    if any(i not in constants for i in names):
        return None
    if len(names) > 1 and _begins_recurrence(node, constants, proto):
        return None
    if sum(types[o].size for o in node.output if o in types) > room:
        return None
    if node.op_type == "Range":
        length = _range_length(*(constants[i] for i in names)) if len(names) == 3 else None
        if length is None or length > room:
            return None
    elif node.op_type in _GROWING and any(o and o not in types for o in node.output):
        return None  # the next round knows how large it is
    wanted = [o for o in node.output if o]
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # NaN that results is reported where it is used
            opsets = list(proto.opset_import)
            values = run_node(node, opsets, {i: constants[i] for i in names}, wanted)
    except Exception:  # an operator without reference: it stays a node, and the table judges it
        return None
    if any(isinstance(a, list) for a in values):  # a sequence is no constant
        return None
    arrays = [np.asarray(a) for a in values]
    if len(arrays) != len(wanted):
        return None
    if any(a.dtype.kind not in "fiub" or a.dtype.itemsize > 8 for a in arrays):
        return None
    return dict(zip(wanted, arrays, strict=True))


def _begins_recurrence(node: NodeProto, constants: Mapping[str, Array], proto: ModelProto) -> bool:
    """A layer of zeros whose weights layers of other values have, too.

    It is the first step of a recurrent layer that is written out, from a state of zeros. Folded,
    its bias would be a parameter of its own beside that of the other steps.
    """
    x, *weights = node.input[:2]
    if node.op_type not in ("Conv", "Gemm", "MatMul") or not x or constants[x].any():
        return False
    return any(
        n.op_type == node.op_type and n.input[1:2] == weights and n.input[0] not in constants
        for n in proto.graph.node
    )


def _range_length(start: Array | None, limit: Array | None, delta: Array | None) -> int | None:
    """Elements of a Range; None where an operand is not known, or where it is not defined."""
    if start is None or limit is None or delta is None:
        return None
    a, b, step = (float(v.reshape(())) if v.size == 1 else math.nan for v in (start, limit, delta))
    if step == 0 or not math.isfinite(length := (b - a) / step):
        return None
    return max(0, math.ceil(length))


def _meaning(
    node: NodeProto, constants: dict[str, Array], stored: dict[str, Quantization]
) -> dict[str, Quantization]:
    """Meaning of the result of a folded node, if the file stores it as 8-bit integers."""
    quant: Quantization | None = None
    if node.op_type == "DequantizeLinear":
        quant = dequantize(node, constants)[1]
    elif node.input and node.input[0] in stored:
        attrs = {a.name: tuple(a.ints) for a in node.attribute if a.ints}
        rank = constants[node.input[0]].ndim
        quant = moved(stored[node.input[0]], node.op_type, attrs, rank)
    return {} if quant is None else {node.output[0]: quant}
