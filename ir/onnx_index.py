"""Conversion rules of operators with indices, and of those that cut, repeat and rearrange."""

from __future__ import annotations

from math import prod

import numpy as np

from .graph import Array, Attr, Value
from .onnx_convert import RejectedError, Rule, Site
from .onnx_shapes import positive_axis
from .ops.integers import EXACT

# -- indices ---------------------------------------------------------------------------------------


def _gather(s: Site) -> Value:
    """Indices at equal distances are a slice; others, and computed ones, a Gather."""
    x = s.value(0)
    shape = x.type.shape
    axis, data = positive_axis(s.integer("axis", 0), len(shape)), s.data(1)
    if data is None:
        index = _computed_index(s, s.value(1), shape[axis])
        return s.emit("Gather", (x, index), {"axis": axis})
    listed = _from_front(data, shape[axis], f"axis {axis} of {x.type}")
    run = _run(listed.reshape(-1).tolist())
    if run is None:
        return s.emit("Gather", (x, s.indices(listed)), {"axis": axis})
    if run != range(shape[axis]):
        attrs: dict[str, Attr] = {
            "starts": tuple(run.start if i == axis else 0 for i in range(len(shape))),
            "sizes": (*shape[:axis], len(run), *shape[axis + 1 :]),
            "steps": tuple(run.step if i == axis else 1 for i in range(len(shape))),
        }
        # the last node has the name of the file's
        x = s.emit("Slice", (x,), attrs, "" if data.ndim == 1 else "joined")
    return s.reshape(x, (*shape[:axis], *data.shape, *shape[axis + 1 :]))


def _run(indices: list[int]) -> range | None:
    """Ascending indices at equal distances as a range; None for others."""
    if len(indices) == 1:
        return range(indices[0], indices[0] + 1)
    step = indices[1] - indices[0]
    if step < 1 or indices != list(range(indices[0], indices[-1] + 1, step)):
        return None
    return range(indices[0], indices[-1] + 1, step)


def _from_front(data: Array, size: int, where: str) -> Array:
    """Constant indices counted from the front.

    Raises:
        RejectedError: There are none, they are no integers, or one lies outside.
    """
    if data.size == 0 or data.dtype.kind not in "iu":
        raise RejectedError(f"the indices are {data.dtype}{list(data.shape)}; give some integers")
    bad = (data < -size) | (data >= size)
    if bad.any():
        raise RejectedError(f"index {int(data[bad].flat[0])} leaves {where}")
    return np.where(data < 0, data + size, data)


def _constant_indices(s: Site) -> Array:
    data = s.data(1)
    if data is None:
        name = s.node.inputs[1] if s.present(1) else "1"
        raise RejectedError(f"indices {name} are computed; only constant ones are supported here")
    return data


def _along_axis(s: Site, x: Value) -> Array:
    """Positions in flattened ``x`` that the indices of GatherElements or ScatterElements name."""
    data, shape = _constant_indices(s), x.type.shape
    axis = positive_axis(s.integer("axis", 0), len(shape))
    fits = data.ndim == len(shape) and all(
        n <= d for i, (n, d) in enumerate(zip(data.shape, shape, strict=True)) if i != axis
    )
    if not fits:
        raise RejectedError(f"indices of shape {list(data.shape)} do not fit {x.type}")
    at: list[Array] = list(np.indices(data.shape))
    at[axis] = _from_front(data, shape[axis], f"axis {axis} of {x.type}")
    return np.asarray(np.ravel_multi_index(at, shape))


def _of_tuples(s: Site, x: Value, batch_axes: int) -> tuple[Array, int]:
    """Indices of GatherND or ScatterND as entries of ``x`` with its leading axes merged.

    Returns:
        The entries, and how many axes are merged.
    """
    data, shape = _constant_indices(s), x.type.shape
    length = data.shape[-1] if data.ndim else 0
    axes = batch_axes + length
    if length < 1 or axes > len(shape) or data.shape[:batch_axes] != shape[:batch_axes]:
        raise RejectedError(f"indices of shape {list(data.shape)} do not fit {x.type}")
    at: list[Array] = [*np.indices(data.shape[:-1])][:batch_axes]
    for i in range(length):
        axis = batch_axes + i
        at.append(_from_front(data[..., i], shape[axis], f"axis {axis} of {x.type}"))
    return np.asarray(np.ravel_multi_index(at, shape[:axes])), axes


def _gather_elements(s: Site) -> Value:
    """GatherElements: of constant positions a Gather, of computed ones lanes."""
    x = s.value(0)
    if s.data(1) is None:
        return _take_lanes(s, x)
    at = _along_axis(s, x)
    flat = s.reshape(x, (x.type.size,), "flat")
    return s.emit("Gather", (flat, s.indices(at)), {"axis": 0})


def _take_lanes(s: Site, x: Value) -> Value:
    index, shape = s.value(1), x.type.shape
    axis = positive_axis(s.integer("axis", 0), len(shape))
    lanes = (*index.type.shape[:axis], shape[axis], *index.type.shape[axis + 1 :])
    if len(lanes) != len(shape) or any(n > d for n, d in zip(lanes, shape, strict=True)):
        raise RejectedError(f"indices {index.type} do not fit {x.type}")
    index = _computed_index(s, index, shape[axis])
    if lanes != shape:
        steps = (1,) * len(shape)
        attrs: dict[str, Attr] = {"starts": (0,) * len(shape), "sizes": lanes, "steps": steps}
        x = s.emit("Slice", (x,), attrs, "lanes")
    return s.emit("TakeLanes", (x, index), {"axis": axis})


def _computed_index(s: Site, index: Value, size: int) -> Value:
    """Computed indices of an axis of ``size`` entries as i32.

    Raises:
        RejectedError: They are real numbers.
    """
    if s.node.inputs[1] in s.conversion.spans and index.type.dtype == "f32":
        index = s.emit("ToIndex", (index,), {"size": size}, "index")
    if index.type.dtype != "i32":
        raise RejectedError(
            f"indices {index.name} are {index.type}; give integers: constants, or an input of"
            " the model as it is"
        )
    return index


def _gather_nd(s: Site) -> Value:
    x = s.value(0)
    if s.data(1) is None and s.node.inputs[1:2] and s.node.inputs[1] in s.conversion.spans:
        return _gather_computed(s, x)
    at, axes = _of_tuples(s, x, s.integer("batch_dims", 0))
    table = s.reshape(x, (prod(x.type.shape[:axes]), *x.type.shape[axes:]), "table")
    return s.emit("Gather", (table, s.indices(at)), {"axis": 0})


def _gather_computed(s: Site, x: Value) -> Value:
    """GatherND of one entry of the merged leading axes for each computed tuple of positions."""
    at, shape = s.integers_as_real(1), x.type.shape
    axes = at.type.shape[-1] if at.type.shape else 0
    if s.integer("batch_dims", 0) or not 0 < axes <= len(shape) or prod(shape[:axes]) > EXACT:
        raise RejectedError(f"computed indices {at.type} of {x.type} are not supported")
    if s.conversion.spans[s.node.inputs[1]][0] < 0:
        raise RejectedError("computed indices may be negative")
    if axes > 1:
        strides = np.array([prod(shape[i + 1 : axes]) for i in range(axes)])
        steps = s.emit("ToReal", (s.indices(strides),), {"limit": EXACT}, "strides")
        at = s.emit("Mul", (at, steps), None, "steps")
    at = s.emit("ReduceSum", (at,), {"axes": (len(at.type.shape) - 1,), "keepdims": 0}, "entry")
    table = s.reshape(x, (prod(shape[:axes]), *shape[axes:]), "table")
    index = s.emit("ToIndex", (at,), {"size": table.type.shape[0]}, "index")
    return s.emit("Gather", (table, index), {"axis": 0})


def _scatter_elements(s: Site) -> Value:
    x = s.value(0)
    at = _along_axis(s, x).reshape(-1)
    return _scatter(s, x, at, (x.type.size,))


def _scatter_nd(s: Site) -> Value:
    x = s.value(0)
    at, axes = _of_tuples(s, x, 0)
    return _scatter(s, x, at.reshape(-1), (prod(x.type.shape[:axes]), *x.type.shape[axes:]))


def _scatter(s: Site, x: Value, at: Array, rows: tuple[int, ...]) -> Value:
    """Rows ``at`` of ``x``, seen in the shape ``rows``, are replaced or added to."""
    reduction = s.text("reduction", "none")
    if reduction not in ("none", "add"):
        raise RejectedError(f"reduction {reduction} is not supported; none and add are")
    if reduction == "none" and len(np.unique(at)) < len(at):
        raise RejectedError("indices occur twice: which update remains is not defined")
    new = s.value(2)
    if new.type.size != len(at) * prod(rows[1:]):
        raise RejectedError(f"updates {new.type} do not fit the indices")
    new = s.reshape(new, (len(at), *rows[1:]), "updates")
    attrs: dict[str, Attr] = {"add": int(reduction == "add")}
    table = s.reshape(x, rows, "table")
    suffix = "" if rows == x.type.shape else "rows"
    return s.reshape(s.emit("Scatter", (table, s.indices(at), new), attrs, suffix), x.type.shape)


def _reverse_sequence(s: Site) -> Value:
    """ReverseSequence of constant lengths: a Gather along time, of elements if lengths differ."""
    x, lengths = s.value(0), s.ints(1, "sequence_lens")
    shape = x.type.shape
    time = positive_axis(s.integer("time_axis", 0), len(shape))
    batch = positive_axis(s.integer("batch_axis", 1), len(shape))
    if time == batch or lengths is None or len(lengths) != shape[batch]:
        raise RejectedError(f"axes {batch} and {time} and lengths {lengths} do not fit {x.type}")
    if not all(1 <= n <= shape[time] for n in lengths):
        raise RejectedError(f"lengths {list(lengths)} are not those of axis {time} of {x.type}")
    if len(set(lengths)) == 1:
        order = [*range(lengths[0])[::-1], *range(lengths[0], shape[time])]
        return s.emit("Gather", (x, s.indices(np.array(order))), {"axis": time})
    at = np.moveaxis(np.arange(x.type.size).reshape(shape), (batch, time), (0, 1)).copy()
    for row, n in zip(at, lengths, strict=True):
        row[:n] = row[:n][::-1].copy()
    flat = s.reshape(x, (x.type.size,), "flat")
    index = s.indices(np.moveaxis(at, (0, 1), (batch, time)))
    return s.emit("Gather", (flat, index), {"axis": 0})


# -- parts and repetitions -------------------------------------------------------------------------


def _split(s: Site) -> tuple[Value | None, ...]:
    """Split: a slice per result that has elements."""
    x, count = s.value(0), len(s.node.outputs)
    shape = x.type.shape
    axis = positive_axis(s.integer("axis", 0), len(shape))
    sizes = s.ints_or_attr(1, "split")
    if sizes is None:
        parts = s.integer("num_outputs", count)
        if parts != count:
            raise RejectedError(f"num_outputs is {parts}, but it has {count} results")
        each = -(-shape[axis] // parts)
        if shape[axis] % parts and not s.has("num_outputs"):
            raise RejectedError(f"axis {axis} of {x.type} can't be split into {parts} equal parts")
        sizes = (each,) * (parts - 1) + (shape[axis] - each * (parts - 1),)
    if len(sizes) != count or min(sizes) < 0 or sum(sizes) != shape[axis]:
        raise RejectedError(f"parts {list(sizes)} are not axis {axis} of {x.type} in {count}")
    results: list[Value | None] = []
    at = 0
    for i, size in enumerate(sizes):
        if size in (0, shape[axis]):
            results.append(x if size else None)
            continue
        attrs: dict[str, Attr] = {
            "starts": tuple(at if a == axis else 0 for a in range(len(shape))),
            "sizes": (*shape[:axis], size, *shape[axis + 1 :]),
            "steps": (1,) * len(shape),
        }
        results.append(s.emit("Slice", (x,), attrs, f"part{i}"))
        at += size
    return tuple(results)


def _tile(s: Site) -> Value:
    """Tile: a new axis before each axis that is repeated, expanded."""
    x, repeats = s.value(0), s.ints(1, "repeats")
    if repeats is None:
        raise RejectedError("repeats are missing")
    if len(repeats) != len(x.type.shape) or min(repeats, default=1) < 1:
        raise RejectedError(f"repeats {list(repeats)} do not fit {x.type}")
    if set(repeats) <= {1}:
        return x
    once: list[int] = []  # an axis of length 1 before each that is repeated, the others merged
    whole: list[int] = []
    for r, d in zip(repeats, x.type.shape, strict=True):
        if r > 1 or not once:
            once += [1, d]
            whole += [r, d]
        else:
            once[-1] *= d
            whole[-1] *= d
    result = tuple(r * d for r, d in zip(repeats, x.type.shape, strict=True))
    x = s.reshape(x, tuple(once), "tile")
    return s.reshape(s.emit("Expand", (x,), {"shape": tuple(whole)}, "tiles"), result)


def _blocks(s: Site) -> tuple[Value, int]:
    """Operand and block size of DepthToSpace or SpaceToDepth."""
    x, block = s.value(0), s.integer("blocksize")
    if len(x.type.shape) != 4 or block < 1:
        raise RejectedError(f"{x.type} in blocks of {block}: give [N, C, H, W] and a positive size")
    return x, block


def _depth_to_space(s: Site) -> Value:
    x, b = _blocks(s)
    n, c, h, w = x.type.shape
    if c % (b * b):
        raise RejectedError(f"{c} channels are not blocks of {b} x {b}")
    depth = c // (b * b)
    perm = _order_of_blocks(s, (0, 3, 4, 1, 5, 2), (0, 1, 4, 2, 5, 3))
    apart = (n, b, b, depth, h, w) if perm[1] == 3 else (n, depth, b, b, h, w)
    return _rearranged(s, x, apart, perm, (n, depth, h * b, w * b))


def _space_to_depth(s: Site) -> Value:
    x, b = _blocks(s)
    n, c, h, w = x.type.shape
    if h % b or w % b:
        raise RejectedError(f"{x.type} does not consist of blocks of {b}")
    perm = _order_of_blocks(s, (0, 3, 5, 1, 2, 4), (0, 1, 3, 5, 2, 4))
    apart = (n, c, h // b, b, w // b, b)
    return _rearranged(s, x, apart, perm, (n, c * b * b, h // b, w // b))


def _order_of_blocks(s: Site, dcr: tuple[int, ...], crd: tuple[int, ...]) -> tuple[int, ...]:
    """What the mode asks for: channels of a pixel depth last (DCR) or first (CRD)."""
    mode = s.text("mode", "DCR")
    if mode not in ("DCR", "CRD"):
        raise RejectedError(f"mode {mode} is neither DCR nor CRD")
    return dcr if mode == "DCR" else crd


def _rearranged(
    s: Site, x: Value, apart: tuple[int, ...], perm: tuple[int, ...], shape: tuple[int, ...]
) -> Value:
    x = s.reshape(x, apart, "blocks")
    return s.reshape(s.emit("Transpose", (x,), {"perm": perm}, "moved"), shape)


def _trilu(s: Site) -> Value:
    attrs: dict[str, Attr] = {"k": s.whole(1, "k", 0), "upper": int(s.integer("upper", 1))}
    return s.emit("Trilu", (s.value(0),), attrs)


def _cumsum(s: Site) -> Value:
    x = s.value(0)
    axis = positive_axis(s.whole(1, "axis", 0), len(x.type.shape))
    attrs: dict[str, Attr] = {k: int(s.integer(k) != 0) for k in ("exclusive", "reverse")}
    return s.emit("CumSum", (x,), attrs | {"axis": axis})


def constant_only(s: Site) -> Value:
    """Refuse what constant folding has left.

    Raises:
        RejectedError: Always.
    """
    if all(s.data(i) is not None for i, name in enumerate(s.node.inputs) if name):
        raise RejectedError("its result is not defined, or has too many elements to be written out")
    raise RejectedError(
        "it depends on the data of a sample; this operator is evaluated only where its operands"
        " are constants or shapes"
    )


#: Operators that give shapes, indices or what follows from them: folded where they are constant.
CONSTANT_ONLY = (
    *("ConstantOfShape", "EyeLike", "NonZero", "Range", "Shape", "Size"),
)
#: ONNX operator of the standard domain -> its rule.
INDEX_RULES: dict[str, Rule] = {
    "CumSum": _cumsum,
    "DepthToSpace": _depth_to_space,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "ReverseSequence": _reverse_sequence,
    "Scatter": _scatter_elements,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Tile": _tile,
    "Trilu": _trilu,
    **dict.fromkeys(CONSTANT_ONLY, constant_only),
}
