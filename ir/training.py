"""What a training step is: its specification and the record of its updates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from .errors import UsageError
from .graph import Graph, Node, Value

LossName = Literal["cross_entropy", "mse", "huber", "bce", "cosine", "triplet", "output"]
OptimizerName = Literal["sgd", "momentum", "adagrad", "adam"]
RoundingName = Literal["stochastic", "nearest"]
#: How the input of a float layer is kept for the gradient of its weight.
Saved = Literal["f32", "f16", "i8"]
#: Where an update has its optimizer tensors: in RAM, in storage, or it has none and is plain SGD.
StateForm = Literal["keep", "paged", "sgd"]

#: Names of an optimizer's tensors per parameter.
STATE_SLOTS: dict[OptimizerName, tuple[str, ...]] = {
    "sgd": (),
    "momentum": ("momentum",),
    "adagrad": ("sum",),
    "adam": ("m", "v"),
}
#: Of a loss: squares stay within f32.
LARGEST_PARAMETER = 1e18


@dataclass(frozen=True)
class TrainingSpec:
    """Loss, optimizer and batching of one training step.

    Attributes:
        loss: ``cross_entropy`` (integer labels; the final Softmax is fused), ``mse``, ``huber``
            (SmoothL1 at ``delta`` 1), ``bce`` (binary cross entropy of logits; the final Sigmoid is
            fused), ``cosine`` (1 - cos to a target vector), ``triplet`` (over all triplets of the
            micro-batch that its integer labels make), or ``output``, the loss of the file. Of
            several outputs each that ``losses`` doesn't name has it.
        optimizer: Update rule as in torch.optim: ``sgd``, ``momentum`` (SGD with momentum, no
            dampening, no Nesterov), ``adagrad`` (no decay of the step size) or ``adam``.
        micro_batches: Micro-batches whose gradients are averaged before an update.
        momentum: Momentum coefficient.
        beta1: Adam's decay of the first moment.
        beta2: Adam's decay of the second moment.
        epsilon: That of Adagrad and Adam.
        qas: Quantization-aware scaling: the real weight of an integer parameter moves as a float
            one would. Without it, plain descent on the stored integers.
        rounding: Of the steps of integer parameters; ``stochastic`` is unbiased.
        delta: Where Huber's loss turns from squares to a straight line.
        margin: Of triplets, by which another label has to be farther away, in squared distance.
        tile_bytes: Most bytes of a gradient tile: rows of a streamed weight gradient are computed
            into a scratch tile of at most this size (or one row, if a row is larger) and applied at
            once. The target's core says which suits it; what is trained does not depend on it.
        bptt: Gradients of recurrent layers stop every so many steps, counted from the last one, as
            if the state were a constant there. None: they pass all steps.
        losses: Those of single outputs, by name.
        loss_weights: Factors of the losses of outputs, by name; 1 where there is none. What is
            trained by is the sum.
    """

    loss: LossName = "cross_entropy"
    optimizer: OptimizerName = "sgd"
    micro_batches: int = 1
    momentum: float = 0.9
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    qas: bool = True
    rounding: RoundingName = "stochastic"
    delta: float = 1.0
    margin: float = 1.0
    tile_bytes: int = 512
    bptt: int | None = None
    losses: Mapping[str, LossName] = field(default_factory=dict, hash=False)
    loss_weights: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Reject impossible settings."""
        if self.micro_batches < 1:
            raise UsageError(f"micro-batches must be at least 1, not {self.micro_batches}")
        for name in ("momentum", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:  # also rejects NaN
                raise UsageError(f"{name} must be from 0 to below 1, not {getattr(self, name)}")
        if not 0 < self.epsilon < 1:
            raise UsageError(f"epsilon must be between 0 and 1, not {self.epsilon}")
        if self.tile_bytes < 1:
            raise UsageError(f"a gradient tile must have at least 1 byte, not {self.tile_bytes}")
        if self.bptt is not None and not 1 <= self.bptt < 2**31:
            raise UsageError(f"bptt must be at least 1 step, not {self.bptt}")
        for name in ("delta", "margin"):
            if not 0 < getattr(self, name) <= LARGEST_PARAMETER:
                raise UsageError(f"{name} must be above 0 and finite, not {getattr(self, name)}")
        for name, weight in self.loss_weights.items():
            if not 0 < weight <= LARGEST_PARAMETER:
                raise UsageError(
                    f"the weight of the loss of {name} must be above 0 and finite, not {weight}"
                )
        if self.rounding not in get_args(RoundingName):
            known = ", ".join(get_args(RoundingName))
            raise UsageError(f"rounding {self.rounding} is not one of {known}")

    def loss_of(self, output: str) -> LossName:
        """The loss of one output."""
        return self.losses.get(output, self.loss)

    @property
    def state_slots(self) -> tuple[str, ...]:
        """Names of the optimizer's tensors per parameter."""
        return STATE_SLOTS[self.optimizer]


@dataclass(frozen=True)
class Candidate:
    """One way to update one parameter.

    Attributes:
        param: Parameter (initializer) name.
        channels: Leading input channels that are updated; None: the whole tensor.
        saved: For a weight of a float layer, how the layer's input is kept for the gradient: as it
            is, or rounded to half precision or to its i8 form. Everything else is kept as it is.
        state: Where its optimizer tensors are. ``paged`` ones are in RAM for its step only; ``sgd``
            has none: the step is that of plain SGD, of the same step size, whatever the optimizer.
    """

    param: str
    channels: int | None = None
    saved: Saved = "f32"
    state: StateForm = "keep"


@dataclass(frozen=True, eq=False)
class Update:
    """The nodes that carry out one candidate in a training graph.

    Attributes:
        candidate: What is updated.
        role: ``weight``, ``bias``, ``scale`` or ``statistic``.
        owner: Forward node that the parameter belongs to.
        value: The updated tensor (the hot part of a partly updated weight), kept in RAM: f32, or i8
            and i32 of an integer layer.
        grad: The gradient of ``value``, f32 and with respect to its real numbers.
        grad_node: Computes ``grad`` inside the update step, streamed in row tiles where it can be;
            None where the gradient is an ordinary tensor that others read as well.
        accumulate_node: Adds the gradient to the accumulator; None without gradient accumulation.
        apply_node: The optimizer.
        accumulator: Accumulated gradient (RAM, survives micro-steps), None without accumulation.
        states: Optimizer tensors (they survive steps).
        tile_rows: Rows of axis 0 per gradient tile; equal to all rows where not streamable.
    """

    candidate: Candidate
    role: Literal["weight", "bias", "scale", "statistic"]
    owner: Node
    value: Value
    grad: Value
    grad_node: Node | None
    accumulate_node: Node | None
    apply_node: Node
    accumulator: Value | None
    states: tuple[Value, ...]
    tile_rows: int

    @property
    def tile_bytes(self) -> int:
        """Bytes of the gradient tile; 0 where the gradient is an ordinary tensor."""
        if self.grad_node is None:
            return 0
        t = self.grad.type
        rows = t.shape[0] if t.shape else 1
        return t.nbytes // rows * self.tile_rows

    @property
    def paged(self) -> tuple[Value, ...]:
        """Optimizer tensors whose home is the storage."""
        return self.states if self.candidate.state == "paged" else ()

    @property
    def resident(self) -> tuple[Value, ...]:
        """What the update keeps in RAM for good: weights, optimizer tensors, accumulator."""
        kept = (self.value, *(() if self.paged else self.states))
        return kept if self.accumulator is None else (*kept, self.accumulator)


@dataclass(frozen=True, eq=False)
class TrainingGraph:
    """Forward, loss, backward and update in one graph.

    Attributes:
        graph: All nodes, in execution order.
        spec: What was asked for.
        samples: The data inputs, in the file's order.
        targets: For each prediction labels ``i32[N]`` (cross entropy, triplets), a tensor like it,
            or what the loss of the file takes.
        hyper: Run-time input of the optimizers, ``f32[3]``: step size, 1 / sqrt(Adam's second bias
            correction), and the number of the update, counted from 1 (for stochastic rounding). For
            Adam ``f32[4]``: the step size divided by its first bias correction as well.
        predictions: The model's outputs, in the file's order.
        loss: Scalar loss of the micro-batch, the weighted sum of those of all predictions.
        updates: One per candidate, in execution order.
    """

    graph: Graph
    spec: TrainingSpec
    samples: tuple[Value, ...]
    targets: tuple[Value, ...]
    hyper: Value
    predictions: tuple[Value, ...]
    loss: Value
    updates: tuple[Update, ...]

    @property
    def sample(self) -> Value:
        """The data input of a model that has one; the first of several."""
        return self.samples[0]

    @property
    def prediction(self) -> Value:
        """The output of a model that has one; the first of several."""
        return self.predictions[0]

    @property
    def target(self) -> Value:
        """The target of ``prediction``."""
        return self.targets[0]
