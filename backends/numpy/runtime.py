"""Executes a plan on NumPy arrays, step by step, inside the planned memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from ...ir.errors import UsageError
from ...ir.graph import Array, TensorType
from ...ir.indices import check_indices
from ...ir.sample import Samples, by_input, numbers_of
from ...ir.targets import bounds_of, by_target, check_bounds
from ...ir.training import TrainingGraph
from ...planner.plan import Plan, Replay
from ..inference import inference_steps
from .data import fitted, stored_sample
from .memory import Memory
from .parameters import by_parameter, changes, merged, split
from .regularization import Regularization, Shaping
from .scratch import Scratch
from .steps import Steps


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
        inference_steps: Indices of the steps that the predictions need.
        exact: Whether results are the emitted C's bit for bit.
        scratch_nbytes: Bytes beside arena and state that fast steps share; 0 if ``exact``.
    """

    def __init__(
        self,
        plan: Plan,
        training: TrainingGraph,
        *,
        exact: bool = True,
        moved_at: Literal["start", "wait"] = "start",
    ) -> None:
        """Allocate the planned memory and load the model's parameters into it.

        Args:
            plan: A plan that ``planner.check`` accepts for this training graph.
            training: The training graph.
            exact: Results are the emitted C's bit for bit, and dead bytes are poisoned. Otherwise
                f32 sums have the order that is fast on the host, by BLAS, and nothing is poisoned;
                results differ by rounding.
            moved_at: When a transfer beside the core copies its bytes: at its start or at its wait,
                the extremes of what DMA may do. The results are the same.
        """
        self.plan, self.training = plan, training
        self.micro_steps = self.updates = 0
        self._bounds = {v: bounds_of(training.graph, v) for v in training.targets}
        self._bias = (0, np.float32(0.0), np.float32(0.0))
        self._memory = Memory(plan, {v.name for u in training.updates for v in u.paged})
        self.exact = exact
        self._arrays: dict[str, Array] = dict(self._memory.views)
        self._shaping = Shaping(plan, training, self._arrays)
        self._resident: dict[str, Array] = {}
        self._io: dict[str, Array] = {}
        for b in plan.buffers:
            if b.space == "flash":
                data = training.graph.constants[b.value].copy()
                data.setflags(write=False)
                self._arrays[b.id] = data
            elif b.space == "io":
                t = TensorType(b.shape, b.dtype)
                self._io[b.value] = np.zeros(t.storage_shape, t.np_dtype)
                self._arrays[b.id] = self._io[b.value]
            elif b.space == "state":
                self._resident[b.value] = self._arrays[b.id]
        predictions = [v.name for v in training.predictions]
        self.inference_steps = inference_steps(plan, predictions)
        self._evaluation_steps = inference_steps(plan, [*predictions, training.loss.name])
        written = {w for s in plan.steps for w in s.writes}
        self._given = {
            b.value: b.id
            for b in plan.buffers
            if b.value in {v.name for v in training.samples}
            and b.space == "arena"
            and b.id not in written
        }
        scratch = None if exact else Scratch(self.arena_nbytes)
        steps = Steps(
            training,
            self._arrays,
            self._resident,
            self._shaping,
            moved_at=moved_at,
            scratch=scratch,
        )
        if scratch is not None:  # its size is known when every step has been bound
            for step in plan.steps:
                steps.bind(step)
            scratch.allocate()
        self._steps = [steps.bind(step) for step in plan.steps]
        self.scratch_nbytes = 0 if scratch is None else scratch.nbytes
        self._told = _first_writes(plan, [*predictions, training.loss.name])
        self._reset()

    @property
    def regularization(self) -> Regularization:
        """Weight decay and clipping of the updates; none at first."""
        return self._shaping.regularization

    @regularization.setter
    def regularization(self, wanted: Regularization) -> None:
        self._shaping.regularization = wanted

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
        """The prediction of a model of one output for one batch; as ``predict``.

        Raises:
            UsageError: ``x`` is not a batch of samples, or there are several outputs.
        """
        if len(self.training.predictions) > 1:
            names = ", ".join(v.name for v in self.training.predictions)
            raise UsageError(f"the model has several outputs, {names}; predict() gives them all")
        return self.predict(x)[self.training.prediction.name]

    def predict(self, x: Samples) -> dict[str, Array]:
        """All predictions for one batch, by name; runs only the steps that they need.

        Args:
            x: Samples, as the model's input; of an i8 input int8 as stored, or floats, which are
                quantized. Of several inputs arrays by their names.

        Raises:
            UsageError: ``x`` is not a batch of samples.
        """
        self._feed(x)
        found = self._run(self.inference_steps)
        return {v.name: found[v.name] for v in self.training.predictions}

    def evaluate(self, x: Samples, target: Samples) -> tuple[dict[str, Array], float]:
        """Predictions by name and loss for one batch; runs only the steps that they need.

        Args:
            x: Samples, as in ``predict``.
            target: As in ``train_step``.

        Raises:
            UsageError: ``x`` or ``target`` does not fit the model.
        """
        t = self.training
        self._feed(x)
        self._aim(target)
        found = self._run(self._evaluation_steps)
        return {v.name: found[v.name] for v in t.predictions}, float(found[t.loss.name])

    def train_step(self, x: Samples, target: Samples, lr: float) -> float:
        """One micro-step; the last one of a group updates the parameters.

        Args:
            x: Samples, as in ``infer``.
            target: Labels i32[N] (cross entropy, triplets) or a tensor like the prediction. Of
                several outputs arrays by name, see ``ir.targets.target_names``.
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
        self._run(range(replay.front))
        return self._arrays[replay.buffer].copy()

    def train_cached(self, entry: Array, target: Samples, lr: float) -> float:
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
        if self.exact:
            self._memory.clear()
        boundary[...] = entry
        return self._train(replay.front, target, lr)

    @property
    def _replay(self) -> Replay:
        if self.plan.replay is None:
            raise UsageError("this plan replays nothing; plan again with --replay")
        return self.plan.replay

    def _train(self, begin: int, target: Samples, lr: float) -> float:
        """The steps from ``begin`` on; what they need of those before is in the arena."""
        t = self.training
        self._aim(target)
        if t.hyper.name in self._io:
            self._io[t.hyper.name][...] = self._hyper(lr)
        last = self.micro_steps + 1 == t.spec.micro_batches
        self._shaping.begin()
        found = self._run(range(begin, len(self._steps)), last=last)
        self.micro_steps = 0 if last else self.micro_steps + 1
        self.updates += last
        return float(found[t.loss.name])

    def _run(self, indices: Iterable[int], *, last: bool = True) -> dict[str, Array]:
        """Do some steps, in order, without those of the last micro-step if this is another.

        Returns:
            Copies of predictions and loss, as far as they were computed: their bytes are used
            again.
        """
        found: dict[str, Array] = {}
        with np.errstate(all="ignore"):  # as on the device: NaN and infinity are values
            for index in indices:
                if last or not self.plan.steps[index].last_micro:
                    self._steps[index]()
                    for name, b in self._told.get(index, ()):
                        found[name] = self._arrays[b].copy()
                if self.exact:
                    self._memory.retire(index)
        return found

    # ---- inputs

    def _feed(self, x: Samples) -> None:
        t, stored = self.training, {}
        for name, v, given in by_input(t.samples, x):
            of = f" of {name}" if len(t.samples) > 1 else ""
            given = numbers_of(t.graph, v, given)
            stored[v.name] = stored_sample(given, v.type, f"the sample{of}")
            check_indices(t.graph, v, stored[v.name], f"the batch{of}")
        if self.exact:
            self._memory.clear()
        for name, sample in stored.items():
            self._arrays[self._given[name]][...] = sample

    def _aim(self, target: Samples) -> None:
        for name, v, given in by_target(self.training, target):
            what = "the target" if len(self.training.targets) == 1 else f"the target {name}"
            data = fitted(given, v.type, what)
            check_bounds(data, self._bounds[v], what)
            self._io[v.name][...] = data

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
        output features first). Channels stand as in the model file, whatever the plan's order.
        """
        return merged(self.training, self._resident)

    def changes(self) -> dict[str, Array]:
        """What training has changed of each updated parameter, by its name in the model.

        Real numbers, f32, whole tensors as ``params`` has them; 0 where a part is frozen.
        """
        return by_parameter(self.training, changes(self.training, self._resident))

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


def _first_writes(plan: Plan, values: Sequence[str]) -> dict[int, list[tuple[str, str]]]:
    """Of the steps that compute one of some values first: its name and the buffer it is in then."""
    value, found = {b.id: b.value for b in plan.buffers}, set[str]()
    result: dict[int, list[tuple[str, str]]] = {}
    for index, step in enumerate(plan.steps):
        for b in step.writes:
            if value[b] in values and value[b] not in found:
                found.add(value[b])
                result.setdefault(index, []).append((value[b], b))
    return result
