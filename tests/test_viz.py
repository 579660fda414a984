"""Pictures: valid files, every arena buffer once, hostile names, same bytes for the same plan."""

from __future__ import annotations

import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import nets
import numpy as np
import plans
import pytest

from odt_plan.backends.viz import write_dot, write_memory_svg, write_svg
from odt_plan.backends.viz.layers import arrange
from odt_plan.backends.viz.picture import STYLES, kib
from odt_plan.backends.viz.routing import GAP, place, spread
from odt_plan.backends.viz.svg import shorten
from odt_plan.ir.errors import OdtPlanError
from odt_plan.ir.graph import Graph, Node, TensorType, Value
from odt_plan.ir.training import TrainingGraph, TrainingSpec
from odt_plan.planner.check import CheckReport, Lifetime, StepReport, check
from odt_plan.planner.device import load_device
from odt_plan.planner.plan import (
    Budget,
    Buffer,
    Claims,
    Decisions,
    DeviceInfo,
    ModelInfo,
    Objective,
    Plan,
    SolverInfo,
    Step,
    Training,
    UpdateDecision,
)

SVG = "{http://www.w3.org/2000/svg}"
TAGS = {"svg", "title", "rect", "text", "tspan", "g", "path", "defs", "marker", "line", "circle"}
TAGS |= {"pattern"}
HOSTILE = [
    "<script>alert('&\"')</script>",
    "Süß/層\U0001f600",
    "x" * 500,
    'a"b\\n\\N\\"',
    "\x00\x1b\u202e]]>",
]


def _node(
    g: Graph, op: str, name: str, inputs: list[Value], shape: tuple[int, ...], phase="forward"
):
    """A node without registry inference: the pictures need no operator semantics."""
    node = Node(op, name, tuple(inputs), (), {}, phase)
    node.outputs = (Value(f"{name}.y" if name in g.values else name, TensorType(shape), node),)
    g.values[node.out.name] = node.out
    g.nodes.append(node)
    return node.out


def _training(names: list[str], skip: int = 3) -> TrainingGraph:
    """A chain of convolutions with residual additions, a loss and one backward node per layer."""
    g = Graph("net")
    x = v = g.add_input("x", TensorType((1, 4, 8, 8)))
    target = g.add_input("target", TensorType((1,), "i32"))
    hyper = g.add_input("hyper", TensorType((3,)))
    past: list[Value] = []
    for i, name in enumerate(names):
        past.append(v)
        if i % skip == skip - 1:
            v = _node(g, "Add", name, [v, past[-skip + 1]], (1, 4, 8, 8))
        else:
            w = g.add_constant(f"{name}.w", np.zeros((4, 4, 3, 3), np.float32))
            v = _node(g, "Conv", name, [v, w], (1, 4, 8, 8))
    loss = _node(g, "CrossEntropy", "the loss", [v, target], (), "loss")
    d = _node(g, "SoftmaxCrossEntropyGrad", "the loss/grad", [v, target], (1, 4, 8, 8), "backward")
    forward = [n for n in g.nodes if n.phase == "forward"]
    for n in reversed(forward[1:]):
        d = _node(g, "ConvGradInput", f"{n.name}/dx", [d, *n.operands()], (1, 4, 8, 8), "backward")
    return TrainingGraph(g, TrainingSpec(), (x,), (target,), hyper, (v,), loss, ())


def _plan(training: TrainingGraph, budget: int = 4096) -> tuple[Plan, CheckReport]:
    """All nodes in order; the second convolution is recomputed, the first is updated and paged."""
    forward = [n for n in training.graph.nodes if n.phase == "forward"]
    first, second = forward[0], forward[1]
    buffers: list[Buffer] = []
    steps: list[Step] = []
    where: dict[str, str] = {}

    def buffer(value: Value, space="arena") -> str:
        b = f"b{len(buffers)}"
        size = -(-value.type.nbytes // 4) * 4
        slot = len(buffers) % 7  # a rectangle in the picture, not a valid layout
        buffers.append(
            Buffer(
                id=b,
                value=value.name,
                space=space,
                dtype=value.type.dtype,
                shape=value.type.shape or (1,),
                bytes=size,
                offset=slot * 1024 if space == "arena" else 0,
                first=len(steps),
                last=len(steps) + 3,
            )
        )
        return b

    def compute(node: Node, *, recompute: bool = False) -> None:
        reads = tuple(where.get(v.name) for v in node.operands())
        where[node.out.name] = b = buffer(node.out)
        steps.append(
            Step(
                kind="compute",
                nodes=(node.name,),
                reads=reads,
                writes=(b,),
                recompute=recompute,
                cycles=10,
            )
        )

    where["x"] = buffer(training.sample)
    for node in training.graph.nodes:
        if node.phase == "backward" and node.name.endswith(f"{second.name}/dx"):
            compute(second, recompute=True)
        compute(node)
        if node is first:
            out = buffer(node.out, "storage")
            steps.append(
                Step(kind="page_out", reads=(where[node.out.name],), writes=(out,), cycles=5)
            )
    last = len(steps) - 1
    buffers = [b.model_copy(update={"last": min(b.last, last)}) for b in buffers]
    phase_of = {n.name: n.phase for n in training.graph.nodes}
    arena = [b for b in buffers if b.space == "arena"]
    live = [sum(b.bytes for b in arena if b.first <= i <= b.last) for i in range(last + 1)]
    peak = max(live)
    reports = []
    for i, s in enumerate(steps):
        phase = phase_of[s.nodes[0]] if s.nodes else "paging"
        phase = "recompute" if s.recompute else phase
        label = " ".join(s.nodes) or s.kind
        reports.append(StepReport(i, s.kind, label, phase, live[i], s.cycles, 0))
    report = CheckReport(
        steps=tuple(reports),
        lifetimes=tuple(
            Lifetime(b.id, b.value, b.offset, b.bytes, b.first, b.last, reports[b.first].phase)
            for b in arena
        ),
        arena_bytes=7 * 1024,
        state_bytes=576,
        live_peak_bytes=peak,
        peak_step=live.index(peak),
        cycles=10 * len(steps),
        latency_s=0.0123,
        energy_j=4.5e-6,
        transfer_cycles=0,
        storage_bytes=1024,
        worn_bytes=0,
        life_steps=None,
        flash_weights_bytes=5760,
        phase_cycles={},
    )
    plan = Plan(
        schema_version=1,
        odt_plan_version="0",
        model=ModelInfo(
            name=training.graph.name, file="m.onnx", sha256="0" * 64, batch=1, fold_batchnorm=True
        ),
        training=Training(
            loss="cross_entropy",
            optimizer="sgd",
            micro_batches=1,
            momentum=0,
            beta1=0,
            beta2=0,
            epsilon=0,
        ),
        device=DeviceInfo(
            id="test-board", storage=None, budget=Budget(ram_bytes=budget, flash_bytes=1)
        ),
        status="optimal",
        objective=(Objective(name="latency", value=10, bound=10, gap=0),),
        claims=Claims.model_construct(),  # the pictures show the report's figures, not the claims
        decisions=Decisions(
            importance_source="prior",
            updates=tuple(
                UpdateDecision(
                    param=f"{node.name}.w",
                    node=node.name,
                    role="weight",
                    ratio=ratio,
                    channels=channels,
                    importance=ratio,
                )
                for node, ratio, channels in ((first, 0.25, 1), (second, 0.0, None))
            ),
            activations=(),
            precision={},
        ),
        buffers=tuple(buffers),
        steps=tuple(steps),
        solver=SolverInfo(name="s", version="1", seed=0, time_s=0),
    )
    return plan, report


def _names(count: int) -> list[str]:
    return [f"layer{i}" for i in range(count)]


def _titles(path: Path) -> list[str]:
    return [t.text or "" for t in ElementTree.parse(path).iter(f"{SVG}title")]


@pytest.fixture
def hostile() -> TrainingGraph:
    training = _training(HOSTILE + _names(4))
    training.graph.name = HOSTILE[0]
    return training


def test_memory_picture_shows_every_arena_buffer_once(tmp_path):
    plan, report = _plan(_training(_names(12)))
    write_memory_svg(plan, report, tmp_path / "memory.svg")
    root = ElementTree.parse(tmp_path / "memory.svg").getroot()
    shown = [e for e in root.iter(f"{SVG}rect") if e.get("class", "").startswith("lifetime")]
    titles = [e.findtext(f"{SVG}title") or "" for e in shown]
    arena = [b for b in plan.buffers if b.space == "arena"]
    assert len(shown) == len(arena)
    for b in arena:
        expected = f"({b.id})"
        (found,) = [t for t in titles if expected in t]
        assert f"{b.bytes:,} B at offset {b.offset:,}" in found
        assert f"steps {b.first} to {b.last}" in found


def test_pictures_of_a_squeezed_plan_show_what_its_steps_do(tmp_path):
    """A real plan with recomputation and paging, drawn from the checker's own report."""
    forward = nets.resnet(blocks=3, size=8)
    training = plans.training_of(forward)
    ram = plans.keep_all(training).claims.ram_bytes
    limit = ram.total - ram.arena + ram.live_peak * 45 // 100
    plan = plans.squeezed(forward, training, ram_bytes=limit, storage="sdcard")
    report = check(plan, training, load_device(plans.BOARD))
    again = {n for s in plan.steps if s.recompute for n in s.nodes}
    assert again
    assert any(s.kind == "page_in" for s in plan.steps)
    write_svg(plan, training, report, tmp_path / "plan.svg")
    root = ElementTree.parse(tmp_path / "plan.svg").getroot()
    marked = set()
    for g in root.iter(f"{SVG}g"):
        strokes = {r.get("stroke") for r in g.findall(f"{SVG}rect")}
        if g.get("class") == "node" and STYLES["recomputed"].color in strokes:
            marked.add((g.findtext(f"{SVG}title") or "").split()[1])
    assert marked == again
    write_memory_svg(plan, report, tmp_path / "memory.svg")
    ids = [b.id for b in plan.buffers if b.space == "arena"]
    titles = [t.split("\n")[0] for t in _titles(tmp_path / "memory.svg")]
    assert all(sum(t.endswith(f" ({i})") for t in titles) == 1 for i in ids)


def test_memory_rectangles_are_to_scale(tmp_path):
    plan, report = _plan(_training(_names(12)))
    write_memory_svg(plan, report, tmp_path / "memory.svg")
    root = ElementTree.parse(tmp_path / "memory.svg").getroot()
    shown = [e for e in root.iter(f"{SVG}rect") if e.get("class", "").startswith("lifetime")]
    box = [{k: float(e.get(k, 0)) for k in ("x", "y", "width", "height")} for e in shown]
    lives = report.lifetimes
    per_byte = max(b["height"] for b in box) / max(life.bytes for life in lives)
    per_step = max(b["width"] for b in box) / max(life.last - life.first + 1 for life in lives)
    left, bottom = (
        box[0]["x"],
        max(b["y"] + b["height"] for b in box),
    )  # the sample: step 0, offset 0
    for b, life in zip(box, lives, strict=True):
        assert b["height"] == pytest.approx(life.bytes * per_byte, abs=0.35)
        assert b["width"] == pytest.approx((life.last - life.first + 1) * per_step, abs=0.35)
        assert b["x"] == pytest.approx(left + life.first * per_step, abs=0.35)
        assert b["y"] + b["height"] == pytest.approx(bottom - life.offset * per_byte, abs=0.35)


def test_memory_picture_tells_kinds_apart(tmp_path):
    plan, report = _plan(_training(_names(12)))
    write_memory_svg(plan, report, tmp_path / "memory.svg")
    root = ElementTree.parse(tmp_path / "memory.svg").getroot()
    kinds = {}
    for e in root.iter(f"{SVG}rect"):
        if e.get("class", "").startswith("lifetime"):
            kinds.setdefault(e.get("class", "").split()[1], []).append(
                e.findtext(f"{SVG}title") or ""
            )
    assert set(kinds) == {"forward", "saved", "restored", "gradient"}
    assert [t.split(" ")[0] for t in kinds["restored"]] == ["layer1"]
    assert any(t.startswith("layer5/dx ") for t in kinds["gradient"])


@pytest.mark.parametrize(
    ("budget", "label"), [(8192, "RAM budget 8,192 B leaves 7,616 B"), (10**6, "above this scale")]
)
def test_memory_picture_marks_budget_and_peak(tmp_path, budget, label):
    plan, report = _plan(_training(_names(12)), budget)
    write_memory_svg(plan, report, tmp_path / "memory.svg")
    texts = [t.text or "" for t in ElementTree.parse(tmp_path / "memory.svg").iter(f"{SVG}text")]
    assert any(label in t for t in texts)
    assert any(
        f"live peak {report.live_peak_bytes:,} B at step {report.peak_step}" in t for t in texts
    )


def test_graph_picture_has_every_forward_node_with_its_decision(tmp_path):
    training = _training(_names(12))
    plan, report = _plan(training)
    write_svg(plan, training, report, tmp_path / "plan.svg")
    root = ElementTree.parse(tmp_path / "plan.svg").getroot()
    boxes = {
        (g.findtext(f"{SVG}title") or "").split("\n")[0]: g
        for g in root.iter(f"{SVG}g")
        if g.get("class") == "node"
    }
    forward = [n for n in training.graph.nodes if n.phase in ("forward", "loss")]
    assert set(boxes) == {f"{n.op} {n.name} [{n.phase}]" for n in forward} | {
        "run-time input x",
        "run-time input target",
    }
    colors = {
        k: [r.get("stroke") for r in g.iter(f"{SVG}rect") if r.get("stroke")]
        for k, g in boxes.items()
    }
    assert colors["Conv layer0 [forward]"] == [STYLES["updated"].color, STYLES["paged"].color]
    assert colors["Conv layer1 [forward]"] == [STYLES["frozen"].color, STYLES["recomputed"].color]
    assert colors["Conv layer3 [forward]"] == [STYLES["frozen"].color]
    assert STYLES["frozen"].color not in colors["Add layer2 [forward]"]
    words = " ".join(t.text or "" for t in boxes["Conv layer0 [forward]"].iter(f"{SVG}text"))
    assert "updates weight 1/4, paged" in words
    edges = [g for g in root.iter(f"{SVG}g") if g.get("class") == "edge"]
    assert len(edges) == sum(
        len({v for v in n.operands() if v.name not in training.graph.constants}) for n in forward
    )


def test_hostile_names_stay_text(tmp_path, hostile):
    plan, report = _plan(hostile)
    write_svg(plan, hostile, report, tmp_path / "plan.svg")
    write_memory_svg(plan, report, tmp_path / "memory.svg")
    for name in ("plan.svg", "memory.svg"):
        root = ElementTree.parse(tmp_path / name).getroot()
        assert not list(root.iter(f"{SVG}script"))
        assert {e.tag.removeprefix(SVG) for e in root.iter()} <= TAGS
    titles = "\n".join(_titles(tmp_path / "plan.svg"))
    for name in HOSTILE[:4]:
        assert name in titles
    longest = max(
        len("".join(t.itertext()))
        for t in ElementTree.parse(tmp_path / "plan.svg").iter(f"{SVG}text")
    )
    assert longest < 200


def test_dot_is_valid_and_names_stay_text(tmp_path, hostile):
    plan, report = _plan(hostile)
    write_dot(plan, hostile, report, tmp_path / "plan.dot")
    text = (tmp_path / "plan.dot").read_text(encoding="utf-8")
    _check_dot_grammar(text)
    dot = shutil.which("dot")
    if dot is None:
        return  # the grammar check above has passed
    done = subprocess.run(
        [dot, "-Tsvg", str(tmp_path / "plan.dot")], capture_output=True, check=True, timeout=60
    )
    assert done.stderr == b""
    root = ElementTree.fromstring(done.stdout)
    nodes = [
        g
        for g in root.iter(f"{SVG}g")
        if g.get("class") == "node" and (g.findtext(f"{SVG}title") or "").startswith("n")
    ]
    assert len(nodes) == len([n for n in hostile.graph.nodes if n.phase in ("forward", "loss")]) + 2
    tips = "\n".join(v for e in root.iter() for k, v in e.attrib.items() if k.endswith("title"))
    for name in (n.replace("\\", "\u2216") for n in HOSTILE[:4]):
        assert f"Conv {name} " in tips or f"Add {name} " in tips


def _check_dot_grammar(text: str) -> None:
    """The subset of the DOT grammar that the writer uses."""
    string = r'"(?:[^"\\\x00]|\\.)*"'
    value = rf"(?:{string}|[A-Za-z0-9_.]+)"
    pair = rf"{'[a-z]+'}={value}"
    attributes = rf"\[{pair}(?:, {pair})*\]"
    names = r"graph|node|edge|[nk]\d+(?: -> [nk]\d+)*"
    opening = r"digraph plan \{|subgraph cluster_legend \{"
    line = re.compile(rf"{opening}|\}}|(?:{names}) {attributes};|{pair}(?:; {pair})*;")
    for row in text.splitlines():
        assert line.fullmatch(row.strip()), row
    outside = re.sub(string, "", text)
    assert outside.count("{") == outside.count("}") == 2


def test_same_plan_gives_the_same_bytes(tmp_path):
    contents = []
    for run in ("a", "b"):
        training = _training(_names(30))
        plan, report = _plan(training)
        folder = tmp_path / run
        folder.mkdir()
        write_dot(plan, training, report, folder / "plan.dot")
        write_svg(plan, training, report, folder / "plan.svg")
        write_memory_svg(plan, report, folder / "memory.svg")
        contents.append({p.name: p.read_bytes() for p in sorted(folder.iterdir())})
    assert contents[0] == contents[1]
    assert sorted(contents[0]) == ["memory.svg", "plan.dot", "plan.svg"]


def test_unwritable_target_is_one_line_and_leaves_nothing(tmp_path):
    plan, report = _plan(_training(_names(4)))
    with pytest.raises(OdtPlanError, match=r"memory\.svg: can't write: .*; choose another"):
        write_memory_svg(plan, report, tmp_path / "missing" / "memory.svg")
    (tmp_path / "plan.svg").mkdir()
    with pytest.raises(OdtPlanError):
        write_memory_svg(plan, report, tmp_path / "plan.svg")
    assert [p.name for p in tmp_path.iterdir()] == ["plan.svg"]


@pytest.mark.parametrize("count", [1, 2, 11, 60, 200])
def test_boxes_do_not_overlap_and_edges_end_at_their_boxes(count):
    edges = [(i, i + 1, "v") for i in range(count - 1)]
    edges += [(i, i + 3, "v") for i in range(0, count - 3, 3)]
    edges += [(0, count - 1, "far")] if count > 4 else []
    widths = [200.0 + 20 * (i % 3) for i in range(count)]
    height = 50.0
    layers = arrange(widths, edges, 20.0, 90.0)
    drawing = place(layers, height)
    boxes = list(zip(drawing.x, drawing.y, widths, strict=True))
    for i, (x, y, w) in enumerate(boxes):
        assert x >= -0.1
        assert x + w <= drawing.width + 0.1
        assert y + height <= drawing.height + 0.1
        for u, v, s in boxes[i + 1 :]:
            assert x + w <= u + 0.1 or u + s <= x + 0.1 or y + height <= v or v + height <= y
    for (a, b, _), points in zip(edges, drawing.routes, strict=True):
        (x, y), (u, v) = points[0], points[-1]
        assert boxes[a][0] <= x <= boxes[a][0] + boxes[a][2]
        assert y == pytest.approx(boxes[a][1] + height)
        assert boxes[b][0] <= u <= boxes[b][0] + boxes[b][2]
        assert v == pytest.approx(boxes[b][1])
        for p, q in pairwise(points):
            assert abs(p[0] - q[0]) < 0.6 or abs(p[1] - q[1]) < 0.6
            for n, (left, top, w) in enumerate(boxes):
                if n not in (a, b):  # an edge never runs through somebody else's box
                    clear_x = max(p[0], q[0]) <= left or min(p[0], q[0]) >= left + w
                    clear_y = max(p[1], q[1]) <= top or min(p[1], q[1]) >= top + height
                    assert clear_x or clear_y, (a, b, n)
    if count == 200:
        assert 0.5 < drawing.width / drawing.height < 4


def test_spread_keeps_distance_and_stays_near():
    assert spread([0.0, 100.0], [0.0, GAP], [1.0, 1.0]) == [0.0, 100.0]
    assert spread([10.0, 10.0], [0.0, 20.0], [1.0, 1.0]) == [0.0, 20.0]
    assert spread([10.0, 10.0], [0.0, 20.0], [3.0, 1.0]) == [5.0, 25.0]


def test_short_names_and_sizes():
    assert shorten("abc", 8) == "abc"
    assert shorten("abcdefghij", 7) == "abc…hij"
    assert shorten("層層層層", 5) == "層…層"
    assert [kib(n) for n in (0, 1023, 1024, 1536, 3 << 20)] == [
        "0 B",
        "1023 B",
        "1 KiB",
        "1.5 KiB",
        "3 MiB",
    ]
