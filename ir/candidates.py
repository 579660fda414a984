"""Which parameters of a forward graph can be trained, and in which parts."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace

from .adapters import adapters_by_param
from .graph import Graph, Node
from .opdef import ParamSlot, parameter_slots
from .training import Candidate, Saved, StateForm

#: Least updated part of a weight for which the input is offered in a compressed form, too.
_COMPRESSED = 0.5
#: Parts of a weight's input channels that are offered.
RATIOS = (0.125, 0.25, 0.5, 1.0)


def param_slots(graph: Graph) -> dict[str, list[tuple[Node, ParamSlot]]]:
    """Where each constant is used as a trainable parameter: f32, or i8 and i32 of integer layers.

    Returns:
        Constant name -> uses, for every constant all of whose uses are parameter slots.
    """
    uses: dict[str, list[tuple[Node, ParamSlot]]] = {}
    blocked: set[str] = set()
    for node in graph.nodes:
        slots = {s.index: s for s in parameter_slots(node)}
        for i, v in enumerate(node.inputs):
            if v is None or v.name not in graph.constants:
                continue
            if i in slots and v.type.dtype in ("f32", "i8", "i32"):
                uses.setdefault(v.name, []).append((node, slots[i]))
            else:
                blocked.add(v.name)
    return {name: u for name, u in uses.items() if name not in blocked}


def candidates(graph: Graph, *, imported: Graph | None = None) -> list[Candidate]:
    """All ways to update the parameters of a forward graph, in forward order.

    A weight offers ``max(1, floor(ratio x channels))`` leading input channels for each ratio below
    1; equal counts are offered once. Parameters used twice (tied) are only updated whole. Large
    parts of the weight of a float layer are offered with a compressed input as well. Adapters are
    offered whole.

    Args:
        graph: A forward graph.
        imported: What ``graph`` was lowered from. A parameter that layers share there may be stored
            in several forms here, of which none can be updated alone: these are left out.
    """
    result: list[Candidate] = []
    adapters = adapters_by_param(graph)
    shared = None if imported is None else param_slots(imported)
    for name, uses in param_slots(graph).items():
        if shared is not None and len(shared.get(name, ())) != len(uses):
            continue
        if name in adapters:
            result.append(Candidate(name))
            continue
        axis = channel_axis(uses)
        if axis is not None:
            total = graph.values[name].type.shape[axis]
            for k in counts(total):
                kept = saves(graph, uses, whole=False) if k >= _COMPRESSED * total else ("f32",)
                result += [Candidate(name, k, saved) for saved in kept]
        result += [Candidate(name, None, saved) for saved in saves(graph, uses, whole=True)]
    return result


def channel_axis(uses: Sequence[tuple[Node, ParamSlot]]) -> int | None:
    """Axis over the input channels that a parameter can be updated by; None: it is updated whole.

    Args:
        uses: Where it is used.
    """
    node, slot = uses[0]
    return slot.channel_axis(node) if len(uses) == 1 and slot.cold_index is not None else None


def counts(total: int) -> list[int]:
    """Numbers of leading channels, below all of them, that updates are offered in."""
    each = {max(1, int(total * r)) for r in RATIOS if r < 1}
    return sorted(k for k in each if k < total)


def parts(graph: Graph, param: str) -> list[float]:
    """The same as parts of a parameter of a forward graph; none where it is updated whole."""
    axis = channel_axis(param_slots(graph)[param])
    if axis is None or param in adapters_by_param(graph):
        return []
    total = graph.values[param].type.shape[axis]
    return [k / total for k in counts(total)]


def with_states(
    chosen: Sequence[Candidate], forms: Sequence[StateForm], stateless: Container[str] = ()
) -> list[Candidate]:
    """Each candidate once per form of its optimizer state, the forms in the order that is given.

    Parameters that no optimizer updates (``stateless``) have one form.
    """
    return [
        replace(c, state=form)
        for c in chosen
        for form in (("keep",) if c.param in stateless else forms)
    ]


def saves(
    graph: Graph, uses: Sequence[tuple[Node, ParamSlot]], *, whole: bool
) -> tuple[Saved, ...]:
    """How the input of the layer of a parameter can be kept for the parameter's gradient.

    Args:
        graph: A forward graph.
        uses: Where the parameter is used.
        whole: All input channels are updated; others are cut out of an i8 value that is there
            anyway, but none is made for them.
    """
    node, slot = uses[0]
    x = node.inputs[0]
    if not slot.compressible or len(uses) > 1 or x is None or x.type.dtype != "f32":
        return ("f32",)
    stored = x.producer is not None and x.producer.op == "Dequantize"
    annotated = x.name in graph.quantization
    return ("f32", "f16", "i8") if stored or (annotated and whole) else ("f32", "f16")
