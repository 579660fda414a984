"""Adapting to an unseen speaker with 50 clips: int8 training against fp32 training, on real data.

A network of depthwise-separable convolutions learns spoken digits from three speakers (in fp32, by
the project's own training graphs), is quantized with clips of these speakers, and adapted to the
fourth, one clip at a time by plain SGD, as a microcontroller does it. The step size of each variant
is chosen from a grid on speaker 0; the results are those of the other speakers, each in turn the
fourth, so that no test clip has chosen anything.

    python -m benchmarks.adaptation
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from odt_plan.backends.numpy import Runtime
from odt_plan.backends.numpy.data import stored_sample
from odt_plan.ir.autodiff import build_training, candidates
from odt_plan.ir.calibrate import calibrate
from odt_plan.ir.graph import Array, Graph
from odt_plan.ir.import_options import ImportOptions
from odt_plan.ir.interpreter import run
from odt_plan.ir.onnx_import import import_model
from odt_plan.ir.opdef import get_op
from odt_plan.ir.parameter_steps import steps
from odt_plan.ir.precision import Precision, all_i8, lower, mixable
from odt_plan.ir.training import TrainingGraph, TrainingSpec, Update
from odt_plan.planner.device import load_device
from odt_plan.planner.pipeline import PlannedModel, Request, make_plan
from odt_plan.planner.train_set import choose

from .build_models import Network
from .matrix_kernels import execute
from .models import shared

DATA = "spoken_digits_logmel.npz"
DEVICE = "nrf52840"
CLASSES = 10
#: Clips that are predicted at a time.
TESTED = 50
#: Speaker that step sizes are chosen on.
VALIDATION = 0
#: Quantized networks whose scales are compared.
PUBLISHED = (
    "mbv2-w0.35-head10-qdq",
    "mcunet-5fps-head10-qdq",
    "proxyless-w0.3-head10-qdq",
    "mlperf_resnet8_int8",
    "mlperf_dscnn_kws_int8",
)
#: Share of the updates in which the step size rises.
RISING = 0.25
Execute = Callable[[Graph, Mapping[str, Array]], dict[str, Array]]
Ints = NDArray[np.int64]


# --- the experiment -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clips:
    """Labelled log-mel spectrograms: x f32 [n, 1, frames, bands], digit and speaker [n]."""

    x: NDArray[np.float32]
    digit: NDArray[np.int32]
    speaker: Ints

    def of(self, speaker: int) -> Ints:
        """Clips of a speaker."""
        return np.flatnonzero(self.speaker == speaker)

    def others(self, speaker: int) -> Ints:
        """Clips of all others."""
        return np.flatnonzero(self.speaker != speaker)


def load(path: Path) -> Clips:
    """The data set, standardized by two rounded constants."""
    with np.load(path, allow_pickle=False) as data:
        x = (data["x"].astype(np.float32) + np.float32(8.8)) / np.float32(5.8)
        return Clips(x[:, None], data["digit"].astype(np.int32), data["speaker"].astype(np.int64))


@dataclass(frozen=True)
class Setup:
    """Sizes of the experiment.

    Attributes:
        stem: Filters of the first layer, 5 x 3, stride 2.
        blocks: Filters and stride of each depthwise and pointwise pair.
        batch: Clips per step of the pretraining.
        pretrained: Passes over the other speakers' clips.
        per_digit: Clips of each digit that are adapted to; the rest is tested.
        epochs: Passes over them.
        seeds: Draws of these clips, per speaker.
        grid_seeds: Draws that each step size is tried on.
        calibrated: Clips of the other speakers that ranges are found from.
    """

    stem: int = 24
    blocks: tuple[tuple[int, int], ...] = ((32, 1), (48, 2), (48, 1), (64, 2))
    batch: int = 32
    pretrained: int = 8
    per_digit: int = 5
    epochs: int = 8
    seeds: int = 5
    grid_seeds: int = 5
    calibrated: int = 100


@dataclass(frozen=True)
class Variant:
    """One way to adapt.

    Attributes:
        precision: Of every layer.
        updated: Parameters that learn: all, or those of the last layer.
        rates: Step sizes to choose from.
        spec: How integers are updated.
    """

    name: str
    precision: Precision
    rates: tuple[float, ...]
    updated: Literal["all", "last"] = "all"
    spec: TrainingSpec = field(default_factory=TrainingSpec)


FINE = (0.006, 0.009, 0.013, 0.02, 0.03)
VARIANTS = (
    Variant("fp32", "f32", FINE),
    Variant("fp32, last layer only", "f32", (0.0025, 0.005, 0.01, 0.02, 0.04), "last"),
    Variant("mixed: f32 weights, i8 activations", "mixed", FINE),
    Variant("**int8, QAS**", "i8", FINE),
    Variant("int8, QAS, rounded to nearest", "i8", FINE, spec=TrainingSpec(rounding="nearest")),
    Variant(
        "int8 without QAS",
        "i8",
        (1.0, 10.0, 100.0, 300.0, 600.0, 1000.0),
        spec=TrainingSpec(qas=False),
    ),
)


# --- training and testing -------------------------------------------------------------------------


class Learner:
    """Parameters that learn by a training graph.

    Attributes:
        state: Updated parameters and optimizer tensors by name, as they are stored.
    """

    def __init__(self, training: TrainingGraph, execute: Execute = execute) -> None:
        """``execute`` runs a graph: matrix kernels, or the interpreter for exact order."""
        self.training, self.execute, self.updates = training, execute, 0
        self.state: dict[str, Array] = {}
        for u in training.updates:
            self.state[u.value.name] = training.graph.constants[u.value.name]
            for v in u.states:
                self.state[v.name] = np.zeros(v.type.shape, np.float32)

    def step(self, x: Array, y: Array, rate: float) -> None:
        """One update by one batch; Adam's step size has its first bias correction in it."""
        t, spec = self.training, self.training.spec
        self.updates += 1
        hyper = [rate, 1.0, self.updates]
        if spec.optimizer == "adam":
            hyper[1] /= np.sqrt(1 - spec.beta2**self.updates)
            hyper.append(rate / (1 - spec.beta1**self.updates))
        fed = {t.sample.name: x, t.target.name: y, t.hyper.name: np.array(hyper, np.float32)}
        env = self.execute(t.graph, {**fed, **self.state})
        for u in t.updates:
            for v, new in zip((u.value, *u.states), u.apply_node.outputs, strict=True):
                self.state[v.name] = env[new.name]

    @property
    def state_bytes(self) -> int:
        """RAM of the updated parameters and the optimizer's tensors."""
        return sum(a.nbytes for a in self.state.values())


def stored(graph: Graph, x: NDArray[np.float32]) -> Array:
    """Clips as the graph's input stores them."""
    return stored_sample(x, replace(graph.inputs[0].type, shape=x.shape), "x")


def accuracy(graph: Graph, state: Mapping[str, Array], x: Array, digit: Array) -> float:
    """Share of right predictions by a graph of any batch; the state replaces its constants."""
    size, hits = graph.inputs[0].type.shape[0], 0
    for i in range(0, len(x), size):
        part = x[i : i + size]
        whole = np.concatenate([part, np.repeat(part[:1], size - len(part), 0)])
        env = execute(graph, {graph.inputs[0].name: whole, **state})
        prediction = env[graph.outputs[0].name].argmax(axis=1)[: len(part)]
        hits += int((prediction == digit[i : i + size]).sum())
    return hits / len(x)


def network(setup: Setup, clips: Clips) -> onnx.ModelProto:
    """Untrained, with biases in place of normalization."""
    _, _, frames, bands = clips.x.shape
    net = Network("spoken_digits", (1, frames, bands), batchnorm=False, seed=0)
    net.conv("stem", setup.stem, (5, 3), 2)
    net.relu("stem.act")
    for i, (filters, stride) in enumerate(setup.blocks):
        net.conv(f"b{i}.dw", net.channels, 3, stride, depthwise=True)
        net.relu(f"b{i}.dw.act")
        net.conv(f"b{i}.pw", filters)
        net.relu(f"b{i}.pw.act")
    net.classify(CLASSES)
    return net.model()


def pretrain(setup: Setup, clips: Clips, speaker: int, path: Path) -> None:
    """Train on all other speakers by Adam, the step size falling as a cosine; write the model."""
    model, batch = network(setup, clips), setup.batch
    path.write_bytes(model.SerializeToString())
    graph = import_model(path, ImportOptions(batch=batch))
    learner = Learner(training(graph, "all", TrainingSpec(optimizer="adam")))
    rng, known = np.random.default_rng(speaker), clips.others(speaker)
    order = np.concatenate([rng.permutation(known) for _ in range(setup.pretrained)])
    steps = len(order) // batch
    for i in range(steps):
        chosen = order[i * batch : (i + 1) * batch]
        rate = 0.002 * (1 + np.cos(np.pi * i / steps))
        learner.step(clips.x[chosen], clips.digit[chosen], rate)
    for tensor in model.graph.initializer:
        if tensor.name in learner.state:
            tensor.CopyFrom(numpy_helper.from_array(learner.state[tensor.name], tensor.name))
    path.write_bytes(model.SerializeToString())


def training(graph: Graph, updated: Literal["all", "last"], spec: TrainingSpec) -> TrainingGraph:
    """All parameters, or those of the last layer, whole."""
    chosen = choose(graph, (updated,), candidates(graph))
    assert chosen is not None
    return build_training(graph, spec, chosen)


# --- adapting -------------------------------------------------------------------------------------


class Speaker:
    """A speaker whom the network has not heard.

    Attributes:
        model: The network that the other speakers taught.
        samples: Clips of these that ranges are found from.
    """

    def __init__(self, setup: Setup, clips: Clips, number: int, folder: Path) -> None:
        """Pretrain, calibrate."""
        self.setup, self.clips, self.number = setup, clips, number
        self.model = folder / f"speaker{number}.onnx"
        pretrain(setup, clips, number, self.model)
        known = np.random.default_rng(number).permutation(clips.others(number))
        self.samples = clips.x[known[: setup.calibrated]]
        self.graph = import_model(self.model)
        calibrate(self.graph, self.samples)
        self.tested = import_model(self.model, ImportOptions(batch=TESTED, fold_batchnorm=True))
        self.tested.quantization.update(self.graph.quantization)

    def lowered(self, precision: Precision, *, tested: bool = False) -> Graph:
        """The network in a precision, for one clip or for tests."""
        graph = self.tested if tested else self.graph
        if precision == "f32":
            return graph
        chosen = all_i8(graph, inputs=True)
        if precision == "mixed":
            chosen |= dict.fromkeys(mixable(graph), precision)
        return lower(graph, chosen)

    def split(self, seed: int) -> tuple[Ints, Ints]:
        """Clips to adapt to, as many of each digit; clips to test with."""
        rng, own = np.random.default_rng((self.number, seed)), self.clips.of(self.number)
        digits = [rng.permutation(own[self.clips.digit[own] == d]) for d in range(CLASSES)]
        drawn = np.concatenate([d[: self.setup.per_digit] for d in digits])
        return drawn, np.setdiff1d(own, drawn)

    def steps(self, rate: float, seed: int) -> list[tuple[int, float]]:
        """Clip and step size of each update: up to the rate for a quarter of them, then down to 0.

        From the full step size at once some runs never recover from their first clips.
        """
        rng, (drawn, _) = np.random.default_rng(seed), self.split(seed)
        order = np.concatenate([rng.permutation(drawn) for _ in range(self.setup.epochs)])
        share = (np.arange(len(order)) + 1) / len(order)
        factor = np.minimum(share / RISING, (1 - share) / (1 - RISING))
        return list(zip(order.tolist(), (rate * factor).tolist(), strict=True))

    def untouched(self, precision: Precision, seed: int) -> float:
        """Accuracy before any adaptation."""
        return self._accuracy(precision, {}, seed)

    def adapt(
        self, variant: Variant, rate: float, seed: int, execute: Execute = execute
    ) -> tuple[Learner, float]:
        """Adapt, then test: what was learned, and its accuracy."""
        graph = self.lowered(variant.precision)
        learner = Learner(training(graph, variant.updated, variant.spec), execute)
        x = stored(graph, self.clips.x)
        with np.errstate(all="ignore"):  # too large a step size ends in NaN and is not chosen
            for i, step in self.steps(rate, seed):
                learner.step(x[i : i + 1], self.clips.digit[i : i + 1], step)
            return learner, self._accuracy(variant.precision, learner.state, seed)

    def _accuracy(self, precision: Precision, state: Mapping[str, Array], seed: int) -> float:
        graph, (_, rest) = self.lowered(precision, tested=True), self.split(seed)
        x = stored(graph, self.clips.x[rest])
        return accuracy(graph, state, x, self.clips.digit[rest])

    # ---- by a plan

    def plan(self, variant: Variant) -> PlannedModel:
        """A checked plan for the board, one clip per update."""
        samples, floats = self.model.with_suffix(".npz"), variant.precision == "f32"
        np.savez(samples, x=self.samples)
        return make_plan(
            Request(
                self.model,
                load_device(DEVICE),
                spec=variant.spec,
                train=(variant.updated,),
                precision=() if floats else (f"*={variant.precision}",),
                calibration=None if floats else samples,
                with_baselines=False,
            )
        )

    def adapt_by_plan(
        self, planned: PlannedModel, rate: float, seed: int
    ) -> tuple[dict[str, Array], float]:
        """``adapt`` inside the arena of a plan: the learned real numbers, and their accuracy."""
        runtime, steps = Runtime(planned.plan, planned.training), self.steps(rate, seed)
        for i, step in steps:
            runtime.train_step(self.clips.x[i : i + 1], self.clips.digit[i : i + 1], step)
        _, rest = self.split(seed)
        found = np.array([runtime.infer(self.clips.x[i : i + 1])[0].argmax() for i in rest])
        return runtime.params(), float(np.mean(found == self.clips.digit[rest]))


# --- tables ---------------------------------------------------------------------------------------


class Study:
    """All variants on all speakers.

    Attributes:
        tried: Accuracies on the speaker that step sizes are chosen on, by variant, [rate, seed].
        rates: The chosen step sizes.
        results: Accuracies by variant, [speaker, seed].
    """

    def __init__(self, setup: Setup, clips: Clips, folder: Path) -> None:
        """Pretrain, choose, adapt."""
        numbers = np.unique(clips.speaker).tolist()
        speakers = {n: Speaker(setup, clips, n, folder) for n in numbers}
        validation = speakers.pop(VALIDATION)
        self.setup, self.speakers = setup, speakers
        self.tried: dict[str, NDArray[np.float64]] = {}
        self.rates: dict[str, float] = {}
        self.results: dict[str, NDArray[np.float64]] = {}
        for v in VARIANTS:
            tried = np.array(
                [[validation.adapt(v, r, s)[1] for s in range(setup.grid_seeds)] for r in v.rates]
            )
            best = v.rates[cautious(tried)]
            self.tried[v.name], self.rates[v.name] = tried, best
            self.results[v.name] = np.array(
                [
                    [speaker.adapt(v, best, s)[1] for s in range(setup.seeds)]
                    for speaker in speakers.values()
                ]
            )

    def untouched(self, precision: Precision) -> NDArray[np.float64]:
        """Accuracies before any adaptation, [speaker, seed]."""
        return np.array(
            [
                [speaker.untouched(precision, s) for s in range(self.setup.seeds)]
                for speaker in self.speakers.values()
            ]
        )

    def rows(self) -> Iterator[str]:
        """Markdown: a row per variant."""
        numbers = list(self.speakers)
        yield (
            f"| variant | step size | {' | '.join(f'speaker {n}' for n in numbers)} | mean |"
            " minus fp32, points | state B | RAM B |"
        )
        yield "|---" * (len(numbers) + 6) + "|"
        for precision in ("f32", "i8"):
            yield _row(f"no adaptation, {precision}", "", self.untouched(precision), "", "", "")
        reference = self.results[VARIANTS[0].name]
        for v in VARIANTS:
            found = self.results[v.name]
            points = 100 * (found - reference)
            error = points.std(ddof=1) / np.sqrt(points.size)
            ram = self.speakers[numbers[0]].plan(v).plan.claims.ram_bytes
            difference = "" if found is reference else f"{points.mean():+.1f} ± {error:.1f}"
            kept = f"{ram.total - ram.arena:,}", f"{ram.total:,}"
            yield _row(v.name, f"{self.rates[v.name]:g}", found, difference, *kept)

    def tried_rows(self) -> Iterator[str]:
        """Markdown: what each step size reached on the speaker that it is chosen on."""
        yield f"| variant | step size: accuracy in % on speaker {VALIDATION} |"
        yield "|---|---|"
        for v in VARIANTS:
            pairs = zip(v.rates, self.tried[v.name].mean(axis=1), strict=True)
            yield f"| {v.name} | {', '.join(f'{r:g}: {100 * a:.1f}' for r, a in pairs)} |"

    def by_plan(self, variant: Variant) -> str:
        """One run through a plan against one without, by the same kernels.

        Raises:
            AssertionError: They learn different numbers.
        """
        speaker, rate = next(iter(self.speakers.values())), self.rates[variant.name]
        planned = speaker.plan(variant)
        learned, planned_accuracy = speaker.adapt_by_plan(planned, rate, 0)
        learner, free_accuracy = speaker.adapt(variant, rate, 0, run)
        for u in learner.training.updates:
            real = real_parameter(u, learner.state[u.value.name])
            assert np.array_equal(learned[u.candidate.param], real), u.candidate.param
        assert planned_accuracy == free_accuracy
        ram = planned.plan.claims.ram_bytes
        return (
            f"{variant.name.strip('*')} of speaker {speaker.number}, seed 0, inside the"
            f" {ram.total:,} B of its plan for {DEVICE}: {100 * planned_accuracy:.1f} %, and the"
            " same weights bit for bit as without a plan"
            f" (by matrix products: {100 * self.results[variant.name][0, 0]:.1f} %)."
        )


def real_parameter(update: Update, data: Array) -> Array:
    """The numbers that a learned parameter means."""
    if data.dtype == np.float32:
        return data
    (slot,) = (
        s for s in get_op(update.owner.op).params if update.owner.inputs[s.index] is update.value
    )
    size = steps(update.owner, slot).reshape(-1, *(1,) * (data.ndim - 1))
    return np.asarray(data * size, np.float32)


def cautious(tried: NDArray[np.float64]) -> int:
    """The smallest step size that isn't worse than the best by more than one standard error.

    The rule of Breiman et al. (Classification and Regression Trees, 1984), on paired runs: near the
    step size with the best mean some runs of other speakers never recover.

    Args:
        tried: Accuracies, [step size in rising order, run].
    """
    behind = tried[tried.mean(axis=1).argmax()] - tried
    runs = tried.shape[1]
    error = behind.std(axis=1, ddof=1) / np.sqrt(runs) if runs > 1 else np.zeros(len(tried))
    return int(np.argmax(behind.mean(axis=1) <= error))


def _row(name: str, rate: str, found: NDArray[np.float64], *rest: str) -> str:
    """A variant: mean and standard deviation over the seeds, then the mean of all."""
    cells = [f"{100 * a.mean():.1f} ± {100 * a.std(ddof=1):.1f}" for a in found]
    return f"| {' | '.join([name, rate, *cells, f'{100 * found.mean():.1f}', *rest])} |"


def spread(graph: Graph) -> float:
    """Largest squared scale of a layer's weights over the smallest, means over the channels."""
    weights = [n.inputs[1] for n in graph.nodes if n.op in ("Conv", "Gemm")]
    scales = [graph.quantization[w.name].scale for w in weights if w is not None]
    squares = [np.exp(2 * np.log(s).mean()) for s in scales]
    return float(max(squares) / min(squares))


def _spreads(graph: Graph, folder: Path) -> str:
    paths = [folder / "models" / f"{name}.onnx" for name in PUBLISHED]
    others = [f"{p.stem} {spread(import_model(p)):,.0f}" for p in paths if p.is_file()]
    return (
        "Without QAS a step of the integers moves the real weight by the squared scale: one step"
        " size then means another one in each layer. Between the layers of this network these"
        f" differ by a factor of {spread(graph):.0f}, as it was trained from alike layers without"
        f" normalization; in published quantized networks by more ({', '.join(others)})."
    )


def adaptation_table() -> Iterator[str]:
    """Markdown rows: accuracy of each variant, the step sizes that were tried, a run by a plan."""
    yield "### Adapting to an unseen speaker with 50 clips: int8 training against fp32 training"
    yield ""
    folder = shared()
    if folder is None or not (folder / "data" / DATA).is_file():
        yield f"{DATA} is not at hand."
        return
    setup = Setup()
    with tempfile.TemporaryDirectory() as place:
        study = Study(setup, load(folder / "data" / DATA), Path(place))
        yield (
            f"Spoken digits of four speakers, {setup.seeds} draws of {setup.per_digit} clips per"
            " digit; % of the speaker's other clips that are recognized, mean ± standard deviation"
            " over the draws; differences of paired runs ± standard error."
            f" {setup.epochs} passes of SGD over the clips one by one, the step size rising for a"
            " quarter of them, then falling to 0; its top is the smallest"
            f" within a standard error of the best on speaker {VALIDATION} (below; mean of"
            f" {setup.grid_seeds} draws). State: what learning keeps"
            f" in RAM; RAM: all of the plan for {DEVICE}. Ranges from {setup.calibrated} clips of"
            " the known speakers."
        )
        yield ""
        yield from study.rows()
        yield ""
        yield study.by_plan(next(v for v in VARIANTS if "QAS" in v.name))
        yield ""
        yield from study.tried_rows()
        yield ""
        yield _spreads(next(iter(study.speakers.values())).graph, folder)


def main() -> None:
    """Print the tables."""
    begin = time.process_time()
    for line in adaptation_table():
        print(line, flush=True)
    print(f"{time.process_time() - begin:.0f} s of processor time")


if __name__ == "__main__":
    main()
