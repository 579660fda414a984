"""Tiny Training Engine's update schemes as ours: SRAM, flash and instructions on the same board.

Its figures were measured on the same emulated Cortex-M7, with code that its own tools generated, at
batch 1 and 128 px: SRAM is ``.data`` + ``.bss`` + painted stack, instructions are executed ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from odt_plan.ir.autodiff import candidates
from odt_plan.ir.graph import Graph, Node
from odt_plan.ir.onnx_import import import_model
from odt_plan.planner.device import load_device
from odt_plan.planner.importance import prior
from odt_plan.planner.pipeline import PlannedModel, Request, make_plan
from odt_plan.planner.train_set import choose

from .board import lane, picture
from .firmware import Measured, measure
from .models import shared

DEVICE = "stm32f746g-disco"
#: RAM that a linked image has beside the plan's: stack, the model's record, start-up.
BESIDE_BYTES = 4096
#: A small plan is the fastest one in so much of the least RAM.
SMALL = 1.04
TIME_LIMIT_S = 120.0
Scheme = Mapping[str, Any]


@dataclass(frozen=True)
class Rival:
    """Measured figures of Tiny Training Engine; ``scheme`` None: the last layer alone.

    Attributes:
        sram_bytes: ``.data`` + ``.bss`` + painted stack.
        flash_bytes: Code and constants.
        infer: Millions of executed instructions of an inference.
        train: The same of a training step.
    """

    network: str
    scheme: str | None
    sram_bytes: int
    flash_bytes: int
    infer: float
    train: float

    @property
    def name(self) -> str:
        """Network and scheme."""
        return f"{self.network}, {self.scheme or 'last layer'}"


RIVALS = (
    Rival("mcunet-5fps", None, 194_952, 594_840, 63.0, 63.1),
    Rival("mcunet-5fps", "49kb", 255_096, 693_256, 65.0, 106.4),
    Rival("mcunet-5fps", "99kb", 301_944, 716_768, 65.0, 115.7),
    Rival("mcunet-5fps", "148kb", 349_944, 713_704, 65.1, 120.6),
    Rival("mbv2-w0.35", "123kb", 379_808, 448_720, 58.0, 98.2),
    Rival("proxyless-w0.3", "98kb", 269_224, 597_160, 60.0, 91.4),
)


# -- update schemes --------------------------------------------------------------------------------


def model_path(folder: Path, network: str) -> Path:
    """The quantized file of a network."""
    return folder / "models" / f"{network}-head10-qdq.onnx"


def schemes(folder: Path) -> dict[str, dict[str, Scheme]]:
    """Published update schemes, by network and label."""
    text = (folder / "models" / "tte_schemes.json").read_text(encoding="utf-8")
    found: dict[str, dict[str, Scheme]] = json.loads(text)["schemes"]
    return found


def train_items(forward: Graph, scheme: Scheme) -> tuple[str, ...]:
    """A scheme as items of ``--train``: last biases, parts of weights, the classifier.

    Args:
        forward: Imported graph; its convolutions are counted from the stem, depthwise ones too.
        scheme: How many biases, and the part of the input channels by number of the convolution
            (of the channels, if depthwise).
    """
    convs = [n for n in forward.nodes if n.op == "Conv"]
    (classifier,) = (n for n in forward.nodes if n.op == "Gemm")
    items = [_parameter(n, 2) for n in convs[-scheme["biases_of_last_convs"] :]]
    for index, ratio in scheme["weight_ratio_of_input_channels_by_conv_index"].items():
        if ratio:
            items.append(f"{_parameter(convs[int(index)], 1)}={ratio}")
    return (*items, *(_parameter(classifier, i) for i in (1, 2)))


def _parameter(node: Node, index: int) -> str:
    v = node.inputs[index]
    assert v is not None, node.name
    return v.name


def request(folder: Path, rival: Rival, **options: Any) -> Request:
    """The rival's update set in i8, as the rival has it."""
    path = model_path(folder, rival.network)
    train: tuple[str, ...] = ("last",)
    if rival.scheme is not None:
        scheme = schemes(folder)[rival.network][rival.scheme]
        train = train_items(import_model(path), scheme)
    return Request(
        path,
        load_device(DEVICE),
        train=train,
        precision=("*=i8",),
        with_baselines=False,
        threads=2,
        time_limit_s=TIME_LIMIT_S,
        **options,
    )


# -- the same update -------------------------------------------------------------------------------


def tte_table() -> Iterator[str]:
    """Markdown rows: the rival, our fastest plan on the board, and those with little RAM."""
    yield f"### The update sets of Tiny Training Engine, {DEVICE}, emulated Cortex-M7, gcc, MPU on"
    yield ""
    yield (
        "SRAM is `.data` + `.bss` + painted stack. Instructions are executed ones, in millions, of"
        " an inference and of a training step; they are not cycles. *Fastest*: the shortest step"
        f" inside the board's limits; *least*: the least RAM; *small*: the shortest step in {SMALL}"
        " times the least RAM. Equal: prediction, loss and all parameters are NumPy's, bit for bit."
    )
    yield ""
    folder = shared()
    if folder is None or not (lane.has_gcc() and lane.has_qemu()):
        yield "Left out: needs the shared networks, arm-none-eabi-gcc and qemu-system-arm."
        return
    yield (
        "| update set | program | SRAM B | of it plan | stack | flash B | inference -O2 | -O3 |"
        " step -O2 | -O3 | streamed blocks | gap | equal |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|---|"
    device = load_device(DEVICE)
    for rival in RIVALS:
        fits = "" if rival.sram_bytes <= device.ram_region()[1] else ": does not fit"
        yield (
            f"| {rival.name} | TTE | {rival.sram_bytes:,}{fits} | | | {rival.flash_bytes:,} | |"
            f" {rival.infer} | | {rival.train} | | | |"
        )
        yield _row("fastest", make_plan(request(folder, rival, objective="latency")))
        least = make_plan(request(folder, rival, objective="ram", solver="highs"))
        ram = int(SMALL * least.plan.claims.ram_bytes.total)
        yield _row("small", make_plan(request(folder, rival, objective="latency", ram_bytes=ram)))
        yield _row("least", least)


def _row(name: str, planned: PlannedModel) -> str:
    shape = planned.training.sample.type.shape
    o2, o3 = (measure(planned, picture(shape, 0), 3, flag) for flag in ("-O2", "-O3"))
    ram, objective = planned.plan.claims.ram_bytes, planned.plan.objective[-1]
    blocks = sum(n.op == "StreamedBlock" for n in planned.training.graph.nodes)
    return (
        f"| | odt-plan, {name} | {max(o2.sram_bytes, o3.sram_bytes):,} | {ram.total:,} |"
        f" {max(o2.stack_bytes, o3.stack_bytes):,} | {max(o2.flash_bytes, o3.flash_bytes):,} |"
        f" {_millions(o2, o3, 'infer')} | {_millions(o2, o3, 'train')} | {blocks} |"
        f" {objective.gap:.1e} | {'yes' if o2.exact and o3.exact else 'NO'} |"
    )


def _millions(o2: Measured, o3: Measured, region: str) -> str:
    return " | ".join(f"{getattr(m, region) / 1e6:.1f}" for m in (o2, o3))


# -- more learning in the same RAM -----------------------------------------------------------------


def importance_table() -> Iterator[str]:
    """Markdown rows: summed importance of each scheme and of our own choice in its SRAM."""
    yield "### Importance of what is updated in the same SRAM"
    yield ""
    yield (
        "One table of importance (the prior of `planner/importance.py`, the same for i8 and f32)."
        f" Ours is `--train auto` with the rival's SRAM less {BESIDE_BYTES:,} B for stack and"
        " program, at most the board's."
    )
    yield ""
    folder = shared()
    if folder is None:
        yield "Left out: needs the shared networks."
        return
    yield (
        "| update set of TTE | its SRAM B | importance | our plan's RAM B | importance | times |"
        " updated tensors | learn gap |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for rival in RIVALS:
        yield _importance_row(folder, rival)


def _importance_row(folder: Path, rival: Rival) -> str:
    device, path = load_device(DEVICE), model_path(folder, rival.network)
    ram = min(rival.sram_bytes, device.ram_region()[1]) - BESIDE_BYTES
    planned = make_plan(Request(path, device, ram_bytes=ram, with_baselines=False, threads=2))
    forward = import_model(path)
    every = candidates(forward)
    theirs = choose(forward, request(folder, rival).train, every)
    assert theirs is not None
    ours = [u.candidate for u in planned.training.updates]
    scores = prior(forward, [*every, *theirs, *ours])
    a, b = (sum(scores[c] for c in chosen) for chosen in (theirs, ours))
    plan = planned.plan
    return (
        f"| {rival.name} | {rival.sram_bytes:,} | {a:,} | {plan.claims.ram_bytes.total:,} | {b:,} |"
        f" {b / a:.2f} | {len(ours)} | {plan.objective[0].gap:.1e} |"
    )
