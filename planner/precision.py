"""Which layers compute in i8: what the user pins, and i8 for every frozen layer that can.

A layer is i8 or f32 as a whole (``ir.precision``). Updated layers are f32; a frozen layer of an
annotated model is i8 where it has an integer twin, because that costs less of everything and, for
a model that was quantized before, no accuracy.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from ..ir.autodiff import param_slots
from ..ir.errors import UsageError
from ..ir.graph import Graph
from ..ir.precision import Precision, quantizable


def pinned(forward: Graph, patterns: Sequence[str]) -> dict[str, Precision]:
    """The layers whose precision the user gives.

    Args:
        forward: Annotated float graph.
        patterns: ``PATTERN=i8`` or ``PATTERN=f32`` items, also comma-separated; a pattern is a
            layer name with ``*`` and ``?``; the last one that matches a layer counts.

    Raises:
        UsageError: An item that is no pair, an unknown precision, a pattern that matches no layer
            (the nearest names are told), i8 for a layer that can't be,
            or i8 for a model without scales.
    """
    layers = quantizable(forward)
    result: dict[str, Precision] = {}
    for item in (i.strip() for p in patterns for i in p.split(",") if i.strip()):
        pattern, _, wanted = item.rpartition("=")
        if not pattern or wanted not in ("i8", "f32"):
            raise UsageError(f"--precision: {item!r} is not LAYER=i8 or LAYER=f32")
        if wanted == "i8" and not forward.quantization:
            raise UsageError(
                f"--precision {item}: {forward.name} holds floats without scales; give samples with"
                " --calib"
            )
        found = [n for n in layers if fnmatchcase(n, pattern)]
        if not found:
            near = get_close_matches(pattern, layers, n=3) or list(layers)[:3]
            raise UsageError(
                f"--precision: {pattern} matches no layer of {forward.name}; nearest:"
                f" {', '.join(near) or 'none'}"
            )
        for name in found:
            if wanted == "i8" and layers[name] is not None:
                if name == pattern:
                    raise UsageError(f"--precision: {name} can't be i8: {layers[name]}")
                continue  # a wildcard means those that can
            result[name] = "i8" if wanted == "i8" else "f32"
    return result


def layer_of(forward: Graph) -> dict[str, str]:
    """Trainable parameter -> the layer that it belongs to."""
    return {name: uses[0][0].name for name, uses in param_slots(forward).items()}


def mixed(
    forward: Graph, pins: dict[str, Precision], updated: Collection[str]
) -> dict[str, Precision]:
    """Precision of every layer: as pinned, f32 where updated, else i8 where it can be.

    Args:
        forward: Annotated float graph.
        pins: From ``pinned``.
        updated: Names of the parameters that training updates.

    Raises:
        UsageError: A layer is pinned to i8 and updated.
    """
    owner = layer_of(forward)
    trained = {owner[p] for p in updated}
    result: dict[str, Precision] = {}
    for name, reason in quantizable(forward).items():
        if name in trained and pins.get(name) == "i8":
            raise UsageError(
                f"{name} is pinned to i8, and i8 weights can't be updated yet; leave it out of"
                " --train, or pin it to f32"
            )
        frozen: Precision = "i8" if reason is None else "f32"
        result[name] = "f32" if name in trained else pins.get(name, frozen)
    return result
