"""The order of operators: live bytes and RAM in the order of the file and in the best one.

python -m benchmarks.orders [NETWORK ...]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from odt_plan.ir.autodiff import build_training, candidates
from odt_plan.ir.onnx_import import import_model
from odt_plan.ir.training import Candidate
from odt_plan.planner.imported import import_requested
from odt_plan.planner.order import best_order, least_peak
from odt_plan.planner.order_steps import steps_of
from odt_plan.planner.pipeline import Planner, Request
from odt_plan.planner.progress import Watch

from .large_nets import light, randwire
from .scale import LEAST_S, requests

LIGHT = ("light_squeezenet", "light_shufflenet", "light_inception_v2", "light_densenet121")
BUILT = {"randwire16": randwire, "randwire24": lambda: randwire(24, seed=1)}


class _AsGiven(Planner):
    """Plans in the order of the file alone."""

    def _better_order(self, *_: object) -> None:
        return None


def _least(kind: type[Planner], request: Request) -> int:
    """Bytes of the plan with the least RAM that is found in ``LEAST_S`` seconds."""
    watch = Watch()
    imported = import_requested(request, watch)
    watch.begin(request.time_limit_s)
    return kind(request, imported, watch).run().plan.claims.ram_bytes.total


def rows(path: Path) -> Iterator[str]:
    """Markdown rows of one network."""
    _, asked = next(requests(path))
    graph = import_model(path)
    whole = [c for c in candidates(graph) if c == Candidate(c.param)]
    training = build_training(graph, asked.spec, whole)
    order, steps = best_order(training), steps_of(training)
    for what, extreme in (("kept", steps), ("dropped", steps.dropped())):
        given, found = (getattr(peaks, what) for peaks in (order.given, order.found))
        bound = least_peak(extreme).bound
        proven = "proven" if found == bound else f"no order below {bound:,}"
        yield (
            f"| {path.stem} | {len(training.graph.nodes)} | live bytes, all {what} | {given:,} |"
            f" {found:,} | {1 - found / given:.1%} | {proven} |"
        )
    for train in ("last", "bias"):
        request = replace(asked, objective="ram", time_limit_s=LEAST_S, train=(train,))
        given, found = _least(_AsGiven, request), _least(Planner, request)
        yield (
            f"| {path.stem} | | least RAM, `--train {train}` | {given:,} | {found:,} |"
            f" {1 - found / given:.1%} | |"
        )


def orders_table(names: Sequence[str] = (*LIGHT, *BUILT)) -> Iterator[str]:
    """Markdown rows: each network at both extremes of what is kept, and planned for least RAM."""
    yield "### The order of operators: the file's and the best one"
    yield ""
    yield "| model | training nodes | what | order of the file B | best order B | less | bound |"
    yield "|---|---|---|---|---|---|---|"
    with TemporaryDirectory() as folder:
        for name in names:
            path = Path(folder) / f"{name}.onnx"
            if name in BUILT:
                path.write_bytes(BUILT[name]().SerializeToString())
            yield from rows(path if name in BUILT else light(name))


if __name__ == "__main__":
    for line in orders_table(sys.argv[1:] or (*LIGHT, *BUILT)):
        print(line, flush=True)
