"""The emulated board of the tests, for the benchmarks."""

from __future__ import annotations

import sys

from .models import ROOT

sys.path.insert(0, str(ROOT / "tests"))

from board import lane, stack
from board.elf import Elf
from board.kernels import run_kernels
from qdq_exact import picture

__all__ = ["Elf", "lane", "picture", "run_kernels", "stack"]
