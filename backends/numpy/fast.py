"""Fast forms of operators: prepared once per step of a plan, without an order of sums to keep.

Each writes its results into the planned buffers at once and makes no arrays but views. An operator
that is not here, or whose preparation gives None, runs its own kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ...ir.graph import Array, Node
from . import fast_conv, fast_conv_grad, fast_elementwise, fast_gemm
from .scratch import Run, Scratch

#: ``prepare(node, operands, results, scratch)`` of f32 operands; None where there is no fast form.
Prepare = Callable[[Node, Sequence[Array | None], Sequence[Array], Scratch], Run | None]

#: Operators with a fast form.
OPERATORS: Mapping[str, Prepare] = {
    "Add": fast_elementwise.add,
    "Clip": fast_elementwise.clip,
    "ClipMask": fast_elementwise.clip_mask,
    "Conv": fast_conv.conv,
    "ConvGradBias": fast_conv_grad.grad_bias,
    "ConvGradInput": fast_conv.grad_input,
    "ConvGradWeight": fast_conv_grad.grad_weight,
    "CrossEntropy": fast_elementwise.cross_entropy,
    "Gemm": fast_gemm.gemm,
    "GemmGradBias": fast_gemm.grad_bias,
    "GemmGradInput": fast_gemm.grad_input,
    "GemmGradWeight": fast_gemm.grad_weight,
    "GlobalAveragePool": fast_elementwise.global_average,
    "GlobalAveragePoolGrad": fast_elementwise.global_average_grad,
    "MaskMul": fast_elementwise.mask_mul,
    "MatMul": fast_gemm.matmul,
    "Relu": fast_elementwise.relu,
    "ReluMask": fast_elementwise.relu_mask,
    "SGD": fast_elementwise.sgd,
    "Softmax": fast_elementwise.softmax,
    "SoftmaxCrossEntropyGrad": fast_elementwise.cross_entropy_grad,
}


def prepared(
    node: Node, operands: Sequence[Array | None], results: Sequence[Array], scratch: Scratch
) -> Run | None:
    """The fast form of a node on these arrays, None where it has none."""
    prepare = OPERATORS.get(node.op)
    return None if prepare is None else prepare(node, operands, results, scratch)
