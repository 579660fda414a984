"""Einsum as products of two operands at a time: MatMul, Mul, ReduceSum, Transpose, Reshape."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod

import numpy as np

from .graph import Value
from .onnx_convert import RejectedError, Rule, Site
from .provenance import Moved

#: Stand-ins of the axes of an ellipsis; no letter that an equation may use.
_DOTS = "0123456789"


class _Term:
    """An operand and the letter of each of its axes."""

    def __init__(self, value: Value, axes: str) -> None:
        self.value, self.axes = value, axes

    def sizes(self) -> dict[str, int]:
        return dict(zip(self.axes, self.value.type.shape, strict=True))


def _einsum(s: Site) -> Value:
    terms, result = _parse(s)
    total = terms[0]
    for i, term in enumerate(terms[1:], 1):
        later = result + "".join(t.axes for t in terms[i + 1 :])
        total = _product(s, total, term, later, f"{i}")
    total = _summed(s, total, result, "sum")
    return _ordered(s, total, result, "order").value


def _parse(s: Site) -> tuple[list[_Term], str]:
    """Operands with their axes, and the axes of the result."""
    text = s.text("equation", "").replace(" ", "")
    left, arrow, right = text.partition("->")
    names, values = left.split(","), [s.value(i) for i in range(len(s.node.inputs))]
    if len(names) != len(values):
        raise RejectedError(f"equation {text} has {len(names)} terms for {len(values)} operands")
    terms, dots = [], 0
    for name, v in zip(names, values, strict=True):
        rest = len(v.type.shape) - len(name.replace("...", ""))
        if rest < 0 or rest > len(_DOTS) or ("..." not in name and rest):
            raise RejectedError(f"equation {text}: term {name} does not fit {v.type}")
        if "..." in name:
            dots = max(dots, rest)
        axes = name.replace("...", _DOTS[len(_DOTS) - rest :] if rest else "")
        if not axes.replace("_", "").isalnum() and axes:
            raise RejectedError(f"equation {text} is not understood")
        if len(set(axes)) < len(axes):
            raise RejectedError(f"equation {text}: term {name} takes a diagonal; not supported")
        terms.append(_Term(v, axes))
    broadcast = _DOTS[len(_DOTS) - dots :] if dots else ""
    every = "".join(t.axes for t in terms)
    if not arrow:  # NumPy's rule: what occurs once, in alphabetic order
        right = "..." + "".join(sorted(c for c in set(every) - set(_DOTS) if every.count(c) == 1))
    result = right.replace("...", broadcast)
    if len(set(result)) < len(result) or set(result) - set(every):
        raise RejectedError(f"equation {text}: the result {right} is not made of the terms' axes")
    _check_sizes(terms, text)
    return terms, result


def _check_sizes(terms: Sequence[_Term], text: str) -> None:
    sizes: dict[str, int] = {}
    for t in terms:
        for letter, n in t.sizes().items():
            if sizes.setdefault(letter, n) != n:
                what = "the axes of an ellipsis" if letter in _DOTS else f"axis {letter}"
                raise RejectedError(f"equation {text}: {what} is {sizes[letter]} and {n} long")


def _product(s: Site, a: _Term, b: _Term, later: str, tag: str) -> _Term:
    """The product of two terms, summed over what no later one needs."""
    a = _summed(s, a, b.axes + later, f"{tag}a")
    b = _summed(s, b, a.axes + later, f"{tag}b")
    shared = [c for c in a.axes if c in b.axes]
    contracted = "".join(c for c in shared if c not in later)
    batch = "".join(c for c in shared if c in later)
    rows = "".join(c for c in a.axes if c not in shared)
    columns = "".join(c for c in b.axes if c not in shared)
    sizes = a.sizes() | b.sizes()

    def shape(*groups: str) -> tuple[int, ...]:
        return tuple(prod(sizes[c] for c in g) for g in groups)

    lead = (batch,) if batch else ()
    left = _ordered(s, a, batch + rows + contracted, f"{tag}a_order").value
    left = s.reshape(left, shape(*lead, rows, contracted), f"{tag}a_matrix")
    if not contracted:
        right = _ordered(s, b, batch + columns, f"{tag}b_order").value
        right = s.reshape(right, (*shape(*lead), 1, *shape(columns)), f"{tag}b_row")
        y = s.emit("Mul", (left, right), None, f"{tag}product")
    else:
        data = s.data(int(tag)) if b.value.name == s.node.inputs[int(tag)] else None
        if data is not None and b.axes != batch + contracted + columns:
            order = [b.axes.index(c) for c in batch + contracted + columns]
            right = s.derived(int(tag), "order", Moved(partial(np.transpose, axes=order)))
        else:
            right = _ordered(s, b, batch + contracted + columns, f"{tag}b_order").value
        right = s.reshape(right, shape(*lead, contracted, columns), f"{tag}b_matrix")
        y = s.emit("MatMul", (left, right), None, f"{tag}product")
    axes = batch + rows + columns
    return _Term(s.reshape(y, tuple(sizes[c] for c in axes), f"{tag}axes"), axes)


def _summed(s: Site, t: _Term, needed: str, suffix: str) -> _Term:
    """The term without the axes that are not needed."""
    drop = tuple(i for i, c in enumerate(t.axes) if c not in needed)
    if not drop:
        return t
    y = s.emit("ReduceSum", (t.value,), {"axes": drop, "keepdims": 0}, f"{suffix}_summed")
    return _Term(y, "".join(c for c in t.axes if c in needed))


def _ordered(s: Site, t: _Term, axes: str, suffix: str) -> _Term:
    """The term with its axes in this order."""
    if t.axes == axes:
        return t
    perm = tuple(t.axes.index(c) for c in axes)
    return _Term(s.emit("Transpose", (t.value,), {"perm": perm}, suffix), axes)


#: ONNX operator of the standard domain -> its rule.
EINSUM_RULES: dict[str, Rule] = {"Einsum": _einsum}
