"""Models of several outputs: a loss for each against autograd, plans, C, the command line."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import nets
import numpy as np
import onnx
import plans
import pytest
from board import lane
from cli_run import Cli
from onnx_files import floats, model, node, runtime, save
from oracle import Unconstrained, batch

from odt_plan.backends.c import emit_c
from odt_plan.backends.numpy import Runtime, train
from odt_plan.backends.numpy.gradients import measure_gradients
from odt_plan.backends.numpy.sampling import Sampler
from odt_plan.ir.candidates import param_slots
from odt_plan.ir.errors import UnsupportedModelError, UsageError
from odt_plan.ir.graph import Graph
from odt_plan.ir.import_options import ImportOptions
from odt_plan.ir.interpreter import run
from odt_plan.ir.onnx_import import import_model
from odt_plan.ir.targets import target_names
from odt_plan.ir.training import TrainingGraph, TrainingSpec
from odt_plan.planner.check import check
from odt_plan.planner.device import load_device
from odt_plan.planner.pipeline import Request, make_plan
from odt_plan.planner.plan import Plan, load_plan
from odt_plan.planner.replay import Wanted
from odt_plan.planning import default_losses

torch = pytest.importorskip("torch")
F = torch.nn.functional

LIMITS = ("--ram", "100KB", "--flash", "1MB")
SUM = TrainingSpec(losses={"box": "huber"}, loss_weights={"box": 0.25}, delta=0.5)


def detector(folder: Path, last: str = "Identity", batch: int | str = "n") -> Path:
    """A trunk, class scores, and a box that is computed from trunk and scores."""
    rng = np.random.default_rng(0)
    nodes = [
        node("Conv", "x w0 b0", "c", pads=[1, 1, 1, 1]),
        node("Relu", "c", "r"),
        node("Flatten", "r", "f"),
        node("Gemm", "f w1 b1", "logits", transB=1),
        node(last, "logits", "scores"),
        node("Concat", "f scores", "both", axis=1),
        node("Gemm", "both w2 b2", "box", transB=1),
    ]
    constants = {
        "w0": floats(rng, 4, 2, 3, 3),
        "b0": floats(rng, 4),
        "w1": floats(rng, 3, 100) / 10,
        "b1": floats(rng, 3),
        "w2": floats(rng, 4, 103) / 10,
        "b2": floats(rng, 4),
    }
    return save(model(nodes, {"x": [batch, 2, 5, 5]}, ["scores", "box"], constants), folder)


def torch_heads(last: str, p: dict[str, Any], x: Any) -> tuple[Any, Any, Any]:
    """The same network in PyTorch: logits, scores and box."""
    f = F.conv2d(x, p["w0"], p["b0"], padding=1).relu().flatten(1)
    logits = F.linear(f, p["w1"], p["b1"])
    ends = {"Identity": lambda v: v, "Softmax": lambda v: v.softmax(-1), "Sigmoid": torch.sigmoid}
    scores = ends[last](logits)
    return logits, scores, F.linear(torch.cat([f, scores], 1), p["w2"], p["b2"])


def torch_loss(last: str, p: dict[str, Any], x: Any, y: dict[str, Any], spec: TrainingSpec) -> Any:
    """The weighted sum of its losses."""
    logits, scores, box = torch_heads(last, p, x)
    terms = {
        "cross_entropy": lambda v, t: F.cross_entropy(v, t.long()),
        "mse": F.mse_loss,
        "huber": lambda v, t: F.huber_loss(v, t, delta=spec.delta),
        "bce": F.binary_cross_entropy_with_logits,
    }
    total = 0.0
    for name, value in (("scores", logits), ("box", box)):
        loss = spec.loss_of(name)
        read = scores if name == "scores" and loss in ("mse", "huber") else value
        total = total + spec.loss_weights.get(name, 1.0) * terms[loss](read, y[f"y_{name}"])
    return total


def wide(t: TrainingGraph, x: Any, y: dict[str, Any]) -> dict[str, Any]:
    """What a training graph computes in double precision."""
    feeds = {k: a.astype("f8") for k, a in t.graph.constants.items() if a.dtype == np.float32}
    names = zip(target_names(t), t.targets, strict=True)
    feeds |= {v.name: y[n] if y[n].dtype == np.int32 else y[n].astype("f8") for n, v in names}
    feeds |= {t.sample.name: x.astype("f8"), t.hyper.name: np.array([0.1, 1.0, 1.0])}
    return run(t.graph, feeds)


@pytest.mark.parametrize(
    ("last", "spec"),
    [
        ("Identity", SUM),
        ("Identity", TrainingSpec(losses={"scores": "mse"})),
        ("Softmax", SUM),  # its result is fused with the loss, and read by the other head as well
        ("Softmax", TrainingSpec(loss="mse", loss_weights={"scores": 3.0})),
        ("Sigmoid", TrainingSpec(loss="mse", losses={"scores": "bce"}, loss_weights={"box": 2.0})),
    ],
)
def test_gradients_of_the_sum_are_those_of_autograd(
    tmp_path: Path, last: str, spec: TrainingSpec
) -> None:
    t = plans.training_of(import_model(detector(tmp_path, last), ImportOptions(batch=3)), spec)
    assert [v.name for v in t.predictions] == ["scores", "box"]
    x, y = batch(t, np.random.default_rng(1))
    env = wide(t, x, y)
    p = {
        u.candidate.param: torch.tensor(t.graph.constants[u.candidate.param]).double()
        for u in t.updates
    }
    assert set(p) == {"w0", "b0", "w1", "b1", "w2", "b2"}
    for tensor in p.values():
        tensor.requires_grad_()
    given = {k: torch.tensor(a) for k, a in y.items()}
    given = {k: a.double() if a.is_floating_point() else a for k, a in given.items()}
    loss = torch_loss(last, p, torch.tensor(x).double(), given, spec)
    loss.backward()
    assert env[t.loss.name] == pytest.approx(loss.item(), rel=1e-6)
    for u in t.updates:
        want = p[u.candidate.param].grad.numpy()
        np.testing.assert_allclose(
            env[u.grad.name], want, rtol=1e-5, atol=1e-6 * np.abs(want).max(), err_msg=u.value.name
        )


def test_importance_is_that_of_the_weighted_sum(tmp_path: Path) -> None:
    """Products of the gradients of two samples each, against autograd."""
    graph, rng = import_model(detector(tmp_path)), np.random.default_rng(2)
    x, params = floats(rng, 5, 2, 5, 5), list(param_slots(graph))
    y = {"y_scores": np.arange(5) % 3, "y_box": floats(rng, 5, 4)}
    found = measure_gradients(graph, SUM, params, x, y).gains("gradient")
    grads: dict[str, list[Any]] = {p: [] for p in params}
    for i in range(5):
        p = {n: torch.tensor(graph.constants[n]).double().requires_grad_() for n in params}
        given = {n: torch.tensor(a[i : i + 1]) for n, a in y.items()}
        given["y_box"] = given["y_box"].double()
        torch_loss("Identity", p, torch.tensor(x[i : i + 1]).double(), given, SUM).backward()
        for n, leaf in p.items():
            grads[n].append(leaf.grad.numpy().ravel())
    for n, each in grads.items():
        g = np.stack(each)
        pairs = (g @ g.T)[~np.eye(5, dtype=bool)]
        assert found[n][-1][1] == pytest.approx(max(0.0, pairs.mean()), rel=1e-3), n


def test_three_outputs(tmp_path: Path) -> None:
    """The sum has a name for each step of it; gradients are those of autograd."""
    rng = np.random.default_rng(5)
    nodes = [node("Gemm", f"x w{i}", f"y{i}", transB=1) for i in range(3)]
    constants = {f"w{i}": floats(rng, 2 + i, 4) for i in range(3)}
    path = save(model(nodes, {"x": [3, 4]}, ["y0", "y1", "y2"], constants), tmp_path)
    spec = TrainingSpec(loss="mse", loss_weights={"y1": 0.5})
    t = plans.training_of(import_model(path, ImportOptions(batch=3)), spec)
    x, y = batch(t, np.random.default_rng(1))
    env, total = wide(t, x, y), 0.0
    for i, weight in enumerate((1.0, 0.5, 1.0)):
        w = torch.tensor(constants[f"w{i}"]).double().requires_grad_()
        result = torch.tensor(x).double() @ w.T
        loss = weight * F.mse_loss(result, torch.tensor(y[f"y_y{i}"]).double())
        loss.backward()
        total += loss.item()
        u = next(u for u in t.updates if u.candidate.param == f"w{i}")
        np.testing.assert_allclose(env[u.grad.name], w.grad.numpy(), rtol=1e-5, atol=1e-7)
    assert env[t.loss.name] == pytest.approx(total, rel=1e-6)


def two_heads(size: int = 6) -> Graph:
    """A deep trunk whose first result is the first output."""
    rng = np.random.default_rng(4)
    g = nets.cnn(layers=4, size=size, seed=4)
    middle = next(n.out for n in g.nodes if n.op == "Relu")
    side = nets.dense(g, rng, nets.flat(g, middle), "side", 5)
    g.outputs = [side, *g.outputs]
    g.verify()
    return g


def squeezed(ratio: float, storage: str | None, micro: int = 1) -> tuple[Plan, TrainingGraph]:
    forward = two_heads()
    first = forward.outputs[0].name
    spec = TrainingSpec(micro_batches=micro, losses={first: "mse"}, loss_weights={first: 0.5})
    t = plans.training_of(forward, spec)
    return plans.within(forward, t, ratio, storage), t


@pytest.mark.parametrize(
    ("ratio", "storage", "micro"),
    [(1.0, None, 1), (0.8, None, 1), (0.8, None, 3), (0.7, "sdcard", 1), (0.7, "sdram", 1)],
)
def test_a_plan_trains_as_none_does(ratio: float, storage: str | None, micro: int) -> None:
    """Bit for bit; an inference gives both predictions, whose bytes may be used again."""
    plan, t = squeezed(ratio, storage, micro)
    check(plan, t, load_device(plans.BOARD))
    learner, oracle = Runtime(plan, t), Unconstrained(t)
    rng = np.random.default_rng(3)
    for _ in range(2 * micro):
        x, y = batch(t, rng)
        assert set(y) == {f"y_{v.name}" for v in t.predictions}
        assert learner.train_step(x, y, 0.1) == oracle.step(x, y, 0.1)
    assert learner.state_bytes() == oracle.state_bytes(plan)
    found = Runtime(plan, t).predict(x)
    forward = two_heads()
    want = run(forward, {forward.inputs[0].name: x})
    assert {n: a.tobytes() for n, a in found.items()} == {
        v.name: want[v.name].tobytes() for v in forward.outputs
    }
    with pytest.raises(UsageError, match=r"several outputs, .*; predict\(\) gives them all"):
        learner.infer(x)


MAIN = """
#include "board.h"
#include "names.h"
#include "pages.h"

static FN(_t) net;
static float x[SIZE(_SAMPLE_SIZE)], side[SIZE(_PREDICTION_SIZE_SIDE)];
static float fc[SIZE(_PREDICTION_SIZE_FC)];
static float one[SIZE(_PREDICTION_SIZE_SIDE)], want[SIZE(_TARGET_SIZE_SIDE)];

int main(void) {
    int32_t label = 1;
    float loss = 0.0f;
    int i;
    pages = board_open("page.bin", BOARD_CREATE);
    net.page_write = page_write;
    net.page_read = page_read;
    board_value("init", (uint32_t)FN(_init)(&net));
    board_value("selftest", (uint32_t)FN(_selftest)(&net));
    board_value("exact", (uint32_t)net.selftest_exact);
    for (i = 0; i < SIZE(_SAMPLE_SIZE); i++) {
        x[i] = (float)(i % 5) - 2.0f;
    }
    board_value("both", (uint32_t)FN(_infer)(&net, x, side, fc));
    board_value("first", (uint32_t)FN(_infer)(&net, x, one, NULL));
    for (i = 0; i < SIZE(_PREDICTION_SIZE_SIDE) && one[i] == side[i]; i++) {
    }
    board_value("same", (uint32_t)(i == SIZE(_PREDICTION_SIZE_SIDE)));
    board_value("no_target", (uint32_t)FN(_train_step)(&net, x, NULL, &label, 0.1f, &loss));
    board_value("train", (uint32_t)FN(_train_step)(&net, x, want, &label, 0.1f, &loss));
    board_value("learned", (uint32_t)(loss > 0.0f));
    label = SIZE(_CLASSES_FC);
    board_value("label", (uint32_t)FN(_train_step)(&net, x, want, &label, 0.1f, &loss));
    return 0;
}
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
@pytest.mark.parametrize(
    ("ratio", "storage", "micro"), [(0.8, None, 1), (0.7, "sdcard", 1), (0.8, None, 2)]
)
def test_c_gives_each_prediction_and_takes_each_target(
    tmp_path: Path, ratio: float, storage: str | None, micro: int
) -> None:
    """The self-test compares both predictions, the loss and the state with NumPy's, bit for bit."""
    plan, t = squeezed(ratio, storage, micro)
    (header, *_) = emit_c(plan, t, tmp_path / "c")
    text = header.read_text()
    assert "_infer(cnn_t *net, const float *x, float *y_side, float *y_fc);" in text
    assert "const float *target_side, const int32_t *labels_fc, float lr, float *loss);" in text
    main = tmp_path / "program.c"
    main.write_text(MAIN)
    program = lane.build_host(tmp_path / "c", "cnn", main=main)
    result = lane.run_host(program, {})
    assert result.exit_code == 0, result.stdout
    wanted = {"init": 0, "selftest": 0, "exact": 1, "both": 0, "first": 0, "same": 1}
    wanted |= {"no_target": 1, "train": 0, "learned": 1, "label": 3}
    for key, value in wanted.items():
        assert result.value(key) == value, key


REPLAYING = """
#include <string.h>

#include "board.h"
#include "names.h"

static FN(_t) net;
static float x[SIZE(_SAMPLE_SIZE)], scores[SIZE(_PREDICTION_SIZE_SCORES)];
static float box[SIZE(_TARGET_SIZE_BOX)];

int main(void) {
    const int32_t label = 2;
    float plain = 0.0f, cached = 1.0f;
    (void)FN(_init)(&net);
    board_value("selftest", (uint32_t)FN(_selftest)(&net));
    board_value("exact", (uint32_t)net.selftest_exact);
    x[7] = 1.0f;
    board_value("capture", (uint32_t)FN(_capture)(&net, x, 0));
    (void)FN(_train_step)(&net, x, &label, box, 0.0f, &plain);
    (void)FN(_train_cached)(&net, 0, &label, box, 0.0f, &cached);
    board_value("same", (uint32_t)(plain == cached));
    board_value("infer", (uint32_t)FN(_infer)(&net, x, scores, NULL));
    return 0;
}
"""


def test_a_front_that_is_replayed(tmp_path: Path) -> None:
    """Both heads behind a frozen trunk train from the cache as they do without."""
    path = detector(tmp_path)
    spec = TrainingSpec(losses={"box": "mse"})
    request = Request(
        path,
        load_device("generic-cortex-m7"),
        ram_bytes=1 << 20,
        flash_bytes=1 << 20,
        spec=spec,
        train=("w1", "w2", "b2"),
        replay=Wanted(4, 5),
    )
    planned = make_plan(request)
    plan, t = planned.plan, planned.training
    assert plan.replay is not None, planned.no_replay
    rng = np.random.default_rng(0)
    x = floats(rng, 4, 2, 5, 5)
    y = {"y_scores": np.array([0, 1, 2, 1]), "y_box": floats(rng, 4, 4)}
    learner = Runtime(plan, t)
    history = train(learner, x, y, steps=12, lr=0.001)
    assert history.replayed == 8
    slow = Runtime(plan.model_copy(update={"replay": None}), t)
    train(slow, x, y, steps=12, lr=0.001)
    assert slow.state_bytes() == learner.state_bytes()
    assert slow.updates == 12
    if shutil.which("gcc") is not None:
        emit_c(plan, t, tmp_path / "c")
        main = tmp_path / "program.c"
        main.write_text(REPLAYING)
        result = lane.run_host(lane.build_host(tmp_path / "c", "model", main=main), {})
        for key, value in {"selftest": 0, "exact": 1, "capture": 0, "same": 1, "infer": 0}.items():
            assert result.value(key) == value, key


def test_from_the_command_line(tmp_path: Path, odt: Cli) -> None:
    """Plan, replay of the plan, training with held-out samples, export; arrays by output."""
    path, out, data = detector(tmp_path), tmp_path / "out", tmp_path / "d.npz"
    loss = ("--loss", "box=huber", "--delta", "0.5", "--loss-weight", "box=0.25")
    done = odt(path, *LIMITS, *loss, "--emit", "c,svg,dot", "-o", out, "--train", "all")
    assert done.code == 0, done.err
    assert "f32[1,2,5,5] -> f32[1,3], f32[1,4]" in done.out
    assert "cross-entropy of scores + 0.25 x huber of box, sgd" in done.out
    plan = load_plan(out / "plan.json")
    assert (plan.training.loss, plan.training.losses) == ("cross_entropy", {"box": "huber"})
    for words in (
        ("check", path),
        ("verify", out / "plan.json"),
        ("explain", out / "plan.json", "Gemm_box"),
    ):
        told = odt(*words)
        assert told.code == 0, told.err
    rng = np.random.default_rng(0)
    x = floats(rng, 60, 2, 5, 5)
    classes = (x[:, 0, 0, 0] > 0).astype(int)
    arrays = {"x": x, "y_scores": classes, "y_box": x[:, 0, 0, :4]}
    np.savez(data, **arrays, **{f"{k}_val": a for k, a in arrays.items()})
    run_it = ("run", out / "plan.json", "--data", data, "--lr", "0.02", "--steps", "300")
    learned = tmp_path / "learned.npz"
    told = odt(*run_it, "--json", "--save", learned)
    assert told.code == 0, told.err
    before, after = (told.json[f"accuracy_{when}"] for when in ("before", "after"))
    assert set(before) == {"scores"}
    assert after["scores"] > before["scores"] + 0.2
    assert "accuracy of y_scores" not in odt(*run_it).out
    assert "accuracy of scores on x_val" in odt(*run_it).out
    tuned = tmp_path / "tuned.onnx"
    assert odt("export", out / "plan.json", learned, "-o", tuned).code == 0
    given = {"x": x[:1]}
    assert not np.array_equal(runtime(path, given)[1], runtime(tuned, given)[1])
    np.savez(data, x=x, y=classes)
    want = "has no array y_scores and y_box, only x, y; save with np.savez(path, x=..., y_scores"
    assert want in odt(*run_it).error
    np.savez(data, **arrays | {"y_box": x[:, 0, 0, :3]})
    assert odt(*run_it).error == "y_box is float32[60, 3], must be numbers [60, 4]"
    np.savez(data, **arrays | {"y_scores": classes + 2})
    assert "y_scores has labels from 2 to 3, but the model has classes 0 to 2" in odt(*run_it).error


@pytest.fixture(scope="module")
def learnable(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Samples of two sets, d.npz and v.npz: class and box follow from the sample."""
    home = tmp_path_factory.mktemp("learnable")
    rng = np.random.default_rng(7)
    sets: dict[str, Any] = {}
    for name, count in (("d", 40), ("v", 30)):
        x = floats(rng, count, 2, 5, 5)
        classes = (x[:, 0, 0, 0] > 0).astype(int) + (x[:, 1, 0, 0] > 1)
        sets[name] = {"x": x, "y_scores": classes, "y_box": x[:, 0, 0, :4]}
        np.savez(home / f"{name}.npz", **sets[name])
    return home, sets


def torch_session(p: dict[str, Any], data: dict[str, Any], clip: float, decay: float) -> Any:
    """Losses of an epoch per call; each tensor is clipped by its own norm, weights decay."""
    rate, epochs, count = 0.03, 3, len(data["x"])
    groups = [
        {"params": [a for n, a in p.items() if n[0] == kind], "weight_decay": d}
        for kind, d in (("w", decay), ("b", 0.0))
    ]
    optimizer = torch.optim.SGD(groups, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * count)
    order = Sampler(count, 1, seed=3)
    for epoch in range(epochs):
        losses = []
        for number in range(epoch * count, (epoch + 1) * count):
            x, y = judged(data, order.batch(number))
            optimizer.zero_grad()
            loss = torch_loss("Identity", p, x, y, SUM)
            loss.backward()
            for a in p.values():
                torch.nn.utils.clip_grad_norm_([a], clip)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        yield losses


def judged(data: dict[str, Any], chosen: Any) -> tuple[Any, dict[str, Any]]:
    """Some samples and their targets."""
    return torch.tensor(data["x"][chosen]), {
        name: torch.tensor(a[chosen]) for name, a in data.items() if name != "x"
    }


@pytest.mark.parametrize("exact", [False, True])
def test_a_run_judges_each_output(
    tmp_path: Path, odt: Cli, learnable: tuple[Path, dict[str, Any]], exact: bool
) -> None:
    """With decay and clipping, as PyTorch trains and judges; the checkpoint goes on the same."""
    home, sets = learnable
    path, out, clip, decay = detector(tmp_path), tmp_path / "out", 0.5, 0.05
    loss = ("--loss", "box=huber", "--delta", "0.5", "--loss-weight", "box=0.25")
    assert odt(path, *LIMITS, *loss, "--train", "all", "-o", out).code == 0
    words = ("run", out / "plan.json", "--data", home / "d.npz", "--val", home / "v.npz", "--lr",
             "0.03", "--schedule", "cosine", "--seed", "3", "--weight-decay", str(decay), "--clip",
             str(clip), *(("--exact",) if exact else ()))  # fmt: skip
    kept = ("--save", "learned.npz", "--checkpoint", "c.npz")
    done = odt(*words, "--epochs", "3", *kept, "--json")
    assert done.code == 0, done.err
    told = done.json
    assert (told["clipped_by"], told["metric"], told["rolled_back"]) == ("tensor", "loss", False)
    p = {
        a.name: torch.tensor(onnx.numpy_helper.to_array(a)).requires_grad_()
        for a in onnx.load(path).graph.initializer
    }
    losses, states = [], [{n: a.detach().clone() for n, a in p.items()}]
    for epoch in torch_session(p, sets["d"], clip, decay):
        losses += epoch
        states.append({n: a.detach().clone() for n, a in p.items()})
    np.testing.assert_allclose(told["losses"], losses, rtol=1e-5, atol=1e-5)
    x, y = judged(sets["v"], slice(None))
    for state, epoch in zip(states, told["epochs"], strict=True):
        found, (_, scores, box) = epoch["validation"], torch_heads("Identity", state, x)
        hits = (scores.argmax(1) == y["y_scores"]).double().mean().item()
        error = F.mse_loss(box, y["y_box"]).item()
        mean_loss = torch_loss("Identity", state, x, y, SUM).item()
        assert found["outputs"]["scores"] == {"accuracy": pytest.approx(hits)}
        assert found["outputs"]["box"] == {"mse": pytest.approx(error, rel=1e-4)}
        assert found["loss"] == pytest.approx(mean_loss, rel=1e-4)
    values = [e["validation"]["loss"] for e in told["epochs"]]
    assert told["kept_epoch"] == int(np.argmin(values)) > 0
    assert told["after"] == min(values)
    for when, at in (("before", 0), ("after", told["kept_epoch"])):
        accuracy = told["epochs"][at]["validation"]["outputs"]["scores"]["accuracy"]
        assert told[f"accuracy_{when}"] == {"scores": accuracy}
    for name, a in np.load("learned.npz").items():
        np.testing.assert_allclose(a, states[told["kept_epoch"]][name], rtol=1e-4, atol=1e-5)
    again = odt(*words, "--epochs", "3", "--resume", "c.npz", "--save", "again.npz")
    assert again.code == 0, again.err
    assert Path("again.npz").read_bytes() == Path("learned.npz").read_bytes()
    assert f"accuracy of scores on {home / 'v.npz'}: " in again.out
    assert ("steps have the emitted C's results" in again.out) == exact
    other = odt(*words[: -1 if exact else None], *(() if exact else ("--exact",)), "--epochs", "3",
                "--resume", "c.npz")  # fmt: skip
    assert other.code == 2
    assert f"was trained with --exact {exact}, not {not exact}" in other.error


def test_one_metric_for_several_outputs(
    tmp_path: Path, odt: Cli, learnable: tuple[Path, dict[str, Any]]
) -> None:
    """It judges the outputs that it suits; classes are balanced where one output has some."""
    home, sets = learnable
    path, out = detector(tmp_path), tmp_path / "out"
    assert odt(path, *LIMITS, "--loss", "box=mse", "--train", "all", "-o", out).code == 0
    words = ("run", out / "plan.json", "--data", home / "d.npz", "--epochs", "1")
    for metric, output in (("accuracy", "scores"), ("mse", "box")):
        done = odt(*words, "--val", home / "v.npz", "--balance", "--metric", metric, "--json")
        assert done.code == 0, done.err
        found = done.json["epochs"][1]["validation"]
        assert found["outputs"] == {output: {metric: found[metric]}}
        assert done.json["accuracy_before"] == (
            {"scores": done.json["before"]} if metric == "accuracy" else None
        )
    refused = odt(*words, "--val", home / "v.npz", "--metric", "auc")
    assert refused.code == 2
    assert refused.error.startswith("the model is no autoencoder: ")
    np.savez("part.npz", **{k: a for k, a in sets["v"].items() if k != "y_box"})
    told = odt(*words, "--val", "part.npz")
    assert told.error.startswith("part.npz: has no array y_box, only x, y_scores; save with ")
    np.savez("one.npz", **sets["d"] | {"y_scores": np.ones(40, int)})
    told = odt("run", out / "plan.json", "--data", "one.npz", "--steps", "1")
    assert "warning: all samples are of class 1 by y_scores" in told.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--loss", "boxes=mse"), "--loss boxes: small has no such output; it has scores, box"),
        (("--loss", "box=l1"), "--loss: 'l1' is not one of cross-entropy, mse, huber, bce, "),
        (("--loss", "box=mse,box=huber"), "--loss: two are given for box"),
        (("--loss", "mse", "--loss", "huber"), "--loss: two are given"),
        (("--loss-weight", "2"), "--loss-weight: '2' is not OUTPUT=WEIGHT, as scores=0.5"),
        (("--loss-weight", "box=-1"), "the weight of the loss of box must be above 0 and finite"),
        (("--loss-weight", "y=1"), "--loss-weight y: small has no such output; it has scores, b"),
        (("--keep-output", "y"), "model.onnx has no output y; it has scores, box"),
    ],
)
def test_what_can_not_be_meant(tmp_path: Path, odt: Cli, words: tuple[str, ...], told: str) -> None:
    done = odt(detector(tmp_path), *LIMITS, *words)
    assert done.code == 2
    assert told in done.error


def test_default_losses(tmp_path: Path) -> None:
    """Each output has its own, as if it were alone."""
    graph = import_model(detector(tmp_path, "Sigmoid"))
    assert default_losses(graph) == {"scores": "bce", "box": "cross_entropy"}


def test_targets_by_name(tmp_path: Path) -> None:
    t = plans.training_of(import_model(detector(tmp_path)), SUM)
    learner = Runtime(plans.keep_all(t), t)
    x, y = batch(t, np.random.default_rng(0))
    with pytest.raises(UsageError, match="targets are given for y, but those wanted are y_scores"):
        learner.train_step(x, y["y_box"], 0.1)
    with pytest.raises(UsageError, match="the target y_box is "):
        learner.train_step(x, y | {"y_box": y["y_box"][:, :2]}, 0.1)


# ---- outputs that are left out


def test_only_what_is_kept_is_read(tmp_path: Path, odt: Cli) -> None:
    """What the other outputs need may be anything; inputs that they alone read are left out."""
    rng = np.random.default_rng(0)
    nodes = [
        node("Gemm", "x w b", "scores"),
        node("Det", "m", "d"),
        node("Add", "d scores", "strange"),
    ]
    proto = model(
        nodes,
        {"x": ["n", 4], "m": ["n", 2, 2]},
        ["scores", "strange"],
        {"w": floats(rng, 4, 3), "b": floats(rng, 3)},
    )
    path = save(proto, tmp_path)
    done = odt(path, *LIMITS)
    assert done.code == 4
    assert "Det" in done.error
    kept = ("--keep-output", "scores")
    assert odt("check", path).code == 4
    told = odt("check", path, *kept)
    assert told.code == 0
    assert "note: outputs strange are left out, and inputs m with them" in told.out
    done = odt(path, *LIMITS, *kept, "--train", "all", "-o", "out")
    assert done.code == 0, done.err
    plan = load_plan(Path("out") / "plan.json")
    assert plan.model.outputs == ("scores",)
    assert odt("verify", Path("out") / "plan.json").code == 0
    np.savez("d.npz", x=floats(rng, 9, 4), y=np.arange(9) % 3)
    words = ("--data", "d.npz", "--steps", "3", "--save", "l.npz")
    assert odt("run", Path("out") / "plan.json", *words).code == 0
    done = odt("export", Path("out") / "plan.json", "l.npz", "-o", "tuned.onnx")
    assert done.code == 0, done.err


def test_a_loss_of_the_file_is_left_out(tmp_path: Path) -> None:
    """With the prediction alone, or trained by where there are two predictions."""
    rng = np.random.default_rng(0)
    nodes = [
        node("Gemm", "x w", "scores"),
        node("Sub", "scores t", "d"),
        node("Mul", "d d", "s"),
        node("ReduceMean", "s", "loss", keepdims=0),
        node("Gemm", "x v", "more"),
    ]
    proto = model(
        nodes,
        {"x": ["n", 4], "t": ["n", 3]},
        ["scores", "loss", "more"],
        {"w": floats(rng, 4, 3), "v": floats(rng, 4, 2)},
    )
    path = save(proto, tmp_path)
    with pytest.raises(
        UnsupportedModelError, match=r"the prediction loss, f32\[\], is not one per"
    ):
        plans.training_of(import_model(path))
    two = import_model(path, ImportOptions(outputs=("scores", "more")))
    assert [v.name for v in two.inputs] == ["x"]
    assert two.loss is None
    both = import_model(path, ImportOptions(outputs=("loss", "scores")))
    assert [v.name for v in both.outputs] == ["scores"]
    assert both.loss is not None
    t = plans.training_of(both, TrainingSpec(loss="output"))
    assert {u.candidate.param for u in t.updates} == {"w"}
    with pytest.raises(UsageError, match="--loss-weight: small is trained by its own loss alone"):
        plans.training_of(both, TrainingSpec(loss="output", loss_weights={"scores": 2.0}))


def test_the_weight_of_an_only_loss() -> None:
    """Twice the loss is twice the step; so are half the weight and twice the step size."""
    learned = []
    for weight, lr in ((1.0, 0.1), (2.0, 0.05)):
        spec = TrainingSpec(loss_weights={"fc": weight})
        t = plans.training_of(nets.cnn(), spec)
        assert [v.name for v in t.predictions] == ["fc"]
        learner = Runtime(plans.keep_all(t), t)
        x, y = batch(t, np.random.default_rng(5))
        loss = learner.train_step(x, y, lr)
        learned.append((loss / weight, learner.params()))
    assert learned[0][0] == pytest.approx(learned[1][0])
    for name, a in learned[0][1].items():
        np.testing.assert_allclose(a, learned[1][1][name], rtol=1e-6, atol=1e-7, err_msg=name)
        assert name.endswith("bias") or not np.array_equal(a, nets.cnn().constants[name])
