"""Which precisions a model's layers can have: what the user pins, and what is left to the solver.

A layer of an annotated model is i8, mixed (f32 weights on i8 activations) or f32 as a whole
(``ir.precision``). Where nothing is pinned it is i8 if it has an integer twin; the solver may make
a layer with weights mixed, where the noise that this avoids, or the better update, is worth its
memory and time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import get_args

from ..ir.errors import UsageError
from ..ir.graph import Graph, Node, Value
from ..ir.lowered_layers import follower_of
from ..ir.precision import MOVES, Precision, mixable, quantizable

#: Noise-to-signal ratio of 1 (all that a layer computes is noise) costs as much as all updates
#: together can gain: a documented prior, as importance is.
NOISE_WEIGHT = 1.0


def pinned(forward: Graph, patterns: Sequence[str]) -> dict[str, Precision]:
    """The layers and run-time inputs whose precision the user gives.

    Args:
        forward: Annotated float graph.
        patterns: ``PATTERN=PRECISION`` items, also comma-separated; a pattern is the name of a
            layer or input with ``*`` and ``?``; the last one that matches counts.

    Raises:
        UsageError: An item that is no pair, an unknown precision, a pattern that matches nothing
            (the nearest names are told), a precision that the layer can't have, or one that needs
            scales for a model without.
    """
    reasons: dict[Precision, dict[str, str | None]] = {
        "i8": {**quantizable(forward), **dict.fromkeys(_inputs(forward))},
        "mixed": mixable(forward),
    }
    layers = [*quantizable(forward), *(v.name for v in forward.inputs)]
    result: dict[str, Precision] = {}
    for item in (i.strip() for p in patterns for i in p.split(",") if i.strip()):
        pattern, _, text = item.rpartition("=")
        wanted = next((p for p in get_args(Precision) if p == text), None)
        if not pattern or wanted is None:
            known = ", ".join(get_args(Precision))
            raise UsageError(f"--precision: {item!r} is not LAYER=PRECISION, one of {known}")
        if wanted != "f32" and not forward.quantization:
            raise UsageError(
                f"--precision {item}: {forward.name} holds floats without scales; give samples with"
                " --calib"
            )
        found = [n for n in layers if fnmatchcase(n, pattern)]
        if not found:
            _check_unmatched(forward, pattern, wanted, layers)
        for name in found:
            can = reasons.get(wanted, {})
            reason = can.get(name, "it has no weights" if wanted == "mixed" else "it is an input")
            if wanted != "f32" and reason is not None:
                if name == pattern:
                    raise UsageError(
                        f"--precision: {name} can't be {wanted}: {reason}; leave it f32"
                    )
                continue  # a wildcard means those that can
            result[name] = wanted
    return result


def _check_unmatched(
    forward: Graph, pattern: str, wanted: Precision, layers: Sequence[str]
) -> None:
    """Tell why a pattern matches no layer, unless it is a node that is f32 in any case.

    Raises:
        UsageError: The node is part of a layer or has no such kernel, or nothing is called so.
    """
    readers = forward.consumers()
    for node in forward.nodes:
        follower = follower_of(forward, node, readers)
        if follower is not None and follower.name == pattern:
            raise UsageError(f"--precision: {pattern} is part of the layer {node.name}; pin that")
    named = next((n for n in forward.nodes if n.name == pattern), None)
    if named is not None:
        if wanted == "f32":
            return
        raise UsageError(f"--precision: {pattern}: {named.op} has no {wanted} kernel; leave it f32")
    near = get_close_matches(pattern, layers, n=3) or layers[:3]
    raise UsageError(
        f"--precision: {pattern} matches no layer of {forward.name}; nearest:"
        f" {', '.join(near) or 'none'}"
    )


def unchosen(forward: Graph, pins: Mapping[str, Precision]) -> dict[str, Precision]:
    """Precision of every layer and of the input before the solver decides.

    As pinned, else i8 where it can be. The run-time input is i8 unless it is pinned, if every
    layer that reads it is: the application then hands over quantized samples, a quarter of the
    bytes.
    """
    result: dict[str, Precision] = {
        name: pins.get(name, "f32" if reason else "i8")
        for name, reason in quantizable(forward).items()
    }
    readers = forward.consumers()
    for name in _inputs(forward):
        free: Precision = "i8" if _read_as_i8(forward.values[name], readers, result) else "f32"
        result[name] = pins.get(name, free)
    return result


def choosable(forward: Graph, pins: Mapping[str, Precision]) -> list[str]:
    """Layers that may be i8 or mixed, as the solver likes."""
    mixed = mixable(forward)
    return [
        name
        for name, reason in quantizable(forward).items()
        if reason is None and name not in pins and name in mixed and mixed[name] is None
    ]


def _read_as_i8(
    v: Value, readers: Mapping[Value, list[Node]], precision: Mapping[str, Precision]
) -> bool:
    """Every reader takes stored values, through moves of data as well."""
    return bool(readers[v]) and all(
        _read_as_i8(n.out, readers, precision)
        if n.op in MOVES
        else precision.get(n.name, "f32") != "f32"
        for n in readers[v]
    )


def _inputs(forward: Graph) -> list[str]:
    """Float run-time inputs with a known range."""
    return [v.name for v in forward.inputs if v.name in forward.quantization]
