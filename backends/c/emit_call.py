"""C text of one kernel call: the parameter struct of a node and the typed call statement.

Both are derived from the operator's ``CKernel`` record and the types of the node's values, so a
call can't disagree with its kernel about a type without the C compiler seeing it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from ...ir.errors import GraphError
from ...ir.graph import Attr, Node
from ...ir.opdef import CKernel, OpDef, get_op

#: C element type of each tensor dtype that a kernel can be handed.
C_TYPES: dict[str, str] = {
    "f32": "float",
    "f16": "uint16_t",
    "i32": "int32_t",
    "u8": "uint8_t",
    "i8": "int8_t",
    "bits": "uint8_t",
}

_INT32 = range(-(2**31), 2**31)
_PLAIN = re.compile(r"[A-Za-z_]\w*")
_NO_WORKSPACE = OpDef.__dataclass_fields__["workspace"].default


def kernel_of(node: Node) -> CKernel:
    """The C kernel of a node.

    Raises:
        GraphError: The node is a view; no code runs for it.
    """
    kernel = get_op(node.op).c
    if kernel is None:
        raise GraphError(f"node {node.name}: {node.op} is a view and has no C kernel")
    return kernel


def float_literal(value: float) -> str:
    """A C float literal with exactly the fp32 value nearest to ``value``."""
    with np.errstate(over="ignore"):
        v = float(np.float32(value))
    if math.isnan(v):
        return "(0.0f / 0.0f)"
    if math.isinf(v):
        return "(1.0f / 0.0f)" if v > 0 else "(-1.0f / 0.0f)"
    text = f"{v:.9g}"  # 9 significant digits identify every fp32 value
    if "." not in text and "e" not in text:
        text += ".0"
    return f"{text}f"


def param_struct(node: Node, name: str) -> str:
    """Definition of the constant parameter struct of a node.

    Args:
        node: A node whose operator has a C kernel.
        name: C identifier of the struct.

    Returns:
        ``static const <struct> <name> = {.field = value, ...};`` on as many lines as it has fields.

    Raises:
        GraphError: The node is a view, or a parameter does not fit int32_t.
    """
    kernel = kernel_of(node)
    fields = kernel.params(node)
    body = "".join(f"    .{k} = {_initializer(node, k, v)},\n" for k, v in fields.items())
    return f"static const {kernel.struct} {name} = {{\n{body}}};\n"


def call(
    node: Node,
    params: str,
    inputs: Sequence[str | None],
    outputs: Sequence[str],
    workspace: str | None = None,
    rows: tuple[str, str] | None = None,
    first_row: str = "0",
) -> str:
    """The C statement that runs a node.

    Args:
        node: A node whose operator has a C kernel.
        params: Name of its parameter struct.
        inputs: C pointer expression per operand; None where the operand is absent.
        outputs: C pointer expression per result.
        workspace: C pointer expression of the scratch memory; None: NULL where the kernel has the
            argument.
        rows: C expressions of the first row and the row after the last; only for row-streamed
            gradients, which compute all rows without it.
        first_row: C expression of the row at which a run begins; used by updates that depend on it.

    Raises:
        GraphError: The node is a view, the counts are wrong, an operand is missing or present
            against the node, or a dtype has no C type.
    """
    kernel, op = kernel_of(node), get_op(node.op)
    given = [s is not None for s in inputs]
    wanted = [v is not None for v in node.inputs]
    if given != wanted or len(outputs) != len(node.outputs):
        raise GraphError(
            f"node {node.name}: {given} -> {len(outputs)} pointers given for operands {wanted}"
            f" -> {len(node.outputs)} results"
        )
    sources = [
        "NULL" if v is None or s is None else _cast(node, v.type.dtype, s, const=True)
        for v, s in zip(node.inputs, inputs, strict=True)
    ]
    if kernel.variadic:
        element = C_TYPES[node.out.type.dtype]
        sources = [f"(const {element} *const[]){{{', '.join(sources)}}}"]
    else:
        sources += ["NULL"] * (_operand_count(op, kernel, node) - len(sources))
    args = [f"&{params}", *sources]
    args += [
        _cast(node, v.type.dtype, s, const=False)
        for v, s in zip(node.outputs, outputs, strict=True)
    ]
    if op.workspace is not _NO_WORKSPACE:
        if workspace is None and op.workspace(node) > 0:
            raise GraphError(f"node {node.name}: {node.op} needs a workspace")
        args.append("NULL" if workspace is None else workspace)
    if op.rows_kernel is not None:
        begin, end = rows or ("0", str(node.out.type.shape[0]))
        args += [begin, end]
    elif rows is not None:
        raise GraphError(f"node {node.name}: {node.op} can't be computed by rows")
    if op.run_kernel is not None:
        args.append(first_row)
    return f"{kernel.function(node)}({', '.join(args)});"


def _operand_count(op: OpDef, kernel: CKernel, node: Node) -> int:
    """Pointer arguments of the C function: trailing optional operands may be left out of a node."""
    if kernel.operands is not None:
        return kernel.operands
    slots = [i + 1 for s in op.params for i in (s.index, s.cold_index) if i is not None]
    return max([len(node.inputs), *slots])


def _cast(node: Node, dtype: str, pointer: str, *, const: bool) -> str:
    if dtype not in C_TYPES:
        raise GraphError(f"node {node.name}: the C back end has no type for {dtype}")
    if not _PLAIN.fullmatch(pointer):
        pointer = f"({pointer})"
    return f"({'const ' if const else ''}{C_TYPES[dtype]} *){pointer}"


def _initializer(node: Node, field: str, value: Attr) -> str:
    if isinstance(value, tuple):
        if not value:
            return "{0}"
        is_float = any(isinstance(v, float) for v in value)
        return f"{{{', '.join(_scalar(node, field, v, is_float) for v in value)}}}"
    if isinstance(value, str):
        raise GraphError(f"node {node.name}: C parameter {field} is text ({value!r})")
    return _scalar(node, field, value, isinstance(value, float))


def _scalar(node: Node, field: str, value: int | float, is_float: bool) -> str:
    if is_float:
        return float_literal(value)
    if value not in _INT32:
        raise GraphError(f"node {node.name}: C parameter {field} = {value} does not fit int32_t")
    if value == -(2**31):  # the literal 2147483648 is no int32_t
        return "(-2147483647 - 1)"
    return str(int(value))
