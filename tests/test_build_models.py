"""Topologies of the model builder against the published counts and layer tables."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx_files import assert_close, outputs, runtime

from odt_plan.ir.graph import Graph, Node
from odt_plan.ir.onnx_import import import_model

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import build_models
from benchmarks.build_models import BUILDERS, round_channels

#: (network, options) -> parameters, millions of MACs. Sources: the authors' models at 10 classes
#: with folded normalization; MLPerf Tiny's Keras summaries (78,666 and 24,908 parameters with the
#: moving statistics); torchvision's mobilenet_v2 (3,504,872 without the statistics).
PUBLISHED = [
    ("mbv2", {}, 245_578, 16.65),
    ("mcunet-5fps", {}, 470_834, 22.46),
    ("proxyless-w0.3", {}, 327_202, 18.62),
    ("resnet8", {"batchnorm": True}, 78_666, 12.50),
    ("dscnn", {"batchnorm": True}, 24_908, 2.66),
]


def build(name: str, folder: Path, **options: object) -> Path:
    path = folder / f"{name}.onnx"
    path.write_bytes(BUILDERS[name](**options).SerializeToString())
    return path


def parameters(path: Path) -> dict[str, int]:
    """Elements of each constant, the limits of Clip aside."""
    constants = onnx.load(path).graph.initializer
    return {c.name: math.prod(c.dims) for c in constants if not c.name.startswith("relu6.")}


def layers(graph: Graph) -> list[Node]:
    return [n for n in graph.nodes if n.op in ("Conv", "Gemm")]


def macs(node: Node) -> int:
    """Multiplications by plain counting, those with padding as well."""
    weight = node.inputs[1]
    assert weight is not None
    taps = math.prod(weight.type.shape[1:])
    return node.out.type.size * taps


def total_macs(graph: Graph) -> int:
    return sum(map(macs, layers(graph)))


@pytest.mark.parametrize(("name", "options", "count", "millions"), PUBLISHED)
def test_published_counts(
    name: str, options: dict[str, object], count: int, millions: float, tmp_path: Path
) -> None:
    path = build(name, tmp_path, **options)
    assert sum(parameters(path).values()) == count
    assert round(total_macs(import_model(path)) / 1e6, 2) == millions


def test_full_mobilenet(tmp_path: Path) -> None:
    path = build(
        "mbv2", tmp_path, width=1.0, resolution=224, classes=1000, last=1280, batchnorm=True
    )
    learned = {n: v for n, v in parameters(path).items() if not n.endswith((".mean", ".var"))}
    assert sum(learned.values()) == 3_504_872
    assert total_macs(import_model(path)) == 300_774_272


TABLES = {
    "mbv2": "mbv2-w0.35 @128",
    "mcunet-5fps": "mcunet-5fps @128",
    "proxyless-w0.3": "proxyless-w0.3 @128",
}


@pytest.mark.parametrize("name", TABLES)
def test_layer_tables(name: str, shared: Path, tmp_path: Path) -> None:
    """Every convolution's name, shape, stride, groups, sizes and MACs, and each residual."""
    text = (shared / "models" / "mcu_networks.md").read_text()
    section = text.split(f"## {TABLES[name]}")[1].split("\n## ")[0]
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in section.splitlines()]
    table = [r for r in rows if r and r[0].isdigit()]
    graph = import_model(build(name, tmp_path))
    convs = [n for n in graph.nodes if n.op == "Conv"]
    assert len(convs) == len(table) > 40
    added = {n.inputs[0].producer for n in graph.nodes if n.op == "Add" and n.inputs[0]}
    for row, node in zip(table, convs, strict=True):
        x, w = node.inputs[0], node.inputs[1]
        assert x is not None
        assert w is not None
        c_in, c_out, k, s, groups, h_in, h_out, weights, mac = map(int, row[2:11])
        assert (row[1].split()[0], row[1].endswith("+res")) == (node.name, node in added)
        assert x.type.shape == (1, c_in, h_in, h_in)
        assert node.out.type.shape == (1, c_out, h_out, h_out)
        assert w.type.shape == (c_out, c_in // groups, k, k)
        assert (node.attrs["strides"], w.type.size) == ((s, s), weights)
        assert macs(node) == mac


@pytest.mark.parametrize(("name", "file"), [
    ("mbv2", "mbv2-w0.35-head10-relu6"),
    ("mcunet-5fps", "mcunet-5fps-head10-relu6"),
    ("proxyless-w0.3", "proxyless-w0.3-head10-relu6"),
    ("resnet8", "mlperf_resnet8_bn"),
])  # fmt: skip
def test_same_layers_as_the_trained_model(
    name: str, file: str, shared: Path, tmp_path: Path
) -> None:
    path = shared / "models" / f"{file}.onnx"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    ours, theirs = import_model(build(name, tmp_path)), import_model(path)

    def shapes(graph: Graph) -> list[tuple[object, ...]]:
        found = [(n.inputs[0], n.inputs[1], n) for n in layers(graph)]
        return sorted(
            (n.op, x.type.shape, w.type.shape, n.out.type.shape) for x, w, n in found if x and w
        )

    assert shapes(ours) == shapes(theirs)


@pytest.mark.parametrize("batchnorm", [False, True])
@pytest.mark.parametrize("name", BUILDERS)
def test_runs_as_onnxruntime_does(name: str, batchnorm: bool, tmp_path: Path) -> None:
    """At a small resolution: same logits, and of a size that training can start from."""
    path = build(name, tmp_path, resolution=32, batchnorm=batchnorm)
    dims = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
    assert dims[0].dim_param == "N"
    x = np.random.default_rng(1).standard_normal((1, *(d.dim_value for d in dims[1:])))
    feeds = {"input": x.astype(np.float32)}
    (got,) = outputs(import_model(path), feeds)
    assert_close(got, runtime(path, feeds)[0], 1e-4)
    assert 1e-3 < np.abs(got).max() < 1e3


def test_seeds(tmp_path: Path) -> None:
    def weights(seed: int) -> np.ndarray:
        model = onnx.load(build("dscnn", tmp_path, seed=seed))
        return np.concatenate([numpy_helper.to_array(t).ravel() for t in model.graph.initializer])

    assert (weights(3) == weights(3)).all()
    assert (weights(3) != weights(4)).any()


def test_channel_rounding() -> None:
    """Multiples of 8, at most 10 % below, as the widths of the published tables."""
    got = [round_channels(c * 0.35) for c in (16, 24, 32, 64, 96, 160, 320)]
    assert got == [8, 8, 16, 24, 32, 56, 112]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.onnx"
    build_models.main(
        ["mbv2", "--width", "0.5", "--resolution", "64", "--classes", "3", "-o", str(path)]
    )
    assert re.match(rf"{re.escape(str(path))}: \d+ nodes", capsys.readouterr().out)
    graph = import_model(path)
    assert graph.inputs[0].type.shape == (1, 3, 64, 64)
    assert graph.outputs[0].type.shape == (1, 3)


@pytest.mark.parametrize("arguments", [
    ["resnet8", "--width", "0.5"],
    ["mbv2", "--resolution", "-4"],
    ["vgg"],
])  # fmt: skip
def test_bad_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        build_models.main(arguments)
    assert stop.value.code == 2
