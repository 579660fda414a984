"""The abstract machine of the checker: executes a plan on symbols instead of numbers.

A read demands exactly the symbol, type and range that the training graph asks for (see
``check_memory``). So a stale, moved, half overwritten or too new operand can't pass, whatever the
plan says about it.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..ir.graph import Node, Value
from ..ir.opdef import get_op
from ..ir.training import Update
from . import check_step
from .check_memory import MOVING, Symbol, SymbolicMemory
from .check_program import CheckError, Program
from .plan import Buffer, Step


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
        self._micro = 0
        self._memory = SymbolicMemory()
        self._done: set[Node] = set()
        # target of a transfer under way -> its source, and the version that it moves
        self._moving: dict[str, tuple[str, int]] = {}
        for b in program.plan.buffers:
            if b.space == "state" or b is program.home_of.get(b.value):
                self._write(b, (b.value, 0))

    def run(self) -> None:
        """Execute a training step.

        Raises:
            CheckError: A step breaks a rule; the message names it.
        """
        for micro in range(self._micro_steps):
            self._micro = micro
            self._micro_step(last=micro == self._micro_steps - 1)
        self._closed()

    def _begin(self) -> int:
        """Nothing is there but samples and state; returns the first step to run."""
        self._memory.forget("arena")
        self._memory.forget("storage", keep=self.program.home_of)
        self._done.clear()
        for b in self.program.given:
            self._write(b, (b.value, self._micro))
        return 0

    def _micro_step(self, *, last: bool) -> None:
        p, begin = self.program, self._begin()
        for index, step in enumerate(p.plan.steps):
            if index >= begin and (last or not step.last_micro):
                self._step(index, step)
        if self._moving:
            raise CheckError(f"the transfer to buffer {min(self._moving)} is never waited for")
        for v in p.training.graph.outputs:
            if v.producer is not None and v.producer not in self._done:
                raise CheckError(f"output {v.name} is never computed")
        self._loss_at_the_end()

    def _loss_at_the_end(self) -> None:
        """Back ends return the loss after the last step."""
        p, loss, last = self.program, self.program.training.loss, len(self.program.plan.steps) - 1
        for b in p.plan.buffers:
            if b.value == loss.name and b.space == "arena" and b.last == last:
                held = self._memory.at(b)
                if held is not None and (loss.name, self._micro) in held.holds:
                    return
        raise CheckError(f"{loss.name} must live until the last step, {last}, where it is returned")

    def _closed(self) -> None:
        """Every chosen parameter has been updated once, every accumulator is empty again."""
        for b in (*self.program.state_of.values(), *self.program.home_of.values()):
            want = 0 if self.program.resident.get(b.value) == "accumulators" else 1
            held = self._memory.at(b)
            if held is None or (b.value, want) not in held.holds:
                raise CheckError(
                    f"buffer {b.id} ({b.value}): one training step must update it exactly once,"
                    f" but it holds {held or 'nothing whole'}"
                )

    def _step(self, index: int, step: Step) -> None:
        if step.kind in ("page_out", "page_in"):
            self._page(index, step)
        elif step.kind == "page_wait":
            self._page_wait(index, step)
        elif step.overlapped:
            raise self.program.error(index, f"is overlapped, but {step.kind} moves nothing")
        elif step.kind == "compute":
            self._compute(index, step)
        elif step.kind == "update":
            self._update(index, step)
        else:
            raise self.program.error(index, f"{step.kind} needs a second precision, all is f32")

    def _page(self, index: int, step: Step) -> None:
        p = self.program
        plain = Step(
            kind=step.kind,
            reads=step.reads,
            writes=step.writes,
            last_micro=self._in_last_only(step),
            overlapped=step.overlapped,
            cycles=step.cycles,
        )
        if step != plain or len(step.reads) != 1 or len(step.writes) != 1 or step.reads[0] is None:
            raise p.error(index, "paging reads one buffer and writes one, and does nothing else")
        source, target = p.buffer(index, step.reads[0]), p.buffer(index, step.writes[0])
        spaces = ("arena", "storage") if step.kind == "page_out" else ("storage", "arena")
        if (source.space, target.space) != spaces:
            raise p.error(
                index,
                f"moves {source.value} from {source.space} to {target.space},"
                f" not from {spaces[0]} to {spaces[1]}",
            )
        if source.value != target.value:
            raise p.error(index, f"buffer {target.id} is for {target.value}, not {source.value}")
        age = self._age(index, source)
        if step.overlapped:
            # What is half moved is no value: nobody may read it before the wait.
            self._moving[target.id] = source.id, age
            self._write(target, (target.value, MOVING))
        else:
            self._write(target, (target.value, age))
        if step.kind == "page_in":
            self.paged.add(target.value)

    def _page_wait(self, index: int, step: Step) -> None:
        """The end of a transfer: its source has been left alone, and so has its target."""
        p = self.program
        last_micro = self._in_last_only(step)
        plain = Step(
            kind="page_wait", reads=step.reads, last_micro=last_micro, cycles=step.cycles
        )
        if step != plain or len(step.reads) != 2 or None in step.reads:
            raise p.error(index, "waiting reads source and target of a transfer, and nothing else")
        source, target = (p.buffer(index, str(b)) for b in step.reads)
        moving, age = self._moving.pop(target.id, ("", 0))
        if moving != source.id:
            raise p.error(index, f"no transfer from {source.id} to {target.id} is under way")
        if self._age(index, source) != age:
            raise p.error(index, f"{source.value} in {source.id} changed while it was moved")
        held = self._memory.at(target)
        if held is None or (target.value, MOVING) not in held.holds:
            raise p.error(
                index, f"buffer {target.id} was to be filled, but holds {held or 'nothing whole'}"
            )
        self._write(target, (target.value, age))

    def _in_last_only(self, step: Step) -> bool:
        """A transfer runs in the last micro-step only: one of state, where there are several."""
        moved = self.program.buffers.get(str(step.reads[0])) if step.reads else None
        several = self.program.plan.training.micro_batches > 1
        return several and moved is not None and moved.value in self.program.home_of

    def _age(self, index: int, source: Buffer) -> int:
        """The version that a transfer moves: state may be old or new, all else is of now."""
        held = self._memory.at(source)
        if source.value in self.program.home_of and held is not None:
            for age in (0, 1):
                if held.holds.get((source.value, age)) == self.program.types[source.id]:
                    return age
        self._read(index, source, self.program.training.graph.values[source.value])
        return self._micro

    def _compute(self, index: int, step: Step) -> None:
        p, nodes = self.program, self.program.step_nodes(index)
        if len(nodes) != 1 or step.tile is not None or step.tile_rows or step.last_micro:
            raise p.error(index, "a compute step runs one node, untiled, in every micro-step")
        (node,) = nodes
        if node.phase == "update":
            raise p.error(index, f"{node.op} changes state and needs an update step")
        self._once(index, step, node)
        reads = self._operands(index, step.reads, node.inputs)
        results = [p.buffer(index, b) for b in step.writes]
        if [b.value for b in results] != [v.name for v in node.outputs]:
            raise p.error(
                index,
                f"writes buffers of {[b.value for b in results]}, but the results are"
                f" {[v.name for v in node.outputs]}",
            )
        for b in results:
            if b.space != "arena":
                raise p.error(index, f"result {b.value} goes to space {b.space}, not to the arena")
        check_step.apart(p, index, node, reads, results)
        if get_op(node.op).view:
            self._view(reads[0][1], results[0])
            return
        if step.recompute:
            self.recomputed.update(b.value for b in results)
        self._scratch(check_step.workspace(p, index, nodes))
        for b in results:
            self._write(b, (b.value, self._micro))

    def _view(self, source: Buffer, result: Buffer) -> None:
        """Another name for the same bytes, so paging or recomputing concerns both."""
        held = self._memory.at(result)
        assert held is not None, result.id  # the operand was read at this very range
        held.holds[result.value, self._micro] = self.program.types[result.id]
        for values in (self.recomputed, self.paged):
            if source.value in values:
                values.add(result.value)

    def _update(self, index: int, step: Step) -> None:
        p, nodes = self.program, self.program.step_nodes(index)
        if not 1 <= len(nodes) <= 2 or nodes[-1] not in p.update_of:
            raise p.error(index, "an update step ends with an apply or an accumulate node")
        final = nodes[-1]
        update = p.update_of[final]
        applies = final is update.apply_node
        micro_batches = p.plan.training.micro_batches
        if micro_batches > 1 and step.last_micro != applies:
            raise p.error(
                index,
                f"last_micro is {step.last_micro}, but with {micro_batches} micro-batches gradients"
                " are accumulated in every micro-step and applied in the last one",
            )
        operands = self._update_operands(index, nodes, update)
        if final in self._done:
            raise p.error(index, f"{update.value.name} is updated twice")
        self._done.add(final)
        if len(nodes) == 2:
            self._once(index, step, nodes[0])
        elif step.recompute:
            raise p.error(index, "is marked as recompute, but an update runs once")
        reads = self._operands(index, step.reads, operands)
        scratch = (check_step.tile(p, index, nodes), check_step.workspace(p, index, nodes))
        check_step.apart(p, index, final, reads, [])
        for b in scratch:
            self._scratch(b)
        changed = [update.value, *update.states] if applies else [update.accumulator]
        written = [p.buffer(index, b) for b in step.writes]
        if [b.value for b in written] != [v.name for v in changed if v is not None]:
            raise p.error(
                index,
                f"writes {[b.value for b in written]}, but must write"
                f" {[v.name for v in changed if v is not None]}",
            )
        for b in written:  # values of the state lie in no other space (check_program)
            if b.value in p.home_of and b.id not in step.reads:
                raise p.error(index, f"writes {b.id}, but must change {b.value} where it reads it")
            self._write(b, (b.value, 1 if applies else self._micro + 1))
        if applies and update.accumulator is not None:
            self._write(p.state_of[update.accumulator.name], (update.accumulator.name, 0))

    def _update_operands(
        self, index: int, nodes: Sequence[Node], update: Update
    ) -> list[Value | None]:
        """Operands of an update step: of the gradient, then of its use without the gradient."""
        operands = list(nodes[-1].inputs)
        if len(nodes) == 1:
            return operands
        if nodes[0] is not update.grad_node or update.grad not in operands:
            raise self.program.error(
                index, f"{nodes[0].name} is not the gradient that {nodes[-1].name} takes"
            )
        operands.remove(update.grad)
        if update.value in nodes[0].inputs and self.program.plan.steps[index].tile_rows < _rows(
            update
        ):
            raise self.program.error(
                index,
                f"{nodes[0].name} reads {update.value.name}, whose first rows are already updated",
            )
        return [*nodes[0].inputs, *operands]

    def _once(self, index: int, step: Step, node: Node) -> None:
        again = node in self._done
        if again and get_op(node.op).stateful:
            raise self.program.error(index, f"{node.op} has run before and must run once per step")
        if again != step.recompute:
            raise self.program.error(
                index,
                f"recompute is {step.recompute}, but {node.name} has"
                f" {'run before' if again else 'not run before'}",
            )
        self._done.add(node)

    def _operands(
        self, index: int, names: Sequence[str | None], values: Sequence[Value | None]
    ) -> list[tuple[int, Buffer]]:
        if len(names) != len(values):
            raise self.program.error(
                index, f"reads {len(names)} operands, the graph has {len(values)}"
            )
        reads = []
        for k, (name, v) in enumerate(zip(names, values, strict=True)):
            if name is None and v is None:
                continue
            if name is None or v is None:
                raise self.program.error(index, f"operand {k} is {name}, the graph has {v}")
            b = self.program.buffer(index, name)
            self._read(index, b, v)
            reads.append((k, b))
        return reads

    def _read(self, index: int, b: Buffer, value: Value) -> None:
        """Demand that the buffer holds the value, in the version that the graph means."""
        p, age = self.program, self._micro
        owner = p.update_of.get(value.producer) if value.producer is not None else None
        if owner is not None and value.producer is owner.accumulate_node:
            # The sum that Accumulate returns is the accumulator itself.
            assert owner.accumulator is not None, value.name
            value, age = owner.accumulator, self._micro + 1
        elif p.resident.get(value.name) in ("weights", "optimizer") or value.name in p.home_of:
            age = 0
        if b.value != value.name:
            raise p.error(index, f"reads buffer {b.id} of {b.value} instead of {value.name}")
        if b.space in ("flash", "io"):
            return  # read-only; what they hold and its type are checked with the buffer
        held = self._memory.at(b)
        if held is None or held.holds.get((value.name, age)) != value.type.stored:
            raise p.error(
                index,
                f"reads {value.name} (version {age}) from {b.space} bytes {b.offset} to"
                f" {b.offset + b.bytes} (buffer {b.id}), which hold {held or 'nothing whole'}",
            )

    def _scratch(self, b: Buffer | None) -> None:
        if b is not None:
            self._memory.erase(b)

    def _write(self, b: Buffer, symbol: Symbol) -> None:
        self._memory.write(b, symbol, self.program.types[b.id])


def _rows(update: Update) -> int:
    return update.value.type.shape[0] if update.value.type.shape else 1
