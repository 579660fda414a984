"""Make examples/digits_cnn.onnx and examples/digits.npz, offline and from a fixed seed.

Needs torch, scikit-learn and onnx; nothing else in the project does (only the two files are used).
The network is trained on upright digits. The data set holds other digits as a tilted, noisy sensor
sees them: the pretrained network does badly on it, and training on the device repairs that.

    python examples/make_digits_cnn.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits
from torch import nn

SEED = 7
PRETRAIN, TEST = 1000, 297  # the other 500 digits are for personalization
PERSONAL_TRAIN = 320
TILT_DEGREES, CONTRAST, NOISE = 32.0, 0.75, 0.06
FOLDER = Path(__file__).resolve().parent
Floats = NDArray[np.float32]


class DigitsNet(nn.Module):
    """Three convolutions and a classifier, 72 k parameters, for images [N, 1, 8, 8]."""

    def __init__(self) -> None:
        """Fresh weights."""
        super().__init__()
        self.conv1 = nn.Conv2d(1, 64, 3, padding=1)
        self.conv2 = nn.Conv2d(64, 64, 3, padding=1)
        self.conv3 = nn.Conv2d(64, 56, 3, padding=1)
        self.classifier = nn.Linear(224, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [N, 10]."""
        x = self.conv2(self.conv1(x).relu()).relu()
        x = nn.functional.max_pool2d(x, 2)
        x = nn.functional.max_pool2d(self.conv3(x).relu(), 2)
        logits: torch.Tensor = self.classifier(x.flatten(1))
        return logits


def tilted(images: Floats, degrees: Floats, shift: Floats) -> Floats:
    """Rotate and shift images [n, 8, 8] with bilinear interpolation; shift [n, 2] is in pixels."""
    grid = np.arange(8, dtype=np.float32) - 3.5
    angle = np.deg2rad(degrees)[:, None, None]
    y = np.cos(angle) * grid[:, None] - np.sin(angle) * grid + 3.5 + shift[:, :1, None]
    x = np.sin(angle) * grid[:, None] + np.cos(angle) * grid + 3.5 + shift[:, 1:, None]
    padded = np.pad(images, ((0, 0), (1, 2), (1, 2)))
    y, x = np.clip(y, -1, 8) + 1, np.clip(x, -1, 8) + 1
    y0, x0 = np.floor(y).astype(int), np.floor(x).astype(int)
    fy, fx, n = y - y0, x - x0, np.arange(len(images))[:, None, None]
    rows = [padded[n, y0 + d, x0] * (1 - fx) + padded[n, y0 + d, x0 + 1] * fx for d in (0, 1)]
    return np.asarray(rows[0] * (1 - fy) + rows[1] * fy, np.float32)


def pretrain(x: Floats, y: NDArray[np.int64], rng: np.random.Generator) -> DigitsNet:
    """Train on slightly moved digits."""
    net = DigitsNet()
    steps, size = 1500, 64
    optimizer = torch.optim.Adam(net.parameters(), 2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for _ in range(steps):
        pick = rng.integers(0, len(x), size)
        moved = tilted(
            x[pick],
            rng.uniform(-6, 6, size).astype(np.float32),
            rng.uniform(-0.5, 0.5, (size, 2)).astype(np.float32),
        )
        loss = nn.functional.cross_entropy(
            net(torch.from_numpy(moved[:, None])), torch.from_numpy(y[pick])
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return net


def accuracy(net: DigitsNet, x: Floats, y: NDArray[np.int64]) -> float:
    """Share of images [n, 8, 8] that are classified correctly."""
    with torch.no_grad():
        return float((net(torch.from_numpy(x[:, None])).argmax(1).numpy() == y).mean())


def export(net: DigitsNet, path: Path) -> None:
    """Write the network as ONNX, opset 17, symbolic batch."""
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 1, 8, 8])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 10])
    conv = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    pool = {"kernel_shape": [2, 2], "strides": [2, 2]}
    chain: list[tuple[str, str, dict[str, Any]]] = [
        ("Conv", "conv1", conv), ("Relu", "relu1", {}),
        ("Conv", "conv2", conv), ("Relu", "relu2", {}), ("MaxPool", "pool2", pool),
        ("Conv", "conv3", conv), ("Relu", "relu3", {}), ("MaxPool", "pool3", pool),
        ("Flatten", "flatten", {}), ("Gemm", "classifier", {"transB": 1}),
    ]  # fmt: skip
    nodes, last = [], "image"
    for op, name, attrs in chain:
        params = [f"{name}.weight", f"{name}.bias"] if op in ("Conv", "Gemm") else []
        out = "logits" if name == "classifier" else f"{name}_out"
        nodes.append(helper.make_node(op, [last, *params], [out], name=name, **attrs))
        last = out
    weights = [
        numpy_helper.from_array(v.numpy().astype("<f4"), k) for k, v in net.state_dict().items()
    ]
    graph = helper.make_graph(nodes, "digits_cnn", [image], [logits], weights)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="odt-plan"
    )
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def main() -> None:
    """Train, report, write both files."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    rng = np.random.default_rng(SEED)
    digits = load_digits()
    order = rng.permutation(len(digits.images))
    images = (digits.images[order] / 16).astype(np.float32)
    labels = digits.target[order].astype(np.int64)
    net = pretrain(images[:PRETRAIN], labels[:PRETRAIN], rng).eval()
    held = slice(PRETRAIN, PRETRAIN + TEST)
    print(f"upright digits: {accuracy(net, images[held], labels[held]):.1%}")

    count = len(images) - PRETRAIN - TEST
    degrees = (TILT_DEGREES + rng.normal(0, 4, count)).astype(np.float32)
    x = tilted(images[-count:], degrees, rng.normal(0, 0.2, (count, 2)).astype(np.float32))
    x = CONTRAST * x + rng.normal(0, NOISE, x.shape).astype(np.float32)
    x = (np.round(np.clip(x, 0, 1) * 16) / 16).astype(np.float32)  # the sensor's 17 grey levels
    y = labels[-count:].astype(np.int32)
    split = PERSONAL_TRAIN
    print(f"tilted digits:  {accuracy(net, x[split:], labels[-count:][split:]):.1%}")
    export(net, FOLDER / "digits_cnn.onnx")
    np.savez_compressed(
        FOLDER / "digits.npz",
        x=x[:split, None], y=y[:split], x_val=x[split:, None], y_val=y[split:],
    )  # fmt: skip


if __name__ == "__main__":
    main()
