"""Models of several inputs: NumPy against no plan, C against NumPy, the command line."""

from __future__ import annotations

import shutil
from pathlib import Path

import nets
import numpy as np
import plans
import pytest
from board import lane
from cli_run import Cli
from onnx import TensorProto, helper, numpy_helper
from onnx_files import floats, model, node, outputs, runtime, save
from oracle import Unconstrained, batch

from odt_plan.backends.c import emit_c
from odt_plan.backends.numpy import Runtime, train
from odt_plan.ir.calibrate import calibrate
from odt_plan.ir.errors import UnsupportedModelError, UsageError
from odt_plan.ir.interpreter import run
from odt_plan.ir.onnx_import import import_model
from odt_plan.ir.precision import all_i8, lower
from odt_plan.ir.sample import array_names
from odt_plan.ir.training import TrainingGraph, TrainingSpec
from odt_plan.planner.check import check
from odt_plan.planner.check_program import CheckError
from odt_plan.planner.device import load_device
from odt_plan.planner.plan import Plan, load_plan

LIMITS = ("--ram", "100KB", "--flash", "1MB")


def text(folder: Path) -> Path:
    """Ids and their mask, both int64; attention to what the mask leaves, which moves as bool."""
    rng = np.random.default_rng(0)
    nodes = [
        node("Gather", "table ids", "e"),
        node("MatMul", "e wk", "k"),
        node("Transpose", "k", "kt", perm=[0, 2, 1]),
        node("MatMul", "e kt", "s"),
        node("Cast", "mask", "flags", to=TensorProto.BOOL),
        node("Unsqueeze", "flags one", "column"),
        node("Where", "column s low", "masked"),
        node("Softmax", "masked", "a", axis=-1),
        node("Unsqueeze", "mask axis", "wide"),
        node("Cast", "wide", "weights", to=TensorProto.FLOAT),
        node("MatMul", "a e", "m"),
        node("Mul", "m weights", "n"),
        node("ReduceMean", "n", "r", axes=[1], keepdims=0),
        node("Gemm", "r w v", "scores", transB=1),
    ]
    constants = {
        "table": floats(rng, 20, 8),
        "wk": floats(rng, 8, 8),
        "w": floats(rng, 3, 8),
        "v": floats(rng, 3),
        "one": np.array([1]),
        "axis": np.array([2]),
        "low": np.array(-1e4, np.float32),
    }
    graph = helper.make_graph(
        nodes,
        "text",
        [helper.make_tensor_value_info(n, TensorProto.INT64, ["n", 5]) for n in ("ids", "mask")],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(a, k) for k, a in constants.items()],
    )
    opset = [helper.make_opsetid("", 17)]
    return save(helper.make_model(graph, opset_imports=opset, ir_version=8), folder)


IDS = np.array([[3, 19, 0, 7, 7]])
MASK = np.array([[1, 1, 1, 0, 0]])


def test_ids_and_mask(tmp_path: Path) -> None:
    """The values of ONNX Runtime; what the mask hides changes nothing."""
    path = text(tmp_path)
    graph = import_model(path)
    assert [str(v.type) for v in graph.inputs] == ["i32[1,5]", "f32[1,5]"]
    feeds = {"ids": IDS.astype("i4"), "mask": MASK.astype("f4")}
    (got,) = outputs(graph, feeds)
    (want,) = runtime(path, {"ids": IDS, "mask": MASK})
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    hidden = IDS.copy()
    hidden[0, 3:] = 1
    assert np.array_equal(outputs(graph, feeds | {"ids": hidden.astype("i4")})[0], got)


def squeezed(ratio: float, storage: str | None) -> tuple[Plan, TrainingGraph]:
    forward = nets.two_branches()
    t = plans.training_of(forward)
    return plans.within(forward, t, ratio, storage), t


@pytest.mark.parametrize(
    ("ratio", "storage", "paged"),
    [
        (1.0, None, set()),
        (0.8, None, set()),
        (0.75, "sdcard", {"Facts"}),
        (0.6, "sdcard", {"picture", "Facts"}),
        (0.75, "sdram", {"picture"}),
        (0.65, "sdram", {"picture", "Facts"}),
    ],
)
def test_a_plan_trains_as_none_does(ratio: float, storage: str | None, paged: set[str]) -> None:
    """Each sample stays, or comes back from storage with its own views alone."""
    plan, t = squeezed(ratio, storage)
    check(plan, t, load_device(plans.BOARD))
    moved = {a.value for a in plan.decisions.activations if a.action == "page"}
    assert moved & {"picture", "Facts"} == paged
    assert sum(s.nodes == ("row",) for s in plan.steps) == 1 + ("Facts" in paged)
    learner, oracle = Runtime(plan, t), Unconstrained(t)
    rng = np.random.default_rng(3)
    for _ in range(3):
        x, y = batch(t, rng)
        assert set(x) == {"picture", "Facts"}
        assert learner.train_step(x, y, 0.1) == oracle.step(x, y, 0.1)
    assert learner.state_bytes() == oracle.state_bytes(plan)


def test_gradients_of_both_branches_are_central_differences() -> None:
    t = plans.training_of(nets.two_branches())
    rng = np.random.default_rng(1)
    x, y = batch(t, rng)
    feeds = {k: a.astype("f8") for k, a in (x | t.graph.constants).items()}
    feeds |= {t.target.name: y, t.hyper.name: np.array([0.1, 1.0, 1.0])}
    env = run(t.graph, feeds)
    for name, at in (("conv0.weight", (1, 1, 2, 0)), ("right.weight", (2, 7)), ("left.bias", (3,))):
        update = next(u for u in t.updates if u.value.name == name)
        ends = []
        for step in (-1e-6, 1e-6):
            moved = feeds[name].copy()
            moved[at] += step
            ends.append(run(t.graph, feeds | {name: moved})[t.loss.name])
        assert env[update.grad.name][at] == pytest.approx(
            (ends[1] - ends[0]) / 2e-6, rel=1e-5, abs=1e-9
        )


def test_the_checker_wants_every_sample() -> None:
    plan, t = squeezed(1.0, None)
    left = tuple(b for b in plan.buffers if b.value != "Facts")
    with pytest.raises(CheckError, match="the sample Facts has 0 buffers for the caller, must ha"):
        check(plan.model_copy(update={"buffers": left}), t, load_device(plans.BOARD))


MAIN = """
#include "board.h"
#include "names.h"
#include "pages.h"

static FN(_t) net;
static float facts[SIZE(_SAMPLE_SIZE_FACTS)], y[SIZE(_PREDICTION_SIZE)], z[SIZE(_PREDICTION_SIZE)];
static float picture[SIZE(_SAMPLE_SIZE_PICTURE)];

int main(void) {
    const int32_t label = 1;
    int i;
    float *there;
    pages = board_open("page.bin", BOARD_CREATE);
    net.page_write = page_write;
    net.page_read = page_read;
    board_value("init", (uint32_t)FN(_init)(&net));
    board_value("selftest", (uint32_t)FN(_selftest)(&net));
    board_value("exact", (uint32_t)net.selftest_exact);
    board_value("missing", (uint32_t)FN(_infer)(&net, picture, NULL, y));
    for (i = 0; i < SIZE(_SAMPLE_SIZE_FACTS); i++) {
        facts[i] = (float)i;
    }
    board_value("copied", (uint32_t)FN(_infer)(&net, picture, facts, y));
    there = SIZE(_SAMPLE_FACTS)(&net);
    for (i = 0; i < SIZE(_SAMPLE_SIZE_FACTS); i++) {
        there[i] = (float)i;
    }
    board_value("in_place", (uint32_t)FN(_infer)(&net, picture, there, z));
    for (i = 0; i < SIZE(_PREDICTION_SIZE) && y[i] == z[i]; i++) {
    }
    board_value("same", (uint32_t)(i == SIZE(_PREDICTION_SIZE)));
    board_value("train", (uint32_t)FN(_train_step)(&net, picture, facts, &label, 0.1f, NULL));
    return 0;
}
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
@pytest.mark.parametrize(("ratio", "storage"), [(0.8, None), (0.6, "sdcard")])
def test_c_takes_a_parameter_per_input(tmp_path: Path, ratio: float, storage: str | None) -> None:
    plan, t = squeezed(ratio, storage)
    (header, *_) = emit_c(plan, t, tmp_path / "c")
    text = header.read_text()
    assert (
        "_infer(branches_t *net, const float *x_picture, const float *x_facts, float *y);" in text
    )
    main = tmp_path / "program.c"
    main.write_text(MAIN)
    program = lane.build_host(tmp_path / "c", "branches", main=main)
    result = lane.run_host(program, {})
    assert result.exit_code == 0, result.stdout
    wanted = {"init": 0, "selftest": 0, "exact": 1, "missing": 1, "copied": 0, "in_place": 0}
    for key, value in (wanted | {"same": 1, "train": 0}).items():
        assert result.value(key) == value, key


def test_scales_of_every_input() -> None:
    """Calibrated, in i8 from the samples on; floats are quantized for each."""
    forward = nets.two_branches()
    rng = np.random.default_rng(2)
    samples = {"picture": floats(rng, 8, 2, 6, 6), "Facts": 9 * floats(rng, 8, 12, 8)}
    calibrate(forward, samples)
    scales = [forward.quantization[n].scale[0] for n in ("picture", "Facts")]
    assert scales[1] > 4 * scales[0]
    precision = all_i8(forward, inputs=True)
    low = lower(forward, {n: p for n, p in precision.items() if n != "fc"})
    assert [v.type.dtype for v in low.inputs] == ["i8", "i8"]
    chosen = [c for c in plans.whole(low) if c.param.startswith("fc")]
    t = plans.training_of(low, TrainingSpec(), chosen)
    learner = Runtime(plans.keep_all(t), t)
    one = {n: a[:1] for n, a in samples.items()}
    got, want = learner.infer(one), run(forward, one)[forward.outputs[0].name]
    np.testing.assert_allclose(got, want, atol=0.1 * np.abs(want).max())
    with pytest.raises(UsageError, match=r"calibration samples differ in number: \[7, 8\]"):
        calibrate(nets.two_branches(), samples | {"Facts": samples["Facts"][:7]})


@pytest.mark.parametrize(
    ("x", "told"),
    [
        (np.zeros((4, 2, 6, 6)), "samples are given for x, but the inputs are picture, Facts"),
        ({"picture": np.zeros((4, 2, 6, 6))}, "are given for picture, but the inputs are"),
        (
            {"picture": np.zeros((4, 2, 6, 6)), "Facts": np.zeros((3, 12, 8))},
            "Facts has 3 samples, but picture has 4",
        ),
        (
            {"picture": np.zeros((4, 2, 6, 6)), "Facts": np.zeros((4, 12))},
            r"Facts is float64\[4, 12\], must be numbers \[count, 12, 8\]",
        ),
        (
            {"picture": np.zeros((4, 2, 6, 6)), "Facts": np.full((4, 12, 8), np.nan)},
            "Facts: sample 0 has a NaN or infinite value",
        ),
    ],
)
def test_samples_that_do_not_fit(x: object, told: str) -> None:
    t = plans.training_of(nets.two_branches())
    with pytest.raises(UsageError, match=told):
        train(Runtime(plans.keep_all(t), t), x, np.zeros(4, int), steps=1, lr=0.1)  # type: ignore[arg-type]


def test_from_the_command_line(tmp_path: Path, odt: Cli) -> None:
    """Plan, C, replay of the plan, training with held-out samples; arrays by name."""
    path, out, data = text(tmp_path), tmp_path / "out", tmp_path / "d.npz"
    done = odt(path, *LIMITS, "--emit", "c", "-o", out, "--train", "all")
    assert done.code == 0, done.err
    assert "i32[1,5], f32[1,5] -> f32[1,3]" in done.out
    header = (out / "model.h").read_text()
    assert "const int32_t *x_ids, const float *x_mask, const int32_t *labels" in header
    assert "#define MODEL_ENTRIES_IDS 20" in header
    assert odt("check", path).code == odt("verify", out / "plan.json").code == 0
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(0, 20, (60, 5)), rng.integers(0, 2, (60, 5))
    mask[:, 0] = 1
    arrays = {"ids": ids, "mask": mask, "y": ids[:, 0] % 3}
    np.savez(data, **arrays, **{f"{k}_val": a for k, a in arrays.items()})
    run_it = ("run", out / "plan.json", "--data", data, "--lr", "0.1", "--steps", "400")
    told = odt(*run_it, "--json").json
    assert told["accuracy_after"] > told["accuracy_before"] + 0.2
    np.savez(data, ids=ids, y=arrays["y"])
    want = "has no array mask, only ids, y; save with np.savez(path, ids=..., mask=..., y=...)"
    assert odt(*run_it).error.endswith(want)
    np.savez(data, **arrays | {"ids": ids + 15})
    assert "ids: sample" in odt(*run_it).error
    assert array_names(import_model(path).inputs) == ("ids", "mask")


@pytest.mark.parametrize(("inside", "kind"), [("Cast", "f32"), ("Identity", None)])
def test_masks_inside_subgraphs(tmp_path: Path, inside: str, kind: str | None) -> None:
    """A branch that casts the mask reads it as a number; one that hands it on may not."""
    to = {"to": TensorProto.FLOAT} if inside == "Cast" else {}
    result = TensorProto.FLOAT if to else TensorProto.INT64
    branch = helper.make_graph(
        [node(inside, "mask", "m", **to)],
        "branch",
        [],
        [helper.make_tensor_value_info("m", result, None)],
    )
    nodes = [
        node("If", "yes", "chosen", then_branch=branch, else_branch=branch),
        node("Cast", "chosen", "weights", to=TensorProto.FLOAT),
        node("Mul", "x weights", "y"),
    ]
    proto = model(nodes, {"x": [1, 4], "mask": [1, 4]}, ["y"], {"yes": np.array(True)})
    proto.graph.input[1].type.tensor_type.elem_type = TensorProto.INT64
    path = save(proto, tmp_path)
    if kind is None:
        with pytest.raises(UnsupportedModelError, match="is int64; only float32 inputs"):
            import_model(path)
        return
    graph = import_model(path)
    assert graph.inputs[1].type.dtype == kind
    x, mask = floats(np.random.default_rng(0), 1, 4), np.array([[1, 0, 1, 1]])
    (want,) = runtime(path, {"x": x, "mask": mask})
    (got,) = outputs(graph, {"x": x, "mask": mask.astype(np.float32)})
    np.testing.assert_array_equal(got, want)


def test_one_branch_without_a_gradient(tmp_path: Path, odt: Cli) -> None:
    """What is advised freezes the layers of one input, and those of the other are trained."""
    rng = np.random.default_rng(0)
    nodes = [
        node("MatMul", "a wa", "h"),
        node("Round", "h", "r"),
        node("MatMul", "b wb", "k"),
        node("Add", "r k", "s"),
        node("MatMul", "s fc", "y"),
    ]
    data = {"wa": floats(rng, 4, 4), "wb": floats(rng, 3, 4), "fc": floats(rng, 4, 2)}
    path = save(model(nodes, {"a": ["n", 4], "b": ["n", 3]}, ["y"], data), tmp_path)
    told = odt(path, *LIMITS)
    assert told.code == 4
    assert "(--freeze-before Round_r): 55.6 % of the weights (2 of 3 layers)" in told.error
    done = odt(path, *LIMITS, "--freeze-before", "Round_r", "-o", "out", "-q")
    assert done.code == 0, done.err
    updates = load_plan(Path("out") / "plan.json").decisions.updates
    assert {u.param for u in updates if u.ratio} == {"wb", "fc"}
    assert odt("verify", Path("out") / "plan.json").code == 0
