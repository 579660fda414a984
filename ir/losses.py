"""How the loss of a training step is built: its target, what it reads, where backward starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .errors import UnsupportedModelError, UsageError
from .graph import Attr, Graph, Node, TensorType, Value
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
        loss: The scalar, times its weight.
        seed: Adds what the gradient of ``start`` is, or of ``loss`` where there are ``nodes``.
        nodes: What backward passes between the two, of the file's own loss.
    """

    start: Value
    target: Value
    loss: Value
    seed: Callable[[], Value]
    nodes: tuple[Node, ...] = ()


def add_losses(
    graph: Graph, predictions: Sequence[Value], spec: TrainingSpec, in_file: Graph | None = None
) -> tuple[tuple[Ending, ...], Value]:
    """Add targets and losses of all predictions.

    Args:
        graph: The training graph so far; gets an input for each target and nodes of the phase
            ``loss``.
        predictions: Its results, f32.
        spec: Names the losses, their weights and their parameters.
        in_file: The loss of the file, if there is one; then there is one prediction.

    Returns:
        The losses, and their sum, each times its weight.

    Raises:
        UnsupportedModelError: A prediction does not suit its loss.
        UsageError: The file has a loss and another one is asked for, or the other way round; or
            the model has no output of a name that the spec has.
    """
    names = [v.name for v in predictions]
    for option, given in (("--loss", spec.losses), ("--loss-weight", spec.loss_weights)):
        if unknown := [n for n in given if n not in names]:
            raise UsageError(
                f"{option} {unknown[0]}: {graph.name} has no such output; it has {', '.join(names)}"
            )
    if in_file is not None:
        (prediction,) = predictions
        loss = spec.loss_of(prediction.name)
        if loss != "output":
            name = loss.replace("_", "-")
            raise UsageError(
                f"{graph.name} ends in its own loss, {in_file.outputs[0].name}, so it can't be"
                f" trained by {name}; leave --loss {name} out, or give --keep-output"
                f" {prediction.name}"
            )
        if spec.loss_weights:
            raise UsageError(
                f"--loss-weight: {graph.name} is trained by its own loss alone; leave it out"
            )
        end = _of_file(graph, prediction, in_file)
        return (end,), end.loss
    several = len(predictions) > 1
    ends = []
    for v in predictions:
        of = f"/{v.name}" if several else ""
        weight = spec.loss_weights.get(v.name, 1.0)
        ends.append(_weighted(graph, add_loss(graph, v, spec, of), weight, of))
    total = ends[0].loss
    for end in ends[1:]:
        total = graph.add_node("Add", (total, end.loss), name="loss", phase="loss").out
    return tuple(ends), total


def add_loss(graph: Graph, prediction: Value, spec: TrainingSpec, of: str = "") -> Ending:
    """Add target and loss of a prediction.

    Args:
        graph: The training graph so far; gets an input for the target and nodes of the phase
            ``loss``.
        prediction: One of its results, f32.
        spec: Names the loss and holds its parameters.
        of: What names of inputs and nodes end in.

    Raises:
        UnsupportedModelError: The prediction does not suit the loss.
        UsageError: The loss of the file is asked for.
    """
    name = spec.loss_of(prediction.name)
    if name == "output":
        raise UsageError(
            f"--loss output: no output of {graph.name} is a scalar that depends on an input which"
            " the prediction does not depend on; name a loss, or export the model with its loss"
        )
    if name == "cross_entropy":
        return _cross_entropy(graph, prediction, of)
    start, kind = prediction, prediction.type
    if name == "bce":
        start = _before(prediction, "Sigmoid") or prediction
    elif name in ("cosine", "triplet"):
        _check_matrix(prediction, name, "features")
    if name == "triplet":
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
    return _ending(graph, _OPERATORS[name], start, start, kind, parameters.get(name), of)


def _weighted(graph: Graph, end: Ending, weight: float, of: str) -> Ending:
    """The loss times a number, and so its gradient."""
    if weight == 1.0:
        return end
    factor = graph.add_constant(f"loss{of}/weight", np.array(weight, np.float32))
    loss = graph.add_node("Mul", (end.loss, factor), name=f"loss{of}/weighted", phase="loss").out

    def seed() -> Value:
        operands, name = (end.seed(), factor), f"loss{of}/grad/weighted"
        return graph.add_node("Mul", operands, name=name, phase="backward").out

    return replace(end, loss=loss, seed=seed)


def _cross_entropy(graph: Graph, prediction: Value, of: str) -> Ending:
    """Softmax and cross entropy, differentiated as one."""
    _check_matrix(prediction, "cross entropy", "classes")
    start = _before(prediction, "Softmax")
    if start is None:
        start = prediction
        prediction = graph.add_node(
            "Softmax", (start,), {"axis": -1}, name=f"loss{of}/softmax", phase="loss"
        ).out
    elif (producer := prediction.producer) and producer.int_attr("axis", -1) not in (-1, 1):
        raise UnsupportedModelError(
            f"node {producer.name}: cross entropy needs a Softmax over the classes"
            f" (axis 1), not axis {producer.int_attr('axis')}; use --loss mse"
        )
    labels = TensorType(prediction.type.shape[:1], "i32")
    return _ending(graph, "CrossEntropy", start, prediction, labels, None, of)


def _of_file(graph: Graph, prediction: Value, in_file: Graph) -> Ending:
    """The nodes of the file's loss, and the slope 1 of the loss by itself."""
    read, target = in_file.inputs
    twin = {read: prediction, target: graph.add_input(target.name, target.type)}
    for name, data in in_file.constants.items():
        value = in_file.values[name]
        twin[value] = graph.add_constant(name, data, value.type.dtype, shape=value.type.shape)
    nodes = []
    for node in in_file.nodes:
        operands = [None if v is None else twin[v] for v in node.inputs]
        names = [v.name for v in node.outputs]
        nodes.append(
            graph.add_node(
                node.op, operands, node.attrs, name=node.name, outputs=names, phase="loss"
            )
        )
        twin |= zip(node.outputs, nodes[-1].outputs, strict=True)
    loss = twin[in_file.outputs[0]]
    return Ending(
        prediction,
        twin[target],
        loss,
        lambda: graph.add_node(
            "Expand",
            (graph.add_constant(f"{loss.name}/one", np.array(1.0, np.float32)),),
            {"shape": loss.type.shape},
            name=f"{loss.name}/slope",
            phase="backward",
        ).out,
        tuple(nodes),
    )


def _ending(
    graph: Graph,
    op: str,
    start: Value,
    read: Value,
    kind: TensorType,
    attrs: dict[str, Attr] | None,
    of: str,
) -> Ending:
    target = graph.add_input(f"target{of}", kind)
    gradient = "SoftmaxCrossEntropyGrad" if op == "CrossEntropy" else f"{op}Grad"
    operands = (read, target)
    loss = graph.add_node(op, operands, attrs, name=f"loss{of}", phase="loss").out
    return Ending(
        start,
        target,
        loss,
        lambda: graph.add_node(
            gradient, operands, attrs, name=f"loss{of}/grad", phase="backward"
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
