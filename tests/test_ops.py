"""Every operator, by its samples: inference, gradients, cost, and what the records promise."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from op_cases import Array, Case, cases

from odt_plan.ir.autodiff import GradBuilder
from odt_plan.ir.errors import GraphError, UsageError
from odt_plan.ir.graph import Graph, TensorType, Value
from odt_plan.ir.interpreter import run
from odt_plan.ir.opdef import OpDef, Sample, all_ops, get_op, inplace_operands, register, works
from odt_plan.ir.ops import trigonometry as trig
from odt_plan.ir.ops.elementary import (
    cos32,
    erf32,
    exp32,
    expm1_32,
    log32,
    pow32,
    sigmoid32,
    sin32,
    softplus32,
    sqrt32,
    tanh32,
)

CASES = list(cases())
T = TensorType
every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


def some_cases(wanted: Callable[[Case], bool]) -> pytest.MarkDecorator:
    """Parametrize over the samples that a test is about."""
    chosen = [c for c in CASES if wanted(c)]
    assert chosen
    return pytest.mark.parametrize("case", chosen, ids=lambda c: c.name)


every_op = pytest.mark.parametrize("op", all_ops().values(), ids=lambda op: op.name)


def _run_kernel(case: Case, data: list[Array | None]) -> list[Array]:
    return list(case.op.kernel(case.node, data))


# --- the records ----------------------------------------------------------------------------------


@every_op
def test_record_is_complete(op: OpDef) -> None:
    samples = list(op.samples())
    assert samples
    assert (op.c is None) == op.view
    if op.rows_kernel is not None:
        assert op.vjp is None
    for slot in op.params:
        assert op.vjp is not None, "a parameter needs a gradient"
        assert any(len(s.types) > slot.index for s in samples)
        assert slot.cold_index is None or slot.role == "weight"


def test_names_are_registered_once() -> None:
    with pytest.raises(ValueError, match="Gemm is registered twice"):
        register(get_op("Gemm"))
    with pytest.raises(GraphError, match="operator Bessel is not known"):
        get_op("Bessel")


@every_case
def test_kernel_agrees_with_inference(case: Case) -> None:
    results = _run_kernel(case, case.data())
    assert len(results) == len(case.node.outputs)
    for array, value in zip(results, case.node.outputs, strict=True):
        assert array.shape == value.type.storage_shape
        assert array.dtype == value.type.np_dtype


@every_case
def test_kernel_leaves_its_operands_alone(case: Case) -> None:
    data = case.data()
    before = [None if a is None else a.copy() for a in data]
    _run_kernel(case, data)
    for a, b in zip(data, before, strict=True):
        assert a is None or np.array_equal(a, b)


@every_case
def test_float64_results_are_float64_and_near(case: Case) -> None:
    data = case.data()
    wide = [a.astype(np.float64) if a is not None and a.dtype == np.float32 else a for a in data]
    for narrow, exact in zip(_run_kernel(case, data), _run_kernel(case, wide), strict=True):
        if narrow.dtype == np.float32 and any(a is not None and a.dtype == "f8" for a in wide):
            assert exact.dtype == np.float64
            np.testing.assert_allclose(narrow, exact, rtol=2e-5, atol=2e-6)
        else:
            assert np.array_equal(narrow, exact)


@every_case
def test_work_is_positive(case: Case) -> None:
    for work in works(case.node):
        assert isinstance(work.amount, int)
        assert work.amount > 0 or case.op.view
    assert case.op.workspace(case.node) >= 0


def _is_batched(case: Case) -> bool:
    """Whether all operands share a first axis that nothing else in the sample depends on."""
    sizes = {t.shape[0] for t in case.sample.types if t is not None and t.shape}
    return len(sizes) == 1 and not (case.op.view or case.op.params or case.sample.attrs)


@some_cases(_is_batched)
def test_work_doubles_with_the_batch(case: Case) -> None:
    (work,) = works(case.node)
    types = tuple(
        None if t is None else T((2 * t.shape[0], *t.shape[1:]), t.dtype, t.quant) if t.shape else t
        for t in case.sample.types
    )
    (bigger,) = works(_build(case.op.name, types).nodes[-1])
    assert bigger.cost_class == work.cost_class
    assert bigger.amount == 2 * work.amount


@some_cases(lambda c: bool(inplace_operands(c.node)))
def test_inplace_operand_has_the_bytes_of_the_result(case: Case) -> None:
    for i in inplace_operands(case.node):
        if i < len(case.sample.types) and (t := case.sample.types[i]) is not None:
            same = t.nbytes == case.node.out.type.nbytes
            free = len(case.op.inplace) > 1 or case.op.name == "StreamedBlock"
            assert same or free, "broadcast operands may differ, and operands of blocks"


@some_cases(lambda c: c.op.view)
def test_view_keeps_the_bytes(case: Case) -> None:
    data = case.data()
    (result,) = _run_kernel(case, data)
    assert data[0] is not None
    assert result.tobytes() == data[0].tobytes()


@some_cases(lambda c: c.op.rows_kernel is not None)
def test_rows_kernel_is_the_kernel_by_rows(case: Case) -> None:
    op, data = case.op, case.data()
    assert op.rows_kernel is not None
    (whole,) = _run_kernel(case, data)
    for step in (1, 2, len(whole)):
        parts = [
            op.rows_kernel(case.node, data, i, min(i + step, len(whole)))
            for i in range(0, len(whole), step)
        ]
        assert np.array_equal(np.concatenate(parts), whole)


# --- gradients ------------------------------------------------------------------------------------


def _build(op: str, types: tuple[TensorType | None, ...]) -> Graph:
    graph = Graph(op)
    graph.add_node(op, _inputs(graph, types), name="node")
    return graph


def _inputs(graph: Graph, types: Sequence[TensorType | None]) -> list[Value | None]:
    return [None if t is None else graph.add_input(f"x{i}", t) for i, t in enumerate(types)]


def _differentiable(sample: Sample) -> list[int]:
    floats = [i for i, t in enumerate(sample.types) if t is not None and t.dtype == "f32"]
    return floats if sample.differentiable is None else list(sample.differentiable)


GRADIENTS = [(c, i) for c in CASES if c.op.vjp is not None for i in _differentiable(c.sample)]


@pytest.mark.parametrize(("case", "index"), GRADIENTS, ids=lambda v: getattr(v, "name", str(v)))
def test_gradient_is_the_central_difference(case: Case, index: int) -> None:
    graph, sample = Graph(case.op.name), case.sample
    inputs = [
        None if t is None else graph.add_input(f"x{i}", t) for i, t in enumerate(sample.types)
    ]
    forward = graph.add_node(case.op.name, inputs, sample.attrs, name="node")
    seed = graph.add_input("dy", forward.out.type)
    assert case.op.vjp is not None
    need = [i == index for i in range(len(inputs))]
    before = set(graph.nodes)
    gradients = case.op.vjp(GradBuilder(graph, forward, {}), forward, seed, need)
    assert len(gradients) == len(inputs)
    assert all((g is None) != n for g, n in zip(gradients, need, strict=True))
    graph.verify()
    gradient, x = gradients[index], inputs[index]
    assert gradient is not None
    assert x is not None
    assert gradient.type == x.type
    for node in set(graph.nodes) - before:
        read = _read(graph).intersection(node.outputs) or gradient in node.outputs
        assert read, f"{node} is built for nothing"

    rng = np.random.default_rng(3)
    feeds = {
        f"x{i}": a.astype(np.float64) if a.dtype == np.float32 else a
        for i, a in enumerate(case.data(1))
        if a is not None
    }
    feeds["dy"] = rng.uniform(-1, 1, forward.out.type.shape)
    env = run(graph, feeds)
    step = 1e-6
    want = np.empty(x.type.size)
    for k in range(x.type.size):
        ends = []
        for sign in (-1, 1):
            moved = feeds[x.name].copy()
            moved.reshape(-1)[k] += sign * step
            data = [None if v is None else {**feeds, x.name: moved}[v.name] for v in inputs]
            ends.append(case.op.kernel(forward, data)[0])
        # equal ends also where a pad of -inf stays -inf
        moves = [np.where(ends[0] == ends[1], 0.0, e) for e in ends]
        want[k] = ((moves[1] - moves[0]) * feeds["dy"]).sum() / (2 * step)
    np.testing.assert_allclose(env[gradient.name].reshape(-1), want, rtol=2e-6, atol=1e-8)


def _read(graph: Graph) -> set[object]:
    return {v for node in graph.nodes for v in node.operands()}


@pytest.mark.parametrize(
    ("loss", "gradient"), [("cross_entropy", "SoftmaxCrossEntropyGrad"), ("mse", "MSEGrad")]
)
def test_loss_gradient_is_the_central_difference(loss: str, gradient: str) -> None:
    rng = np.random.default_rng(0)
    graph = Graph("loss")
    x = graph.add_input("x", T((3, 4)))
    if loss == "mse":
        y = x
        target = graph.add_input("target", T((3, 4)))
        feeds = {"target": rng.normal(size=(3, 4))}
        graph.add_node("MSE", (x, target), name="loss")
    else:
        target = graph.add_input("target", T((3,), "i32"))
        feeds = {"target": np.array([3, 0, 2], np.int32)}
        y = graph.add_node("Softmax", (x,), {"axis": 1}, name="probs").out
        graph.add_node("CrossEntropy", (y, target), name="loss")
    graph.add_node(gradient, (y, target), name="dx")
    point = rng.normal(size=(3, 4))

    def value(p: Array) -> Array:
        return run(graph, {**feeds, "x": p})["loss"]

    want = _central(value, point)
    np.testing.assert_allclose(run(graph, {**feeds, "x": point})["dx"], want, rtol=1e-6, atol=1e-9)


def _central(f: Callable[[Array], Array], point: Array, step: float = 1e-6) -> Array:
    result = np.empty_like(point)
    for i in np.ndindex(point.shape):
        e = np.zeros_like(point)
        e[i] = step
        result[i] = (f(point + e) - f(point - e)) / (2 * step)
    return result


# --- losses at their edges ------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["CrossEntropy", "SoftmaxCrossEntropyGrad"])
@pytest.mark.parametrize("label", [-1, 4])
def test_label_out_of_range_is_an_error(op: str, label: int) -> None:
    graph = _build(op, (T((2, 4)), T((2,), "i32")))
    labels = np.array([1, label], np.int32)
    with pytest.raises(UsageError, match=rf"node node: label {label} of sample 1 is not in 0..3"):
        run(graph, {"x0": np.full((2, 4), 0.25, np.float32), "x1": labels})


def test_zero_probability_has_a_finite_loss() -> None:
    graph = _build("CrossEntropy", (T((1, 2)), T((1,), "i32")))
    feeds = {"x0": np.array([[0.0, 1.0]], np.float32), "x1": np.array([0], np.int32)}
    assert run(graph, feeds)["node"] == pytest.approx(87.336545)


def test_softmax_of_large_values_is_finite() -> None:
    graph = _build("Softmax", (T((1, 3)),))
    x = np.array([[1e4, 1e4, -1e4]], np.float32)
    assert run(graph, {"x0": x})["node"].tolist() == [[0.5, 0.5, 0.0]]


# --- elementary functions -------------------------------------------------------------------------


def _bit_patterns() -> Array:
    """fp32 numbers of all exponents and both signs, subnormal ones included."""
    rng = np.random.default_rng(0)
    edges = [0x00000000, 0x00000001, 0x007FFFFF, 0x00800000, 0x3F800000, 0x7F7FFFFF]
    bits = np.concatenate([rng.integers(0, 0x7F800000, 400_000), edges]).astype(np.uint32)
    return np.concatenate([bits, bits | np.uint32(0x80000000)]).view(np.float32)


def _near_one() -> Array:
    rng = np.random.default_rng(1)
    return np.concatenate(
        [rng.uniform(-20, 20, 400_000), rng.uniform(-1, 2, 200_000)], dtype=np.float64
    ).astype(np.float32)


@pytest.mark.parametrize(
    ("mine", "exact", "ulps"),
    [
        (exp32, np.exp, 1.0),
        (log32, np.log, 1.0),
        (tanh32, np.tanh, 2.0),
        (sigmoid32, None, 3.0),
        (expm1_32, np.expm1, 4.0),
        (softplus32, None, 3.0),
        (erf32, None, 2.0),
        (sin32, np.sin, 3.0),
        (cos32, np.cos, 3.0),
        (trig.atan32, np.arctan, 4.0),
        (trig.asin32, np.arcsin, 4.0),
        (trig.acos32, np.arccos, 4.0),
        (trig.sinh32, np.sinh, 4.0),
        (trig.cosh32, np.cosh, 4.0),
        (trig.asinh32, np.arcsinh, 4.0),
        (trig.acosh32, np.arccosh, 4.0),
        (trig.atanh32, np.arctanh, 4.0),
    ],
    ids=[
        *("exp", "log", "tanh", "sigmoid", "expm1", "softplus", "erf", "sin", "cos"),
        *("atan", "asin", "acos", "sinh", "cosh", "asinh", "acosh", "atanh"),
    ],
)
def test_elementary_function_is_accurate(
    mine: Callable[[Array], Array], exact: Callable[[Array], Array] | None, ulps: float
) -> None:
    x = np.concatenate([_bit_patterns(), _near_one()])
    if exact is None:
        exact = mine  # float64 arrays take NumPy's functions
    got = mine(x)
    assert got.dtype == np.float32
    with np.errstate(all="ignore"):
        want = exact(x.astype(np.float64))
        rounded = want.astype(np.float32)
        finite = np.isfinite(rounded) & np.isfinite(got)
        unit = np.spacing(np.maximum(np.abs(rounded), np.finfo(np.float32).tiny))
        error = np.abs(got.astype(np.float64) - want)[finite] / unit[finite]
    assert error.max() < ulps
    same = (got == rounded) | (np.isnan(got) & np.isnan(rounded))
    assert same[~finite].all()


def test_error_function_is_accurate() -> None:
    x = np.concatenate([_bit_patterns(), np.linspace(-5, 5, 200_001).astype(np.float32)])
    want = erf32(x.astype(np.float64))
    np.testing.assert_allclose(erf32(x), want, rtol=0, atol=1e-7)


def test_power_is_accurate() -> None:
    rng = np.random.default_rng(0)
    x = np.exp(rng.uniform(-20, 20, 100_000)).astype(np.float32)
    p = rng.uniform(-4, 4, x.size).astype(np.float32)
    p[::2] = rng.integers(-20, 21, len(p[::2]))
    x = np.where(p == np.rint(p), x * rng.choice(np.float32([-1, 1]), x.size), x)
    with np.errstate(all="ignore"):
        want = np.power(x.astype(np.float64), p.astype(np.float64))
        got = pow32(x, p).astype(np.float64)
        normal = (np.abs(want) < 1e38) & (np.abs(want) > 1e-37)
        error = np.abs(got - want)[normal] / np.abs(want[normal])
        logs = np.abs(p * np.log(np.abs(x.astype(np.float64))))[normal]
    multiplied = ((np.abs(p) <= 16) & (p == np.rint(p)))[normal]
    bound = np.where(multiplied, np.maximum(np.abs(p[normal]), 1), 2 + logs) * 2**-23
    assert (error <= bound).all()
    assert normal.sum() > 50_000


def test_power_at_the_edges() -> None:
    inf, nan = np.inf, np.nan
    x = np.array([0, 0, 0, -2, -2, -2, nan, 2, inf, -8, 2], np.float32)
    p = np.array([0, 2, -1, 3, 0.5, -2, 0, inf, 0.5, 17, nan], np.float32)
    want = [1, 0, inf, -8, nan, 0.25, 1, inf, inf, np.float32(-8.0) ** 17, nan]
    np.testing.assert_allclose(pow32(x, p), want, rtol=5e-6)


def test_elementary_functions_at_the_edges() -> None:
    inf, nan = np.inf, np.nan
    x = np.array([-inf, -1.0, -0.0, 0.0, inf, nan], np.float32)
    np.testing.assert_array_equal(exp32(x)[[0, 2, 3, 4, 5]], [0, 1, 1, inf, nan])
    np.testing.assert_array_equal(log32(x), [nan, nan, -inf, -inf, inf, nan])
    np.testing.assert_array_equal(tanh32(x)[[0, 2, 3, 4, 5]], [-1, 0, 0, 1, nan])
    np.testing.assert_array_equal(sigmoid32(x)[[0, 2, 3, 4, 5]], [0, 0.5, 0.5, 1, nan])
    np.testing.assert_array_equal(sqrt32(x), [nan, nan, 0, 0, inf, nan])
    np.testing.assert_array_equal(trig.atan32(x[[0, 4]]), np.float32([-np.pi / 2, np.pi / 2]))
    np.testing.assert_array_equal(trig.asin32(x), [nan, np.float32(-np.pi / 2), 0, 0, nan, nan])
    np.testing.assert_array_equal(trig.acos32(x)[[0, 1, 4, 5]], [nan, np.float32(np.pi), nan, nan])
    np.testing.assert_array_equal(trig.sinh32(x)[[0, 2, 3, 4, 5]], [-inf, 0, 0, inf, nan])
    np.testing.assert_array_equal(trig.cosh32(x)[[0, 2, 3, 4, 5]], [inf, 1, 1, inf, nan])
    np.testing.assert_array_equal(trig.asinh32(x)[[0, 2, 3, 4, 5]], [-inf, 0, 0, inf, nan])
    np.testing.assert_array_equal(trig.acosh32(x), [nan, nan, nan, nan, inf, nan])
    np.testing.assert_array_equal(trig.atanh32(x), [nan, -inf, 0, 0, nan, nan])
    for odd in (trig.atan32, trig.asin32, trig.sinh32, trig.asinh32, trig.atanh32):
        np.testing.assert_array_equal(np.signbit(odd(x[2:4])), [True, False])
    of_sines = (trig.atan32, trig.sinh32, trig.cosh32, trig.atanh32)
    for f in (exp32, log32, tanh32, sigmoid32, sqrt32, *of_sines):
        assert f(np.asarray(np.float32(0.5))).dtype == np.float32
        assert f(np.asarray(np.float32(0.5))).shape == ()
        assert f(np.array([0.5])).dtype == np.float64


def test_square_root_is_correctly_rounded() -> None:
    x = np.abs(_bit_patterns())
    root = sqrt32(x)
    wide = np.sqrt(x.astype(np.float64))  # 53 bits of a root never round to a tie of 24 bits
    assert np.array_equal(root, wide.astype(np.float32))
