"""Plan on-device training: what to update, keep, recompute or page under a device's limits.

The names below are the public API; they are imported on first use, so that ``import odt_plan`` and
``odt-plan --help`` stay fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .backends.c import emit_c
    from .backends.numpy import Runtime, train
    from .ir.errors import (
        GraphError,
        InfeasibleError,
        OdtPlanError,
        UnsupportedModelError,
        UsageError,
    )
    from .ir.import_options import ImportOptions
    from .ir.onnx_import import import_model
    from .ir.trainability import trainability
    from .ir.training import TrainingSpec
    from .planner.check import CheckReport, check
    from .planner.device import Device, device_ids, load_device
    from .planner.pipeline import PlannedModel, Request, make_plan
    from .planner.plan import Plan, load_plan
    from .planner.rebuild import rebuild

_HOME = {
    "emit_c": "backends.c",
    "Runtime": "backends.numpy",
    "train": "backends.numpy",
    "GraphError": "ir.errors",
    "InfeasibleError": "ir.errors",
    "OdtPlanError": "ir.errors",
    "UnsupportedModelError": "ir.errors",
    "UsageError": "ir.errors",
    "ImportOptions": "ir.import_options",
    "import_model": "ir.onnx_import",
    "trainability": "ir.trainability",
    "TrainingSpec": "ir.training",
    "CheckReport": "planner.check",
    "check": "planner.check",
    "Device": "planner.device",
    "device_ids": "planner.device",
    "load_device": "planner.device",
    "PlannedModel": "planner.pipeline",
    "Request": "planner.pipeline",
    "make_plan": "planner.pipeline",
    "Plan": "planner.plan",
    "load_plan": "planner.plan",
    "rebuild": "planner.rebuild",
}

__all__ = [
    "CheckReport",
    "Device",
    "GraphError",
    "ImportOptions",
    "InfeasibleError",
    "OdtPlanError",
    "Plan",
    "PlannedModel",
    "Request",
    "Runtime",
    "TrainingSpec",
    "UnsupportedModelError",
    "UsageError",
    "__version__",
    "check",
    "device_ids",
    "emit_c",
    "import_model",
    "load_device",
    "load_plan",
    "make_plan",
    "rebuild",
    "train",
    "trainability",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
