"""The training graph of a plan, rebuilt from the plan and its model file."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from ..ir.autodiff import build_training
from ..ir.channels import reordered
from ..ir.errors import GraphError, UsageError
from ..ir.graph import Graph
from ..ir.onnx_import import import_model
from ..ir.precision import lower, quantizable
from ..ir.quantization import Quantization
from ..ir.streaming import stream
from ..ir.training import Candidate, TrainingGraph, TrainingSpec
from .plan import Plan


def rebuild(plan: Plan, plan_path: Path, model_path: Path | None = None) -> TrainingGraph:
    """Import the plan's model again and build the graph whose nodes the plan's steps name.

    Args:
        plan: A loaded plan.
        plan_path: Its file; ``plan.model.file`` is relative to the folder.
        model_path: Model file to use instead.

    Raises:
        UsageError: The model file is missing or is not the one that was planned (SHA-256), or
            the plan's scales do not fit it.
        UnsupportedModelError: It can't be imported.
    """
    graph = as_planned(plan, forward_of(plan, plan_path, model_path))
    return build_training(graph, spec_of(plan), updates_of(plan))


def as_planned(plan: Plan, forward: Graph) -> Graph:
    """An imported model in the plan's order of channels and precisions, its blocks by rows.

    Raises:
        UsageError: The plan's channels or precisions do not fit it.
    """
    return in_precisions(plan, reordered(forward, plan.model.channels))


def in_precisions(plan: Plan, forward: Graph) -> Graph:
    """An imported model in the plan's precisions, its blocks by rows; channels stay as they are.

    Raises:
        UsageError: The plan's precisions do not fit it.
    """
    if not forward.quantization:
        return forward
    names = {*quantizable(forward), *(v.name for v in forward.inputs)}
    chosen = {n: p for n, p in plan.decisions.precision.items() if n in names}
    return stream(lower(forward, chosen), plan.decisions.streamed)


def spec_of(plan: Plan) -> TrainingSpec:
    """What a training step of a plan is."""
    return TrainingSpec(**plan.training.model_dump())


def updates_of(plan: Plan) -> list[Candidate]:
    """The update set of a plan."""
    return [
        Candidate(u.param, u.channels, u.saved, u.state)
        for u in plan.decisions.updates
        if u.ratio > 0
    ]


def forward_of(plan: Plan, plan_path: Path, model_path: Path | None = None) -> Graph:
    """The plan's imported model with its scales, in the file's order of channels.

    Arguments and errors are those of ``rebuild``.
    """
    path = model_of(plan, plan_path, model_path)
    if not path.is_file():
        raise UsageError(f"{path}: the plan's model file is missing; give it with --model")
    found = file_sha256(path)
    if found != plan.model.sha256:
        raise UsageError(
            f"{path}: not the planned model (SHA-256 {found[:12]}…, planned"
            f" {plan.model.sha256[:12]}…); give the right one with --model, or plan again"
        )
    return imported(plan, path, head=plan.model.head)


def model_of(plan: Plan, plan_path: Path, model_path: Path | None = None) -> Path:
    """Where the plan's model file is."""
    return model_path or plan_path.parent / plan.model.file


def imported(plan: Plan, path: Path, *, head: int | None = None) -> Graph:
    """A model file as the plan reads it, with the plan's scales.

    Raises:
        UsageError: The plan's scales do not fit it.
        UnsupportedModelError: It can't be imported.
    """
    graph = import_model(path, replace(plan.model.importing, head=head))
    if plan.quantization:
        _annotate(graph, plan)
    return graph


def _annotate(graph: Graph, plan: Plan) -> None:
    """Give a graph the scales that were found when it was planned."""
    if plan.quantization.keys() & graph.quantization.keys():
        raise UsageError(
            f"the plan holds scales, but {graph.name} brings its own; plan the model again"
        )
    for name, q in plan.quantization.items():
        try:
            if name not in graph.values:
                raise GraphError("the model has no such value")
            graph.quantization[name] = Quantization(q.scale, q.zero_point, q.axis)
            graph.verify()
        except GraphError as e:
            raise UsageError(f"quantization of {name}: {e}; plan the model again") from None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
