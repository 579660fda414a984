"""The steps of a training graph that can be put in order: what each needs, makes and frees.

Live bytes are those of the planner's timeline with everything kept, in-place results included; of
tensors that backward reads, ``Steps.dropped`` leaves only what no plan can do without.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from itertools import pairwise
from operator import or_

import numpy as np

from ..ir.graph import Node, Value
from ..ir.opdef import get_op, inplace_operands
from ..ir.training import TrainingGraph
from .tensors import Storage, aligned


@dataclass(frozen=True)
class Steps:
    """The steps of a training graph that can be put in order. Sets of steps are bit masks.

    Attributes:
        nodes: What runs, views left out; the gradient of an update runs in the update's step.
        after: Steps that have to run before each.
        then: Those that wait for each.
        reads: Tensors that each step reads; views are their operand.
        writes: Tensors that it makes.
        scratch: Bytes that are there during the step alone.
        over: Tensor whose bytes its result takes over once this mask has run, in order of choice.
        at_once: It follows what it reads: made for backward alone.
        size: Bytes of each tensor.
        given: Bytes of the samples, which are there at the start.
        readers: Steps that read each; bit ``len(nodes)`` is the end.
        forward: Steps of forward and loss.
    """

    nodes: tuple[Node, ...]
    after: tuple[int, ...]
    then: tuple[tuple[int, ...], ...]
    reads: tuple[tuple[int, ...], ...]
    writes: tuple[tuple[int, ...], ...]
    scratch: tuple[int, ...]
    over: tuple[tuple[tuple[int, int], ...], ...]
    at_once: tuple[bool, ...]
    size: tuple[int, ...]
    given: int
    readers: tuple[int, ...]
    forward: int

    def run(self, done: int, live: int, k: int) -> tuple[int, int]:
        """Bytes that are live during step ``k`` and after it.

        Args:
            done: Steps that have run.
            live: Bytes of what they leave with readers still to come.
            k: The step.
        """
        size, readers, missing = self.size, self.readers, ~(done | 1 << k)
        peak, after = live + self.scratch[k], live
        for t in self.writes[k]:
            peak += size[t]
            if readers[t] & missing:
                after += size[t]
        for t, others in self.over[k]:
            if not others & ~done:
                peak -= size[t]
                break
        for t in self.reads[k]:
            if not readers[t] & missing:
                after -= size[t]
        return peak, after

    def peak(self, order: Sequence[int]) -> int:
        """Largest number of live bytes in an order."""
        done, live, most = 0, self.given, 0
        for k in order:
            peak, live = self.run(done, live, k)
            most, done = max(most, peak), done | 1 << k
        return most

    def ready(self, done: int, waiting: Sequence[int]) -> int:
        """Those of some steps that could run next."""
        return sum(1 << k for k in waiting if not self.after[k] & ~done)

    @property
    def is_chain(self) -> bool:
        """Forward leaves no choice, but for what is made for backward alone."""
        chain = [k for k in bits(self.forward) if not self.at_once[k]]
        return all(self.after[b] >> a & 1 for a, b in pairwise(chain))

    @cached_property
    def unavoidable(self) -> int:
        """Bytes that are live at some step in every order."""
        n = len(self.nodes)
        up, down = list(self.after), [0] * n
        for k in range(n):
            up[k] = reduce(or_, (up[j] for j in bits(self.after[k])), self.after[k])
        for k in reversed(range(n)):
            down[k] = reduce(or_, (down[j] | 1 << j for j in self.then[k]), 0)
        live = np.zeros(n, dtype=np.int64)
        maker = {t: k for k, made in enumerate(self.writes) for t in made}
        for t, size in enumerate(self.size):
            until = reduce(or_, (up[j] | 1 << j for j in bits(self.readers[t]) if j < n), 0)
            if self.readers[t] >> n:
                until = (1 << n) - 1
            here = until & (down[maker[t]] if t in maker else until)
            packed = np.frombuffer(here.to_bytes(n // 8 + 1, "little"), dtype=np.uint8)
            live += size * np.unpackbits(packed, bitorder="little")[:n].astype(np.int64)
        for k in range(n):
            live[k] += self.scratch[k] + sum(self.size[t] for t in self.writes[k])
            live[k] -= max((self.size[t] for t, _ in self.over[k]), default=0)
        return int(live.max())

    def dropped(self) -> Steps:
        """The same, where backward finds no forward tensor but the samples kept.

        Each is there only while a step reads it: no plan takes less, whatever it rebuilds or pages.
        """
        made = {
            t
            for k in bits(self.forward)
            for t in self.writes[k]
            if self.nodes[k].phase == "forward"
        }
        late = ~self.forward
        reads, scratch = list(self.reads), list(self.scratch)
        readers, writes = list(self.readers), list(self.writes)
        for t in made:
            for k in bits(self.readers[t] & late & (1 << len(self.nodes)) - 1):
                scratch[k] += self.size[t]
                reads[k] = tuple(u for u in reads[k] if u != t)
            readers[t] &= ~late | 1 << len(self.nodes)
        for k, forced in enumerate(self.at_once):
            if forced:
                writes[k], scratch[k] = (), 0
        return replace(
            self,
            reads=tuple(reads),
            writes=tuple(writes),
            scratch=tuple(scratch),
            readers=tuple(readers),
        )


def bits(mask: int) -> Iterator[int]:
    """Positions of the bits that are set, from the lowest."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def steps_of(training: TrainingGraph) -> Steps:
    """What can be put in order in a training graph."""
    return _Reader(training).read()


class _Reader:
    def __init__(self, training: TrainingGraph) -> None:
        self.training, self.storage = training, Storage(training)
        graph = training.graph
        self.root = {v: v for v in graph.values.values()}
        self.runs: list[tuple[Node, ...]] = []
        self.step_of: dict[Node, int] = {}
        for node in graph.nodes:
            update = self.storage.update_of.get(node)
            if get_op(node.op).view:
                source = node.inputs[0]
                assert source is not None, node.name
                self.root[node.out] = self.root[source]
            elif update is None or node is not update.grad_node:
                nodes: tuple[Node, ...] = (node,)
                if update is not None and node is (update.accumulate_node or update.apply_node):
                    nodes = (node,) if update.grad_node is None else (update.grad_node, node)
                self.step_of.update(dict.fromkeys(nodes, len(self.runs)))
                self.runs.append(nodes)

    def read(self) -> Steps:
        root, space = self.root, self.storage.space
        paged = self.storage.paged  # optimizer tensors, there for their step only
        arena = [v for v, r in root.items() if v is r and space.get(v) == "arena"]
        arena = [v for v in arena if v not in paged]
        number = {v: t for t, v in enumerate(arena)}
        tensor = {v: number[r] for v, r in root.items() if r in number}
        operands, reads, writes, scratch, after = [], [], [], [], []
        users: dict[Value, int] = {}  # steps that read a value
        for k, nodes in enumerate(self.runs):
            inside = {v for n in nodes for v in n.outputs}
            used = [v for n in nodes for v in n.operands() if v not in inside]
            makers = (p for v in used if (p := self.root[v].producer) is not None)
            operands.append(used)
            after.append(reduce(or_, (1 << self.step_of[p] for p in makers), 0))
            reads.append(tuple({tensor[v]: 0 for v in used if v in tensor}))
            writes.append(tuple({tensor[v]: 0 for v in nodes[-1].outputs if v in tensor}))
            scratch.append(sum(aligned(get_op(n.op).workspace(n)) for n in nodes))
            if len(nodes) > 1:
                scratch[-1] += aligned(self.storage.update_of[nodes[-1]].tile_bytes)
            scratch[-1] += sum(aligned(v.type.nbytes) for v in used if v in paged)
            for v in used:
                users[v] = users.get(v, 0) | 1 << k
        last = tuple(nodes[-1] for nodes in self.runs)
        forward = sum(1 << k for k, n in enumerate(last) if n.phase in ("forward", "loss"))
        readers = [0] * len(arena)
        for k, tensors in enumerate(reads):
            for t in tensors:
                readers[t] |= 1 << k
        self._updates_last(after, reads, writes, users, forward)
        at_once = tuple(
            n.phase == "forward"
            and n.out not in self.training.graph.outputs
            and not any(readers[t] & forward for t in writes[k])
            for k, n in enumerate(last)
        )
        over = tuple(self._over(k, n, tensor, readers) for k, n in enumerate(last))
        readers[tensor[self.training.loss]] |= 1 << len(last)
        then: list[list[int]] = [[] for _ in last]
        for k, mask in enumerate(after):
            for j in bits(mask):
                then[j].append(k)
        return Steps(
            last, tuple(after), tuple(map(tuple, then)), tuple(reads), tuple(writes),
            tuple(scratch), over, at_once, tuple(aligned(v.type.nbytes) for v in arena),
            sum(aligned(v.type.nbytes) for v in self.training.samples), tuple(readers), forward,
        )  # fmt: skip

    def _updates_last(
        self,
        after: list[int],
        reads: Sequence[Sequence[int]],
        writes: Sequence[Sequence[int]],
        users: Mapping[Value, int],
        forward: int,
    ) -> None:
        """Have a parameter change behind what reads it and what it may be read for again.

        A step of backward may have a forward tensor rebuilt, which takes old parameters.
        """
        before = list(after)  # all steps that a forward step depends on
        for k in bits(forward):
            before[k] = reduce(or_, (before[j] for j in bits(after[k])), after[k])
        maker = {t: k for k in bits(forward) for t in writes[k]}
        rebuilds = [
            0 if forward >> k & 1 else reduce(or_, (before[m] | 1 << m for m in makers), 0)
            for k, makers in enumerate([[maker[t] for t in r if t in maker] for r in reads])
        ]
        own: dict[str, int] = {}
        for k, nodes in enumerate(self.runs):
            if (update := self.storage.update_of.get(nodes[-1])) is not None:
                own[update.candidate.param] = own.get(update.candidate.param, 0) | 1 << k
        values = self.training.graph.values
        for u in self.training.updates:
            name, k = u.candidate.param, self.step_of[u.apply_node]
            readers = users.get(u.value, 0) | users.get(values.get(name, u.value), 0)
            late = sum(1 << j for j, made in enumerate(rebuilds) if made & readers & forward)
            after[k] |= (readers | late) & ~own[name]

    def _over(
        self, k: int, node: Node, tensor: Mapping[Value, int], readers: Sequence[int]
    ) -> tuple[tuple[int, int], ...]:
        """Operands whose bytes the result may take over as in ``Storage``, and what runs before."""
        found: list[tuple[int, int]] = []
        if node.out not in tensor:
            return ()
        for i in inplace_operands(node):
            v = node.inputs[i] if i < len(node.inputs) else None
            if v is None or v not in tensor or v.type.stored != node.out.type.stored:
                continue
            if sum(x is v for x in node.operands()) > 1:
                continue
            others, producer = readers[tensor[v]] & ~(1 << k), self.root[v].producer
            made_once = producer is not None and producer.phase != "forward"
            if not others or (node.phase != "forward" and made_once):
                found.append((tensor[v], others))
        return tuple(found)
