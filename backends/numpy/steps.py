"""The steps of a plan as functions without arguments, bound to the arrays of its buffers once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from ...ir.graph import Array, Node
from ...ir.opdef import get_op
from ...ir.training import TrainingGraph, Update
from ...planner.plan import Step
from .fast import prepared
from .regularization import Shaping
from .scratch import Run, Scratch


class Steps:
    """Makes the function of each step."""

    def __init__(
        self,
        training: TrainingGraph,
        arrays: Mapping[str, Array],
        resident: Mapping[str, Array],
        shaping: Shaping,
        *,
        moved_at: Literal["start", "wait"],
        scratch: Scratch | None,
    ) -> None:
        """What all steps share.

        Args:
            training: The training graph of the plan.
            arrays: The array of every buffer; it must stay the same one.
            resident: Those in the state, by value name.
            shaping: Weight decay and clipping, as they are when a step runs.
            moved_at: When a transfer beside the core copies.
            scratch: For the fast forms of operators; None: each runs its own kernel.
        """
        self._training, self._arrays, self._resident = training, arrays, resident
        self._shaping = shaping
        self._moved_at, self._scratch = moved_at, scratch
        self._nodes: dict[str, Node] = {n.name: n for n in training.graph.nodes}
        self._update_of: dict[Node, Update] = {}
        for u in training.updates:
            self._update_of[u.apply_node] = u
            if u.accumulate_node is not None:
                self._update_of[u.accumulate_node] = u

    def bind(self, step: Step) -> Run:
        """The function that does a step."""
        if self._scratch is not None:
            self._scratch.begin()
        if step.kind in ("page_out", "page_in"):
            now = not step.overlapped or self._moved_at == "start"
            return self._copy(step.reads[0], step.writes[0]) if now else _nothing
        if step.kind == "page_wait":
            return self._copy(*step.reads) if self._moved_at == "wait" else _nothing
        if step.kind == "compute":
            node = self._nodes[step.nodes[0]]
            if get_op(node.op).view:
                return _nothing
            return self._compute(node, self._operands(step), step.writes)
        return self._update(step)

    def _copy(self, source: str | None, target: str | None) -> Run:
        assert source is not None, "a checked plan names what it pages"
        assert target is not None, "a checked plan names where it pages to"
        a, b = self._arrays[source], self._arrays[target]
        return lambda: np.copyto(b, a)

    def _operands(self, step: Step) -> list[Array | None]:
        return [None if b is None else self._arrays[b] for b in step.reads]

    def _fast(
        self, node: Node, operands: Sequence[Array | None], results: Sequence[Array]
    ) -> Run | None:
        if self._scratch is None:
            return None
        return prepared(node, operands, results, self._scratch)

    def _compute(self, node: Node, operands: Sequence[Array | None], writes: Sequence[str]) -> Run:
        targets = [self._arrays[b] for b in writes]
        return self._fast(node, operands, targets) or _kernel(node, operands, targets)

    def _update(self, step: Step) -> Run:
        """Apply or accumulate a gradient, in tiles of rows where it is computed here."""
        final = self._nodes[step.nodes[-1]]
        update, operands = self._update_of[final], self._operands(step)
        if len(step.nodes) == 1:
            run = self._finish(final, update, operands, step.writes)
        else:
            gradient = self._nodes[step.nodes[0]]
            run = self._at_once(gradient, final, update, step, operands) or self._stream(
                gradient, final, update, step, operands
            )
        if final is not update.apply_node or update.accumulator is None:
            return run
        accumulator = self._resident[update.accumulator.name]

        def run_and_clear() -> None:
            run()
            accumulator.fill(0)

        return run_and_clear

    def _finish(
        self, final: Node, update: Update, operands: list[Array | None], writes: Sequence[str]
    ) -> Run:
        """Accumulate or apply a gradient that is whole; decay and clipping need other operands."""
        plain = self._compute(final, operands, writes)
        if final is not update.apply_node:
            return plain
        shaping, targets = self._shaping, [self._arrays[b] for b in writes]

        def run() -> None:
            if not shaping.active:
                plain()
                return
            factor = shaping.factor(update, [operands[1]])
            _kernel(final, shaping.shaped(update, operands, factor), targets)()

        return run

    def _at_once(
        self,
        gradient: Node,
        final: Node,
        update: Update,
        step: Step,
        operands: list[Array | None],
    ) -> Run | None:
        """The whole gradient in scratch, then the update; None where the gradient has no fast form.

        The device has a tile of rows for it. Products of matrices are slow by few rows.
        """
        if self._scratch is None:
            return None
        inputs, rest = operands[: len(gradient.inputs)], operands[len(gradient.inputs) :]
        whole = self._scratch.take(*update.grad.type.shape)
        first = self._fast(gradient, inputs, [whole])
        if first is None:
            return None
        given = iter(rest)
        summed = [whole if v is update.grad else next(given) for v in final.inputs]
        then = self._finish(final, update, summed, step.writes)

        def run() -> None:
            first()
            then()

        return run

    def _stream(
        self,
        gradient: Node,
        final: Node,
        update: Update,
        step: Step,
        operands: list[Array | None],
    ) -> Run:
        """The gradient in tiles of rows; its norm takes a pass of its own before."""
        inputs, rest = operands[: len(gradient.inputs)], operands[len(gradient.inputs) :]
        targets = [self._arrays[b] for b in step.writes]
        shaping = self._shaping

        def run() -> None:
            op, applied = get_op(final.op), final is update.apply_node
            factor = np.float32(1)
            if applied:
                once = self._tiles(gradient, update, step, inputs)
                factor = shaping.factor(update, (g for _, _, g in once))
            for begin, end, tile in self._tiles(gradient, update, step, inputs):
                given = iter(rest)
                sliced: list[Array | None] = []
                for v in final.inputs:
                    if v is update.grad:
                        sliced.append(tile)
                    else:
                        a = next(given)
                        whole = a is None or v is self._training.hyper
                        sliced.append(a if a is None or whole else _by_rows(a)[begin:end])
                if applied:
                    sliced = shaping.shaped(update, sliced, factor)
                if op.run_kernel is not None:
                    results = op.run_kernel(final, sliced, begin)
                else:
                    results = op.kernel(final, sliced)
                for target, result in zip(targets, results, strict=True):
                    _by_rows(target)[begin:end] = result

        return run

    def _tiles(
        self, gradient: Node, update: Update, step: Step, inputs: list[Array | None]
    ) -> Iterator[tuple[int, int, Array]]:
        """First row, row behind the last, and gradient of these rows, in the planned tile."""
        assert step.tile is not None, "a checked plan has a tile for a streamed gradient"
        t = update.grad.type
        rows = t.shape[0] if t.shape else 1
        scratch = self._arrays[step.tile].reshape(-1).view(np.uint8).view(t.np_dtype)
        per_row = t.size // rows
        rows_kernel = get_op(gradient.op).rows_kernel
        for begin in range(0, rows, step.tile_rows):
            end = min(begin + step.tile_rows, rows)
            if rows_kernel is not None:
                part = rows_kernel(gradient, inputs, begin, end)
            else:
                part = get_op(gradient.op).kernel(gradient, inputs)[0]
            tile = scratch[: (end - begin) * per_row].reshape(end - begin, *t.shape[1:])
            tile[...] = part.reshape(tile.shape)
            yield begin, end, tile


def _nothing() -> None:
    """A step that moves no bytes."""


def _kernel(node: Node, operands: Sequence[Array | None], targets: Sequence[Array]) -> Run:
    """The operator's own kernel, its results copied to where they are planned."""

    def run() -> None:
        results = get_op(node.op).kernel(node, operands)
        for target, result in zip(targets, results, strict=True):
            if result.shape != target.shape or result.dtype != target.dtype:
                raise TypeError(
                    f"{node.name}: the kernel of {node.op} gave {result.dtype}{result.shape},"
                    f" planned are {target.dtype}{target.shape}"
                )
            target[...] = result

    return run


def _by_rows(a: Array) -> Array:
    """The array itself; a scalar as one row."""
    return a if a.shape else a.reshape(1)
