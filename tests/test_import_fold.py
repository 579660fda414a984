"""Folding: operators on constants and shapes are evaluated, within limits."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from onnx import NodeProto
from onnx_files import Array, agrees, floats, model, node, save

from odt_plan.ir.errors import UnsupportedModelError
from odt_plan.ir.onnx_import import import_model

HUGE = 10**11


def _ints(*values: int) -> Array:
    return np.array(values, np.int64)


def _sum_of(name: str) -> list[NodeProto]:
    """Adds the sum of a constant to the input."""
    return [
        node("Cast", name, "real", to=1),
        node("ReduceSum", "real", "sum", keepdims=0),
        node("Add", "x sum", "y"),
    ]


CONSTANT: dict[str, tuple[list[NodeProto], dict[str, Array]]] = {
    "logic": (
        [
            node("Greater", "a b", "p"),
            node("Less", "a b", "q"),
            node("And", "p q", "r"),
            node("Or", "r p", "s"),
            node("Not", "s", "t"),
            node("Equal", "t q", "c"),
        ],
        {"a": np.array([1.0, 0.0, 2.0], np.float32), "b": np.ones(3, np.float32)},
    ),
    "range": (
        [node("Range", "a b c", "r")],
        {"a": np.array(3), "b": np.array(20), "c": np.array(4)},
    ),
    "one hot": (
        [node("OneHot", "a d v", "c")],
        {"a": _ints(0, 2), "d": np.array(5), "v": np.array([0.5, 2], np.float32)},
    ),
    "non zero": ([node("NonZero", "a", "c")], {"a": np.array([1, 0, 2], np.float32)}),
    "size": ([node("Size", "x", "c")], {}),
    "filled": (
        [node("Shape", "x", "s"), node("ConstantOfShape", "s", "f"), node("Shape", "f", "c")],
        {},
    ),
}


@pytest.mark.parametrize("name", CONSTANT)
def test_constants_are_evaluated(name: str, tmp_path: Path) -> None:
    nodes, constants = CONSTANT[name]
    path = save(
        model([*nodes, *_sum_of(nodes[-1].output[0])], {"x": [1, 4]}, ["y"], constants), tmp_path
    )
    assert [n.op for n in agrees(path).nodes] == ["Add"]


def test_positions_are_evaluated(tmp_path: Path) -> None:
    """What exporters write for positions: the range of a computed shape reads a table."""
    nodes = [
        node("Shape", "x", "s"),
        node("Gather", "s one", "n"),
        node("Range", "zero n one", "at"),
        node("Gather", "table at", "p"),
        node("Add", "x p", "y"),
    ]
    rng = np.random.default_rng(0)
    constants = {"zero": np.array(0), "one": np.array(1), "table": floats(rng, 9, 3)}
    graph = agrees(save(model(nodes, {"x": ["N", 5, 3]}, ["y"], constants), tmp_path))
    assert [n.op for n in graph.nodes] == ["Add"]


BOMBS: dict[str, tuple[list[NodeProto], dict[str, Array]]] = {
    "range": (
        [node("Range", "a b c", "r")],
        {"a": np.array(0), "b": np.array(HUGE), "c": np.array(1)},
    ),
    "no step": (
        [node("Range", "a b c", "r")],
        {"a": np.array(0), "b": np.array(9), "c": np.array(0)},
    ),
    "computed range": (
        [
            node("Shape", "x", "s"),
            node("Mul", "s m", "sm"),
            node("ReduceProd", "sm", "p", keepdims=0),
            node("Range", "a p c", "r"),
        ],
        {"a": np.array(0), "m": np.array(10**7), "c": np.array(1)},
    ),
    "filled": ([node("ConstantOfShape", "d", "r")], {"d": _ints(HUGE)}),
    "one hot": (
        [node("OneHot", "a d v", "r")],
        {"a": _ints(1), "d": np.array(HUGE), "v": np.ones(2, np.float32)},
    ),
    "tile": ([node("Tile", "a d", "r")], {"a": _ints(1), "d": _ints(HUGE)}),
    "computed tile": (
        [node("Shape", "x", "s"), node("Mul", "d m", "dm"), node("Tile", "s dm", "r")],
        {"d": _ints(10**6), "m": _ints(10**5)},
    ),
    "pad": ([node("Pad", "a p", "r")], {"a": _ints(1), "p": _ints(0, HUGE)}),
    "expand": ([node("Expand", "a d", "r")], {"a": _ints(1), "d": _ints(HUGE)}),
}


@pytest.mark.parametrize("name", BOMBS)
def test_small_files_stay_small(name: str, tmp_path: Path) -> None:
    """A few bytes that stand for 10^11 elements are refused at once, not written out."""
    nodes, constants = BOMBS[name]
    path = save(model([*nodes, *_sum_of("r")], {"x": [1, 4]}, ["y"], constants), tmp_path)
    begin = time.process_time()
    with pytest.raises(
        UnsupportedModelError, match=r"too many elements|constant \w is int64|not supported"
    ):
        import_model(path)
    assert time.process_time() - begin < 5
