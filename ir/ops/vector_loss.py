"""Losses of embeddings: the angle to a target vector, and distances within a batch.

``CosineLoss (x f32[N, D], target f32[N, D])`` is the mean of ``1 - cos(x[n], target[n])``; a norm
below 1e-8 counts as that much, as in PyTorch's ``cosine_similarity``.

``TripletLoss (x f32[N, D], labels i32[N])`` (Schroff et al. 2015, without mining: "batch all" of
Hermans et al. 2017) is the mean of ``max(0, d(a, p) - d(a, n) + margin)`` over all triplets of the
batch: an anchor ``a``, another sample ``p`` of its label, a sample ``n`` of another label; ``d`` is
the squared Euclidean distance. A batch without triplets has the loss 0, and no gradient.

Sums run over features, samples, and triplets in the order a, p, n, one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..errors import GraphError
from ..graph import Array, Attr, Node, TensorType
from ..opdef import CKernel, OpDef, Sample, Work, array, operand, register
from .activation_grad import scalar
from .elementary import sqrt32

T = TensorType
SOURCE = "odtplan_vector_loss"
_LEAST_NORM = 1e-8


def _matrix(node: Node) -> TensorType:
    x = operand(node, 0)
    if len(x.shape) != 2:
        raise GraphError(f"the prediction must be [batch, features], not {x}")
    return x


def _rows(node: Node) -> dict[str, Attr]:
    batch, features = operand(node, 0).shape
    return {"batch": batch, "features": features}


def _sum(terms: Array, axis: int = -1) -> Array:
    """Sums along an axis, one term after the other."""
    return np.asarray(np.take(np.add.accumulate(terms, axis=axis), -1, axis=axis))


# --- cosine ---------------------------------------------------------------------------------------


def _cosine_check(node: Node) -> TensorType:
    x = _matrix(node)
    if operand(node, 1) != x:
        raise GraphError(f"prediction {x} and target {operand(node, 1)} differ")
    return x


def _norm(x: Array) -> tuple[Array, Array]:
    """Norms [N, 1], and where they were too small."""
    norm, least = sqrt32(_sum(x * x)[:, None]), scalar(x, _LEAST_NORM)
    small = norm < least
    return np.where(small, least, norm), small


def _cosine_kernel(node: Node, inputs: Sequence[Array | None]) -> Sequence[Array]:
    x, t = array(inputs, 0), array(inputs, 1)
    with np.errstate(all="ignore"):
        cosine = _sum(x * t) / (_norm(x)[0] * _norm(t)[0])[:, 0]
        return (np.asarray(_sum(scalar(x, 1.0) - cosine) / scalar(x, len(x))),)


def _cosine_grad_kernel(node: Node, inputs: Sequence[Array | None]) -> Sequence[Array]:
    x, t = array(inputs, 0), array(inputs, 1)
    with np.errstate(all="ignore"):
        (nx, small), (nt, _) = _norm(x), _norm(t)
        cosine = np.where(small, scalar(x, 0.0), _sum(x * t)[:, None] / (nx * nt))
        return ((cosine * (x / nx) - t / nt) / (nx * scalar(x, len(x))),)


def _cosine_samples() -> Iterator[Sample]:
    for shape in ((3, 4), (1, 7)):
        yield Sample((T(shape), T(shape)))


register(
    OpDef(
        "CosineLoss",
        infer=lambda node: (T((), _cosine_check(node).dtype),),
        kernel=_cosine_kernel,
        work=lambda node: Work("elementwise", 3 * operand(node, 0).size),
        c=CKernel("odtplan_cosine_loss_f32", "odtplan_vectors_t", SOURCE, _rows),
        samples=_cosine_samples,
    )
)
register(
    OpDef(
        "CosineLossGrad",
        infer=lambda node: (_cosine_check(node),),
        kernel=_cosine_grad_kernel,
        work=lambda node: Work("elementwise", 6 * operand(node, 0).size),
        c=CKernel("odtplan_cosine_loss_grad_f32", "odtplan_vectors_t", SOURCE, _rows),
        samples=_cosine_samples,
        inplace=(0,),
    )
)


# --- triplets -------------------------------------------------------------------------------------


def _triplet_check(node: Node) -> TensorType:
    x, labels = _matrix(node), operand(node, 1)
    if labels != T(x.shape[:1], "i32"):
        raise GraphError(f"labels must be i32[{x.shape[0]}], not {labels}")
    return x


def _triplets(node: Node, x: Array, labels: Array) -> Iterator[tuple[int, Array, Array]]:
    """Per anchor, d(a, p) - d(a, n) + margin [p, n], and which of these are triplets."""
    same = labels[:, None] == labels
    margin = scalar(x, node.float_attr("margin"))
    apart = x[:, None] - x
    distances = _sum(apart * apart)
    for a, d in enumerate(distances):
        positive = same[a] & (np.arange(len(x)) != a)
        yield a, (d[:, None] - d) + margin, positive[:, None] & ~same[a]


def _triplet_kernel(node: Node, inputs: Sequence[Array | None]) -> Sequence[Array]:
    x, labels = array(inputs, 0), array(inputs, 1)
    zero = scalar(x, 0.0)
    with np.errstate(all="ignore"):
        terms = np.concatenate([t[wanted] for _, t, wanted in _triplets(node, x, labels)])
        if not terms.size:
            return (np.asarray(zero),)
        total = _sum(np.where(terms <= zero, zero, terms))
        return (np.asarray(total / scalar(x, terms.size)),)


def _triplet_grad_kernel(node: Node, inputs: Sequence[Array | None]) -> Sequence[Array]:
    x, labels = array(inputs, 0), array(inputs, 1)
    pull, count = np.zeros((len(x), len(x)), x.dtype), 0
    with np.errstate(all="ignore"):
        for a, terms, wanted in _triplets(node, x, labels):
            count += int(wanted.sum())
            counts = wanted & ~(terms <= scalar(x, 0.0))
            pull[a] = counts.sum(axis=1).astype(x.dtype) - counts.sum(axis=0).astype(x.dtype)
        if not count:
            return (np.zeros_like(x),)
        total = _sum((pull + pull.T)[:, :, None] * (x[:, None] - x), axis=1)
        return ((total + total) / scalar(x, count),)


def _triplet_params(node: Node) -> dict[str, Attr]:
    return _rows(node) | {"margin": node.float_attr("margin")}


def _triplet_work(node: Node) -> Work:
    batch, features = operand(node, 0).shape
    return Work("elementwise", 2 * batch * batch * (features + batch))


def _triplet_samples() -> Iterator[Sample]:
    attrs: dict[str, Attr] = {"margin": 0.5}
    yield Sample((T((6, 4)), T((6,), "i32")), attrs, ranges={1: (0, 2)})
    yield Sample((T((2, 3)), T((2,), "i32")), attrs, ranges={1: (0, 1)})


register(
    OpDef(
        "TripletLoss",
        infer=lambda node: (T((), _triplet_check(node).dtype),),
        kernel=_triplet_kernel,
        work=_triplet_work,
        c=CKernel("odtplan_triplet_f32", "odtplan_triplet_t", SOURCE, _triplet_params),
        samples=_triplet_samples,
        workspace=lambda node: 4 * operand(node, 0).shape[0] ** 2,
    )
)
register(
    OpDef(
        "TripletLossGrad",
        infer=lambda node: (_triplet_check(node),),
        kernel=_triplet_grad_kernel,
        work=_triplet_work,
        c=CKernel("odtplan_triplet_grad_f32", "odtplan_triplet_t", SOURCE, _triplet_params),
        samples=_triplet_samples,
        workspace=lambda node: 8 * operand(node, 0).shape[0] ** 2,
    )
)
