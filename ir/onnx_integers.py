"""Integers that a file computes from token ids or positions when a sample runs.

Language models compare ids with that of the padding, and look the last token up by its position.
Such integers are f32 numbers here (``ir.ops.integers``), so that comparisons, sums and choices are
those of real numbers. What they can be is followed from the tables that the ids point into: beyond
2^24 an f32 is no exact integer, and the node is rejected. No gradient passes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .onnx_convert import INTEGER_TYPES, Conversion, RejectedError, Span
from .onnx_file import INTEGER_MOVES, INTEGER_OPS, FileNode, ModelFile
from .ops.integers import EXACT

_COMPARING = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
#: Their i32 results are integers, whatever they are positions of.
POSITIONS = ("ArgMax", "ArgMin", "TopK")


def limit_of(file: ModelFile, name: str) -> int | None:
    """Entries of the largest table that an input, or what is computed from it, points into."""
    found, sizes = {name}, []
    for node in file.nodes:
        if node.op == "Gather" and len(node.inputs) > 1 and node.inputs[1] in found:
            table = file.types.get(node.inputs[0])
            data = file.constants.get(node.inputs[0])
            shape = data.shape if data is not None else table.shape if table else ()
            axis = node.attrs.get("axis", 0)
            if isinstance(axis, int) and -len(shape) <= axis < len(shape):
                sizes.append(shape[axis])
        if node.op in (*INTEGER_MOVES, *INTEGER_OPS) and found.intersection(node.inputs):
            found.update(node.outputs)
    return max(sizes, default=None)


def span_of_result(conversion: Conversion, node: FileNode) -> Span | None:
    """What the integers that a node computes can be; None if it doesn't compute any.

    Raises:
        RejectedError: It computes with integers in a way that is not supported, or they may be too
            large.
    """
    running = [i for i in node.inputs if i in conversion.spans]
    known = [s for i in node.inputs if i and (s := _span(conversion, i)) is not None]
    if node.op in POSITIONS:
        x = conversion.values.get(node.inputs[0]) if node.inputs else None
        return None if x is None else (0, max(x.type.shape, default=1) - 1)
    if node.op == "Cast":
        to_integers = node.attrs.get("to") in INTEGER_TYPES
        return (known[0] if running else (0, 1)) if to_integers else None
    if node.op == "OneHot":
        return _span(conversion, node.inputs[2]) if len(node.inputs) > 2 else None
    if node.op == "Where" and not running:
        return _union(known) if len(known) == 2 else None
    if not running or node.op in _COMPARING:
        return None
    if node.op in ("Gather", "GatherND") and node.inputs[0] not in running:  # they are its indices
        return None
    rule = _SPANS.get(node.op)
    if rule is None:
        values = [conversion.values.get(name) for name in running]
        if all(v is None or v.type.dtype == "i32" for v in values):
            return None  # its own rule judges
        raise RejectedError(
            f"computes with the integers {running[0]}, which depend on the data of a sample"
        )
    if len(known) < (2 if rule in _OF_TWO else 1):
        raise RejectedError(f"joins the integers {running[0]} with operands that are none")
    low, high = rule(known)
    if max(-low, high) > EXACT:
        raise RejectedError(
            f"its integers may be {low} to {high}; only those up to {EXACT} are exact here"
        )
    return low, high


def _span(conversion: Conversion, name: str) -> Span | None:
    if name in conversion.spans:
        return conversion.spans[name]
    data = conversion.file.constants.get(name)
    if data is None or data.dtype.kind not in "iu" or not data.size:
        return None
    return int(data.min()), int(data.max())


def _union(spans: Sequence[Span]) -> Span:
    return min(low for low, _ in spans), max(high for _, high in spans)


def _product(spans: Sequence[Span]) -> Span:
    ends = [a * b for a in spans[0] for b in spans[1]]
    return min(ends), max(ends)


def _sum(spans: Sequence[Span]) -> Span:
    return spans[0][0] + spans[1][0], spans[0][1] + spans[1][1]


def _difference(spans: Sequence[Span]) -> Span:
    return spans[0][0] - spans[1][1], spans[0][1] - spans[1][0]


_OF_TWO = (_sum, _difference, _product)
_SPANS: dict[str, Callable[[Sequence[Span]], Span]] = {
    **dict.fromkeys(INTEGER_MOVES, lambda s: s[0]),
    **dict.fromkeys(("Concat", "Max", "Min", "Where"), _union),
    "Add": _sum,
    "Sub": _difference,
    "Mul": _product,
    "Neg": lambda s: (-s[0][1], -s[0][0]),
    "Abs": lambda s: (0, max(abs(s[0][0]), abs(s[0][1]))),
}
