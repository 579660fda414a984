"""Fast steps do what the operators' kernels do, in their own bytes, with bounded scratch."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from op_cases import Array, Case, build, cases
from oracle import batch
from zoo import RECIPES, exhibit

from odt_plan.backends.numpy import Runtime
from odt_plan.backends.numpy.fast import OPERATORS, prepared
from odt_plan.backends.numpy.scratch import Scratch
from odt_plan.ir.graph import Attr, TensorType
from odt_plan.ir.opdef import Sample, get_op, inplace_operands
from odt_plan.ir.ops.conv import result_type
from odt_plan.planner.device import load_device
from odt_plan.planner.pipeline import Request, make_plan

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.build_models import resnet8

T = TensorType
#: Floats of room: whole samples at a time, some groups, single rows.
ROOMS = (1 << 16, 900, 1)
#: Further convolutions: several samples of short planes, long planes, many groups of channels,
#: kernels shorter than the stride, more padding than the kernel reaches.
SHAPES: tuple[tuple[tuple[int, ...], tuple[int, ...], dict[str, Attr]], ...] = (
    ((6, 4, 4, 4), (4, 1, 3, 3), {"group": 4, "pads": (1, 1, 1, 1)}),
    ((4, 3, 30, 36), (2, 3, 3, 3), {"pads": (1, 1, 1, 1)}),
    ((2, 12, 9, 7), (12, 1, 5, 5), {"group": 12, "pads": (2, 2, 2, 2), "strides": (2, 2)}),
    ((2, 6, 9, 9), (4, 6, 1, 1), {"strides": (2, 2)}),
    ((2, 3, 7, 8), (2, 3, 2, 2), {"strides": (3, 3), "pads": (1, 2, 2, 1)}),
    ((1, 2, 4, 5), (3, 2, 1, 2), {"pads": (2, 3, 3, 2)}),
    ((2, 2, 11, 13), (2, 2, 3, 3), {"dilations": (2, 4), "strides": (4, 2), "pads": (3, 4, 2, 4)}),
    ((3, 8, 40), (8, 1, 3), {"group": 8, "pads": (1, 1)}),
)


def convolutions() -> list[Case]:
    result = []
    for i, (x, w, attrs) in enumerate(SHAPES):
        y, shape = result_type(x, w, attrs), {**attrs, "shape": x}
        for name, sample in (
            ("Conv", Sample((T(x), T(w), T(w[:1])), attrs)),
            ("ConvGradInput", Sample((y, T(w)), shape)),
            ("ConvGradWeight", Sample((T(x), y), {**attrs, "weight_shape": w})),
        ):
            result.append(Case(get_op(name), 100 + i, sample, build(name, sample)))
    return result


CASES = [c for c in cases() if c.op.name in OPERATORS] + convolutions()


def is_fast(case: Case) -> bool:
    """Whether there is a fast form; factors, scales and partly updated weights have none."""
    results = [np.empty_like(w) for w in case.op.kernel(case.node, case.data())]
    return prepared(case.node, case.data(), results, Scratch(0)) is not None


FAST = [c for c in CASES if is_fast(c)]
IN_PLACE = [c for c in FAST if inplace_operands(c.node)]


def run_twice(
    case: Case, operands: Sequence[Array | None], results: Sequence[Array], room: int
) -> None:
    """Prepare, and run twice over scratch full of NaN."""
    scratch = Scratch(0)
    scratch.room = room
    for _ in range(2):
        scratch.begin()
        run = prepared(case.node, operands, results, scratch)
        assert run is not None
        if scratch.nbytes == 0:
            scratch.allocate()
    kept = [None if a is None else a.copy() for a in operands]
    for _ in range(2):
        for a, b in zip(operands, kept, strict=True):
            if a is not None and b is not None:
                a[...] = b
        scratch.take(0)
        assert scratch._buffer is not None
        scratch._buffer.fill(np.nan)
        with np.errstate(all="ignore"):
            run()


def guarded(like: Array) -> tuple[Array, Array]:
    """An array like another one, all NaN, and the bytes that it is in the middle of."""
    margin = 256
    memory = np.full(like.nbytes + 2 * margin, 0xAB, np.uint8)
    inside = memory[margin : margin + like.nbytes]
    inside.fill(0xFF)
    return inside.view(like.dtype).reshape(like.shape), memory


def close(got: Array, wanted: Array) -> None:
    if wanted.dtype.kind == "f":
        scale = max(1.0, float(np.abs(wanted).max(initial=0)))
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-6 * scale)
    else:
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("case", FAST, ids=lambda c: c.name)
def test_equals_the_operator(case: Case, room: int) -> None:
    operands = case.data()
    wanted = case.op.kernel(case.node, operands)
    before = [None if a is None else a.copy() for a in operands]
    places = [guarded(np.asarray(w)) for w in wanted]
    run_twice(case, operands, [inside for inside, _ in places], room)
    for (inside, memory), w in zip(places, wanted, strict=True):
        close(inside, np.asarray(w))
        edge = (len(memory) - inside.nbytes) // 2
        assert (memory[:edge] == 0xAB).all()
        assert (memory[len(memory) - edge :] == 0xAB).all()
    for a, b in zip(operands, before, strict=True):
        assert a is None or b is None or a.tobytes() == b.tobytes()


@pytest.mark.parametrize("case", IN_PLACE, ids=lambda c: c.name)
def test_equals_the_operator_in_place(case: Case) -> None:
    wanted = case.op.kernel(case.node, case.data())
    for index in inplace_operands(case.node):
        operands = case.data()
        same = operands[index]
        assert same is not None
        if same.shape == wanted[0].shape:  # not one that is repeated
            run_twice(case, operands, [same], ROOMS[0])
            close(same, wanted[0])


@pytest.mark.parametrize(("op", "mask"), [("Clip", "ClipMask"), ("Relu", "ReluMask")])
def test_limits_and_masks_at_the_very_bounds(op: str, mask: str) -> None:
    below, above = np.nextafter(np.float32(0), -1), np.nextafter(np.float32(6), np.float32(9))
    values = [-1, below, 0, -0.0, 0.5, 6, above, 7, np.inf, -np.inf, np.nan]
    attrs: dict[str, Attr] = {"min": 0.0, "max": 6.0} if op == "Clip" else {}
    x: Array = np.array(values, np.float32)
    for name in (op, mask):
        sample = Sample((T(x.shape),), attrs)
        case = Case(get_op(name), 0, sample, build(name, sample))
        (wanted,) = case.op.kernel(case.node, [x])
        got = np.empty_like(wanted)
        run_twice(case, [x], [got], ROOMS[0])
        np.testing.assert_array_equal(got, wanted)


def test_only_what_is_told_runs_its_own_kernel() -> None:
    assert {c.op.name for c in CASES} == set(OPERATORS)
    own = {c.op.name for c in CASES if c not in FAST}
    assert own == {"MaskMul", "MatMul", "SGD"}, "a factor, a partly updated weight, a scale"


@pytest.mark.parametrize("name", RECIPES)
def test_trains_like_the_exact_runtime(name: str) -> None:
    e = exhibit(name)
    exact, fast = Runtime(e.plan, e.training), Runtime(e.plan, e.training, exact=False)
    poisoned = Runtime(e.plan, e.training, exact=False)
    rng = np.random.default_rng(23)
    for _ in range(2 * e.training.spec.micro_batches + 1):
        x, y = batch(e.training, rng)
        loss = fast.train_step(x, y, 0.01)
        assert loss == pytest.approx(exact.train_step(x, y, 0.01), rel=1e-4, abs=1e-6)
        for memory in poisoned._memory.arena:
            memory.fill(0xFF)
        assert poisoned.train_step(x, y, 0.01) == loss
    assert poisoned.state_bytes() == fast.state_bytes(), "nothing is read that was not written"
    learned = fast.params()
    for param, wanted in exact.params().items():
        np.testing.assert_allclose(learned[param], wanted, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(fast.infer(x), exact.infer(x), rtol=1e-3, atol=1e-4)
    assert fast.arena_nbytes == e.plan.claims.ram_bytes.arena
    assert fast.updates == exact.updates


def test_a_step_allocates_next_to_nothing(tmp_path: Path) -> None:
    model = tmp_path / "resnet8.onnx"
    model.write_bytes(resnet8().SerializeToString())
    done = make_plan(
        Request(
            model,
            load_device("stm32f746g-disco"),
            ram_bytes=1 << 20,
            flash_bytes=1 << 20,
            train=("all",),
            with_baselines=False,
        )
    )
    runtime = Runtime(done.plan, done.training, exact=False)
    x, y = batch(done.training, np.random.default_rng(29))
    runtime.train_step(x, y, 0.01)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        runtime.train_step(x, y, 0.01)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    sample = done.training.sample.type.nbytes
    assert peak < 3 * sample + 16384, "copies of the sample while it is checked, and no tensors"
    largest = max(u.grad.type.nbytes for u in done.training.updates)
    assert runtime.scratch_nbytes <= (1 << 18) + 2 * largest + 16384
    assert Runtime(done.plan, done.training).scratch_nbytes == 0
