"""A plan at once: updates by importance per byte, blocks streamed and tensors dropped as needed.

Every step is tried on the footprint of the decisions (``planner.footprint``), so the outcome keeps
the limits of the model; only the layout can still fail. It is a plan to fall back on, a solution
for the solver to start from, and what an optimum is compared with.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from ..ir.training import Candidate
from .footprint import Meter
from .problem import Problem, Slot
from .solution import Solution

#: Depths of backward that are tried: updates from there to the last layer.
DEPTHS = 5


def keeping(
    problem: Problem,
    updates: Collection[Candidate],
    streamed: Collection[str],
    mixed: Collection[str] = (),
) -> Solution:
    """The decisions that carry these updates out and keep all that backward reads.

    Args:
        problem: With updates to choose, or fixed: then all of them are carried out.
        updates: Candidates.
        streamed: Names of blocks.
        mixed: Names of layers whose precision is a choice.
    """
    wanted = set(updates)
    acts = {
        a.index
        for a in problem.activities
        if any(u.candidate in wanted for u in a.updates)
    }
    acts |= {b.activity for b in problem.streams if b.name in streamed}
    acts |= {m.activity for m in problem.mixed_layers if m.name in mixed}
    active = _Closure(problem).of(Meter(problem).vector(acts))
    return Solution(frozenset(np.flatnonzero(active).tolist()))


def choose_updates(problem: Problem) -> tuple[list[Candidate], list[str]] | None:
    """Updates and streamed blocks that keep the limits; None: no single update was found to.

    Greedy for several depths of backward, of which the best counts: the most important candidates
    per byte first, each in place of a lesser one of its parameter, in runs that double as long as
    they fit.
    """
    return _Chooser(problem).run()


class _Closure:
    """What follows from chosen updates and blocks if everything is kept."""

    def __init__(self, problem: Problem) -> None:
        """Collect what each activity stands for."""
        count = len(problem.activities)
        # row: activities of which one makes this one hold
        implied: NDArray[np.bool_] = np.eye(count, dtype=bool)
        for a in problem.activities:  # readers stand before what they need
            if a.kind == "needed":
                implied[a.index] = implied[list(a.implied_by)].any(axis=0)
        made = {
            a.tensor.index: a.index
            for a in problem.activities
            if a.kind == "auxiliary" and a.tensor is not None
        }
        for s in problem.slots:
            for t in s.reads:
                if t.index in made and t not in s.writes and not s.rebuild:
                    implied[made[t.index]] |= implied[s.activity]
        self._implies: NDArray[np.bool_] = np.ascontiguousarray(implied.T)

    def of(self, active: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """All that holds where these hold."""
        result: NDArray[np.bool_] = np.any(self._implies[active], axis=0)
        return result


class _Chooser:
    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.meter = Meter(problem)
        self.closure = _Closure(problem)
        self.at: dict[int, int] = {}
        saved: dict[int, int] = {}
        for s in problem.slots:
            if s.update is not None and not s.last_micro:
                self.at[s.activity] = s.index
                saved[s.activity] = saved.get(s.activity, 0) + _saved_bytes(s)
        self.param = {a: name for name, acts in problem.choices.items() for a in acts}
        self.order = sorted(
            self.at, key=lambda a: (-problem.gain[a] / (1 + problem.state_bytes[a] + saved[a]), a)
        )

    def run(self) -> tuple[list[Candidate], list[str]] | None:
        if self._fit({}) is None:
            return None
        best: dict[str, int] = {}
        ends = sorted(set(self.at.values()))
        count = min(DEPTHS, len(ends))
        for i in range(count):
            last = ends[len(ends) * (i + 1) // count - 1]
            chosen = self._fill([a for a in self.order if self.at[a] <= last], {})
            if self._gain(chosen) > self._gain(best):
                best = chosen
        if not best:
            return None
        best = self._fill(sorted(self.order, key=lambda a: (-self.problem.gain[a], a)), best)
        active = self._fit(best)
        assert active is not None
        streamed = [b.name for b in self.problem.streams if active[b.activity]]
        chosen_acts = set(best.values())
        return [
            u.candidate
            for a in self.problem.activities
            if a.index in chosen_acts
            for u in a.updates
        ], streamed

    def _gain(self, chosen: dict[str, int]) -> int:
        return sum(self.problem.gain[a] for a in chosen.values())

    def _fill(self, order: Sequence[int], chosen: dict[str, int]) -> dict[str, int]:
        """Add candidates in order, in runs that double while they fit and halve while not."""
        i, run, slack = 0, 1, self._slack(chosen)
        while i < len(order):
            trial = self._with(chosen, order[i : i + run])
            if run == 1 and self._more_state(chosen, trial) > slack:
                i += 1
            elif trial == chosen or self._fit(trial) is not None:
                chosen, slack = trial, self._slack(trial)
                i, run = i + run, 2 * run
            elif run == 1:
                i += 1
            else:
                run //= 2
        return chosen

    def _with(self, chosen: dict[str, int], more: Sequence[int]) -> dict[str, int]:
        """The choice with more candidates, each in place of a lesser one of its parameter."""
        gain, result = self.problem.gain, dict(chosen)
        for a in more:
            old = result.get(self.param[a])
            if old is None or gain[a] > gain[old]:
                result[self.param[a]] = a
        return result

    def _more_state(self, chosen: dict[str, int], trial: dict[str, int]) -> int:
        state = self.problem.state_bytes
        return sum(state[a] for a in trial.values()) - sum(state[a] for a in chosen.values())

    def _slack(self, chosen: dict[str, int]) -> int:
        """RAM that is left at the peak."""
        active = self._fit(chosen)
        assert active is not None
        used = int(self.meter.live(active).max()) + self.meter.state_bytes(active)
        return self.problem.limits.ram_bytes - used

    def _fit(self, chosen: dict[str, int]) -> NDArray[np.bool_] | None:
        """What holds for a choice, with the blocks streamed that memory asks for."""
        active = self.closure.of(self.meter.vector(chosen.values()))
        return stream_to_fit(self.meter, active)


def stream_to_fit(meter: Meter, active: NDArray[np.bool_]) -> NDArray[np.bool_] | None:
    """What holds if blocks are streamed where memory runs out; None: limits don't hold."""
    limits = meter.problem.limits
    left = limits.ram_bytes - meter.state_bytes(active)
    if left < 0:
        return None
    over = meter.live(active) > left
    if over.any():
        active = _streaming(meter.problem, active, over)
        if (meter.live(active) > left).any():
            return None
    pages = meter.paged_states(active)
    if pages.stored_bytes > limits.storage_bytes:
        return None
    if limits.worn_bytes is not None and pages.worn_bytes > limits.worn_bytes:
        return None
    if limits.cycles is not None or limits.energy_j is not None:
        cycles = meter.cycles(active) + pages.cycles
        if limits.cycles is not None and cycles > limits.cycles:
            return None
        energy = meter.problem.cost.energy_j(cycles, pages.cycles)
        if limits.energy_j is not None and energy > limits.energy_j:
            return None
    if meter.most_flash_bytes > limits.flash_bytes:
        flash = meter.flash_bytes(active, Solution(frozenset()))
        if flash > limits.flash_bytes:
            return None
    return active


def blocks_to_stream(problem: Problem) -> list[str]:
    """For fixed updates: the blocks that run where memory runs out if everything is kept."""
    meter = Meter(problem)
    active = _Closure(problem).of(meter.vector(()))
    over = meter.live(active) > problem.limits.ram_bytes - meter.state_bytes(active)
    active = _streaming(problem, active, over)
    return [b.name for b in problem.streams if active[b.activity]]


def _streaming(
    problem: Problem, active: NDArray[np.bool_], over: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """What holds with the blocks streamed that may be and have slots that are over the limit."""
    result = active.copy()
    for b in problem.streams:
        if over[list(b.slots)].any() and not active[list(b.excludes)].any():
            result[b.activity] = True
    return result


def _saved_bytes(slot: Slot) -> int:
    """Bytes that forward keeps for an update."""
    return sum(t.bytes for t in slot.reads if t.is_forward)
