"""Transformers as PyTorch exports them: import, forward, a planned training step.

Random weights; the networks are made where transformers is installed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import plans
import pytest
from onnx_files import model, node, save

from odt_plan.backends.numpy import Runtime
from odt_plan.ir.interpreter import run
from odt_plan.ir.onnx_import import import_model
from odt_plan.planner.device import load_device
from odt_plan.planner.pipeline import Request, make_plan

BOARD = load_device(plans.BOARD)
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TEXT = {"vocab_size": 64, "max_position_embeddings": 16}


def ids() -> Any:
    torch = pytest.importorskip("torch")
    return torch.arange(12).reshape(1, 12) * 5 % 61 + 1


def numbers(*shape: int) -> Any:
    torch = pytest.importorskip("torch")
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def bert(t: Any) -> tuple[Any, Any]:
    config = t.BertConfig(hidden_size=32, **SMALL, **TEXT)
    return t.BertForSequenceClassification(config), ids()


def bert_masked(t: Any) -> tuple[Any, Any]:
    """With the attention mask and the segments that a tokenizer gives."""
    torch = pytest.importorskip("torch")
    net, x = bert(t)
    with torch.no_grad():  # else every token counts nearly the same
        for p in net.bert.parameters():
            p.mul_(8)
    return net, (x, (torch.arange(12) < 9).long()[None], torch.zeros_like(x))


def distilbert(t: Any) -> tuple[Any, Any]:
    config = t.DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=64, **TEXT)
    return t.DistilBertForSequenceClassification(config), ids()


def gpt2(t: Any) -> tuple[Any, Any]:
    """With padding at the end: the logits are those of the last token before it."""
    config = t.GPT2Config(
        vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2, pad_token_id=0
    )
    x = ids()
    x[0, 9:] = 0
    return t.GPT2ForSequenceClassification(config), x


def vit(t: Any) -> tuple[Any, Any]:
    config = t.ViTConfig(hidden_size=32, image_size=32, patch_size=8, **SMALL)
    return t.ViTForImageClassification(config), numbers(1, 3, 32, 32)


def mobilevit(t: Any) -> tuple[Any, Any]:
    config = t.MobileViTConfig(
        hidden_sizes=[24, 32, 40], neck_hidden_sizes=[8, 12, 16, 24, 28, 32, 64], image_size=64,
        expand_ratio=2.0,
    )  # fmt: skip
    net = t.MobileViTForImageClassification(config)
    torch = pytest.importorskip("torch")
    for p in net.parameters():  # its own are so small that 30 layers on nothing is left in f32
        if p.ndim == 4:
            torch.nn.init.kaiming_normal_(p)
    return net, numbers(1, 3, 64, 64)


def wav2vec2(t: Any) -> tuple[Any, Any]:
    config = t.Wav2Vec2Config(
        vocab_size=32, hidden_size=32, **SMALL, conv_dim=(16, 16), conv_stride=(5, 2),
        conv_kernel=(10, 3), num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4,
    )  # fmt: skip
    return t.Wav2Vec2ForSequenceClassification(config), numbers(1, 800)


@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
@pytest.mark.parametrize("make", [bert, bert_masked, distilbert, gpt2, vit, mobilevit, wav2vec2])
def test_exported_transformers_train(
    make: Callable[[Any], tuple[Any, Any]], dynamo: bool, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    if dynamo:
        pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    inner, made = make(transformers)
    given = made if isinstance(made, tuple) else (made,)

    class Logits(torch.nn.Module):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *given: Any) -> Any:
            return self.inner(*given).logits

    net = Logits().eval()
    path = tmp_path / "net.onnx"
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        want = net(*given).numpy()
        torch.onnx.export(
            net, given, str(path), input_names=["x", "mask", "kinds"][: len(given)],
            output_names=["y"],
            opset_version=18 if dynamo else 17, dynamo=dynamo, verbose=False,
        )  # fmt: skip
    graph = import_model(path)
    feeds = {
        v.name: x.numpy().astype(v.type.np_dtype) for v, x in zip(graph.inputs, given, strict=True)
    }
    got = run(graph, feeds)[graph.outputs[0].name]
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
    planned = make_plan(
        Request(path, BOARD, ram_bytes=10**8, flash_bytes=10**8, train=("all",),
                with_baselines=False, time_limit_s=5)
    )  # fmt: skip
    runtime = Runtime(planned.plan, planned.training)
    label = np.array([int(want.argmin())], np.int32)
    losses = [runtime.train_step(feeds, label, 0.01) for _ in range(4)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("masked", [False, True])
def test_guards_against_nan_go_where_there_is_none(masked: bool, tmp_path: Path) -> None:
    """Behind a mask of -inf, which makes a row of NaN, the guard stays."""
    mask = np.array([[True, False], [False, False]])
    nodes = [
        *([node("Where", "m x low", "s", "mask")] if masked else [node("Neg", "x", "s", "neg")]),
        node("Softmax", "s", "p", "softmax"),
        node("IsNaN", "p", "n", "isnan"),
        node("Where", "n zero p", "q", "guard"),
        node("Relu", "q", "y", "last"),
    ]
    constants = {"zero": np.array(0, np.float32)}
    if masked:
        constants |= {"m": mask, "low": np.array(-np.inf, np.float32)}
    path = save(model(nodes, {"x": [2, 2]}, ["y"], constants), tmp_path)
    graph = import_model(path)
    assert ("guard" in {n.name for n in graph.nodes}) == masked
    x = np.array([[1, 2], [3, 4]], np.float32)
    y = run(graph, {"x": x})["y"]
    if masked:
        assert np.array_equal(y, [[1, 0], [0, 0]])
    else:
        np.testing.assert_allclose(y.sum(axis=1), 1, rtol=1e-6)
