"""Networks of hundreds of forward nodes: seconds from file to checked plan, and the proven gaps.

python -m benchmarks.scale [NETWORK ...]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from odt_plan.ir.errors import InfeasibleError
from odt_plan.ir.training import TrainingSpec
from odt_plan.planner.device import load_device
from odt_plan.planner.imported import import_requested
from odt_plan.planner.pipeline import PlannedModel, Request, make_plan
from odt_plan.planner.progress import Progress, Watch

from .large_nets import LIGHT, bert, light, resnet

DEVICE = "raspberry-pi-4b"
#: Flash that never binds: all weights are there twice where they are trained.
FLASH = 1 << 33
#: RAM that never binds.
PLENTY = 1 << 38
TIME_LIMIT_S = 60.0
#: Seconds in which the least RAM is sought: what is found then, not a proven optimum.
LEAST_S = 10.0
#: Budgets between the least RAM and that of keeping everything.
PARTS = (0.7, 0.5, 0.3)
BUILT = {"resnet152": lambda: resnet((3, 8, 36, 3)), "bert-base": bert}


@dataclass
class _Clock(Watch):
    """Notes when the first checked plan stood."""

    first_s: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.listener = self._listen

    def _listen(self, progress: Progress) -> None:
        if progress.has_plan and self.first_s is None:
            self.first_s = progress.elapsed_s


@dataclass(frozen=True)
class Run:
    """One request and what came of it.

    Attributes:
        import_s: Seconds of the import.
        first_s: Seconds from then until the first checked plan.
        total_s: Seconds from file to the last plan.
        nodes: Nodes in forward.
        planned: The plan; None: there is none.
        why: Why there is none.
    """

    import_s: float
    first_s: float
    total_s: float
    nodes: int
    planned: PlannedModel | None
    why: str = ""


def run(request: Request) -> Run:
    """Plan and measure."""
    begin = time.perf_counter()
    clock = _Clock()
    imported = import_requested(request, clock)
    import_s = time.perf_counter() - begin
    planned, why = None, ""
    try:
        planned = make_plan(request, clock, imported)
    except InfeasibleError as e:
        why = str(e).splitlines()[0]
    total = time.perf_counter() - begin
    first = total - import_s if clock.first_s is None else clock.first_s
    return Run(import_s, first, total, len(imported.forward.nodes), planned, why)


def requests(path: Path) -> Iterator[tuple[str, Request]]:
    """What is asked of a network: everything updated at falling budgets, then chosen updates."""
    # these files end in images of one pixel, not in [batch, classes]
    images = "densenet" in path.stem or "squeezenet" in path.stem
    asked = Request(
        path, load_device(DEVICE), ram_bytes=PLENTY, flash_bytes=FLASH, train=("all",),
        spec=TrainingSpec(loss="mse" if images else "cross_entropy"), with_baselines=False,
        with_relaxations=False, time_limit_s=TIME_LIMIT_S,
    )  # fmt: skip
    yield "all", asked
    top = make_plan(asked).plan.claims.ram_bytes.total
    smallest = replace(asked, objective="ram", time_limit_s=LEAST_S)
    least = make_plan(smallest).plan.claims.ram_bytes.total
    for part in PARTS:
        yield f"all, {part:.0%}", replace(asked, ram_bytes=int(least + (top - least) * part))
    low = make_plan(replace(smallest, train=("last",))).plan.claims.ram_bytes.total
    for part in PARTS:
        ram = int(low + (top - low) * part)
        yield f"auto, {part:.0%}", replace(asked, ram_bytes=ram, train=("auto",))


def rows(path: Path) -> Iterator[str]:
    """Markdown rows of one network."""
    for what, request in requests(path):
        r = run(request)
        budget = "no limit" if request.ram_bytes == PLENTY else f"{request.ram_bytes:,}"
        head = f"| {path.stem} | {what} | {budget} |"
        times = f"{r.import_s:.1f} | {r.first_s:.1f} | {r.total_s:.1f}"
        if r.planned is None:
            yield f"{head} {r.nodes} | | {times} | {r.why} | | |"
            continue
        plan = r.planned.plan
        gaps = {o.name: f"{o.gap:.1e}" for o in plan.objective}
        yield (
            f"{head} {r.nodes} | {len(r.planned.training.graph.nodes)} | {times} |"
            f" {gaps.get('learn', '')} | {gaps['latency']} | {plan.claims.ram_bytes.total:,} |"
        )


def scale_table(names: Sequence[str] = (*LIGHT, *BUILT)) -> Iterator[str]:
    """Markdown rows: each network with everything updated, and with chosen updates."""
    yield f"### Large networks on {DEVICE}: a time limit of {TIME_LIMIT_S:g} s, one thread"
    yield ""
    yield (
        "| model | updates | RAM budget B | forward nodes | training nodes | import s |"
        " first plan s | total s | learn gap | latency gap | RAM B |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    with TemporaryDirectory() as folder:
        for name in names:
            path = light(name)
            if name in BUILT:
                path = Path(folder) / f"{name}.onnx"
                path.write_bytes(BUILT[name]().SerializeToString())
            yield from rows(path)


def main() -> None:
    """Print the table as it is measured."""
    for line in scale_table(sys.argv[1:] or (*LIGHT, *BUILT)):
        print(line, flush=True)


if __name__ == "__main__":
    main()
