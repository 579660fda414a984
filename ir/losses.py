"""How the loss of a training step is built: its target, what it reads, where backward starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .errors import UnsupportedModelError
from .graph import Attr, Graph, TensorType, Value
from .training import LossName, TrainingSpec

#: Loss -> its operator; that of its gradient is named ``...Grad``.
_OPERATORS: dict[LossName, str] = {
    "mse": "MSE",
    "huber": "Huber",
    "bce": "BCEWithLogits",
    "cosine": "CosineLoss",
    "triplet": "TripletLoss",
}
#: Least samples of a micro-batch in which there is a triplet.
LEAST_TRIPLET_BATCH = 3


@dataclass(frozen=True)
class Ending:
    """A loss in a training graph.

    Attributes:
        start: The value that backward starts at: the prediction, or what its last activation reads
            where the two are differentiated as one.
        target: The run-time input.
        loss: The scalar.
        seed: Adds the node that makes the gradient of ``start``.
    """

    start: Value
    target: Value
    loss: Value
    seed: Callable[[], Value]


def add_loss(graph: Graph, prediction: Value, spec: TrainingSpec) -> Ending:
    """Add target and loss of a prediction.

    Args:
        graph: The training graph so far; gets an input ``target`` and nodes of the phase ``loss``.
        prediction: Its result, f32.
        spec: Names the loss and holds its parameters.

    Raises:
        UnsupportedModelError: The prediction does not suit the loss.
    """
    if spec.loss == "cross_entropy":
        return _cross_entropy(graph, prediction)
    start, kind = prediction, prediction.type
    if spec.loss == "bce":
        start = _before(prediction, "Sigmoid") or prediction
    elif spec.loss in ("cosine", "triplet"):
        _check_matrix(prediction, spec.loss, "features")
    if spec.loss == "triplet":
        kind = TensorType(kind.shape[:1], "i32")
        if kind.size < LEAST_TRIPLET_BATCH:
            raise UnsupportedModelError(
                f"triplets need {LEAST_TRIPLET_BATCH} samples or more in a micro-batch, not"
                f" {kind.size}; use --batch 8, say"
            )
    parameters: dict[LossName, dict[str, Attr]] = {
        "huber": {"delta": spec.delta},
        "triplet": {"margin": spec.margin},
    }
    return _ending(graph, _OPERATORS[spec.loss], start, start, kind, parameters.get(spec.loss))


def _cross_entropy(graph: Graph, prediction: Value) -> Ending:
    """Softmax and cross entropy, differentiated as one."""
    _check_matrix(prediction, "cross entropy", "classes")
    start = _before(prediction, "Softmax")
    if start is None:
        start = prediction
        prediction = graph.add_node(
            "Softmax", (start,), {"axis": -1}, name="loss/softmax", phase="loss"
        ).out
    elif (producer := prediction.producer) and producer.int_attr("axis", -1) not in (-1, 1):
        raise UnsupportedModelError(
            f"node {producer.name}: cross entropy needs a Softmax over the classes"
            f" (axis 1), not axis {producer.int_attr('axis')}; use --loss mse"
        )
    labels = TensorType(prediction.type.shape[:1], "i32")
    return _ending(graph, "CrossEntropy", start, prediction, labels)


def _ending(
    graph: Graph,
    op: str,
    start: Value,
    read: Value,
    kind: TensorType,
    attrs: dict[str, Attr] | None = None,
) -> Ending:
    target = graph.add_input("target", kind)
    gradient = "SoftmaxCrossEntropyGrad" if op == "CrossEntropy" else f"{op}Grad"
    operands = (read, target)
    loss = graph.add_node(op, operands, attrs, name="loss", phase="loss").out
    return Ending(
        start,
        target,
        loss,
        lambda: graph.add_node(
            gradient, operands, attrs, name="loss/grad", phase="backward"
        ).out,
    )


def _before(prediction: Value, op: str) -> Value | None:
    """What the last operator reads, if it is ``op``."""
    producer = prediction.producer
    return producer.inputs[0] if producer is not None and producer.op == op else None


def _check_matrix(prediction: Value, loss: str, columns: str) -> None:
    if len(prediction.type.shape) != 2:
        raise UnsupportedModelError(
            f"{loss} needs a prediction [batch, {columns}]; {prediction.name} is"
            f" {prediction.type}; use --loss mse"
        )
