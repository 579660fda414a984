"""Every operator's C kernel gives the bits of its NumPy kernel, on every sample.

One C file per kernel family holds, for each sample, its parameter struct and a wrapper around the
emitted call; both come from the code that emits firmware. The library is loaded with ctypes. The
same tests run once more on a library built with the address and undefined-behaviour sanitizers.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from board import lane
from c_cases import (
    KERNELS,
    SANITIZED,
    SOURCES,
    Buffer,
    Library,
    assert_same_bits,
    gcc_command,
    invoke,
    run,
    sanitized,
    zig_command,
)
from hypothesis import given
from hypothesis import strategies as st
from op_cases import Case, build, cases

from odt_plan.backends.c.emit_call import call, float_literal, param_struct
from odt_plan.ir.errors import GraphError
from odt_plan.ir.graph import Attr, TensorType
from odt_plan.ir.opdef import Sample, all_ops, get_op, inplace_operands

HEADERS = sorted(KERNELS.glob("odtplan_*.h"))
#: In-place results beyond the first, which OpDef.inplace can't say: result i on operand j.
STATE_RESULTS = {
    "Momentum": {1: 2}, "Adagrad": {1: 2}, "Adam": {1: 2, 2: 3},
    "QMomentum": {1: 2}, "QAdagrad": {1: 2}, "QAdam": {1: 2, 2: 3},
}


def _random_samples(rng: np.random.Generator) -> Iterator[tuple[str, Sample]]:
    """Shapes and attributes beyond the samples, for the kernels that walk merged axes."""

    def shape(rank: int) -> tuple[int, ...]:
        return tuple(map(int, rng.integers(1, 5, rank)))

    for _ in range(12):
        rank = int(rng.integers(1, 7))
        whole = shape(rank)
        a, b = (tuple(d if rng.random() < 0.6 else 1 for d in whole) for _ in range(2))
        b = b[int(rng.integers(0, rank)) :]
        for op in (
            *("Add", "Sub", "Mul", "Div", "Max", "Min", "Mod", "Fmod", "Pow", "PowSlope", "PowLog"),
        ):
            yield op, Sample((TensorType(a), TensorType(b)))
        for op in ("Greater", "GreaterOrEqual", "Equal"):
            yield op, Sample((TensorType(a), TensorType(b)))
        for op in ("And", "Or", "Xor"):
            yield op, Sample((TensorType(a, "bits"), TensorType(b, "bits")))
        yield "PRelu", Sample((TensorType(whole), TensorType(b)))
        yield "Expand", Sample((TensorType(b),), {"shape": whole})
        condition = tuple(d if rng.random() < 0.6 else 1 for d in whole)
        for choices in ((a, b), (b, a)):
            types = (TensorType(condition, "bits"), *map(TensorType, choices))
            yield "Where", Sample(types)
        perm = tuple(map(int, rng.permutation(rank)))
        yield "Transpose", Sample((TensorType(whole),), {"perm": perm})
        starts = tuple(int(rng.integers(0, d)) for d in whole)
        steps = tuple(map(int, rng.integers(1, 4, rank)))
        sizes = tuple(
            int(rng.integers(1, (d - a - 1) // s + 2))
            for d, a, s in zip(whole, starts, steps, strict=True)
        )
        window: dict[str, Attr] = {"starts": starts, "steps": steps}
        yield "Slice", Sample((TensorType(whole),), {**window, "sizes": sizes})
        yield "SliceGrad", Sample((TensorType(sizes),), {**window, "shape": whole})
        begins, ends = (tuple(map(int, rng.integers(0, 3, rank))) for _ in range(2))
        pad: dict[str, Attr] = {"begins": begins, "ends": ends, "value": 0.5}
        yield "Pad", Sample((TensorType(whole),), pad)
        axis = int(rng.integers(0, rank))
        parts = [(*whole[:axis], n, *whole[axis + 1 :]) for n in shape(int(rng.integers(1, 5)))]
        yield "Concat", Sample(tuple(map(TensorType, parts)), {"axis": axis - rank})
        index = TensorType(shape(int(rng.integers(0, 3))), "i32")
        ranges = {1: (-whole[axis], whole[axis] - 1)}
        yield "Gather", Sample((TensorType(whole), index), {"axis": axis}, ranges=ranges)
        dy = TensorType((*whole[:axis], *index.shape, *whole[axis + 1 :]))
        table: dict[str, Attr] = {"axis": axis, "shape": whole}
        yield "GatherGrad", Sample((dy, index), table, ranges=ranges)


CASES = [c for c in cases() if c.op.c is not None]
CASES += [
    Case(get_op(op), 100 + i, sample, build(op, sample))
    for i, (op, sample) in enumerate(_random_samples(np.random.default_rng(7)))
]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library(tmp_path_factory.mktemp("kernels"), CASES)


every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
seeds = pytest.mark.parametrize("seed", range(2))


@seeds
@every_case
def test_c_equals_numpy(library: Library, case: Case, seed: int) -> None:
    data = case.data(seed)
    want = case.op.kernel(case.node, data)
    outputs = [Buffer(v.type.nbytes) for v in case.node.outputs]
    invoke(library.function(case), case, data, outputs)
    for buffer, v, w in zip(outputs, case.node.outputs, want, strict=True):
        assert_same_bits(buffer.array(v.type), w)


@pytest.mark.parametrize(
    "case", [c for c in CASES if inplace_operands(c.node)], ids=lambda c: c.name
)
def test_in_place(library: Library, case: Case) -> None:
    data = case.data()
    want = case.op.kernel(case.node, data)
    for i in inplace_operands(case.node):
        t = case.sample.types[i]
        if t is None or t.stored != case.node.out.type.stored:
            continue
        state = STATE_RESULTS.get(case.op.name, {})
        outputs = [
            i if k == 0 else state.get(k, Buffer(v.type.nbytes))
            for k, v in enumerate(case.node.outputs)
        ]
        results = invoke(library.function(case), case, data, outputs)
        for buffer, v, w in zip(results, case.node.outputs, want, strict=True):
            assert_same_bits(buffer.array(v.type), w)


@pytest.mark.parametrize("case", [c for c in CASES if c.op.rows_kernel], ids=lambda c: c.name)
def test_row_tiles(library: Library, case: Case) -> None:
    data = case.data()
    t = case.node.out.type
    (want,) = case.op.kernel(case.node, data)
    assert case.op.rows_kernel is not None
    function = library.function(case, rows=True)
    for tile in {1, 2, max(1, t.shape[0] - 1), t.shape[0]}:
        for begin in range(0, t.shape[0], tile):
            end = min(begin + tile, t.shape[0])
            part = TensorType((end - begin, *t.shape[1:]), t.dtype)
            (out,) = invoke(function, case, data, [Buffer(part.nbytes)], (begin, end))
            assert_same_bits(out.array(part), want[begin:end])
            assert_same_bits(case.op.rows_kernel(case.node, data, begin, end), want[begin:end])


@pytest.mark.skipif(sanitized, reason="this is the sanitized run")
def test_sanitized() -> None:
    """All of the above under the sanitizers, in a process that has their runtime loaded."""
    compiler = gcc_command()
    if compiler is None:
        pytest.skip("gcc is not here")
    names = ("libasan.so", "libubsan.so")
    runtime = [
        subprocess.check_output([*compiler, f"-print-file-name={n}"], text=True).strip()
        for n in names
    ]
    if not all(os.path.isabs(r) for r in runtime):
        pytest.skip(f"gcc has no {' and '.join(names)}")
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {
        SANITIZED: "1",
        "LD_PRELOAD": " ".join(runtime),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "OMP_NUM_THREADS": "1",
    }
    selection = "test_c_equals_numpy or test_in_place or test_row_tiles or test_indices_outside"
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*pytest_, "-k", selection, str(Path(__file__))],
        env=env,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "passed" in done.stdout


def test_indices_outside_read_and_write_nothing(library: Library) -> None:
    """NumPy refuses them; C takes what is at hand and leaves the rest alone."""
    outside = np.array([3, -4, 2**31 - 1, -(2**31)], np.int32)
    for op, axis, fill in (("Gather", 0, np.nan), ("GatherGrad", 0, 0.0), ("GatherGrad", 1, 0.0)):
        case = next(
            c for c in CASES if c.op.name == op and c.index < 100 and c.sample.attrs["axis"] == axis
        )
        first, index, *_ = case.data()
        assert first is not None
        assert index is not None
        shape = case.sample.types[0].shape if op == "Gather" else case.sample.attrs["shape"]
        size = shape[axis]
        bad = np.resize(outside, index.shape)
        bad = np.where(np.abs(bad.astype(np.int64)) < 100, np.sign(bad) * (size + 1), bad)
        out = Buffer(case.node.out.type.nbytes)
        if op == "Gather":
            invoke(library.function(case), case, [first, bad.astype(np.int32)], [out])
        else:
            rows = (0, shape[0])
            function = library.function(case, rows=True)
            invoke(function, case, [first, bad.astype(np.int32)], [out], rows)
        got = out.array(case.node.out.type)
        assert np.array_equal(got, np.full_like(got, fill), equal_nan=True)
    for op, fill in (("TakeLanes", np.nan), ("TakeLanesGrad", 0.0)):
        case = next(c for c in CASES if c.op.name == op)
        first, index = case.data()
        assert index is not None
        bad = np.resize(np.array([5, -6, 2**31 - 1, -(2**31)], np.int32), index.shape)
        out = Buffer(case.node.out.type.nbytes)
        invoke(library.function(case), case, [first, bad], [out])
        got = out.array(case.node.out.type)
        assert np.array_equal(got, np.full_like(got, fill), equal_nan=True)
    scatter = next(c for c in CASES if c.op.name == "Scatter" and c.index == 0)
    x, index, rows_ = scatter.data()
    assert x is not None
    out = Buffer(x.nbytes)
    data = [x, np.array([5, -6, 2**31 - 1, -(2**31)], np.int32), rows_]
    invoke(library.function(scatter), scatter, data, [out])
    assert np.array_equal(out.array(scatter.node.out.type), x)


LANES = (
    *("ArgMax", "ArgMin", "ArgTopK", "LogSoftmax", "ReduceL1", "ReduceL2", "ReduceLogSumExp"),
    *("ReduceMax", "ReduceMin", "ReduceProd", "ReduceProdGrad", "ReduceL1Grad", "ReduceL2Grad"),
)


@pytest.mark.parametrize("case", [c for c in CASES if c.op.name in LANES], ids=lambda c: c.name)
def test_lanes_of_special_values(library: Library, case: Case) -> None:
    """NaN, infinities, zeros and equal numbers, in many mixtures."""
    rng = np.random.default_rng(0)
    values = np.array([np.nan, np.inf, -np.inf, 0.0, 1.0, 1.0, -2.0], np.float32)
    function = library.function(case)
    for chosen in (values, values[1:], values[2:], values[3:], values[:1], values[2:3]):
        for _ in range(8):
            data = [rng.choice(chosen, t.shape) for t in case.sample.types if t is not None]
            with np.errstate(all="ignore"):
                (want,) = case.op.kernel(case.node, data)
            out = Buffer(case.node.out.type.nbytes)
            invoke(function, case, data, [out])
            assert_same_bits(out.array(case.node.out.type), want)


def test_every_operator_has_a_kernel_and_samples() -> None:
    for op in all_ops().values():
        assert (op.c is None) == op.view, op.name
        assert next(iter(op.samples()), None) is not None, op.name
        if op.c is not None:
            assert (KERNELS / f"{op.c.source}.h").exists(), op.name


@pytest.mark.skipif(zig_command() is None, reason="ziglang is not here")
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_clang_accepts(source: Path, tmp_path: Path) -> None:
    zig = zig_command()
    assert zig is not None
    run([*zig, *lane.STRICT, *lane.OPTIMISED, "-c", source, "-o", tmp_path / "kernel.o"])


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not here")
def test_headers_are_cpp(tmp_path: Path) -> None:
    text = tmp_path / "all.cpp"
    text.write_text("".join(f'#include "{h.name}"\n' for h in HEADERS))
    run(["g++", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", f"-I{KERNELS}", text])


@pytest.mark.parametrize("path", SOURCES + HEADERS, ids=lambda p: p.name)
def test_freestanding(path: Path) -> None:
    """No libc beyond three headers, no heap; double in the session and in builds that clip."""
    text = re.sub(r"/\*.*?\*/", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    included = set(re.findall(r'#\s*include\s*[<"]([^>"]+)', text))
    allowed = {"stdint.h", "stddef.h", "string.h", "arm_acle.h", *(h.name for h in HEADERS)}
    assert included <= allowed
    assert not re.findall(r"\b(?:malloc|calloc|free|printf)\b", text)
    without_clipping = re.sub(r"#if ODTPLAN_CLIP\b.*?#endif", "", text, flags=re.DOTALL)
    assert path.stem == "odtplan_session" or not re.findall(r"\bdouble\b", without_clipping)


@given(st.floats(width=32))
def test_float_literal_is_exact(value: float) -> None:
    text = float_literal(value)
    if math.isfinite(value):
        assert np.float32(text.removesuffix("f")) == np.float32(value)
        assert re.fullmatch(r"-?\d+(\.\d+)?(e[+-]\d+)?f", text)
        assert "." in text or "e" in text
    else:
        top, bottom = text.strip("()").split(" / ")
        with np.errstate(all="ignore"):
            quotient = np.float32(top.removesuffix("f")) / np.float32(bottom.removesuffix("f"))
        assert_same_bits(np.asarray(quotient), np.asarray(np.float32(value)))


def _case(op: str) -> Case:
    return next(c for c in CASES if c.op.name == op)


def test_emitted_text() -> None:
    case = next(c for c in CASES if c.op.name == "Clip" and c.sample.attrs["min"] == 0.0)
    assert param_struct(case.node, "p") == (
        "static const odtplan_clip_t p = {\n"
        "    .count = 54,\n    .min = 0.0f,\n    .max = 6.0f,\n};\n"
    )
    assert call(case.node, "p", ["arena + 4"], ["y"]) == (
        "odtplan_clip_f32(&p, (const float *)(arena + 4), (float *)y);"
    )
    mask = _case("ReluMask")
    assert call(mask.node, "p", ["x"], ["m"]) == (
        "odtplan_relu_mask_f32(&p, (const float *)x, (uint8_t *)m);"
    )
    concat = _case("Concat")
    assert call(concat.node, "p", ["a", "b", "c"], ["y"]) == (
        "odtplan_concat_f32(&p, (const float *const[]){(const float *)a, (const float *)b,"
        " (const float *)c}, (float *)y);"
    )


def test_emission_refuses_what_does_not_fit() -> None:
    relu = _case("Relu").node
    with pytest.raises(GraphError, match=r"node: \[True, True\]"):
        call(relu, "p", ["x", "x"], ["y"])
    with pytest.raises(GraphError, match="rows"):
        call(relu, "p", ["x"], ["y"], None, ("0", "1"))
    view = next(c for c in cases() if c.op.view).node
    with pytest.raises(GraphError, match="view"):
        param_struct(view, "p")
