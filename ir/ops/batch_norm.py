"""Batch normalization by the batch's statistics (Ioffe and Szegedy 2015), and running averages.

``BatchNormTraining`` is what ONNX's BatchNormalization computes in training mode: rows are channels
over all samples, the gradient passes the statistics, and nothing reads the running ones. These are
parameters of the role ``statistic``: an update moves them by ``RunningAverage`` towards
``BatchMean`` and ``BatchVariance`` of the layer's input, once per step like any other update. With
frozen statistics, the default, see ``norm``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..axes import channel_vectors
from ..errors import GraphError
from ..graph import Array, Attr, Node, TensorType, Value
from ..opdef import CKernel, OpDef, ParamSlot, Sample, Work, array, f32_operand, operand, register
from .group_norm import Layout, across_batch, gradients, normalized, struct
from .standardize import statistics

if TYPE_CHECKING:
    from ..autodiff import GradBuilder

T = TensorType


def _layout(node: Node) -> Layout:
    x = f32_operand(node, 0)
    if len(x.shape) < 2:
        raise GraphError(f"input {x} has no channel axis")
    return across_batch(x.shape)


def _infer(node: Node) -> list[TensorType]:
    lay = _layout(node)
    for i in range(1, 5):
        if f32_operand(node, i).shape != (lay.rows,):
            raise GraphError(f"operand {i}, {operand(node, i)}, does not fit {lay.rows} channels")
    if lay.size < 2:
        raise GraphError("one number per channel has no deviation; train with a larger batch")
    return [operand(node, 0)]


def _vjp(b: GradBuilder, node: Node, dy: Value, need: Sequence[bool]) -> list[Value | None]:
    attrs: dict[str, Attr] = {
        "across_batch": 1,
        "epsilon": node.float_attr("epsilon", 1e-5),
    }
    return gradients(b, node, dy, need, attrs, _layout(node))


def _work(node: Node) -> Work:
    lay = _layout(node)
    size, loops = operand(node, 0).size, lay.rows * lay.samples
    same = {"BatchNormTraining": "GroupNormalization"}.get(node.op, "")
    return Work("elementwise", size, loops=loops, operator=same)


def _rows_statistic(which: int, node: Node, x: Array, begin: int, end: int) -> Array:
    rows = _layout(node).rows_of(x)[begin:end]
    return np.ascontiguousarray(statistics(rows)[which][:, 0])


def _samples() -> Iterator[Sample]:
    for x in (T((3, 4, 2, 3)), T((5, 3))):
        c = T(x.shape[1:2])
        yield Sample((x, c, c, c, c), {"epsilon": 1e-3}, differentiable=(0, 1, 2))


register(
    OpDef(
        name="BatchNormTraining",
        infer=_infer,
        kernel=lambda node, inputs: [normalized(node, inputs[:3], _layout(node))],
        work=_work,
        c=CKernel(
            "odtplan_batch_norm_training_f32",
            "odtplan_group_norm_t",
            "odtplan_batch_norm",
            lambda node: struct(node, _layout(node)),
        ),
        samples=_samples,
        vjp=_vjp,
        inplace=(0,),
        params=(
            ParamSlot(1, "scale"),
            ParamSlot(2, "bias"),
            ParamSlot(3, "statistic", observed="BatchMean"),
            ParamSlot(4, "statistic", observed="BatchVariance"),
        ),
        axes=channel_vectors,
    )
)


def _register_statistic(name: str, symbol: str, which: int) -> None:
    def rows(node: Node, inputs: Sequence[Array | None], begin: int, end: int) -> Array:
        return _rows_statistic(which, node, array(inputs, 0), begin, end)

    register(
        OpDef(
            name=name,
            infer=lambda node: [T((_layout(node).rows,))],
            kernel=lambda node, inputs: [rows(node, inputs, 0, _layout(node).rows)],
            rows_kernel=rows,
            work=_work,
            c=CKernel(
                symbol,
                "odtplan_group_norm_t",
                "odtplan_batch_norm",
                lambda node: struct(node, _layout(node)),
            ),
            samples=lambda: iter([Sample((T((3, 4, 2, 3)),)), Sample((T((5, 3)),))]),
        )
    )


_register_statistic("BatchMean", "odtplan_batch_mean_f32", 1)
_register_statistic("BatchVariance", "odtplan_batch_variance_f32", 2)


def _infer_average(node: Node) -> list[TensorType]:
    if operand(node, 0) != operand(node, 1):
        raise GraphError(f"average {operand(node, 0)} and observation {operand(node, 1)} differ")
    return [f32_operand(node, 0)]


def _rates(node: Node) -> dict[str, Attr]:
    """What is left of the average, and what an observation (of several) adds to it."""
    momentum = node.float_attr("momentum", 0.9)
    return {"kept": momentum, "added": (1.0 - momentum) * node.float_attr("gradient_scale", 1.0)}


def _kernel_average(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    average, seen = array(inputs, 0), array(inputs, 1)
    kept, added = map(average.dtype.type, _rates(node).values())
    return [np.asarray(average * kept + seen * added)]


register(
    OpDef(
        name="RunningAverage",
        infer=_infer_average,
        kernel=_kernel_average,
        work=lambda node: Work("elementwise", operand(node, 0).size),
        c=CKernel(
            "odtplan_running_average_f32",
            "odtplan_running_average_t",
            "odtplan_batch_norm",
            lambda node: {"count": operand(node, 0).size, **_rates(node)},
        ),
        samples=lambda: iter(
            [Sample((T((5,)), T((5,))), {"momentum": 0.8, "gradient_scale": g}) for g in (1.0, 0.5)]
        ),
        inplace=(0,),
    )
)
