"""Weight decay and gradient clipping: what happens to a gradient before the optimizer has it.

Both work on the operands of an update step, so they need no memory of the arena beyond one number.
Clipping follows ``torch.nn.utils.clip_grad_norm_``: a gradient of norm ``n`` is multiplied by
``min(1, limit / (n + 1e-6))``. The norm of all gradients is known only where the plan has all of
them whole before its first weight changes. Elsewhere each tensor is clipped by its own norm; one
whose gradient is streamed is computed twice, first for its norm, then for the update.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ...ir.errors import UsageError
from ...ir.graph import Array
from ...ir.training import TrainingGraph, Update
from ...planner.plan import Plan

#: Of ``clip_grad_norm_``, so that a norm of 0 divides nothing.
_EPSILON = 1e-6


@dataclass(frozen=True)
class Regularization:
    """Weight decay and clipping of a run.

    Attributes:
        weight_decay: Of weights, not of biases, scales and statistics. Coupled (the gradient of
            ``weight_decay / 2 * w ** 2`` is added to a weight's) for SGD, momentum and Adagrad, as
            in torch.optim; decoupled for Adam, as in AdamW (Loshchilov and Hutter, 2019, alg. 2):
            the weight is multiplied by ``1 - step size * weight_decay`` first.
        clip: Largest norm of a gradient, averaged over the micro-batches; None: no clipping.
    """

    weight_decay: float = 0.0
    clip: float | None = None

    def __post_init__(self) -> None:
        """Reject impossible settings."""
        if not (np.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise UsageError(
                f"--weight-decay: {self.weight_decay} is no number >= 0; give for example 0.0001"
            )
        if self.clip is not None and not (np.isfinite(self.clip) and self.clip > 0):
            raise UsageError(f"--clip: {self.clip} is no norm above 0; give for example 1.0")

    def check(self, training: TrainingGraph) -> None:
        """Demand what can be carried out.

        Raises:
            UsageError: Adam's decay is asked of weights that are stored in integers, whose steps it
                is far below.
        """
        for u in training.updates:
            if self.weight_decay and u.role == "weight" and u.apply_node.op == "QAdam":
                raise UsageError(
                    f"--weight-decay: {u.candidate.param} is stored in i8 and trained by Adam,"
                    " whose decay is less than a step of i8; plan again with --optimizer momentum,"
                    " or --precision mixed"
                )

    def factor(self, norm: float) -> np.float32:
        """What gradients of a norm are multiplied by."""
        assert self.clip is not None
        return (
            np.float32(min(1.0, self.clip / (norm + _EPSILON))) if norm == norm else np.float32(1)
        )

    def shaped(
        self, update: Update, operands: list[Array | None], rate: float, factor: np.float32
    ) -> list[Array | None]:
        """Operands of an optimizer, or rows of them, with decay and clipping.

        Args:
            update: What is updated.
            operands: Weight, gradient as it was summed up, and the others.
            rate: Step size.
            factor: Of the gradient.
        """
        w, g = operands[:2]
        assert w is not None
        assert g is not None
        if factor != 1:
            g = np.asarray(factor * g)
        if self.weight_decay and update.role == "weight":
            if update.apply_node.op == "Adam":
                w = np.asarray(np.float32(1 - rate * self.weight_decay) * w)
            else:
                scale = update.apply_node.float_attr("gradient_scale", 1.0)
                g = np.asarray(g + np.float32(self.weight_decay / scale) * _real(operands))
        return [w, g, *operands[2:]]


def _real(operands: list[Array | None]) -> Array:
    """The weight in real numbers; an integer one has its steps, one per row, as last operand."""
    w, steps = operands[0], operands[-1]
    assert w is not None
    if w.dtype.kind == "f":
        return w
    assert steps is not None
    return np.asarray(w * steps.reshape(-1, *(1,) * (w.ndim - 1)))


class Shaping:
    """Regularization of the update steps of a plan, as they are carried out.

    Attributes:
        regularization: What to do; nothing at first.
    """

    def __init__(self, plan: Plan, training: TrainingGraph, arrays: Mapping[str, Array]) -> None:
        """Find what the norm follows from.

        Args:
            plan: The plan.
            training: Its training graph.
            arrays: The array of every buffer, by its id.
        """
        self.regularization = Regularization()
        self._arrays = arrays
        self._whole = whole_gradients(plan, training)
        self._common: np.float32 | None = None
        hyper = training.hyper.name
        self._hyper = next((b.id for b in plan.buffers if b.value == hyper), "")

    @property
    def active(self) -> bool:
        """Whether anything is done."""
        return self.regularization != Regularization()

    def begin(self) -> None:
        """A micro-step begins: norms of the one before are forgotten."""
        self._common = None

    def factor(self, update: Update, gradient: Iterable[Array | None]) -> np.float32:
        """What clipping multiplies a gradient by.

        Args:
            update: Whose gradient.
            gradient: Its parts, which are asked for only if they count.
        """
        if self.regularization.clip is None or update.role == "statistic":
            return np.float32(1)
        if self._common is not None:
            return self._common
        whole = self._whole
        parts = gradient if whole is None else (self._arrays[b] for b in whole)
        squares = 0.0
        for g in parts:
            squares = squares if g is None else _with_squares(squares, g)
        scale = update.apply_node.float_attr("gradient_scale", 1.0)
        factor = self.regularization.factor(float(np.sqrt(squares)) * scale)
        if whole is not None:
            self._common = factor
        return factor

    def shaped(
        self, update: Update, operands: list[Array | None], factor: np.float32
    ) -> list[Array | None]:
        """Operands of an optimizer, or rows of them, with decay and clipping."""
        if not self.active or update.role == "statistic":
            return operands
        rate = float(self._arrays[self._hyper][0])
        return self.regularization.shaped(update, operands, rate, factor)


def _with_squares(total: float, gradient: Array) -> float:
    """A sum and the squares of a gradient's elements, added in their order, in double precision.

    So the bits are the same in tiles of whatever size.
    """
    flat = gradient.reshape(-1).astype(np.float64)
    return float(np.add.accumulate(np.concatenate(([total], flat * flat)))[-1])


def whole_gradients(plan: Plan, training: TrainingGraph) -> tuple[str, ...] | None:
    """Buffers of all gradients, where each is whole before the first weight changes.

    Returns:
        Buffer ids, without those of statistics; None: the norm of all gradients is not known then.
    """
    learned = {u.apply_node.name: u for u in training.updates if u.role != "statistic"}
    applied = [
        (i, s) for i, s in enumerate(plan.steps) if s.kind == "update" and s.nodes[-1] in learned
    ]
    if not applied or any(len(s.nodes) > 1 for _, s in applied):
        return None
    first = applied[0][0]
    buffers = tuple(str(s.reads[1]) for _, s in applied)
    late = {w for s in plan.steps[first:] for w in s.writes}
    return None if late.intersection(buffers) else buffers


def clipped_by(plan: Plan, training: TrainingGraph) -> Literal["global", "tensor"]:
    """Whether clipping follows the norm of all gradients, or each tensor's own."""
    learned = sum(u.role != "statistic" for u in training.updates)
    return "global" if learned == 1 or whole_gradients(plan, training) else "tensor"
