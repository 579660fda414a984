"""What must become of any file: a graph that computes what others compute, or one clear error."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto

from odt_plan.ir.autodiff import build_training, candidates
from odt_plan.ir.errors import ModelWarning, OdtPlanError, UsageError
from odt_plan.ir.graph import Graph
from odt_plan.ir.interpreter import run
from odt_plan.ir.onnx_import import import_model
from odt_plan.ir.training import TrainingSpec

Array = NDArray[Any]
#: Graphs that need more are not executed: only their types are judged.
MAX_RUN_BYTES = 50_000_000
#: Largest difference from the oracle, relative to the largest value.
TOLERANCE = 1e-3
#: Characters of a line: nodes with one reason share a line, and their names may be long.
MAX_LINE = 20_000


@dataclass(frozen=True)
class Verdict:
    """What became of a file.

    Attributes:
        kind: ``agrees`` with an oracle, ``refused`` with a clear error, ``unjudged`` (runs, but no
            oracle takes the file, or it is too large to run), or ``defect``.
        text: The error, which oracle, or what is wrong.
    """

    kind: str
    text: str


def judge(path: Path, stage: Callable[[str], None] = lambda _: None) -> Verdict:
    """Import, differentiate, run and compare; ``stage`` is told what begins."""
    stage("import")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            graph = import_model(path)
            graph.verify()
        except OdtPlanError as e:
            return _judge_message(path, str(e))
        except Exception as e:
            return Verdict("defect", f"import raises {type(e).__name__}: {_line(e)}")
    if strange := [w.message for w in caught if not issubclass(w.category, ModelWarning)]:
        return Verdict("defect", f"import warns: {_line(strange[0])}")
    try:
        _differentiate(graph)
    except OdtPlanError as e:
        if (message := _judge_message(path, str(e), named=False)).kind == "defect":
            return message
    except Exception as e:
        return Verdict("defect", f"training raises {type(e).__name__}: {_line(e)}")
    if sum(v.type.nbytes for v in graph.values.values()) > MAX_RUN_BYTES:
        return Verdict("unjudged", "too large to run")
    stage("run")
    feeds = _feeds(graph)
    try:
        with np.errstate(all="ignore"):
            env = run(graph, feeds)
    except UsageError as e:  # positions that depend on the sample
        stage("oracle")
        return _refused_alike(path, feeds, str(e))
    except Exception as e:
        return Verdict("defect", f"running raises {type(e).__name__}: {_line(e)}")
    stage("oracle")
    return _compare(path, graph, feeds, [env[v.name] for v in graph.outputs])


def _judge_message(path: Path, text: str, *, named: bool = True) -> Verdict:
    """One line, or one per obstacle: no traceback, no line without end, the file's name."""
    lines = text.splitlines()
    listed = all(line.startswith("  ") and len(line) > 4 for line in lines[1:])
    if not text.strip() or "Traceback" in text or not listed or max(map(len, lines)) > MAX_LINE:
        return Verdict("defect", f"unclear message: {text[:500]!r}")
    if named and str(path) not in text:
        return Verdict("defect", f"the message doesn't name the file: {text[:500]!r}")
    return Verdict("refused", lines[0].replace(str(path), "FILE"))


def _differentiate(graph: Graph) -> None:
    """A training step of everything, as a plan needs it."""
    if len(graph.inputs) == len(graph.outputs) == 1:
        chosen = [c for c in candidates(graph) if c.channels is None and c.saved == "f32"]
        if chosen:
            build_training(graph, TrainingSpec(loss="mse"), chosen).graph.verify()


def _feeds(graph: Graph) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    feeds: dict[str, Array] = {}
    for v in graph.inputs:
        if v.type.dtype == "f32":
            feeds[v.name] = rng.standard_normal(v.type.shape, np.float32)
        else:
            feeds[v.name] = rng.integers(0, 2, v.type.shape).astype(v.type.np_dtype)
    return feeds


def _compare(path: Path, graph: Graph, feeds: dict[str, Array], got: list[Array]) -> Verdict:
    if any(v.type.dtype != "f32" for v in graph.inputs):
        return Verdict("unjudged", "inputs that are no real numbers")
    wrong = ""
    for name, want in _oracles(path, feeds):
        difference = _difference(graph, feeds, got, want)
        if not difference:
            return Verdict("agrees", name)
        wrong = wrong or f"differs from {name}: {difference}"
    return Verdict("defect", wrong) if wrong else Verdict("unjudged", "no oracle takes it")


def _refused_alike(path: Path, feeds: dict[str, Array], text: str) -> Verdict:
    """A sample that is refused: no oracle takes it."""
    for name, _ in _oracles(path, feeds):
        return Verdict("defect", f"running raises {_line(text)}; {name} runs it")
    return Verdict("refused", _line(text))


def _oracles(path: Path, feeds: dict[str, Array]) -> Iterator[tuple[str, list[Array]]]:
    """Name and results of each oracle that takes the file and the sample."""
    model = _plain(path)
    for name, oracle in (("onnxruntime", _onnxruntime), ("onnx reference", _reference)):
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                want = oracle(model, feeds)
        except Exception:  # it does not take them, or is not there
            continue
        yield name, want


def _difference(graph: Graph, feeds: dict[str, Array], got: list[Array], want: list[Array]) -> str:
    if len(got) != len(want):
        return f"{len(got)} results, not {len(want)}"
    exact: list[Array] | None = None
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if a.shape != np.shape(b):
            return f"result {i} has the shape {a.shape}, not {np.shape(b)}"
        if b.dtype.kind != "f" or graph.quantization:
            continue  # 8-bit models: real numbers here, which neither round nor saturate
        if _close(a, b, TOLERANCE):
            continue
        if exact is None:
            exact = _in_double(graph, feeds)
        if not _close(a, exact[i], TOLERANCE / 10):
            continue  # rounding alone moves it that far
        return f"result {i} is {a.reshape(-1)[:4]}, not {b.reshape(-1)[:4]}"
    return ""


def _close(a: Array, b: Array, tolerance: float) -> bool:
    with np.errstate(all="ignore"):
        finite = np.isfinite(b) & np.isfinite(a)
        if not np.array_equal(np.isnan(a), np.isnan(b)):
            return False
        if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
            return False
        largest = np.abs(b[finite]).max(initial=0)
        return bool(np.abs(a[finite] - b[finite]).max(initial=0) <= tolerance * max(1e-6, largest))


def _in_double(graph: Graph, feeds: dict[str, Array]) -> list[Array]:
    data = {**graph.constants, **feeds}
    wide = {k: a.astype(np.float64) if a.dtype == np.float32 else a for k, a in data.items()}
    with np.errstate(all="ignore"):
        env = run(graph, wide)
    return [env[v.name] for v in graph.outputs]


def _plain(path: Path) -> ModelProto:
    """The model without what oracles are strict about, and which changes no result.

    Those are names of nodes that occur twice, the version of the file format, and recorded shapes
    of values between.
    """
    proto = onnx.load(path)
    for node in proto.graph.node:
        node.name = ""
    proto.ir_version = 8
    del proto.graph.value_info[:]
    newest = onnx.defs.onnx_opset_version()
    for o in proto.opset_import:
        o.version = min(o.version, newest)
    return proto


def _onnxruntime(proto: ModelProto, feeds: dict[str, Array]) -> list[Array]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = proto.SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    result: list[Array] = session.run(None, feeds)
    return result


def _reference(proto: ModelProto, feeds: dict[str, Array]) -> list[Array]:
    from onnx.reference import ReferenceEvaluator

    onnx.checker.check_model(proto)
    return [np.asarray(a) for a in ReferenceEvaluator(proto).run(None, feeds)]


def _line(e: object) -> str:
    return str(e).replace("\n", " ")[:300]
