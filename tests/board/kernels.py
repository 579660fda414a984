"""Single kernels on an emulated board: operands come from a file, results go to another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from odt_plan.backends.c.emit import kernel_files
from odt_plan.backends.c.emit_call import call, kernel_of, param_struct
from odt_plan.ir.graph import Node
from odt_plan.ir.opdef import get_op

from . import lane
from .emulate import BoardResult

Array = NDArray[Any]
LIMITS = lane.Limits(flash_bytes=4 << 20, ram_bytes=4 << 20, stack_bytes=64 << 10)

_MAIN = """
int main(void) {
    const int in = board_open("operands.bin", BOARD_READ);
    const int out = board_open("results.bin", BOARD_WRITE);
    if (in < 0 || out < 0) {
        return 1;
    }
%s    board_close(out);
    return 0;
}
"""


def run_kernels(
    folder: Path,
    cases: Sequence[tuple[Node, Sequence[Array | None]]],
    core: str,
    compiler: lane.Compiler,
    *,
    optimise: str = "-O2",
    emulator: lane.Emulator = "unicorn",
) -> tuple[list[list[Array]], BoardResult]:
    """Run the kernels one after the other; their executed instructions are in region ``train``.

    Args:
        folder: Empty; takes sources and image.
        cases: Nodes with the arrays of their operands.
        core: Key of ``lane.CORES``.
        compiler: See ``lane``.
        optimise: Optimisation flag.
        emulator: See ``lane``.

    Returns:
        The results of each node, and the run.
    """
    sources = sorted({kernel_of(n).source for n, _ in cases})
    for file, text in kernel_files(sources).items():
        (folder / file).write_text(text)
    (folder / "main.c").write_text(_program([n for n, _ in cases], sources))
    image = lane.build_program(
        folder, sorted(folder.glob("*.c")), core, compiler, limits=LIMITS, optimise=optimise
    )
    operands = b"".join(a.tobytes() for _, data in cases for a in data if a is not None)
    files = {"operands.bin": operands}
    done = lane.run(image, core, emulator, files=files, limits=LIMITS)
    assert done.exit_code == 0, done.stdout
    raw, at = done.files["results.bin"], 0
    results = []
    for node, _ in cases:
        arrays = []
        for v in node.outputs:
            part = np.frombuffer(raw[at : at + v.type.nbytes], v.type.np_dtype)
            arrays.append(part.reshape(v.type.storage_shape))
            at += v.type.nbytes
        results.append(arrays)
    assert at == len(raw)
    return results, done


def _program(nodes: Sequence[Node], sources: Sequence[str]) -> str:
    places = [_places(n) for n in nodes]
    room = max(end for _, end in places)
    parts = ['#include "board.h"\n', *(f'#include "{s}.h"\n' for s in sources)]
    parts.append(f"static uint8_t memory[{room}] __attribute__((aligned(8)));\n")
    body = ""
    for i, (node, (at, _)) in enumerate(zip(nodes, places, strict=True)):
        parts += [param_struct(node, f"p{i}"), _function(i, node, at)]
        for k, v in enumerate(node.inputs):
            if v is not None:
                body += f"    if (board_read(in, memory + {at[k]}, {v.type.nbytes}u) != 0) {{\n"
                body += "        return 2;\n    }\n"
        body += f"    region_train_begin();\n    case{i}();\n    region_train_end();\n"
        for k, v in enumerate(node.outputs, len(node.inputs)):
            body += f"    board_write(out, memory + {at[k]}, {v.type.nbytes}u);\n"
    return "".join(parts) + _MAIN % body


def _places(node: Node) -> tuple[list[int], int]:
    """Offsets of operands, results and workspace, and their end."""
    at, end = [], 0
    sizes = [0 if v is None else v.type.nbytes for v in (*node.inputs, *node.outputs)]
    for n in (*sizes, get_op(node.op).workspace(node)):
        at.append(end)
        end += -(-n // 8) * 8
    return at, end + 8


def _function(i: int, node: Node, at: Sequence[int]) -> str:
    inputs = [None if v is None else f"memory + {at[k]}" for k, v in enumerate(node.inputs)]
    outputs = [f"memory + {at[len(inputs) + k]}" for k in range(len(node.outputs))]
    workspace = f"memory + {at[-1]}" if get_op(node.op).workspace(node) else None
    text = call(node, f"p{i}", inputs, outputs, workspace)
    return f"static __attribute__((noinline)) void case{i}(void) {{\n    {text}\n}}\n"
