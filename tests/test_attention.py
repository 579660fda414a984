"""The operator Attention of ONNX: its parts, their values and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx_files import assert_close, floats, model, node, outputs, save
from oracle import Unconstrained
from plans import whole

from odt_plan.ir.autodiff import build_training
from odt_plan.ir.errors import UnsupportedModelError
from odt_plan.ir.onnx_import import import_model
from odt_plan.ir.training import TrainingSpec

pytestmark = pytest.mark.skipif(
    onnx.defs.onnx_opset_version() < 24, reason="the installed onnx has no such operator"
)
RNG = np.random.default_rng(0)
LOW = np.array([[0, -np.inf, 0.5, 0, 1], [0, 0, -np.inf, 0, 0]] * 2, np.float32)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, NDArray[Any]]]] = {
    "plain": ("x k v", {}, {}),
    "causal": ("x k v", {"is_causal": 1}, {}),
    "scaled and capped": ("x k v", {"scale": 0.3, "softcap": 2.0}, {}),
    "mask": ("x k v m", {}, {"m": LOW > -1}),
    "bias with a mask": ("x k v m", {}, {"m": LOW}),
    "causal bias": ("x k v m", {"is_causal": 1}, {"m": LOW}),
    "earlier keys": (
        "x k v - p q",
        {},
        {"p": floats(RNG, 1, 4, 2, 6), "q": floats(RNG, 1, 4, 2, 6)},
    ),
    "grouped": ("x k2 v2", {"is_causal": 1}, {}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("opset", [23, 24])
def test_equals_the_reference(case: str, opset: int, tmp_path: Path) -> None:
    operands, attrs, extra = CASES[case]
    data = {"k": floats(RNG, 1, 4, 5, 6), "v": floats(RNG, 1, 4, 5, 6)}
    data |= {"k2": data["k"][:, :2], "v2": data["v"][:, :2], **extra}
    used = {k: a for k, a in data.items() if k in operands.split()}
    nodes = [node("Attention", operands, "y", **attrs)]
    proto = model(nodes, {"x": [1, 4, 4, 6]}, ["y"], used, opset=opset)
    graph = import_model(save(proto, tmp_path))
    x = floats(RNG, 1, 4, 4, 6)
    assert_close(outputs(graph, {"x": x})[0], ReferenceEvaluator(proto).run(None, {"x": x})[0])
    ops = [n.op for n in graph.nodes]
    assert ops.count("MatMul") == 2
    assert ops.count("Softmax") == 1
    if case == "plain":
        assert "Add" not in ops, "zeros for a mask that is not there would be trained"


def test_trains_as_torch_does(tmp_path: Path) -> None:
    """Self-attention of two query heads per key: one step on all three projections."""
    torch = pytest.importorskip("torch")
    data = {k: floats(RNG, 8, n) for k, n in (("wq", 8), ("wk", 4), ("wv", 4))}
    nodes = [
        *(node("MatMul", f"x w{k}", k) for k in "qkv"),
        node("Attention", "q k v", "y", is_causal=1, q_num_heads=4, kv_num_heads=2),
    ]
    graph = import_model(save(model(nodes, {"x": [1, 5, 8]}, ["y"], data, opset=23), tmp_path))
    spec = TrainingSpec(loss="mse", optimizer="sgd")
    net = Unconstrained(build_training(graph, spec, whole(graph)))
    x, target = floats(RNG, 1, 5, 8), floats(RNG, 1, 5, 8)
    loss = net.step(x, target, 0.1)

    leaves = {k: torch.tensor(a, requires_grad=True) for k, a in data.items()}
    heads = {k: (torch.tensor(x) @ leaves[f"w{k}"]).reshape(1, 5, -1, 2) for k in "qkv"}
    y = torch.nn.functional.scaled_dot_product_attention(
        *(heads[k].transpose(1, 2) for k in "qkv"), is_causal=True, enable_gqa=True
    )
    want = torch.nn.functional.mse_loss(y.transpose(1, 2).reshape(1, 5, 8), torch.tensor(target))
    want.backward()
    assert loss == pytest.approx(want.item(), rel=1e-5)
    assert set(net.state) == set(leaves)
    for name, leaf in leaves.items():
        new = (leaf - 0.1 * leaf.grad).detach().numpy()
        np.testing.assert_allclose(net.state[name], new, rtol=1e-5, atol=1e-6)


def test_what_its_definition_does_not_take(tmp_path: Path) -> None:
    nodes = [node("Det", "x", "k"), node("Attention", "x k k", "y")]
    proto = model(nodes, {"x": [1, 2, 3, 3]}, ["y"], opset=23)
    with pytest.raises(UnsupportedModelError, match="Det"):
        import_model(save(proto, tmp_path))
