"""From decisions to a straight-line program: steps, buffers, lifetimes, offsets.

Residency is not taken from the solver: it follows from which steps run (``planner.stays``). Where
page transfers run beside the core, the program is made twice: with every transfer waited for at
once, which tells where it may run, and then with the places that ``planner.transfers`` finds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from ..ir.graph import Node, Value
from ..ir.opdef import get_op
from ..ir.training import Update
from .blocks import arena_bytes, live_bytes, peak_bytes
from .layout import place
from .placement import extra_cycles, place_all, touches, traffic
from .plan import Action, Buffer, RegionClaim, Step, StepKind
from .problem import Limits, Problem, Slot
from .solution import Solution
from .stays import Stays
from .tensors import Tensor
from .transfers import Hiding, Placement, Transfer, order, run, synchronous

#: Layouts tried with transfers that overlap, each with less RAM for them.
HIDING_TRIES = 3
#: Work of a search for a layout, in seconds; see ``planner.layout``.
QUICK_S, THOROUGH_S = 0.2, 5.0
#: Blocks beyond which best fit alone comes first: a short search takes seconds then.
MANY_BLOCKS = 1000


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
        cycles: Cycles of a training step (all micro-steps), waits for page transfers included.
        transfer_cycles: Cycles of a training step in which a page transfer is under way.
        worn_bytes: Of storage, per training step.
        actions: Forward tensor name -> keep, recompute or page, for those that backward reads.
        regions: What each RAM region holds, where there are several; empty if the buffers did not
            find room in them: then they lie in one large region instead.
        missing_bytes: What one of several regions lacks then; an estimate.
    """

    steps: tuple[Step, ...]
    buffers: tuple[Buffer, ...]
    arena_bytes: int
    state_bytes: int
    storage_bytes: int
    live: tuple[int, ...]
    cycles: int
    transfer_cycles: int
    worn_bytes: int
    actions: dict[str, tuple[int, Action]]
    regions: tuple[RegionClaim, ...] = ()
    missing_bytes: int = 0

    def over_bytes(self, limits: Limits) -> int:
        """Bytes of RAM beyond the budget; 0 or less if it is kept."""
        if limits.regions:
            return self.missing_bytes
        return self.arena_bytes + self.state_bytes - limits.ram_bytes


def realize(
    problem: Problem,
    solution: Solution,
    *,
    seed: int = 0,
    enough_bytes: int | None = None,
    quick: bool = False,
    hide_within: Limits | None = None,
) -> Schedule:
    """Turn the decisions of a specialised problem (all updates fixed) into a placed schedule.

    Args:
        problem: The problem.
        solution: Decisions about it.
        seed: Of the search for a layout.
        enough_bytes: With this RAM no long search follows a short one; None: it always does.
        quick: None follows in any case.
        hide_within: With the RAM, state included, that transfers beside the core may take; None:
            no more than the schedule needs anyway.
    """
    plain = _Realizer(problem, solution).built()
    if not problem.cost.overlaps or not plain.transfers:
        return plain.placed(seed, enough_bytes, quick)
    moves = plain.moves()
    room = max(moves.live)
    if hide_within is not None:
        room = hide_within.ram_bytes - plain.stays.state_bytes
    for attempt in range(HIDING_TRIES):
        places = Hiding(moves.micro_steps, moves.transfers, moves.live, room).place()
        found = _Realizer(problem, solution, plain, places).built()
        schedule = found.placed(seed, enough_bytes, quick or attempt > 0)
        over = 0 if hide_within is None else schedule.over_bytes(hide_within)
        if over <= 0:
            return schedule
        room -= over
    places = synchronous(plain.transfers)
    return _Realizer(problem, solution, plain, places).built().placed(seed, enough_bytes, quick)


@dataclass(frozen=True)
class Moves:
    """The transfers of a schedule, and the steps that compute, which they may run beside.

    Attributes:
        transfers: By the position where they are needed.
        live: Arena bytes of each of these steps where every transfer is waited for at once.
        micro_steps: How often there is which micro-step: cycles of each of these steps.
    """

    transfers: tuple[Transfer, ...]
    live: tuple[int, ...]
    micro_steps: tuple[tuple[int, list[int]], ...]


def moves_of(problem: Problem, solution: Solution) -> Moves:
    """What ``realize`` places the transfers of."""
    return _Realizer(problem, solution).built().moves()


@dataclass
class _Realizer:
    """One pass over the timeline.

    Attributes:
        problem: What is decided.
        solution: The decisions.
        plain: The pass with transfers that are waited for at once; None: this is it.
        places: Where transfers run.
        transfers: All transfers, by the position where they are needed.
    """

    problem: Problem
    solution: Solution
    plain: _Realizer | None = None
    places: Placement = ()
    transfers: list[Transfer] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    ran: set[Node] = field(default_factory=set)
    stored: dict[Tensor, str] = field(default_factory=dict)
    extra: list[Buffer] = field(default_factory=list)
    storage_top: int = 0
    repeated: set[Node] = field(default_factory=set)
    loaded: set[Tensor] = field(default_factory=set)
    read_late: dict[Tensor, None] = field(default_factory=dict)
    computed: int = 0
    touched: dict[Tensor, int] = field(default_factory=dict)
    paged_until: dict[Tensor, tuple[int, int]] = field(default_factory=dict)
    targets: dict[int, str] = field(default_factory=dict)
    waits: dict[int, int] = field(default_factory=dict)

    def built(self) -> _Realizer:
        """All steps."""
        p = self.problem
        self.storage = p.storage
        self.stays = Stays(p.storage)
        for tensor in (t for t in p.storage.tensors if t.state):
            self.stored[tensor] = f"{tensor.name}@storage"
            self._store(tensor)
        homes = {b.id for b in self.extra}
        self.pending = self._pending()
        needed = self.solution.read_loads(p)
        paged = {t for t, _ in needed}
        loads: dict[int, list[int]] = {}
        for t, k in sorted(needed):
            loads.setdefault(k, []).append(t)
        for v in p.training.samples:
            self.stays.open(v, 0)
        for v in p.training.samples:
            self._views(v)
            self._page_out_if(self.storage.of[v], None, paged)
        for slot in p.slots:
            for t in loads.get(slot.index, ()):
                self._page_in(self.storage.tensors[t])
            if self.solution.runs(slot):
                self._run_slot(slot)
                self._views(slot.node)
                for tensor in slot.writes:
                    self._page_out_if(tensor, slot.node, paged)
        self._move()
        self.stays.hold(p.training.loss, len(self.steps) - 1)
        for name in homes:
            self._keep_stored(name, len(self.steps) - 1)
        until = {t.index: ends for t, ends in self.paged_until.items()}
        for i, moved in enumerate(self.transfers):
            if moved.out:  # of state, until the end
                free, latest = until.get(moved.tensor, (moved.home, self.computed))
                self.transfers[i] = replace(moved, free=free, latest=latest)
        return self

    # -- steps ------------------------------------------------------------------------------------

    def _computes(self, reads: Iterable[Value | None], writes: Iterable[Value] = ()) -> int:
        """The next step computes; where it stands, behind transfers that are due."""
        self._move()
        written = [t for v in writes if (t := self.storage.of.get(v)) is not None]
        read = [t for v in reads if v is not None and (t := self.storage.of.get(v)) is not None]
        for t in written:
            self._ends(t)
        self.computed += 1
        self.touched |= dict.fromkeys((*read, *written), self.computed)
        return len(self.steps)

    def _ends(self, tensor: Tensor) -> None:
        """Another stay of a tensor begins: note when the one that was paged out was over."""
        if tensor in self.stored and tensor not in self.paged_until:
            self.paged_until[tensor] = (self.touched.get(tensor, 0), self.computed)

    def _run_slot(self, slot: Slot) -> None:
        node = slot.node
        if slot.update is not None:
            self._update_step(slot, slot.update)
            return
        if node.phase in ("backward", "update"):
            self._note_late_reads(node)
        if node in self.ran:
            self.repeated.add(node)
        k = self._computes(node.inputs, node.outputs)
        reads = [self.stays.read(v, k) for v in node.inputs]
        writes = [self.stays.write(v, k) for v in node.outputs]
        self.steps.append(
            Step(
                kind="compute",
                nodes=(node.name,),
                reads=tuple(reads),
                writes=tuple(writes),
                workspace=self.stays.scratch("workspace", node, get_op(node.op).workspace(node), k),
                recompute=node in self.ran,
                cycles=self.problem.cost.node_cycles(node),
            )
        )
        self.ran.add(node)

    def _update_step(self, slot: Slot, update: Update) -> None:
        accumulate = update.accumulate_node is not None and not slot.last_micro
        consumer = update.accumulate_node if accumulate else update.apply_node
        assert consumer is not None
        nodes = [consumer]
        operands: list[Value | None] = list(consumer.inputs)
        tile, workspace, rows = None, None, 0
        grad = None if slot.last_micro else update.grad_node
        states = () if accumulate else update.paged
        if states:
            self._move()
        for v in states:
            self._state_in(v, last_micro=slot.last_micro)
        k = self._computes((*operands, *(() if grad is None else grad.inputs)))
        if slot.last_micro:
            assert update.accumulator is not None
            assert update.accumulate_node is not None
            operands = [
                update.accumulator if v is update.accumulate_node.out else v for v in operands
            ]
        elif grad is not None:
            nodes.insert(0, grad)
            operands = [*grad.inputs, *(v for v in operands if v is not update.grad)]
            tile = self.stays.scratch("tile", grad, update.tile_bytes, k)
            workspace = self.stays.scratch("workspace", grad, get_op(grad.op).workspace(grad), k)
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
                reads=tuple(self.stays.read(v, k) for v in operands),
                writes=tuple(self._written(v, k) for v in writes),
                workspace=workspace,
                tile=tile,
                tile_rows=rows,
                last_micro=slot.last_micro,
                cycles=cost.node_cycles(consumer)
                if slot.last_micro
                else cost.update_cycles(update),
            )
        )
        for v in states:
            self._state_out(v, last_micro=slot.last_micro)

    def _written(self, value: Value, step: int) -> str:
        """The buffer of the state that an update changes in place."""
        name = self.stays.read(value, step)
        assert name is not None
        return name

    # A state tensor is transferred as others are, from and to a place in storage that is its own.

    def _state_in(self, value: Value, *, last_micro: bool) -> None:
        tensor = self.storage.of[value]
        if self.plain is None:
            cycles, at = self.problem.cost.read_cycles(tensor.bytes), self.computed
            self.transfers.append(
                Transfer(tensor.index, False, cycles, tensor.bytes, at, 0, at, last_micro)
            )
            self._start_in(tensor, cycles, last_micro=last_micro)

    def _state_out(self, value: Value, *, last_micro: bool) -> None:
        tensor = self.storage.of[value]
        if self.plain is None:
            cycles, at = self.problem.cost.write_cycles(tensor.bytes), self.computed
            self.transfers.append(
                Transfer(tensor.index, True, cycles, tensor.bytes, at, at, at, last_micro)
            )
            self._start_out(tensor, cycles, last_micro=last_micro)

    def _note_late_reads(self, node: Node) -> None:
        for v in node.operands():
            t = self.storage.of.get(v)
            if t is not None and t.is_forward:
                self.read_late[t] = None

    def _views(self, source: Node | Value) -> None:
        for view in self.storage.followers.get(source, ()):
            k = self._computes(view.inputs, view.outputs)
            reads = self.stays.read(view.inputs[0], k)
            write = self.stays.write(view.out, k)
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
        if tensor.state:
            return tensor.values[0]
        return tensor.writers[-1].out if tensor.writers else tensor.values[0]

    def _page_out_if(self, tensor: Tensor, writer: Node | None, paged: set[int]) -> None:
        complete = tensor.writers[-1] if tensor.writers else None
        if tensor.index not in paged or tensor in self.stored or complete is not writer:
            return
        self.stored[tensor] = f"{self._paged_value(tensor).name}@storage"
        if self.plain is None:
            cycles = self.problem.cost.write_cycles(tensor.bytes)
            at = self.computed
            self.transfers.append(Transfer(tensor.index, True, cycles, tensor.bytes, at, at, at))
            self._start_out(tensor, cycles)

    def _start_out(
        self, tensor: Tensor, cycles: int, *, overlapped: bool = False, last_micro: bool = False
    ) -> None:
        source = self.stays.read(self._paged_value(tensor), len(self.steps))
        assert source is not None
        if not tensor.state:
            self._store(tensor)
        self._transfer("page_out", source, self.stored[tensor], cycles, overlapped, last_micro)

    def _store(self, tensor: Tensor) -> None:
        """Give a tensor a place in storage, from this step on."""
        k, value = len(self.steps), self._paged_value(tensor)
        self.extra.append(
            Buffer(
                id=self.stored[tensor], value=value.name, space="storage", dtype=value.type.dtype,
                shape=value.type.shape, bytes=value.type.nbytes, offset=self.storage_top,
                first=k, last=k,
            )
        )  # fmt: skip
        self.storage_top += self.problem.cost.stored_bytes(tensor.bytes)

    def _page_in(self, tensor: Tensor) -> None:
        if self.plain is None:
            cycles = self.problem.cost.read_cycles(tensor.bytes)
            at, dead = self.computed, self.touched.get(tensor, 0)
            self._ends(tensor)
            self.transfers.append(Transfer(tensor.index, False, cycles, tensor.bytes, at, dead, at))
            self._start_in(tensor, cycles)
        self._views(tensor.source)

    def _start_in(
        self, tensor: Tensor, cycles: int, *, overlapped: bool = False, last_micro: bool = False
    ) -> str:
        k, value = len(self.steps), self._paged_value(tensor)
        target = self.stays.open(value, k)
        self.loaded.add(tensor)
        name = self.stored[tensor]
        self._keep_stored(name, len(self.steps))
        self._transfer("page_in", name, target, cycles, overlapped, last_micro)
        return target

    def _transfer(
        self,
        kind: StepKind,
        source: str,
        target: str,
        cycles: int,
        overlapped: bool,
        last_micro: bool,
    ) -> None:
        self.steps.append(
            Step(
                kind=kind, reads=(source,), writes=(target,), overlapped=overlapped,
                last_micro=last_micro, cycles=0 if overlapped else cycles,
            )
        )  # fmt: skip

    def _keep_stored(self, name: str, k: int) -> None:
        self.extra = [b.model_copy(update={"last": k}) if b.id == name else b for b in self.extra]

    # -- transfers beside the core ----------------------------------------------------------------

    def _pending(self) -> list[tuple[int, int, bool]]:
        """Starts and waits that are still to come, the next one last."""
        if self.plain is None:
            return []
        return [*order(self.plain.transfers, self.places)][::-1]

    def _move(self) -> None:
        """Start and wait for what stands at this position."""
        while self.pending and self.pending[-1][0] <= self.computed:
            assert self.plain is not None
            _, i, starts = self.pending.pop()
            t = self.plain.transfers[i]
            tensor = self.storage.tensors[t.tensor]
            if not starts:
                self._wait(i, tensor)
            elif t.out:
                self._start_out(tensor, t.cycles, overlapped=True, last_micro=t.last_micro)
            else:
                self.targets[i] = self._start_in(
                    tensor, t.cycles, overlapped=True, last_micro=t.last_micro
                )

    def _wait(self, index: int, tensor: Tensor) -> None:
        k, stored, value = len(self.steps), self.stored[tensor], self._paged_value(tensor)
        self._keep_stored(stored, k)
        held = self.stays.read(value, k)
        reads = (stored, held) if index in self.targets else (held, stored)
        self.waits[k] = index
        assert self.plain is not None
        last_micro = self.plain.transfers[index].last_micro
        self.steps.append(Step(kind="page_wait", reads=reads, last_micro=last_micro))

    def moves(self) -> Moves:
        """Of the pass with transfers that are waited for at once."""
        live = live_bytes(self.stays.blocks(), len(self.steps))
        return Moves(
            tuple(self.transfers),
            tuple(n for n, s in zip(live, self.steps, strict=True) if s.nodes),
            self._micro_steps(),
        )

    def _micro_steps(self) -> tuple[tuple[int, list[int]], ...]:
        """How often there is which micro-step, the last one first: cycles of what computes."""
        steps = [s for s in self.steps if s.nodes]
        last = [s.cycles for s in steps]
        others = [0 if s.last_micro else s.cycles for s in steps]
        return (1, last), (self.problem.micro_batches - 1, others)

    def _clocked(self) -> int:
        """Let the clocks run: waits get their cycles; returns those of a training step."""
        if self.plain is None:
            micro = self.problem.micro_batches
            return sum(s.cycles * (1 if s.last_micro else micro) for s in self.steps)
        moved = self.plain.transfers
        clocks = [
            (n, run(cycles, moved, self.places, last=i == 0))
            for i, (n, cycles) in enumerate(self._micro_steps())
        ]
        for k, index in self.waits.items():
            waited = {"cycles": clocks[0][1].waits[index]}
            self.steps[k] = self.steps[k].model_copy(update=waited)
        return sum(n * c.cycles for n, c in clocks)

    # -- placed -----------------------------------------------------------------------------------

    def placed(self, seed: int, enough_bytes: int | None, quick: bool) -> Schedule:
        """The schedule, with addresses."""
        regions = self.problem.limits.regions
        if not regions:
            return self._in_one_region(seed, enough_bytes, quick)
        n = len(self.steps)
        found = self._in_regions(self.stays, seed, quick)
        if not isinstance(found, Schedule):
            room = sum(r.bytes for r in regions) - self.stays.state_bytes
            found = self._in_regions(self.stays.apart(n, room), seed, quick)
        if isinstance(found, Schedule):
            return found
        return replace(self._in_one_region(seed, None, quick=True), missing_bytes=found)

    def _in_regions(self, stays: Stays, seed: int, quick: bool) -> Schedule | int:
        """All buffers in several RAM regions, or the bytes that one of them lacks."""
        regions, micro = self.problem.limits.regions, self.problem.micro_batches
        shares = stays.in_ram()
        views = {v.name for v in self.problem.training.graph.nodes if get_op(v.op).view}
        # No kernel runs in views and transfers; transfers have times of their own.
        touched = [[] if views.issuperset(s.nodes) else touches(s, shares) for s in self.steps]
        times = [1 if s.last_micro else micro for s in self.steps]
        arena, state = stays.blocks(), stays.state_blocks(len(self.steps))
        placed = place_all(
            arena,
            state,
            traffic(touched, times, len(arena) + len(state)),
            regions,
            seconds=QUICK_S if quick else THOROUGH_S,
            seed=seed,
        )
        if isinstance(placed, int):
            return placed
        stays.move_state(placed.state)
        for k, (s, shared) in enumerate(zip(self.steps, touched, strict=True)):
            more = extra_cycles(shared, [regions[r] for r in placed.where])
            self.steps[k] = s.model_copy(update={"cycles": s.cycles + more})
        return replace(self._schedule(stays, placed.arena), regions=placed.regions)

    def _in_one_region(self, seed: int, enough_bytes: int | None, quick: bool) -> Schedule:
        n, stays = len(self.steps), self.stays
        blocks = stays.blocks()
        peak = peak_bytes(blocks)
        room = peak if enough_bytes is None else max(peak, enough_bytes - stays.state_bytes)
        short = QUICK_S if len(blocks) <= MANY_BLOCKS else 0.0
        offsets = place(blocks, n, exact_time_s=short, seed=seed)
        if arena_bytes(blocks, offsets) > room:
            other = stays.apart(n, room)
            elsewhere = place(other.blocks(), n, enough_bytes=room, exact_time_s=QUICK_S, seed=seed)
            if arena_bytes(other.blocks(), elsewhere) < arena_bytes(blocks, offsets):
                stays, blocks, offsets = other, other.blocks(), elsewhere
        if arena_bytes(blocks, offsets) > room and not quick:
            offsets = place(blocks, n, enough_bytes=room, exact_time_s=THOROUGH_S, seed=seed)
        return self._schedule(stays, offsets)

    def _schedule(self, stays: Stays, offsets: Sequence[int]) -> Schedule:
        n, blocks = len(self.steps), stays.blocks()
        buffers, cycles = stays.buffers(n, offsets), self._clocked()
        transfers = self.transfers if self.plain is None else self.plain.transfers
        micro, cost = self.problem.micro_batches, self.problem.cost

        def times(t: Transfer) -> int:
            return 1 if t.last_micro else micro

        return Schedule(
            tuple(self.steps),
            (*buffers, *self.extra),
            arena_bytes(blocks, offsets),
            stays.state_bytes,
            self.storage_top,
            tuple(live_bytes(blocks, n)),
            cycles,
            sum(times(t) * t.cycles for t in transfers),
            sum(times(t) * cost.worn_bytes(t.bytes) for t in transfers if t.out),
            {self._paged_value(t).name: (t.bytes, self._action(t)) for t in self.read_late},
        )

    def _action(self, tensor: Tensor) -> Action:
        if tensor in self.loaded:
            return "page"
        if any(w in self.repeated for w in tensor.writers):
            return "recompute"
        return "keep"
