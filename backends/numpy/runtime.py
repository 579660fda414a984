"""Executes a plan on NumPy arrays, step by step, inside the planned memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from ...ir.errors import UsageError
from ...ir.graph import Array, Node, Value
from ...ir.indices import check_indices
from ...ir.opdef import get_op
from ...ir.sample import Samples, by_input
from ...ir.targets import bounds_of, check_bounds
from ...ir.training import TrainingGraph, Update
from ...planner.plan import Plan, Replay, Step
from .data import fitted, stored_sample
from .memory import Memory
from .parameters import merged, split
from .regularization import Regularization, norm_of, square_of, whole_gradients


@dataclass(frozen=True)
class Snapshot:
    """All that training has changed, between two updates.

    Attributes:
        state: The state space, byte for byte as the plan lays it out.
        stored: Optimizer tensors that live in storage.
        updates: Updates done (Adam's time step).
    """

    state: bytes
    stored: bytes
    updates: int


class Runtime:
    """A model that runs and trains by the steps of a checked plan.

    Attributes:
        plan: What is executed.
        training: The training graph that the plan was made for.
        micro_steps: Micro-steps done since the last update.
        updates: Updates done (Adam's time step).
        inference_steps: Indices of the steps that the prediction needs.
        regularization: Weight decay and clipping of the updates; none at first.
    """

    def __init__(
        self, plan: Plan, training: TrainingGraph, *, moved_at: Literal["start", "wait"] = "start"
    ) -> None:
        """Allocate the planned memory and load the model's parameters into it.

        Args:
            plan: A plan that ``planner.check`` accepts for this training graph.
            training: The training graph.
            moved_at: When a transfer beside the core copies its bytes: at its start or at its wait,
                the extremes of what DMA may do. The results are the same.
        """
        self._moved_at = moved_at
        self.plan, self.training = plan, training
        self.micro_steps = self.updates = 0
        self.regularization = Regularization()
        self._gradients = whole_gradients(plan, training)
        self._global_factor: np.float32 | None = None
        self._bounds = bounds_of(training.graph, training.target)
        self._bias = (0, np.float32(0.0), np.float32(0.0))
        self._memory = Memory(plan, {v.name for u in training.updates for v in u.paged})
        self._nodes: dict[str, Node] = {n.name: n for n in training.graph.nodes}
        self._update_of: dict[Node, Update] = {}
        for u in training.updates:
            self._update_of[u.apply_node] = u
            if u.accumulate_node is not None:
                self._update_of[u.accumulate_node] = u
        self._arrays: dict[str, Array] = dict(self._memory.views)
        self._resident: dict[str, Array] = {}
        self._io: dict[str, str] = {}
        for b in plan.buffers:
            if b.space == "flash":
                data = training.graph.constants[b.value].copy()
                data.setflags(write=False)
                self._arrays[b.id] = data
            elif b.space == "io":
                self._io[b.value] = b.id
            elif b.space == "state":
                self._resident[b.value] = self._arrays[b.id]
        self.inference_steps = _slice_to(plan, training.prediction.name)
        to_loss = _slice_to(plan, training.loss.name)
        self._evaluation_steps = tuple(sorted({*self.inference_steps, *to_loss}))
        written = {w for s in plan.steps for w in s.writes}
        self._given = {
            b.value: b.id
            for b in plan.buffers
            if b.value in {v.name for v in training.samples}
            and b.space == "arena"
            and b.id not in written
        }
        self._reset()

    # ---- running

    @property
    def arena_nbytes(self) -> int:
        """Bytes of the arena."""
        return sum(a.nbytes for a in self._memory.arena)

    @property
    def state_nbytes(self) -> int:
        """Bytes of updated weights, optimizer tensors and accumulators."""
        return sum(a.nbytes for a in self._memory.state)

    def infer(self, x: Samples) -> Array:
        """The prediction for one batch; runs only the steps that it needs.

        Args:
            x: Samples, as the model's input; of an i8 input int8 as stored, or floats, which are
                quantized. Of several inputs arrays by their names.

        Raises:
            UsageError: ``x`` is not a batch of samples.
        """
        self._feed(x)
        result: Array | None = None
        with np.errstate(all="ignore"):  # as on the device: NaN and infinity are values
            for index in self.inference_steps:
                step = self.plan.steps[index]
                self._step(step)
                result = self._captured(step, self.training.prediction, result)
                self._memory.retire(index)
        assert result is not None, "a checked plan computes the prediction"
        return result

    def evaluate(self, x: Samples, target: ArrayLike) -> tuple[Array, float]:
        """Prediction and loss for one batch; runs only the steps that they need.

        Args:
            x: Samples, as in ``infer``.
            target: As in ``train_step``.

        Raises:
            UsageError: ``x`` or ``target`` does not fit the model.
        """
        t = self.training
        self._feed(x)
        self._arrays[self._io[t.target.name]] = self._target(target)
        predicted: Array | None = None
        loss: Array | None = None
        with np.errstate(all="ignore"):
            for index in self._evaluation_steps:
                step = self.plan.steps[index]
                self._step(step)
                predicted = self._captured(step, t.prediction, predicted)
                loss = self._captured(step, t.loss, loss)
                self._memory.retire(index)
        assert predicted is not None, "a checked plan computes the prediction"
        assert loss is not None, "a checked plan computes the loss"
        return predicted, float(loss)

    def train_step(self, x: Samples, target: ArrayLike, lr: float) -> float:
        """One micro-step; the last one of a group updates the parameters.

        Args:
            x: Samples, as in ``infer``.
            target: Labels i32[N] (cross entropy, triplets) or a tensor like the prediction.
            lr: Step size; counts in the micro-step that updates.

        Returns:
            Loss of this micro-batch.

        Raises:
            UsageError: ``x`` or ``target`` does not fit the model.
        """
        self._feed(x)
        return self._train(0, target, lr)

    def capture(self, x: Samples) -> Array:
        """What the frozen front makes of one batch, for ``train_cached``; the plan has replay.

        It stays right for good: nothing that training changes has a part in it.

        Args:
            x: Samples, as in ``infer``.

        Returns:
            The entry of the cache: a copy of the boundary tensor, as it is stored.

        Raises:
            UsageError: ``x`` is not a batch of samples.
        """
        replay = self._replay
        self._feed(x)
        with np.errstate(all="ignore"):
            for index, step in enumerate(self.plan.steps[: replay.front]):
                self._step(step)
                self._memory.retire(index)
        return self._arrays[replay.buffer].copy()

    def train_cached(self, entry: Array, target: ArrayLike, lr: float) -> float:
        """``train_step`` for the batch that ``capture`` made an entry of, without its front.

        Raises:
            UsageError: ``target`` does not fit the model, or ``entry`` is none of this plan.
        """
        replay = self._replay
        boundary = self._arrays[replay.buffer]
        if (entry.dtype, entry.shape) != (boundary.dtype, boundary.shape):
            raise UsageError(
                f"an entry is {boundary.dtype}{boundary.shape}, not {entry.dtype}{entry.shape}"
            )
        self._memory.clear()
        boundary[...] = entry
        return self._train(replay.front, target, lr)

    @property
    def _replay(self) -> Replay:
        if self.plan.replay is None:
            raise UsageError("this plan replays nothing; plan again with --replay")
        return self.plan.replay

    def _train(self, begin: int, target: ArrayLike, lr: float) -> float:
        """The steps from ``begin`` on; what they need of those before is in the arena."""
        t = self.training
        self._arrays[self._io[t.target.name]] = self._target(target)
        if t.hyper.name in self._io:
            self._arrays[self._io[t.hyper.name]] = self._hyper(lr)
        last = self.micro_steps + 1 == t.spec.micro_batches
        self._global_factor = None
        loss: Array | None = None
        for index, step in enumerate(self.plan.steps[begin:], begin):
            if last or not step.last_micro:
                self._step(step)
                loss = self._captured(step, t.loss, loss)
            self._memory.retire(index)
        self.micro_steps = 0 if last else self.micro_steps + 1
        self.updates += last
        assert loss is not None, "a checked plan computes the loss"
        return float(loss)

    def _captured(self, step: Step, value: Value, old: Array | None) -> Array | None:
        """A copy of ``value`` once the first step has written it: its bytes are used again."""
        if old is None and step.kind == "compute":
            for b, v in zip(step.writes, self._nodes[step.nodes[0]].outputs, strict=True):
                if v is value:
                    return self._arrays[b].copy()
        return old

    def _step(self, step: Step) -> None:
        if step.kind in ("page_out", "page_in"):
            if not step.overlapped or self._moved_at == "start":
                self._copy(step.reads[0], step.writes[0])
        elif step.kind == "page_wait":
            if self._moved_at == "wait":
                self._copy(*step.reads)
        elif step.kind == "compute":
            node = self._nodes[step.nodes[0]]
            if not get_op(node.op).view:
                self._call(node, [self._operand(b) for b in step.reads], step.writes)
        else:
            self._update(step)

    def _copy(self, source: str | None, target: str | None) -> None:
        assert source is not None, "a checked plan names what it pages"
        assert target is not None, "a checked plan names where it pages to"
        self._arrays[target][...] = self._arrays[source]

    def _operand(self, name: str | None) -> Array | None:
        return None if name is None else self._arrays[name]

    def _call(self, node: Node, operands: list[Array | None], writes: tuple[str, ...]) -> None:
        results = get_op(node.op).kernel(node, operands)
        for b, result in zip(writes, results, strict=True):
            target = self._arrays[b]
            if result.shape != target.shape or result.dtype != target.dtype:
                raise TypeError(
                    f"{node.name}: the kernel of {node.op} gave {result.dtype}{result.shape},"
                    f" planned are {target.dtype}{target.shape}"
                )
            target[...] = result

    def _update(self, step: Step) -> None:
        """Apply or accumulate a gradient, in tiles of rows where it is computed here."""
        final = self._nodes[step.nodes[-1]]
        update = self._update_of[final]
        operands = [self._operand(b) for b in step.reads]
        applied = final is update.apply_node and update.role != "statistic"
        if len(step.nodes) == 1:
            if applied:
                factor = self._factor(update, [operands[1]])
                operands = self._shaped(update, operands, factor)
            self._call(final, operands, step.writes)
        else:
            self._stream(self._nodes[step.nodes[0]], final, update, step, operands)
        if final is update.apply_node and update.accumulator is not None:
            self._resident[update.accumulator.name][...] = 0

    def _stream(
        self,
        gradient: Node,
        final: Node,
        update: Update,
        step: Step,
        operands: list[Array | None],
    ) -> None:
        inputs, rest = operands[: len(gradient.inputs)], operands[len(gradient.inputs) :]
        op, applied = get_op(final.op), final is update.apply_node and update.role != "statistic"
        factor = np.float32(1)
        if applied:
            once = self._tiles(gradient, update, step, inputs)
            factor = self._factor(update, (g for _, _, g in once))
        for begin, end, tile in self._tiles(gradient, update, step, inputs):
            given = iter(rest)
            sliced: list[Array | None] = []
            for v in final.inputs:
                if v is update.grad:
                    sliced.append(tile)
                else:
                    a = next(given)
                    whole = a is None or v is self.training.hyper
                    sliced.append(a if a is None or whole else _by_rows(a)[begin:end])
            if applied:
                sliced = self._shaped(update, sliced, factor)
            if op.run_kernel is not None:
                results = op.run_kernel(final, sliced, begin)
            else:
                results = op.kernel(final, sliced)
            for b, result in zip(step.writes, results, strict=True):
                _by_rows(self._arrays[b])[begin:end] = result

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

    def _factor(self, update: Update, gradient: Iterable[Array | None]) -> np.float32:
        """What clipping multiplies a gradient by; its parts are asked for only if that counts."""
        if self.regularization.clip is None:
            return np.float32(1)
        if self._global_factor is not None:
            return self._global_factor
        whole = self._gradients
        parts = gradient if whole is None else (self._arrays[b] for b in whole)
        scale = update.apply_node.float_attr("gradient_scale", 1.0)
        norm = norm_of((square_of(g) for g in parts if g is not None), scale)
        factor = self.regularization.factor(norm)
        if whole is not None:
            self._global_factor = factor
        return factor

    def _shaped(
        self, update: Update, operands: list[Array | None], factor: np.float32
    ) -> list[Array | None]:
        if self.regularization == Regularization():
            return operands
        rate = self._arrays[self._io[self.training.hyper.name]][0]
        return self.regularization.shaped(update, operands, float(rate), factor)

    # ---- inputs

    def _feed(self, x: Samples) -> None:
        t, stored = self.training, {}
        for name, v, given in by_input(t.samples, x):
            of = f" of {name}" if len(t.samples) > 1 else ""
            stored[v.name] = stored_sample(given, v.type, f"the sample{of}")
            check_indices(t.graph, v, stored[v.name], f"the batch{of}")
        self._memory.clear()
        for name, sample in stored.items():
            self._arrays[self._given[name]][...] = sample

    def _target(self, target: ArrayLike) -> Array:
        data = fitted(target, self.training.target.type, "the target")
        check_bounds(data, self._bounds, "the target")
        return data

    def _hyper(self, lr: float) -> Array:
        if not np.isfinite(lr) or lr < 0:
            raise UsageError(f"the step size must be a number >= 0, not {lr}")
        if self.training.spec.optimizer != "adam":
            return np.array([lr, 1.0, self.updates + 1], np.float32)
        bias1, bias2 = self._bias_corrections()
        one = np.float32(1.0)
        rate = np.float32(lr)
        return np.array([rate, one / np.sqrt(bias2), self.updates + 1, rate / bias1], np.float32)

    def _bias_corrections(self) -> tuple[np.float32, np.float32]:
        """1 - beta1^t and 1 - beta2^t of the next update t, in f32.

        The recurrence b * beta + (1 - beta) is the emitted C's; it keeps the digits that the
        difference 1 - beta^t would lose in f32.
        """
        spec = self.training.spec
        done, bias1, bias2 = self._bias
        if done > self.updates + 1:
            done, bias1, bias2 = 0, np.float32(0.0), np.float32(0.0)
        for _ in range(done, self.updates + 1):
            bias1 = bias1 * np.float32(spec.beta1) + np.float32(1.0 - spec.beta1)
            bias2 = bias2 * np.float32(spec.beta2) + np.float32(1.0 - spec.beta2)
        self._bias = (self.updates + 1, bias1, bias2)
        return bias1, bias2

    # ---- parameters and state

    def params(self) -> dict[str, Array]:
        """Every parameter by its name in the model, learned values merged in.

        Real numbers, whole tensors: those of integer layers are dequantized (their matrices lie
        output features first).
        """
        return merged(self.training, self._resident)

    def set_params(self, values: Mapping[str, ArrayLike]) -> None:
        """Replace updated parameters; frozen ones may be given if they are as in the model.

        Args:
            values: Real numbers, whole tensors as ``params`` returns them; integer layers store the
                nearest integers, saturated.

        Raises:
            UsageError: Unknown name, wrong shape, another value for a frozen parameter, or a NaN or
                infinite value for one that is stored in integers.
        """
        for name, data in split(self.training, self._resident, values).items():
            self._resident[name][...] = data

    def is_finite(self) -> bool:
        """No float of the state is NaN or infinite; integers always are finite."""
        stored = [self._arrays[b] for b in self._memory.homes.values()]
        floats = (a for a in (*self._resident.values(), *stored) if a.dtype.kind == "f")
        return all(bool(np.isfinite(a).all()) for a in floats)

    def state_bytes(self) -> bytes:
        """The state space, byte for byte as the plan lays it out."""
        return b"".join(a.tobytes() for a in self._memory.state)

    def stored_bytes(self) -> bytes:
        """Optimizer tensors that live in storage, in the order of their updates."""
        return b"".join(self._arrays[b].tobytes() for b in self._memory.homes.values())

    def load_state(self, data: bytes, *, updates: int = 0, stored: bytes = b"") -> None:
        """Continue from saved state bytes, between two updates.

        Args:
            data: What ``state_bytes`` returned.
            updates: Updates done so far (Adam's time step).
            stored: What ``stored_bytes`` returned.

        Raises:
            UsageError: Not as many bytes as the plan lays out.
        """
        homes = [self._arrays[b] for b in self._memory.homes.values()]
        if len(stored) != sum(a.nbytes for a in homes):
            raise UsageError(
                f"the state in storage has {len(stored)} B, the plan has"
                f" {sum(a.nbytes for a in homes)} B"
            )
        if len(data) != self.state_nbytes:
            raise UsageError(f"the state has {len(data)} B, the plan has {self.state_nbytes} B")
        rest = np.frombuffer(data, np.uint8)
        for a in self._memory.state:
            a[:], rest = rest[: a.size], rest[a.size :]
        left = stored
        for a in homes:
            a[...] = np.frombuffer(left[: a.nbytes], a.dtype).reshape(a.shape)
            left = left[a.nbytes :]
        self.updates, self.micro_steps = updates, 0

    def snapshot(self) -> Snapshot:
        """All that training has changed; between two updates."""
        return Snapshot(self.state_bytes(), self.stored_bytes(), self.updates)

    def restore(self, snapshot: Snapshot) -> None:
        """Continue from a snapshot of a runtime of the same plan."""
        self.load_state(snapshot.state, updates=snapshot.updates, stored=snapshot.stored)

    def _reset(self) -> None:
        """Initial state: the model's parameters, zero in optimizer tensors and accumulators."""
        for name, array in self._resident.items():
            array[...] = self.training.graph.constants.get(name, 0)
        for home in self._memory.homes.values():
            self._arrays[home][...] = 0


def _by_rows(a: Array) -> Array:
    """The array itself; a scalar as one row."""
    return a if a.shape else a.reshape(1)


def _slice_to(plan: Plan, value: str) -> tuple[int, ...]:
    """Steps that the first computation of ``value`` needs, in order."""
    ids = {b.id: b for b in plan.buffers}
    steps = plan.steps
    end = next(i for i, s in enumerate(steps) if any(ids[w].value == value for w in s.writes))
    needed: set[str] = {w for w in steps[end].writes if ids[w].value == value}
    result = []
    for index in range(end, -1, -1):
        step = steps[index]
        if step.kind == "page_wait" and step.reads[1] in needed:
            result.append(index)
        elif step.kind != "update" and needed.intersection(step.writes):
            result.append(index)
            needed.update(r for r in step.reads if r is not None)
    return tuple(reversed(result))
