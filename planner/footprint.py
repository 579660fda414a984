"""What decisions take of RAM, flash and time, without placing anything: the rows of the model.

The figures are those of the memory, flash and time rows of ``planner.milp`` for given decisions,
found directly. Heuristics ask for them hundreds of times where a schedule would be too slow.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .plan import CODE_BYTES_PER_KERNEL, CODE_BYTES_PER_STEP
from .problem import (
    ALWAYS,
    Event,
    Limits,
    PagedState,
    Problem,
    Retention,
    StreamChoice,
    together,
)
from .solution import Solution
from .tensors import Tensor


@dataclass(frozen=True)
class Footprint:
    """Needs of one set of decisions.

    Attributes:
        live: Live arena bytes at each slot of the timeline, int64.
        state_bytes: RAM kept for good.
        flash_bytes: Weights and estimated code.
        cycles: Of a training step, page transfers included in full.
        energy_j: Of a training step.
        storage_bytes: Of storage, in whole erase units where tensors may not share them.
        worn_bytes: Of storage, per training step.
    """

    live: NDArray[np.int64]
    state_bytes: int
    flash_bytes: int
    cycles: int
    energy_j: float
    storage_bytes: int
    worn_bytes: int

    @property
    def ram_bytes(self) -> int:
        """Live bytes at the peak and state; a layout may take more."""
        return int(self.live.max()) + self.state_bytes

    def keeps(self, limits: Limits) -> bool:
        """All limits hold."""
        return (
            self.ram_bytes <= limits.ram_bytes
            and self.flash_bytes <= limits.flash_bytes
            and (limits.cycles is None or self.cycles <= limits.cycles)
            and (limits.energy_j is None or self.energy_j <= limits.energy_j)
            and self.storage_bytes <= limits.storage_bytes
            and (limits.worn_bytes is None or self.worn_bytes <= limits.worn_bytes)
        )


@dataclass(frozen=True)
class Hold:
    """An event of a retention and the state of its tensor there.

    Attributes:
        event: The event.
        held: The tensor is held from the event before (or its window) into this one.
        resident: It occupies its bytes during the event's slot.
    """

    event: Event
    held: bool
    resident: bool


def holds(retention: Retention, solution: Solution) -> list[Hold]:
    """Where a tensor is held: as short as the active reads, rebuilds and page-ins allow.

    Raises:
        KeyError: It is read, and was neither made nor kept.
    """
    result: list[Hold] = []
    needed = False
    for e in reversed(retention.events):
        active = e.activity == ALWAYS or e.activity in solution.active
        resident = needed or active
        if e.writes:
            needed = needed and not active
        else:
            needed = needed or active
            needed = needed and (retention.tensor.index, e.slot) not in solution.loads
        result.append(Hold(e, needed, resident))
    if needed and retention.window is None:
        raise KeyError(retention.tensor.name)
    return result[::-1]


def measure(problem: Problem, solution: Solution) -> Footprint:
    """The footprint of decisions.

    Raises:
        KeyError: A tensor is read that these decisions never make.
    """
    return Meter(problem).measure(solution)


@dataclass(frozen=True)
class Holds:
    """Ranges of slots in which retained tensors are live behind their windows, as arrays.

    Attributes:
        of: Position of its retention.
        begin: First slot.
        end: Last slot: of a read, a rebuild or a page-in, of which each has its own range.
        size: Bytes.
        held: It is kept from the event before into a read.
    """

    of: NDArray[np.int64]
    begin: NDArray[np.int64]
    end: NDArray[np.int64]
    size: NDArray[np.int64]
    held: NDArray[np.bool_]


class Meter:
    """Measures many decisions about one problem; arrays over slots, activities are 0/1 vectors."""

    def __init__(self, problem: Problem) -> None:
        """Lay the timeline out as arrays."""
        p = self.problem = problem
        self._slots = len(p.slots)
        self._activity = _integers(s.activity for s in p.slots)
        self._scratch = _integers(s.scratch_bytes for s in p.slots)
        self._slot_cycles = _integers(s.cycles for s in p.slots)
        self._mixed = [s for s in p.slots if s.mixed is not None]
        self._split = [s for s in p.slots if s.split]
        self._windows = np.zeros(self._slots, dtype=np.int64)
        windows = [*p.fixed, *((*r.window, r.tensor) for r in p.retentions if r.window is not None)]
        for begin, end, t in windows:
            self._windows[begin : end + 1] += t.bytes
        self._of_blocks = {b.activity: self._block(b, windows) for b in p.streams}
        self._over_slot = _integers(o.slot for o in p.overwrites)
        self._over_bytes = _integers(o.operand.bytes for o in p.overwrites)
        self._over_unless = _Groups([[(a, o.slot) for a in o.unless] for o in p.overwrites])
        self._made = _integers(t.begin for t in p.transients)
        self._size = _integers(t.tensor.bytes for t in p.transients)
        self._kept = _integers(r.tensor.bytes for r in p.retentions)
        self._behind = _integers(-1 if r.window is None else r.window[1] + 1 for r in p.retentions)
        self._state = np.zeros(len(p.activities), dtype=np.int64)
        for a, size in p.state_bytes.items():
            self._state[a] = size
        self._ends = _Groups(
            [
                {a: last for last, acts in t.segments for a in acts}.items()
                for t in p.transients
            ]
        )
        events = [(i, e) for i, r in enumerate(p.retentions) for e in r.events]
        self._of = _integers(i for i, _ in events)
        self._event = _integers(e.activity for _, e in events)
        self._at = _integers(e.slot for _, e in events)
        self._from = _integers(e.begin for _, e in events)
        self._makes = np.array([e.writes for _, e in events], dtype=bool)
        self._place = {(p.retentions[i].tensor.index, e.slot): j for j, (i, e) in enumerate(events)}

    def measure(self, solution: Solution) -> Footprint:
        """All needs of these decisions, page-ins that nothing reads left out.

        Raises:
            KeyError: A tensor is read that these decisions never make.
        """
        p = self.problem
        solution = replace(solution, loads=solution.read_loads(p))
        active = self.vector(solution.active)
        state = self.paged_states(active)
        transfer = self._transfer_cycles(solution) + state.cycles
        cycles = self.cycles(active) + transfer
        paged = {t for t, _ in solution.loads}
        sizes = [t.bytes for t in p.storage.tensors if t.index in paged]
        return Footprint(
            self.live(active, solution),
            self.state_bytes(active),
            self.flash_bytes(active, solution),
            cycles,
            p.cost.energy_j(cycles, transfer),
            sum(p.cost.stored_bytes(b) for b in sizes) + state.stored_bytes,
            p.micro_batches * sum(p.cost.worn_bytes(b) for b in sizes) + state.worn_bytes,
        )

    def vector(self, activities: Collection[int]) -> NDArray[np.bool_]:
        """Activities as a vector; what always holds holds."""
        active = np.zeros(len(self.problem.activities), dtype=bool)
        active[[ALWAYS, *activities]] = True
        return active

    def live(
        self, active: NDArray[np.bool_], solution: Solution | None = None
    ) -> NDArray[np.int64]:
        """Live arena bytes at each slot; ``solution`` is needed where it pages.

        Raises:
            KeyError: A tensor is read that these decisions never make.
        """
        change = np.zeros(self._slots + 1, dtype=np.int64)
        last = self._ends.last(active)
        lives = last >= 0
        np.add.at(change, self._made[lives], self._size[lives])
        np.subtract.at(change, last[lives] + 1, self._size[lives])
        stays = self.holds(active, solution)
        np.add.at(change, stays.begin, stays.size)
        np.subtract.at(change, stays.end + 1, stays.size)
        runs = self._runs(active)
        live: NDArray[np.int64] = np.cumsum(change[:-1]) + self._windows + self._scratch * runs
        for s in self._mixed:
            if s.mixed is not None and runs[s.index] and active[s.mixed.choice]:
                live[s.index] += s.mixed.scratch_bytes - s.scratch_bytes
        for a, more in self._of_blocks.items():
            if active[a]:
                live += more
        free = runs[self._over_slot] & (self._over_unless.count(active) == 0)
        saved = np.zeros(self._slots, dtype=np.int64)
        np.maximum.at(saved, self._over_slot[free], self._over_bytes[free])
        live -= saved
        return live

    def holds(self, active: NDArray[np.bool_], solution: Solution | None = None) -> Holds:
        """Where tensors are behind their windows.

        Raises:
            KeyError: A tensor is read that these decisions never make.
        """
        loaded = np.zeros(len(self._of), dtype=bool)
        if solution is not None:
            loaded[[self._place[load] for load in solution.loads]] = True
        happens = np.flatnonzero(active[self._event] | loaded)
        of, at = self._of[happens], self._at[happens]
        before = self._behind[of]
        before[1:] = np.where(of[1:] == of[:-1], at[:-1] + 1, before[1:])
        held = ~self._makes[happens] & ~loaded[happens]
        lost = np.flatnonzero(held & (before < 0))
        if len(lost):
            raise KeyError(self.problem.retentions[of[lost[0]]].tensor.name)
        begin = np.where(held, before, np.where(loaded[happens], at, self._from[happens]))
        return Holds(of, begin, at, self._kept[of], held)

    def live_always(self) -> NDArray[np.int64]:
        """Live arena bytes at each slot that no decision can avoid."""
        live = self._windows.copy()
        for t in self.problem.transients:
            last = max((k for k, acts in t.segments if ALWAYS in acts), default=-1)
            live[t.begin : last + 1] += t.tensor.bytes
        for s in self.problem.slots:
            if s.activity == ALWAYS:
                mixed = s.scratch_bytes if s.mixed is None else s.mixed.scratch_bytes
                live[s.index] += min(s.scratch_bytes, mixed)
        for b in self.problem.streams:
            more = np.minimum(self._of_blocks[b.activity], 0)
            more[list(b.slots)] -= self._scratch[list(b.slots)]
            live += more
        saved = np.zeros(self._slots, dtype=np.int64)
        np.maximum.at(saved, self._over_slot, self._over_bytes)
        live -= saved
        return live

    def state_bytes(self, active: NDArray[np.bool_]) -> int:
        """RAM that the updates keep for good."""
        p = self.problem
        return int(self._state[active].sum()) + sum(
            u.state_bytes for u in p.mixed_updates if active[u.activity] and active[u.choice]
        )

    def paged_states(self, active: NDArray[np.bool_]) -> PagedState:
        """What optimizer tensors in storage take together."""
        return together(s for s in self.problem.paged_states if active[s.activity])

    def cycles(self, active: NDArray[np.bool_]) -> int:
        """Cycles of a training step but for page transfers."""
        runs = self._runs(active)
        total = int(self._slot_cycles[runs].sum())
        total += sum(b.cycles for b in self.problem.streams if active[b.activity])
        for s in self._mixed:
            if s.mixed is not None and runs[s.index] and active[s.mixed.choice]:
                total += s.mixed.cycles - s.cycles
        for s in self._split:
            if runs[s.index]:
                mixed = s.mixed is not None and active[s.mixed.choice]
                total += sum(
                    x.mixed_cycles if mixed else x.cycles for x in s.split if active[x.update]
                )
        return total

    @cached_property
    def most_flash_bytes(self) -> int:
        """Flash if everything ran in every form: an upper bound."""
        p = self.problem
        kernels = {k for s in p.slots for k in s.kernels}
        kernels |= {k for b in p.streams for k in b.kernels}
        kernels |= {k for s in self._mixed if s.mixed is not None for k in s.mixed.kernels}
        views = sum(map(len, p.storage.followers.values()))
        steps = (2 + views) * len(p.slots) + len(p.streams)
        steps += together(p.paged_states).steps
        weights = sum(c.bytes for c in p.constants) + sum(p.flash_bytes.values())
        weights += sum(max(0, m.flash_bytes) for m in p.mixed_layers)
        weights += sum(max(0, u.flash_bytes) for u in p.mixed_updates)
        return weights + CODE_BYTES_PER_KERNEL * len(kernels) + CODE_BYTES_PER_STEP * steps

    def flash_bytes(self, active: NDArray[np.bool_], solution: Solution) -> int:
        """Weights and estimated code."""
        p, runs = self.problem, self._runs(active)
        followers = p.storage.followers
        steps = sum(len(followers.get(v, ())) for v in p.training.samples)
        steps += self.paged_states(active).steps
        kernels: set[str] = set()
        for b in p.streams:
            if active[b.activity]:
                steps += 1
                kernels.update(b.kernels)
        for s in p.slots:
            if runs[s.index]:
                mixed = s.mixed is not None and active[s.mixed.choice]
                kernels.update(s.mixed.kernels if mixed and s.mixed is not None else s.kernels)
                steps += 1 + len(followers.get(s.node, ()))
        moves = p.cost.steps_per_transfer
        for t, _ in solution.loads:
            steps += moves + len(followers.get(p.storage.tensors[t].source, ()))
        steps += moves * len({t for t, _ in solution.loads})
        weights = sum(
            c.bytes
            for c in p.constants
            if active[list(c.readers)].any() and (c.absent is None or not active[c.absent])
        )
        weights += sum(m.flash_bytes for m in p.mixed_layers if active[m.activity])
        weights += sum(b for a, b in p.flash_bytes.items() if active[a])
        weights += sum(
            u.flash_bytes for u in p.mixed_updates if active[u.activity] and active[u.choice]
        )
        return weights + CODE_BYTES_PER_KERNEL * len(kernels) + CODE_BYTES_PER_STEP * steps

    def _runs(self, active: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """The slots that run: active, and in no streamed block."""
        runs: NDArray[np.bool_] = active[self._activity]
        for b in self.problem.streams:
            if active[b.activity]:
                runs[list(b.slots)] = False
        return runs

    def _block(
        self, block: StreamChoice, windows: Sequence[tuple[int, int, Tensor]]
    ) -> NDArray[np.int64]:
        """Live bytes that change where a block is streamed, but for scratch of its slots."""
        more = np.zeros(self._slots, dtype=np.int64)
        more[block.slots[0]] += block.scratch_bytes
        for begin, end, t in windows:
            if t in block.inner:
                more[begin : end + 1] -= t.bytes
            elif t is block.result:
                more[block.slots[0] : begin] += t.bytes
            elif t is block.frees:
                more[block.slots[0] + 1 : end + 1] -= t.bytes
        return more

    def _transfer_cycles(self, solution: Solution) -> int:
        p, total = self.problem, 0
        size = {t.index: t.bytes for t in p.storage.tensors}
        for t, _ in solution.loads:
            total += p.cost.read_cycles(size[t])
        for t in {t for t, _ in solution.loads}:
            total += p.cost.write_cycles(size[t])
        return total * p.micro_batches


class _Groups:
    """(activity, slot) pairs in groups, asked for the slots whose activities hold."""

    def __init__(self, groups: Sequence[Iterable[tuple[int, int]]]) -> None:
        """Flatten."""
        lists = [list(g) for g in groups]
        # a pair that never counts in each group: reduceat wants none to be empty
        flat = [pair for g in lists for pair in [(-1, -1), *g]]
        self._activity = _integers(a for a, _ in flat)
        self._slot = _integers(k for _, k in flat)
        self._begin = np.cumsum([0, *(1 + len(g) for g in lists[:-1])])
        self._empty = not lists

    def _holds(self, active: NDArray[np.bool_]) -> NDArray[np.bool_]:
        result: NDArray[np.bool_] = active[self._activity] & (self._activity >= 0)
        return result

    def last(self, active: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Last slot of each group, -1 where none holds."""
        if self._empty:
            return self._slot
        return np.maximum.reduceat(np.where(self._holds(active), self._slot, -1), self._begin)

    def count(self, active: NDArray[np.bool_]) -> NDArray[np.int64]:
        """How many slots of each group hold."""
        if self._empty:
            return self._slot
        return np.add.reduceat(self._holds(active).astype(np.int64), self._begin)


def _integers(values: Iterable[int]) -> NDArray[np.int64]:
    return np.fromiter(values, dtype=np.int64)
