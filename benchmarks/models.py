"""The models that are measured: the bundled one, and public pretrained ones where present."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: First issue's models, by file stem.
NAMES = ("mlperf_resnet8_bn", "st_har", "cntk_mnist", "tinymaix_mnist_cnn")


def shared() -> Path | None:
    """Folder of public models and data: $ODT_PLAN_SHARED or ``shared`` beside the checkout."""
    folder = Path(os.environ.get("ODT_PLAN_SHARED", ROOT.parent / "shared"))
    return folder if (folder / "models").is_dir() else None


def models(names: tuple[str, ...] = NAMES) -> list[Path]:
    """Paths of the models that are here; the bundled one always is."""
    folder = shared()
    found = [ROOT / "examples" / "digits_cnn.onnx"]
    if folder is not None:
        paths = (folder / "models" / f"{n}.onnx" for n in names)
        found += [p for p in paths if p.is_file()]
    return found
