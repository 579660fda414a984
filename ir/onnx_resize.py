"""Resize and its old name Upsample in IR nodes: where each result lies in the operand.

The formulas are those of onnx's definition of Resize, opsets 10 to 19, in double precision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np

from .graph import MAX_ELEMENTS, Array, Attr, Value
from .onnx_convert import RejectedError, Rule, Site
from .onnx_shapes import positive_axis

#: A size that is refused, for scales of any size.
_TOO_MANY = MAX_ELEMENTS + 1


@dataclass(frozen=True)
class _Axis:
    """One axis of a resized tensor.

    Attributes:
        size: Elements before.
        out: Elements after.
        scale: What the coordinates are divided by; about ``out / size``.
    """

    size: int
    out: int
    scale: float

    @property
    def changes(self) -> bool:
        """Results are not simply the elements."""
        return self.out != self.size or self.scale != 1.0


def _half_pixel(a: _Axis, at: Array) -> Array:
    return (at + 0.5) / a.scale - 0.5


def _align_corners(a: _Axis, at: Array) -> Array:
    if a.scale * a.size != a.out:
        raise RejectedError(
            f"align_corners with a scale of {a.scale:.7g} for {a.size} elements: onnx and its"
            " runtimes disagree about the part of an element; export it with sizes"
        )
    return at * (a.size - 1) / (a.out - 1) if a.out > 1 else 0.0 * at


def _symmetric(a: _Axis, at: Array) -> Array:
    return a.size / 2 * (1 - a.out / (a.scale * a.size)) + _half_pixel(a, at)


#: coordinate_transformation_mode -> where the indices of the result lie.
_COORDINATES: dict[str, Callable[[_Axis, Array], Array]] = {
    "half_pixel": _half_pixel,
    "half_pixel_symmetric": _symmetric,
    "pytorch_half_pixel": lambda a, at: _half_pixel(a, at) if a.out > 1 else 0.0 * at,
    "align_corners": _align_corners,
    "asymmetric": lambda a, at: at / a.scale,
    "tf_half_pixel_for_nn": lambda a, at: (at + 0.5) / a.scale,
}
#: nearest_mode -> the index that a position is nearest to.
_NEAREST: dict[str, Callable[[Array], Array]] = {
    "round_prefer_floor": lambda at: np.ceil(at - 0.5),
    "round_prefer_ceil": lambda at: np.floor(at + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}


def _resize(s: Site) -> Value:
    old = s.opset < 11
    if s.integer("antialias"):
        raise RejectedError("antialias is not supported; export it without")
    coordinates = s.text("coordinate_transformation_mode", "asymmetric" if old else "half_pixel")
    if coordinates not in _COORDINATES:
        raise RejectedError(f"coordinate_transformation_mode {coordinates} is not supported")
    nearest = s.text("nearest_mode", "floor" if old else "round_prefer_floor")
    if nearest not in _NEAREST:
        raise RejectedError(f"nearest_mode {nearest} is not known")
    return _resized(s, _axes(s, 1 if old else 2, 3), coordinates, nearest)


def _upsample(s: Site) -> Value:
    return _resized(s, _axes(s, 1, None), "asymmetric", "floor")


def _axes(s: Site, scales_at: int, sizes_at: int | None) -> list[_Axis]:
    """Every axis of the operand, from constant scales or sizes."""
    shape = s.value(0).type.shape
    rank = len(shape)
    chosen = [positive_axis(a, rank) for a in s.integers("axes", tuple(range(rank)))]
    sizes = None if sizes_at is None else s.ints(sizes_at, "sizes")
    axes = [_Axis(n, n, 1.0) for n in shape]
    if sizes:
        _check_count("sizes", len(sizes), chosen)
        if min(sizes) < 1:
            raise RejectedError(f"sizes {list(sizes)} must be positive")
        ratios = [out / shape[a] for a, out in zip(chosen, sizes, strict=True)]
        policy = s.text("keep_aspect_ratio_policy", "stretch")
        if policy != "stretch":
            if policy not in ("not_larger", "not_smaller"):
                raise RejectedError(f"keep_aspect_ratio_policy {policy} is not known")
            ratio = min(ratios) if policy == "not_larger" else max(ratios)
            ratios = [ratio] * len(chosen)
            sizes = tuple(int(ratio * shape[a] + 0.5) for a in chosen)
        for a, out, ratio in zip(chosen, sizes, ratios, strict=True):
            axes[a] = _Axis(shape[a], out, ratio)
        return axes
    scales = _scales(s, scales_at)
    _check_count("scales", len(scales), chosen)
    if min(scales, default=1.0) <= 0:
        raise RejectedError(f"scales {list(scales)} must be positive")
    for a, scale in zip(chosen, scales, strict=True):
        with np.errstate(over="ignore"):
            out = int(min(np.floor(np.float32(shape[a]) * np.float32(scale)), _TOO_MANY))
        axes[a] = _Axis(shape[a], out, scale)
    return axes


def _scales(s: Site, index: int) -> tuple[float, ...]:
    if s.has("scales"):  # Upsample 7
        return s.reals("scales")
    if not s.present(index):
        raise RejectedError("has neither scales nor sizes")
    data = s.data(index)
    if data is None:
        raise RejectedError(f"scales {s.node.inputs[index]} is not constant; export it fixed")
    return tuple(float(v) for v in data.reshape(-1))


def _check_count(what: str, count: int, axes: list[int]) -> None:
    if count != len(axes):
        raise RejectedError(f"{count} {what} for {len(axes)} axes")


def _resized(s: Site, axes: list[_Axis], coordinates: str, nearest: str) -> Value:
    mode = s.text("mode", "nearest")
    mode = {"bilinear": "linear"}.get(mode, mode)
    if mode not in ("nearest", "linear"):
        raise RejectedError(f"mode {mode} is not supported; nearest and linear are")
    x, rank = s.value(0), len(axes)
    changed = [i for i, a in enumerate(axes) if a.changes]
    if not changed:
        return x
    if len(changed) > 2:
        raise RejectedError(f"{len(changed)} axes change their size; at most 2 are supported")
    if min(a.out for a in axes) < 1:
        raise RejectedError("the result is empty")
    if prod(a.out for a in axes) > MAX_ELEMENTS:
        raise RejectedError(f"the result has more than {MAX_ELEMENTS} elements")
    last = list(range(changed[0], rank)) if changed[0] >= rank - 2 else changed
    perm = (*(i for i in range(rank) if i not in last), *last)
    moved = perm != tuple(range(rank))
    if moved:
        x = s.emit("Transpose", (x,), {"perm": perm}, "resized_last")
    positions = []
    for i in last:
        a = axes[i]
        at = np.arange(a.out, dtype=np.float64)
        at = _COORDINATES[coordinates](a, at) if a.changes else at
        at = _NEAREST[nearest](at) if mode == "nearest" else at
        positions.append(np.clip(at, 0, a.size - 1))
    table = s.conversion.constant(
        f"{s.node.name}/positions", np.concatenate(positions).astype(np.float32)
    )
    attrs: dict[str, Attr] = {"sizes": tuple(axes[i].out for i in last), "mode": mode}
    y = s.emit("Resize", (x, table), attrs, "resized" if moved else "")
    if not moved:
        return y
    back = tuple(perm.index(i) for i in range(rank))
    return s.emit("Transpose", (y,), {"perm": back})


RESIZE_RULES: dict[str, Rule] = {"Resize": _resize, "Upsample": _upsample}
