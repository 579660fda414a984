"""The abstract machine of the checker: executes a plan on symbols instead of numbers.

Memory maps byte ranges to what they hold. What a range holds is a symbol ``(value, age)``: the age
of a tensor computed in this step is the micro-step that computed it, of an accumulator the gradients
in it, of a parameter or an optimizer tensor the updates applied to it. A write erases everything that
it overlaps; a read demands exactly the symbol, type and range that the training graph asks for.
So a stale, moved, half overwritten or too new operand can't pass, whatever the plan says about it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..ir.graph import Node, TensorType, Value
from ..ir.opdef import get_op
from .check_program import CheckError, Program, occupied
from .plan import Buffer, Step

Symbol = tuple[str, int]


@dataclass
class _Range:
    """Bytes ``begin..end`` and what they hold; a view holds several values at once."""

    begin: int
    end: int
    holds: dict[Symbol, TensorType] = field(default_factory=dict)


class Machine:
    """Executes one training step (several micro-steps) of a plan symbolically.

    Attributes:
        recomputed: Values that were computed again.
        paged: Values that were paged in.
    """

    def __init__(self, program: Program) -> None:
        """A machine in the state between two training steps."""
        self.program = program
        self.recomputed: set[str] = set()
        self.paged: set[str] = set()
        # Three micro-steps stand for any number: the first, one in the middle, the last.
        self._micro_steps = min(program.plan.training.micro_batches, 3)
        self._memory: dict[str, list[_Range]] = {"arena": [], "state": [], "storage": []}
        self._micro = 0
        self._done: set[Node] = set()
        for b in program.plan.buffers:
            if b.space == "state":
                self._write(b, (b.value, 0))

    def run(self) -> None:
        """Execute a training step.

        Raises:
            CheckError: A step breaks a rule; the message names it.
        """
        p = self.program
        for self._micro in range(self._micro_steps):
            self._memory["arena"], self._memory["storage"], self._done = [], [], set()
            for b in p.plan.buffers:
                if b.space == "arena" and b.value == p.training.sample.name and not self._written(b):
                    self._write(b, (b.value, self._micro))
            for index, step in enumerate(p.plan.steps):
                if not step.last_micro or self._micro == self._micro_steps - 1:
                    self._step(index, step)
            for v in p.training.graph.outputs:
                if v.producer not in self._done and v.producer is not None:
                    raise CheckError(f"output {v.name} is never computed")
        self._closed()

    def _written(self, b: Buffer) -> bool:
        return any(b.id in s.writes for s in self.program.plan.steps)

    def _closed(self) -> None:
        """Every chosen parameter has been updated once, every accumulator is empty again."""
        for b in self.program.plan.buffers:
            if b.space != "state":
                continue
            want = 0 if self.program.resident[b.value] == "accumulators" else 1
            held = self._find(b)
            if held is None or (b.value, want) not in held.holds:
                raise CheckError(
                    f"buffer {b.id} ({b.value}): one training step must update it exactly once,"
                    f" but it holds {self._describe(held)}"
                )

    def _step(self, index: int, step: Step) -> None:
        if step.kind in ("page_out", "page_in"):
            self._page(index, step)
        elif step.kind == "compute":
            self._compute(index, step)
        elif step.kind == "update":
            self._update(index, step)
        else:
            raise CheckError(f"{self._where(index)}: {step.kind} needs a second precision, all is f32")

    # ---- the kinds of steps

    def _page(self, index: int, step: Step) -> None:
        where = self._where(index)
        if step.nodes or step.workspace or step.tile or step.tile_rows or step.recompute or step.last_micro:
            raise CheckError(f"{where}: a {step.kind} step only moves one buffer")
        if len(step.reads) != 1 or len(step.writes) != 1 or step.reads[0] is None:
            raise CheckError(f"{where}: a {step.kind} step reads one buffer and writes one")
        source = self.program.buffer(index, step.reads[0])
        target = self.program.buffer(index, step.writes[0])
        spaces = ("arena", "storage") if step.kind == "page_out" else ("storage", "arena")
        if (source.space, target.space) != spaces:
            raise CheckError(f"{where}: moves from {source.space} to {target.space}, not {spaces[0]} to {spaces[1]}")
        if source.value != target.value:
            raise CheckError(f"{where}: buffer {target.id} is for {target.value}, not {source.value}")
        self._read(index, source, self.program.training.graph.values[source.value])
        self._write(target, (target.value, self._micro))
        if step.kind == "page_in":
            self.paged.add(target.value)

    def _compute(self, index: int, step: Step) -> None:
        where = self._where(index)
        nodes = self.program.step_nodes(index)
        if len(nodes) != 1 or step.tile or step.tile_rows or step.last_micro:
            raise CheckError(f"{where}: a compute step runs one node, without tile, in every micro-step")
        (node,) = nodes
        if node.phase == "update":
            raise CheckError(f"{where}: {node.op} changes state and needs an update step")
        self._once(index, step, node)
        reads = self._operands(index, step.reads, node.inputs)
        if len(step.writes) != len(node.outputs):
            raise CheckError(f"{where}: writes {len(step.writes)} buffers, {node.op} has {len(node.outputs)} results")
        results = [self.program.buffer(index, b) for b in step.writes]
        for b, v in zip(results, node.outputs, strict=True):
            if b.value != v.name:
                raise CheckError(f"{where}: buffer {b.id} is for {b.value}, not for the result {v.name}")
            if b.space != "arena":
                raise CheckError(f"{where}: result {v.name} goes to space {b.space}, not to the arena")
        self._apart(index, node, step, reads, results)
        if get_op(node.op).view:
            self._view(reads[0][1], results[0])
            return
        if step.recompute:
            self.recomputed.update(b.value for b in results)
        self._scratch(index, step, nodes)
        for b in results:
            self._write(b, (b.value, self._micro))

    def _view(self, source: Buffer, result: Buffer) -> None:
        """Another name for the same bytes; paging or recomputing one is paging or recomputing both."""
        held = self._find(result)
        assert held is not None, result.id  # the operand was read at this very range
        held.holds[result.value, self._micro] = self.program.types[result.id]
        for values in (self.recomputed, self.paged):
            if source.value in values:
                values.add(result.value)

    def _update(self, index: int, step: Step) -> None:
        where, p = self._where(index), self.program
        nodes = p.step_nodes(index)
        if not 1 <= len(nodes) <= 2 or nodes[-1] not in p.update_of:
            raise CheckError(f"{where}: an update step ends with an apply or accumulate node")
        final = nodes[-1]
        update = p.update_of[final]
        applies = final is update.apply_node
        several = p.plan.training.micro_batches > 1
        if several and step.last_micro != applies:
            raise CheckError(
                f"{where}: last_micro is {step.last_micro}; with {p.plan.training.micro_batches} micro-batches"
                " gradients are accumulated in every micro-step and applied in the last one"
            )
        operands = list(final.inputs)
        if len(nodes) == 2:
            if nodes[0] is not update.grad_node or update.grad not in operands:
                raise CheckError(f"{where}: {nodes[0].name} is not the gradient of {update.value.name}")
            operands.remove(update.grad)
            operands = [*nodes[0].inputs, *operands]
            self._once(index, step, nodes[0])
        if final in self._done:
            raise CheckError(f"{where}: {update.value.name} is updated twice")
        if step.recompute and len(nodes) == 1:
            raise CheckError(f"{where}: marked as recompute, but an update runs once")
        self._done.add(final)
        reads = self._operands(index, step.reads, tuple(operands))
        self._tile(index, step, nodes)
        self._scratch(index, step, nodes)
        self._apart(index, final, step, reads, [])
        changed = (update.value, *update.states) if applies else (update.accumulator,)
        written = [p.buffer(index, b) for b in step.writes]
        if [b.value for b in written] != [v.name for v in changed if v is not None]:
            raise CheckError(f"{where}: writes {[b.value for b in written]}, must write {[v.name for v in changed if v]}")
        for b in written:
            if b.space != "state":
                raise CheckError(f"{where}: {b.value} is in space {b.space}, not in the state")
            self._write(b, (b.value, 1 if applies else self._micro + 1))
        if applies and update.accumulator is not None:
            (b,) = (b for b in p.plan.buffers if b.space == "state" and b.value == update.accumulator.name)
            self._write(b, (b.value, 0))

    # ---- rules

    def _once(self, index: int, step: Step, node: Node) -> None:
        again = node in self._done
        if again and get_op(node.op).stateful:
            raise CheckError(f"{self._where(index)}: {node.op} has run before; it must run once per step")
        if again != step.recompute:
            raise CheckError(
                f"{self._where(index)}: recompute is {step.recompute}, but {node.name} has"
                f" {'' if again else 'not '}run before"
            )
        self._done.add(node)

    def _operands(
        self, index: int, names: tuple[str | None, ...], values: tuple[Value | None, ...]
    ) -> list[tuple[int, Buffer]]:
        if len(names) != len(values):
            raise CheckError(f"{self._where(index)}: reads {len(names)} operands, needs {len(values)}")
        reads = []
        for k, (name, v) in enumerate(zip(names, values, strict=True)):
            if (name is None) != (v is None):
                raise CheckError(f"{self._where(index)}: operand {k} is {name}, the graph has {v}")
            if name is not None and v is not None:
                b = self.program.buffer(index, name)
                self._read(index, b, v)
                reads.append((k, b))
        return reads

    def _read(self, index: int, b: Buffer, value: Value) -> None:
        """Demand that the buffer holds the value, in the version that the graph means."""
        p, where = self.program, self._where(index)
        owner = p.update_of.get(value.producer) if value.producer is not None else None
        if (
            owner is not None
            and owner.accumulator is not None
            and value.producer is owner.accumulate_node
        ):
            # The sum that Accumulate returns is the accumulator itself.
            value, age = owner.accumulator, self._micro + 1
        elif value.name in p.resident:
            age = self._micro if p.resident[value.name] == "accumulators" else 0
        else:
            age = self._micro
        if b.value != value.name:
            raise CheckError(f"{where}: reads buffer {b.id}, which is for {b.value}, instead of {value.name}")
        if p.types[b.id] != value.type:
            raise CheckError(f"{where}: buffer {b.id} is {p.types[b.id]}, {value.name} is {value.type}")
        if b.space in ("flash", "io"):
            return  # read-only, and the program's resolution has placed them
        held = self._find(b)
        if held is None or held.holds.get((value.name, age)) != value.type:
            raise CheckError(
                f"{where}: reads {value.name} (version {age}) from {b.space} bytes {b.offset} to"
                f" {b.offset + b.bytes} (buffer {b.id}), which hold {self._describe(held)}"
            )

    def _apart(
        self, index: int, node: Node, step: Step, reads: list[tuple[int, Buffer]], results: list[Buffer]
    ) -> None:
        """Results, scratch and operands of a step may not touch, in-place results apart."""
        definition = get_op(node.op)
        scratch = [self.program.buffer(index, b) for b in (step.workspace, step.tile) if b is not None]
        for k, out in enumerate([*results, *scratch]):
            for other in [*results, *scratch][:k]:
                if _touch(out, other):
                    raise CheckError(f"{self._where(index)}: buffers {out.id} and {other.id} overlap")
            for position, source in reads:
                same_type = self.program.types[out.id] == self.program.types[source.id]
                allowed = (
                    k == 0
                    and bool(results)
                    and _same_range(out, source)
                    and (
                        (definition.view and position == 0)
                        or (position in definition.inplace and same_type)
                    )
                )
                if _touch(out, source) and not allowed:
                    raise CheckError(
                        f"{self._where(index)}: buffer {out.id} (bytes {out.offset} to {out.offset + out.bytes})"
                        f" overwrites operand {position}, {source.id}, and {node.op} does not work in place there"
                    )
        if definition.view and not (reads and _same_range(results[0], reads[0][1])):
            raise CheckError(f"{self._where(index)}: a view must lie where its operand lies")

    def _tile(self, index: int, step: Step, nodes: list[Node]) -> None:
        """A fused gradient goes through a tile of whole rows that covers all rows."""
        where = self._where(index)
        if len(nodes) == 1:
            if step.tile or step.tile_rows:
                raise CheckError(f"{where}: has a tile but no gradient to stream")
            return
        t = nodes[0].out.type
        rows = t.shape[0] if t.shape else 1
        if not 1 <= step.tile_rows <= rows:
            raise CheckError(f"{where}: tile_rows is {step.tile_rows}, the gradient has {rows} rows")
        if step.tile_rows < rows and get_op(nodes[0].op).rows_kernel is None:
            raise CheckError(f"{where}: {nodes[0].op} can't be streamed in rows")
        if step.tile is None:
            raise CheckError(f"{where}: a gradient and its use need a tile buffer")
        b = self.program.buffer(index, step.tile)
        need = t.nbytes // rows * step.tile_rows
        if b.space != "arena" or b.value != f"tile:{nodes[0].name}" or b.bytes != need:
            raise CheckError(
                f"{where}: tile {b.id} is {b.value} of {b.bytes} B in {b.space}, but {step.tile_rows}"
                f" rows of {nodes[0].name} take {need} B of the arena"
            )
        self._erase(b)

    def _scratch(self, index: int, step: Step, nodes: list[Node]) -> None:
        need = max(get_op(n.op).workspace(n) for n in nodes)
        if step.workspace is None:
            if need:
                raise CheckError(f"{self._where(index)}: needs a workspace of {need} B")
            return
        b = self.program.buffer(index, step.workspace)
        if b.space != "arena" or b.bytes != need or b.value not in {f"workspace:{n.name}" for n in nodes}:
            raise CheckError(
                f"{self._where(index)}: workspace {b.id} is {b.value} of {b.bytes} B in {b.space}, needs {need} B"
            )
        self._erase(b)

    # ---- memory

    def _find(self, b: Buffer) -> _Range | None:
        for r in self._memory.get(b.space, ()):
            if r.begin == b.offset and r.end == b.offset + b.bytes:
                return r
        return None

    def _erase(self, b: Buffer) -> None:
        begin, end = b.offset, b.offset + occupied(b.bytes)
        self._memory[b.space] = [r for r in self._memory[b.space] if r.end <= begin or end <= r.begin]

    def _write(self, b: Buffer, symbol: Symbol) -> None:
        self._erase(b)
        self._memory[b.space].append(_Range(b.offset, b.offset + b.bytes, {symbol: self.program.types[b.id]}))

    def _where(self, index: int) -> str:
        return self.program.where(index)

    @staticmethod
    def _describe(r: _Range | None) -> str:
        if r is None:
            return "nothing whole"
        return " and ".join(f"{name} (version {age})" for name, age in r.holds)


def _touch(a: Buffer, b: Buffer) -> bool:
    return (
        a.space == b.space
        and a.space not in ("flash", "io")
        and a.offset < b.offset + occupied(b.bytes)
        and b.offset < a.offset + occupied(a.bytes)
    )


def _same_range(a: Buffer, b: Buffer) -> bool:
    return (a.space, a.offset, a.bytes) == (b.space, b.offset, b.bytes)
