"""Executed instructions per multiply-accumulate of the fp32 kernels on the emulated Cortex-M7."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from board import lane

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import kernels

pytestmark = pytest.mark.skipif(
    not (lane.has_zig_lane() and lane.has_gcc()), reason="needs arm-none-eabi-gcc and unicorn"
)

#: Most instructions per MAC of the forward pass; CMSIS-NN's int8 kernels need 2.24 and 8.5.
LIMITS = {"pointwise 1x1 48->8, 16x16": 1.9, "depthwise 3x3 48, 16x16": 3.5}


@pytest.mark.parametrize(("flag", "contract"), [("-O2", False), ("-O3", True)])
def test_forward_kernels(flag: str, contract: bool) -> None:
    """With every product rounded as well as contracted."""
    rows = [(layer.name, *next(layer.nodes())) for layer in kernels.LAYERS if layer.name in LIMITS]
    counts = kernels.instructions([r[3] for r in rows], "gcc", flag, contract=contract)
    assert len(counts) == len(LIMITS)
    for (name, kind, macs, _), n in zip(rows, counts, strict=True):
        assert kind == "forward"
        assert 1.0 < n / macs <= LIMITS[name], name


def test_table() -> None:
    """A row per kernel of each layer, with figures."""
    lines = list(kernels.kernel_table())
    rows = [line for line in lines if re.match(r"\| .* \| (forward|\w+ gradient) \|", line)]
    assert len(rows) == 3 * len(kernels.LAYERS)
    for row in rows:
        plain, contracted = map(float, row.split("|")[3:5])
        assert 1.0 < contracted <= 1.3 * plain < 26.0, row
