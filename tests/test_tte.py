"""An update set of Tiny Training Engine in less memory and fewer instructions than its own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from board import lane
from qdq_exact import picture

from odt_plan.planner.pipeline import make_plan

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import tte
from benchmarks.firmware import measure


@pytest.mark.skipif(
    not (lane.has_gcc() and lane.has_qemu()), reason="needs arm-none-eabi-gcc and qemu-system-arm"
)
def test_mcunet_49kb(shared: Path) -> None:
    """Linked inside the board's limits with the MPU on; the step equals NumPy's bit for bit."""
    (rival,) = (r for r in tte.RIVALS if r.name == "mcunet-5fps, 49kb")
    planned = make_plan(tte.request(shared, rival, objective="latency", ram_bytes=150_000))
    done = measure(planned, picture(planned.training.sample.type.shape, 0), 3, "-O2")
    assert done.exact
    assert done.sram_bytes < 0.61 * rival.sram_bytes
    assert done.train < rival.train * 1e6
    assert done.flash_bytes < rival.flash_bytes
