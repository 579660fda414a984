"""What ``--freeze-before NODE`` freezes: everything that the node depends on."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from .errors import UsageError
from .graph import Graph, Node


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
        UsageError: A name is not known; the nearest ones are told.
    """
    frozen: dict[str, str] = {}
    for name in names:
        last = called(forward.nodes, name)
        if not last:
            near = get_close_matches(name, [n.name for n in forward.nodes], n=3)
            hint = f"nearest: {', '.join(near)}" if near else "`odt-plan check` shows every node"
            raise UsageError(f"--freeze-before: {forward.name} has no node {name}; {hint}")
        for node in before(forward.nodes, last):
            for v in node.operands():
                if v.name in forward.constants:
                    frozen.setdefault(v.name, name)
    return frozen
