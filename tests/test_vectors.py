"""C kernels on vectors of every length, and without, give the bits of the NumPy kernels.

Convolutions have the same in test_ops_conv.py.
"""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator

import numpy as np
import pytest
from board import lane
from board.objects import link
from c_cases import KERNELS, Buffer, assert_same_bits, invoke, wrapper
from op_cases import Case, build
from test_ops_conv import OPTIMISE, flags_of

from odt_plan.backends.c.emit import kernel_files
from odt_plan.ir.graph import TensorType
from odt_plan.ir.opdef import Sample, get_op, inplace_operands


def _samples() -> Iterator[tuple[str, Sample]]:
    """Whole vectors and what is left of them."""
    for n in (67, 128):
        x = TensorType((n,))
        yield "ReluMask", Sample((x,))
        yield "ClipMask", Sample((x,), {"min": -0.5, "max": 0.5})
        for inside, outside in ((1.0, 0.0), (0.2, 0.1)):
            slopes = {"inside": inside, "outside": outside}
            yield "MaskMul", Sample((x, TensorType((n,), "bits")), slopes)


CASES = [Case(get_op(op), i, s, build(op, s)) for i, (op, s) in enumerate(_samples())]


@pytest.fixture(scope="module", params=OPTIMISE)
def library(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> ctypes.CDLL:
    """A wrapper of each case, with the kernels that they call."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not here")
    folder = tmp_path_factory.mktemp("vectors")
    stems = sorted({c.op.c.source for c in CASES if c.op.c is not None})
    text = "".join(f'#include "{stem}.h"\n' for stem in stems)
    (folder / "cases.c").write_text(text + "\n".join(wrapper(i, c) for i, c in enumerate(CASES)))
    sources = [KERNELS / f for f in kernel_files(stems) if f.endswith(".c")]
    command = ["gcc", *lane.STRICT, *flags_of(request.param)]
    options = ["-shared", f"-I{KERNELS}"]
    library = link(command, [folder / "cases.c", *sources], options, folder / "cases.so")
    return ctypes.CDLL(str(library))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_c_equals_numpy(library: ctypes.CDLL, case: Case) -> None:
    """In a buffer of its own, and in place where that is allowed."""
    data = case.data()
    want = case.op.kernel(case.node, data)
    t = case.node.out.type
    for out in (Buffer(t.nbytes), *inplace_operands(case.node)):
        function = library[f"case_{case.index}"]
        (result,) = invoke(function, case, data, [out])
        assert_same_bits(result.array(t), want[0])


def test_a_slope_of_zero_stops_what_is_not_finite(library: ctypes.CDLL) -> None:
    """Whatever the gradient is where the mask is not set."""
    case = next(c for c in CASES if c.sample.attrs.get("outside") == 0.0)
    _, mask = case.data()
    dy = np.resize(np.array([np.inf, np.nan, -np.inf, 1.0], np.float32), 67)
    want = case.op.kernel(case.node, [dy, mask])
    out = Buffer(case.node.out.type.nbytes)
    invoke(library[f"case_{case.index}"], case, [dy, mask], [out])
    assert_same_bits(out.array(case.node.out.type), want[0])
