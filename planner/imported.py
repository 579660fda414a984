"""The model of a request as it is planned: imported, with its scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..ir.calibrate import SYNTHETIC, calibrate, knows_activations, load_samples
from ..ir.errors import UnsupportedModelError, UsageError
from ..ir.graph import Graph
from ..ir.onnx_import import import_model
from ..ir.sample import array_names
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
    samples = None
    if r.calibration != SYNTHETIC:
        samples = load_samples(r.calibration, array_names(forward.inputs))
    found = calibrate(forward, samples, method=r.calibration_method)
    note = found.note if r.calibration == SYNTHETIC else f"{found.note} of {r.calibration.name}"
    return Imported(forward, in_file, found.weight_noise, note)


def _check_batch(r: Request, forward: Graph) -> None:
    """The first axis of an input runs over samples, as in recurrent layers it may not."""
    batch = r.importing.batch
    for x in forward.inputs:
        if x.type.shape and x.type.shape[0] != batch:
            raise UnsupportedModelError(
                f"{r.model}: the first axis of the input {x.name}, {x.type}, is not a batch of"
                f" {batch}; use --batch {x.type.shape[0]} if it is one of that size, else export"
                " the model with the batch first (PyTorch: batch_first=True)"
            )
        if not x.type.shape and len(forward.inputs) > 1:
            raise UnsupportedModelError(
                f"{r.model}: the input {x.name} is one number, not one per sample; bind it to a"
                " constant"
            )
    target = None if forward.loss is None else forward.loss.inputs[1]
    if target is not None and target.type.shape[:1] != (batch,):
        raise UnsupportedModelError(
            f"{r.model}: the first axis of the target {target.name}, {target.type}, is not the"
            f" batch of {batch}; export the model with one target per sample"
        )
