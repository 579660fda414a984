"""Bad model files: one clear message each, the documented class, and everything at once."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper
from onnx_files import model, node, save

from odt_plan.ir import onnx_external, onnx_fold
from odt_plan.ir.errors import ModelWarning, OdtPlanError, UnsupportedModelError, UsageError
from odt_plan.ir.import_options import ImportOptions
from odt_plan.ir.onnx_import import import_model
from odt_plan.ir.onnx_ops import RULES
from odt_plan.ir.onnx_unroll import DEFINED


def refused(
    path: Path, *parts: str, kind: type[OdtPlanError] = UnsupportedModelError, batch: int = 1
) -> str:
    """The message; it names the file and holds all parts."""
    with pytest.raises(kind) as e:
        import_model(path, ImportOptions(batch=batch))
    text = str(e.value)
    assert str(path) in text
    for part in parts:
        assert part in text
    return text


# -- files -----------------------------------------------------------------------------------------


def test_missing_file_and_folder(tmp_path: Path) -> None:
    refused(tmp_path / "none.onnx", "no such file", kind=UsageError)
    refused(tmp_path, "is a folder", kind=UsageError)
    if os.name == "posix":
        refused(Path("/dev/zero"), "is a device or a pipe", kind=UsageError)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "not an ONNX model"),
        (b"<html>not found</html>", "not an ONNX model"),
        (b"\x08\x07", "it has no nodes and no outputs"),
    ],
)
def test_files_that_are_no_models(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    refused(path, reason)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    """No prefix of a file imports, and none raises anything but the documented error."""
    proto = model(
        [node("Add", "x c", "a"), node("Relu", "a", "y")],
        {"x": [1, 4]},
        ["y"],
        {"c": np.ones(4, np.float32)},
    )
    data = proto.SerializeToString()
    path = tmp_path / "model.onnx"
    imported, messages = 0, []
    for size in range(len(data)):
        path.write_bytes(data[:size])
        try:
            import_model(path)
            imported += 1
        except UnsupportedModelError as e:
            messages.append(str(e))
    assert all(str(path) in text for text in messages)
    tail = len(proto.opset_import[0].SerializeToString()) + 2
    assert imported <= tail  # only the cut between the graph and the last field is a whole model


def test_huge_file_is_refused_by_its_size(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with path.open("wb") as f:
        f.truncate(2**31 + 5)  # sparse: takes no space
    refused(path, "2147483653 bytes")


@pytest.mark.filterwarnings("ignore::odt_plan.ir.errors.ModelWarning")
def test_flipped_bytes_never_escape(tmp_path: Path) -> None:
    """Damaged files import or are refused; nothing else is raised."""
    proto = model(
        [node("Conv", "x w", "a", pads=[1, 1, 1, 1]), node("Flatten", "a", "y")],
        {"x": ["N", 1, 3, 3]}, ["y"], {"w": np.ones((2, 1, 3, 3), np.float32)},
    )  # fmt: skip
    data = np.frombuffer(proto.SerializeToString(), np.uint8)
    rng = np.random.default_rng(5)
    path = tmp_path / "model.onnx"
    good = bad = 0
    for _ in range(300):
        damaged = data.copy()
        damaged[rng.integers(0, len(data))] = rng.integers(0, 256)
        path.write_bytes(damaged.tobytes())
        try:
            import_model(path)
            good += 1
        except OdtPlanError:
            bad += 1
    assert good > 50
    assert bad > 50


# -- graphs ----------------------------------------------------------------------------------------


def _relu(tmp_path: Path, *nodes: NodeProto, **options: Any) -> Path:
    proto = model([*nodes], options.pop("inputs", {"x": [1, 4]}), ["y"], **options)
    return save(proto, tmp_path)


def test_cycle_is_named_by_its_nodes(tmp_path: Path) -> None:
    path = _relu(
        tmp_path,
        node("Add", "x c", "a"),
        node("Relu", "a", "b"),
        node("Tanh", "b", "c"),
        node("Relu", "c", "y"),
    )
    refused(path, "Add_a (Add)", "cycle", "Add_a", "Relu_b", "Tanh_c")


def test_use_before_definition(tmp_path: Path) -> None:
    path = _relu(tmp_path, node("Relu", "a", "y"), node("Tanh", "x", "a"))
    refused(path, "Relu_y (Relu): reads a before node Tanh_a computes it")


def test_undefined_and_twice_defined_values(tmp_path: Path) -> None:
    path = _relu(tmp_path, node("Relu", "ghost", "a"), node("Tanh", "x", "a"))
    refused(
        path,
        "reads ghost, which nothing computes",
        "computes a, which Relu_a computes already",
        "y (output): nothing computes it",
    )


def test_types_that_do_not_fit(tmp_path: Path) -> None:
    c = {"c": np.ones((3, 5), np.float32)}
    path = _relu(tmp_path, node("MatMul", "x c", "y"), constants=c)
    refused(path, "MatMul_y (MatMul)")
    path = _relu(
        tmp_path,
        node("Conv", "x w", "y"),
        inputs={"x": [1, 4, 6, 6]},
        constants={"w": np.ones((2, 3, 3, 3), np.float32)},
    )
    refused(path, "Conv_y (Conv)", "4 channels")
    proto = model([node("Relu", "x", "y")], {"x": [1, 4]}, ["y"])
    proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 7]))
    refused(save(proto, tmp_path), "4", "7")


def test_names_of_values_that_are_taken(tmp_path: Path) -> None:
    c = {"c": np.ones(4, np.float32)}
    path = _relu(tmp_path, node("Relu", "x", "c"), node("Add", "x c", "y"), constants=c)
    refused(path, "Relu_c (Relu): computes c, which is an initializer")
    path = _relu(tmp_path, node("Relu", "x", "x"), node("Tanh", "x", "y"))
    refused(path, "Relu_x (Relu): computes x, which is an input")
    proto = model([node("Relu", "x", "y")], {"x": [1, 4]}, ["y"])
    proto.graph.input.append(proto.graph.input[0])
    refused(save(proto, tmp_path), "x (input): is declared twice")


def test_attributes_that_the_operator_has_not(tmp_path: Path) -> None:
    """They may change what an exporter meant, so they are not passed over."""
    path = _relu(tmp_path, node("Relu", "x", "y", alpha=0.1))
    refused(path, "Relu_y (Relu): has no attribute alpha in opset 17")
    path = _relu(tmp_path, node("Relu", "x", "y", consumed_inputs=[0]), opset=8)
    refused(path, "has no attribute consumed_inputs in opset 8")


def test_names_that_can_not_be_printed(tmp_path: Path) -> None:
    """A message has one line, whatever is in a name."""
    path = _relu(tmp_path, node("Relu", "x", "y", name="two\nlines\x1d"), opset=17, inputs={})
    text = refused(path, r"two\nlines\x1d (Relu): reads x, which nothing computes")
    assert len(text.splitlines()) == 1


# -- bombs -----------------------------------------------------------------------------------------


def test_sizes_beyond_measure(tmp_path: Path) -> None:
    """Inputs and weights that declare more than there can be, and results that would be."""
    path = _relu(tmp_path, node("Relu", "x", "y"), inputs={"x": [1, 2**40]})
    refused(path, "x (input): [1, 1099511627776] has more than 268435456 elements")
    for size in (-7, -(2**40)):
        path = _relu(tmp_path, node("Relu", "x", "y"), inputs={"x": [1, size]})
        refused(path, "x (input): dimension 1 (unnamed) is not known", "--dim x:1=N")
    for dims in ([2**31], [2**40, 2**40], [-1], [-4, -1]):
        proto = model([node("Add", "x c", "y")], {"x": [1, 4]}, ["y"], {"c": np.ones(4, "f4")})
        proto.graph.initializer[0].dims[:] = dims
        refused(save(proto, tmp_path), f"c (initializer): can't be read as {dims}")
        constant = helper.make_node("Constant", [], ["c"], value=proto.graph.initializer[0])
        path = _relu(tmp_path, constant, node("Add", "x c", "y"))
        refused(path, "Constant_0 (Constant): its value is not a dense numeric tensor")
    for wrong in ({"pads": [2**40, 2**40]}, {"kernel_shape": [2**20], "pads": [2**20] * 2}):
        pool = node("MaxPool", "x", "y", **{"kernel_shape": [2], **wrong})
        path = _relu(tmp_path, pool, inputs={"x": [1, 1, 8]})
        refused(path, "MaxPool_y (MaxPool): kernel (", "exceed 65536")
    wide = np.array([2**14, 2**15])
    path = _relu(tmp_path, node("Reshape", "x s", "y"), constants={"s": wide})
    refused(path, "Reshape_y (Reshape)")
    pads = np.array([0, 2**30, 0, 2**30])
    path = _relu(tmp_path, node("Pad", "x p", "y"), constants={"p": pads})
    refused(path, "has more than 268435456 elements")


def test_constants_that_fill_the_memory_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No one of them is too large."""
    nodes = [node("ConstantOfShape", "s", f"c{i}") for i in range(5)]
    total = node("Sum", "x c0 c1 c2 c3 c4", "y")
    path = _relu(tmp_path, *nodes, total, constants={"s": np.array([1, 4])})
    import_model(path)
    monkeypatch.setattr(onnx_fold, "MAX_FOLDED_ELEMENTS", 18)
    refused(path, "ConstantOfShape_c4 (ConstantOfShape)")


def test_slices_of_less_than_nothing(tmp_path: Path) -> None:
    """Onnx's own inference ends the process at a Slice of a negative dimension."""
    s = {"b": _ints(0), "e": _ints(1), "a": _ints(2), "w": np.ones((1, 1, 9, 9), "f4")}
    for first in (node("Conv", "x w", "c"), node("MaxPool", "x", "c", kernel_shape=[9, 9])):
        nodes = [first, node("Slice", "c b e a", "d"), node("Slice", "d b e a", "y")]
        path = _relu(tmp_path, *nodes, inputs={"x": [1, 1, 4, 4]}, constants=s)
        assert "Slice" not in refused(path, first.name)


def test_slices_of_nothing(tmp_path: Path) -> None:
    s = {"none": np.zeros((0, 4), "f4"), "b": _ints(-1), "e": _ints(-9), "a": _ints(0)}
    back = node("Slice", "none b e a b", "c")
    refused(_relu(tmp_path, back, node("Add", "x c", "y"), constants=s), "Add_y (Add)")
    s = {"b": _ints(-1), "e": _ints(-9), "a": _ints(1), "z": _ints(0)}
    nodes = [node("Slice", "x z z a", "c"), node("Slice", "c b e a b", "y")]
    refused(
        _relu(tmp_path, *nodes, constants=s), "Slice_c (Slice): the slice of axis 1 of f32[1,4]"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [(np.nan, "1 NaN and 0 infinite of 6"), (np.inf, "0 NaN and 1 infinite of 6")],
)
def test_weights_that_are_not_finite_are_named(tmp_path: Path, value: float, text: str) -> None:
    weight = np.ones(6, np.float32)
    weight[2] = value
    path = _relu(
        tmp_path, node("Add", "x weight", "y"), inputs={"x": [1, 6]}, constants={"weight": weight}
    )
    refused(path, "weight (initializer)", text)


def test_nan_that_folding_makes_is_named(tmp_path: Path) -> None:
    path = _relu(
        tmp_path,
        node("Sqrt", "c", "root"),
        node("Add", "x root", "y"),
        constants={"c": -np.ones(4, np.float32)},
    )
    refused(path, "constant root holds 4 NaN or infinite of 4 values")


def test_opsets_out_of_range(tmp_path: Path) -> None:
    newest = onnx.defs.onnx_opset_version()
    proto = model([node("Relu", "x", "y")], {"x": [1, 4]}, ["y"], opset=newest)
    import_model(save(proto, tmp_path))
    proto.opset_import[0].version = newest + 1
    path = save(proto, tmp_path)
    with pytest.warns(ModelWarning, match=f"opset {newest + 1} is newer than {newest}.*may have"):
        graph = import_model(path)  # tried as if it were the newest
    assert [n.op for n in graph.nodes] == ["Relu"]
    proto.graph.node[0].op_type = "OperatorOfTomorrow"
    path = save(proto, tmp_path)
    with pytest.warns(ModelWarning):
        refused(path, "OperatorOfTomorrow", "the operator is not supported")
    old = model([node("GRUUnit", "x", "y")], {"x": [1, 4]}, ["y"], opset=1)
    refused(save(old, tmp_path), "opset 1 is older than 8", "GRUUnit")


# -- dimensions and element types ------------------------------------------------------------------


def test_dimensions_that_stay_unknown(tmp_path: Path) -> None:
    path = _relu(tmp_path, node("Relu", "x", "y"), inputs={"x": ["N", 3, "width"]})
    refused(path, "x (input): dimension 2 (width) is not known", "; bind with --dim width=N")
    path = _relu(tmp_path, node("Relu", "x", "y"), inputs={"x": None})
    refused(path, "x (input): has no shape")


def test_batch_that_is_fixed_or_baked_in(tmp_path: Path) -> None:
    path = _relu(tmp_path, node("Relu", "x", "y"), inputs={"x": [2, 3]})
    import_model(path)
    refused(path, "fixed batch of 2, not 4; use --batch 2", batch=4)
    shape = {"shape": np.array([1, 6], np.int64), "rest": np.array([1, -1], np.int64)}
    for key in shape:
        path = _relu(
            tmp_path,
            node("Reshape", f"x {key}", "y", name="flat"),
            inputs={"x": ["N", 6]},
            constants={key: shape[key]},
        )
        import_model(path)
        refused(path, "flat (Reshape)", "a batch of 1 is baked in, use --batch 1, not 4", batch=4)


def test_inputs_that_are_not_float(tmp_path: Path) -> None:
    proto = model(
        [node("Cast", "x", "a", to=1), node("Relu", "a", "y")],
        {"x": [1, 4]},
        ["y"],
        dtype=TensorProto.UINT8,
    )
    text = refused(save(proto, tmp_path), "x (input): is uint8; only float32")
    assert "Relu" not in text  # what follows is judged as if the input were float


def test_double_weights_and_strings(tmp_path: Path) -> None:
    path = _relu(tmp_path, node("Add", "x c", "y"), constants={"c": np.ones(4)})
    refused(path, "Add_y (Add)")
    proto = model([node("Relu", "x", "a"), node("Gather", "names a", "y")], {"x": [1, 4]}, ["y"])
    proto.graph.initializer.append(helper.make_tensor("names", TensorProto.STRING, [1], [b"a"]))
    refused(save(proto, tmp_path), "names (initializer): holds strings")


# -- nodes -----------------------------------------------------------------------------------------


def _if() -> NodeProto:
    branch = helper.make_graph(
        [node("Relu", "x", "b")], "branch", [], [helper.make_tensor_value_info("b", 1, None)]
    )
    return node("If", "flag", "y", then_branch=branch, else_branch=branch)


def _ints(*values: int) -> NDArray[Any]:
    return np.array(values, np.int64)


ZERO, ONES = np.zeros(1, np.float32), np.ones(2, np.float32)
FLAG = [node("Greater", "x zero", "all"), node("Gather", "all i", "flag")]
CASES: dict[str, tuple[list[NodeProto], dict[str, NDArray[Any]], str]] = {
    "if": (
        [*FLAG, _if()],
        {"zero": ZERO, "i": np.array(0)},
        "its condition flag depends on the data of a sample",
    ),
    "step": (
        [node("Slice", "x s e a t", "y")],
        {"s": _ints(-1), "e": _ints(-9), "a": _ints(3), "t": _ints(0)},
        "step 0 on axis 3",
    ),
    "norm": (
        [node("LpNormalization", "x", "y", p=3)],
        {},
        "p is 3; 1 and 2 are defined",
    ),
    "row statistics": (
        [node("LayerNormalization", "x four", "y mean")],
        {"four": np.ones(4, np.float32)},
        "the results Mean and InvStdDev (mean) are not supported",
    ),
    "row precision": (
        [node("LayerNormalization", "x four", "y", stash_type=11)],
        {"four": np.ones(4, np.float32)},
        "stash_type must be 1",
    ),
    "row shape": (
        [node("LayerNormalization", "x s", "y", axis=2)],
        {"s": ONES},
        "operand 1, f32[2], is not of the normalized shape [4, 4]",
    ),
    "gather outside": (
        [node("Gather", "x i", "y", axis=3)],
        {"i": _ints(0, 4)},
        "index 4 leaves axis 3",
    ),
    "gather at run time": (
        [node("Gather", "s x", "y")],
        {"s": ONES},
        "indices x are f32[1,2,4,4]; give integers",
    ),
    "form": ([node("Gelu", "x", "y", approximate="sine")], {}, "approximate sine is not known"),
    "numbers as positions": (
        [node("GatherElements", "x x", "y")],
        {},
        "indices x are f32[1,2,4,4]; give integers",
    ),
    "too many of the largest": (
        [node("TopK", "x k", "y i")],
        {"k": _ints(5)},
        "k = 5; lanes along axis 3",
    ),
    "any number of the largest": (
        [node("ReduceMax", "x", "m", keepdims=0), node("TopK", "x m", "y i")],
        {},
        "k m is not constant",
    ),
    "positions at run time": (
        [node("ArgMax", "x", "i"), node("ScatterElements", "x i x", "y")],
        {},
        "indices i are computed; only constant ones are supported here",
    ),
    "scatter twice": (
        [node("ScatterND", "x i u", "y")],
        {"i": _ints(0, 0).reshape(2, 1), "u": np.ones((2, 2, 4, 4), np.float32)},
        "indices occur twice",
    ),
    "scatter outside": (
        [node("ScatterElements", "x i u", "y", axis=3)],
        {"i": _ints(4).reshape(1, 1, 1, 1), "u": np.ones((1, 1, 1, 1), np.float32)},
        "index 4 leaves axis 3",
    ),
    "split": (
        [node("Split", "x s", "y z", axis=3)],
        {"s": _ints(1, 2)},
        "parts [1, 2] are not axis 3",
    ),
    "diagonal": (
        [node("Einsum", "x", "y", equation="abcc->abc")],
        {},
        "term abcc takes a diagonal",
    ),
    "places": (
        [node("NonZero", "x", "y")],
        {},
        "evaluated only where its operands are constants",
    ),
    "drop": (
        [node("Dropout", "x r t", "y")],
        {"r": np.array(0.5, np.float32), "t": np.array(True)},
        "is in training mode",
    ),
    "pad": (
        [node("Pad", "x p", "y", mode="mirror")],
        {"p": _ints(0, 0, 1, 1, 0, 0, 1, 1)},
        "mode mirror is not known; pad with constant, edge, reflect or wrap",
    ),
    "a shape of real numbers": (
        [node("Reshape", "x s", "y")],
        {"s": np.array([1, 32], np.float32)},
        "shape s are float32, not integers",
    ),
    "an axis of real numbers": (
        [node("CumSum", "x a", "y")],
        {"a": np.array(1e30, np.float32)},
        "axis a are float32, not integers",
    ),
    "several axes": (
        [node("CumSum", "x a", "y")],
        {"a": _ints(0, 1)},
        "axis a is not a scalar",
    ),
    "positions of nothing": (
        [helper.make_node("ArgMax", [], ["y"])],
        {},
        "culprit (ArgMax): operand 0 is missing",
    ),
    "endless pads": (
        [node("Pad", "x p", "y", mode="reflect")],
        {"p": _ints(0, 0, 0, 0, 0, 0, 0, 2**40)},
        "the result has more than 268435456 elements",
    ),
    "endless sizes": (
        [node("Resize", "x - - s", "y")],
        {"s": _ints(1, 2, 4, 2**40)},
        "the result has more than 268435456 elements",
    ),
    "endless scales": (
        [node("Resize", "x - s", "y")],
        {"s": np.array([1, 1, 3e38, 1], np.float32)},
        "the result has more than 268435456 elements",
    ),
    "crop": (
        [node("Pad", "x p", "y")],
        {"p": _ints(0, 0, 0, -1, 0, 0, 0, -1)},
        "negative pads",
    ),
    "index": (
        [node("MaxPool", "x", "y i", kernel_shape=[2, 2])],
        {},
        "the index output is not supported",
    ),
    "domain": (
        [node("Fancy", "x", "y", domain="com.example")],
        {},
        "the operator of the domain com.example is not supported",
    ),
    "reshape": (
        [node("Reshape", "x s", "y")],
        {"s": _ints(7, -1)},
        "does not fit the shape [7, -1]",
    ),
    "clip": (
        [node("ReduceMean", "x", "m"), node("Clip", "x m", "y")],
        {},
        "min m is not constant",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_nodes_that_are_not_supported(tmp_path: Path, name: str) -> None:
    nodes, constants, reason = CASES[name]
    nodes[-1].name = "culprit"
    opset = 20 if name == "erf" else 17
    proto = model(nodes, {"x": [1, 2, 4, 4]}, nodes[-1].output, constants, opset=opset)
    proto.opset_import.append(helper.make_opsetid("com.example", 1))
    refused(save(proto, tmp_path), "culprit", reason)


def test_results_that_are_not_there(tmp_path: Path) -> None:
    """One more than the operator has; and as an output, one without elements."""
    nodes = [node("Squeeze", "x", "a more", name="culprit"), node("Relu", "more", "y")]
    refused(_relu(tmp_path, *nodes), "culprit (Squeeze): has no result that could be more")
    proto = model([nodes[0]], {"x": [1, 4]}, ["a", "more"])
    refused(save(proto, tmp_path), "culprit (Squeeze): has no result that could be more")
    parts = model(
        [node("Split", "x s", "none all", axis=1)], {"x": [1, 4]}, ["all", "none"],
        {"s": np.array([0, 4])},
    )  # fmt: skip
    refused(save(parts, tmp_path), "none (output): has no elements")


def test_all_obstacles_at_once(tmp_path: Path) -> None:
    """Input, weight and nodes, also behind nodes that are refused; equal reasons share a line."""
    nodes = [
        node("Bernoulli", "x", "a", name="first"),
        node("Conv", "a w", "b", name="conv"),
        node("Bernoulli", "b", "c", name="second"),
        node("Pad", "c p", "d", name="pad", mode="mirror"),
        node("Fancy", "d", "e", name="custom", domain="com.example"),
        node("Add", "e other", "f", name="sum"),
        node("RandomUniformLike", "f", "y", name="last"),
    ]
    w = np.full((2, 2, 3, 3), np.nan, np.float32)
    constants = {"w": w, "p": np.array([0, 0, 1, 1] * 2)}
    proto = model(nodes, {"x": [1, 2, 8, 8], "other": ["N", 2, "h", 6]}, ["y"], constants)
    proto.opset_import.append(helper.make_opsetid("com.example", 1))
    text = refused(
        save(proto, tmp_path),
        "first, second (Bernoulli): the operator is not supported",
        "w (initializer): holds 36 NaN",
        "other (input): dimension 2 (h) is not known",
        "pad (Pad): mode mirror",
        "custom (Fancy)",
        "last (RandomUniformLike)",
        "7 obstacles",
    )
    assert len(text.splitlines()) == 7
    assert "conv" not in text.split(":", 1)[1]
    assert "sum" not in text.split(":", 1)[1]


# -- external data ---------------------------------------------------------------------------------


def _external(tmp_path: Path) -> tuple[onnx.ModelProto, Path]:
    folder = tmp_path / "inner"
    folder.mkdir()
    proto = model([node("Add", "x c", "y")], {"x": [1, 64]}, ["y"], {"c": np.ones(64, np.float32)})
    onnx.save(
        proto, folder / "model.onnx", save_as_external_data=True, location="w.bin", size_threshold=0
    )
    return onnx.load(folder / "model.onnx", load_external_data=False), folder


def _location(value: str) -> Callable[[onnx.ModelProto], None]:
    def change(proto: onnx.ModelProto) -> None:
        entry = next(e for e in proto.graph.initializer[0].external_data if e.key == "location")
        entry.value = value

    return change


def test_external_data_that_are_missing_outside_or_short(tmp_path: Path) -> None:
    proto, folder = _external(tmp_path)
    (tmp_path / "outside.bin").write_bytes(bytes(256))
    outside = str(tmp_path / "outside.bin")
    for where, reason in (
        ("../outside.bin", "outside the model's folder"),
        (outside, "outside the model's folder"),
        ("", "outside the model's folder"),
        ("gone.bin", "'gone.bin' is missing"),
    ):
        _location(where)(proto)
        refused(save(proto, folder), "c (initializer)", reason)
    (folder / "link.bin").symlink_to(outside)
    _location("link.bin")(proto)
    refused(save(proto, folder), "outside the model's folder")
    (folder / "w.bin").write_bytes(bytes(100))
    _location("w.bin")(proto)
    refused(save(proto, folder), "'w.bin' has 100 bytes, not 256")


def test_external_data_count_towards_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proto, folder = _external(tmp_path)
    path = save(proto, folder)
    import_model(path)
    monkeypatch.setattr(onnx_external, "MAX_FILE_BYTES", max(200, path.stat().st_size))
    refused(path, "external data exceed")


def test_results_without_a_name_are_not_operands_without_one(tmp_path: Path) -> None:
    """A layer that nobody reads, its first result not wanted, before an absent operand."""
    layer = helper.make_node("RNN", ["x", "w", "r"], ["", "last"], hidden_size=1)
    nodes = [layer, node("Clip", "x - top", "y")]
    shapes = {"w": (1, 1, 4), "r": (1, 1, 1), "top": ()}
    constants = {k: np.ones(shape, np.float32) for k, shape in shapes.items()}
    graph = import_model(save(model(nodes, {"x": [3, 1, 4]}, ["y"], constants), tmp_path))
    assert [n.op for n in graph.nodes] == ["Clip"]


@pytest.mark.filterwarnings("error")
def test_negative_variances_are_not_folded(tmp_path: Path) -> None:
    """They stay what the file says, without a word of NumPy."""
    nodes = [node("Conv", "x w", "a"), node("BatchNormalization", "a c c c d", "y")]
    constants = {"w": np.ones((1, 2, 1, 1), "f4"), "c": np.ones(1, "f4"), "d": -np.ones(1, "f4")}
    graph = import_model(save(model(nodes, {"x": [1, 2, 4, 4]}, ["y"], constants), tmp_path))
    assert [n.op for n in graph.nodes] == ["Conv", "BatchNormalization"]


def test_an_output_that_is_a_tensor_without_data(tmp_path: Path) -> None:
    proto = model([node("Relu", "x", "y")], {"x": [1, 4]}, ["y", "c"], {"c": np.ones(4, "f4")})
    proto.graph.initializer[0].raw_data = b""
    refused(save(proto, tmp_path), "c (output): does not depend on any input")


# -- any operator ----------------------------------------------------------------------------------

OPERANDS = ((), ("",), ("x",), ("", "x"), ("x", "", "x"), ("x", "c", "c"), ("i", "i"), ("x",) * 5)


@pytest.mark.parametrize("op", sorted({*RULES, *DEFINED}))
def test_operands_and_results_that_no_operator_has(op: str, tmp_path: Path) -> None:
    """Too few, too many, absent and of other kinds: an error of ours, or a graph."""
    constants = {"c": np.array([1.5, -2], np.float32), "i": _ints(1, -1)}
    for operands in OPERANDS:
        for results in (["y"], ["y", "more"], ["", "y"]):
            for opset, shape in ((13, [1, 2, 4, 4]), (23, [3])):
                call = helper.make_node(op, operands, results, name="culprit")
                proto = model([call], {"x": shape}, ["y"], constants, opset=opset)
                with contextlib.suppress(OdtPlanError):
                    import_model(save(proto, tmp_path)).verify()
