"""A model file as plain records: batch bound, types static, constants folded, no protobuf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote

import onnx
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, inliner

from .graph import MAX_ELEMENTS, Array, TensorType, unique_name
from .import_options import PLAIN, ImportOptions
from .obstacles import Obstacle
from .onnx_dims import bind_dims
from .onnx_first_step import put_back_first_steps
from .onnx_flags import numbers_for_flags
from .onnx_fold import ELEMENT_TYPES, infer_and_fold
from .onnx_guard import is_sound
from .onnx_outputs import keep_outputs
from .onnx_read import (
    at_known_opset,
    check_structure,
    known_attributes,
    node_name,
    read_initializers,
    read_proto,
    tensor_array,
)
from .onnx_scopes import STANDARD_DOMAINS, all_nodes, copies, hoist_constants, inner_graphs
from .onnx_sklearn import plain_outputs
from .onnx_states import bind_states
from .provenance import Origin
from .quantization import Quantization

#: Why an input of another element type is refused.
INPUT_KINDS = (
    "only float32 inputs, int32 and int64 ones that are read as indices or labels or are cast to"
    " float32 or bool, bool ones, and int8 or uint8 ones that DequantizeLinear reads, are supported"
)
#: Element types that operators read through DequantizeLinear only: never judged as float32.
QUANTIZED_ONLY = ("float4", "float8", "int2", "int4", "uint2", "uint4")
EIGHT_BITS = (TensorProto.INT8, TensorProto.UINT8)
INDICES = (TensorProto.INT32, TensorProto.INT64)
#: Operators that read indices or labels, from the input of a model as well -> which operand.
_INDEXED = {
    "Gather": 1,
    "GatherElements": 1,
    "NegativeLogLikelihoodLoss": 1,
    "OneHot": 0,
    "SoftmaxCrossEntropyLoss": 1,
}
#: Operators that hand the integers of operand 0 on.
INTEGER_MOVES = (
    *("Cast", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze"),
    *("Tile", "Transpose", "Unsqueeze"),
)
#: Those of them that don't care for the type.
SHAPING = tuple(op for op in INTEGER_MOVES if op not in ("Cast", "Gather"))
#: Operators that compute or compare integers which depend on the data of a sample.
INTEGER_OPS = (
    *("Abs", "Add", "ArgMax", "ArgMin", "Concat", "Equal", "Greater", "GreaterOrEqual", "Less"),
    *("LessOrEqual", "Max", "Min", "Mul", "Neg", "Sub", "Where"),
)
_REAL = (TensorProto.FLOAT, TensorProto.BOOL)
FileAttr = int | float | str | tuple[int, ...] | tuple[float, ...] | tuple[str, ...] | Array


@dataclass(frozen=True, eq=False)
class FileNode:
    """A node of the file.

    Attributes:
        name: Unique; the operator and position where the file gives none.
        op: Operator type.
        domain: Operator set, "" for the standard one.
        inputs: Value names, "" where an optional operand is absent.
        outputs: Value names, "" where an optional result is not wanted.
        attrs: Attributes; tensors as arrays, subgraphs left out.
        kept: Why it could not be written out; empty where it does not stand for a graph.
        unknown: Names of attributes that the operator does not have in the model's opset.
    """

    name: str
    op: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: dict[str, FileAttr] = field(default_factory=dict)
    kept: str = ""
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class ModelFile:
    """What is left of a model file after binding, inference and folding.

    Attributes:
        name: Graph name, or the file's stem.
        opset: Version of the standard operator set.
        batch: The bound batch.
        inputs: Run-time inputs and their types; None where the type is not static.
        outputs: Names of the results.
        constants: Initializers and folded values by name.
        quantization: Meaning as i8 of the constants that the file stores as 8-bit integers; their
            data are the real values.
        nodes: In order of execution; only those that the outputs need.
        types: Inferred types of values, where they are static.
        obstacles: What is wrong so far.
        notes: What was changed to make it one that can be trained.
        origins: Where folded constants come from in the file.
    """

    name: str
    opset: int
    batch: int
    inputs: dict[str, TensorType | None]
    outputs: tuple[str, ...]
    constants: dict[str, Array]
    quantization: dict[str, Quantization]
    nodes: tuple[FileNode, ...]
    types: dict[str, TensorType]
    obstacles: tuple[Obstacle, ...]
    notes: tuple[str, ...] = ()
    origins: Mapping[str, Origin] = field(default_factory=dict)

    def origin(self, name: str) -> Origin:
        """Where a constant comes from: itself, if it is one of the file."""
        return self.origins.get(name, Origin(name))


def load_file(path: Path, options: ImportOptions = PLAIN) -> ModelFile:
    """Read, check, bind, infer and fold a model file.

    Args:
        path: An ``.onnx`` file.
        options: Batch and dimensions are bound by them.

    Raises:
        UsageError: The path is missing, a folder or unreadable, or has no such dimensions.
        UnsupportedModelError: The file can't be read as a graph at all. Everything less than that
            stands in ``obstacles``.
    """
    proto = read_proto(path)
    bind_dims(proto, path, options)
    _name_nodes(proto)  # by their places in the file
    notes = bind_states(proto, options.batch) + plain_outputs(proto)
    notes += keep_outputs(proto, path, options.outputs)
    return replace(model_file(proto, path, options.batch), notes=notes)


def model_file(proto: ModelProto, path: Path, batch: int) -> ModelFile:
    """Check, bind, infer and fold a model.

    Args:
        proto: A model without external data, its dimensions bound; changed.
        path: What messages call it.
        batch: The bound batch.

    Raises:
        UnsupportedModelError: It is no graph at all. Everything less stands in ``obstacles``.
    """
    copied = frozenset(copies(proto.graph))
    if proto.functions:
        proto = inliner.inline_local_functions(proto)
    hoist_constants(proto)
    numbers_for_flags(proto)
    check_structure(proto, path)
    proto, opset = at_known_opset(proto, path)
    _name_nodes(proto)
    constants, obstacles = read_initializers(proto)
    known = set(constants) | {o.where for o in obstacles}
    runtime = [v for v in proto.graph.input if v.name not in known]
    repeated = put_back_first_steps(proto, constants)
    del proto.graph.input[:]
    indices = _indices(proto)
    numbers = _numbers(proto) - indices
    inputs = {v.name: _input_type(v, batch, indices, numbers, obstacles) for v in runtime}
    proto.graph.input.extend(runtime)
    proto.ir_version = max(proto.ir_version, 4)  # from here on initializers need not be inputs
    _forget_symbols(proto)
    folded = infer_and_fold(proto, constants, opset, copied, repeated)
    obstacles += [o for o in folded.errors if o not in obstacles]
    records = [_record(n, opset, folded.kept.get(n.name, "")) for n in proto.graph.node]
    needed = _needed(records, {v.name for v in proto.graph.output})
    used = {i for n in needed for i in n.inputs} | {v.name for v in proto.graph.output}
    return ModelFile(
        name=proto.graph.name or path.stem,
        opset=opset,
        batch=batch,
        inputs=inputs,
        outputs=tuple(v.name for v in proto.graph.output),
        constants={k: a for k, a in constants.items() if k in used},
        quantization={k: q for k, q in folded.stored.items() if k in used},
        nodes=tuple(_without_unread(n, used) for n in needed),
        types=folded.types,
        obstacles=tuple(o for o in obstacles if o.op != "initializer" or o.where in used),
        origins={k: o for k, o in folded.origins.items() if k in used},
    )


def _without_unread(node: FileNode, used: set[str]) -> FileNode:
    """A node whose optional results have names only where something reads them."""
    rest = tuple(o if o in used else "" for o in node.outputs[1:])
    return replace(node, outputs=(*node.outputs[:1], *rest))


def unique_names(nodes: Sequence[NodeProto]) -> list[str]:
    """A name of its own for every node: messages and plans refer to nodes by name."""
    names: dict[str, None] = {}
    for i, node in enumerate(nodes):
        names[unique_name(node_name(node, i), names)] = None
    return list(names)


def _name_nodes(proto: ModelProto) -> None:
    for node, name in zip(proto.graph.node, unique_names(proto.graph.node), strict=True):
        node.name = name


def _input_type(
    v: ValueInfoProto,
    batch: int,
    indices: set[str],
    numbers: set[str],
    obstacles: list[Obstacle],
) -> TensorType | None:
    """The type of an input, if it is static.

    An input of another element type is judged on as if it were float32, so that the report does not
    repeat the reason at every node; 8-bit inputs are judged where the graph is built, because their
    scales stand in later nodes. Indices become i32, whatever the file has, and integers that are
    cast to numbers or conditions (masks) float32.
    """
    if not v.type.HasField("tensor_type"):
        obstacles.append(Obstacle(v.name, "input", "is not a tensor"))
        return None
    tensor = v.type.tensor_type
    dims = tensor.shape.dim
    indexing = tensor.elem_type in INDICES and v.name in indices
    if tensor.elem_type in INDICES and v.name in numbers:
        tensor.elem_type = TensorProto.FLOAT
    if tensor.elem_type not in (TensorProto.FLOAT, *EIGHT_BITS) and not indexing:
        kinds = TensorProto.DataType.items()
        kind = next((k.lower() for k, v in kinds if v == tensor.elem_type), "of an unknown type")
        obstacles.append(Obstacle(v.name, "input", f"is {kind}; {INPUT_KINDS}"))
        if kind.startswith(QUANTIZED_ONLY):
            return None
        tensor.elem_type = TensorProto.FLOAT
    if not tensor.HasField("shape"):
        obstacles.append(Obstacle(v.name, "input", "has no shape; export with static shapes"))
        return None
    if dims and batch not in (1, dims[0].dim_value):
        fixed = dims[0].dim_value
        reason = f"has a fixed batch of {fixed}, not {batch}; use --batch {fixed}"
        obstacles.append(Obstacle(v.name, "input", reason))
    if unknown := [axis for axis, d in enumerate(dims) if d.dim_value < 1]:
        obstacles.append(Obstacle(v.name, "input", *_unknown(v, unknown)))
        return None
    sizes = tuple(d.dim_value for d in dims)
    if not is_sound(sizes):
        reason = f"{[*sizes]} has more than {MAX_ELEMENTS} elements"
        obstacles.append(Obstacle(v.name, "input", reason))
        tensor.ClearField("shape")
        return None
    dtype = ELEMENT_TYPES[tensor.elem_type] if tensor.elem_type in EIGHT_BITS else "f32"
    return TensorType(sizes, "i32" if indexing else dtype)


def _unknown(v: ValueInfoProto, axes: list[int]) -> tuple[str, tuple[str, ...]]:
    """Which dimensions of an input have no value, and the options that give them one."""
    names = {a: v.type.tensor_type.shape.dim[a].dim_param for a in axes}
    told = ", ".join(f"{a} ({name or 'unnamed'})" for a, name in names.items())
    keys = dict.fromkeys(name or f"{v.name}:{a}" for a, name in names.items())
    options = tuple(f"--dim {quote(f'{key}=N')}" for key in keys)
    subject = f"dimensions {told} are" if len(axes) > 1 else f"dimension {told} is"
    return f"{subject} not known; bind with {' '.join(options)}", options


def _indices(proto: ModelProto) -> set[str]:
    """Values that are read as indices or labels, maybe after they were moved or computed with."""
    found: set[str] = set()
    for node in reversed(list(all_nodes(proto.graph))):
        at = _INDEXED.get(node.op_type)
        if at is not None and len(node.input) > at:
            found.add(node.input[at])
        if node.op_type in INTEGER_MOVES and found.intersection(node.output):
            found.update(node.input[:1])
        if node.op_type in INTEGER_OPS and found.intersection(node.output):
            found.update(node.input)
    return found


def _numbers(proto: ModelProto) -> set[str]:
    """Values that nothing reads but casts to float32 or bool, maybe behind what reshapes them."""
    readers: dict[str, list[NodeProto]] = {}
    nodes = list(all_nodes(proto.graph))
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    handed_on = {v.name for n in proto.graph.node for g in inner_graphs(n) for v in g.output}
    found: set[str] = set()

    def numeric(name: str, node: NodeProto) -> bool:
        if node.op_type == "Cast":
            return any(a.name == "to" and a.i in _REAL for a in node.attribute)
        moved = node.op_type in SHAPING and node.input[0] == name
        return node.op_type == "Shape" or (moved and found.issuperset(node.output))

    made = [name for node in reversed(nodes) for name in node.output]
    for name in (*made, *(readers.keys() - set(made))):
        if name not in handed_on and all(numeric(name, node) for node in readers.get(name, ())):
            found.add(name)
    return found - {v.name for v in proto.graph.output}


def _forget_symbols(proto: ModelProto) -> None:
    """Drop recorded shapes that the bound batch may contradict; keep fixed sizes of results."""
    del proto.graph.value_info[:]
    for v in proto.graph.output:
        dims = v.type.tensor_type.shape.dim
        if any(d.dim_value <= 0 for d in dims):
            for d in dims:
                if d.dim_value <= 0:
                    d.Clear()


def _record(node: NodeProto, opset: int, kept: str) -> FileNode:
    attrs: dict[str, FileAttr] = {}
    for a in node.attribute:
        if a.type == AttributeProto.TENSOR:
            with suppress(ValueError):  # a tensor that can't be read is as good as missing
                attrs[a.name] = tensor_array(a.t)
        elif a.type in (AttributeProto.INTS, AttributeProto.FLOATS):
            attrs[a.name] = tuple(onnx.helper.get_attribute_value(a))
        elif a.type == AttributeProto.STRINGS:
            attrs[a.name] = tuple(text.decode(errors="replace") for text in a.strings)
        elif a.type == AttributeProto.STRING:
            attrs[a.name] = a.s.decode(errors="replace")
        elif a.type in (AttributeProto.INT, AttributeProto.FLOAT):
            attrs[a.name] = onnx.helper.get_attribute_value(a)
    domain = "" if node.domain in STANDARD_DOMAINS else node.domain
    known = None if domain else known_attributes(node.op_type, opset)
    return FileNode(
        node.name,
        node.op_type,
        domain,
        tuple(node.input),
        tuple(node.output),
        attrs,
        kept,
        tuple(a.name for a in node.attribute if known is not None and a.name not in known),
    )


def _needed(nodes: list[FileNode], outputs: set[str]) -> list[FileNode]:
    """Nodes that the outputs depend on."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted.intersection(node.outputs):
            wanted.update(filter(None, node.inputs))  # results without a name are no operands
            kept.append(node)
    return kept[::-1]
