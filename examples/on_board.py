"""Build the C of a plan for an emulated Cortex-M board, run its self-test there, and train.

    odt-plan examples/digits_cnn.onnx --ram 320KB --flash 1MB --emit c -o out/
    python examples/on_board.py out/ examples/digits.npz

Compiler (ziglang) and emulator (unicorn) come from PyPI: pip install '.[board]'. The board is that
of the tests. It has the memory that the plan was made for and the device's reserve, and no byte
more: what does not fit fails in the linker, or faults.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np

from odt_plan.backends.c.ctext import identifier
from odt_plan.backends.numpy import Runtime, read_data
from odt_plan.ir.errors import OdtPlanError, UsageError
from odt_plan.ir.graph import Array
from odt_plan.ir.training import TrainingGraph
from odt_plan.planner.check import check
from odt_plan.planner.device import Device
from odt_plan.planner.plan import Plan, load_plan
from odt_plan.planner.rebuild import rebuild
from odt_plan.planner.sizes import format_bytes
from odt_plan.planning import device_of_plan

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from board import lane
from board.elf import Elf
from board.objects import BuildError

RATE = 0.01


def main() -> None:
    """Build, run, tell; the exit code is 1 where the board does not do what NumPy does."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="plan.json and the files of --emit c")
    parser.add_argument("data", type=Path, help="as for `odt-plan run --data`")
    parser.add_argument("--steps", type=int, default=8, help="training steps (default: 8)")
    options = parser.parse_args()
    try:
        _run(options.folder, options.data, options.steps)
    except (BuildError, OdtPlanError) as e:
        sys.exit(f"error: {options.folder}: {e}")


def _run(folder: Path, data: Path, steps: int) -> None:
    file = folder / "plan.json"
    plan = load_plan(file)
    training, device = rebuild(plan, file), device_of_plan(file, plan.device.id, None)
    report = check(plan, training, device)
    xs, targets = _batches(training, data, steps)
    limits = _limits(plan, device)
    with tempfile.TemporaryDirectory() as scratch:
        image = _build(folder, identifier(plan.model.name), device, limits, Path(scratch))
        elf = Elf(image)
        found = lane.run(
            image,
            device.core,
            files=lane.training_input(xs, targets, RATE),
            limits=limits,
        )
    if found.exit_code:
        sys.exit(f"error: the board stopped with {found.exit_code}: {found.stdout}")
    expected = _expected(plan, training, xs, targets)
    if not found.value("selftest_exact") or found.files["output.bin"] != expected:
        sys.exit("error: the board's results are not those of NumPy, bit for bit")
    steady = elf.symbols["__ram_used"].address - limits.stack_bytes
    trained = found.instructions["train"] // steps
    predicted = report.cycles / device.cycles_per_instruction.value / training.spec.micro_batches
    tools = " and ".join(f"{n} {version(n)}" for n in ("ziglang", "unicorn"))
    print(f"board     {device.core}, built and emulated by {tools}")
    print("selftest  passed: golden inference and training step, bit for bit")
    print(f"training  {steps} steps on {data}: losses, predictions and all")
    print("          parameters equal NumPy's, bit for bit")
    print(f"measured  {trained:,} instructions per step; predicted, for gcc, {predicted:,.0f}")
    ram, size = format_bytes(limits.ram_bytes), elf.symbols["__flash_used"].address
    print(f"measured  RAM {steady:,} B, stack {found.stack_bytes:,} B, of {ram}")
    print(f"measured  flash {size:,} B, of {format_bytes(limits.flash_bytes)}")


def _batches(
    training: TrainingGraph, data: Path, steps: int
) -> tuple[list[Array], list[Array]]:
    """Samples and targets of each step, as the C takes them."""
    if len(training.samples) > 1 or len(training.targets) > 1:
        raise UsageError("the model has several inputs or outputs; this example takes one of each")
    found = read_data(data, training).data(training)
    ((x,), (y,)) = found.x.values(), found.y.values()
    size = training.sample.type.shape[0]
    if not 0 < steps * size <= found.count:
        raise UsageError(f"{data}: {found.count} samples are for 1 to {found.count // size} steps")
    parts = [slice(i * size, (i + 1) * size) for i in range(steps)]
    return [x[p] for p in parts], [y[p] for p in parts]


def _limits(plan: Plan, device: Device) -> lane.Limits:
    """The device's memory; where the plan's was given, that and the device's reserve."""
    if plan.regions:
        return lane.Limits.of(device)
    budget, reserve = plan.device.budget, device.reserve
    return lane.Limits(
        budget.flash_bytes + reserve.flash_bytes, budget.ram_bytes + reserve.ram_bytes
    )


def _build(folder: Path, name: str, device: Device, limits: lane.Limits, scratch: Path) -> Path:
    """Build in a folder of its own, from the files as they were emitted."""
    if device.core not in lane.CORES:
        raise UsageError(f"{device.core} is not emulated; cores are {', '.join(lane.CORES)}")
    if not lane.has_zig_lane():
        raise UsageError("ziglang and unicorn are missing: pip install '.[board]'")
    if not (folder / f"{name}.c").is_file():
        raise UsageError(f"there is no {name}.c; plan with --emit c")
    for source in folder.glob("*.[ch]"):
        shutil.copy(source, scratch)
    return lane.build(scratch, name, device.core, limits=limits)


def _expected(
    plan: Plan, training: TrainingGraph, xs: list[Array], targets: list[Array]
) -> bytes:
    """What the board must write: a prediction, the losses, all that was trained."""
    runtime = Runtime(plan, training)
    prediction = np.asarray(runtime.infer(xs[0]), "<f4").tobytes()
    losses = [runtime.train_step(x, y, RATE) for x, y in zip(xs, targets, strict=True)]
    return prediction + np.asarray(losses, "<f4").tobytes() + runtime.state_bytes()


if __name__ == "__main__":
    main()
