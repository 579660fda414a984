"""Plans of little RAM for fixed updates: few tensors are held between steps, as checkpoints.

Steps of backward are taken from the last one to the first. What has to be there at a step is held
over the step before, or made again right before it, in forward's order: of everything that takes
to make, what lies before some point of that order is a matter of earlier steps, and of it only the
*checkpoints* are held that something behind that point is made from. So a step leaves few choices,
one per point, and of those few are worth keeping: such that hold less, or make less again.

That is the dynamic program of checkpointing for chains (Griewank and Walther 2000, Chen et al.
2016) on any graph, with a beam instead of all states. It knows no paging.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from .remakes import Ints, Prices, Remade, Remakes

#: States that are kept per step, and the largest product of tensors and steps that is searched.
WIDTH, LARGEST = 8, 250_000
Item = TypeVar("Item")
#: Excess bytes, bytes held, price, number of the state behind, point.
_Choice = tuple[int, int, float, int, int]


@dataclass(frozen=True)
class _State:
    """What is decided of a step and all behind it.

    Attributes:
        over: Bytes that are missing at the worst moment of backward; 0 or less: none.
        bytes: Held over the step before.
        price: Of all that is made again.
        held: Tensors held over the step before.
        step: Slot.
        again: Made right before the step.
        needed: There at the step, and behind it.
        behind: The state of the next step; None: there is none.
    """

    over: int
    bytes: int
    price: float
    held: frozenset[int]
    step: int = -1
    again: tuple[int, ...] = ()
    needed: frozenset[int] = frozenset()
    behind: _State | None = None

    def steps(self) -> Iterator[_State]:
        """This one and those behind it."""
        state: _State | None = self
        while state is not None and state.step >= 0:
            yield state
            state = state.behind


@dataclass(frozen=True)
class _Making:
    """Everything that it takes to have some tensors at a step, made in forward's order.

    A *point* lies before each tensor that is made, and behind the last one.

    Attributes:
        tensors: What is made, in order.
        bytes: At each point, what is held if all before it is left to earlier steps.
        peak: The most live bytes while each of them is made.
        price: At each point, of all that is made from there on.
        last: What is there at all -> index of the last of ``tensors`` made from it; their number:
            it is needed at the step.
    """

    tensors: list[int]
    bytes: Ints
    peak: Ints
    price: NDArray[np.float64]
    last: dict[int, int]

    def held(self, point: int) -> frozenset[int]:
        """What is held for what is made from a point on."""
        made = set(self.tensors[point:])
        return frozenset(i for i, k in self.last.items() if k >= point and i not in made)


class Checkpoints:
    """The search of one problem.

    Attributes:
        made: What the best plan makes again.
        over: Bytes by which that exceeds the RAM budget; negative where it doesn't.
    """

    def __init__(self, remakes: Remakes, prices: Prices) -> None:
        """Search."""
        self.r, self.prices = remakes, prices
        self.size = remakes.size.tolist()
        self.ram = remakes.problem.limits.ram_bytes - remakes.state
        self.until = sorted(set(remakes.until.tolist()))
        self.known: dict[tuple[frozenset[int], int], _Making] = {}
        states = [_State(-self.ram, 0, 0.0, frozenset())]
        for step in reversed(remakes.steps):
            states = self._before(step.index, states)
        plans = [(s, self._plan(s)) for s in states]
        needs = [remakes.over(made) for _, made in plans]
        k = min(range(len(plans)), key=lambda k: (max(needs[k], 0), plans[k][0].price))
        (self.state, self.made), self.over = plans[k], needs[k]

    def _plan(self, first: _State) -> Remade:
        late = set(np.flatnonzero(self.r.auxiliary).tolist()) - first.held
        return Remade({s.step: list(s.again) for s in first.steps() if s.again}, late=late)

    @staticmethod
    def small(remakes: Remakes) -> bool:
        """The search takes less than a second or two."""
        return len(remakes.tensors) * len(remakes.steps) <= LARGEST

    @cached_property
    def critical(self) -> tuple[list[int], list[tuple[int, int]]]:
        """Where the plan exceeds the budget: slots, and what would take too much to make at them.

        From the worst slot, and the step before it, on to the first one over which nothing is held.
        """
        states = list(self.state.steps())
        if self.state.over > 0:
            worst = max(n for n, s in enumerate(states) if s.over == self.state.over)
            slots = [self.r.before(states[worst].step)]
        else:  # of forward
            needs = self.r.run(self.made)
            worst, slots = 0, [int(needs.step[np.argmax(needs.live)])]
        makes = list[tuple[int, int]]()
        for s in states[worst:]:
            slots.append(s.step)
            making = self._making(s.step, s.needed)
            over = making.peak + int(self.r.between[s.step]) > self.ram
            makes += [(s.step, making.tensors[n]) for n in np.flatnonzero(over).tolist()]
            if s.behind is None or not s.behind.held:
                break
        return slots, makes

    def _before(self, step: int, behind: list[_State]) -> list[_State]:
        """The states of a step that are worth keeping."""
        r, found = self.r, list[_Choice]()
        needed = [s.held.union(r.read_by.get(step, ())) for s in behind]
        makings = [self._making(step, n) for n in needed]
        for k, (state, making) in enumerate(zip(behind, makings, strict=True)):
            own = int(r.static[step]) + sum(self.size[i] for i in needed[k]) - self.ram
            excess = np.append(making.peak + int(r.between[step]) - self.ram, max(state.over, own))
            over = np.maximum.accumulate(excess[::-1])[::-1]
            price = state.price + making.price
            for p in _worthwhile(over, making.bytes, WIDTH):
                found.append((int(over[p]), int(making.bytes[p]), float(price[p]), k, p))
        return [
            _State(
                over,
                held,
                price,
                makings[k].held(p),
                step,
                tuple(makings[k].tensors[p:]),
                needed[k],
                behind[k],
            )
            for over, held, price, k, p in self._kept(found)
        ]

    def _kept(self, found: list[_Choice]) -> list[_Choice]:
        """Such that hold less, or cost less, than any other that fits; or fit nearly."""
        by = 2 if any(f[0] <= 0 for f in found) else 0
        front: list[_Choice] = []
        for f in sorted(found, key=lambda f: (f[1], f[by])):
            if (by == 0 or f[0] <= 0) and (not front or f[by] < front[-1][by]):
                front.append(f)
        return _spread(front, WIDTH)

    def _making(self, step: int, needed: frozenset[int]) -> _Making:
        key = needed, bisect_left(self.until, step)
        if key not in self.known:
            self.known[key] = self._all_made(step, needed)
        return self.known[key]

    def _all_made(self, step: int, needed: frozenset[int]) -> _Making:
        r = self.r
        there, stack, made = set[int](), list(needed), list[int]()
        while stack:
            i = stack.pop()
            if i in there:
                continue
            there.add(i)
            if r.can[i] and step <= r.until[i]:
                made.append(i)
                stack += r.operands[i]
        made.sort(key=r.order.__getitem__)
        count, at = len(made), {i: k for k, i in enumerate(made)}
        begins = np.cumsum([0, *(len(r.parts[i]) for i in made)]).tolist()  # moments
        parts = begins[-1]
        until, last = dict.fromkeys(there, -1), dict.fromkeys(there, -1)
        scratch = np.zeros(parts, np.int64)
        for k, i in enumerate(made):
            for moment, (own, read) in enumerate(r.parts[i], begins[k]):
                scratch[moment] = own
                for j in read:
                    until[j] = moment
                    if j != i:
                        last[j] = k
        for i in needed:
            until[i], last[i] = parts, count
        live, held = np.zeros(parts + 2, np.int64), np.zeros(count + 2, np.int64)
        for i in there:
            k = at.get(i, -1)
            begin = 0 if k < 0 else begins[k]
            live[begin] += self.size[i]
            live[max(until[i], begin if k < 0 else begins[k + 1] - 1) + 1] -= self.size[i]
            if last[i] > k:
                held[k + 1] += self.size[i]
                held[last[i] + 1] -= self.size[i]
        moments = np.cumsum(live)[:parts] + scratch
        peak = np.maximum.reduceat(moments, begins[:-1]) if count else moments
        price = np.zeros(count + 1)
        price[:count] = np.cumsum([self.prices.again[i] for i in reversed(made)])[::-1]
        return _Making(made, np.cumsum(held)[: count + 1], peak, price, last)


def _worthwhile(over: Ints, held: Ints, most: int) -> list[int]:
    """Points such that what is made less holds more, or doesn't fit as well."""
    # the later the point, the less is made
    points = np.flatnonzero(over <= 0)[::-1] if over[-1] <= 0 else np.lexsort((held, over))
    least = np.minimum.accumulate(held[points])
    better = np.append(True, least[1:] < least[:-1])
    return _spread(points[better].tolist(), most)


def _spread(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many of them, evenly."""
    if len(items) <= most:
        return list(items)
    at = np.unique(np.linspace(0, len(items) - 1, most).round().astype(int))
    return [items[k] for k in at.tolist()]
