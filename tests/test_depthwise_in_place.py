"""Depthwise layers and their input gradients that overwrite their operand: where, what it saves.

That C gives the same bits in place is tested with all operators' samples (test_c_kernels.py), and
on whole networks on the emulated board (test_board.py).
"""

from __future__ import annotations

import re
from pathlib import Path

import nets
import numpy as np
import pytest
from onnx_files import floats

import odt_plan.backends.c
from odt_plan.ir.autodiff import build_training
from odt_plan.ir.calibrate import calibrate
from odt_plan.ir.graph import Attr, Graph, Node, TensorType
from odt_plan.ir.opdef import inplace_operands
from odt_plan.ir.ops.conv_grad import MARGIN_ROOM
from odt_plan.ir.ops.qtypes import i8
from odt_plan.ir.precision import all_i8, lower
from odt_plan.ir.training import Candidate, TrainingGraph, TrainingSpec
from odt_plan.planner.tensors import Storage

KERNELS = Path(odt_plan.backends.c.__file__).parent / "kernels"
#: Image, kernel, attributes of a layer of 6 channels -> forward and gradient work in place.
GEOMETRY: list[tuple[tuple[int, int], int, dict[str, Attr], bool, bool]] = [
    ((8, 8), 3, {"pads": (1, 1, 1, 1)}, True, True),
    ((8, 8), 5, {"pads": (0, 0, 4, 4)}, True, True),
    ((16, 16), 7, {"pads": (3, 3, 3, 3)}, True, True),
    ((17, 16), 7, {"pads": (3, 3, 3, 3)}, True, False),  # no room for the copy
    ((8, 8), 3, {}, False, False),
    ((8, 8), 3, {"pads": (1, 1, 1, 1), "strides": (2, 2)}, False, False),
    ((8, 8), 3, {"pads": (2, 2, 2, 2), "dilations": (2, 2)}, False, False),
    ((8, 8), 1, {}, True, False),
]


def layer(size: tuple[int, int], kernel: int, group: int, attrs: dict[str, Attr]) -> list[Node]:
    """Forward in i8 and mixed, gradient of the input with i8 and f32 weights."""
    g = Graph("layer")
    w_type = i8((6, 6 // group, kernel, kernel), 0.1)
    x = g.add_input("x", i8((1, 6, *size)))
    w, f = g.add_input("w", w_type), g.add_input("f", TensorType(w_type.shape))
    outs = [g.add_input(n, TensorType((6,), "i32")) for n in ("multiplier", "shift")]
    attrs = {**attrs, "group": group}
    result = {**attrs, "out_scale": 0.2, "out_zero_point": 3}
    y = g.add_node("QConv", (x, w, None, *outs), result, name="y")
    mixed = g.add_node("MixedConv", (x, f), result, name="mixed")
    dy, scale = g.add_input("dy", TensorType(y.out.type.shape)), g.add_input("s", TensorType((6,)))
    shape = {**attrs, "shape": x.type.shape}
    quantized = g.add_node("QConvGradInput", (dy, w, scale), shape, name="quantized")
    return [y, mixed, quantized, g.add_node("ConvGradInput", (dy, f), shape, name="real")]


@pytest.mark.parametrize(("size", "kernel", "attrs", "forward", "gradient"), GEOMETRY)
def test_where(
    size: tuple[int, int], kernel: int, attrs: dict[str, Attr], forward: bool, gradient: bool
) -> None:
    found = [bool(inplace_operands(n)) for n in layer(size, kernel, 6, attrs)]
    assert found == [forward, forward, gradient, gradient]


def test_only_depthwise() -> None:
    attrs: dict[str, Attr] = {"pads": (1, 1, 1, 1)}
    assert not any(inplace_operands(n) for n in layer((8, 8), 3, 1, attrs))


def test_room_of_the_kernel() -> None:
    header = (KERNELS / "odtplan_margin.h").read_text()
    assert re.findall(r"define ODTPLAN_MARGIN_ROOM (\d+)", header) == [str(MARGIN_ROOM)]


def training(*chosen: str) -> TrainingGraph:
    """Two convolutions around a depthwise one; these parameters are updated."""
    rng, g = np.random.default_rng(0), Graph("net")
    x = g.add_input("x", TensorType((1, 2, 8, 8)))
    for name, outs, group in (("expand", 6, 1), ("depthwise", 6, 6), ("project", 2, 1)):
        x = nets.conv(g, rng, x, name, outs, kernel=3 if group > 1 else 1, group=group)
    g.outputs = [nets.dense(g, rng, nets.flat(g, x), "fc", 3)]
    calibrate(g, floats(rng, 8, 2, 8, 8))
    low = lower(g, all_i8(g, inputs=True))
    return build_training(low, TrainingSpec(), [Candidate(c) for c in chosen])


@pytest.mark.parametrize(
    ("chosen", "forward", "gradient"),
    [
        (("fc.weight",), True, None),
        (("project.bias",), True, None),
        (("expand.bias",), False, True),  # its mask may have to be made again from the operand
        (("expand.bias", "depthwise.bias"), False, True),
        (("expand.bias", "depthwise.weight"), False, False),  # dy is read after the gradient
    ],
)
def test_in_a_training_graph(chosen: tuple[str, ...], forward: bool, gradient: bool | None) -> None:
    t = training(*chosen)
    storage = Storage(t)
    nodes = {n.name: n for n in t.graph.nodes}

    def shared(name: str) -> bool:
        node = nodes[name]
        assert node.inputs[0] is not None
        return storage.of[node.out] is storage.of[node.inputs[0]]

    assert shared("depthwise") == forward
    assert ("depthwise/grad_input" in nodes) == (gradient is not None)
    if gradient is not None:
        assert shared("depthwise/grad_input") == gradient
