"""Checked plans that the tests of checker and back ends share, made once per process."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import nets
import plans

from odt_plan.ir.graph import Graph
from odt_plan.ir.training import Candidate, TrainingGraph, TrainingSpec
from odt_plan.planner.check import CheckReport, check
from odt_plan.planner.device import load_device
from odt_plan.planner.plan import Plan


@dataclass(frozen=True)
class Exhibit:
    """A plan, the training graph that it executes, and the forward graph that was trained."""

    forward: Graph
    training: TrainingGraph
    plan: Plan

    def report(self) -> CheckReport:
        return check(self.plan, self.training, load_device(plans.BOARD))


#: Name -> network, training, fraction of keep-all's live bytes (None: the keep-all plan), storage.
RECIPES: dict[str, tuple[str, TrainingSpec, float | None, str | None]] = {
    "mlp-sgd": ("mlp", TrainingSpec(), None, None),
    "cnn-momentum": ("cnn", TrainingSpec(optimizer="momentum"), None, None),
    "mlp-adagrad": ("mlp", TrainingSpec(optimizer="adagrad"), None, None),
    "resnet-adam-accumulate": (
        "resnet", TrainingSpec(optimizer="adam", micro_batches=3), None, None
    ),
    "cnn-mse-batch": ("cnn-batch", TrainingSpec(loss="mse"), None, None),
    "partial-momentum": ("cnn-partial", TrainingSpec(optimizer="momentum"), None, None),
    "partial-accumulate": (
        "cnn-partial", TrainingSpec(optimizer="adam", micro_batches=2), 1.0, None
    ),
    "recompute": ("cnn", TrainingSpec(), 0.8, None),
    "recompute-accumulate": ("resnet", TrainingSpec(micro_batches=2), 0.75, None),
    "paged": ("resnet", TrainingSpec(), 0.5, "sdcard"),
    "paged-accumulate": (
        "resnet", TrainingSpec(optimizer="momentum", micro_batches=2), 0.6, "sdcard"
    ),
    "views": ("views", TrainingSpec(), 0.65, "sdcard"),
    # by transfers beside the core
    "overlapped": ("resnet", TrainingSpec(), 0.6, "sdram"),
    "overlapped-card": ("resnet", TrainingSpec(), 0.5, "sdcard"),
    "overlapped-accumulate": ("views", TrainingSpec(micro_batches=2), 0.65, "sdram"),
}  # fmt: skip


def forward_of(kind: str) -> Graph:
    if kind == "mlp":
        return nets.mlp()
    if kind == "resnet":
        return nets.resnet()
    if kind == "views":
        return nets.views()
    return nets.cnn(batch=2 if kind == "cnn-batch" else 1)


def chosen_for(kind: str, forward: Graph) -> list[Candidate]:
    if kind == "cnn-partial":
        return [Candidate("conv1.weight", 2), Candidate("conv2.bias"), Candidate("fc.weight", 36)]
    return plans.whole(forward)


@cache
def exhibit(name: str) -> Exhibit:
    kind, spec, fraction, storage = RECIPES[name]
    forward = forward_of(kind)
    training = plans.training_of(forward, spec, chosen_for(kind, forward))
    plan = plans.keep_all(training)
    if fraction is not None:
        ram = plan.claims.ram_bytes
        limit = int(ram.live_peak * fraction) + ram.total - ram.arena
        overlap = name.startswith("overlapped")
        plan = plans.squeezed(
            forward, training, ram_bytes=limit, storage=storage, overlap=overlap
        )
    return Exhibit(forward, training, plan)
