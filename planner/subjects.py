"""Which decisions of a plan a name stands for: a layer, a parameter, a tensor or a block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Literal

from ..ir.errors import UsageError
from ..ir.graph import Graph
from ..ir.precision import quantizable
from ..ir.streaming import Block
from .plan import Plan
from .tensors import Storage

SubjectKind = Literal["update", "precision", "tensor", "block"]


@dataclass(frozen=True)
class Subject:
    """Something that a plan decides about."""

    kind: SubjectKind
    name: str


def subjects_of(
    plan: Plan, forward: Graph, storage: Storage, blocks: tuple[Block, ...]
) -> dict[str, list[Subject]]:
    """Name -> what is decided about it; empty where nothing is.

    A node stands for its parameters, its precision, what happens to its result and to what only its
    backward reads, and the block that it is streamed in.

    Args:
        plan: A plan.
        forward: Its imported graph.
        storage: Of the plan's training graph.
        blocks: Blocks of the lowered graph.
    """
    saved = {a.value for a in plan.decisions.activations}
    layers = quantizable(forward) if forward.quantization else {}
    result: dict[str, list[Subject]] = {n.name: [] for n in forward.nodes}
    for u in plan.decisions.updates:
        result[u.node].append(Subject("update", u.param))
    for name in layers:
        result[name].append(Subject("precision", name))
    for t in storage.tensors:
        known = [Subject("tensor", v.name) for v in t.values if v.name in saved]
        for v in t.values:
            result.setdefault(v.name, []).extend(known)
        for w in dict.fromkeys(w.name for w in t.writers):
            for node in {w, w.rpartition("/")[0]} & result.keys():
                result[node] += (s for s in known if s not in result[node])
    for b in blocks:
        if b.name in plan.decisions.streamed:
            for name in b.nodes:
                result[name].append(Subject("block", b.name))
            result[b.name] = [Subject("block", b.name)]
    for u in plan.decisions.updates:
        result.setdefault(u.param, []).append(Subject("update", u.param))
    return result


def matching(known: Mapping[str, list[Subject]], pattern: str, model: str) -> list[Subject]:
    """What is decided about everything that is called so.

    Args:
        known: See ``subjects_of``.
        pattern: A name; if nothing has it, ``*`` and ``?`` match.
        model: Name of the model, for the message.

    Raises:
        UsageError: Nothing is called so (the nearest names are told), or nothing is decided about
            it.
    """
    found = [pattern] if pattern in known else [n for n in known if fnmatchcase(n, pattern)]
    if not found:
        near = get_close_matches(pattern, known, n=3) or list(known)[:3]
        raise UsageError(
            f"{model} has no layer, parameter or tensor {pattern}; nearest: {', '.join(near)}"
        )
    subjects = list(dict.fromkeys(s for n in found for s in known[n]))
    if not subjects:
        raise UsageError(
            f"nothing is decided about {found[0]}: it has no parameters, and backward does not read"
            " its result"
        )
    return subjects
