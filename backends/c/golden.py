"""Golden results of the reference run, as the arrays of ``<model>_selftest.c``."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...ir.errors import GraphError, OdtPlanError
from ...ir.graph import Array, Graph, TensorType, Value
from ...ir.indices import random_indices
from ...ir.sample import array_names
from ...ir.targets import random_target, target_names
from ...ir.training import TrainingGraph
from ...planner.plan import Buffer, Plan
from ..numpy import Runtime
from .ctext import rows
from .emit_call import float_literal
from .head import Head
from .sample import Input

SEED = 0
#: Elements of each state tensor that are compared within the tolerance; the checksum covers all.
ELEMENTS_PER_TENSOR = 32


@dataclass(frozen=True)
class Golden:
    """One inference and one training step (all its micro-steps) on the same random sample.

    Attributes:
        samples: Data inputs by name.
        targets: Labels or target tensors, by output.
        lr: Step size.
        predictions: Before the update, by output.
        loss: Loss before the update.
        state: State space after the update.
    """

    samples: dict[str, Array]
    targets: dict[str, Array]
    lr: float
    predictions: dict[str, Array]
    loss: np.float32
    state: bytes


def run_golden(plan: Plan, training: TrainingGraph) -> Golden:
    """Run the reference; the step size is halved until the results are finite.

    Raises:
        OdtPlanError: The results are not finite at any step size.
    """
    rng = np.random.default_rng(SEED)
    given = random_samples(training, rng)
    samples = dict(zip((v.name for v in training.samples), given.values(), strict=True))
    wanted = [random_target(training.graph, v, rng) for v in training.targets]
    target = dict(zip(target_names(training), wanted, strict=True))
    targets = dict(zip((v.name for v in training.predictions), wanted, strict=True))
    lr = np.float32(0.1)
    for _ in range(30):
        runtime = Runtime(plan, training)
        predictions = runtime.predict(given)
        losses = [
            runtime.train_step(given, target, float(lr))
            for _ in range(plan.training.micro_batches)
        ]
        state = runtime.state_bytes()
        if runtime.is_finite() and np.isfinite(losses[-1]):
            loss = np.float32(losses[-1])
            return Golden(samples, targets, float(lr), predictions, loss, state)
        lr = lr / np.float32(2)
    raise OdtPlanError(
        f"{plan.model.name}: a training step on a random sample is not finite even at step size"
        f" {lr:g}; check the weights"
    )


def random_samples(training: TrainingGraph, rng: np.random.Generator) -> dict[str, Array]:
    """A sample of each input, by the name of its array; see ``random_sample``."""
    names = array_names(training.samples)
    return {
        name: random_sample(training.graph, v, rng)
        for name, v in zip(names, training.samples, strict=True)
    }


def random_sample(graph: Graph, value: Value, rng: np.random.Generator) -> Array:
    """A sample of an input as it takes it: normal numbers, any stored values in i8, or indices.

    Raises:
        GraphError: The input is of another dtype.
    """
    kind = value.type
    if kind.dtype == "i32":
        return random_indices(graph, value, kind.shape[0], rng)
    if kind.dtype == "i8":
        return rng.integers(-128, 128, kind.shape, dtype=np.int8)
    if kind.dtype != "f32":
        raise GraphError(f"the C back end takes samples in f32, i8 or i32, not {kind.dtype}")
    return rng.standard_normal(kind.shape).astype(np.float32)


def golden_values(
    golden: Golden, inputs: Sequence[Input], heads: Sequence[Head]
) -> dict[str, str]:
    """What the template of the self-test says: arrays of results, and how they are compared."""
    types = {"i1": "int8_t", "i4": "int32_t", "f4": "float"}
    given = [(i.golden, golden.samples[i.value.name]) for i in inputs]
    given += [(h.called("golden_target"), golden.targets[h.value.name]) for h in heads]
    given += [(h.called("golden_prediction"), golden.predictions[h.value.name]) for h in heads]
    parts = [_static(name, a, types[a.dtype.str[1:]]) for name, a in given]
    predicted, compared = ["NULL"], ""
    if len(heads) > 1:
        predicted = [h.called("predicted") for h in heads]
        sizes = [h.macro("PREDICTION_SIZE") for h in heads]
        parts += [f"static float {p}[{n}];\n" for p, n in zip(predicted, sizes, strict=True)]
    parts += [
        f"static const float golden_loss = {float_literal(float(golden.loss))};\n",
        f"#define GOLDEN_STATE_CRC 0x{zlib.crc32(golden.state):08x}u\n",
    ]
    for h, p in zip(heads, predicted, strict=True):
        found = f"{h.macro('PREDICTION')}(net)" if p == "NULL" else p
        arguments = f"{found}, 1, {h.called('golden_prediction')}, {h.macro('PREDICTION_SIZE')}"
        compared += (
            f"    d = odtplan_difference({arguments});\n    worst = d > worst ? d : worst;\n"
        )
    return {
        "arrays": "\n".join(parts),
        "golden_samples": ", ".join(i.golden for i in inputs),
        "golden_targets": ", ".join(h.called("golden_target") for h in heads),
        "predicted": ", ".join(predicted),
        "compared": compared,
    }


def golden_table(golden: Golden, state: list[Buffer]) -> str:
    """Table of compared state elements, and the elements: floats, and integers of i8 and i32."""
    entries = []
    floats, integers = np.zeros(0, np.float32), np.zeros(0, np.int32)
    for b in sorted(state, key=lambda b: b.offset):
        t = TensorType(b.shape, b.dtype)
        data = np.frombuffer(golden.state, t.np_dtype, t.size, b.offset)
        stride = max(1, t.size // ELEMENTS_PER_TENSOR)
        picked = data[::stride][:ELEMENTS_PER_TENSOR]
        if b.dtype == "f32":
            width, first, floats = 0, floats.size, np.concatenate([floats, picked])
        else:
            width, first = t.nbytes // t.size, integers.size
            integers = np.concatenate([integers, picked.astype(np.int32)])
        entries.append(f"    {{{b.offset}u, {width}, {stride}, {picked.size}, {first}}},\n")
    table = f"static const tensor_t golden_tensors[{len(entries)}] = {{\n{''.join(entries)}}};\n"
    arrays = (  # C has no empty ones
        _static("golden_elements", floats if floats.size else np.zeros(1, np.float32), "float"),
        _static("golden_integers", integers if integers.size else np.zeros(1, "i4"), "int32_t"),
    )
    return "".join([*arrays, table])


def _static(name: str, data: Array, c_type: str) -> str:
    return f"static const {c_type} {name}[{data.size}] = {{\n{rows(data)}}};\n"
