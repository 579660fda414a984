"""The split of an update into micro-batches as a choice: the best of all splits, one by one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from cli_run import Cli

from odt_plan.ir.errors import InfeasibleError
from odt_plan.ir.import_options import ImportOptions
from odt_plan.ir.training import TrainingSpec
from odt_plan.planner.check import check
from odt_plan.planner.device import load_device
from odt_plan.planner.micro_batches import plan_every_split, splits
from odt_plan.planner.pipeline import Request, make_plan
from odt_plan.planner.plan import Plan

SAMPLES = 4


@pytest.fixture(scope="module")
def request_of() -> Request:
    """The bundled model, whose batch is free."""
    path = Path(__file__).parent.parent / "examples" / "digits_cnn.onnx"
    device = load_device("stm32f746g-disco")
    importing = ImportOptions(batch=SAMPLES, fold_batchnorm=True)
    return Request(path, device, importing, with_baselines=False, with_relaxations=False)


def alone(request: Request) -> dict[int, Plan]:
    """The plan of each split that fits, by its micro-batches."""
    found = {}
    for batch, k in splits(request.importing.batch):
        spec = replace(request.spec, micro_batches=k)
        try:
            part = replace(request.importing, batch=batch)
            found[k] = make_plan(replace(request, importing=part, spec=spec)).plan
        except InfeasibleError:
            continue
    return found


def test_splits_are_the_divisors() -> None:
    assert list(splits(6)) == [(6, 1), (3, 2), (2, 3), (1, 6)]
    assert list(splits(1)) == [(1, 1)]


def test_the_best_split_is_taken_at_every_budget(request_of: Request) -> None:
    chosen = set()
    for ram in (40_000, 80_000, 200_000, 420_000):
        request = replace(request_of, ram_bytes=ram)
        plans = alone(request)
        best = plan_every_split(request)
        check(best.plan, best.training, best.device)
        learn, latency = best.plan.objective
        assert learn.value == max(p.objective[0].value for p in plans.values())
        equal = [p for p in plans.values() if p.objective[0].value == learn.value]
        assert latency.value == min(p.objective[1].value for p in equal)
        assert learn.bound == max(p.objective[0].bound for p in plans.values())
        assert best.plan.model.batch * best.plan.training.micro_batches == SAMPLES
        chosen.add(best.plan.training.micro_batches)
    assert len(chosen) > 1, "the split depends on the budget"


def test_least_ram_over_all_splits(request_of: Request) -> None:
    request = replace(request_of, train=("last",), objective="ram")
    best = plan_every_split(request).plan
    assert best.objective[0].value == min(p.objective[0].value for p in alone(request).values())
    assert best.training.micro_batches == SAMPLES


def test_no_split_fits(request_of: Request) -> None:
    with pytest.raises(InfeasibleError, match="smallest --ram that works"):
        plan_every_split(replace(request_of, ram_bytes=6000))


def test_on_the_command_line(odt: Cli, request_of: Request) -> None:
    limits = ["--ram", "80000", "--flash", "1MB"]
    both = ["--batch", str(SAMPLES), "--micro-batches"]
    result = odt(str(request_of.model), *limits, *both, "auto", "--json")
    plan = Plan.model_validate_json(result.out)
    spec = TrainingSpec(micro_batches=plan.training.micro_batches)
    assert plan.model.batch * spec.micro_batches == SAMPLES
    for wrong in ("0", "many", "1.5", "70000"):
        result = odt(str(request_of.model), *limits, *both, wrong)
        assert result.code == 2
        assert "neither auto nor a number from 1 to 65536" in result.err
