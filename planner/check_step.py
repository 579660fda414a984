"""Rules of a single step that need no history: what may overlap, tiles, workspaces.

Part of the checker (see ``planner.check``).
"""

from __future__ import annotations

from collections.abc import Sequence

from ..ir.graph import Node, TensorType
from ..ir.opdef import get_op, inplace_operands
from .check_program import Program, occupied
from .plan import Buffer, Step


def apart(
    p: Program,
    index: int,
    node: Node,
    reads: Sequence[tuple[int, Buffer]],
    results: Sequence[Buffer],
) -> None:
    """Results, scratch and operands may not touch, except in-place results and views.

    Args:
        p: The plan.
        index: Step.
        node: Node whose results ``results`` are.
        reads: Operand position and buffer.
        results: Buffers of the node's results in order.

    Raises:
        CheckError: They touch.
    """
    step, op = p.plan.steps[index], get_op(node.op)
    scratch = [p.buffer(index, b) for b in (step.workspace, step.tile) if b is not None]
    written = [*results, *scratch]
    for k, out in enumerate(written):
        for other in written[:k]:
            if _touch(out, other):
                raise p.error(index, f"buffers {out.id} and {other.id} overlap")
        for position, source in reads:
            allowed = bool(results) and k == 0 and _in_place(p, node, position, out, source)
            if _touch(out, source) and not allowed:
                raise p.error(
                    index,
                    f"buffer {out.id} (bytes {out.offset} to {out.offset + out.bytes}) overwrites"
                    f" operand {position} in {source.id} (bytes {source.offset} to"
                    f" {source.offset + source.bytes}), where {node.op} can't work in place",
                )
    if op.view and not _same_range(results[0], reads[0][1]):
        raise p.error(index, f"{results[0].id} is a view and must lie where {reads[0][1].id} lies")


def _in_place(p: Program, node: Node, position: int, out: Buffer, source: Buffer) -> bool:
    op = get_op(node.op)
    if not _same_range(out, source):
        return False
    if op.view:
        return position == 0
    return position in inplace_operands(node) and p.types[out.id] == p.types[source.id]


def tile(p: Program, index: int, nodes: Sequence[Node]) -> Buffer | None:
    """A gradient that is used at once goes through a tile of whole rows, which cover all rows.

    Raises:
        CheckError: The tile does not fit, or there is one without a gradient.
    """
    step = p.plan.steps[index]
    if len(nodes) == 1:
        if step.tile is not None or step.tile_rows:
            raise p.error(index, "has a tile but no gradient to stream")
        return None
    t = nodes[0].out.type
    rows = t.shape[0] if t.shape else 1
    if not 1 <= step.tile_rows <= rows:
        raise p.error(index, f"tile_rows is {step.tile_rows}, the gradient has {rows} rows")
    if step.tile_rows < rows and get_op(nodes[0].op).rows_kernel is None:
        raise p.error(index, f"{nodes[0].op} can't be streamed in rows")
    if step.tile is None:
        raise p.error(index, "a gradient that is used at once needs a tile buffer")
    b = p.buffer(index, step.tile)
    _raw(p, index, b, t.nbytes // rows * step.tile_rows, {f"tile:{nodes[0].name}"})
    return b


def workspace(p: Program, index: int, nodes: Sequence[Node]) -> Buffer | None:
    """The step has the workspace that its nodes need.

    Raises:
        CheckError: It is missing, or of another size.
    """
    step: Step = p.plan.steps[index]
    need = max(get_op(n.op).workspace(n) for n in nodes)
    if step.workspace is None:
        if need:
            raise p.error(index, f"needs a workspace of {need} B and has none")
        return None
    b = p.buffer(index, step.workspace)
    _raw(p, index, b, need, {f"workspace:{n.name}" for n in nodes})
    return b


def _raw(p: Program, index: int, b: Buffer, need: int, names: set[str]) -> None:
    if b.space != "arena" or p.types[b.id] != TensorType((need,), "u8") or b.value not in names:
        raise p.error(
            index,
            f"scratch buffer {b.id} is {b.value}, {p.types[b.id]} in space {b.space}, but needed is"
            f" {' or '.join(sorted(names))}, u8[{need}] in the arena",
        )


def _touch(a: Buffer, b: Buffer) -> bool:
    return (
        a.space == b.space
        and a.space not in ("flash", "io")
        and a.offset < b.offset + occupied(b.bytes)
        and b.offset < a.offset + occupied(a.bytes)
    )


def _same_range(a: Buffer, b: Buffer) -> bool:
    return (a.space, a.offset, a.bytes) == (b.space, b.offset, b.bytes)
