"""Networks of the size people deploy: ``--train auto`` on a board of 320 KB and 1 MB."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from odt_plan.ir.errors import InfeasibleError
from odt_plan.planner.device import load_device
from odt_plan.planner.pipeline import PlannedModel, Request, make_plan

from .board import lane, picture
from .firmware import measure
from .models import shared
from .planning import in_a_row

DEVICE = "stm32f746g-disco"
NETWORKS = ("mbv2-w0.35", "proxyless-w0.3", "mcunet-5fps")
CALIBRATION = 16


def head10_table() -> Iterator[str]:
    """Markdown rows: each network from its quantized file, and from floats with calibration."""
    yield f"### MCU-size networks at 128 px: `--train auto` on {DEVICE}, gcc -O2"
    yield ""
    yield (
        "From the quantized file, or from the float one with scales from"
        f" {CALIBRATION} smooth synthetic pictures. Seconds: file to checked plan, two threads."
        " Linked inside the board's limits with the MPU on; SRAM is `.data` + `.bss` + painted"
        " stack. Equal: prediction, loss and all parameters after a training step are NumPy's, bit"
        " for bit."
    )
    yield ""
    folder = shared()
    if folder is None or not (lane.has_gcc() and lane.has_qemu()):
        yield "Left out: needs the shared networks, arm-none-eabi-gcc and qemu-system-arm."
        return
    yield (
        "| network | from | s | gaps | updated | i8 / mixed / f32 | streamed | RAM B | SRAM B |"
        " flash B | linked | M instructions predicted | measured | equal |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"
    for network in NETWORKS:
        for kind in ("qdq", "relu6"):
            path, quantized = folder / "models" / f"{network}-head10-{kind}.onnx", kind == "qdq"
            begin = f"| {network} | {'QDQ' if quantized else 'floats'} |"
            try:
                yield begin + _row(path, quantized)
            except InfeasibleError as e:
                yield f"{begin} {in_a_row(e)} | | | | | | | | | | | |"


def plan(path: Path, quantized: bool) -> tuple[PlannedModel, float]:
    """The plan of ``--train auto`` and the seconds it took."""
    with tempfile.TemporaryDirectory() as name:
        samples = None if quantized else Path(name) / "pictures.npz"
        if samples is not None:
            np.savez(samples, x=pictures())
        begin = time.perf_counter()
        request = Request(
            path, load_device(DEVICE), calibration=samples, with_baselines=False, threads=2
        )
        planned = make_plan(request)
        return planned, time.perf_counter() - begin


def pictures() -> np.ndarray:
    """Calibration samples as the float networks take them: int8 pictures over 127.5."""
    stored = np.concatenate([picture((1, 3, 128, 128), 100 + i) for i in range(CALIBRATION)])
    return (stored / np.float32(127.5)).astype(np.float32)


def _row(path: Path, quantized: bool) -> str:
    planned, seconds = plan(path, quantized)
    p, sample = planned.plan, planned.training.sample.type
    x = picture(sample.shape, 0)
    if sample.quant is None:
        x = (x / np.float32(127.5)).astype(np.float32)
    done = measure(planned, x, 3, "-O2")
    gaps = ", ".join(f"{o.name} {o.gap:.1e}" for o in p.objective)
    precision = Counter(p.decisions.precision.values())
    updates = p.decisions.updates
    predicted = p.claims.cycles / planned.device.cycles_per_instruction.value
    blocks = sum(n.op == "StreamedBlock" for n in planned.training.graph.nodes)
    return (
        f" {seconds:.1f} | {gaps} |"
        f" {sum(u.ratio > 0 for u in updates)} of {len(updates)} |"
        f" {' / '.join(str(precision[k]) for k in ('i8', 'mixed', 'f32'))} | {blocks} |"
        f" {p.claims.ram_bytes.total:,} | {done.sram_bytes:,} | {p.claims.flash_bytes.total:,} |"
        f" {done.flash_bytes:,} | {predicted / 1e6:.1f} | {done.train / 1e6:.1f} |"
        f" {'yes' if done.exact else 'NO'} |"
    )
