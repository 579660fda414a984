"""The checker rejects broken plans: one mutant per rule, with what the message must say."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import nets
import plans
import pytest
from mutate import DEVICE, Json, buffer, dump, find, reject, repaired, scratch
from zoo import RECIPES, Exhibit, exhibit

from odt_plan.ir import opdef
from odt_plan.ir.opdef import get_op
from odt_plan.planner.check import CheckError, check
from odt_plan.planner.check_machine import Machine
from odt_plan.planner.check_program import resolve
from odt_plan.planner.plan import Plan


def update_before_input_gradient(d: Json) -> None:
    """Take an update whose weight the input gradient reads, and run it first."""
    k = find(d, node="conv1.weight/update")
    g = find(d, node="conv1/grad_input")
    assert g < k
    d["steps"].insert(g, d["steps"].pop(k))
    # The tile lies apart from all others, so that only the version is wrong.
    buffer(d, d["steps"][g]["tile"])["offset"] = d["claims"]["ram_bytes"]["arena"]
    d["claims"]["ram_bytes"]["arena"] += 10_000


def page_in_never_paged_out(d: Json) -> None:
    d["steps"].pop(find(d, kind="page_out"))


def page_in_before_page_out(d: Json) -> None:
    out, into = find(d, kind="page_out"), find(d, kind="page_in")
    d["steps"][out]["kind"], d["steps"][into]["kind"] = "page_in", "page_out"


def page_in_of_another_tensor(d: Json) -> None:
    into = d["steps"][find(d, kind="page_in")]
    other = next(
        b for b in d["buffers"] if b["space"] == "arena" and b["id"] != into["writes"][0]
        and b["bytes"] == buffer(d, into["writes"][0])["bytes"]
    )  # fmt: skip
    into["writes"] = [other["id"]]


def page_with_nodes(d: Json) -> None:
    d["steps"][find(d, kind="page_in")]["nodes"] = ["stem"]


def update_twice(d: Json) -> None:
    """A bias whose gradient is an ordinary tensor, or a weight with a tile of its own."""
    k = find(d, kind="update")
    again = dict(d["steps"][k])
    if again["tile"] is not None:
        again["tile"] += " again"
        d["buffers"].append({**buffer(d, d["steps"][k]["tile"]), "id": again["tile"]})
    d["steps"].insert(k + 1, again)


def skip_update(d: Json) -> None:
    d["steps"].pop(find(d, kind="update"))


def apply_in_every_micro_step(d: Json) -> None:
    d["steps"][find(d, last_micro=True)]["last_micro"] = False


def accumulate_in_the_last_only(d: Json) -> None:
    d["steps"][find(d, kind="update", last_micro=False)]["last_micro"] = True


def apply_before_accumulate(d: Json) -> None:
    d["steps"].insert(0, d["steps"].pop(find(d, last_micro=True)))


def recompute_not_marked(d: Json) -> None:
    d["steps"][find(d, recompute=True)]["recompute"] = False


def first_run_marked_recompute(d: Json) -> None:
    d["steps"][find(d, kind="compute", recompute=False)]["recompute"] = True


def skip_recompute(d: Json) -> None:
    """The late reader takes the first stay, whose bytes have been used again."""
    k = find(d, recompute=True)
    (gone,) = d["steps"][k]["writes"]
    value = buffer(d, gone)["value"]
    first = next(b["id"] for b in d["buffers"] if b["value"] == value and b["id"] != gone)
    d["steps"].pop(k)
    for s in d["steps"]:
        s["reads"] = [first if r == gone else r for r in s["reads"]]


def wrong_tile_rows(d: Json) -> None:
    d["steps"][find(d, node="conv1/grad_weight")]["tile_rows"] -= 1


def no_tile_rows(d: Json) -> None:
    k = next(i for i, s in enumerate(d["steps"]) if s["tile_rows"] > 1)
    d["steps"][k]["tile_rows"] = 0


def too_many_tile_rows(d: Json) -> None:
    k = next(i for i, s in enumerate(d["steps"]) if s["tile_rows"] > 1)
    d["steps"][k]["tile_rows"] *= 1000


def no_tile(d: Json) -> None:
    k = next(i for i, s in enumerate(d["steps"]) if s["tile"] is not None)
    d["steps"][k]["tile"] = None


def tile_on_an_operand(d: Json) -> None:
    """The tile lies on the incoming gradient; the layout rule must see it."""
    s = next(s for s in d["steps"] if s["tile"] is not None)
    operand = next(b for b in s["reads"] if b and buffer(d, b)["space"] == "arena")
    buffer(d, s["tile"])["offset"] = buffer(d, operand)["offset"]


def foreign_gradient(d: Json) -> None:
    """Two updates swap their gradient nodes."""
    ks = [i for i, s in enumerate(d["steps"]) if len(s["nodes"]) == 2]
    a, b = d["steps"][ks[0]], d["steps"][ks[1]]
    a["nodes"], b["nodes"] = [b["nodes"][0], a["nodes"][1]], [a["nodes"][0], b["nodes"][1]]


def wrong_dtype(d: Json) -> None:
    b = next(b for b in d["buffers"] if b["space"] == "arena" and b["dtype"] == "f32")
    b["dtype"] = "i32"


def other_shape(d: Json) -> None:
    b = next(b for b in d["buffers"] if b["space"] == "arena" and len(b["shape"]) == 4)
    b["shape"] = b["shape"][::-1]


def half_the_bytes(d: Json) -> None:
    b = next(b for b in d["buffers"] if b["space"] == "arena" and b["bytes"] > 8)
    b["bytes"] //= 2


def alias_live_buffers(d: Json) -> None:
    live = [b for b in d["buffers"] if b["space"] == "arena" and not scratch(b)]
    for a in live:
        for b in live:
            if a["offset"] != b["offset"] and a["first"] < b["first"] < a["last"]:
                b["offset"] = a["offset"]
                return
    raise AssertionError("no two live buffers")


def alias_states(d: Json) -> None:
    a, b = [b for b in d["buffers"] if b["space"] == "state"][:2]
    b["offset"] = a["offset"]


def no_state(d: Json) -> None:
    d["buffers"].remove(next(b for b in d["buffers"] if b["space"] == "state"))


def weight_in_flash(d: Json) -> None:
    b = next(b for b in d["buffers"] if b["space"] == "state")
    b["space"], b["offset"] = "flash", 0


def activation_in_state(d: Json) -> None:
    b = next(b for b in d["buffers"] if b["space"] == "arena" and b["bytes"] <= 16)
    b["space"], b["first"], b["last"], b["offset"] = "state", 0, len(d["steps"]) - 1, 0


def sample_in_io(d: Json) -> None:
    b = next(b for b in d["buffers"] if b["value"] == "x" and b["space"] == "arena")
    b["space"], b["first"], b["last"], b["offset"] = "io", 0, len(d["steps"]) - 1, 0


def retargeted_read(d: Json) -> None:
    """A step reads another live buffer of the same type."""
    for i, s in enumerate(d["steps"]):
        for k, r in enumerate(s["reads"]):
            if r is None:
                continue
            old = buffer(d, r)
            for b in d["buffers"]:
                same = all(b[f] == old[f] for f in ("space", "dtype", "shape"))
                if same and b["value"] != old["value"] and b["first"] < i <= b["last"]:
                    s["reads"][k] = b["id"]
                    return
    raise AssertionError("no other buffer")


def swapped_operands(d: Json) -> None:
    s = next(s for s in d["steps"] if "loss/grad" in s["nodes"])
    s["reads"] = s["reads"][::-1]


def operand_missing(d: Json) -> None:
    s = next(s for s in d["steps"] if "conv1" in s["nodes"])
    s["reads"][2] = None


def unknown_buffer(d: Json) -> None:
    d["steps"][3]["reads"][0] = "nowhere"


def unknown_node(d: Json) -> None:
    d["steps"][3]["nodes"] = ["nowhere"]


def convert_step(d: Json) -> None:
    d["steps"][0]["kind"] = "convert"


def update_as_compute(d: Json) -> None:
    """An optimizer may not run as a plain computation."""
    k = find(d, kind="update", last_micro=True)
    d["steps"][k]["kind"], d["steps"][k]["last_micro"] = "compute", False


def loss_never_computed(d: Json) -> None:
    d["steps"].pop(next(i for i, s in enumerate(d["steps"]) if s["nodes"] == ["loss"]))


def loss_forgotten(d: Json) -> None:
    next(b for b in d["buffers"] if b["value"] == "loss")["last"] -= 1


def duplicate_buffer(d: Json) -> None:
    d["buffers"].append(dict(d["buffers"][0]))


def claim(*path: str, by: float = 1) -> Callable[[Json], None]:
    def lie(d: Json) -> None:
        at = d["claims"]
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = at[path[-1]] + by

    lie.__name__ = f"lie_{'_'.join(path)}"
    return lie


def budget(key: str, of: Callable[[Json], float]) -> Callable[[Json], None]:
    def cut(d: Json) -> None:
        d["device"]["budget"][key] = of(d["claims"])

    cut.__name__ = f"budget_{key}"
    return cut


def decide_update_not_done(d: Json) -> None:
    d["decisions"]["updates"][0]["ratio"] = 0.5


def decide_nothing(d: Json) -> None:
    d["decisions"]["updates"] = []


def decide_too_much(d: Json) -> None:
    d["decisions"]["updates"].append(
        {**d["decisions"]["updates"][0], "param": "ghost.weight", "ratio": 1.0, "channels": None}
    )


def action(value: str) -> Callable[[Json], None]:
    def change(d: Json) -> None:
        a = next(a for a in d["decisions"]["activations"] if a["action"] != value)
        a["action"] = value

    change.__name__ = f"action_{value}"
    return change


def forget_activation(d: Json) -> None:
    d["decisions"]["activations"].pop()


def two_nodes(d: Json) -> None:
    d["steps"][0]["nodes"].append(d["steps"][1]["nodes"][0])


def too_many_results(d: Json) -> None:
    d["steps"][1]["writes"] += d["steps"][1]["writes"]


def result_in_storage(d: Json) -> None:
    b = buffer(d, d["steps"][find(d, kind="compute")]["writes"][0])
    b["space"], b["offset"] = "storage", d["claims"]["storage_bytes"]
    d["claims"]["storage_bytes"] += b["bytes"]


def write_to_flash(d: Json) -> None:
    d["steps"][0]["writes"] = [next(b["id"] for b in d["buffers"] if b["space"] == "flash")]


def too_few_operands(d: Json) -> None:
    d["steps"][0]["reads"].pop()


def view_elsewhere(d: Json) -> None:
    b = next(b for b in d["buffers"] if b["value"] == "flatten")
    b["offset"] = d["claims"]["ram_bytes"]["arena"]
    d["claims"]["ram_bytes"]["arena"] += b["bytes"]


def update_ends_with_a_gradient(d: Json) -> None:
    k = next(i for i, s in enumerate(d["steps"]) if len(s["nodes"]) == 2)
    d["steps"][k]["nodes"].reverse()


def update_marked_recompute(d: Json) -> None:
    d["steps"][find(d, last_micro=True)]["recompute"] = True


def update_with_a_spare_tile(d: Json) -> None:
    d["steps"][find(d, last_micro=True)]["tile_rows"] = 1


def update_writes_the_wrong_state(d: Json) -> None:
    k = find(d, kind="update")
    d["steps"][k]["writes"].reverse()


def stream_what_cannot_be(d: Json) -> None:
    k = find(d, node="fc/grad_bias")
    d["steps"][k]["tile_rows"] -= 1


def two_states_of_one_value(d: Json) -> None:
    b = next(b for b in d["buffers"] if b["space"] == "state")
    d["buffers"].append({**b, "id": "second"})


def ghost_buffer(d: Json) -> None:
    b = next(b for b in d["buffers"] if b["space"] == "arena")
    d["buffers"].append({**b, "id": "second", "value": "ghost"})


def idle_buffer(d: Json) -> None:
    b = next(b for b in d["buffers"] if b["space"] == "arena" and b["value"] != "x")
    d["buffers"].append({**b, "id": "second"})


def moved_constant(d: Json) -> None:
    next(b for b in d["buffers"] if b["space"] == "flash")["offset"] = 4


def mortal_constant(d: Json) -> None:
    next(b for b in d["buffers"] if b["space"] == "flash")["last"] -= 1


def no_steps(d: Json) -> None:
    d["steps"] = []


def other_batch(d: Json) -> None:
    d["model"]["batch"] = 2


def other_momentum(d: Json) -> None:
    d["training"]["momentum"] = 0.8


def no_storage(d: Json) -> None:
    d["device"]["storage"] = None


def unknown_storage(d: Json) -> None:
    d["device"]["storage"] = "floppy"


def precision_of_a_ghost(d: Json) -> None:
    d["decisions"]["precision"]["ghost"] = "f32"


def no_precision(d: Json) -> None:
    d["decisions"]["precision"] = {}


def false_objective(d: Json) -> None:
    d["objective"][0]["value"] *= 1.001


def false_gap(d: Json) -> None:
    d["objective"][0]["bound"] *= 0.9


def ghost_activation(d: Json) -> None:
    d["decisions"]["activations"][0]["value"] = "ghost"


def double_activation(d: Json) -> None:
    d["decisions"]["activations"].append(d["decisions"]["activations"][0])


def activation_of_other_size(d: Json) -> None:
    d["decisions"]["activations"][0]["bytes"] += 4


def double_update(d: Json) -> None:
    d["decisions"]["updates"].append(d["decisions"]["updates"][0])


#: Plan, mutation, repair the lifetimes first, what the message must say.
MUTANTS: list[tuple[str, Callable[[Json], None], bool, str]] = [
    ("cnn-momentum", update_before_input_gradient, True, r"reads conv1.weight .* 0\).* 1\)"),
    ("paged", page_in_never_paged_out, True, "never written"),
    ("paged", page_in_before_page_out, False, "moves .* from arena to storage, not from storage"),
    ("paged", page_in_of_another_tensor, True, "was written|is for|lives"),
    ("paged", page_with_nodes, False, "does nothing else"),
    ("mlp-sgd", update_twice, True, "is updated twice"),
    ("resnet-adam-accumulate", update_twice, True, "is updated twice"),
    ("resnet-adam-accumulate", skip_update, True, "version 2|exactly once|hold"),
    ("mlp-sgd", skip_update, True, "must update it exactly once, but it holds .*version 0"),
    ("resnet-adam-accumulate", apply_in_every_micro_step, False, "last_micro is False"),
    ("resnet-adam-accumulate", accumulate_in_the_last_only, False, "last_micro is True"),
    ("resnet-adam-accumulate", apply_before_accumulate, True, r"accumulated \(version 3\)"),
    ("recompute", recompute_not_marked, False, "recompute is False, but .* has run before"),
    ("recompute", first_run_marked_recompute, False, "recompute is True, but .* not run before"),
    ("recompute", skip_recompute, True, "where .* lives at|which hold"),
    ("cnn-momentum", wrong_tile_rows, False, "scratch buffer tile:"),
    ("cnn-momentum", no_tile_rows, False, "tile_rows is 0"),
    ("cnn-momentum", too_many_tile_rows, False, "tile_rows is"),
    ("cnn-momentum", no_tile, False, "never written|needs a tile"),
    ("cnn-momentum", no_tile, True, "needs a tile buffer"),
    ("cnn-momentum", tile_on_an_operand, False, "takes bytes .* where"),
    ("cnn-momentum", foreign_gradient, False, "is not the gradient that"),
    ("cnn-momentum", wrong_dtype, False, r"is i32\[.* in the plan but f32"),
    ("cnn-momentum", other_shape, False, r"in the plan but f32"),
    ("cnn-momentum", half_the_bytes, False, r"takes \d+ B, not \d+ B"),
    ("cnn-momentum", alias_live_buffers, False, "takes bytes .* where .* lives"),
    ("cnn-momentum", alias_states, False, "space state, where"),
    ("cnn-momentum", no_state, False, "has no state buffer"),
    ("cnn-momentum", weight_in_flash, False, "has no state buffer"),
    ("cnn-momentum", activation_in_state, False, "can't live in space state"),
    ("cnn-momentum", sample_in_io, False, "sample x has 0 buffers"),
    ("cnn-momentum", retargeted_read, False, "of .* instead of"),
    ("cnn-momentum", swapped_operands, False, "instead of"),
    ("cnn-momentum", operand_missing, False, "operand 2 is None, the graph has"),
    ("cnn-momentum", unknown_buffer, False, "no buffer nowhere"),
    ("cnn-momentum", unknown_node, False, "no node nowhere"),
    ("cnn-momentum", convert_step, False, "convert needs a second precision"),
    ("resnet-adam-accumulate", update_as_compute, False, "needs an update step"),
    ("cnn-momentum", loss_never_computed, True, "output loss is never computed"),
    ("cnn-momentum", loss_forgotten, False, "loss must live until the last step"),
    ("cnn-momentum", duplicate_buffer, False, "occurs twice"),
    *(
        (name, claim(*path), False, rf"claims\.{re.escape('.'.join(path))} is")
        for name in ("mlp-sgd", "paged-accumulate")
        for path in (
            ("ram_bytes", "total"),
            ("ram_bytes", "live_peak"),
            ("ram_bytes", "peak_step"),
            ("flash_bytes", "total"),
            ("flash_bytes", "weights"),
            ("flash_bytes", "code"),
            ("storage_bytes",),
            ("cycles",),
        )
    ),
    ("paged", claim("ram_bytes", "arena"), False, "claims.ram_bytes.arena is"),
    ("paged", claim("ram_bytes", "arena", by=-4), False, r"ends at byte \d+, but space arena has"),
    ("paged", claim("ram_bytes", "weights", by=-4), False, "space state has"),
    ("paged", claim("ram_bytes", "optimizer", by=4), False, "claims.ram_bytes.optimizer is"),
    ("paged", claim("storage_bytes", by=-4), False, "space storage has"),
    ("paged", claim("latency_s", by=1e-8), False, "claims.latency_s is"),
    ("paged", claim("latency_s", by=-1e-8), False, "claims.latency_s is"),
    ("paged", claim("energy_j", by=1e-8), False, "claims.energy_j is"),
    ("paged", budget("ram_bytes", lambda c: c["ram_bytes"]["total"] - 1), False, "budget is"),
    ("paged", budget("flash_bytes", lambda c: c["flash_bytes"]["total"] - 1), False, "budget is"),
    ("paged", budget("storage_bytes", lambda c: c["storage_bytes"] - 1), False, "budget is"),
    ("paged", budget("latency_s", lambda c: c["latency_s"] * 0.999), False, "budget is"),
    ("paged", budget("energy_j", lambda c: c["energy_j"] * 0.999), False, "budget is"),
    ("partial-momentum", decide_update_not_done, False, "ratio 0.5 in the plan"),
    ("mlp-sgd", decide_nothing, False, "is updated but not decided"),
    ("mlp-sgd", decide_too_much, False, "no step updates it"),
    ("recompute", action("keep"), False, "is to keep, but the steps recompute it"),
    ("recompute", action("recompute"), False, "is to recompute, but the steps keep it"),
    ("paged", action("page"), False, "is to page, but the steps"),
    ("paged", forget_activation, False, "is not listed"),
    ("cnn-momentum", two_nodes, False, "a compute step runs one node"),
    ("cnn-momentum", too_many_results, True, "was written by step"),
    ("paged", result_in_storage, True, "to space storage, not to the arena"),
    ("partial-momentum", write_to_flash, False, "read-only space flash"),
    ("cnn-momentum", too_few_operands, True, r"reads 2 operands, the graph has 3"),
    ("cnn-momentum", view_elsewhere, False, "must lie where"),
    ("cnn-momentum", update_ends_with_a_gradient, False, "ends with an apply"),
    ("resnet-adam-accumulate", update_marked_recompute, False, "an update runs once"),
    ("resnet-adam-accumulate", update_with_a_spare_tile, False, "no gradient to stream"),
    ("cnn-momentum", update_writes_the_wrong_state, False, "must write"),
    ("cnn-momentum", stream_what_cannot_be, False, "can't be streamed"),
    ("cnn-momentum", two_states_of_one_value, False, "has two state buffers"),
    ("cnn-momentum", ghost_buffer, False, "no value ghost"),
    ("cnn-momentum", idle_buffer, False, "is never written"),
    ("partial-momentum", moved_constant, False, "offset 4 in space flash"),
    ("partial-momentum", mortal_constant, False, "flash lives from 0 to"),
    ("cnn-momentum", no_steps, False, "no steps"),
    ("cnn-momentum", other_batch, False, "model.batch is 2"),
    ("cnn-momentum", other_momentum, False, "training.momentum is 0.8"),
    ("paged", no_storage, False, "pages, but the plan has no storage"),
    ("paged", unknown_storage, False, "has no storage floppy"),
    ("mlp-sgd", precision_of_a_ghost, False, "ghost is no layer of the graph"),
    ("mlp-sgd", no_precision, False, "precision: fc0 is missing"),
    ("mlp-sgd", false_objective, False, "objective latency: value is"),
    ("mlp-sgd", false_gap, False, "objective latency: gap is 0.0"),
    ("mlp-sgd", ghost_activation, False, "ghost is unknown"),
    ("mlp-sgd", double_activation, False, "listed twice"),
    ("mlp-sgd", activation_of_other_size, False, "takes .* B, not"),
    ("mlp-sgd", double_update, False, "occurs twice"),
]


@pytest.mark.parametrize(
    ("name", "mutate", "repair", "pattern"),
    [pytest.param(*m, id=f"{m[1].__name__}-{m[0]}-{i}") for i, m in enumerate(MUTANTS)],
)
def test_mutant(name: str, mutate: Callable[[Json], None], repair: bool, pattern: str) -> None:
    e = exhibit(name)
    d = dump(e)
    mutate(d)
    reject(e, repaired(d) if repair else d, pattern)


@pytest.mark.parametrize("name", RECIPES)
def test_repair_keeps_good_plans_good(name: str) -> None:
    """Else a repaired mutant could be rejected for the wrong reason."""
    e = exhibit(name)
    check(Plan.model_validate(repaired(dump(e))), e.training, DEVICE)


def test_no_stateful_operator_runs_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """If Conv drew random numbers, no plan that recomputes it could be right."""
    e = exhibit("recompute")
    monkeypatch.setitem(opdef.OPS, "Conv", replace(get_op("Conv"), stateful=True))
    again = {n for s in e.plan.steps if s.recompute for n in s.nodes}
    assert any("conv" in n and "relu" not in n for n in again)
    reject(e, dump(e), "must run once per step")


def test_in_place_only_where_the_operator_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    e = exhibit("recompute")
    assert any(
        a.offset == b.offset and a.last == b.first and a.value == "conv1" and b.value == "relu1"
        for a in e.plan.buffers
        for b in e.plan.buffers
    ), "the plan works in place"
    monkeypatch.setitem(opdef.OPS, "Relu", replace(get_op("Relu"), inplace=()))
    reject(e, dump(e), r"takes bytes .* where conv\d")


def test_storage_that_is_too_small() -> None:
    e = exhibit("paged")
    small = tuple(s.model_copy(update={"bytes": 64}) for s in DEVICE.storage)
    device = DEVICE.model_copy(update={"storage": small})
    with pytest.raises(CheckError, match=r"pages \d+ B, but sdcard holds 64 B"):
        check(e.plan, e.training, device)


def test_workspaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """No operator needs one so far, so Conv is made to."""
    monkeypatch.setitem(opdef.OPS, "Conv", replace(get_op("Conv"), workspace=lambda _: 40))
    forward = nets.cnn()
    training = plans.training_of(forward)
    e = Exhibit(forward, training, plans.keep_all(training))
    e.report()

    def mutant(change: Callable[[Json, Json], Any]) -> Json:
        d = dump(e)
        change(d, next(s for s in d["steps"] if s["nodes"] == ["conv1"]))
        return d

    def smaller(d: Json, s: Json) -> None:
        b = buffer(d, s["workspace"])
        b["bytes"], b["shape"] = 36, [36]

    def on(k: str) -> Callable[[Json, Json], None]:
        def move(d: Json, s: Json) -> None:
            buffer(d, s["workspace"])["offset"] = buffer(d, s[k][0])["offset"]

        return move

    reject(e, repaired(mutant(lambda _, s: s.update(workspace=None))), "needs a workspace of 40 B")
    reject(e, mutant(smaller), r"u8\[36\] in space arena, but needed is workspace:conv1, u8\[40\]")
    for operand in ("reads", "writes"):
        d = mutant(on(operand))
        reject(e, d, "takes bytes")
        with pytest.raises(CheckError, match=r"overlap|can't work in place"):
            Machine(resolve(Plan.model_validate(d), training)).run()


def test_a_gradient_may_not_read_rows_that_its_own_update_has_changed() -> None:
    """With one tile the gradient is complete before the update; with several it is not."""
    e = exhibit("mlp-sgd")
    k = next(i for i, s in enumerate(e.plan.steps) if s.nodes[-1] == "fc1.weight/update")
    rows = e.plan.steps[k].tile_rows
    node = e.training.updates[0].grad_node
    update = next(u for u in e.training.updates if u.value.name == "fc1.weight")
    assert update.grad_node is not None
    assert rows < update.value.type.shape[0], "the update is streamed"
    node = update.grad_node
    node.inputs = (*node.inputs, update.value)
    try:
        d = dump(e)
        d["steps"][k]["reads"].insert(len(node.inputs) - 1, "fc1.weight")
        reject(e, d, "whose first rows are already updated")
    finally:
        node.inputs = node.inputs[:-1]


def test_frozen_parameters_may_be_listed() -> None:
    e = exhibit("partial-momentum")
    d = dump(e)
    frozen = {**d["decisions"]["updates"][0], "param": "conv0.weight", "node": "conv0"}
    d["decisions"]["updates"].append({**frozen, "ratio": 0.0, "channels": None, "importance": 0.0})
    check(Plan.model_validate(d), e.training, DEVICE)
    d["decisions"]["updates"][-1]["channels"] = 1
    reject(e, d, "conv0.weight has ratio 0.0 but no step updates it|channels")


@pytest.mark.parametrize(
    ("field", "value"), [("param", "conv0"), ("node", "conv1"), ("role", "bias")]
)
def test_frozen_parameters_are_those_of_the_graph(field: str, value: str) -> None:
    e = exhibit("partial-momentum")
    d = dump(e)
    frozen = {**d["decisions"]["updates"][0], "param": "conv0.weight", "node": "conv0"}
    frozen |= {"ratio": 0.0, "channels": None, "importance": 0.0}
    d["decisions"]["updates"].append({**frozen, field: value})
    reject(e, d, "is no (weight|bias) of a forward node")


@pytest.mark.parametrize(
    ("name", "value"), [("energy", 1.0), ("ram", 4.0), ("flash", 4.0), ("latency", 4.0)]
)
def test_objective_is_what_the_plan_takes(name: str, value: float) -> None:
    e = exhibit("mlp-sgd")
    d = dump(e)
    d["objective"] = [{"name": name, "value": value, "bound": value, "gap": 0.0}]
    reject(e, d, f"objective {name}: value is")


def test_objective_stages_and_bounds() -> None:
    e = exhibit("mlp-sgd")
    d = dump(e)
    (stage,) = d["objective"]
    d["objective"] = [stage, stage]
    reject(e, d, "one occurs twice")
    worse = {**stage, "bound": 2 * stage["value"], "gap": 1.0}
    d["objective"] = [worse]
    reject(e, d, "is beyond its bound")
