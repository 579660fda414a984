"""The model of a request as it is planned: imported, with its scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..ir.calibrate import SYNTHETIC, calibrate, knows_activations, load_samples
from ..ir.errors import UnsupportedModelError, UsageError
from ..ir.graph import Graph
from ..ir.onnx_import import import_model
from .progress import Watch

if TYPE_CHECKING:
    from .pipeline import Request


@dataclass(frozen=True)
class Imported:
    """A forward graph that knows its scales.

    Attributes:
        forward: Annotated where scales are known.
        in_file: Values whose scales stand in the model file.
        noise: Layer -> squared error of its i8 weights, relative to its result's square.
        scales: Where the scales come from; empty for a model without.
    """

    forward: Graph
    in_file: frozenset[str]
    noise: Mapping[str, float]
    scales: str


def import_requested(r: Request, watch: Watch) -> Imported:
    """Import the model and find the scales that the file lacks, if wanted.

    Raises:
        UnsupportedModelError: The model can't be imported, or its samples lie along another axis.
        UsageError: It brings its own scales, but others are asked for, or the samples are wrong.
    """
    forward = import_model(r.model, r.importing)
    _check_batch(r, forward)
    in_file = frozenset(forward.quantization)
    known = knows_activations(forward)
    if r.calibration is None:
        note = "scales from the model file" if known else ""
        if in_file and not known:
            note = (
                "the model file has scales of weights alone, so every layer is f32; give samples"
                " with --calib for i8"
            )
        return Imported(forward, in_file, {}, note)
    if known:
        raise UsageError(
            f"--calib: {r.model} is quantized already and brings its own scales; leave --calib"
            " out, or give the float model"
        )
    watch.stage("calibrating")
    samples = None if r.calibration == SYNTHETIC else load_samples(r.calibration)
    found = calibrate(forward, samples, method=r.calibration_method)
    note = found.note if r.calibration == SYNTHETIC else f"{found.note} of {r.calibration.name}"
    return Imported(forward, in_file, found.weight_noise, note)


def _check_batch(r: Request, forward: Graph) -> None:
    """The first axis of the input runs over samples, as in recurrent layers it may not."""
    if len(forward.inputs) != 1:
        return  # training says why not
    (x,) = forward.inputs
    batch = r.importing.batch
    if x.type.shape and x.type.shape[0] != batch:
        raise UnsupportedModelError(
            f"{r.model}: the first axis of the input {x.name}, {x.type}, is not a batch of"
            f" {batch}; use --batch {x.type.shape[0]} if it is one of that size, else export the"
            " model with the batch first (PyTorch: batch_first=True)"
        )
