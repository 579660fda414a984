"""Dimensions that a file leaves open, bound before shape inference: the batch, and those by name.

Files leave a dimension open by a name (``dim_param``), by no value, or by one that is not positive.
"""

from __future__ import annotations

from pathlib import Path
from shlex import quote

from onnx import ModelProto

from .errors import UsageError
from .import_options import ImportOptions


def bind_dims(proto: ModelProto, path: Path, options: ImportOptions) -> None:
    """Give the open dimensions of the inputs their values.

    The first axis of an input is the batch, and so is every dimension of the same name, where
    ``options.dims`` says nothing about them.

    Args:
        proto: The model; changed in place.
        path: What messages call it.
        options: Values of the batch and of others.

    Raises:
        UsageError: There is no such dimension (those that are open are told), or two values are
            given for one.
    """
    weights = {t.name for t in proto.graph.initializer}
    inputs = [v for v in proto.graph.input if v.name not in weights]
    places = {
        f"{v.name}:{axis}": d for v in inputs for axis, d in enumerate(v.type.tensor_type.shape.dim)
    }
    names = {place: d.dim_param for place, d in places.items()}  # gone when there is a value
    for d in places.values():
        if d.dim_value < 0:
            d.Clear()
    batches = {names.get(f"{v.name}:0", "") for v in inputs} - {""}
    firsts = {p for p, name in names.items() if p.endswith(":0") or name in batches}
    for key, value in options.dims:
        told = f"{path}: --dim {quote(f'{key}={value}')}"
        meant = [p for p, name in names.items() if name == key] or [p for p in places if p == key]
        if not meant:
            still = {name or p for p, name in names.items() if not places[p].dim_value or name}
            known = f"open are {', '.join(sorted(still))}" if still else "none is open"
            raise UsageError(f"{told}: no input has a dimension {key}; {known}")
        for p in meant:
            if places[p].dim_value not in (0, value):
                raise UsageError(f"{told}: {p} is {places[p].dim_value} already; leave this out")
            if p in firsts and options.batch not in (1, value):
                batch = f"the batch, and --batch is {options.batch}"
                raise UsageError(f"{told}: {p} is {batch}; give one")
            places[p].dim_value = value
    for p in firsts:
        if not places[p].dim_value:
            places[p].dim_value = options.batch
