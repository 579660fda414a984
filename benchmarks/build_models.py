"""Public network topologies as ONNX, with seeded weights: everybody can plan them, no downloads.

    python -m benchmarks.build_models mbv2 --width 0.35 --resolution 128 -o mbv2.onnx

Topologies: MobileNetV2 (Sandler et al. 2018; as MCU work uses it, without the 1280-channel layer
before the classifier unless asked for), MCUNet-5fps (Lin et al. 2020), ProxylessNAS (Cai et al.
2019) at width 0.3, ResNet-8 and DS-CNN of MLPerf Tiny (Banbury et al. 2021). Weights are
He-initialised, so a network can be trained from there; it knows nothing yet.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

OPSET = 17
IR_VERSION = 8  # the first with opset 17's features; runtimes of 2022 read it


class Block(NamedTuple):
    """Inverted residual: pointwise to ``hidden`` channels, depthwise, pointwise to ``out``.

    Without expansion (``hidden`` equal to the input's channels in the first block) the first
    pointwise layer is left out. Equal shapes of input and output are added.
    """

    kernel: int
    stride: int
    hidden: int
    out: int


#: Blocks of MCUNet-5fps (a network found by search: no rule behind the numbers).
MCUNET_5FPS = tuple(
    Block(*b)
    for b in (
        (3, 1, 16, 8), (3, 2, 32, 16), (3, 1, 48, 16), (7, 2, 48, 24), (3, 1, 120, 24),
        (3, 2, 120, 40), (7, 1, 160, 40), (5, 1, 160, 48), (3, 1, 144, 48), (3, 1, 192, 48),
        (7, 2, 240, 96), (5, 1, 384, 96), (5, 1, 384, 96), (3, 1, 576, 160),
    )
)  # fmt: skip
#: Blocks of ProxylessNAS at width 0.3.
PROXYLESS_W03 = tuple(
    Block(*b)
    for b in (
        (3, 1, 16, 8), (5, 2, 24, 16), (3, 1, 48, 16), (7, 2, 48, 16), (3, 1, 48, 16),
        (5, 1, 48, 16), (5, 1, 48, 16), (7, 2, 96, 24), (5, 1, 72, 24), (5, 1, 72, 24),
        (5, 1, 72, 24), (5, 1, 144, 32), (5, 1, 96, 32), (5, 1, 96, 32), (5, 1, 96, 32),
        (7, 2, 192, 64), (7, 1, 384, 64), (7, 1, 192, 64), (7, 1, 192, 64), (7, 1, 384, 96),
    )
)  # fmt: skip
#: Expansion, channels, repeats and first stride of MobileNetV2's stages.
MOBILENET_V2 = (
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
    (6, 320, 1, 1),
)  # fmt: skip


class Network:
    """An ONNX graph that grows layer by layer; ``top`` is the value to go on from."""

    def __init__(self, name: str, shape: tuple[int, int, int], *, batchnorm: bool, seed: int):
        """``shape``: channels, height, width of one sample."""
        self.name, self.batchnorm = name, batchnorm
        self.rng = np.random.default_rng(seed)
        self.shape = self.channels, self.height, self.width = shape
        self.top = "input"
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []

    def conv(
        self,
        name: str,
        filters: int,
        kernel: int | tuple[int, int] = 1,
        stride: int = 1,
        *,
        depthwise: bool = False,
        bias: bool = False,
        norm: bool = True,
        symmetric: bool = True,
    ) -> None:
        """A convolution with "same" padding, normalized or with a bias.

        Args:
            name: Name of the node.
            filters: Channels of the result.
            kernel: Its size, square or (height, width).
            stride: Along both axes.
            depthwise: One filter per channel.
            bias: Whether there is a bias before the normalization too.
            norm: Whether a normalization may follow.
            symmetric: Pad (k - 1) / 2 on both sides, otherwise as TensorFlow pads.
        """
        window = (kernel, kernel) if isinstance(kernel, int) else kernel
        depth = 1 if depthwise else self.channels
        norm = norm and self.batchnorm
        inputs = [self.top, self._he(f"{name}.weight", (filters, depth, *window))]
        if bias or not norm:
            inputs.append(self._constant(f"{name}.bias", np.zeros(filters, np.float32)))
        pads = _same_pads((self.height, self.width), window, stride, symmetric)
        self._add(
            "Conv",
            inputs,
            name,
            kernel_shape=window,
            strides=(stride, stride),
            pads=pads,
            group=self.channels if depthwise else 1,
        )
        self.channels = filters
        self.height = (self.height + pads[0] + pads[2] - window[0]) // stride + 1
        self.width = (self.width + pads[1] + pads[3] - window[1]) // stride + 1
        if norm:
            ones, zeros = np.ones(filters, np.float32), np.zeros(filters, np.float32)
            names = (("scale", ones), ("shift", zeros), ("mean", zeros), ("var", ones))
            state = [self._constant(f"{name}.bn.{n}", a) for n, a in names]
            self._add("BatchNormalization", [self.top, *state], f"{name}.bn", epsilon=1e-3)

    def relu(self, name: str) -> None:
        """Rectify."""
        self._add("Relu", [self.top], name)

    def relu6(self, name: str) -> None:
        """Clip to 0..6."""
        self._add("Clip", [self.top, *self._limits()], name)

    def add(self, name: str, other: str) -> None:
        """Residual connection."""
        self._add("Add", [self.top, other], name)

    def classify(self, classes: int) -> None:
        """Mean of each channel, then a dense layer: the logits."""
        self._add("GlobalAveragePool", [self.top], "pool")
        self._add("Flatten", [self.top], "flatten", axis=1)
        weight = self._he("classifier.weight", (classes, self.channels))
        bias = self._constant("classifier.bias", np.zeros(classes, np.float32))
        self._add("Gemm", [self.top, weight, bias], "classifier", transB=1)
        self.channels = classes

    def model(self) -> onnx.ModelProto:
        """The checked model; its batch dimension is symbolic."""
        dims = ("N", *self.shape)
        graph = helper.make_graph(
            self.nodes,
            self.name,
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, dims)],
            [helper.make_tensor_value_info(self.top, TensorProto.FLOAT, ("N", self.channels))],
            self.constants,
        )
        opset = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION)
        onnx.checker.check_model(model, full_check=True)
        return model

    def _add(self, op: str, inputs: Sequence[str], name: str, **attributes: Any) -> None:
        self.top = f"{name}.out"
        self.nodes.append(helper.make_node(op, inputs, [self.top], name=name, **attributes))

    def _constant(self, name: str, value: NDArray[np.float32]) -> str:
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def _he(self, name: str, shape: tuple[int, ...]) -> str:
        deviation = np.sqrt(2.0 / np.prod(shape[1:]))
        return self._constant(name, (self.rng.standard_normal(shape) * deviation).astype("f4"))

    def _limits(self) -> tuple[str, str]:
        if all(c.name != "relu6.max" for c in self.constants):
            self._constant("relu6.min", np.array(0, np.float32))
            self._constant("relu6.max", np.array(6, np.float32))
        return "relu6.min", "relu6.max"


def _same_pads(
    size: tuple[int, int], kernel: tuple[int, int], stride: int, symmetric: bool
) -> tuple[int, int, int, int]:
    """Top, left, bottom, right."""
    begins, ends = [], []
    for n, k in zip(size, kernel, strict=True):
        total = k - 1 if symmetric else max(0, (-(-n // stride) - 1) * stride + k - n)
        begins.append(total // 2)
        ends.append(total - total // 2)
    return (begins[0], begins[1], ends[0], ends[1])


def _inverted_residuals(net: Network, blocks: Sequence[Block]) -> None:
    for i, block in enumerate(blocks):
        source, channels = net.top, net.channels
        if block.hidden != channels:
            net.conv(f"b{i}.pw1", block.hidden)
            net.relu6(f"b{i}.pw1.act")
        net.conv(f"b{i}.dw", block.hidden, block.kernel, block.stride, depthwise=True)
        net.relu6(f"b{i}.dw.act")
        net.conv(f"b{i}.pw2", block.out)
        if block.stride == 1 and block.out == channels:
            net.add(f"b{i}.add", source)


def _stem(net: Network, filters: int, blocks: Sequence[Block]) -> None:
    net.conv("stem", filters, 3, 2)
    net.relu6("stem.act")
    _inverted_residuals(net, blocks)


def round_channels(channels: float) -> int:
    """Nearest multiple of 8, never more than 10 % below (the rule of the MobileNet papers)."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest


def mbv2(
    resolution: int = 128,
    classes: int = 10,
    *,
    width: float = 0.35,
    last: int = 0,
    batchnorm: bool = False,
    seed: int = 0,
) -> onnx.ModelProto:
    """MobileNetV2; ``last`` channels before the classifier (0: none; the paper's: 1280)."""
    name = f"mbv2-w{width:g}"
    net = Network(name, (3, resolution, resolution), batchnorm=batchnorm, seed=seed)
    stem = channels = round_channels(32 * width)
    blocks = []
    for expansion, out, repeats, stride in MOBILENET_V2:
        for i in range(repeats):
            filters = round_channels(out * width)
            blocks.append(Block(3, stride if i == 0 else 1, channels * expansion, filters))
            channels = filters
    _stem(net, stem, blocks)
    if last:
        net.conv("last", last)
        net.relu6("last.act")
    net.classify(classes)
    return net.model()


def mcunet(
    resolution: int = 128, classes: int = 10, *, batchnorm: bool = False, seed: int = 0
) -> onnx.ModelProto:
    """MCUNet-5fps."""
    return _searched("mcunet-5fps", MCUNET_5FPS, resolution, classes, batchnorm, seed)


def proxyless(
    resolution: int = 128, classes: int = 10, *, batchnorm: bool = False, seed: int = 0
) -> onnx.ModelProto:
    """ProxylessNAS, width 0.3."""
    return _searched("proxyless-w0.3", PROXYLESS_W03, resolution, classes, batchnorm, seed)


def _searched(
    name: str, blocks: Sequence[Block], resolution: int, classes: int, batchnorm: bool, seed: int
) -> onnx.ModelProto:
    net = Network(name, (3, resolution, resolution), batchnorm=batchnorm, seed=seed)
    _stem(net, 16, blocks)
    net.classify(classes)
    return net.model()


def resnet8(
    resolution: int = 32, classes: int = 10, *, batchnorm: bool = False, seed: int = 0
) -> onnx.ModelProto:
    """ResNet-8 of MLPerf Tiny (CIFAR-10); padded as TensorFlow does, as in the benchmark."""
    net = Network("resnet8", (3, resolution, resolution), batchnorm=batchnorm, seed=seed)
    net.conv("stem", 16, 3, bias=True)
    net.relu("stem.act")
    for i, (filters, stride) in enumerate(((16, 1), (32, 2), (64, 2))):
        source, before = net.top, (net.channels, net.height, net.width)
        net.conv(f"b{i}.conv1", filters, 3, stride, bias=True, symmetric=False)
        net.relu(f"b{i}.conv1.act")
        net.conv(f"b{i}.conv2", filters, 3, bias=True, symmetric=False)
        if stride > 1:
            branch = net.top
            net.top, (net.channels, net.height, net.width) = source, before
            net.conv(f"b{i}.skip", filters, 1, stride, norm=False, symmetric=False)
            source, net.top = net.top, branch
        net.add(f"b{i}.add", source)
        net.relu(f"b{i}.act")
    net.classify(classes)
    return net.model()


def dscnn(
    resolution: int = 49, classes: int = 12, *, batchnorm: bool = False, seed: int = 0
) -> onnx.ModelProto:
    """DS-CNN of MLPerf Tiny (keyword spotting); ``resolution``: frames of 10 MFCC each."""
    net = Network("dscnn", (1, resolution, 10), batchnorm=batchnorm, seed=seed)
    net.conv("stem", 64, (10, 4), 2, bias=True, symmetric=False)
    net.relu("stem.act")
    for i in range(4):
        net.conv(f"b{i}.dw", 64, 3, depthwise=True, bias=True)
        net.relu(f"b{i}.dw.act")
        net.conv(f"b{i}.pw", 64, bias=True)
        net.relu(f"b{i}.pw.act")
    net.classify(classes)
    return net.model()


BUILDERS: dict[str, Callable[..., onnx.ModelProto]] = {
    "mbv2": mbv2,
    "mcunet-5fps": mcunet,
    "proxyless-w0.3": proxyless,
    "resnet8": resnet8,
    "dscnn": dscnn,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Build one network and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("network", choices=sorted(BUILDERS))
    parser.add_argument("--resolution", type=int, help="input size in pixels (dscnn: frames)")
    parser.add_argument("--classes", type=int)
    parser.add_argument("--width", type=float, help="channel multiplier (mbv2)")
    parser.add_argument("--last", type=int, help="channels before the classifier (mbv2)")
    parser.add_argument("--batchnorm", action="store_true", help="with BatchNormalization")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument("-o", "--output", type=Path, help="default: <network>.onnx")
    options = parser.parse_args(arguments)
    chosen = {k: getattr(options, k) for k in ("resolution", "classes", "width", "last")}
    chosen = {k: v for k, v in chosen.items() if v is not None}
    if options.network != "mbv2" and chosen.keys() & {"width", "last"}:
        parser.error(f"{options.network} has no --width or --last; only mbv2 has")
    if any(v < (0 if k == "last" else 1e-9) for k, v in chosen.items()):
        parser.error("sizes must be positive")
    model = BUILDERS[options.network](**chosen, batchnorm=options.batchnorm, seed=options.seed)
    path = options.output or Path(f"{options.network}.onnx")
    path.write_bytes(model.SerializeToString())
    print(f"{path}: {len(model.graph.node)} nodes, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
