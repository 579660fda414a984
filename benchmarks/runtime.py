"""Speed of a training step on this machine: the NumPy runtime and the emitted C against PyTorch.

One thread each, the same network, sample, loss and update (SGD, everything trained, f32). The three
take turns in one process, a few steps at a time, and CPU time is compared, so that other work on
the machine slows all of them. Memory is that of another process, which has no PyTorch.

    python -m benchmarks.runtime [--network mbv2] [--batch 8]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from odt_plan.backends.c import emit_c
from odt_plan.backends.numpy import Runtime
from odt_plan.ir.graph import Node
from odt_plan.ir.import_options import ImportOptions
from odt_plan.ir.training import TrainingGraph
from odt_plan.planner.device import load_device
from odt_plan.planner.pipeline import PlannedModel, Request, make_plan

from .build_models import BUILDERS
from .results import put

TITLE = "### A training step on the host against PyTorch eager (measured)"
CASES = tuple((name, batch) for name in ("resnet8", "dscnn", "mbv2") for batch in (1, 8))
#: Keep losses away from 0, where PyTorch and others meet numbers too small to be normal.
RATE = 1e-4
#: Turns, and steps of a turn; the first of these finds the caches full of another's data.
TURNS, STEPS = 20, 5
#: More RAM than any of the networks needs.
ROOM = 1 << 30
#: Every product is rounded: the bits are those of a board, and of NumPy's exact kernels.
FLAGS = ("-O3", "-march=native", "-ffp-contract=off")
#: One thread each.
SINGLE = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

Step = Callable[[], float]


def plan_of(network: str, batch: int, folder: Path) -> PlannedModel:
    """A plan that keeps every activation, for a processor with caches and vectors."""
    model = folder / f"{network}.onnx"
    model.write_bytes(BUILDERS[network]().SerializeToString())
    request = Request(
        model,
        load_device("raspberry-pi-4b"),
        importing=ImportOptions(batch=batch),
        ram_bytes=ROOM,
        flash_bytes=ROOM,
        train=("all",),
        with_baselines=False,
    )
    return make_plan(request)


def given(training: TrainingGraph) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """A batch of random samples and labels."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(training.sample.type.shape).astype(np.float32)
    return x, rng.integers(0, 10, training.target.type.shape).astype(np.int32)


def by_numpy(planned: PlannedModel) -> Step:
    """The runtime with sums in any order."""
    runtime = Runtime(planned.plan, planned.training, exact=False)
    x, y = given(planned.training)
    return lambda: runtime.train_step(x, y, RATE)


def by_c(planned: PlannedModel, folder: Path) -> Step:
    """The emitted C, compiled for this machine."""
    name = emit_c(planned.plan, planned.training, folder)[0].stem
    library = folder / f"{name}.so"
    sources = [p for p in folder.glob("*.c") if not p.stem.endswith("_selftest")]
    command = ["gcc", *FLAGS, "-shared", "-fPIC", f"-I{folder}", "-o", library, *sources]
    subprocess.run([*command, "-lm"], check=True)
    c = ctypes.CDLL(str(library))
    net, loss = ctypes.create_string_buffer(1 << 12), ctypes.c_float()
    x, y = given(planned.training)
    data = (x.ctypes.data_as(ctypes.c_void_p), y.ctypes.data_as(ctypes.c_void_p))
    assert getattr(c, f"{name}_init")(net) == 0
    train = getattr(c, f"{name}_train_step")

    def step() -> float:
        assert train(net, *data, ctypes.c_float(RATE), ctypes.byref(loss)) == 0
        return loss.value

    return step


def by_torch(training: TrainingGraph) -> Step:
    """PyTorch eager, of the imported graph."""
    import torch

    torch.set_num_threads(1)
    f = torch.nn.functional
    trained = {u.candidate.param for u in training.updates}
    tensors = {
        name: torch.tensor(np.array(a), requires_grad=name in trained)
        for name, a in training.graph.constants.items()
    }
    optimizer = torch.optim.SGD([tensors[name] for name in sorted(trained)], lr=RATE)

    def conv(n: Node, a: list[Any]) -> Any:
        top, left, bottom, right = n.ints_attr("pads", (0, 0, 0, 0))
        even = (top, left) == (bottom, right)
        x = a[0] if even else f.pad(a[0], (left, right, top, bottom))
        strides, padding = n.ints_attr("strides", (1, 1)), (top, left) if even else (0, 0)
        return f.conv2d(x, *a[1:], stride=strides, padding=padding, groups=n.int_attr("group", 1))

    functions: dict[str, Callable[[Node, list[Any]], Any]] = {
        "Conv": conv,
        "Gemm": lambda _, a: f.linear(*a),
        "Relu": lambda _, a: f.relu(a[0]),
        "Clip": lambda n, a: f.hardtanh(a[0], n.float_attr("min"), n.float_attr("max")),
        "Add": lambda _, a: a[0] + a[1],
        "GlobalAveragePool": lambda _, a: a[0].mean((2, 3), keepdim=True),
        "Reshape": lambda n, a: a[0].reshape(n.ints_attr("shape")),
    }
    # the fused loss takes the logits; masks are saved for backward by PyTorch itself
    forward = [n for n in training.graph.nodes if n.phase == "forward" and n.op in functions]
    x, y = (torch.tensor(a) for a in given(training))
    labels = y.long()

    def step() -> float:
        values = {training.sample.name: x, **tensors}
        for n in forward:
            values[n.out.name] = functions[n.op](n, [values[v.name] for v in n.operands()])
        loss = f.cross_entropy(values[forward[-1].out.name], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def seconds(steps: dict[str, Step]) -> dict[str, list[float]]:
    """CPU seconds of a step by each, a median per turn."""
    for _ in range(2):
        losses = [step() for step in steps.values()]
        assert np.allclose(losses, losses[0], rtol=1e-3), losses
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(TURNS):
        for name, step in steps.items():
            times = []
            for _ in range(STEPS):
                begin = time.process_time()
                step()
                times.append(time.process_time() - begin)
            found[name].append(float(np.median(times[1:])))
    return found


def growth(network: str, batch: int) -> dict[str, int]:
    """Bytes by which the process grows at most, from before the runtime is made to three steps."""
    with tempfile.TemporaryDirectory() as name:
        planned = plan_of(network, batch, Path(name))
    a = np.ones((512, 512), np.float32)
    a @ a  # BLAS has its buffers now
    del a
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory that is free already would hide growth
    x, y = given(planned.training)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    runtime = Runtime(planned.plan, planned.training, exact=False)
    for _ in range(3):
        runtime.train_step(x, y, RATE)
    grown = _status("VmHWM") - before
    return {
        "arena": runtime.arena_nbytes,
        "state": runtime.state_nbytes,
        "scratch": runtime.scratch_nbytes,
        "grown": grown,
    }


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{key}:")).split()[1])


def times(network: str, batch: int) -> dict[str, list[float]]:
    """CPU seconds of a step by each."""
    with tempfile.TemporaryDirectory() as name:
        planned = plan_of(network, batch, Path(name))
        steps = {
            "torch": by_torch(planned.training),
            "numpy": by_numpy(planned),
            "c": by_c(planned, Path(name)),
        }
        return seconds(steps)


def _child(what: str, network: str, batch: int) -> Any:
    words = ("--only", what, "--network", network, "--batch", str(batch))
    command = [sys.executable, "-m", "benchmarks.runtime", *words]
    done = subprocess.run(
        command, env={**os.environ, **SINGLE}, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


def runtime_table(cases: Sequence[tuple[str, int]] = CASES) -> Iterator[str]:
    """Markdown rows: CPU time of a step, ratios to PyTorch's, and growth of the process."""
    import torch

    yield TITLE
    yield ""
    yield (
        f"CPU time of one training step, one thread, {_processor()}, NumPy {np.__version__},"
        f" PyTorch {torch.__version__}; SGD, everything trained, f32, nothing recomputed."
        f" Medians of {TURNS} turns of {STEPS} steps; ratios are medians over the turns, with the"
        f" 10th and 90th percentile. C: gcc {' '.join(FLAGS)}. Other work shared the machine."
        " *Grown*: the most that the process of the NumPy runtime grew by; arena, state, scratch"
        " and Python's objects are in it, BLAS's own buffers are not."
    )
    yield ""
    yield (
        "| network | batch | PyTorch ms | NumPy ms | ratio | C ms | ratio | arena B | state B |"
        " scratch B | grown B | grown / (arena + state) |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|"
    for network, batch in cases:
        print(f"{network}, batch {batch} ...", file=sys.stderr)
        by = {k: np.array(v) for k, v in _child("times", network, batch).items()}
        m = _child("memory", network, batch)
        cells = [network, batch, f"{1e3 * np.median(by['torch']):.2f}"]
        for name in ("numpy", "c"):
            low, ratio, high = np.percentile(by[name] / by["torch"], (10, 50, 90))
            cells += [f"{1e3 * np.median(by[name]):.2f}", f"{ratio:.2f} ({low:.2f}-{high:.2f})"]
        cells += [f"{m[k]:,}" for k in ("arena", "state", "scratch", "grown")]
        cells.append(f"{m['grown'] / (m['arena'] + m['state']):.2f}")
        yield f"| {' | '.join(map(str, cells))} |"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x for x in lines if x.startswith("model name")).partition(": ")[2].strip()
    except (OSError, StopIteration):
        return platform.machine()


def main() -> None:
    """Measure, print the table and put it into the results; for some cases alone print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--network", choices=sorted({name for name, _ in CASES}))
    parser.add_argument("--batch", type=int)
    parser.add_argument("--only", choices=("times", "memory"), help="print raw figures as JSON")
    options = parser.parse_args()
    if options.only is not None:
        measure = {"times": times, "memory": growth}[options.only]
        print(json.dumps(measure(options.network or "mbv2", options.batch or 1)))
        return
    cases = [
        (name, batch)
        for name, batch in CASES
        if options.network in (None, name) and options.batch in (None, batch)
    ]
    table = list(runtime_table(cases))
    print("\n".join(table))
    if len(cases) == len(CASES):
        put(TITLE, table)


if __name__ == "__main__":
    main()
