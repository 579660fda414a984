"""Decisions that are demanded of a plan by name, turned into given decisions of a problem."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..ir.adapters import adapters_by_param
from ..ir.graph import Graph
from ..ir.precision import Precision
from ..ir.training import Candidate
from .problem import Forced, Problem

#: What is demanded of a parameter (update, freeze), a forward tensor (keep: neither rebuilt nor
#: paged), a block (whole: not run by rows) or a layer (its precision).
DemandKind = Literal["update", "freeze", "keep", "whole", "i8", "mixed", "f32"]


@dataclass(frozen=True)
class Demand:
    """One decision.

    Attributes:
        kind: What is demanded.
        name: Of a parameter, tensor, block or layer.
    """

    kind: DemandKind
    name: str


def impose(problem: Problem, demands: Iterable[Demand]) -> Problem:
    """The problem in which these decisions are given.

    What it has no choice about is left alone: a later stage has it from an earlier one.
    """
    for d in demands:
        if d.kind == "keep":
            problem = _without_page_ins(problem, d.name)
        problem = replace(problem, forced=(*problem.forced, *_forced(problem, d)))
    return problem


def _forced(problem: Problem, d: Demand) -> Iterator[Forced]:
    if d.kind in ("update", "freeze"):
        mine = (a for a in problem.activities if d.name in {u.candidate.param for u in a.updates})
        acts = tuple(a.index for a in mine) or problem.choices.get(d.name, ())
        if acts:
            yield Forced(acts, d.kind == "update")
    elif d.kind == "whole":
        yield Forced(tuple(b.activity for b in problem.streams if b.name == d.name), False)
    elif d.kind in ("mixed", "i8"):
        for layer in problem.mixed_layers:
            if layer.name == d.name:
                yield Forced((layer.activity,), d.kind == "mixed")
    elif d.kind == "keep":
        own = [
            a
            for a in problem.activities
            if a.tensor is not None and d.name in {v.name for v in a.tensor.values}
        ]
        yield Forced(tuple(a.index for a in own if a.kind == "rebuild"), False)
        for a in own:
            if a.kind == "auxiliary":
                yield Forced((a.index,), True)


def _without_page_ins(problem: Problem, name: str) -> Problem:
    retentions = tuple(
        replace(r, events=tuple(replace(e, may_load=False) for e in r.events))
        if name in {v.name for v in r.tensor.values}
        else r
        for r in problem.retentions
    )
    return replace(problem, retentions=retentions)


def demanded_precision(demands: Iterable[Demand]) -> dict[str, Precision]:
    """Layers that are demanded to be f32, which is no choice of the problem but a pin."""
    return {d.name: "f32" for d in demands if d.kind == "f32"}


def demanded_updates(
    forward: Graph, chosen: Sequence[Candidate], demands: Iterable[Demand]
) -> list[Candidate]:
    """A fixed update set with what is demanded; all of an adapter are updated, or none."""
    adapters = adapters_by_param(forward)
    own = {p: a.params for p, a in adapters.items()}
    wanted = [(d.kind, p) for d in demands for p in own.get(d.name, (d.name,))]
    frozen = {p for kind, p in wanted if kind == "freeze"}
    result = [c for c in chosen if c.param not in frozen]
    have = {c.param for c in result}
    more = [p for kind, p in wanted if kind == "update" and p not in have]
    return [*result, *map(Candidate, dict.fromkeys(more))]
