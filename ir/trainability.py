"""What of a model can be trained: node by node, with all obstacles at once and the way out.

Works for models that the importer rejects: rejected nodes stay in the list, no gradient passes
them, and the report tells which layers would remain if the file were cut behind them.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .candidates import param_slots
from .errors import UnsupportedModelError
from .freezing import frozen_before, stop_reasons, stops, untrainable, way_out
from .graph import Graph, Node, TensorType, Value
from .import_options import PLAIN, ImportOptions
from .obstacles import Obstacle, binding
from .onnx_convert import Conversion
from .onnx_file import FileNode, load_file
from .onnx_import import convert, finish
from .opdef import get_op, parameter_slots, works
from .passes import clean
from .predictions import check_predictions

_MAC_CLASSES = ("pointwise", "conv", "depthwise", "gemm")


@dataclass(frozen=True)
class LayerReport:
    """One node.

    Attributes:
        name: Node name in the model file.
        op: Operator.
        output: Type of the first result; None where it is not known.
        parameters: Elements of the constants that can be parameters of this operator.
        macs: Multiply-accumulates of one forward run (0 for operators without).
        trainable: Some of its parameters can be trained.
        reason: Why, or why not.
    """

    name: str
    op: str
    output: TensorType | None
    parameters: int
    macs: int
    trainable: bool
    reason: str


@dataclass(frozen=True)
class TrainabilityReport:
    """The answer of ``odt-plan check``.

    Attributes:
        model: Graph name.
        batch: Bound batch.
        layers: In execution order.
        obstacles: Everything that keeps the model from being planned; empty if it can be.
        stops: Nodes without a gradient that keep layers before them from being trained.
        advice: The way out, one line; empty if everything can be trained.
        notes: What the importer changed to make a model that can be trained.
    """

    model: str
    batch: int
    layers: tuple[LayerReport, ...]
    obstacles: tuple[Obstacle, ...]
    stops: tuple[Obstacle, ...]
    advice: str
    notes: tuple[str, ...] = ()

    @property
    def parametric(self) -> tuple[LayerReport, ...]:
        """Layers that have parameters."""
        return tuple(layer for layer in self.layers if layer.parameters)

    @property
    def trainable(self) -> tuple[LayerReport, ...]:
        """Layers that can be trained."""
        return tuple(layer for layer in self.layers if layer.trainable)

    @property
    def share(self) -> float:
        """Part of the layers with parameters that can be trained, 0 to 1."""
        return len(self.trainable) / len(self.parametric) if self.parametric else 0.0

    def summary(self) -> str:
        """One line with the totals."""
        total = sum(layer.parameters for layer in self.layers)
        free = sum(layer.parameters for layer in self.trainable)
        macs = sum(layer.macs for layer in self.layers)
        text = (
            f"{len(self.trainable)} of {len(self.parametric)} layers with parameters can be trained"
            f" ({free:,} of {total:,} parameters);"
            f" {macs:,} MACs per forward run, batch {self.batch}"
        )
        count = len(self.obstacles)
        return f"{text}; {count} obstacle{'s' * (count > 1)}" if count else text


def trainability(
    path: Path, options: ImportOptions = PLAIN, *, freeze_before: Sequence[str] = ()
) -> TrainabilityReport:
    """Judge every node of a model file.

    Args:
        path: An ``.onnx`` file.
        options: How it is imported.
        freeze_before: Nodes before which nothing shall be trained.

    Raises:
        UsageError: The path is missing, a folder or unreadable, or a node or dimension is
            not known.
        UnsupportedModelError: The file can't be read as a graph at all.
    """
    file = load_file(path, options)
    conversion = convert(file)
    graph, obstacles = conversion.graph, list(conversion.obstacles)
    if obstacles and not file.inputs:
        obstacles.append(Obstacle(file.name, "model", "has no inputs; training needs some"))
    if not obstacles:
        clean(graph, fold_batchnorm=options.folds)
        try:
            finish(graph, options)
            check_predictions(graph)
        except UnsupportedModelError as e:
            obstacles.append(Obstacle(file.name, "model", str(e).removeprefix(f"{file.name}: ")))
    frozen = frozen_before(graph, freeze_before)
    rejected = {n.name: n for n in file.nodes if n.name in {o.where for o in obstacles}}
    found = stops(graph, _read_by(rejected.values(), conversion))
    slots = param_slots(graph)
    nodes = {n.name: n for n in graph.nodes}
    layers = []
    for name in conversion.order:
        if name in nodes:
            layers.append(_judge(nodes[name], graph, slots, found, frozen))
        elif name in rejected:
            layers.append(_rejected(rejected[name], conversion))
    stuck = {} if rejected else untrainable(graph, frozen)
    report = TrainabilityReport(
        file.name,
        options.batch,
        tuple(layers),
        tuple(obstacles),
        stop_reasons(graph, stuck),
        way_out(graph, stuck, freeze_before) if stuck else "",
        graph.notes,
    )
    return replace(report, advice=_advice(report, set(rejected))) if obstacles else report


def _read_by(rejected: Iterable[FileNode], conversion: Conversion) -> dict[Value, str]:
    """What rejected nodes read, with the last of them."""
    pairs = ((conversion.values.get(i), n.name) for n in rejected for i in n.inputs)
    return {value: name for value, name in pairs if value is not None}


def _judge(
    node: Node,
    graph: Graph,
    slots: Container[str],
    stopped: Mapping[Value, str],
    frozen: Mapping[str, str],
) -> LayerReport:
    op = get_op(node.op)
    held = [node.inputs[s.index] for s in parameter_slots(node)]
    params = [v for v in held if v is not None and v.name in graph.constants]
    data = [v.name for v in params if v.name not in slots]
    trainable = False
    if not params:
        reason = "no parameters" if op.vjp is not None else "no parameters; has no gradient"
    elif named := {frozen[v.name] for v in params if v.name in frozen}:
        reason = f"frozen by --freeze-before {', '.join(sorted(named))}"
    elif (by := stopped.get(node.out)) is not None:
        reason = f"frozen: no gradient passes {by} behind it"
    elif len(data) == len(params):
        reason = f"frozen: {', '.join(data)} is also read as an ordinary operand"
    else:
        trainable = True
        names = [v.name for v in params if v.name not in data]
        reason = f"trainable: {', '.join(names)}"
    macs = (w.amount for w in works(node) if w.cost_class in _MAC_CLASSES)
    return LayerReport(
        name=node.name,
        op=node.op,
        output=node.out.type,
        parameters=sum(v.type.size for v in params),
        macs=sum(macs),
        trainable=trainable,
        reason=reason,
    )


def _rejected(node: FileNode, conversion: Conversion) -> LayerReport:
    reasons = [o.reason for o in conversion.obstacles if o.where == node.name]
    output = conversion.file.types.get(node.outputs[0])
    return LayerReport(node.name, node.op, output, 0, 0, False, "; ".join(reasons))


def _advice(report: TrainabilityReport, rejected: Container[str]) -> str:
    if told := binding(report.obstacles):
        return told
    stuck = [x for x in report.layers if x.name in rejected]
    if not stuck:
        return "remove the obstacles and export again"
    last = stuck[-1]
    behind = report.layers[report.layers.index(last) + 1 :]
    free = [x for x in behind if x.trainable]
    if not free:
        return f"no layer behind {last.name} ({last.op}) is known to train; export without it"
    return (
        f"cut the file behind {last.name} ({last.op}) with onnx.utils.extract_model and run the"
        f" front part by other means, as freezing it doesn't make it run here: {len(free)} of"
        f" {len(report.parametric)} layers remain trainable"
    )
