"""Losses against PyTorch and central differences; their targets; a step by the planner."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import numpy as np
import plans
import pytest
from cli_run import Cli
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_files import export

from odt_plan.backends.numpy import Runtime
from odt_plan.backends.numpy.data import checked_targets
from odt_plan.ir.errors import UnsupportedModelError, UsageError
from odt_plan.ir.graph import Graph, TensorType
from odt_plan.ir.interpreter import run
from odt_plan.ir.losses import add_loss
from odt_plan.ir.targets import random_target
from odt_plan.ir.training import LossName, TrainingSpec

torch = pytest.importorskip("torch")
T = TensorType


def triplets(x: Any, labels: Any, margin: float) -> Any:
    """One by one, by PyTorch's own loss of a triplet."""
    criterion = torch.nn.TripletMarginWithDistanceLoss(
        distance_function=lambda a, b: ((a - b) ** 2).sum(1), margin=margin
    )
    n = range(len(x))
    terms = [
        criterion(x[a : a + 1], x[p : p + 1], x[o : o + 1])
        for a in n
        for p in n
        for o in n
        if a != p and labels[a] == labels[p] != labels[o]
    ]
    return torch.stack(terms).mean() if terms else (x * 0).sum()


F = torch.nn.functional
REFERENCE: dict[LossName, Callable[[Any, Any, TrainingSpec], Any]] = {
    "cross_entropy": lambda x, y, _: F.cross_entropy(x, y.long()),
    "mse": lambda x, y, _: F.mse_loss(x, y),
    "huber": lambda x, y, spec: F.huber_loss(x, y, delta=spec.delta),
    "bce": lambda x, y, _: F.binary_cross_entropy_with_logits(x, y),
    "cosine": lambda x, y, _: (1 - F.cosine_similarity(x, y)).mean(),
    "triplet": lambda x, y, spec: triplets(x, y, spec.margin),
}


def ended(spec: TrainingSpec, shape: tuple[int, int]) -> tuple[Graph, str, str]:
    """A loss of an input ``x``, with its gradient: graph, names of both."""
    g = Graph("loss")
    ending = add_loss(g, g.add_input("x", T(shape)), spec)
    return g, ending.loss.name, ending.seed().name


@settings(max_examples=150, deadline=None)
@given(
    loss=st.sampled_from(sorted(REFERENCE)),
    batch=st.integers(3, 6),
    features=st.integers(1, 5),
    parameter=st.sampled_from((0.1, 1.0, 3.0)),
    scale=st.sampled_from((0.01, 1.0, 60.0)),
    seed=st.integers(0, 9999),
)
def test_equals_torch(
    loss: LossName, batch: int, features: int, parameter: float, scale: float, seed: int
) -> None:
    """Value and gradient, also of logits whose probabilities round to 0 and 1."""
    spec = TrainingSpec(loss=loss, delta=parameter, margin=parameter)
    g, value, gradient = ended(spec, (batch, features))
    rng = np.random.default_rng(seed)
    x = (scale * rng.standard_normal((batch, features))).astype(np.float32)
    y = random_target(g, g.values["target"], rng)
    leaf = torch.from_numpy(x.astype(np.float64)).requires_grad_()
    want = REFERENCE[loss](leaf, torch.from_numpy(y.astype(np.float64)), spec)
    want.backward()
    env = run(g, {"x": x, "target": y})
    # -log(p) of p next to 1 carries the rounding of p; probabilities count from FLT_MIN on
    if loss != "cross_entropy" or scale < 10:
        np.testing.assert_allclose(env[value], want.detach(), rtol=2e-5, atol=1e-6)
    most = float(leaf.grad.abs().max())
    np.testing.assert_allclose(env[gradient], leaf.grad, rtol=1e-4, atol=1e-6 * max(1, most))


@pytest.mark.parametrize("loss", sorted(REFERENCE))
def test_gradient_of_a_weight_is_the_central_difference(loss: LossName) -> None:
    """Through the whole training graph, in double."""
    forward = nets.mlp((5, 6, 4), batch=6)
    if loss == "bce":
        forward = nets.ending(forward, "Sigmoid")
    t = plans.training_of(forward, TrainingSpec(loss=loss))
    rng = np.random.default_rng(1)
    y = random_target(t.graph, t.target, rng)
    feeds = {k: v.astype("f8") for k, v in t.graph.constants.items()}
    feeds |= {
        t.sample.name: rng.standard_normal(t.sample.type.shape),
        t.target.name: y if y.dtype == np.int32 else y.astype("f8"),
        t.hyper.name: np.array([0.1, 1.0, 1.0]),
    }
    update = next(u for u in t.updates if u.value.name == "fc0.weight")
    got = run(t.graph, feeds)[update.grad.name]
    assert np.abs(got).max() > 1e-3
    for at in ((0, 0), (3, 2), (5, 4)):
        ends = []
        for step in (-1e-6, 1e-6):
            moved = feeds["fc0.weight"].copy()
            moved[at] += step
            ends.append(run(t.graph, feeds | {"fc0.weight": moved})[t.loss.name])
        assert got[at] == pytest.approx((ends[1] - ends[0]) / 2e-6, rel=1e-5, abs=1e-8)


def test_sigmoid_is_fused() -> None:
    """Backward starts at the logits, where a probability of 1 still has a gradient."""
    t = plans.training_of(nets.ending(nets.mlp(), "Sigmoid"), TrainingSpec(loss="bce"))
    assert not any(n.op == "SigmoidGrad" for n in t.graph.nodes)
    assert t.prediction.producer is not None
    assert t.prediction.producer.op == "Sigmoid"


def test_what_is_at_the_edge() -> None:
    """No triplet, vectors of zeros, NaN."""
    g, value, gradient = ended(TrainingSpec(loss="triplet"), (3, 2))
    x = np.ones((3, 2), np.float32)
    env = run(g, {"x": x, "target": np.array([1, 2, 3], np.int32)})
    assert env[value] == 0
    assert not env[gradient].any()
    x[0] = np.nan
    assert np.isnan(run(g, {"x": x, "target": np.array([7, 7, -7], np.int32)})[value])
    g, value, gradient = ended(TrainingSpec(loss="cosine"), (2, 2))
    env = run(g, {"x": np.zeros((2, 2), np.float32), "target": np.ones((2, 2), np.float32)})
    assert env[value] == 1
    assert np.isfinite(env[gradient]).all()


def test_predictions_that_do_not_suit() -> None:
    flat = nets.mlp(batch=2)
    with pytest.raises(UnsupportedModelError, match=r"triplets need 3 samples .* not 2; use --ba"):
        plans.training_of(flat, TrainingSpec(loss="triplet"))
    image = nets.cnn()
    image.outputs = [image.values["relu1"]]
    for loss in ("cosine", "triplet"):
        with pytest.raises(UnsupportedModelError, match=rf"{loss} needs a prediction \[batch, f"):
            plans.training_of(image, TrainingSpec(loss=loss), plans.whole(image)[:1])
    for name, wrong in (("delta", 0.0), ("margin", float("nan")), ("margin", float("inf"))):
        with pytest.raises(UsageError, match=f"{name} must be above 0 and finite"):
            TrainingSpec(loss="huber", **{name: wrong})


@pytest.mark.parametrize(
    ("loss", "y", "told"),
    [
        ("bce", np.full((9, 4), 1.5), "y has values from 1.5 to 1.5, but binary cross entropy ta"),
        ("bce", np.zeros(9, int), r"y is int64\[9\], must be numbers \[9, 4\]"),
        ("huber", np.zeros((9, 3)), r"y is float64\[9, 3\], must be numbers \[9, 4\]"),
        ("cosine", np.full((9, 4), np.inf), "y has a NaN or infinite value"),
        ("triplet", np.zeros((9, 4)), r"y is float64\[9, 4\], must be integer labels \[9\]"),
        ("triplet", np.full(9, 2**40), "y has values that i32 can't hold"),
    ],
)
def test_wrong_targets_are_told(loss: LossName, y: Any, told: str) -> None:
    t = plans.training_of(nets.mlp(batch=3), TrainingSpec(loss=loss))
    with pytest.raises(UsageError, match=told):
        checked_targets(t, y, 9)


def test_a_step_checks_its_target() -> None:
    t = plans.training_of(nets.mlp(), TrainingSpec(loss="bce"))
    runtime = Runtime(plans.keep_all(t), t)
    x = np.zeros((1, 8), np.float32)
    for wrong in (-0.1, np.nan):
        with pytest.raises(UsageError, match="the target has values from"):
            runtime.train_step(x, np.full((1, 4), wrong), 0.1)
    assert runtime.train_step(x, np.ones((1, 4)), 0.1) > 0


def test_from_the_command_line(tmp_path: Path, odt: Cli) -> None:
    """Plan, C, training, the replay of the plan; the parameter is kept in it."""
    path = export(nets.mlp((8, 16, 4)), tmp_path)
    limits = ("--ram", "64KB", "--flash", "1MB")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 8)).astype("f4")
    np.savez(tmp_path / "d.npz", x=x, y=3 * x[:, :4])
    out = tmp_path / "out"
    done = odt(path, *limits, "--loss", "huber", "--delta", "0.5", "--emit", "c", "-o", out)
    assert done.code == 0, done.err
    assert "huber, sgd" in done.out
    assert '"delta": 0.5' in (out / "plan.json").read_text()
    assert odt("verify", out / "plan.json").code == 0
    data = ("--data", tmp_path / "d.npz", "--lr", "0.1", "--steps", "600")
    told = odt("run", out / "plan.json", *data, "--json")
    losses = told.json["losses"]
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:20])
    assert ".delta = 0.5f" in "".join(p.read_text() for p in out.glob("*.c"))
    error = odt(path, *limits, "--margin", "2").error
    assert error == "--margin belongs to --loss triplet; leave it out, or give both"
    wrong = odt(path, *limits, "--loss", "triplet", "--batch", "8", "--micro-batches", "auto")
    assert "triplets are made within a micro-batch" in wrong.error


def test_the_loss_of_a_sigmoid_is_binary(tmp_path: Path, odt: Cli) -> None:
    path = export(nets.ending(nets.mlp(), "Sigmoid"), tmp_path)
    assert "bce, sgd" in odt(path, "--ram", "64KB", "--flash", "1MB").out
