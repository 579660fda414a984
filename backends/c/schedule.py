"""The plan's steps as C statements, one kernel call after the other.

The generated ``run`` serves inference, evaluation and training: steps that the prediction, or the
loss, does not need stand behind a test of the mode, and inference and evaluation return after the
last step that they need. So each step is in flash once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from ...ir.errors import GraphError
from ...ir.graph import Node, TensorType, Value
from ...ir.opdef import get_op
from ...ir.training import TrainingGraph, Update
from ...planner.plan import Buffer, Plan, Step
from ..inference import inference_steps
from ..numpy.regularization import whole_gradients
from .ctext import block, block_comment, symbol, wrap
from .emit_call import call, kernel_of, param_struct
from .head import Head
from .parts import Parts

Range = tuple[int, int]
_NOT_FIRST = "if (net->progress.updates != 0u) {"
_FAILED = ["return ODTPLAN_ERROR_STORAGE;"]


@dataclass
class Schedule:
    """C text of a plan.

    Attributes:
        params: Definitions of the parameter structs.
        front: Lines of the replayed front; empty without.
        body: Lines of all steps behind it.
        sources: Kernel files that are called, sorted stems.
        prediction: Buffer of the prediction after an inference.
        infer_pages: Whether an inference pages.
        evaluate_pages: Whether an evaluation pages.
        train_pages: Whether a training step pages.
        callbacks: What it pages through.
        under_way: Most transfers that are started and not waited for; 0: none runs beside the core.
    """

    prediction: Buffer
    params: list[str] = field(default_factory=list)
    front: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    infer_pages: bool = False
    evaluate_pages: bool = False
    train_pages: bool = False
    callbacks: tuple[str, ...] = ("page_write", "page_read")
    under_way: int = 0


def emit_schedule(
    plan: Plan,
    training: TrainingGraph,
    weights: dict[str, str],
    parts: Parts,
    heads: Sequence[Head],
) -> Schedule:
    """The plan as C statements.

    Args:
        plan: What to run.
        training: The graph that the plan executes.
        weights: C array of each constant by value name.
        parts: C arrays of arena and state.
        heads: The outputs.

    Raises:
        GraphError: The plan has a step that C can't run (names it).
    """
    return _Emitter(plan, training, weights, parts, heads).emit()


def decays(plan: Plan, training: TrainingGraph) -> bool:
    """Whether the emitted C can decay weights: gradients in place, Adam's only in floats.

    A gradient that others read after the update, or that shares bytes with such, stays as it is.
    """
    weights = [u for u in training.updates if u.role == "weight"]
    if not weights or any(u.apply_node.op == "QAdam" for u in weights):
        return False
    return _change_in_place(plan, weights)


def clips(plan: Plan, training: TrainingGraph) -> bool:
    """Whether the emitted C can clip: every gradient is whole before its weight changes."""
    learned = [u for u in training.updates if u.role != "statistic"]
    names = {u.apply_node.name for u in learned}
    applied = [s.nodes for s in plan.steps if s.kind == "update" and s.nodes[-1] in names]
    whole = bool(applied) and all(len(nodes) == 1 for nodes in applied)
    return whole and _change_in_place(plan, learned)


def _change_in_place(plan: Plan, updates: Sequence[Update]) -> bool:
    """Whether nobody misses what the gradients of these updates were before."""
    applied = {u.apply_node.name: u for u in updates}
    buffers = {b.id: b for b in plan.buffers}
    for i, step in enumerate(plan.steps):
        update = applied.get(step.nodes[-1]) if step.kind == "update" else None
        if update is not None and len(step.nodes) == 1 and update.accumulator is None:
            g = buffers[str(step.reads[1])]
            later = (o for o in plan.buffers if o.space == g.space and o.first <= i < o.last)
            if any(_meet(o, g) for o in later):
                return False
    return True


def _meet(a: Buffer, b: Buffer) -> bool:
    """Whether two buffers of a space have bytes in common."""
    return a.offset < b.offset + b.bytes and b.offset < a.offset + a.bytes


class _Emitter:
    def __init__(
        self,
        plan: Plan,
        training: TrainingGraph,
        weights: dict[str, str],
        parts: Parts,
        heads: Sequence[Head],
    ) -> None:
        self.plan, self.training, self.weights, self.parts = plan, training, weights, parts
        self.buffers = {b.id: b for b in plan.buffers}
        self.arena = [b for b in plan.buffers if b.space == "arena"]
        self.nodes = {n.name: n for n in training.graph.nodes}
        self.updates: dict[str, Update] = {}
        for u in training.updates:
            for n in (u.grad_node, u.accumulate_node, u.apply_node):
                if n is not None:
                    self.updates[n.name] = u
        self.structs: dict[str, str] = {}  # text without its name -> name
        self.params: list[str] = []
        starts = [s.writes[0] for s in plan.steps if s.overlapped]
        self.transfers = {target: i for i, target in enumerate(starts)}
        self.targets = {h.target.name: h.param for h in heads}
        self.results = {h.value.name: h.result for h in heads}
        self.homes = {v.name for u in training.updates for v in u.paged}
        self.decays = decays(plan, training)
        self.clips = clips(plan, training)
        self.common = whole_gradients(plan, training) or ()  # all gradients, if they have one norm

    def emit(self) -> Schedule:
        predictions = [v.name for v in self.training.predictions]
        infer = inference_steps(self.plan, predictions)
        evaluate = inference_steps(self.plan, [*predictions, self.training.loss.name])
        end = map(self.buffers.__getitem__, self.plan.steps[infer[-1]].writes)
        result = Schedule(next(b for b in end if b.value in predictions), self.params)
        copied = dict(self.results)
        sources = {"odtplan_optimizer"} if self.decays else set[str]()
        sources |= {"odtplan_clipping"} if self.clips else set()
        for i, step in enumerate(self.plan.steps):
            pages = step.kind in ("page_in", "page_out", "page_wait")
            result.train_pages |= pages
            result.infer_pages |= pages and i in infer
            result.evaluate_pages |= pages and i in evaluate
            nodes = [self.nodes[n] for n in step.nodes]
            sources.update(kernel_of(n).source for n in nodes if _runs(n))
            held = [b for b in self.arena if b.first < i <= b.last]
            born = _minus((b for b in self.arena if b.first == i), held)
            held = [b for b in self.arena if b.first <= i < b.last]
            dying = _minus((b for b in self.arena if b.last == i), held)
            lines = self._step(i, step)
            for b in map(self.buffers.__getitem__, step.writes if i in infer else ()):
                if (y := copied.pop(b.value, None)) is not None:
                    copy = f"memcpy({y}, {self.pointer(b.id)}, {b.bytes});"
                    lines += block(f"if ({y} != NULL) {{", [copy])
            if step.last_micro and self.plan.training.micro_batches > 1:
                lines = block("if (mode == UPDATE) {", lines)
            elif i < evaluate[-1] and i not in evaluate:
                lines = block("if (mode > EVALUATE) {", lines)
            elif i < infer[-1] and i not in infer:
                lines = block("if (mode != INFER) {", lines)
            for mode, steps in (("INFER", infer), ("EVALUATE", evaluate)):
                if i == steps[-1]:
                    lines += block(f"if (mode == {mode}) {{", ["return ODTPLAN_OK;"])
            replay = self.plan.replay
            lines_of = result.front if replay is not None and i < replay.front else result.body
            lines_of += [
                *block_comment(f"{i}: {self._describe(step)}"),
                *(f"LIVE({piece});" for a, b in born for piece in self.parts.cut(a, b)),
                *lines,
                *(f"DEAD({piece});" for a, b in dying for piece in self.parts.cut(a, b)),
            ]
        result.sources = sorted(sources)
        result.under_way = self._under_way()
        if result.under_way:
            result.callbacks = self._callbacks()
        return result

    def _callbacks(self) -> tuple[str, ...]:
        """What a plan with transfers beside the core calls."""
        found = ["page_start_write", "page_start_read", "page_wait"]
        if any(s.kind in ("page_out", "page_in") and not s.overlapped for s in self.plan.steps):
            found += ["page_write", "page_read"]
        return tuple(found)

    def _under_way(self) -> int:
        """Most transfers that are started and not waited for."""
        change = [s.overlapped - (s.kind == "page_wait") for s in self.plan.steps]
        return max(accumulate(change))

    def _describe(self, step: Step) -> str:
        what = step.kind.replace("_", " ")
        if step.kind == "page_wait":
            return f"wait for {self.buffers[str(step.reads[1])].value}"
        if step.overlapped:
            what = f"start of {what}"
        if step.nodes:
            ops = " + ".join(f"{n} ({self.nodes[n].op})" for n in step.nodes)
            what = ("again " if step.recompute else "") + ops
        read = sum(self.buffers[r].bytes for r in step.reads if r)
        written = sum(self.buffers[w].bytes for w in step.writes)
        text = f"{what}, reads {read:,} B, writes {written:,} B"
        if step.tile:
            text += f", gradient tile {self.buffers[step.tile].bytes:,} B"
        if step.workspace:
            text += f", scratch {self.buffers[step.workspace].bytes:,} B"
        return text

    def _step(self, index: int, step: Step) -> list[str]:
        if step.kind in ("page_out", "page_in"):
            return self._page(step)
        if step.kind == "page_wait":
            transfer = self.transfers[str(step.reads[1])]
            test = f"if (net->page_wait(net->user, {transfer}u) != 0) {{"
            return self._unless_first(self.buffers[str(step.reads[1])], test)
        nodes = [self.nodes[n] for n in step.nodes]
        if step.kind == "update":
            lines = self._update(step, nodes)
        elif step.kind == "compute" and len(nodes) == 1:
            lines = self._call(nodes[0], self._reads(step.reads), self._writes(step), step)
        else:
            raise GraphError(f"step {index}: the C back end can't run {step.kind} of {step.nodes}")
        if self.training.loss.producer in nodes:
            loss = self.pointer(step.writes[0])
            lines += block("if (loss != NULL) {", [f"memcpy(loss, {loss}, sizeof *loss);"])
        return lines

    def _page(self, step: Step) -> list[str]:
        source, target = self.buffers[str(step.reads[0])], self.buffers[step.writes[0]]
        out = step.kind == "page_out"
        ram, stored = (source, target) if out else (target, source)
        callback, first = "write" if out else "read", f"{stored.offset}u"
        if step.overlapped:
            callback, first = f"start_{callback}", f"{self.transfers[target.id]}u, {first}"
        test = (
            f"if (net->page_{callback}(net->user, {first}, {self.pointer(ram.id)},"
            f" {ram.bytes}u) != 0) {{"
        )
        if step.overlapped and self._is_state_in(target):
            return block(_NOT_FIRST, block(test, _FAILED))
        return self._unless_first(target, test)

    def _unless_first(self, target: Buffer, test: str) -> list[str]:
        """A transfer, in whose place a tensor is cleared if nobody has written it yet."""
        moved = block(test, _FAILED)
        if not self._is_state_in(target):
            return moved
        cleared = f"memset({self.pointer(target.id)}, 0, {target.bytes});"
        return [*block(_NOT_FIRST, moved)[:-1], *block("} else {", [cleared])]

    def _is_state_in(self, target: Buffer) -> bool:
        """An optimizer tensor comes in, which nobody has written before the first update."""
        return target.space == "arena" and target.value in self.homes

    def _update(self, step: Step, nodes: list[Node]) -> list[str]:
        update = self.updates[nodes[-1].name]
        if len(nodes) == 1:
            inputs = self._reads(step.reads)
            lines = self._clipped(step)
            lines += self._decayed(update, nodes[0], inputs)
            lines += self._call(nodes[0], inputs, self._writes(step), step)
        else:
            lines = self._streamed(step, update, *nodes)
        if nodes[-1] is update.apply_node and update.accumulator is not None:
            name = update.accumulator.name
            size = update.accumulator.type.nbytes
            at = next(b for b in self.plan.buffers if b.space == "state" and b.value == name)
            lines.append(f"memset({self.pointer(at.id)}, 0, {size});")
        return lines

    def _streamed(self, step: Step, update: Update, grad: Node, consumer: Node) -> list[str]:
        """The gradient by row tiles, each applied (or accumulated) at once."""
        if step.tile is None:
            raise GraphError(f"node {grad.name}: a streamed update needs a tile")
        tile = self.pointer(step.tile)
        operands, rest = step.reads[: len(grad.inputs)], iter(step.reads[len(grad.inputs) :])
        gradient = self._reads(operands)
        inputs = [tile if v is update.grad else self._optional(next(rest)) for v in consumer.inputs]
        outputs = self._writes(step)
        rows = _rows(update.grad.type)
        if get_op(grad.op).rows_kernel is None or step.tile_rows >= rows:
            lines = self._call(grad, gradient, [tile], step)
            lines += self._decayed(update, consumer, inputs)
            return lines + self._call(consumer, inputs, outputs, None)
        whole, left = divmod(rows, step.tile_rows)
        kept = (None, update.grad, self.training.hyper)
        typed = set(self.weights.values())  # arrays of their own type; all other pointers are bytes

        def at(pointer: str, v: Value, row: str) -> str:
            """Where a row of an operand begins."""
            unit = (v.type.size if pointer in typed else v.type.nbytes) // rows
            if row == "row":
                return f"{pointer} + row * {unit}" if unit > 1 else f"{pointer} + row"
            return pointer if row == "0" else f"{pointer} + {int(row) * unit}"

        def tile_calls(row: str, end: str, count: int) -> list[str]:
            part = _rows_of(consumer, count, keep=self.training.hyper)
            ins = [
                p if v is None or v in kept or p is None else at(p, v, row)
                for p, v in zip(inputs, consumer.inputs, strict=True)
            ]
            outs = [at(p, v, row) for p, v in zip(outputs, consumer.outputs, strict=True)]
            lines = self._call(grad, gradient, [tile], step, (row, end))
            lines += self._decayed(update, part, ins)
            return lines + self._call(part, ins, outs, None, first_row=row)

        if whole > 1:
            head = f"for (row = 0; row < {whole * step.tile_rows}; row += {step.tile_rows}) {{"
            lines = block(head, tile_calls("row", f"row + {step.tile_rows}", step.tile_rows))
        else:
            lines = tile_calls("0", str(step.tile_rows), step.tile_rows)
        if left:
            lines += tile_calls(str(whole * step.tile_rows), str(rows), left)
        return lines

    def _clipped(self, step: Step) -> list[str]:
        """Clipping in place before an optimizer's call, by the norm that NumPy's follows, too."""
        update, gradient = self.updates[step.nodes[-1]], str(step.reads[1])
        applied = step.nodes[-1] == update.apply_node.name
        if not self.clips or not applied or update.role == "statistic":
            return []
        lines: list[str] = []
        if not self.common or gradient == self.common[0]:
            lines.append("CLIP(squares = 0.0);")
            for b in map(self.buffers.__getitem__, self.common or (gradient,)):
                at = f"(const float *)({self.pointer(b.id)}), {b.bytes // 4}"
                lines += wrap(f"CLIP(squares = odtplan_squares(squares, {at}));")
            scale = update.apply_node.float_attr("gradient_scale", 1.0)
            lines += [f"CLIP(factor = odtplan_clip_factor(squares, {scale!r}, net->clip));"]
        size = self.buffers[gradient].bytes // 4
        text = f"CLIP(odtplan_clipped({size}, factor, (float *)({self.pointer(gradient)})));"
        return lines + wrap(text)

    def _decayed(self, update: Update, node: Node, inputs: Sequence[str | None]) -> list[str]:
        """Weight decay in place before an optimizer's call, on all rows or some."""
        value = node.inputs[0]
        if node.name != update.apply_node.name or not self.decays or update.role != "weight":
            return []
        assert value is not None, node.name
        w, g, steps, n = inputs[0], inputs[1], inputs[-1], value.type.size
        if node.op == "Adam":
            text = f"odtplan_shrink_weights_f32({n}, net->weight_factor, (float *)({w}))"
        elif value.type.dtype == "f32":
            text = (
                f"odtplan_decay_f32((const float *)({w}), {n}, net->weight_decay, (float *)({g}))"
            )
        else:
            rows = _rows(value.type)
            text = (
                f"odtplan_decay_i8((const int8_t *)({w}), (const float *)({steps}), {rows},"
                f" {n // rows}, net->weight_decay, (float *)({g}))"
            )
        return wrap(f"DECAY({text});")

    def _call(
        self,
        node: Node,
        inputs: Sequence[str | None],
        outputs: Sequence[str],
        step: Step | None,
        rows: tuple[str, str] | None = None,
        first_row: str = "0",
    ) -> list[str]:
        if not _runs(node):
            return []
        workspace = self.pointer(step.workspace) if step is not None and step.workspace else None
        return wrap(call(node, self._params(node), inputs, outputs, workspace, rows, first_row))

    def _params(self, node: Node) -> str:
        """Name of the parameter struct; equal structs are defined once."""
        key = param_struct(node, "?")
        if key not in self.structs:
            name = symbol("p", len(self.structs), node.name)
            self.structs[key] = name
            self.params.append(param_struct(node, name))
        return self.structs[key]

    def _reads(self, ids: Sequence[str | None]) -> list[str | None]:
        return [self._optional(i) for i in ids]

    def _writes(self, step: Step) -> list[str]:
        return [self.pointer(w) for w in step.writes]

    def _optional(self, buffer_id: str | None) -> str | None:
        return None if buffer_id is None else self.pointer(buffer_id)

    def pointer(self, buffer_id: str) -> str:
        """C expression of where a buffer begins."""
        b = self.buffers[buffer_id]
        if b.space in ("arena", "state"):
            return self.parts.pointer(b)
        if b.space == "flash":
            return self.weights[b.value]
        if b.space == "io" and b.value == self.training.hyper.name:
            return "net->hyper"
        if b.space == "io" and b.value in self.targets:
            return self.targets[b.value]
        raise GraphError(f"buffer {b.id}: C code can't address {b.value} in {b.space}")


def _runs(node: Node) -> bool:
    return not get_op(node.op).view


def _rows(t: TensorType) -> int:
    return t.shape[0] if t.shape else 1


def _rows_of(node: Node, count: int, keep: Value) -> Node:
    """The node on ``count`` rows of its operands; ``keep`` stays whole."""

    def cut(v: Value | None) -> Value | None:
        if v is None or v is keep:
            return v
        return Value(v.name, TensorType((count, *v.type.shape[1:]), v.type.dtype))

    inputs = tuple(cut(v) for v in node.inputs)
    outputs = tuple(c for v in node.outputs if (c := cut(v)) is not None)
    return Node(node.op, node.name, inputs, outputs, node.attrs, node.phase)


def _minus(buffers: Iterable[Buffer], held: Sequence[Buffer]) -> list[Range]:
    """Byte ranges of ``buffers`` that no buffer of ``held`` covers, merged and sorted."""
    wanted = list(buffers)
    edges = sorted({e for b in (*held, *wanted) for e in (b.offset, b.offset + b.bytes)})
    result: list[Range] = []
    for start, end in pairwise(edges):
        if not _covers(wanted, start) or _covers(held, start):
            continue
        if result and result[-1][1] == start:
            start = result.pop()[0]
        result.append((start, end))
    return result


def _covers(buffers: Sequence[Buffer], at: int) -> bool:
    return any(b.offset <= at < b.offset + b.bytes for b in buffers)
