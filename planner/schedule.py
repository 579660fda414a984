"""From decisions to a straight-line program: steps, buffers, lifetimes, offsets.

Residency is not taken from the solver: it follows from which steps run. Every write opens a buffer;
views and in-place results continue the block of bytes of their operand; a block lives from its
first write to its last read.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..ir.graph import Node, TensorType, Value
from ..ir.opdef import get_op
from ..ir.training import Update
from .layout import Block, arena_bytes, live_bytes, place
from .plan import Action, Buffer, Space, Step
from .problem import ALWAYS, Problem, Slot
from .solution import Solution
from .tensors import Tensor, aligned


@dataclass
class _Stay:
    """A buffer under construction; ``block`` is the run of bytes it is part of."""

    id: str
    value: str
    type: TensorType
    block: int
    first: int
    last: int


@dataclass
class _Bytes:
    size: int
    first: int
    last: int


@dataclass(frozen=True)
class Schedule:
    """Steps and placed buffers of one micro-step.

    Attributes:
        steps: In order.
        buffers: Of all spaces, placed.
        arena_bytes: Size of the arena.
        state_bytes: Size of the state space.
        storage_bytes: Size of the paged space.
        live: Live aligned arena bytes at each step.
        cycles: Cycles of a training step (all micro-steps), page transfers included.
        transfer_cycles: Part of ``cycles`` that is page transfers.
        actions: Forward tensor name -> keep, recompute or page, for those that backward reads.
    """

    steps: tuple[Step, ...]
    buffers: tuple[Buffer, ...]
    arena_bytes: int
    state_bytes: int
    storage_bytes: int
    live: tuple[int, ...]
    cycles: int
    transfer_cycles: int
    actions: dict[str, tuple[int, Action]]


def realize(problem: Problem, solution: Solution, *, seed: int = 0) -> Schedule:
    """Turn the decisions of a specialised problem (all updates fixed) into a placed schedule."""
    return _Realizer(problem, solution).run(seed)


@dataclass
class _Realizer:
    problem: Problem
    solution: Solution
    steps: list[Step] = field(default_factory=list)
    stays: list[_Stay] = field(default_factory=list)
    blocks: list[_Bytes] = field(default_factory=list)
    current: dict[Value, _Stay] = field(default_factory=dict)
    ids: set[str] = field(default_factory=set)
    ran: set[Node] = field(default_factory=set)
    stored: dict[Tensor, str] = field(default_factory=dict)
    extra: list[Buffer] = field(default_factory=list)
    transfer: int = 0
    storage_top: int = 0
    repeated: set[Node] = field(default_factory=set)
    loaded: set[Tensor] = field(default_factory=set)
    read_late: dict[Tensor, None] = field(default_factory=dict)

    def run(self, seed: int) -> Schedule:
        p = self.problem
        self.storage = p.storage
        self._fixed_buffers()
        paged = {t for t, _ in self.solution.loads}
        loads: dict[int, list[int]] = {}
        for t, k in sorted(self.solution.loads):
            loads.setdefault(k, []).append(t)
        sample = p.training.sample
        self._open(sample, 0, None)
        self._views(None)
        self._page_out_if(self.storage.of[sample], None, paged)
        for slot in p.slots:
            for t in loads.get(slot.index, ()):
                self._page_in(self.storage.tensors[t])
            if slot.activity == ALWAYS or slot.activity in self.solution.active:
                self._run_slot(slot)
                self._views(slot.node)
                for tensor in slot.writes:
                    self._page_out_if(tensor, slot.node, paged)
        last = len(self.steps) - 1
        loss = self.current[p.training.loss]
        loss.last = last
        self.blocks[loss.block].last = last
        return self._place(seed)

    # -- steps ------------------------------------------------------------------------------------

    def _run_slot(self, slot: Slot) -> None:
        k = len(self.steps)
        node = slot.node
        if slot.update is not None:
            self._update_step(slot, slot.update)
            return
        if node.phase in ("backward", "update"):
            self._note_late_reads(node)
        if node in self.ran:
            self.repeated.add(node)
        reads = [self._read(v, k) for v in node.inputs]
        writes = [self._write(node, v, k) for v in node.outputs]
        self.steps.append(
            Step(
                kind="compute",
                nodes=(node.name,),
                reads=tuple(reads),
                writes=tuple(writes),
                workspace=self._scratch("workspace", node, get_op(node.op).workspace(node), k),
                recompute=node in self.ran,
                cycles=self.problem.cost.node_cycles(node),
            )
        )
        self.ran.add(node)

    def _update_step(self, slot: Slot, update: Update) -> None:
        k = len(self.steps)
        accumulate = update.accumulate_node is not None and not slot.last_micro
        consumer = update.accumulate_node if accumulate else update.apply_node
        assert consumer is not None
        nodes = [consumer]
        operands: list[Value | None] = list(consumer.inputs)
        tile, workspace, rows = None, None, 0
        if slot.last_micro:
            assert update.accumulator is not None
            assert update.accumulate_node is not None
            operands = [
                update.accumulator if v is update.accumulate_node.out else v for v in operands
            ]
        elif update.grad_node is not None:
            grad = update.grad_node
            nodes.insert(0, grad)
            operands = [*grad.inputs, *(v for v in operands if v is not update.grad)]
            tile = self._scratch("tile", grad, update.tile_bytes, k)
            workspace = self._scratch("workspace", grad, get_op(grad.op).workspace(grad), k)
            rows = update.tile_rows
        for n in nodes:
            self._note_late_reads(n)
        if accumulate:
            assert update.accumulator is not None
            writes = [update.accumulator]
        else:
            writes = [update.value, *update.states]
        cost = self.problem.cost
        self.steps.append(
            Step(
                kind="update",
                nodes=tuple(n.name for n in nodes),
                reads=tuple(self._read(v, k) for v in operands),
                writes=tuple(v.name for v in writes),
                workspace=workspace,
                tile=tile,
                tile_rows=rows,
                last_micro=slot.last_micro,
                cycles=cost.node_cycles(consumer)
                if slot.last_micro
                else cost.update_cycles(update),
            )
        )

    def _note_late_reads(self, node: Node) -> None:
        for v in node.operands():
            t = self.storage.of.get(v)
            if t is not None and all(w.phase == "forward" for w in t.writers):
                self.read_late[t] = None

    def _views(self, node: Node | None) -> None:
        for view in self.storage.followers.get(node, ()):
            k = len(self.steps)
            source = view.inputs[0]
            reads = self._read(source, k)
            write = self._write(view, view.out, k)
            self.steps.append(
                Step(
                    kind="compute",
                    nodes=(view.name,),
                    reads=(reads,),
                    writes=(write,),
                    recompute=view in self.ran,
                )
            )
            self.ran.add(view)

    def _paged_value(self, tensor: Tensor) -> Value:
        """The value whose bytes the finished tensor holds; views of it are shown again from it."""
        return tensor.writers[-1].out if tensor.writers else self.problem.training.sample

    def _page_out_if(self, tensor: Tensor, writer: Node | None, paged: set[int]) -> None:
        complete = tensor.writers[-1] if tensor.writers else None
        if tensor.index not in paged or tensor in self.stored or complete is not writer:
            return
        k = len(self.steps)
        value = self._paged_value(tensor)
        source = self._read(value, k)
        assert source is not None
        name = f"{value.name}@storage"
        self.stored[tensor] = name
        self.extra.append(
            Buffer(
                id=name, value=value.name, space="storage", dtype=value.type.dtype,
                shape=value.type.shape, bytes=value.type.nbytes, offset=self.storage_top,
                first=k, last=k,
            )
        )  # fmt: skip
        self.storage_top += tensor.bytes
        cycles = self.problem.cost.write_cycles(tensor.bytes)
        self.transfer += cycles
        self.steps.append(Step(kind="page_out", reads=(source,), writes=(name,), cycles=cycles))

    def _page_in(self, tensor: Tensor) -> None:
        k = len(self.steps)
        value = self._paged_value(tensor)
        stay = self._open(value, k, None)
        self.loaded.add(tensor)
        name = self.stored[tensor]
        self.extra = [b.model_copy(update={"last": k}) if b.id == name else b for b in self.extra]
        cycles = self.problem.cost.read_cycles(tensor.bytes)
        self.transfer += cycles
        self.steps.append(Step(kind="page_in", reads=(name,), writes=(stay.id,), cycles=cycles))
        self._views(tensor.writers[-1] if tensor.writers else None)

    # -- buffers ----------------------------------------------------------------------------------

    def _fixed_buffers(self) -> None:
        training = self.problem.training
        self.state_top = 0
        self.fixed: list[tuple[str, Value, Space, int]] = []
        for v in self.storage.space:
            if v.producer is None and self.storage.space[v] in ("flash", "io"):
                self.fixed.append((v.name, v, self.storage.space[v], 0))
                self.ids.add(v.name)
        for u in training.updates:
            for v in (u.value, *u.states, *((u.accumulator,) if u.accumulator else ())):
                self.fixed.append((v.name, v, "state", self.state_top))
                self.ids.add(v.name)
                self.state_top += aligned(v.type.nbytes)

    def _unique(self, name: str, step: int) -> str:
        if name in self.ids:
            name = f"{name}@{step}"
        self.ids.add(name)
        return name

    def _open(self, value: Value, step: int, continues: _Stay | None) -> _Stay:
        if continues is None:
            self.blocks.append(_Bytes(self.storage.of[value].bytes, step, step))
            block = len(self.blocks) - 1
        else:
            block = continues.block
        stay = _Stay(self._unique(value.name, step), value.name, value.type, block, step, step)
        self.stays.append(stay)
        self.current[value] = stay
        return stay

    def _read(self, value: Value | None, step: int) -> str | None:
        if value is None:
            return None
        if value not in self.storage.of:
            return value.name
        stay = self.current[value]
        stay.last = step
        self.blocks[stay.block].last = max(self.blocks[stay.block].last, step)
        return stay.id

    def _write(self, node: Node, value: Value, step: int) -> str:
        source = self.storage.aliases.get(value)
        stay = self._open(value, step, None if source is None else self.current[source])
        block = self.blocks[stay.block]
        block.last = max(block.last, step)
        return stay.id

    def _scratch(self, kind: str, node: Node, size: int, step: int) -> str | None:
        if size == 0:
            return None
        name = self._unique(f"{kind}:{node.name}", step)
        self.blocks.append(_Bytes(aligned(size), step, step))
        self.stays.append(
            _Stay(name, f"{kind}:{node.name}", TensorType((size,), "u8"), len(self.blocks) - 1,
                  step, step)
        )  # fmt: skip
        return name

    # -- layout -----------------------------------------------------------------------------------

    def _place(self, seed: int) -> Schedule:
        n = len(self.steps)
        blocks = [Block(b.size, b.first, b.last) for b in self.blocks]
        offsets = place(blocks, n, seed=seed)
        buffers = [
            Buffer(
                id=name, value=v.name, space=space, dtype=v.type.dtype, shape=v.type.shape,
                bytes=v.type.nbytes, offset=offset, first=0, last=n - 1,
            )
            for name, v, space, offset in self.fixed
        ]  # fmt: skip
        buffers += [
            Buffer(
                id=s.id, value=s.value, space="arena", dtype=s.type.dtype, shape=s.type.shape,
                bytes=s.type.nbytes, offset=offsets[s.block], first=s.first, last=s.last,
            )
            for s in self.stays
        ]  # fmt: skip
        micro = self.problem.micro_batches
        cycles = sum(s.cycles * (1 if s.last_micro else micro) for s in self.steps)
        return Schedule(
            tuple(self.steps),
            (*buffers, *self.extra),
            arena_bytes(blocks, offsets),
            self.state_top,
            self.storage_top,
            tuple(live_bytes(blocks, n)),
            cycles,
            self.transfer * micro,
            {self._paged_value(t).name: (t.bytes, self._action(t)) for t in self.read_late},
        )

    def _action(self, tensor: Tensor) -> Action:
        if tensor in self.loaded:
            return "page"
        if any(w in self.repeated for w in tensor.writers):
            return "recompute"
        return "keep"
