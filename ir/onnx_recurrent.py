"""Conversion rules of LSTM, GRU and RNN: per direction a Gemm over all steps and a looped node."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .graph import Array, Attr, Value
from .onnx_convert import RejectedError, Rule, Site
from .provenance import Affine, Moved, Step

#: Operator -> gates, and the activations that can be had.
_KINDS: dict[str, tuple[int, tuple[tuple[str, ...], ...]]] = {
    "LSTM": (4, (("sigmoid", "tanh", "tanh"),)),
    "GRU": (3, (("sigmoid", "tanh"),)),
    "RNN": (1, (("tanh",), ("relu",))),
}
_DIRECTIONS = {
    "forward": ("forward",),
    "reverse": ("reverse",),
    "bidirectional": ("forward", "reverse"),
}


@dataclass(frozen=True, eq=False)
class _Layer:
    """One node of the file.

    Attributes:
        site: The node.
        x: Input ``[steps, batch, features]``.
        directions: ``forward``, ``reverse`` or both.
        gates: Gates per cell.
        size: Cells.
        batch_first: ``layout`` is 1.
    """

    site: Site
    x: Value
    directions: tuple[str, ...]
    gates: int
    size: int
    batch_first: bool

    @property
    def steps(self) -> int:
        """Length of the sequence."""
        return self.x.type.shape[0]

    @property
    def batch(self) -> int:
        """Sequences."""
        return self.x.type.shape[1]

    def name(self, direction: str, suffix: str) -> str:
        """The suffix of a value of one direction."""
        parts = (direction if len(self.directions) > 1 else "", suffix)
        return "/".join(filter(None, parts))


def _layer(s: Site) -> _Layer:
    direction, layout = s.text("direction", "forward"), s.integer("layout")
    if direction not in _DIRECTIONS:
        raise RejectedError(f"direction {direction} is not known")
    if s.has("clip"):
        raise RejectedError("clip (of the sums in front of activations) is not supported")
    if s.integer("input_forget"):
        raise RejectedError("input_forget (coupled gates) is not supported")
    if s.node.op == "LSTM" and s.present(7) and _constant(s, 7, "P").any():
        raise RejectedError("peepholes (operand P) are not supported; export an LSTM without them")
    x, directions = s.value(0), _DIRECTIONS[direction]
    if len(x.type.shape) != 3:
        raise RejectedError(f"the input {x.type} does not have 3 axes")
    if layout:
        x = s.emit("Transpose", (x,), {"perm": (1, 0, 2)}, "steps_first")
    lengths = s.ints(4, "sequence_lens")
    if lengths is not None and set(lengths) != {x.type.shape[0]}:
        raise RejectedError(
            f"sequence_lens {list(lengths)} differ from the length {x.type.shape[0]};"
            " only sequences of the whole length are supported"
        )
    gates = _KINDS[s.node.op][0]
    w, r = _constant(s, 1, "W"), _constant(s, 2, "R")
    size = s.integer("hidden_size", r.shape[-1] if r.ndim else 0)
    wanted = (len(directions), gates * size)
    if w.shape != (*wanted, x.type.shape[2]) or r.shape != (*wanted, size):
        raise RejectedError(
            f"weights W {list(w.shape)} and R {list(r.shape)} do not fit the input {x.type},"
            f" {len(directions)} direction(s) and {size} cells"
        )
    if s.present(3) and _constant(s, 3, "B").shape != (len(directions), 2 * gates * size):
        raise RejectedError(f"the bias B {list(_constant(s, 3, 'B').shape)} does not fit")
    return _Layer(s, x, directions, gates, size, bool(layout))


def _constant(s: Site, index: int, what: str) -> Array:
    """Data of a required operand that must be constant."""
    data = s.data(index)
    if data is None:
        name = s.node.inputs[index] if s.present(index) else "which is missing"
        raise RejectedError(f"{what}, {name}, is not constant; only constant weights are supported")
    return data


def _parameter(
    layer: _Layer, index: int, direction: str, *steps: Step, suffix: str = ""
) -> Value:
    """A parameter of one direction; it keeps the file's name where it is all of the operand."""
    s = layer.site
    if len(layer.directions) == 1 and not suffix:
        return s.derived(index, direction, *steps)
    name = "/".join(filter(None, (s.node.inputs[index], direction, suffix)))
    data, origin = s.made(index, steps)
    return s.conversion.constant(name, np.ascontiguousarray(data, np.float32), origin)


def _biases(layer: _Layer, direction: str, d: int) -> tuple[Value | None, Value | None]:
    """The bias of all sums, and the recurrent one of a GRU's last gate where it stands apart."""
    s, size = layer.site, layer.size
    if not s.present(3):
        return None, None
    half = layer.gates * size
    recurrent, last, apart = _constant(s, 3, "B")[d, half:], half + 2 * size, None
    if s.node.op == "GRU" and s.integer("linear_before_reset"):
        apart = _parameter(layer, 3, direction, Moved(lambda b: b[d, last:]), suffix="recurrent")
        recurrent = np.where(np.arange(half) < 2 * size, recurrent, np.float32(0))
    own = Moved(lambda b: b[d, :half])
    return _parameter(layer, 3, direction, own, Affine(offset=recurrent)), apart


def _initial(layer: _Layer, index: int, what: str, d: int) -> Value | None:
    """An initial state of a direction, ``[1, batch, size]``; None for zeros."""
    s = layer.site
    if not s.present(index):
        return None
    data, name = s.data(index), s.node.inputs[index]
    if data is None:
        raise RejectedError(
            f"{what}, {name}, is computed; only constant initial states, and inputs that nothing"
            " else reads, are supported"
        )
    shape = (len(layer.directions), layer.batch, layer.size)
    by_direction = data.swapaxes(0, 1) if layer.batch_first and data.ndim == 3 else data
    if by_direction.shape != shape:
        raise RejectedError(f"{what}, {name}, of {list(data.shape)} does not fit {list(shape)}")
    if not by_direction[d].any():
        return None
    first = np.ascontiguousarray(by_direction[d : d + 1])
    return s.conversion.constant(f"{name}/{s.node.name}/{layer.directions[d]}", first)


def _activations(s: Site, d: int, directions: int) -> tuple[str, ...]:
    """Names of the activations of a direction, in lower case."""
    known = _KINDS[s.node.op][1]
    given = s.node.attrs.get("activations", ())
    if not isinstance(given, tuple) or len(given) not in (0, directions * len(known[0])):
        raise RejectedError(f"activations {given!r} do not fit")
    count = len(known[0])
    names = tuple(str(a).lower() for a in given[d * count : (d + 1) * count]) or known[0]
    if names not in known:
        can = " or ".join(", ".join(n.capitalize() for n in k) for k in known)
        raise RejectedError(f"activations {', '.join(map(str, given))}; {can} are supported")
    return names


def _direction(layer: _Layer, rows: Value, d: int) -> Value:
    """The results of all steps of a direction."""
    s, direction = layer.site, layer.directions[d]
    steps, batch, size = layer.steps, layer.batch, layer.size
    activations = _activations(s, d, len(layer.directions))
    bias, apart = _biases(layer, direction, d)
    weights = [_parameter(layer, i, direction, Moved(lambda w: w[d])) for i in (1, 2)]
    product = s.emit(
        "Gemm", (rows, weights[0], bias), {"trans_b": 1}, layer.name(direction, "product")
    )
    stacked = layer.name(direction, "stacked")
    x = s.reshape(product, (steps, batch, layer.gates * size), stacked)
    attrs: dict[str, Attr] = {"reverse": int(direction == "reverse")}
    states = [_initial(layer, 5, "initial_h", d)]
    operands: list[Value | None] = [x, weights[1]]
    if s.node.op == "LSTM":
        states.append(_initial(layer, 6, "initial_c", d))
        attrs["cells"] = int(s.wanted(2))
    elif s.node.op == "GRU":
        operands.append(apart)
        attrs["linear_before_reset"] = int(s.integer("linear_before_reset") != 0)
    else:
        attrs["activation"] = activations[0].capitalize()
    while states and states[-1] is None:
        states.pop()
    name = "/".join(filter(None, (s.node.name, layer.name(direction, ""))))
    first = next(filter(None, s.node.outputs))
    node = s.conversion.graph.add_node(
        s.node.op,
        [*operands, *states],
        attrs,
        name=name,
        outputs=[f"{first}/{layer.name(direction, 'steps')}"],
    )
    return node.out


def _cut(layer: _Layer, y: Value, plane: int, step: int | None, name: str) -> Value:
    """All steps, or one, of the states (plane 0) or cells (1) of a direction."""
    s, shape = layer.site, y.type.shape
    one = (*(1,) * (len(shape) - 3), shape[-3] if step is None else 1, *shape[-2:])
    if one == shape:
        return y
    starts = (*(plane,) * (len(shape) - 3), step or 0, 0, 0)
    attrs: dict[str, Attr] = {"starts": starts, "sizes": one, "steps": (1,) * len(shape)}
    return s.reshape(s.emit("Slice", (y,), attrs, name), one[-3:], f"{name}_flat")


def _joined(layer: _Layer, parts: list[Value], axis: int, name: str) -> Value:
    """Directions along an axis of their own."""
    if len(parts) == 1:
        return parts[0]
    return layer.site.emit("Concat", parts, {"axis": axis}, f"{name}/directions")


def _recurrent(s: Site) -> tuple[Value | None, ...]:
    """``Y``, ``Y_h`` and, of an LSTM, ``Y_c``, as far as they have names."""
    layer = _layer(s)
    steps, batch, size = layer.steps, layer.batch, layer.size
    rows = s.reshape(layer.x, (steps * batch, layer.x.type.shape[2]), "rows")
    found = [(d, _direction(layer, rows, i)) for i, d in enumerate(layer.directions)]
    results: list[Value | None] = [None] * (3 if s.node.op == "LSTM" else 2)
    if s.wanted(0):
        parts = []
        for direction, y in found:
            states = _cut(layer, y, 0, None, layer.name(direction, "states"))
            apart = layer.name(direction, "direction")
            parts.append(s.reshape(states, (steps, 1, batch, size), apart))
        y = _joined(layer, parts, 1, "Y")
        if layer.batch_first:
            y = s.emit("Transpose", (y,), {"perm": (2, 0, 1, 3)}, "batch_first")
        results[0] = y
    for index, name in ((1, "Y_h"), (2, "Y_c")):
        if not s.wanted(index):
            continue
        parts = [
            _cut(layer, y, index - 1, steps - 1 if d == "forward" else 0, layer.name(d, name))
            for d, y in found
        ]
        last = _joined(layer, parts, 0, name)
        if layer.batch_first:
            last = s.emit("Transpose", (last,), {"perm": (1, 0, 2)}, f"{name}/batch_first")
        results[index] = last
    return tuple(results)


#: ONNX operator -> its rule.
RECURRENT_RULES: dict[str, Rule] = dict.fromkeys(_KINDS, _recurrent)
