"""The emitted firmware of a plan on the emulated board, with its limits and MPU."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from odt_plan.backends.c import emit_c
from odt_plan.backends.numpy import Runtime
from odt_plan.ir.graph import Array
from odt_plan.planner.pipeline import PlannedModel

from .board import Elf, lane

RATE = 0.01


@dataclass(frozen=True)
class Measured:
    """What a linked image takes, and one inference and one training step of it.

    Attributes:
        static_bytes: ``.data`` and ``.bss``.
        stack_bytes: High-water mark of the painted stack.
        flash_bytes: Code and constants.
        infer: Executed instructions of an inference.
        train: Executed instructions of a training step.
        exact: Prediction, loss and all parameters equal NumPy's bit for bit.
    """

    static_bytes: int
    stack_bytes: int
    flash_bytes: int
    infer: int
    train: int
    exact: bool

    @property
    def sram_bytes(self) -> int:
        """All RAM: ``.data``, ``.bss`` and the stack that was touched."""
        return self.static_bytes + self.stack_bytes


def measure(planned: PlannedModel, x: Array, label: int, optimise: str) -> Measured:
    """Emit, link inside the limits of the plan's device, run with gcc and QEMU.

    Args:
        planned: A plan of one micro-batch with a single sample.
        x: Sample, as the input stores it.
        label: Class of it.
        optimise: Optimisation flag of the compiler.

    Raises:
        BuildError: The image does not fit.
    """
    device = planned.device
    limits = lane.Limits(device.flash_bytes, device.ram_region()[1])
    target = np.array([label], np.int32)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = emit_c(planned.plan, planned.training, folder)[0].stem
        image = lane.build(
            folder,
            model,
            device.core,
            "gcc",
            limits=limits,
            optimise=optimise,
            selftest=False,
            mpu=True,
        )
        files = lane.training_input([x], [target], RATE)
        done = lane.run(image, device.core, "qemu", files=files, limits=limits)
        elf = Elf(image)
    assert done.exit_code == 0, done.stdout
    runtime = Runtime(planned.plan, planned.training)
    prediction = np.asarray(runtime.infer(x), "<f4").tobytes()
    loss = np.float32(runtime.train_step(x, target, RATE)).tobytes()
    return Measured(
        elf.symbols["__ram_used"].address - limits.stack_bytes,
        done.stack_bytes,
        elf.symbols["__flash_used"].address,
        done.instructions["infer"],
        done.instructions["train"],
        done.files["output.bin"] == prediction + loss + runtime.state_bytes(),
    )
