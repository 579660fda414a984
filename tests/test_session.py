"""A training session does what PyTorch's does, and ends where an uninterrupted one would."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import plans
import pytest
from numpy.typing import NDArray
from test_runtime import torch_model
from zoo import Exhibit, exhibit

from odt_plan.backends.numpy import (
    DataSet,
    Epoch,
    History,
    Runtime,
    SessionOptions,
    data_set,
    reconstruction_set,
    train_session,
)
from odt_plan.backends.numpy.checkpoint import previous
from odt_plan.backends.numpy.metrics import evaluate, roc_auc
from odt_plan.backends.numpy.regularization import clipped_by
from odt_plan.backends.numpy.sampling import Sampler, balancing
from odt_plan.ir.errors import UsageError
from odt_plan.ir.training import TrainingGraph, TrainingSpec

Array = NDArray[Any]


def samples(training: TrainingGraph, count: int = 23, seed: int = 0) -> DataSet:
    """Random samples; labels follow from them, so that something can be learned."""
    rng = np.random.default_rng(seed)
    shape = training.sample.type.shape[1:]
    x = rng.standard_normal((count, *shape)).astype(np.float32)
    if training.target.type.dtype == "i32":
        classes = training.prediction.type.shape[1]
        mixed = np.random.default_rng(7).standard_normal((int(np.prod(shape)), classes))
        y: Array = (x.reshape(count, -1) @ mixed).argmax(1)
    else:
        y = rng.standard_normal((count, *training.target.type.shape[1:])).astype(np.float32)
    return data_set(training, x, y)


# ---- PyTorch


def torch_session(e: Exhibit, data: DataSet, o: SessionOptions) -> tuple[list[float], Any]:
    """The same session by PyTorch's optimizers, schedules and clipping; only the order is ours."""
    torch = pytest.importorskip("torch")
    spec, size = e.training.spec, e.plan.model.batch
    forward, params = torch_model(e)
    names = [u.candidate.param for u in e.training.updates]
    decays = [params[u.candidate.param] for u in e.training.updates if u.role == "weight"]
    others = [params[u.candidate.param] for u in e.training.updates if u.role != "weight"]
    groups = [
        {"params": decays, "weight_decay": o.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    made = {
        "sgd": lambda: torch.optim.SGD(groups, lr=o.lr),
        "momentum": lambda: torch.optim.SGD(groups, lr=o.lr, momentum=spec.momentum),
        "adagrad": lambda: torch.optim.Adagrad(groups, lr=o.lr, eps=spec.epsilon),
        "adam": lambda: torch.optim.AdamW(
            groups, lr=o.lr, betas=(spec.beta1, spec.beta2), eps=spec.epsilon
        ),
    }[spec.optimizer]()
    assert o.epochs is not None
    group = size * spec.micro_batches
    total, rates = -(-o.epochs * data.count // group), torch.optim.lr_scheduler
    falling = {
        "constant": lambda: rates.ConstantLR(made, 1.0, 1),
        "linear": lambda: rates.LinearLR(made, 1.0, 0.0, total - o.warmup),
        "cosine": lambda: rates.CosineAnnealingLR(made, total - o.warmup),
    }[o.schedule]()
    schedule = falling
    if o.warmup:
        rising = rates.LinearLR(made, 1 / o.warmup, 1.0, o.warmup - 1)
        schedule = rates.SequentialLR(made, [rising, falling], [o.warmup])
    sampler = Sampler(data.count, size, o.seed)
    (x,), f, losses = data.x.values(), torch.nn.functional, []
    criterion = f.mse_loss if spec.loss == "mse" else f.cross_entropy
    for update in range(total):
        made.zero_grad()
        loss = 0.0
        for k in range(spec.micro_batches):
            chosen = sampler.batch(update * spec.micro_batches + k)
            y = data.y["y"][chosen]
            y = y if spec.loss == "mse" else y.astype(np.int64)
            part = criterion(forward(torch.tensor(x[chosen])), torch.tensor(y)) / spec.micro_batches
            part.backward()
            loss += float(part.detach())
        if o.clip is not None and clipped_by(e.plan, e.training) == "global":
            torch.nn.utils.clip_grad_norm_([params[n] for n in names], o.clip)
        elif o.clip is not None:
            for name in names:
                torch.nn.utils.clip_grad_norm_([params[name]], o.clip)
        made.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SequentialLR calls a form that is to go
            schedule.step()
        losses.append(loss)
    return losses, params


@pytest.mark.parametrize(
    ("name", "options", "by"),
    [
        ("mlp-sgd", {"schedule": "cosine"}, "tensor"),
        ("mlp-sgd", {"schedule": "linear", "warmup": 7, "weight_decay": 0.1}, "tensor"),
        ("mlp-sgd", {"clip": 0.3, "schedule": "cosine", "warmup": 5}, "tensor"),
        ("mlp-adagrad", {"weight_decay": 0.05, "clip": 0.5}, "tensor"),
        ("cnn-momentum", {"weight_decay": 0.1, "schedule": "cosine", "clip": 0.5}, "tensor"),
        ("cnn-mse-batch", {"weight_decay": 0.02, "clip": 0.5, "schedule": "linear"}, "tensor"),
        ("resnet-adam-accumulate", {"weight_decay": 0.3, "schedule": "cosine"}, "global"),
        ("resnet-adam-accumulate", {"weight_decay": 0.3, "clip": 0.2, "warmup": 4}, "global"),
        ("recompute-accumulate", {"clip": 0.2, "weight_decay": 0.1}, "tensor"),
        ("paged-accumulate", {"clip": 0.2, "schedule": "linear", "weight_decay": 0.1}, "tensor"),
    ],
)
@pytest.mark.parametrize("exact", [True, False])
def test_trains_like_pytorch(name: str, options: dict[str, Any], by: str, exact: bool) -> None:
    e = exhibit(name)
    rate = 0.002 if e.training.spec.optimizer == "adam" else 0.02
    o = SessionOptions(lr=rate, epochs=3, seed=4, **options)
    data = samples(e.training)
    runtime = Runtime(e.plan, e.training, exact=exact)
    history = train_session(runtime, data, o)
    assert clipped_by(e.plan, e.training) == by
    losses, params = torch_session(e, data, o)
    np.testing.assert_allclose(history.losses, losses, rtol=1e-5, atol=1e-5)
    learned = runtime.params()
    for u in e.training.updates:
        wanted = params[u.candidate.param].detach().numpy()
        np.testing.assert_allclose(learned[u.candidate.param], wanted, rtol=1e-4, atol=1e-5)
    plain = Runtime(e.plan, e.training, exact=exact)
    train_session(plain, data, SessionOptions(lr=rate, epochs=3, seed=4))
    assert plain.state_bytes() != runtime.state_bytes(), "the options matter here"


# ---- resuming


class Script:
    """A listener that keeps what it was told, and presses Ctrl-C after some updates."""

    def __init__(self, until: int | None = None) -> None:
        self.until, self.notes, self.epochs = until, [], []  # type: tuple[int | None, list[str], list[Epoch]]

    def updated(self, done: int, total: int, loss: float) -> None:
        if done == self.until:
            raise KeyboardInterrupt

    def ended(self, epoch: Epoch) -> None:
        self.epochs.append(epoch)

    def noted(self, text: str) -> None:
        self.notes.append(text)


def run(
    e: Exhibit, o: SessionOptions, script: Script | None = None, *, exact: bool = True
) -> tuple[History, bytes]:
    runtime = Runtime(e.plan, e.training, exact=exact)
    validation = samples(e.training, 12, seed=1)
    history = train_session(runtime, samples(e.training), o, validation=validation, listener=script)
    return history, runtime.state_bytes() + runtime.stored_bytes()


@pytest.mark.parametrize("name", ["mlp-sgd", "cnn-mse-batch", "resnet-adam-accumulate", "paged"])
@pytest.mark.parametrize("at", [1, 8, 11, 16])
@pytest.mark.parametrize("exact", [True, False])
def test_resumed_is_uninterrupted(name: str, at: int, exact: bool, tmp_path: Path) -> None:
    e, file = exhibit(name), tmp_path / "c.npz"
    o = SessionOptions(
        lr=0.01, epochs=3, schedule="cosine", warmup=2, weight_decay=0.01, clip=1.0, seed=3
    )
    whole = run(e, o, exact=exact)
    assert len(whole[0].losses) > at
    first, _ = run(e, replace(o, checkpoint=file), Script(until=at), exact=exact)
    assert first.stopped == "interrupted"
    assert len(first.losses) == at
    assert run(e, replace(o, checkpoint=file, resume=file), exact=exact) == whole
    assert run(e, replace(o, resume=file), exact=exact) == whole, "also one that was at its end"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.npz", "c.previous.npz"]


def test_the_previous_checkpoint_steps_in(tmp_path: Path) -> None:
    e, file = exhibit("mlp-sgd"), tmp_path / "c.npz"
    o = SessionOptions(lr=0.02, epochs=2, seed=3)
    whole = run(e, o)
    run(e, replace(o, checkpoint=file, checkpoint_every=5), Script(until=18))
    good = file.read_bytes()
    for bad in (good[: len(good) // 2], good[:-1], b"", good[:700] + b"\xff\xff" + good[702:]):
        file.write_bytes(bad)
        script = Script()
        assert run(e, replace(o, resume=file), script) == whole
        (note,) = script.notes
        assert "c.npz: can't be read" in note
        assert note.endswith("going on from c.previous.npz, after update 15")
    previous(file).write_bytes(b"PK")
    with pytest.raises(UsageError, match=r"c\.previous\.npz can't be used either"):
        run(e, replace(o, resume=file))
    previous(file).unlink()
    with pytest.raises(UsageError, match="can't be read"):
        run(e, replace(o, resume=file))
    file.unlink()
    with pytest.raises(UsageError, match="No such file"):
        run(e, replace(o, resume=file))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"lr": 0.03}, "--lr 0.02, not 0.03"),
        ({"seed": 1}, "--seed 0, not 1"),
        ({"schedule": "cosine"}, "--schedule constant, not cosine"),
        ({"clip": 1.0}, "--clip None, not 1.0"),
    ],
)
def test_a_checkpoint_of_other_options_is_refused(
    change: dict[str, Any], told: str, tmp_path: Path
) -> None:
    e, file = exhibit("mlp-sgd"), tmp_path / "c.npz"
    o = SessionOptions(lr=0.02, epochs=1)
    run(e, replace(o, checkpoint=file))
    with pytest.raises(UsageError) as caught:
        run(e, replace(o, resume=file, **change))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="was trained with --exact True, not False"):
        run(e, replace(o, resume=file), exact=False)


def test_a_checkpoint_of_another_plan_or_data_is_refused(tmp_path: Path) -> None:
    e, file = exhibit("cnn-momentum"), tmp_path / "c.npz"
    o = SessionOptions(lr=0.02, epochs=1)
    run(e, replace(o, checkpoint=file))
    with pytest.raises(UsageError, match="belongs to another plan"):
        run(exhibit("recompute"), replace(o, resume=file))
    other, runtime = samples(e.training, seed=5), Runtime(e.plan, e.training)
    with pytest.raises(UsageError, match="belongs to another data set"):
        train_session(runtime, other, replace(o, resume=file))
    np.savez(file, x=np.zeros(3))
    previous(file).unlink(missing_ok=True)
    with pytest.raises(UsageError, match="is no checkpoint"):
        run(e, replace(o, resume=file))


def test_more_epochs_may_follow(tmp_path: Path) -> None:
    e, file = exhibit("mlp-sgd"), tmp_path / "c.npz"
    o = SessionOptions(lr=0.02, epochs=2)
    run(e, replace(o, checkpoint=file))
    assert run(e, replace(o, epochs=4, resume=file)) == run(e, replace(o, epochs=4))


# ---- best state, way back


def test_the_best_epoch_is_kept() -> None:
    """A step size that first helps, then destroys."""
    e = exhibit("mlp-sgd")
    runtime, data = Runtime(e.plan, e.training), samples(e.training, 60)
    validation = samples(e.training, 40, seed=1)
    script = Script()
    o = SessionOptions(lr=0.3, epochs=8, seed=2)
    history = train_session(runtime, data, o, validation=validation, listener=script)
    scores = [e.validation.value for e in history.epochs[1:] if e.validation is not None]
    assert script.epochs == list(history.epochs)
    assert history.kept == 1 + int(np.argmax(scores))
    assert scores[-1] < max(scores)
    assert history.after == evaluate(runtime, validation, "accuracy")
    patient = Runtime(e.plan, e.training)
    again = train_session(patient, data, replace(o, patience=1), validation=validation)
    drop = next(i for i in range(1, 8) if scores[i] <= max(scores[:i]))
    assert again.stopped == "patience"
    assert len(again.epochs) == 1 + drop + 1
    assert "nothing better on the validation set" in again.message


def test_training_that_makes_it_worse_is_rolled_back() -> None:
    e = exhibit("mlp-sgd")
    runtime, data = Runtime(e.plan, e.training), samples(e.training, 60)
    train_session(runtime, data, SessionOptions(lr=0.05, epochs=10))
    validation, good = samples(e.training, 40, seed=1), runtime.snapshot()
    wrong = replace(data, y={"y": (data.y["y"] + 1) % 4})
    o = SessionOptions(lr=0.05, epochs=2)
    history = train_session(runtime, wrong, o, validation=validation)
    assert history.rolled_back
    assert history.kept == 0
    assert runtime.snapshot() == good
    assert history.after == history.before
    assert [e.number for e in history.epochs] == [0, 1, 2]


def test_a_value_that_is_not_finite_goes_back_and_halves() -> None:
    e = exhibit("cnn-mse-batch")
    runtime, data, script = Runtime(e.plan, e.training), samples(e.training), Script()
    o = SessionOptions(lr=3.0, epochs=3)
    history = train_session(runtime, data, o)
    assert history.stopped == "not_finite"
    assert history.halvings == 0
    helped = train_session(
        Runtime(e.plan, e.training), data, replace(o, halvings=8), listener=script
    )
    assert helped.stopped is None
    assert 1 <= helped.halvings <= 8
    assert len(script.notes) == helped.halvings
    assert script.notes[0].endswith("on from update 0 at 1/2 of the step size")
    lr = 3.0 * 0.5**helped.halvings
    assert helped.epochs[-1].lr == lr
    if script.notes[-1].split("on from update ")[1].startswith("0 "):
        same = train_session(Runtime(e.plan, e.training), data, replace(o, lr=lr))
        assert same.losses == helped.losses
    few = train_session(Runtime(e.plan, e.training), data, replace(o, lr=3e9, halvings=2))
    assert (few.stopped, few.halvings) == ("not_finite", 2)
    assert "at 1/4 of the step size" in few.message


def test_online_goes_on_with_the_next_sample() -> None:
    e = exhibit("cnn-mse-batch")
    data = samples(e.training, 30)
    data.y["y"][8] = 3e20  # whose square is infinite
    runtime = Runtime(e.plan, e.training)
    o = SessionOptions(lr=0.01, online=True, halvings=1)
    history = train_session(runtime, data, o)
    assert history.stopped is None
    assert history.halvings == 1
    assert len(history.losses) == 14
    assert runtime.updates == 14


# ---- samples


def test_online_takes_each_sample_once_in_order() -> None:
    e = exhibit("resnet-adam-accumulate")
    data, o = samples(e.training, 11), SessionOptions(lr=0.01, online=True)
    runtime, by_hand = Runtime(e.plan, e.training), Runtime(e.plan, e.training)
    history = train_session(runtime, data, o)
    (x,), (y,) = data.x.values(), data.y.values()
    losses = [by_hand.train_step(x[i : i + 1], y[i : i + 1], 0.01) for i in range(9)]
    np.testing.assert_allclose(history.losses, np.reshape(losses, (3, 3)).mean(1))
    assert runtime.state_bytes() == by_hand.state_bytes()
    assert history.leftover == 2


def test_each_pass_takes_all_samples_in_a_new_order() -> None:
    sampler = Sampler(10, 3, seed=5)
    seen = [i for n in range(10) for i in sampler.batch(n)]
    turns = [seen[k : k + 10] for k in (0, 10, 20)]
    assert all(sorted(t) == list(range(10)) for t in turns)
    assert len({tuple(t) for t in turns}) == 3
    assert [Sampler(10, 3, seed=5).batch(n) for n in (7, 2)] == [sampler.batch(n) for n in (7, 2)]
    assert Sampler(10, 3, seed=6).batch(0) != sampler.batch(0)
    rng = np.random.default_rng(5)
    assert turns[:2] == [rng.permutation(10).tolist() for _ in range(2)]


def test_fixed_batches_keep_their_samples() -> None:
    sampler = Sampler(20, 3, seed=1, fixed=True)
    seen = [tuple(sampler.batch(n)) for n in range(21)]
    turns = [set(seen[k : k + 7]) for k in (0, 7, 14)]
    assert turns[0] == turns[1] == turns[2]
    assert {i for b in turns[0] for i in b} == set(range(20))
    assert seen[:7] != seen[7:14]
    assert [tuple(sampler.batch(n)) for n in (20, 0, 9)] == [seen[n] for n in (20, 0, 9)]


def test_balanced_samples_are_of_all_classes_alike() -> None:
    labels = np.repeat([0, 1, 2], [900, 80, 20])
    weights = balancing(labels)
    assert [weights[labels == c].sum() for c in range(3)] == pytest.approx([1 / 3] * 3)
    sampler = Sampler(1000, 1, weights=weights)
    drawn = labels[[sampler.batch(n)[0] for n in range(6000)]]
    assert np.bincount(drawn) / 6000 == pytest.approx([1 / 3] * 3, abs=0.02)


# ---- metrics


def test_area_under_the_curve_is_that_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(3)
    for count in (2, 5, 40, 300):
        scores = rng.integers(0, max(2, count // 3), count).astype(float)  # with ties
        positive = rng.permutation(np.arange(count) < max(1, count // 4))
        assert roc_auc(scores, positive) == pytest.approx(
            metrics.roc_auc_score(positive, scores), abs=1e-12
        )


def autoencoder() -> tuple[Runtime, Array]:
    import nets

    training = plans.training_of(nets.mlp((8, 3, 8)), TrainingSpec(loss="mse"))
    basis = np.random.default_rng(1).standard_normal((2, 8))
    x = np.random.default_rng(2).standard_normal((200, 2)) @ basis
    return Runtime(plans.keep_all(training), training), x


def test_an_autoencoder_is_judged_by_its_reconstruction() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    runtime, x = autoencoder()
    rng = np.random.default_rng(4)
    odd = rng.standard_normal((60, 8))
    mixed, label = np.concatenate([x[:80], odd]), np.repeat([0, 1], [80, 60])
    validation = reconstruction_set(runtime.training, mixed, label, suffix="_val")
    data = reconstruction_set(runtime.training, x[80:])
    o = SessionOptions(lr=0.05, epochs=15, metric="auc")
    history = train_session(runtime, data, o, validation=validation)
    assert history.before is not None
    assert history.after is not None
    assert history.after.value > history.before.value + 0.1
    errors = [float(((runtime.infer(a[None].astype("f4")) - a) ** 2).mean()) for a in mixed]
    assert history.after.value == pytest.approx(metrics.roc_auc_score(label, errors), abs=1e-3)


def test_validation_is_that_of_single_inferences() -> None:
    e = exhibit("cnn-mse-batch")
    runtime, data = Runtime(e.plan, e.training), samples(e.training, 9)
    (x,), (y,) = data.x.values(), data.y.values()
    padded = np.concatenate([x, x[:1]])
    predicted = np.concatenate([runtime.infer(padded[i : i + 2]) for i in range(0, 10, 2)])[:9]
    before = runtime.state_bytes()
    found = evaluate(runtime, data, "mse")
    assert runtime.state_bytes() == before
    assert found.value == pytest.approx(float(((predicted - y) ** 2).mean()), rel=1e-6)
    assert found.loss == pytest.approx(float(((predicted - y)[:8] ** 2).mean()), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"epochs": 1, "lr": 0.0}, "--lr: 0.0"),
        ({"epochs": 1, "warmup": 23}, "--warmup: 23 of 23 updates"),
        ({"epochs": 1, "online": True}, "give either steps or epochs"),
        ({"epochs": 1, "weight_decay": -1.0}, "--weight-decay: -1.0"),
        ({"epochs": 1, "clip": 0.0}, "--clip: 0.0"),
        ({"epochs": 1, "patience": 0}, "--patience: 0"),
        ({"epochs": 1, "checkpoint_every": 5}, "--checkpoint-every needs a file"),
        ({"online": True, "balance": True}, "--balance draws samples again"),
        ({"epochs": 1, "metric": "auc"}, "is no reconstruction of the input"),
        ({"epochs": 1, "metric": "mse"}, "--metric mse: the prediction is"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], told: str) -> None:
    e = exhibit("mlp-sgd")
    data, runtime = samples(e.training), Runtime(e.plan, e.training)

    def session() -> History:
        o = SessionOptions(**{"lr": 0.1, **options})
        return train_session(runtime, data, o, validation=data)

    with pytest.raises(UsageError, match=told):
        session()
