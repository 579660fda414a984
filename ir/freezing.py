"""What ``--freeze-before NODE`` freezes, and what must be frozen because no gradient reaches it.

An operator without a gradient rule (Round, ArgMax, Equal, ...) *stops* gradients: parameters before
it can't be trained, and the way out is to freeze everything before it. It runs forward all the
same, so one that is not supported at all has no such way out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from shlex import quote

from .candidates import param_slots
from .errors import UsageError
from .graph import Graph, Node, Value
from .obstacles import Obstacle
from .opdef import get_op

#: Results of these types are positions and conditions, which have no gradient.
_UNREAL = ("i32", "bits")
#: So many layers are named that a stop freezes.
_NAMED = 3


def called(nodes: Sequence[Node], name: str) -> set[Node]:
    """The node of this name, and those whose names go on behind it with a slash.

    The latter are what an operator of the file is written as, or the nodes of a PyTorch module.
    """
    return {n for n in nodes if n.name == name or n.name.startswith(f"{name}/")}


def before(nodes: Sequence[Node], last: set[Node]) -> set[Node]:
    """All nodes that these depend on, without them.

    Args:
        nodes: Of a graph, in order.
        last: Some of them.
    """
    wanted = {v for n in last for v in n.operands()}
    found: set[Node] = set()
    for node in reversed(nodes):
        if node not in last and wanted.intersection(node.outputs):
            found.add(node)
            wanted.update(node.operands())
    return found


def frozen_before(forward: Graph, names: Sequence[str]) -> dict[str, str]:
    """Constants that nodes before the named ones read, each with the name that froze it.

    Args:
        forward: Imported graph.
        names: Values of ``--freeze-before``.

    Raises:
        UsageError: A name is not known; the nearest ones are told. Or it is one of the file's loss,
            before which everything lies.
    """
    frozen: dict[str, str] = {}
    for name in names:
        last = called(forward.nodes, name)
        if not last and forward.loss is not None and called(forward.loss.nodes, name):
            (prediction,) = forward.outputs
            maker = "" if prediction.producer is None else f", {prediction.producer.name}"
            raise UsageError(
                f"--freeze-before: {name} is part of the loss {forward.loss.outputs[0].name}, so"
                f" nothing would be left to train; name a node up to the prediction"
                f" {prediction.name}{maker}"
            )
        if not last:
            near = get_close_matches(name, [n.name for n in forward.nodes], n=3)
            hint = f"nearest: {', '.join(near)}" if near else "`odt-plan check` shows every node"
            raise UsageError(f"--freeze-before: {forward.name} has no node {name}; {hint}")
        for node in before(forward.nodes, last):
            for v in node.operands():
                if v.name in forward.constants:
                    frozen.setdefault(v.name, name)
    return frozen


def stops(graph: Graph, rejected: Mapping[Value, str] | None = None) -> dict[Value, str]:
    """Values that can't be trained through, each with the first node behind that stops gradients.

    A real number is stopped on every way where a node without a gradient rule makes a real number
    of it, though other ways may be free: its gradient is not defined. What only positions and
    conditions are made of has none.

    Args:
        graph: A forward graph.
        rejected: Values that nodes read which could not be converted, with their names.
    """
    stopped = dict(rejected or {})
    unreached: dict[Value, str] = {}
    free = set(graph.outputs)
    for node in reversed(graph.nodes):
        by = next((stopped[v] for v in node.outputs if v in stopped), None)
        reached = not free.isdisjoint(node.outputs)
        if (by is not None or reached) and get_op(node.op).vjp is None:
            by = node.name  # the first of several is told
        if by is not None:
            for v in node.operands():
                stopped.setdefault(v, by)
        elif reached:
            for v in node.operands():
                if v.type.dtype not in _UNREAL:
                    free.add(v)
                elif v.producer is not None:
                    unreached.setdefault(v, v.producer.name)
        elif ways := [unreached[v] for v in node.outputs if v in unreached]:
            makes_it = node.out.type.dtype in _UNREAL  # the first of those that do is told
            for v in node.operands():
                unreached.setdefault(v, node.name if makes_it else ways[0])
    return {**{v: by for v, by in unreached.items() if v not in free}, **stopped}


def untrainable(graph: Graph, frozen: Iterable[str] = ()) -> dict[str, str]:
    """Parameters that no gradient reaches, each with the node that stops it.

    Args:
        graph: A forward graph.
        frozen: Constants that are left out, because they are frozen anyway.
    """
    found, out = stops(graph), set(frozen)
    return {
        name: found[node.out]
        for name, uses in param_slots(graph).items()
        for node, slot in uses
        if name not in out and slot.role != "statistic" and node.out in found
    }


def stop_reasons(graph: Graph, stuck: Mapping[str, str]) -> tuple[Obstacle, ...]:
    """Each node that stops gradients, and the layers that it keeps from being trained.

    Args:
        graph: A forward graph.
        stuck: Its ``untrainable`` parameters.
    """
    slots = param_slots(graph)
    behind: dict[str, list[str]] = {}
    for param, by in stuck.items():
        layers = behind.setdefault(by, [])
        layers += [n.name for n, _ in slots[param] if n.name not in layers]
    return tuple(
        Obstacle(n.name, n.op, f"has no gradient, so {_listed(behind[n.name])} can't be trained")
        for n in graph.nodes
        if n.name in behind
    )


def way_out(graph: Graph, stuck: Mapping[str, str], given: Sequence[str] = ()) -> str:
    """What to freeze so that everything else can be trained, and how much that is, in one line.

    Args:
        graph: A forward graph.
        stuck: Its ``untrainable`` parameters.
        given: Values of ``--freeze-before`` so far.
    """
    names = tuple(dict.fromkeys((*given, *stuck.values())))
    nodes = graph.nodes
    ahead = {n: before(nodes, called(nodes, n)) for n in names}
    last = [n for n in names if not any(called(nodes, n) <= ahead[m] for m in names if m != n)]
    frozen, slots = frozen_before(graph, last), param_slots(graph)
    free = [name for name in slots if name not in frozen]
    if not free:
        return f"nothing behind {' and '.join(last)} can be trained; export the model without"
    size = {name: graph.values[name].type.size for name in slots}
    share = sum(size[n] for n in free) / sum(size.values())
    layers = {node for uses in slots.values() for node, _ in uses}
    trained = {node for name in free for node, _ in slots[name]}
    options = " ".join(f"--freeze-before {quote(n)}" for n in last)
    return (
        f"freeze everything before {' and '.join(last)} ({options}): {100 * share:.3g} % of the"
        f" weights ({len(trained)} of {len(layers)} layers) stay trainable"
    )


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
