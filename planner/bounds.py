"""Bounds on what any plan can reach, without a solver: what runs in any case, at its cheapest."""

from __future__ import annotations

import numpy as np

from .footprint import Meter
from .objective import Goal, Weighted
from .plan import ObjectiveName
from .problem import ALWAYS, Problem, Slot


def most_gain(problem: Problem) -> float:
    """Importance without any limit: the best candidate of every parameter, every layer mixed."""
    more: dict[int, int] = {}
    for u in problem.mixed_updates:
        more[u.activity] = more.get(u.activity, 0) + u.gain
    layers = sum(max(0, m.gain) for m in problem.mixed_layers)
    if any(ALWAYS in acts for acts in problem.choices.values()):
        return problem.gain[ALWAYS] + more.get(ALWAYS, 0) + layers
    gain = {a: g + max(0, more.get(a, 0)) for a, g in problem.gain.items()}
    return sum(max(gain[a] for a in acts) for acts in problem.choices.values()) + layers


def bound(problem: Problem, goal: Goal) -> float:
    """Bound on an objective, from above for learn, from below for all others."""
    if isinstance(goal, Weighted):
        return goal.value({name: _single(problem, name) for name in goal.weights})
    return _single(problem, goal)


def _single(problem: Problem, name: ObjectiveName) -> float:
    if name == "learn":
        return most_gain(problem)
    if name == "ram":
        return _least_ram(problem)
    if name == "flash":
        least = sum(c.bytes for c in problem.constants if ALWAYS in c.readers and c.absent is None)
        return least + sum(min(0, m.flash_bytes) for m in problem.mixed_layers)
    cycles, paging = _least_cycles(problem), problem.always_paged.cycles
    if not problem.cost.overlaps or problem.limits.wait_for_transfers:
        cycles += paging  # else computing may hide it
    return cycles if name == "latency" else problem.cost.energy_j(cycles, paging)


def _least_cycles(problem: Problem) -> int:
    """Slots that always run, each in its cheapest form, blocks streamed where that is cheaper.

    An auxiliary tensor that is read in any case is made once at least.
    """
    least = {s.index: cheapest(s) for s in problem.slots}
    total = sum(least[s.index] for s in problem.slots if s.activity == ALWAYS)
    for b in problem.streams:
        total += min(0, b.cycles - sum(least[k] for k in b.slots))
    auxiliary = {a.index for a in problem.activities if a.kind == "auxiliary"}
    makes = {t: least[s.index] for s in problem.slots if s.activity in auxiliary for t in s.writes}
    read = {t for s in problem.slots if s.activity == ALWAYS for t in s.reads}
    return total + sum(cycles for t, cycles in makes.items() if t in read)


def cheapest(slot: Slot) -> int:
    """Cycles of a slot in the form that takes the fewest."""
    own = slot.cycles + sum(min(0, x.cycles) for x in slot.split)
    if slot.mixed is None:
        return own
    return min(own, slot.mixed.cycles + sum(min(0, x.mixed_cycles) for x in slot.split))


def _least_ram(problem: Problem) -> int:
    """Peak of what is live in any case, and state."""
    live = Meter(problem).live_always()
    state = problem.state_bytes.get(ALWAYS, 0)
    state += sum(min(0, u.state_bytes) for u in problem.mixed_updates)
    return int(np.max(live)) + state
