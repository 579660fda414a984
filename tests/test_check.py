"""The checker accepts good plans, and its report says what they do."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import nets
import plans
import pytest
from zoo import RECIPES, exhibit

import odt_plan.planner
from odt_plan.ir.graph import TensorType
from odt_plan.ir.training import Candidate, TrainingSpec
from odt_plan.planner.check import CheckError, check
from odt_plan.planner.check_memory import SymbolicMemory
from odt_plan.planner.device import Quantity, Rate, load_core, load_device
from odt_plan.planner.plan import Buffer

DEVICE = load_device(plans.BOARD)


@pytest.mark.parametrize("name", RECIPES)
def test_accepts(name: str) -> None:
    e = exhibit(name)
    report = e.report()
    claims = e.plan.claims
    assert report.arena_bytes == claims.ram_bytes.arena
    assert report.arena_bytes >= report.live_peak_bytes == max(s.live_bytes for s in report.steps)
    assert report.steps[report.peak_step].live_bytes == report.live_peak_bytes
    assert report.state_bytes == claims.ram_bytes.total - claims.ram_bytes.arena
    assert sum(report.phase_cycles.values()) == report.cycles == claims.cycles
    assert report.latency_s == pytest.approx(report.cycles / DEVICE.clock_hz.value, rel=1e-12)
    assert {x.buffer for x in report.lifetimes} == {
        b.id for b in e.plan.buffers if b.space == "arena"
    }


def test_zoo_has_every_action() -> None:
    actions = Counter(a.action for n in RECIPES for a in exhibit(n).plan.decisions.activations)
    assert min(actions[a] for a in ("keep", "recompute", "page")) > 0
    kinds = {s.kind for n in RECIPES for s in exhibit(n).plan.steps}
    assert kinds == {"compute", "update", "page_out", "page_in", "page_wait"}


def test_views_follow_what_is_paged_and_recomputed() -> None:
    e = exhibit("views")
    actions = {a.value: a.action for a in e.plan.decisions.activations}
    assert actions["x"] == "page"
    assert "recompute" in actions.values()
    runs = Counter(n for s in e.plan.steps for n in s.nodes)
    assert min(runs["unflatten"], runs["flatten"]) > 1


def test_phases_and_transfers() -> None:
    report = exhibit("paged").report()
    paging = [s for s in report.steps if s.phase == "paging"]
    assert paging
    assert all(s.transfer_bytes > 0 and s.kind in ("page_in", "page_out") for s in paging)
    assert all(s.transfer_bytes == 0 for s in report.steps if s.phase != "paging")
    assert report.phase_cycles["paging"] == sum(s.cycles for s in paging)
    assert report.phase_cycles["recompute"] > 0
    storage = DEVICE.find_storage("sdcard")
    seconds = report.phase_cycles["paging"] / DEVICE.clock_hz.value
    energy = DEVICE.power_w.value * report.latency_s + storage.power_w.value * seconds
    assert report.energy_j == pytest.approx(energy, rel=1e-12)


def number(value: float) -> Quantity:
    return Quantity(value=value, source="test")


def rate(value: float, per_output: float = 0.0) -> Rate:
    return Rate(value=value, per_pass=0.5, per_loop=7.0, per_output=per_output, source="test")


def test_figures_by_hand() -> None:
    """One layer of 2 x 3 weights, all figures worked out on paper."""
    forward = nets.mlp((3, 2))
    training = plans.training_of(forward, TrainingSpec(), [Candidate("fc0.weight")])
    device = DEVICE.model_copy(update={"cycles_per_instruction": number(1.2)})
    core = load_core(device.core)
    costs = dict.fromkeys(core.instructions["f32"], rate(1000))
    costs |= {"gemm": rate(3.5, 5), "gemm_grad_weight": rate(4.5, 2), "elementwise": rate(6)}
    changes = {"call": number(60), "instructions": {"f32": costs}, "operators": None}
    core = core.model_copy(update=changes)
    plan = plans.keep_all(training, reuse=False, device=device, core=core)
    report = check(plan, training, device, core)
    labels = ["fc0", "loss/softmax", "loss", "loss/grad", "fc0/grad_weight"]
    assert [s.label.split(" + ")[0] for s in report.steps][:4] == labels[:4]
    # x 12, logits 8, probabilities 8, loss 4, gradient 8, tile 24 bytes, nothing reused.
    assert report.arena_bytes == 12 + 8 + 8 + 4 + 8 + 24
    # fc0: x and logits; softmax: x, logits, probabilities; loss: x, probabilities, loss; then
    # x, probabilities, loss, gradient; the update: x, loss, gradient, tile.
    assert [s.live_bytes for s in report.steps] == [20, 28, 24, 32, 48]
    assert report.state_bytes == 2 * 3 * 4
    assert report.flash_weights_bytes == 2 * 3 * 4 + 2 * 4
    # 6 MACs at 3.5 in 6 passes at 0.5 and 2 loops at 7 + 2 results at 5 + one call of 60 = 108
    # instructions, at 1.2 cycles each.
    assert report.steps[0].cycles == 130
    # 6 MACs at 4.5, a pass and a loop each, 6 results at 2; 6 elements at 6; two calls: 240.
    assert report.steps[-1].cycles == 288


def test_micro_batches_multiply_all_but_the_last_steps() -> None:
    e = exhibit("resnet-adam-accumulate")
    report = e.report()
    once = sum(s.cycles for s in e.plan.steps if s.last_micro)
    rest = sum(s.cycles for s in e.plan.steps if not s.last_micro)
    assert once > 0
    assert report.cycles == 3 * rest + once


@pytest.mark.parametrize("net", ["mlp", "cnn", "resnet"])
@pytest.mark.parametrize("micro_batches", [1, 2, 7])
def test_side_by_side_layout_is_accepted_too(net: str, micro_batches: int) -> None:
    training = plans.training_of(getattr(nets, net)(), TrainingSpec(micro_batches=micro_batches))
    tight = check(plans.keep_all(training), training, DEVICE)
    wide = check(plans.keep_all(training, reuse=False), training, DEVICE)
    assert wide.arena_bytes > tight.arena_bytes >= tight.live_peak_bytes
    assert wide.live_peak_bytes == tight.live_peak_bytes


def test_another_device_is_rejected() -> None:
    e = exhibit("mlp-sgd")
    with pytest.raises(CheckError, match="for device stm32f746g-disco, not nrf52840"):
        check(e.plan, e.training, load_device("nrf52840"))


def test_a_plan_of_another_graph_is_rejected() -> None:
    e = exhibit("mlp-sgd")
    other = plans.training_of(nets.mlp((8, 16, 12, 5)))
    with pytest.raises(CheckError, match=r"in the plan but .* in the graph"):
        check(e.plan, other, DEVICE)


def test_memory_forgets_what_a_write_touches() -> None:
    memory = SymbolicMemory()

    def buffer(offset: int, size: int) -> Buffer:
        return Buffer(
            id="b", value="v", space="arena", dtype="u8", shape=(size,), bytes=size, offset=offset,
            first=0, last=0,
        )  # fmt: skip

    memory.write(buffer(0, 8), ("a", 0), TensorType((8,), "u8"))
    memory.write(buffer(8, 5), ("b", 0), TensorType((5,), "u8"))
    assert memory.at(buffer(0, 8)) is not None
    assert memory.at(buffer(0, 4)) is None, "a part is not the whole"
    memory.write(buffer(12, 4), ("c", 0), TensorType((4,), "u8"))
    assert memory.at(buffer(8, 5)) is None
    assert memory.at(buffer(0, 8)) is not None
    memory.erase(buffer(4, 1))
    assert memory.at(buffer(0, 8)) is None


def test_imports_nothing_of_the_planner_that_made_the_plan() -> None:
    """Nor does anything that it imports inside the planner."""
    folder = Path(odt_plan.planner.__file__).parent
    allowed = {"check", "device", "plan", "spec_file", "sizes"}
    pending, seen = ["check"], set()
    while pending:
        module = pending.pop()
        seen.add(module)
        for node in ast.walk(ast.parse((folder / f"{module}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                names = [node.module] if node.module else [a.name for a in node.names]
                pending += [n for n in names if n not in seen]
            if isinstance(node, ast.Import):
                assert all(not a.name.startswith("ortools") for a in node.names)
    assert {m for m in seen if not m.startswith("check_")} <= allowed
    assert {"check_machine", "check_program", "check_claims"} <= seen
