"""Scores of updates from gradients on labelled samples: Fisher potential, norms, first-order gain.

One pass over the samples, one micro-batch at a time (at batch 1: one sample). Let ``g_n`` be the
gradient of micro-batch n with respect to a parameter ``w`` and ``N`` their number.

``fisher``
    Fisher potential (Theis et al. 2018; TinyTrain, ICML'24): with ``a`` the result of a layer, a
    channel o of it has ``1/2N sum_n (sum a_no dL/da_no)^2``, and the layer their sum. For a layer
    that is linear in its parameters the inner sum is that of ``w g_n`` over the parameters of
    channel o, which is how it is found here. The parameters of a layer share it in proportion to
    their ``sum_n |g_n|^2``, so that a bias of zeros has its part. An input channel counts by its
    own potential, ``sum_n (sum x_nc dL/dx_nc)^2`` with ``x`` the input of this layer alone. The
    last weight of an adapter, which is zero, has the share of its gradient beside those of the
    layer's own.
``magnitude``
    ``|g| |w|`` of the mean gradient, by input channel; for the last weight of an adapter ``|w|`` is
    that of the weight that it stands beside.
``gradient``
    What a step on one sample takes off the loss of another one, to first order and per unit of the
    step size: the mean of ``g_n . g_m`` over all pairs of two micro-batches, at least 0. The square
    of the mean gradient, ElasticTrainer's importance (MobiSys'23), would count the noise of single
    samples as gain.

What is before the last weight of an adapter has no gradient, because that is zero: the score of all
is that of the last weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ...ir.adapters import adapters_by_param
from ...ir.autodiff import build_training, param_slots
from ...ir.candidates import channel_axis, counts
from ...ir.channels import NO_ORDERS, AxisOrders
from ...ir.errors import UsageError
from ...ir.graph import Array, Graph, Node
from ...ir.interpreter import run
from ...ir.lowered_layers import out_axis
from ...ir.opdef import ParamSlot
from ...ir.sample import Samples
from ...ir.training import Candidate, TrainingSpec
from .micro_batches import feeds, plain

GradientMethod = Literal["gradient", "fisher", "magnitude"]
#: Layers that are products: the axis of their weight that runs over output channels is known.
_PRODUCTS = ("Conv", "Gemm", "MatMul")
#: (part, score), the part rising to 1.
Gains = tuple[tuple[float, float], ...]
Floats = NDArray[np.float64]


@dataclass
class _Sums:
    """Sums over micro-batches, of one parameter; by input channel where it can be updated in parts.

    Attributes:
        grad: Of gradients.
        squares: Of ``|g_n|^2``, by channel.
        products: Of ``(sum w g_n)^2``, by channel.
    """

    grad: Floats
    squares: Floats
    products: Floats


@dataclass
class GradientScores:
    """Sums of gradients, from which all scores follow.

    Attributes:
        forward: Imported graph, of float layers.
        params: Parameters to score.
        count: Micro-batches that were added.
    """

    forward: Graph
    params: Sequence[str]
    count: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        """Nothing is added yet."""
        self._slots = {p: u for p, u in param_slots(self.forward).items() if p in set(self.params)}
        self._adapters = adapters_by_param(self.forward)
        self._axis = {
            p: None if p in self._adapters else channel_axis(uses)
            for p, uses in self._slots.items()
        }
        self._data = {p: self.forward.constants[p].astype(np.float64) for p in self._slots}
        self._sums: dict[str, _Sums] = {}
        for p, w in self._data.items():
            channels = 1 if self._axis[p] is None else w.shape[self._axis[p] or 0]
            self._sums[p] = _Sums(np.zeros(w.shape), np.zeros(channels), np.zeros(channels))
        self._layers: dict[str, list[str]] = {}
        for p in self._slots:
            self._layers.setdefault(self._layer(p), []).append(p)
        self._potential = dict.fromkeys(self._layers, 0.0)

    def _layer(self, p: str) -> str:
        """The layer of a parameter; of an adapter that beside which it stands."""
        return self._adapters[p].layer if p in self._adapters else self._slots[p][0][0].name

    def add(self, grads: Mapping[str, Array]) -> None:
        """Add the gradients of one micro-batch, by parameter."""
        self.count += 1
        for layer, names in self._layers.items():
            results: dict[int, Floats] = {}
            for p in names:
                if p not in grads:
                    continue
                g, sums = grads[p].astype(np.float64), self._sums[p]
                product = g * self._data[p]
                sums.grad += g
                sums.squares += self._by_channel(p, g * g)
                sums.products += self._by_channel(p, product) ** 2
                found = _by_result(*self._slots[p][0], product)
                results[found.size] = results.get(found.size, 0.0) + found
            self._potential[layer] += sum(float((a * a).sum()) for a in results.values()) / 2

    def channels(self, method: GradientMethod) -> dict[str, tuple[int, Floats]]:
        """Scores of the input channels of each weight that can be updated in parts.

        Returns:
            Parameter -> the axis of its channels, and their scores, whose sum is that of the whole.
        """
        found: dict[str, tuple[int, Floats]] = {}
        for p, axis in self._axis.items():
            if axis is not None:
                whole, shares = self._score(p, method)
                total = float(shares.sum())
                found[p] = axis, whole * shares / total if total else np.zeros(shares.size)
        return found

    def gains(
        self, method: GradientMethod, orders: Mapping[str, AxisOrders] = NO_ORDERS
    ) -> dict[str, Gains]:
        """Scores of the parts that updates are offered in: of the leading input channels.

        Args:
            method: What is scored by.
            orders: Parameters whose channels are in another order than here, see ``ir.channels``.

        Raises:
            UsageError: Nothing was added, or no parameter has a gradient.
        """
        if not self.count:
            raise UsageError("importance: there are no samples to measure it on")
        total, shares = {}, {}
        for p in self._slots:
            total[p], shares[p] = self._score(p, method)
        if not any(total.values()):
            raise UsageError(
                f"importance: {method} is 0 for all tensors on these samples; use other ones, or"
                " --importance prior"
            )
        found: dict[str, Gains] = {}
        for p in self._slots:
            axis = self._axis[p]
            order = None if axis is None or p not in orders else orders[p][axis]
            whole = total[p]
            share = np.cumsum(shares[p] if order is None else shares[p][order])
            part = share / share[-1] if share[-1] > 0 else np.arange(1, share.size + 1) / share.size
            each = [] if axis is None else counts(share.size)
            points = [(k / share.size, whole * float(part[k - 1])) for k in each]
            found[p] = (*points, (1.0, whole))
        return found

    def _score(self, p: str, method: GradientMethod) -> tuple[float, Floats]:
        """Of the whole parameter, and what its channels are in proportion to."""
        n, sums = self.count, self._sums[p]
        of_mean = self._by_channel(p, (sums.grad / n) ** 2)
        if method == "magnitude":
            beside = self._adapters[p].weight if p in self._adapters else p
            size = self._by_channel(p, self.forward.constants[beside].astype(np.float64) ** 2)
            each = np.sqrt(of_mean * size)
            return float(each.sum()), each
        if method == "gradient":
            if n == 1:
                return float(of_mean.sum()), of_mean
            pairs = (n * n * of_mean - sums.squares) / (n * (n - 1))
            return max(0.0, float(pairs.sum())), np.maximum(pairs, 0.0)
        layer = self._layer(p)
        energy = {q: float(self._sums[q].squares.sum()) for q in self._layers[layer]}
        whole = sum(e for q, e in energy.items() if q not in self._adapters)
        share = energy[p] / whole if whole else 0.0
        return share * self._potential[layer] / n, sums.products

    def _by_channel(self, p: str, a: Floats) -> Floats:
        axis = self._axis[p]
        return np.array([a.sum()]) if axis is None else _along(a, axis)


def _along(a: Floats, axis: int) -> Floats:
    """Sums over all other axes."""
    sums: Floats = a.sum(axis=tuple(i for i in range(a.ndim) if i != axis))
    return sums


def _by_result(node: Node, slot: ParamSlot, product: Floats) -> Floats:
    """``sum w g`` by channel of the layer's result.

    Rows, of an operator with matrices that is no plain product (the gates of a recurrent layer);
    elements, of a bias or scale.
    """
    if slot.role == "weight" and node.op in _PRODUCTS and product.ndim > 1:
        return _along(product, out_axis(node))
    if slot.role == "weight" and product.ndim > 1:
        product = product.sum(axis=-1)
    return product.ravel()


def measure_gradients(
    forward: Graph,
    spec: TrainingSpec,
    params: Sequence[str],
    x: Samples,
    y: Samples,
    on_batch: Callable[[int, int], None] = lambda done, of: None,
) -> GradientScores:
    """Add up gradients over labelled samples.

    Memory: the values of one training step that are live at a time, and 8 bytes per weight.

    Args:
        forward: Imported graph; integer layers are measured as the float ones that they stand for.
        spec: The loss.
        params: Parameters to score; those that learn without a gradient score 0.
        x: Samples [count, ...]; the last micro-batch is left out where it is not full.
        y: Labels or targets.
        on_batch: Told how many micro-batches are done, of how many.

    Raises:
        UsageError: The data do not fit the model, are too few, or make a gradient NaN or infinite.
    """
    slots = param_slots(forward)
    learned = [p for p in params if slots[p][0][1].role != "statistic"]
    training = build_training(forward, plain(spec), [Candidate(p) for p in learned])
    scores = GradientScores(forward, params)
    wanted = {u.candidate.param: u.grad.name for u in training.updates}
    batches = feeds(training, x, y)
    for i, fed in enumerate(batches):
        with np.errstate(all="ignore"):  # what is not finite is told
            env = run(training.graph, fed, frozenset(wanted.values()))
        grads = {p: env[name] for p, name in wanted.items()}
        if bad := next((p for p, g in grads.items() if not np.isfinite(g).all()), None):
            raise UsageError(
                f"importance: the gradient of {bad} is NaN or infinite on micro-batch {i}; scale"
                " the samples as for training"
            )
        scores.add(grads)
        on_batch(i + 1, len(batches))
    return scores
