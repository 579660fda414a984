"""What is supported, operator by operator: read off the import rules and the registry."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import onnx

from .lowered_layers import INTEGER, KEEPING
from .onnx_index import CONSTANT_ONLY
from .onnx_ops import RULES
from .onnx_read import MIN_OPSET
from .onnx_unroll import CONTROL_FLOW, DEFINED
from .opdef import OpDef, all_ops

#: ONNX operator -> what a rule writes for it, where that is not the operator of the same name.
#: Reshapes (views) and numbers beside it are left out; nothing: it is gone once imported.
WRITTEN_AS: dict[str, tuple[str, ...]] = {
    "Cast": ("Where", "Equal", "Not"),
    "CastLike": ("Where", "Equal", "Not"),
    "Celu": ("Elu",),
    **dict.fromkeys((*CONTROL_FLOW, *DEFINED), ()),
    "Constant": (),
    "DepthToSpace": ("Transpose",),
    "DequantizeLinear": (),
    "Dropout": (),
    "Einsum": ("MatMul", "Mul", "ReduceSum", "Transpose"),
    "Flatten": ("Reshape",),
    "GatherElements": ("Gather", "TakeLanes"),
    "GatherND": ("Gather",),
    "GlobalLpPool": ("ReduceL1", "ReduceL2", "ReduceSum", "Abs", "Relu", "Pow"),
    "GlobalMaxPool": ("MaxPool",),
    "Hardmax": ("ArgMax", "ToReal", "Equal", "Where"),
    "Identity": (),
    "InstanceNormalization": ("GroupNormalization",),
    "IsInf": ("Greater", "Abs"),
    "IsNaN": ("Equal", "Not"),
    "Less": ("Greater",),
    "LessOrEqual": ("GreaterOrEqual",),
    "LpPool": ("AveragePool", "Abs", "Mul", "Relu", "Sqrt", "Pow"),
    "Mean": ("Add", "Div"),
    "MeanVarianceNormalization": ("GroupNormalization", "Transpose"),
    "Mod": ("Mod", "Fmod"),
    "NegativeLogLikelihoodLoss": ("NegativeLogLikelihood",),
    "OneHot": ("ToReal", "ToIndex", "Greater", "Add", "Where", "Equal"),
    "QLinearConv": ("Conv",),
    "QLinearMatMul": ("MatMul",),
    "QuantizeLinear": (),
    "ReverseSequence": ("Gather",),
    "Slice": ("Slice", "Gather"),
    "ReduceLogSum": ("ReduceSum", "Log"),
    "ScatterElements": ("Scatter",),
    "ScatterND": ("Scatter",),
    "Selu": ("Elu",),
    "SoftmaxCrossEntropyLoss": ("LogSoftmax", "NegativeLogLikelihood"),
    "SpaceToDepth": ("Transpose",),
    "Split": ("Slice",),
    "Squeeze": ("Reshape",),
    "Sum": ("Add",),
    "Tan": ("Sin", "Cos", "Div"),
    "Tile": ("Expand",),
    "TopK": ("ArgTopK", "TakeLanes"),
    "Unsqueeze": ("Reshape",),
    "Upsample": ("Resize",),
}


@dataclass(frozen=True)
class Support:
    """One ONNX operator.

    Attributes:
        operator: Its name in ONNX.
        written_as: Operators of the IR that it becomes; empty: nothing runs.
        constant: It is evaluated at import, so its operands must be constants or shapes.
        gradient: A gradient passes it.
        int8: It computes on integers where scales are known; else in f32 between i8 layers.
        first_opset: Oldest version of the operator set that it is read in.
        last_opset: Newest one that has it; None: the newest of the installed onnx does.
    """

    operator: str
    written_as: tuple[str, ...]
    constant: bool
    gradient: bool
    int8: bool
    first_opset: int
    last_opset: int | None


def supported() -> list[Support]:
    """All ONNX operators that are read, by name."""
    return [_support(name) for name in sorted((*RULES, *CONTROL_FLOW, *DEFINED))]


@cache
def _versions() -> dict[str, list[tuple[int, bool]]]:
    """Operator of the standard set -> versions in which it changed, and whether it went then."""
    found: dict[str, list[tuple[int, bool]]] = {}
    for s in onnx.defs.get_all_schemas_with_history():
        if s.domain == "":
            found.setdefault(s.name, []).append((int(s.since_version), bool(s.deprecated)))
    return found


def _is_passed(op: OpDef) -> bool:
    return op.vjp is not None or op.view


def _support(name: str) -> Support:
    ops, constant = all_ops(), name in CONSTANT_ONLY
    written = () if constant else WRITTEN_AS.get(name, (name,))
    versions = _versions()[name]
    first = max(min(v for v, _ in versions), MIN_OPSET)
    newest, gone = max(versions)  # one that went and came back, as GroupNormalization, is there
    last = newest - 1 if gone else None
    return Support(
        operator=name,
        written_as=written,
        constant=constant,
        gradient=not constant and all(_is_passed(ops[o]) for o in written if o != "ArgTopK"),
        int8=bool(written) and all(o in INTEGER or o in KEEPING for o in written),
        first_opset=first,
        last_opset=last,
    )
