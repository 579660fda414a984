"""The benchmark of adaptation, on small synthetic clips: every part of it, and what it shows."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from op_cases import Case, cases

from odt_plan.ir.interpreter import run
from odt_plan.ir.training import TrainingSpec

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import adaptation
from benchmarks.adaptation import CLASSES, VARIANTS, Clips, Setup, Speaker, Study, Variant
from benchmarks.matrix_kernels import KERNELS, execute

RATE = 0.01
SETUP = Setup(
    stem=8,
    blocks=((12, 1), (16, 2)),
    batch=8,
    pretrained=12,
    per_digit=2,
    epochs=6,
    seeds=2,
    grid_seeds=1,
    calibrated=20,
)
NAMES = [v.name for v in VARIANTS]


def clips(speakers: int = 3, takes: int = 12) -> Clips:
    """Smooth patterns per digit; a speaker shifts them along the bands and has a timbre."""
    rng, shape = np.random.default_rng(0), (17, 10)
    coarse = rng.standard_normal((CLASSES, 6, 5))
    patterns = coarse.repeat(3, axis=1)[:, : shape[0]].repeat(2, axis=2)
    timbre = rng.standard_normal((speakers, 1, shape[1]))
    x, digit, speaker = [], [], []
    for s in range(speakers):
        for d in range(CLASSES):
            heard = np.roll(patterns[d], s, axis=1) + timbre[s]
            x.append(heard + 0.3 * rng.standard_normal((takes, *shape)))
            digit += [d] * takes
            speaker += [s] * takes
    data = np.concatenate(x)[:, None].astype(np.float32)
    return Clips(data, np.array(digit, np.int32), np.array(speaker))


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Speaker:
    return Speaker(SETUP, clips(), 1, tmp_path_factory.mktemp("speaker"))


def variant(name: str) -> Variant:
    return next(v for v in VARIANTS if v.name == name)


FP32, INT8 = variant("fp32"), variant("**int8, QAS**")


@pytest.mark.parametrize("case", [c for c in cases() if c.op.name in KERNELS], ids=lambda c: c.name)
def test_matrix_products_mean_the_same(case: Case) -> None:
    data = case.data()
    (want,), (got,) = case.op.kernel(case.node, data), KERNELS[case.op.name](case.node, data)
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    if got.dtype == np.int8:  # a sum may be rounded to the other side
        assert np.abs(got.astype(int) - want).max() <= 1
        assert np.mean(got != want) <= 0.01
    else:
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def test_clips_to_learn_and_to_test_are_apart(speaker: Speaker) -> None:
    data = speaker.clips
    splits = [speaker.split(seed) for seed in range(3)]
    for drawn, rest in splits:
        assert np.array_equal(np.sort(np.concatenate([drawn, rest])), data.of(1))
        assert np.bincount(data.digit[drawn]).tolist() == [SETUP.per_digit] * CLASSES
    assert len({tuple(drawn.tolist()) for drawn, _ in splits}) == 3
    assert not set(data.others(1)) & set(data.of(1))
    seen = speaker.steps(RATE, 0)
    assert np.unique([i for i, _ in seen]).tolist() == np.sort(splits[0][0]).tolist()
    sizes = [size for _, size in seen]
    assert len(seen) == SETUP.epochs * SETUP.per_digit * CLASSES
    top = int(np.argmax(sizes))
    assert sizes[top] == pytest.approx(RATE)
    assert sizes[: top + 1] == sorted(sizes[: top + 1])
    assert sizes[top:] == sorted(sizes[top:], reverse=True)
    assert (top + 1) / len(sizes) == pytest.approx(0.25)
    assert sizes[-1] == 0


def test_a_strange_speaker_is_learned_in_every_precision(speaker: Speaker) -> None:
    """int8 with QAS as well as fp32 at the same step size; without QAS that size does nothing."""
    before = speaker.untouched("f32", 0)
    assert abs(speaker.untouched("i8", 0) - before) <= 0.05
    found = {n: speaker.adapt(variant(n), RATE, 0)[1] for n in NAMES}
    fp32, without = found["fp32"], found.pop("int8 without QAS")
    assert fp32 >= before + 0.2, (before, found)
    assert min(found.values()) > before, (before, found)
    for name in ("**int8, QAS**", "mixed: f32 weights, i8 activations"):
        assert found[name] >= fp32 - 0.1, (before, found)
    assert abs(without - before) <= 0.05, (before, without)
    searched = speaker.adapt(variant("int8 without QAS"), 100.0, 0)[1]
    assert searched > before


def test_the_state_of_integers_is_small(speaker: Speaker) -> None:
    (fp32, _), (int8, _) = (speaker.adapt(v, RATE, 0) for v in (FP32, INT8))
    sizes = [(a.size, a.dtype, a.nbytes) for a in int8.state.values()]
    assert {str(d) for _, d, _ in sizes} == {"int8", "int32"}
    assert sum(n for n, _, _ in sizes) * 4 == sum(a.nbytes for a in fp32.state.values())
    assert sum(b for _, _, b in sizes) < 0.4 * sum(a.nbytes for a in fp32.state.values())


def test_the_interpreter_learns_the_same(speaker: Speaker) -> None:
    """Matrix products against kernels in exact order, where no rounding is drawn."""
    few = replace(speaker.setup, epochs=1)
    short = object.__new__(Speaker)
    short.__dict__.update(speaker.__dict__, setup=few)
    (fast, _), (exact, _) = (short.adapt(FP32, RATE, 0, e) for e in (execute, run))
    for name, data in exact.state.items():
        np.testing.assert_allclose(fast.state[name], data, rtol=1e-3, atol=1e-4)


def test_a_step_size_is_as_small_as_the_noise_allows() -> None:
    clear = np.array([[0.5, 0.6, 0.7], [0.7, 0.8, 0.91], [0.6, 0.6, 0.6]])
    assert adaptation.cautious(clear) == 1
    noisy = np.array([[0.5, 0.5, 0.5], [0.8, 0.9, 0.7], [0.9, 0.7, 0.84]])
    assert adaptation.cautious(noisy) == 1
    assert adaptation.cautious(noisy[:, :1]) == 2, "one run tells nothing of noise"


@pytest.mark.parametrize("tried", [(0.01, 0.02)])
def test_the_tables(
    tmp_path: Path, tried: Sequence[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Choose, adapt, compare, and the run through a plan, which must learn the same bits."""
    chosen = [replace(v, rates=tuple(tried)) for v in (FP32, INT8)]
    monkeypatch.setattr(adaptation, "VARIANTS", chosen)
    setup = replace(SETUP, pretrained=3, epochs=1)
    study = Study(setup, clips(takes=6), tmp_path)
    assert list(study.speakers) == [1, 2]
    for v in chosen:
        best = adaptation.cautious(study.tried[v.name])
        assert study.rates[v.name] == tried[best]
        assert study.results[v.name].shape == (2, SETUP.seeds)
        again = study.speakers[2].adapt(v, tried[best], 1)[1]
        assert study.results[v.name][1, 1] == again
    rows = list(study.rows())
    assert len({row.count("|") for row in rows}) == 1
    assert len(rows) == 2 + 2 + len(chosen)
    assert len(list(study.tried_rows())) == 2 + len(chosen)
    assert "bit for bit" in study.by_plan(chosen[1])


def test_a_plan_that_learns_something_else_is_found(
    tmp_path: Path, speaker: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison is no formality: another rounding is noticed."""
    study = object.__new__(Study)
    study.speakers, study.rates = {1: speaker}, {INT8.name: RATE}
    study.results = {INT8.name: np.zeros((1, 1))}
    planned = speaker.plan(replace(INT8, spec=TrainingSpec(rounding="nearest")))
    monkeypatch.setattr(Speaker, "plan", lambda self, v: planned)
    with pytest.raises(AssertionError, match=r"weight|bias"):
        study.by_plan(INT8)


def test_without_the_data_the_table_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(adaptation, "shared", lambda: tmp_path)
    assert list(adaptation.adaptation_table())[-1].endswith("is not at hand.")
