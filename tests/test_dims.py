"""``--dim``: open dimensions of a file, bound by name or place, mean what onnxruntime computes."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cli_run import Cli
from onnx_files import agrees, floats, model, node, save

from odt_plan.ir.errors import UnsupportedModelError, UsageError
from odt_plan.ir.graph import Graph
from odt_plan.ir.import_options import PLAIN, ImportOptions
from odt_plan.ir.onnx_import import import_model
from odt_plan.planner.assemble import source_of
from odt_plan.planner.plan import ModelInfo

LIMITS = ("--ram", "1MB", "--flash", "1MB")


def image_file(folder: Path) -> Path:
    """A network over images of any size, which follows their shape by nodes on shapes."""
    rng = np.random.default_rng(0)
    nodes = [
        node("Conv", "x w", "a", "conv", pads=[1, 1, 1, 1]),
        node("Shape", "a", "shape"),
        node("Gather", "shape zero", "n"),
        node("Gather", "shape one", "c"),
        node("Concat", "n c rest", "to", axis=0),
        node("Reshape", "a to", "b", "rows"),
        node("ReduceMean", "b", "p", "mean", axes=[2], keepdims=0),
        node("Gemm", "p v", "y", "fc"),
    ]
    constants = {
        "w": floats(rng, 4, 3, 3, 3),
        "v": floats(rng, 4, 2),
        "rest": np.array([-1]),
        "zero": np.array([0]),
        "one": np.array([1]),
    }
    return save(model(nodes, {"x": ["N", 3, "height", None]}, ["y"], constants), folder)


def bound(path: Path, dims: dict[str, int], batch: int = 1) -> Graph:
    return import_model(path, ImportOptions(batch=batch, dims=tuple(dims.items())))


@pytest.mark.parametrize(
    "dims", [{"height": 5, "x:3": 7}, {"x:2": 5, "x:3": 7}, {"x:3": 7, "height": 5, "N": 1}]
)
def test_bound_by_name_or_place(dims: dict[str, int], tmp_path: Path) -> None:
    """Before shapes are inferred: nodes that compute with them are folded."""
    graph = agrees(image_file(tmp_path), dims=tuple(dims.items()))
    assert graph.inputs[0].type.shape == (1, 3, 5, 7)
    assert [n.op for n in graph.nodes] == ["Conv", "Reshape", "ReduceMean", "Gemm"]


def test_the_batch_is_one_of_them(tmp_path: Path) -> None:
    path, size = image_file(tmp_path), {"height": 5, "x:3": 7}
    by_batch, by_name = (
        bound(path, size, batch=3),
        bound(path, {**size, "N": 3}),
    )
    assert repr(by_batch) == repr(by_name)
    assert repr(bound(path, {**size, "x:0": 3}, batch=3)) == repr(by_batch)
    two = model([node("Add", "x z", "y")], {"x": ["T", "N", 2], "z": ["T", "N", 2]}, ["y"])
    graph = bound(save(two, tmp_path), {"T": 5, "N": 2})  # for all of that name
    assert [v.type.shape for v in graph.inputs] == [(5, 2, 2)] * 2
    with pytest.raises(UnsupportedModelError, match=r"z \(input\): dimension 1 \(N\) is not known"):
        bound(save(two, tmp_path), {"x:1": 2})  # but here for one input alone


def test_the_message_tells_the_options(odt: Cli, tmp_path: Path) -> None:
    """All of them at once; with numbers, they are what was missing, and the plan keeps them."""
    path = image_file(tmp_path)
    done = odt(path, *LIMITS)
    assert done.code == 4
    assert done.error == (
        f"{path}: x (input): dimensions 2 (height), 3 (unnamed) are not known; bind with"
        " --dim height=N --dim x:3=N"
    )
    options = [o.replace("=N", "=6") for o in shlex.split(done.error.split("bind with ")[1])]
    assert odt(path, *LIMITS, *options, "-o", "out").code == 0
    assert odt("verify", "out/plan.json").code == 0
    assert odt("explain", "out/plan.json", "fc").code == 0
    again = odt(path, *LIMITS, *options, "--json").json
    assert again["model"]["dims"] == {"height": 6, "x:3": 6}
    np.savez("data.npz", x=floats(np.random.default_rng(0), 8, 3, 6, 6), y=np.arange(8) % 2)
    ran = odt("run", "out/plan.json", "--data", "data.npz", "--steps", "2", "--json")
    assert ran.code == 0, ran.err
    words = (*options, "--jobs", "1", "--json")
    (row,) = odt("fit", path, "--device", "rp2040", *words).json
    curve = odt("pareto", path, "--device", "rp2040", "--points", "2", *words).json
    assert row["learn"] == curve["points"][-1]["learn"] > 0
    assert odt("check", path, *options, "--json").json["layers"][0]["output"] == "f32[1,4,6,6]"


def test_check_tells_the_options_of_all_inputs(odt: Cli, tmp_path: Path) -> None:
    """Once each, as the way out; the plan's error doesn't say that the file must be another."""
    proto = model(
        [node("Add", "x z", "a", "sum"), node("Bernoulli", "a", "y", "noise")],
        {"x": ["N", "time", 4], "z": ["N", "time", None]},
        ["y"],
    )
    path = save(proto, tmp_path)
    way_out = "bind the open dimensions with --dim time=N --dim z:2=N, numbers in the place of N"
    checked = odt("check", path)
    assert f"way out: {way_out}" in checked.out
    assert "obstacle: x (input): dimension 1 (time) is not known; bind with --dim time=N" in (
        checked.out
    )
    record = odt("check", path, "--json").json
    assert record["advice"].startswith(way_out)
    assert [o["options"] for o in record["obstacles"]] == [
        ["--dim time=N"], ["--dim time=N", "--dim z:2=N"], [],
    ]  # fmt: skip
    done = odt(path, *LIMITS)
    assert done.code == 4
    first = done.err.splitlines()[0]
    assert way_out in first
    assert "exported without" not in first
    bound_ = odt("check", path, "--dim", "time=3", "--dim", "z:2=4")
    assert "obstacle: noise (Bernoulli)" in bound_.out
    assert "way out: no layer behind noise" in bound_.out


def test_a_name_that_a_shell_would_split(tmp_path: Path) -> None:
    path = save(model([node("Relu", "x", "y")], {"x": ["N", "sequence length"]}, ["y"]), tmp_path)
    with pytest.raises(UnsupportedModelError) as e:
        import_model(path)
    option = shlex.split(str(e.value).split("bind with --dim ")[1])
    assert option == ["sequence length=N"]
    assert bound(path, {"sequence length": 3}).inputs[0].type.shape == (1, 3)


@pytest.mark.parametrize(
    ("dims", "batch", "message"),
    [
        ({"width": 3}, 1, "--dim width=3: no input has a dimension width; open are N, height, x:3"),
        ({"x:4": 3}, 1, "no input has a dimension x:4; open are"),
        ({"x:1": 4}, 1, "--dim x:1=4: x:1 is 3 already; leave this out"),
        ({"height": 5, "x:2": 6}, 1, "--dim x:2=6: x:2 is 5 already"),
        ({"N": 2}, 4, "--dim N=2: x:0 is the batch, and --batch is 4; give one"),
    ],
)
def test_conflicts(dims: dict[str, int], batch: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        bound(image_file(tmp_path), dims, batch=batch)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--dim", "height"), "'height' is not NAME=N or INPUT:AXIS=N"),
        (("--dim", "height=0"), "'height=0' is not NAME=N"),
        (("--dim", "height=1e3"), "'height=1e3' is not NAME=N"),
        (("--dim", "height=3", "--dim", "height=4"), "height is given as 3 and as 4"),
        (("--dim", "height=3", "--dim", "x:3=3", "--dim", "N=2"), "use --batch 2"),
    ],
)
def test_bad_input_is_one_line(
    odt: Cli, words: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    done = odt(image_file(tmp_path), *LIMITS, *words)
    assert done.code in (2, 4)
    assert message in done.error


@pytest.mark.parametrize(
    "options",
    [
        ImportOptions(),
        ImportOptions(batch=4),
        ImportOptions(batch=4, fold_batchnorm=True, head=3),
        ImportOptions(fold_batchnorm=False, dims=(("height", 5), ("x:3", 6))),
    ],
)
def test_plans_keep_how_a_file_is_imported(options: ImportOptions, tmp_path: Path) -> None:
    info = source_of(image_file(tmp_path), options, {})
    kept = ModelInfo.model_validate_json(info.model_dump_json()).importing
    assert kept == replace(options, fold_batchnorm=options.folds)
    assert options.folds == (options.fold_batchnorm or options == PLAIN)
