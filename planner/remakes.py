"""Forward tensors that backward reads: where they are held, made again, or read from storage.

``Remakes`` holds the tensors of a problem with fixed updates as arrays, with what each of them is
made from. ``Remade`` says what is done before which step of backward; ``Remakes.run`` finds what
that takes without laying out a timeline, ``Remakes.laid_out`` lays it out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..ir.opdef import get_op
from .footprint import Meter
from .problem import ALWAYS, Problem, Slot
from .solution import Solution
from .tensors import aligned
from .timeline import Rebuilds

Ints = NDArray[np.int64]
#: Behind all slots.
NEVER = 1 << 40


@dataclass
class Remade:
    """What is made again and loaded; everything else is kept as long as it is read.

    Attributes:
        again: Slot of a step -> tensors made again right before it, in forward order.
        loaded: Slot of a step -> (tensor, the tensor made again that it is for; None: the step).
        late: Auxiliary tensors that forward does not make.
    """

    again: dict[int, list[int]] = field(default_factory=dict)
    loaded: dict[int, list[tuple[int, int | None]]] = field(default_factory=dict)
    late: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Prices:
    """What it costs per tensor, in cycles or what else is to be minimized.

    Attributes:
        again: To make it again.
        store: To page it out.
        load: To page it in.
    """

    again: tuple[float, ...]
    store: tuple[float, ...]
    load: tuple[float, ...]

    def of(self, remakes: Remakes, made: Remade) -> float:
        """What decisions cost beyond making everything once."""
        total = sum(self.again[i] for tensors in made.again.values() for i in tensors)
        total -= sum(self.again[i] for i in made.late if remakes.reads[i])
        loads = [i for pairs in made.loaded.values() for i, _ in pairs]
        return total + sum(self.load[i] for i in loads) + sum(self.store[i] for i in set(loads))


@dataclass(frozen=True)
class Needs:
    """What decisions take.

    Attributes:
        step: For each moment the slot of its step.
        live: Arena bytes at each moment.
        makes: The tensor that is made again at this moment, before its step; -1: none, it is the
            step itself.
    """

    step: Ints
    live: Ints
    makes: Ints


@dataclass(frozen=True)
class Found:
    """Outcome of a search.

    Attributes:
        made: What is made again and loaded in the best plan.
        price: What that costs beyond making everything once.
        bound: Proven bound on the price of any plan; infinite: there is none.
        cuts: Slots that the bound is from.
        makes: Of these, cuts behind their neighbours, with a tensor that is made again in between.
    """

    made: Remade | None
    price: float
    bound: float
    cuts: tuple[int, ...] = ()
    makes: tuple[tuple[int, int], ...] = ()


class Remakes:
    """Tensors made in forward only, by index; times are slots of the problem.

    Attributes:
        problem: With fixed updates, without rebuilds of activations.
        tensors: The tensors.
        size: Bytes.
        made: Last slot of forward that writes or reads it; from there on it is held or not.
        auxiliary: It is made for backward alone, early or late.
        reads: Steps of backward that read it, in order.
        read_by: Step -> what it reads.
        can: It may be made again.
        until: Last slot before which it may: its parameters change then.
        cycles: Of making it again.
        operands: What it is made from.
        parts: For each node that makes it, scratch bytes and what it reads.
        room: RAM that is left for these tensors at each slot.
        steps: Slots of backward that always run.
        backward: The first of them.
    """

    def __init__(self, problem: Problem) -> None:
        """Collect the arrays."""
        p, storage = problem, problem.storage
        self.problem = p
        meter = Meter(p)
        windows = {t: (begin, end) for begin, end, t in p.fixed}
        windows |= {r.tensor: r.window for r in p.retentions if r.window is not None}
        makers = {
            t: s.index
            for s in p.slots
            if p.activities[s.activity].kind == "auxiliary"
            for t in s.writes
        }
        self.tensors = [t for t in storage.tensors if t in windows or t in makers]
        self.at = {t: i for i, t in enumerate(self.tensors)}
        self.size = np.array([t.bytes for t in self.tensors], np.int64)
        self.auxiliary = np.array([t in makers for t in self.tensors], bool)
        self.begin = np.array([makers[t] if t in makers else windows[t][0] for t in self.tensors])
        self.made = np.array([makers[t] if t in makers else windows[t][1] for t in self.tensors])
        self.steps = [
            s for s in p.slots if s.activity == ALWAYS and s.node.phase in ("backward", "update")
        ]
        self.backward = self.steps[0].index if self.steps else NEVER
        self.reads: list[list[int]] = [[] for _ in self.tensors]
        self.read_by: dict[int, list[int]] = {}
        changed: dict[str, int] = {}
        for s in self.steps:
            for t in s.reads:
                if t in self.at and t not in s.writes:
                    self.reads[self.at[t]].append(s.index)
                    self.read_by.setdefault(s.index, []).append(self.at[t])
            if s.update is not None and s.node is s.update.apply_node:
                changed[s.update.value.name] = s.index
        self.can = np.array([t.rebuildable for t in self.tensors], bool)
        self.until = np.array(
            [
                min(
                    (changed.get(v.name, NEVER) for w in t.writers for v in w.operands()), default=0
                )
                for t in self.tensors
            ]
        )
        position = {node: k for k, node in enumerate(p.training.graph.nodes)}
        self.order = [position[t.writers[-1]] if t.writers else -1 for t in self.tensors]
        micro = p.micro_batches
        self.cycles = np.array(
            [micro * sum(p.cost.node_cycles(w) for w in t.writers) for t in self.tensors]
        )
        self.parts = [
            [
                (
                    aligned(get_op(w.op).workspace(w)),
                    sorted(
                        {self.at[u] for v in w.operands() if (u := storage.of.get(v)) in self.at}
                    ),
                )
                for w in t.writers
            ]
            for t in self.tensors
        ]
        self.operands = [
            sorted({j for _, read in parts for j in read} - {i})
            for i, parts in enumerate(self.parts)
        ]
        self.pages = p.cost.storage is not None and p.limits.storage_bytes > 0
        self.state = meter.state_bytes(meter.vector(()))
        self.static = meter.live_always()
        self.room = p.limits.ram_bytes - self.state - self.static
        self.between = self._between()
        self.scratch = np.array(
            [max((scratch for scratch, _ in parts), default=0) for parts in self.parts]
        )

    def _between(self) -> Ints:
        """What is live in any case right before each slot."""
        change = np.zeros(len(self.problem.slots) + 2, np.int64)
        for t in self.problem.transients:
            last = max((k for k, acts in t.segments if ALWAYS in acts), default=-1)
            if last > t.begin:
                change[t.begin + 1] += t.tensor.bytes
                change[last + 1] -= t.tensor.bytes
        result: Ints = np.cumsum(change)
        return result

    def before(self, step: int) -> int:
        """The slot that runs before a step of backward."""
        return max((s.index for s in self.steps if s.index < step), default=step - 1)

    def run(self, made: Remade) -> Needs:
        """Arena bytes at every slot, and at every node of every rebuild."""
        count = len(self.problem.slots)
        again = np.zeros(count, np.int64)
        for step, tensors in made.again.items():
            again[step] = sum(len(self.parts[i]) for i in tensors)
        at = np.arange(count) + np.cumsum(again)  # moment of each slot
        moments = int(at[-1]) + 1
        change = np.zeros(moments + 1, np.int64)
        static = np.zeros(moments, np.int64)
        static[at] = self.static
        last = at[self.made].tolist()  # moment until which a tensor is there
        for i in np.flatnonzero(self.auxiliary).tolist():
            last[i] = NEVER if i in made.late else int(at[self.begin[i]]) - 1
        size = self.size.tolist()

        def live(i: int, first: int, moment: int) -> None:
            change[first] += size[i]
            change[moment + 1] -= size[i]
            last[i] = moment

        for i in np.flatnonzero(self.auxiliary).tolist():
            if i not in made.late:
                for j in self.operands[i]:
                    if last[j] < (moment := int(at[self.begin[i]])):
                        live(j, last[j] + 1, moment)
        for step in sorted(self.read_by.keys() | made.again.keys()):
            loaded = set(made.loaded.get(step, ()))
            moment = int(at[step] - again[step])
            for i in made.again.get(step, ()):
                last[i] = moment - 1
                for scratch, read in self.parts[i]:
                    for j in read:
                        fresh = (j, i) in loaded
                        loaded.discard((j, i))
                        live(j, moment if fresh else last[j] + 1, moment)
                    live(i, last[i] + 1, moment)
                    static[moment] = self.between[step] + scratch
                    moment += 1
            for i in self.read_by.get(step, ()):
                live(i, moment if (i, None) in loaded else last[i] + 1, moment)
        step_of = np.repeat(np.arange(count), again + 1)
        makes = np.full(moments, -1)
        for step, tensors in made.again.items():
            each = [i for i in tensors for _ in self.parts[i]]
            makes[at[step] - len(each) : at[step]] = each
        return Needs(step_of, np.cumsum(change[:-1]) + static, makes)

    def over(self, made: Remade) -> int:
        """Bytes by which the live bytes exceed the RAM budget; negative where they don't."""
        return int(self.run(made).live.max()) + self.state - self.problem.limits.ram_bytes

    def laid_out(
        self, build: Callable[[Rebuilds], Problem], made: Remade
    ) -> tuple[Problem, Solution]:
        """The problem in which just this may be made again, and the decisions to do all of it."""
        slots = self.problem.slots
        problem = build(
            {
                slots[k].node: [self.tensors[i].index for i in found]
                for k, found in made.again.items()
            }
        )
        late = {self.tensors[i].index for i in made.late}
        active = {
            a.index
            for a in problem.activities
            if a.kind in ("always", "rebuild")
            or (a.kind == "auxiliary" and a.tensor is not None and a.tensor.index not in late)
        }
        wanted = {
            (slots[k].node, self.tensors[i].index, None if u is None else self.tensors[u].index)
            for k, pairs in made.loaded.items()
            for i, u in pairs
        }
        loads: set[tuple[int, int]] = set()
        before: list[Slot] = []
        for s in problem.slots:
            if s.rebuild:
                before.append(s)
                continue
            for r in (*before, s):
                tensor = problem.activities[r.activity].tensor if r.rebuild else None
                reader = None if tensor is None else tensor.index
                for t in r.reads:
                    if (s.node, t.index, reader) in wanted:
                        wanted.discard((s.node, t.index, reader))
                        loads.add((t.index, r.index))
            before = []
        return problem, Solution(frozenset(active), frozenset(loads))
