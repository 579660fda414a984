"""Inputs of bool: masks as 0 and 1, against ONNX Runtime, and through a whole training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_run import Cli
from onnx import TensorProto, helper
from onnx_files import floats, model, node, outputs, runtime, save

from odt_plan.ir.onnx_import import import_model

RNG = np.random.default_rng(0)
BODY = helper.make_graph(
    [node("Not", "mask", "inner"), node("Cast", "inner", "chosen", to=TensorProto.FLOAT)],
    "body",
    [],
    [helper.make_tensor_value_info("chosen", TensorProto.FLOAT, None)],
)
OTHER = helper.make_graph(
    [node("Greater", "x zero", "own"), node("Cast", "own", "chosen", to=TensorProto.FLOAT)],
    "other",
    [],
    [helper.make_tensor_value_info("chosen", TensorProto.FLOAT, None)],
)
USES: dict[str, list[Any]] = {
    "where": [node("Where", "mask x zero", "h")],
    "not": [node("Not", "mask", "n"), node("Where", "n x zero", "h")],
    "cast": [node("Cast", "mask", "f", to=TensorProto.FLOAT), node("Mul", "x f", "h")],
    "and": [
        node("Greater", "x zero", "g"),
        node("And", "mask g", "a"),
        node("Cast", "a", "f", to=TensorProto.FLOAT),
        node("Add", "x f", "h"),
    ],
    "subgraphs": [
        node("If", "yes", "f", then_branch=BODY, else_branch=OTHER),
        node("If", "no", "g", then_branch=BODY, else_branch=OTHER),
        node("Mul", "x f", "m"),
        node("Add", "m g", "h"),
    ],
}


def masked(folder: Path, use: str) -> Path:
    """Four numbers and a mask of them, then a layer."""
    constants = {
        "zero": np.zeros((), np.float32),
        "w": floats(RNG, 3, 4),
        "yes": np.array(True),
        "no": np.array(False),
    }
    nodes = [*USES[use], node("Gemm", "h w", "y", transB=1)]
    proto = model(nodes, {"x": ["n", 4], "mask": ["n", 4]}, ["y"], constants)
    proto.graph.input[1].type.tensor_type.elem_type = TensorProto.BOOL
    return save(proto, folder)


@pytest.mark.parametrize("use", USES)
def test_a_mask_is_numbers(use: str, tmp_path: Path) -> None:
    path = masked(tmp_path, use)
    graph = import_model(path)
    assert {v.name: str(v.type) for v in graph.inputs} == {"x": "f32[1,4]", "mask": "f32[1,4]"}
    for mask in ([True, False, False, True], [False] * 4, [True] * 4):
        x, m = floats(RNG, 1, 4), np.array([mask])
        (got,) = outputs(graph, {"x": x, "mask": m.astype(np.float32)})
        (want,) = runtime(path, {"x": x, "mask": m})
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_a_mask_in_training(tmp_path: Path, odt: Cli) -> None:
    """Data hold it as bool or as numbers; the learned weights are the same, and go back."""
    path = masked(tmp_path, "where")
    limits = ("--ram", "64KB", "--flash", "1MB", "--train", "all")
    done = odt(path, *limits, "--emit", "c", "-o", "out")
    assert done.code == 0, done.err
    assert "const float *x_mask" in (Path("out") / "model.h").read_text()
    x, mask = floats(RNG, 30, 4), RNG.integers(0, 2, (30, 4)).astype(bool)
    y = np.arange(30) % 3
    learned = []
    for name, m in (("flags", mask), ("numbers", mask.astype(np.uint8))):
        np.savez("d.npz", x=x, mask=m, y=y)
        words = ("--data", "d.npz", "--lr", "0.1", "--save", f"{name}.npz", "-q")
        assert odt("run", Path("out") / "plan.json", *words).code == 0
        learned.append(np.load(f"{name}.npz")["w"])
    assert np.array_equal(*learned)
    done = odt("export", Path("out") / "plan.json", "flags.npz", "-o", "tuned.onnx")
    assert done.code == 0, done.err
    given = {"x": x[:1], "mask": mask[:1]}
    assert not np.array_equal(runtime(path, given)[0], runtime(Path("tuned.onnx"), given)[0])


def test_bool_is_no_number(tmp_path: Path, odt: Cli) -> None:
    """Only a mask is flags; for an input that is computed with they are a mistake."""
    path = masked(tmp_path, "where")
    assert odt(path, "--ram", "64KB", "--flash", "1MB", "--train", "all", "-o", "out").code == 0
    mask = np.ones((8, 4), bool)
    np.savez("d.npz", x=mask, mask=mask, y=np.arange(8) % 3)
    done = odt("run", Path("out") / "plan.json", "--data", "d.npz")
    assert done.code == 2
    assert "x is bool[8, 4], must be numbers" in done.error
