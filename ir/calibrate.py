"""Post-training quantization: ranges of activations from samples, scales from the weights.

The float graph is run on every sample; each value that an integer operator can read or write gets
a scale and a zero point from what it was seen to be. What only moves data keeps the scale of its
operand, and the value between a layer and its Relu or Clip gets none, so that they fuse.
Annotations that the model brings along (QDQ, weight-only) stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Literal

import numpy as np

from .array_file import array_file
from .errors import UsageError
from .graph import Array, Graph, Node, Value
from .indices import check_indices, random_indices
from .interpreter import run
from .lowered_layers import INTEGER, KEEPING, follower_of, obstacle, out_axis
from .opdef import get_op
from .quantization import Quantization
from .ranges import METHODS, Histogram, Method, from_range, weight_scales
from .sample import Samples, by_input, numbers_of

#: What stands for a file of samples where there are none: inputs drawn from -1..1.
SYNTHETIC: Literal["synthetic"] = "synthetic"
#: Largest bias in steps of the accumulator; the products have the other half of int32.
_BIAS_STEPS = 2**30 - 1
#: Samples that the noise is measured on.
_NOISE_SAMPLES = 32
#: Synthetic samples when there are none.
_SYNTHETIC = 4


@dataclass(frozen=True)
class Calibration:
    """What a calibration did.

    Attributes:
        method: How ranges were chosen.
        samples: Number of samples; 0: none were given, the inputs were synthetic.
        activations: Annotated activations.
        weights: Annotated weights.
        noise: Layer -> squared error of its i8 form relative to the square of its result, on the
            first samples, with exact operands; layers add up. Only layers that can be i8.
        weight_noise: The part of it that i8 weights add to what i8 activations cost; only layers
            with weights.
    """

    method: Method
    samples: int
    activations: tuple[str, ...]
    weights: tuple[str, ...]
    noise: dict[str, float]
    weight_noise: dict[str, float]

    @property
    def note(self) -> str:
        """One line for the report."""
        if self.samples:
            return f"ranges by {self.method} from {self.samples} samples"
        return (
            "ranges guessed from weights, Relu6 bounds and synthetic inputs in -1..1, because there"
            " are no calibration samples; give some with --calib"
        )


def load_samples(path: Path, inputs: Sequence[str] = ("x",)) -> dict[str, Array]:
    """Calibration samples: an .npz file, or an .npy file for one input.

    Args:
        path: The file.
        inputs: Names of the arrays; for one, the only array of the file may have any name.

    Raises:
        UsageError: The file can't be read, or an array is missing.
    """
    with array_file(path) as file:
        data = np.load(file, allow_pickle=False)
        if isinstance(data, np.ndarray):
            data = {"x": data}
        names = list(data)
        if len(inputs) == len(names) == 1:
            return {inputs[0]: np.asarray(data[names[0]])}
        if missing := [name for name in inputs if name not in names]:
            raise UsageError(
                f"{path}: has no array {' and '.join(missing)}, only"
                f" {', '.join(names) or 'nothing'}; save with"
                f" np.savez(path, {', '.join(f'{name}=...' for name in inputs)})"
            )
        return {name: np.asarray(data[name]) for name in inputs}


def knows_activations(graph: Graph) -> bool:
    """A value that is computed or fed has scales; else the weights have some at most."""
    return any(name not in graph.constants for name in graph.quantization)


def calibrate(
    graph: Graph,
    samples: Samples | None,
    *,
    method: Method = "minmax",
    percentile: float = 99.99,
) -> Calibration:
    """Annotate a forward graph.

    Args:
        graph: A cleaned forward graph; ``quantization`` is filled in place.
        samples: ``[count, ...]`` of the input's shape behind the batch, of several inputs arrays by
            their names; None: synthetic inputs, and the bounds of Clip where there are some.
        method: ``minmax``: all that was seen; ``percentile``: without the outermost values;
            ``mse``: least squared error of activations and weights.
        percentile: Part of the values, in percent, that ``percentile`` keeps on each side.

    Raises:
        UsageError: The samples do not fit the input, are not finite or make a value of the graph
            infinite, or a setting is out of range.
    """
    if method not in METHODS:
        raise UsageError(f"calibration method {method} is not one of {', '.join(METHODS)}")
    if not 50.0 < percentile <= 100.0:
        raise UsageError(f"percentile {percentile:g} must be above 50 and at most 100")
    x = _synthetic(graph) if samples is None else checked(graph, samples)
    wanted = _wanted(graph)
    seen = {name: Histogram() for name in wanted}
    for index, env in _runs(graph, x):
        for name, histogram in seen.items():
            values = env[name]
            if not np.isfinite(values).all():
                raise UsageError(
                    f"calibration sample {index}: value {name} becomes NaN or infinite; scale the"
                    " samples as for training"
                )
            histogram.add(values)
    for name, histogram in seen.items():
        node = graph.values[name].producer
        bounds = _known_bounds(node) if samples is None else None
        graph.quantization[name] = (
            _fixed(node)
            or (from_range(*bounds) if bounds else None)
            or histogram.quantization(method, percentile)
        )
    activations = [*wanted, *_inherit(graph)]
    weights = _weights(graph, method)
    graph.verify()
    noise, of_activations = layer_noise(graph, {name: a[:_NOISE_SAMPLES] for name, a in x.items()})
    weight_noise = {n: max(0.0, noise[n] - rest) for n, rest in of_activations.items()}
    count = 0 if samples is None else _count(x)
    return Calibration(method, count, tuple(activations), tuple(weights), noise, weight_noise)


def checked(graph: Graph, samples: Samples) -> dict[str, Array]:
    """Samples by input, in its dtype.

    Raises:
        UsageError: Wrong shape, none at all, other counts, not numbers, not finite, no i8 for an i8
            input, or no indices that an input of indices can be.
    """
    each = by_input(graph.inputs, samples)
    result = {v.name: _checked(graph, v, numbers_of(graph, v, given)) for _, v, given in each}
    if len(counts := {len(a) for a in result.values()}) > 1:
        raise UsageError(f"calibration samples differ in number: {sorted(counts)}")
    return result


def _checked(graph: Graph, value: Value, samples: Array) -> Array:
    shape = value.type.shape[1:]
    what = f"calibration samples are {samples.dtype}{list(samples.shape)}"
    if samples.dtype.kind not in "iuf":
        raise UsageError(f"{what}; {value.name} needs numbers")
    if samples.ndim < 1 or samples.shape[1:] != shape:
        raise UsageError(f"{what}; {value.name} needs [count, {', '.join(map(str, shape))}]")
    if len(samples) == 0:
        raise UsageError("there are no calibration samples in the file")
    if value.type.dtype == "i8":
        if samples.dtype.kind == "f" or samples.min() < -128 or samples.max() > 127:
            raise UsageError(f"{what}; {value.name} needs int8, -128 to 127")
        return samples.astype(np.int8)
    if value.type.dtype == "i32":
        if samples.dtype.kind == "f":
            raise UsageError(f"{what}; {value.name} needs integers, which are indices")
        check_indices(graph, value, samples, "calibration samples")
        return samples.astype(np.int32)
    with np.errstate(over="ignore"):  # too large for f32 becomes infinite, which is refused
        x = samples.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(x.reshape(len(x), -1)).all(axis=1))
    if bad.size:
        raise UsageError(
            f"calibration sample {bad[0]} has a NaN or infinite value ({bad.size} of {len(x)} do)"
        )
    return x


def layer_noise(graph: Graph, x: Mapping[str, Array]) -> tuple[dict[str, float], dict[str, float]]:
    """Relative squared error that i8 adds at each layer that can have it; see ``Calibration``.

    Returns:
        Of each layer, and of each layer with weights if its weights were exact.
    """
    readers = graph.consumers()
    layers = []
    for node in graph.nodes:
        follower = follower_of(graph, node, readers)
        if node.op in INTEGER and obstacle(graph, node, follower) is None:
            layers.append((node, follower))
    wrong = {node.name: 0.0 for node, _ in layers}
    power = dict.fromkeys(wrong, 0.0)
    without = {
        n.name: 0.0 for n, _ in layers if any(v.name in graph.constants for v in n.operands())
    }
    fixed: dict[str, Array] = {}
    for _, env in _runs(graph, x):
        rounded: dict[str, Array] = {}
        for node, follower in layers:
            operands: list[Array | None] = []
            for v in node.inputs:
                if v is None or v.name not in graph.quantization:
                    operands.append(None if v is None else env[v.name])
                    continue
                cache = fixed if v.name in graph.constants else rounded
                if v.name not in cache:
                    cache[v.name] = _rounded(env[v.name], graph.quantization[v.name])
                operands.append(cache[v.name])
            exact = env[(follower or node).out.name].astype(np.float64)
            quant = graph.quantization[(follower or node).out.name]
            power[node.name] += float((exact**2).sum())
            wrong[node.name] += _squared_error(node, follower, operands, quant, exact)
            if node.name in without:
                kept = [
                    env[v.name] if v is not None and v.name in graph.constants else a
                    for v, a in zip(node.inputs, operands, strict=True)
                ]
                without[node.name] += _squared_error(node, follower, kept, quant, exact)

    def relative(errors: dict[str, float]) -> dict[str, float]:
        return {name: e / power[name] if power[name] else 0.0 for name, e in errors.items()}

    return relative(wrong), relative(without)


def _squared_error(
    node: Node,
    follower: Node | None,
    operands: list[Array | None],
    quant: Quantization,
    exact: Array,
) -> float:
    """Squared error of a layer's stored result."""
    y = get_op(node.op).kernel(node, operands)[0]
    if follower is not None:
        y = get_op(follower.op).kernel(follower, [y])[0]
    return float(((_rounded(y, quant) - exact) ** 2).sum())


def _rounded(real: Array, quant: Quantization) -> Array:
    return quant.dequantize(quant.quantize(real))


def _synthetic(graph: Graph) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    return {v.name: _random(graph, v, rng) for v in graph.inputs}


def _random(graph: Graph, value: Value, rng: np.random.Generator) -> Array:
    shape = (_SYNTHETIC, *value.type.shape[1:])
    if value.type.dtype == "i8":
        return rng.integers(-128, 128, shape).astype(np.int8)
    if value.type.dtype == "i32":
        return random_indices(graph, value, _SYNTHETIC, rng)
    return rng.uniform(-1.0, 1.0, shape).astype(np.float32)


def _count(x: Mapping[str, Array]) -> int:
    return len(next(iter(x.values())))


def _runs(graph: Graph, x: Mapping[str, Array]) -> Iterator[tuple[int, dict[str, Array]]]:
    """All values for each batch of samples, with the index of the first; the last one overlaps."""
    batch, count = graph.inputs[0].type.shape[0], _count(x)
    for begin in range(0, count, batch):
        index = np.arange(begin, begin + batch) % count
        with np.errstate(all="ignore"):  # what is not finite is reported with its sample
            feeds = {name: np.ascontiguousarray(a[index]) for name, a in x.items()}
            yield begin, run(graph, feeds)


def _wanted(graph: Graph) -> list[str]:
    """Values whose range is measured: not annotated, not fused away, not moved, no integers."""
    readers = graph.consumers()
    integers: set[Value] = set()
    for node in graph.nodes:
        if node.op == "ToReal" or integers.intersection(node.operands()):
            integers.update(v for v in node.outputs if v.type.dtype == "f32")
    fused = {n.out for n in graph.nodes if follower_of(graph, n, readers) is not None}
    computed = [v for n in graph.nodes for v in n.outputs[:1] if n.op not in KEEPING]
    return [
        v.name
        for v in (*graph.inputs, *computed)
        if v.type.dtype == "f32" and v not in fused | integers and v.name not in graph.quantization
    ]


def _inherit(graph: Graph) -> list[str]:
    """Results of what moves data keep the scale of the operand."""
    found = []
    for node in graph.nodes:
        x = node.inputs[0] if node.inputs else None
        quant = None if x is None else graph.quantization.get(x.name)
        if node.op in KEEPING and quant is not None and node.out.name not in graph.quantization:
            graph.quantization[node.out.name] = quant
            found.append(node.out.name)
    return found


def _fixed(node: Node | None) -> Quantization | None:
    """The quantization of a result that is a probability."""
    known = node is not None and node.op in ("Softmax", "Sigmoid", "HardSigmoid")
    return Quantization((1.0 / 256.0,), -128) if known else None


def _known_bounds(node: Node | None) -> tuple[float, float] | None:
    """Bounds of a Clip, if it has both."""
    if node is None or node.op != "Clip":
        return None
    low, high = node.float_attr("min", -np.inf), node.float_attr("max", np.inf)
    return (low, high) if isfinite(low) and isfinite(high) else None


def _weights(graph: Graph, method: Method) -> list[str]:
    """Annotate the weights of layers; a weight that several layers share gets one set of scales."""
    least: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float64]]] = {}
    axes: dict[str, set[int]] = {}
    for node in graph.nodes:
        if node.op not in ("Conv", "Gemm", "MatMul") or node.inputs[0] is None:
            continue
        w = node.inputs[1]
        assert w is not None
        if w.name not in graph.constants or w.name in graph.quantization or len(w.type.shape) < 2:
            continue
        if node.op == "MatMul" and len(w.type.shape) != 2:
            continue
        axis = out_axis(node)
        channels = w.type.shape[axis]
        needed = least.setdefault(w.name, np.zeros(channels))
        axes.setdefault(w.name, set()).add(axis)
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        quant = graph.quantization.get(node.inputs[0].name)
        if bias is None or bias.name not in graph.constants or quant is None:
            continue
        steps = np.abs(graph.constants[bias.name].astype(np.float64)) / _BIAS_STEPS
        if steps.shape in ((channels,), ()) and needed.shape == (channels,):
            np.maximum(needed, steps / quant.scale[0], out=needed)
    found = []
    for name, needed in least.items():
        if len(axes[name]) == 1:
            data = graph.constants[name]
            graph.quantization[name] = weight_scales(data, axes[name].pop(), needed, method)
            found.append(name)
    return found
