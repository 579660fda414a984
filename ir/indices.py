"""Run-time inputs that are indices (token ids, categories): their tables, their check."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .errors import UsageError
from .graph import Array, Graph, Value
from .opdef import get_op, operand

#: Operators that hand the indices of operand 0 on.
MOVES = ("Expand", "Reshape", "Slice", "Transpose")
#: Entries of the table of an element that nothing reads as an index: any number is one.
ANY = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Tables:
    """The tables that the elements of an input point into.

    Attributes:
        entries: i32 of the input's shape: entries of the smallest table of each element, which may
            be from ``-entries`` to ``entries - 1``; ``ANY`` where there is none.
        readers: The Gathers that read them, by entries of their tables; and what computes with
            them, by what it was found to be exact for.
    """

    entries: Array
    readers: dict[int, str]


def tables_of(graph: Graph, x: Value) -> Tables | None:
    """What the elements of an input are indices of.

    Args:
        graph: A forward or training graph.
        x: One of its inputs.

    Returns:
        None where the input is no i32.
    """
    if x.type.dtype != "i32":
        return None
    tables = Tables(np.full(x.type.shape, ANY, np.int32), {})
    moved: dict[Value, Array] = {x: np.arange(x.type.size).reshape(x.type.shape)}
    for node in graph.nodes:
        first, second = (*node.inputs, None, None)[:2]
        if node.op in MOVES and first in moved:
            moved[node.out] = get_op(node.op).kernel(node, [moved[first]])[0]
        if node.op == "ToReal" and first in moved:
            size = node.int_attr("limit")
            tables.readers.setdefault(size, node.name)
            np.minimum.at(tables.entries.reshape(-1), moved[first].reshape(-1), size)
        if node.op == "Gather" and second in moved:
            size = operand(node, 0).shape[node.int_attr("axis", 0)]
            tables.readers.setdefault(size, node.name)
            np.minimum.at(tables.entries.reshape(-1), moved[second].reshape(-1), size)
    return tables


def check_indices(graph: Graph, x: Value, data: Array, what: str) -> None:
    """Demand indices that lie inside their tables.

    Args:
        graph: A forward or training graph.
        x: Its input.
        data: Samples of it, the first axis counts them.
        what: Subject of the message.

    Raises:
        UsageError: One lies outside; names its sample.
    """
    tables = tables_of(graph, x)
    if tables is None:
        return
    entries = tables.entries
    if data.shape != entries.shape:
        entries = np.broadcast_to(entries.min(axis=0), data.shape)
    outside = np.argwhere((data < -entries) | (data >= entries))
    if len(outside):
        first = tuple(outside[0])
        size = int(entries[first])
        raise UsageError(
            f"{what}: sample {first[0] if first else 0} has the index {int(data[first])}, but"
            f" {tables.readers[size]} reads a table of {size} entries, 0 to {size - 1} (or"
            f" -{size} to -1, from its end)"
        )


def random_indices(graph: Graph, x: Value, count: int, rng: np.random.Generator) -> Array:
    """Samples i32 [count, ...] of an input of indices, each of any entry of its table."""
    tables = tables_of(graph, x)
    assert tables is not None, x.name
    entries = np.broadcast_to(tables.entries.min(axis=0), (count, *x.type.shape[1:]))
    return rng.integers(0, entries, dtype=np.int32)
