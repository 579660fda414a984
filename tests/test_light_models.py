"""The nine light models of the onnx package import and plan: large networks without their weights.

``python tests/test_light_models.py`` prints a row for each. VGG19 is left to that: its weights,
which a ConstantOfShape makes, take half a gigabyte.
"""

from __future__ import annotations

import time
from pathlib import Path

import onnx
import plans
import pytest

from odt_plan.ir.training import TrainingSpec
from odt_plan.planner.device import load_device
from odt_plan.planner.pipeline import PlannedModel, Request, make_plan

FOLDER = Path(onnx.__file__).parent / "backend/test/data/light"
NAMES = sorted(path.stem.removeprefix("light_") for path in FOLDER.glob("light_*.onnx"))
#: Their classes stand on the channels of an image of one pixel.
IMAGES = ("densenet121", "squeezenet")
#: With local response normalization.
NORMALIZED = ("bvlc_alexnet", "inception_v1", "zfnet512")


def planned(name: str) -> PlannedModel:
    spec = TrainingSpec(loss="mse" if name in IMAGES else "cross_entropy")
    request = Request(
        FOLDER / f"light_{name}.onnx", load_device(plans.BOARD), ram_bytes=10**9,
        flash_bytes=10**9, train=("last",), spec=spec, with_baselines=False, time_limit_s=2,
    )  # fmt: skip
    return make_plan(request)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "vgg19"])
def test_light_model(name: str) -> None:
    result = planned(name)
    forward = [n for n in result.training.graph.nodes if n.phase == "forward"]
    assert len(forward) > 20
    assert sum(n.op == "LRN" for n in forward) == 2 * (name in NORMALIZED)
    assert len(result.training.updates) == 2
    assert 0 < result.plan.claims.ram_bytes.total < 10**8


def test_they_are_nine() -> None:
    assert len(NAMES) == 9


if __name__ == "__main__":
    for model in NAMES:
        begin = time.perf_counter()
        row = planned(model)
        count = sum(n.phase == "forward" for n in row.training.graph.nodes)
        seconds = time.perf_counter() - begin
        print(f"| {model} | {count} | {row.plan.claims.ram_bytes.total:,} | {seconds:.1f} |")
