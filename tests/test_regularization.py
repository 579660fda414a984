"""Weight decay and clipping by what they are defined to do, beside PyTorch in test_session."""

from __future__ import annotations

from typing import Any

import nets
import numpy as np
import plans
import pytest
from numpy.typing import NDArray
from oracle import batch
from test_int8_training import CASES, plan_of
from zoo import exhibit

from odt_plan.backends.numpy import Regularization, Runtime, clipped_by
from odt_plan.backends.numpy.regularization import Shaping
from odt_plan.ir.errors import UsageError
from odt_plan.ir.training import TrainingSpec

Array = NDArray[Any]


def stepped(
    runtime: Runtime, regularization: Regularization, lr: float, seed: int = 0
) -> dict[str, Array]:
    """Real parameters after one update."""
    runtime.regularization = regularization
    rng = np.random.default_rng(seed)
    for _ in range(runtime.training.spec.micro_batches):
        runtime.train_step(*batch(runtime.training, rng), lr)
    return runtime.params()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", ["mlp", "cnn", "cnn-accumulate", "recompute-accumulate"])
def test_a_clipped_step_is_as_long_as_the_limit(name: str, exact: bool) -> None:
    """With SGD and a step size of 1 the step is the gradient."""
    if name == "recompute-accumulate":
        training, plan = exhibit(name).training, exhibit(name).plan
    else:
        forward = nets.mlp() if name == "mlp" else nets.cnn(batch=2)
        micro = 2 if name == "cnn-accumulate" else 1
        training = plans.training_of(forward, TrainingSpec(micro_batches=micro))
        plan = plans.keep_all(training)

    def after(regularization: Regularization) -> dict[str, Array]:
        return stepped(Runtime(plan, training, exact=exact), regularization, 1.0)

    before = Runtime(plan, training).params()
    names = [u.candidate.param for u in training.updates]
    free = after(Regularization())
    clipped = after(Regularization(clip=0.05))
    loose = after(Regularization(clip=1e6))
    norms = {n: np.linalg.norm((free[n] - before[n]).astype(np.float64)) for n in names}
    lengths = {n: np.linalg.norm((clipped[n] - before[n]).astype(np.float64)) for n in names}
    assert all(np.array_equal(loose[n], free[n]) for n in names)
    if clipped_by(plan, training) == "global":
        assert name == "cnn-accumulate"
        whole = np.sqrt(sum(v**2 for v in norms.values()))
        assert whole > 0.05
        for n in names:
            assert lengths[n] == pytest.approx(norms[n] * 0.05 / whole, rel=1e-3, abs=1e-6)
    else:
        assert any(v > 0.05 for v in norms.values())
        for n in names:
            assert lengths[n] == pytest.approx(min(norms[n], 0.05), rel=1e-3, abs=1e-6)


def test_the_norm_does_not_depend_on_tiles() -> None:
    results = []
    for tile in (4, 70, 512, 1 << 20):
        plan, training = plan_of("mobile", TrainingSpec(tile_bytes=tile), inputs=True)
        runtime = Runtime(plan, training)
        stepped(runtime, Regularization(clip=0.01, weight_decay=0.1), 0.02)
        results.append(runtime.state_bytes())
    assert len(set(results)) == 1
    free = Runtime(plan, training)
    stepped(free, Regularization(), 0.02)
    assert free.state_bytes() != results[0]


def test_a_norm_has_the_same_bits_in_any_parts() -> None:
    """Its last bit may decide how a factor is rounded."""
    plan, training = CASES["i8-input"]()
    norms: list[float] = []

    class Told(Regularization):
        def factor(self, norm: float) -> np.float32:
            norms.append(norm)
            return super().factor(norm)

    shaping = Shaping(plan, training, {})
    shaping.regularization = Told(clip=1.0)
    rng = np.random.default_rng(0)
    for _ in range(20):
        g = rng.standard_normal(999).astype(np.float32)
        for parts in (1, 3, 27, 999):
            shaping.factor(training.updates[0], np.split(g, parts))
        assert len(set(norms)) == 1
        norms.clear()


@pytest.mark.parametrize("case", ["sgd", "momentum-accumulate", "adagrad"])
def test_integer_weights_decay_in_the_mean(case: str) -> None:
    """Stochastic rounding takes whole steps, whose mean is the decay of the real weight."""
    plan, training = CASES[case]()
    lr, decay = 0.02, 5.0
    before = Runtime(plan, training).params()
    shrunk, weights = [], []
    for u in training.updates:
        runtime = Runtime(plan, training)
        runtime.regularization = Regularization(weight_decay=decay)
        name, source = u.candidate.param, u.apply_node.inputs[1]
        if u.role != "weight" or source is None:
            continue
        operands = [runtime._resident[u.value.name], np.zeros(u.grad.type.shape, np.float32)]
        steps = training.graph.constants[u.apply_node.inputs[-1].name]  # type: ignore[union-attr]
        shaped = runtime.regularization.shaped(u, [*operands, steps], lr, np.float32(1))
        scale = u.apply_node.float_attr("gradient_scale", 1.0)
        found = np.asarray(shaped[1]) * scale
        assert shaped[0] is operands[0], "the weight itself is left alone"
        np.testing.assert_allclose(found, decay * before[name].reshape(found.shape), rtol=1e-5)
        if case == "sgd":
            after = stepped(runtime, runtime.regularization, lr)[name]
            plain = stepped(Runtime(plan, training), Regularization(), lr)[name]
            shrunk.append((after - plain).ravel())
            weights.append(before[name].ravel())
    if case == "sgd":
        w, d = np.concatenate(weights).astype(np.float64), np.concatenate(shrunk)
        assert w @ d / (w @ w) == pytest.approx(-lr * decay, rel=0.1)


def test_adam_does_not_decay_integers() -> None:
    _, training = CASES["adam-partly"]()
    with pytest.raises(UsageError, match="stored in i8 and trained by Adam") as caught:
        Regularization(weight_decay=0.1).check(training)
    assert "\n" not in str(caught.value)
    Regularization(clip=0.1).check(training)


@pytest.mark.parametrize("exact", [True, False])
def test_only_weights_decay_and_statistics_are_left_alone(exact: bool) -> None:
    graph = nets.batch_normalized()
    training = plans.training_of(graph)
    plan = plans.keep_all(training)
    free, decayed, clipped = (
        stepped(Runtime(plan, training, exact=exact), regularization, 0.1)
        for regularization in (
            Regularization(),
            Regularization(weight_decay=0.5),
            Regularization(clip=1e-3),
        )
    )
    roles = {u.candidate.param: u.role for u in training.updates}
    assert set(roles.values()) == {"weight", "bias", "scale", "statistic"}
    for name, role in roles.items():
        alike = np.array_equal(free[name], decayed[name])
        assert alike == (role != "weight"), f"{name} is a {role}"
        if role == "weight":
            wanted = free[name] - 0.05 * graph.constants[name]
            np.testing.assert_allclose(decayed[name], wanted, rtol=1e-5, atol=1e-6)
        if role == "statistic":
            assert np.array_equal(free[name], clipped[name])
            assert not np.array_equal(free[name], graph.constants[name])
