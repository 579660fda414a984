"""The packages of the emitted C in the real builds of PlatformIO, ESP-IDF and Zephyr.

Run as ``python -m benchmarks.ecosystems``; writes its table into RESULTS.md. Each example is built
and run as its users do; what it tells must be what the example built by plain gcc tells, which the
tests compare with NumPy. What is not there is said to be so:

- PlatformIO: ``pio``, which fetches its platform ``native`` from a registry of its own;
- ESP-IDF: ``$IDF_PATH``, for its target ``linux`` (needs ninja and libbsd-dev);
- Zephyr: ``$ZEPHYR_BASE``, its CMSIS as ``$ZEPHYR_MODULES``, for this machine and for a Cortex-M3
  in QEMU (needs ninja, device-tree-compiler, gcc-arm-none-eabi and qemu-system-arm).

The first ``python3`` of the path must have what the builds of the last two import.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from odt_plan.backends.c import ECOSYSTEMS, emit_c
from odt_plan.planner.device import load_device
from odt_plan.planner.pipeline import Request, make_plan

from .models import ROOT
from .results import put

TITLE = "### The packages in their ecosystems' own builds"
ABSENT = "not available"
BOARD, LIMITS = "stm32f746g-disco", {"ram_bytes": 100 << 10, "flash_bytes": 1 << 20}
#: Lines that an example tells, and seconds for them: without an FPU, in QEMU, they take minutes.
LINES, RUN_S = 10, 1800.0
_LOSS = re.compile(r"update \d+: loss [\d.]+")


def main() -> int:
    """Write the table; 1 if an example tells something else."""
    rows, wrong = [], False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        package = folder / "package"
        model = ROOT / "examples" / "digits_cnn.onnx"
        made = make_plan(Request(model, load_device(BOARD), with_baselines=False, **LIMITS))
        emit_c(made.plan, made.training, package, ecosystems=ECOSYSTEMS)
        wanted = _plain(package, folder)
        for build in (_platformio, _espidf, _zephyr):
            for title, told in build(package, folder):
                good = told is None or (len(told) == LINES and told == wanted)
                wrong |= not good
                result = ABSENT if told is None else "equal" if good else f"**{told}**"
                rows.append(f"| {title} | {result} |")
                print(rows[-1], flush=True)
    about = (
        "`python -m benchmarks.ecosystems`. One package of `digits_cnn.onnx` for all of them; the"
        " example of each is built and run as its users do, and trains for 100 updates. Equal: its"
        " losses are those of the example built by plain gcc, which the tests compare with NumPy."
    )
    put(TITLE, [TITLE, "", about, "", "| build | losses |", "|---|---|", *rows])
    return 1 if wrong else 0


def _plain(package: Path, folder: Path) -> list[str]:
    source, program = package / "src", folder / "plain"
    files = [package / "examples" / "main.c", *source.glob("*.c")]
    flags = ["-O2", "-ffp-contract=off", "-fno-math-errno", f"-I{source}"]
    _run(["gcc", *flags, *files, "-o", program])
    return _listen([program])


def _platformio(package: Path, _: Path) -> Iterator[tuple[str, list[str] | None]]:
    pio = shutil.which("pio")
    if pio is None:
        yield "PlatformIO, `native`", None
        return
    version = _run([pio, "--version"]).split()[-1]
    example = package / "examples" / "platformio"
    told = _run([pio, "run", "-d", example, "-e", "native", "-t", "exec"])
    yield f"PlatformIO Core {version}, `native`", _LOSS.findall(told)


def _espidf(package: Path, folder: Path) -> Iterator[tuple[str, list[str] | None]]:
    base = os.environ.get("IDF_PATH")
    if base is None:
        yield "ESP-IDF, `linux`", None
        return
    text = (Path(base) / "tools" / "cmake" / "version.cmake").read_text(encoding="utf-8")
    version = ".".join(re.findall(r"set\(IDF_VERSION_\w+ (\d+)\)", text))
    build = folder / "espidf"
    # The example and its component alone: others want submodules.
    asked = {"IDF_TARGET": "linux", "PYTHON_DEPS_CHECKED": "1", "ESP_PLATFORM": "1"}
    asked |= {"PYTHON": shutil.which("python3") or "", "COMPONENTS": f"main;{package.name}"}
    _cmake(package / "examples" / "espidf", build, asked)
    yield f"ESP-IDF {version}, `linux`", _listen([next(build.glob("*.elf"))])


def _zephyr(package: Path, folder: Path) -> Iterator[tuple[str, list[str] | None]]:
    base = os.environ.get("ZEPHYR_BASE")
    if base is None:
        yield "Zephyr", None
        return
    text = (Path(base) / "VERSION").read_text(encoding="utf-8")
    version = ".".join(re.findall(r"^(?:VERSION_\w+OR|PATCHLEVEL) = (\d+)$", text, re.MULTILINE))
    qemu = ["qemu-system-arm", "-M", "mps2-an385", "-nographic", "-kernel", "zephyr/zephyr.elf"]
    for board, toolchain, command in (
        ("native_posix_64", "host", ["zephyr/zephyr.exe"]),
        ("mps2_an385", "gnuarmemb", qemu),
    ):
        build = folder / board
        asked = {"BOARD": board, "ZEPHYR_TOOLCHAIN_VARIANT": toolchain}
        asked |= {"GNUARMEMB_TOOLCHAIN_PATH": "/usr"} if toolchain == "gnuarmemb" else {}
        _cmake(package / "samples" / "train", build, asked)
        words = [str(build / w) if w.startswith("zephyr/") else w for w in command]
        yield f"Zephyr {version}, `{board}`", _listen(words)


def _cmake(source: Path, build: Path, asked: Mapping[str, str]) -> None:
    options = [f"-D{name}={value}" for name, value in asked.items()]
    _run(["cmake", "-G", "Ninja", "-S", source, "-B", build, *options])
    _run(["cmake", "--build", build])


def _run(command: Sequence[str | Path]) -> str:
    """What a command prints; its builds see no packages of ours."""
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, env=clean, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def _listen(command: Sequence[str | Path]) -> list[str]:
    """The losses that a program tells; an operating system need not end after them."""
    end, told = time.monotonic() + RUN_S, list[str]()
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            told += _LOSS.findall(line)
            if len(told) == LINES or time.monotonic() > end:
                break
        process.kill()
    return told


if __name__ == "__main__":
    sys.exit(main())
