"""Kernels in C of nodes that stand alone, compiled, called between guards, and compared."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from board import lane
from board.objects import compiled
from op_cases import Array, Case

import odt_plan.backends.c
from odt_plan.backends.c.emit_call import call, param_struct
from odt_plan.ir.graph import TensorType

KERNELS = Path(odt_plan.backends.c.__file__).parent / "kernels"
SOURCES = sorted(KERNELS.glob("odtplan_*.c"))
#: Set in the environment of the sanitized run of this file.
SANITIZED = "ODT_PLAN_TEST_SANITIZED"
sanitized = SANITIZED in os.environ
if sanitized:
    os.environ.pop("LD_PRELOAD", None)  # the runtime is here; compilers are slow with it
#: Bytes around each buffer that must not change; the sanitizer guards exact buffers better.
GUARD = 0 if sanitized else 64
#: Fill of the guards; they differ, so that copying one over the other shows.
OPERAND_GUARD, RESULT_GUARD = 0xA5, 0x5A


def gcc_command() -> list[str] | None:
    return ["gcc"] if shutil.which("gcc") else None


def zig_command() -> list[str] | None:
    return [sys.executable, "-m", "ziglang", "cc"] if importlib.util.find_spec("ziglang") else None


def run(command: Sequence[str | Path]) -> None:
    code, errors = _result(tuple(map(str, command)))
    assert code == 0, f"{' '.join(map(str, command))}\n{errors}"


@functools.cache  # a kernel that does not compile fails every test at once, not one by one
def _result(command: tuple[str, ...]) -> tuple[int, str]:
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stderr


class Library:
    """The kernels and the wrappers of all samples, compiled family by family on demand."""

    def __init__(self, folder: Path, cases: Sequence[Case]) -> None:
        compiler = gcc_command() or zig_command()
        if compiler is None:
            pytest.skip("neither gcc nor ziglang is here")
        self.folder, self.cases, self.compiler = folder, cases, compiler
        self.flags = [*lane.STRICT, *(lane.CHECKED if sanitized else lane.OPTIMISED)]
        self.objects = [compiled([*compiler, *self.flags], source) for source in SOURCES]

    def function(self, case: Case, *, rows: bool = False) -> ctypes._CFuncPtr:
        """The wrapper of a sample; ``rows``: the one that takes the first and the last row."""
        assert case.op.c is not None
        suffix = "_rows" if rows else ""
        function = self._family(case.op.c.source)[f"case_{self.cases.index(case)}{suffix}"]
        function.restype = None
        return function

    @functools.cache  # noqa: B019  (lives as long as the test session)
    def _family(self, source: str) -> ctypes.CDLL:
        text = self.folder / f"cases_{source}.c"
        text.write_text(
            f'#include "{source}.h"\n\n'
            + "\n".join(
                wrapper(i, c)
                for i, c in enumerate(self.cases)
                if c.op.c is not None and c.op.c.source == source
            )
        )
        library = text.with_suffix(".so")
        sources = [f"-I{KERNELS}", "-shared", text, *self.objects]
        run([*self.compiler, *self.flags, *sources, "-o", library])
        return ctypes.CDLL(str(library))


def wrapper(index: int, case: Case) -> str:
    node, op = case.node, case.op
    inputs = [None if v is None else f"io[{i}]" for i, v in enumerate(node.inputs)]
    first = len(inputs)
    outputs = [f"io[{first + i}]" for i in range(len(node.outputs))]
    workspace = f"io[{first + len(outputs)}]" if op.workspace(node) > 0 else None
    params = f"params_{index}"
    text = param_struct(node, params)
    text += f"void case_{index}(void **io);\nvoid case_{index}(void **io)\n"
    text += f"{{\n    {call(node, params, inputs, outputs, workspace)}\n}}\n"
    if op.rows_kernel is not None:
        head = f"void case_{index}_rows(void **io, int32_t begin, int32_t end)"
        body = call(node, params, inputs, outputs, workspace, ("begin", "end"))
        text += f"{head};\n{head}\n{{\n    {body}\n}}\n"
    return text


class Buffer:
    """Bytes between two guards; a result starts with the guard's bytes."""

    def __init__(self, nbytes: int, data: Array | None = None) -> None:
        self.fill = RESULT_GUARD if data is None else OPERAND_GUARD
        self.raw = np.full(nbytes + 2 * GUARD, self.fill, np.uint8)
        self.bytes = self.raw[GUARD : GUARD + nbytes]
        if data is not None:
            self.bytes[:] = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        self.before = self.bytes.copy()

    @property
    def address(self) -> int:
        return self.bytes.ctypes.data if len(self.bytes) else 0

    def array(self, t: TensorType) -> Array:
        return self.bytes.view(t.np_dtype).reshape(t.storage_shape)

    def check_guards(self) -> None:
        assert (self.raw[:GUARD] == self.fill).all(), "wrote before a buffer"
        assert (self.raw[len(self.raw) - GUARD :] == self.fill).all(), "wrote behind a buffer"


def invoke(
    function: ctypes._CFuncPtr,
    case: Case,
    data: Sequence[Array | None],
    outputs: Sequence[Buffer | int],
    rows: tuple[int, int] | None = None,
) -> list[Buffer]:
    """Call a wrapper; an integer output is in place on that operand. Checks all guards."""
    inputs = [None if a is None else Buffer(a.nbytes, a) for a in data]
    results: list[Buffer] = []
    for o in outputs:
        target = inputs[o] if isinstance(o, int) else o
        assert target is not None
        results.append(target)
    workspace = Buffer(case.op.workspace(case.node))
    every = [*inputs, *results, workspace]
    pointers = (ctypes.c_void_p * len(every))(*(None if b is None else b.address for b in every))
    function(pointers, *(ctypes.c_int32(r) for r in rows or ()))
    for b in every:
        if b is not None:
            b.check_guards()
    for b in inputs:
        if b is not None and b not in results:
            assert np.array_equal(b.bytes, b.before), "changed an operand"
    return results


def assert_same_bits(got: Array, want: Array) -> None:
    """Equal bit for bit; 0.0 equals -0.0, and one NaN equals another."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    same = got == want
    if got.dtype.kind == "f":
        same |= np.isnan(got) & np.isnan(want)
    at = np.argwhere(~same)
    assert not len(at), f"{len(at)} of {want.size} differ, first at {tuple(at[0])}:" + (
        f" C {got[tuple(at[0])]!r}, NumPy {want[tuple(at[0])]!r}"
    )
