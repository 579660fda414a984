"""Heuristic plans: what others would do, as comparison and as warm starts.

Each baseline is an update set plus a rule for the forward tensors that backward reads:

- keep-all: update everything, keep everything (plain back-propagation).
- last-layer, bias-only: the usual small update sets, keep everything.
- sqrt(n): update everything, keep every sqrt(n)-th tensor, rebuild segments (Chen et al. 2016).
- greedy: update everything, drop tensors at the peak by bytes x idle steps per cycle of rebuilding
  or paging until the plan fits (the rule of dynamic tensor rematerialization, Kirisame et al. 2021,
  offline).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isqrt

import numpy as np

from .footprint import Holds, Meter
from .problem import ALWAYS, Problem, Slot
from .schedule import Schedule, realize
from .solution import Solution
from .tensors import Tensor

#: Tensor and slot of a page-in; None: the tensor is rebuilt.
_Load = tuple[int, int] | None


@dataclass(frozen=True)
class Baseline:
    """Outcome of a baseline; figures are predicted like those of a plan.

    Attributes:
        name: See the module docstring.
        ram_bytes: Arena + state.
        latency_s: Seconds of a training step.
        importance: Summed importance of its update set.
        fits: It keeps the RAM budget.
    """

    name: str
    ram_bytes: int
    latency_s: float
    importance: int
    fits: bool


def keep_all(problem: Problem) -> Solution:
    """Keep every forward tensor that backward reads."""
    return retain(problem, set(problem.storage.tensors))


def square_root(problem: Problem) -> Solution:
    """Keep every sqrt(n)-th tensor, rebuild the others."""
    kept = [r.tensor for r in problem.retentions if r.tensor.rebuildable]
    stride = max(2, isqrt(len(kept)))
    return retain(problem, set(kept[::stride]) | _not_rebuildable(problem))


def greedy(problem: Problem) -> Solution:
    """Drop tensors that idle at the peak, cheapest per freed byte and idle step first.

    A dropped tensor is rebuilt, or paged where that is possible and cheaper.
    """
    meter = Meter(problem)
    keep = set(problem.storage.tensors)
    best = retain(problem, keep)
    state = meter.state_bytes(meter.vector(best.active))
    live = meter.live(meter.vector(best.active), best)
    rebuild = [
        sum(problem.cost.node_cycles(w) for w in r.tensor.writers) for r in problem.retentions
    ]
    tried: set[tuple[Tensor, _Load]] = set()
    while live.max() + state > problem.limits.ram_bytes:
        holds = meter.holds(meter.vector(best.active), best)
        offers = _offers(problem, best, holds, int(live.argmax()), rebuild, tried)
        if not offers:
            break
        _, _, victim, load = max(offers, key=lambda o: o[:2])
        tried.add((victim, load))
        loads = best.loads if load is None else best.loads | {load}
        kept = keep if load is not None else keep - {victim}
        try:
            trial = Solution(retain(problem, kept).active, loads)
            after = meter.live(meter.vector(trial.active), trial)
        except KeyError:  # what it is made from is gone
            continue
        if after.max() <= live.max():
            keep, best, live = kept, trial, after
    return best


def _offers(
    problem: Problem,
    solution: Solution,
    holds: Holds,
    peak: int,
    rebuild: Sequence[int],
    tried: set[tuple[Tensor, _Load]],
) -> list[tuple[float, int, Tensor, _Load]]:
    """What may be dropped across a slot: merit, order, tensor, and its page-in if it is paged."""
    result: list[tuple[float, int, Tensor, _Load]] = []
    storage = problem.limits.storage_bytes - problem.always_paged.stored_bytes
    storage -= sum(
        problem.cost.stored_bytes(problem.storage.tensors[t].bytes) for t, _ in solution.loads
    )
    paged = {t for t, _ in solution.loads}
    across = holds.held & (holds.begin <= peak) & (peak < holds.end)
    for j in np.flatnonzero(across).tolist():
        i, end = int(holds.of[j]), int(holds.end[j])
        t = problem.retentions[i].tensor
        freed = t.bytes * (end - int(holds.begin[j]))
        if t.rebuildable and (t, None) not in tried:
            result.append((freed / (1 + rebuild[i]), -t.index, t, None))
        load = t.index, end
        pages = problem.cost.storage is not None
        pages = pages and problem.cost.stored_bytes(t.bytes) <= storage
        pages = pages and _lasts(problem, paged | {t.index})
        if pages and (t, load) not in tried:
            cycles = problem.cost.write_cycles(t.bytes) + problem.cost.read_cycles(t.bytes)
            result.append((freed / (1 + cycles), -t.index, t, load))
    return result


def _lasts(problem: Problem, paged: set[int]) -> bool:
    """Paging these tensors wears no more than it may."""
    most, cost = problem.limits.worn_bytes, problem.cost
    if most is None:
        return True
    worn = sum(cost.worn_bytes(problem.storage.tensors[t].bytes) for t in paged)
    return problem.micro_batches * worn + problem.always_paged.worn_bytes <= most


def retain(problem: Problem, keep: set[Tensor]) -> Solution:
    """The solution that keeps these tensors and rebuilds all others where they are first read.

    A tensor of ``keep`` stays from forward on; a rebuilt one stays from its rebuild on. Inputs of a
    rebuild that are gone are rebuilt too.
    """
    active: set[int] = {ALWAYS}
    have = {t for t in keep if t.rebuildable} | _not_rebuildable(problem)
    for a in problem.activities:
        if a.kind in ("update", "needed") or (a.kind == "auxiliary" and a.tensor in have):
            active.add(a.index)
    pending: dict[Tensor, Slot] = {}
    for slot in problem.slots:
        if slot.rebuild:
            for t in slot.writes:
                pending[t] = slot
            continue
        if slot.node.phase in ("forward", "loss"):
            continue
        for t in slot.reads:
            _supply(t, have, pending, active)
    return Solution(frozenset(active))


def _supply(t: Tensor, have: set[Tensor], pending: dict[Tensor, Slot], active: set[int]) -> None:
    if t in have or not t.rebuildable:
        return
    if t not in pending:
        return  # made by an earlier step of backward
    have.add(t)
    slot = pending[t]
    active.add(slot.activity)
    for other in list(pending.values()):
        if other.activity == slot.activity:
            for source in other.reads:
                if source is not t:
                    _supply(source, have, pending, active)


def _not_rebuildable(problem: Problem) -> set[Tensor]:
    return {t for t in problem.storage.tensors if not t.rebuildable}


def _ram(schedule: Schedule) -> int:
    return schedule.arena_bytes + schedule.state_bytes


RULES: dict[str, Callable[[Problem], Solution]] = {
    "keep-all": keep_all,
    "sqrt(n)": square_root,
    "greedy": greedy,
}


def evaluate(name: str, problem: Problem, solution: Solution) -> Baseline:
    """Schedule a baseline and measure it with the planner's own accounting."""
    schedule = realize(problem, solution, hide_within=problem.limits)
    ram = _ram(schedule)
    return Baseline(
        name,
        ram,
        problem.cost.latency_s(schedule.cycles),
        solution.gain(problem),
        schedule.over_bytes(problem.limits) <= 0,
    )
