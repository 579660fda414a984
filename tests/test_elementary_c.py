"""The C twins of ir/ops/elementary.py give its bits, over numbers of every exponent."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from odt_plan.ir.graph import Array
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

KERNELS = Path(__file__).resolve().parents[1] / "backends" / "c" / "kernels"
TWINS: dict[str, Callable[[Array], Array]] = {
    "expf": exp32,
    "logf": log32,
    "tanhf": tanh32,
    "sigmoidf": sigmoid32,
    "sqrtf": sqrt32,
    "sqrtf_soft": sqrt32,
    "expm1f": expm1_32,
    "softplusf": softplus32,
    "erff": erf32,
    "sinf": sin32,
    "cosf": cos32,
    "acosf": trig.acos32,
    "acoshf": trig.acosh32,
    "asinf": trig.asin32,
    "asinhf": trig.asinh32,
    "atanf": trig.atan32,
    "atanhf": trig.atanh32,
    "coshf": trig.cosh32,
    "sinhf": trig.sinh32,
    "floorf": np.floor,
    "ceilf": np.ceil,
    "rintf": np.rint,
}
SOURCE = '#include "odtplan_trigonometry.h"\n' + "".join(
    f"""
void run_{name}(const float *x, float *y, int32_t n);
void run_{name}(const float *x, float *y, int32_t n) {{
    int32_t i;
    for (i = 0; i < n; i++) {{
        y[i] = odtplan_{name}(x[i]);
    }}
}}
"""
    for name in TWINS
)
PAIRS = ("powf", "fmodf")
SOURCE += "".join(
    f"""
void run_{name}(const float *x, const float *p, float *y, int32_t n);
void run_{name}(const float *x, const float *p, float *y, int32_t n) {{
    int32_t i;
    for (i = 0; i < n; i++) {{
        y[i] = odtplan_{name}(x[i], p[i]);
    }}
}}
"""
    for name in PAIRS
)
FLAGS = ["-std=c99", "-O2", "-ffp-contract=off", "-fPIC", "-shared"]
FLAGS += ["-Wall", "-Wextra", "-Wconversion", "-Werror"]
COMPILERS = {"gcc": ["gcc"], "zig": [sys.executable, "-m", "ziglang", "cc"]}


@pytest.fixture(scope="module", params=COMPILERS)
def library(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> ctypes.CDLL:
    """The functions over arrays, by one compiler."""
    present = shutil.which("gcc") if request.param == "gcc" else importlib.util.find_spec("ziglang")
    if not present:
        pytest.skip(f"{request.param} is not here")
    folder = tmp_path_factory.mktemp("elementary")
    source, target = folder / "functions.c", folder / "functions.so"
    source.write_text(SOURCE)
    command = [*COMPILERS[request.param], *FLAGS, f"-I{KERNELS}", str(source), "-o", str(target)]
    subprocess.run(command, check=True, timeout=120)
    return ctypes.CDLL(str(target))


def _numbers() -> Array:
    rng = np.random.default_rng(0)
    edges = [0x00000000, 0x00000001, 0x007FFFFF, 0x00800000, 0x3F800000, 0x7F7FFFFF, 0x7F800000]
    bits = np.concatenate([rng.integers(0, 0x7F800000, 500_000), edges]).astype(np.uint32)
    spread = np.concatenate([bits, bits | np.uint32(0x80000000)]).view(np.float32)
    usual = rng.uniform(-30, 30, 500_000).astype(np.float32)
    return np.concatenate([spread, usual, np.array([np.nan], np.float32)])


def _same(got: Array, want: Array) -> Array:
    """Equal bits, or NaN in both."""
    return (got.view(np.uint32) == want.view(np.uint32)) | (np.isnan(got) & np.isnan(want))


@pytest.mark.parametrize(("name", "twin"), TWINS.items())
def test_c_gives_the_bits_of_numpy(
    library: ctypes.CDLL, name: str, twin: Callable[[Array], Array]
) -> None:
    x = _numbers()
    got = np.empty_like(x)
    function = library[f"run_{name}"]
    function.restype = None
    function(ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(got.ctypes.data), len(x))
    want = twin(x)
    where = np.flatnonzero(~_same(got, want))
    assert not len(where), f"{x[where[:3]]}: C {got[where[:3]]}, NumPy {want[where[:3]]}"


def _of_pairs(library: ctypes.CDLL, name: str, x: Array, p: Array) -> Array:
    got = np.empty_like(x)
    pointers = (ctypes.c_void_p(a.ctypes.data) for a in (x, p, got))
    function = library[f"run_{name}"]
    function.restype = None
    function(*pointers, len(x))
    return got


def test_c_rest_is_that_of_numpy(library: ctypes.CDLL) -> None:
    """Exact, also of subnormal numbers and where the quotient has hundreds of bits."""
    x = np.random.default_rng(1).permutation(_numbers())
    p = np.random.default_rng(2).permutation(_numbers())
    with np.errstate(all="ignore"):
        want = np.fmod(x, p)
    assert _same(_of_pairs(library, "fmodf", x, p), want).all()


def test_c_power_gives_the_bits_of_numpy(library: ctypes.CDLL) -> None:
    x = np.random.default_rng(1).permutation(_numbers())
    p = np.random.default_rng(2).permutation(_numbers())
    p[::3] = np.rint(np.random.default_rng(3).uniform(-20, 20, len(p[::3])))
    got = _of_pairs(library, "powf", x, p)
    want = pow32(x, p)
    where = np.flatnonzero(~_same(got, want))
    assert not len(where), f"{x[where[:3]]} ** {p[where[:3]]}: {got[where[:3]]}, {want[where[:3]]}"
