"""What of a model can be trained: node by node, with all obstacles at once and the way out.

Works for models that the importer rejects: rejected nodes stay in the list as blocks that no
gradient passes, so the report tells which layers would remain if the file were cut behind them.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .candidates import param_slots
from .freezing import frozen_before
from .graph import Graph, Node, TensorType, Value
from .head import replace_head
from .obstacles import Obstacle
from .onnx_convert import Conversion
from .onnx_file import FileNode, load_file
from .onnx_import import convert
from .opdef import get_op, parameter_slots, works
from .passes import clean

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
        advice: The way out, one line; empty if everything can be trained.
        notes: What the importer changed to make a model that can be trained.
    """

    model: str
    batch: int
    layers: tuple[LayerReport, ...]
    obstacles: tuple[Obstacle, ...]
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
    path: Path,
    *,
    batch: int = 1,
    fold_batchnorm: bool = True,
    head: int | None = None,
    freeze_before: Sequence[str] = (),
) -> TrainabilityReport:
    """Judge every node of a model file.

    Args:
        path: An ``.onnx`` file.
        batch: Value of the symbolic batch dimension.
        fold_batchnorm: Merge BatchNormalization into the layer before it, as the planner does.
        head: Replace the last layer by a fresh one for so many classes.
        freeze_before: Nodes before which nothing shall be trained.

    Raises:
        UsageError: The path is missing, a folder or unreadable, or a node is not known.
        UnsupportedModelError: The file can't be read as a graph at all.
    """
    file = load_file(path, batch)
    conversion = convert(file)
    graph, obstacles = conversion.graph, list(conversion.obstacles)
    if not obstacles:
        clean(graph, fold_batchnorm=fold_batchnorm)
        if head is not None:
            replace_head(graph, head)
    frozen = frozen_before(graph, freeze_before)
    for what, count in (("inputs", len(file.inputs)), ("outputs", len(file.outputs))):
        if count != 1:
            reason = f"has {count} {what}; training needs exactly one"
            obstacles.append(Obstacle(file.name, "model", reason))
    rejected = {n.name: n for n in file.nodes if n.name in {o.where for o in obstacles}}
    blocks = _blocks(conversion, rejected.values())
    slots = param_slots(graph)
    nodes = {n.name: n for n in graph.nodes}
    layers = []
    for name in conversion.order:
        if name in nodes:
            layers.append(_judge(nodes[name], graph, slots, blocks, frozen))
        elif name in rejected:
            layers.append(_rejected(rejected[name], conversion))
    report = TrainabilityReport(
        file.name, batch, tuple(layers), tuple(obstacles), "", file.notes
    )
    return replace(report, advice=_advice(report, set(rejected)))


def _blocks(conversion: Conversion, rejected: Iterable[FileNode]) -> dict[Value, str]:
    """Values whose gradient is blocked, each with the last node in the way."""
    graph = conversion.graph
    blocks: dict[Value, str] = {}
    live = set(graph.outputs)
    for missing in rejected:
        for name in missing.inputs:
            value = conversion.values.get(name)
            if value is not None:
                blocks[value] = missing.name
                live.add(value)
    for node in reversed(graph.nodes):
        if not live.intersection(node.outputs):
            continue
        live.update(node.operands())
        block = next((blocks[v] for v in node.outputs if v in blocks), None)
        if block is None and get_op(node.op).vjp is None:
            block = node.name
        if block is not None:
            for v in node.operands():
                blocks.setdefault(v, block)
    return blocks


def _judge(
    node: Node,
    graph: Graph,
    slots: Container[str],
    blocks: dict[Value, str],
    frozen: Mapping[str, str],
) -> LayerReport:
    op = get_op(node.op)
    held = [node.inputs[s.index] for s in parameter_slots(node)]
    params = [v for v in held if v is not None and v.name in graph.constants]
    data = [v.name for v in params if v.name not in slots]
    block = next((blocks[v] for v in node.outputs if v in blocks), None)
    trainable = False
    if not params:
        reason = "no parameters"
        if op.vjp is None:
            reason = "has no gradient: everything before it stays frozen"
    elif by := {frozen[v.name] for v in params if v.name in frozen}:
        reason = f"frozen by --freeze-before {', '.join(sorted(by))}"
    elif block is not None:
        reason = f"frozen: no gradient passes {block} behind it"
    elif op.vjp is None:
        reason = f"frozen: {node.op} has no gradient"
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


def _advice(report: TrainabilityReport, rejected: set[str]) -> str:
    stuck = [x for x in report.layers if x.name in rejected]
    if stuck:
        last = stuck[-1]
        behind = report.layers[report.layers.index(last) + 1 :]
        free = [x for x in behind if x.trainable]
        if not free:
            return f"no layer behind {last.name} ({last.op}) can be trained; export without it"
        return (
            f"cut the file behind {last.name} ({last.op}) with onnx.utils.extract_model and run the"
            f" front part frozen by other means: {len(free)} of {len(report.parametric)} layers"
            " remain trainable"
        )
    if report.obstacles:
        return "remove the obstacles and export again"
    blocked = [x for x in report.parametric if not x.trainable]
    if not blocked:
        return ""
    index = report.layers.index(blocked[-1])
    first = next((x for x in report.layers[index + 1 :] if x.trainable), None)
    if first is None:
        return f"nothing behind {blocked[-1].name} can be trained; only inference is possible"
    return (
        f"freeze everything before {first.name}: {len(report.trainable)} of"
        f" {len(report.parametric)} layers can be trained"
    )
