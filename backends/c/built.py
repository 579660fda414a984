"""What a compiler makes of an emitted library: code, arrays and stack of what a firmware calls.

Object files are read, nothing is linked: from the functions that train and infer, relocations lead
to all that a linker would keep with ``--gc-sections``, and to the deepest path of calls.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ...planner.device import load_core
from .emit import kernel_files

if TYPE_CHECKING:
    from elftools.elf.elffile import ELFFile
    from elftools.elf.sections import Section as ElfSection

OPTIMISE = "-O2"
_FLAGS = (
    *("-std=c99", OPTIMISE, "-ffp-contract=off", "-fno-math-errno", "-ffreestanding"),
    *("-ffunction-sections", "-fdata-sections", "-I."),
)
#: Functions that a firmware calls again and again, behind the model's name.
_ROOTS = ("_init", "_infer", "_train_step", "_capture", "_train_cached")
#: Where a bare compiler comes without a C library.
_STRING_H = """\
#include <stddef.h>
void *memcpy(void *to, const void *from, size_t bytes);
void *memset(void *to, int value, size_t bytes);
int memcmp(const void *a, const void *b, size_t bytes);
"""
#: What GCC appends to names of copies, ``.constprop.0.isra.0``, has no numbers in stack usage.
_COPY = re.compile(r"\.\d+(?=\.|$)")
_TIMEOUT_S = 120
#: Flags of an ELF section.
_WRITE, _ALLOC, _EXECUTE = 1, 2, 4


class BuildError(Exception):
    """The compiler failed, or made what can't be measured; tells which and why."""


@dataclass(frozen=True)
class Built:
    """What a compiler made of a library.

    The C library's and the compiler's own functions (``memcpy``, software floats) are not part of
    it, nor are the callbacks.

    Attributes:
        compiler: Name, version, optimisation and core.
        code_bytes: Flash of the functions that training and inference call, and of their tables.
        array_bytes: RAM of the static arrays: arena, state and replay cache.
        stack_bytes: Stack of the deepest path of calls from ``_train_step`` and its like.
    """

    compiler: str
    code_bytes: int
    array_bytes: int
    stack_bytes: int


@dataclass
class _Section:
    """A section of an object file; ``needs`` are sections and global names that it refers to.

    ``frame`` is the stack of its function; None where none is known.
    """

    bytes: int
    writable: bool
    executable: bool
    frame: int | None = None
    needs: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class _Object:
    """Sections by a key of their own, and in which of them each global name is defined."""

    sections: Mapping[str, _Section]
    defined: Mapping[str, str]


def measure_built(folder: Path, model: str, core_id: str) -> Built | None:
    """Compile an emitted library for a core and measure it.

    Args:
        folder: Where its sources are.
        model: The C name of the model.
        core_id: A core of specs/cores.

    Returns:
        None where there is no compiler for the core: neither its cross GCC nor ziglang.

    Raises:
        BuildError: The compiler failed, or calls are recursive or have no known frame.
    """
    compiler = _compiler(core_id)
    if compiler is None:
        return None
    name, command = compiler
    texts = {f"{model}{end}": _read(folder, model, end) for end in (".c", ".h", "_weights.h")}
    needed = kernel_files([], texts.values())
    kernels = [n for n in needed if n.endswith(".c")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        own = pool.submit(_compile, command, f"{model}.c", {**needed, **texts})
        objects = [*pool.map(lambda n: _kernel(command, n), kernels), own.result()]
    return _measured(f"{name} {OPTIMISE}, {core_id}", objects, model)


def _read(folder: Path, model: str, end: str) -> str:
    return (folder / f"{model}{end}").read_text(encoding="ascii")


@cache
def _compiler(core_id: str) -> tuple[str, tuple[str, ...]] | None:
    """Name with version, and command, of the first compiler for a core that is there."""
    known = load_core(core_id).compiler
    gcc = shutil.which(f"{known['prefix']}gcc") if "prefix" in known else None
    if gcc is not None:
        number = _run([gcc, "-dumpfullversion"], Path.cwd()).strip()
        return f"{Path(gcc).stem} {number}", (gcc, *known["gcc"].split(), "-fstack-usage")
    if "zig_target" in known and find_spec("ziglang") is not None:
        target = ("-target", known["zig_target"], f"-mcpu={known['zig_cpu']}")
        more = ("-fno-sanitize=all", "-fstack-size-section")
        command = (sys.executable, "-m", "ziglang", "cc", *target, *more)
        return f"ziglang {version('ziglang')}", command
    return None


@cache
def _kernel(command: tuple[str, ...], name: str) -> _Object:
    """A file of the kernel library, which is the same for all models."""
    return _compile(command, name, kernel_files([name.removesuffix(".c")]))


def _compile(command: tuple[str, ...], name: str, texts: Mapping[str, str]) -> _Object:
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for file, text in {**texts, "string.h": _STRING_H}.items():
            (folder / file).write_text(text, encoding="ascii")
        _run([*command, *_FLAGS, "-c", name, "-o", "made.o"], folder)
        usage = folder / "made.su"
        frames = _gcc_frames(usage.read_text(encoding="utf-8")) if usage.exists() else {}
        try:
            with (folder / "made.o").open("rb") as made:
                return _object(ELFFile(made), name, frames)
        except (OSError, ELFError) as e:
            raise BuildError(f"{name}: the compiler made no ELF file: {e}") from None


def _run(command: Sequence[str], folder: Path) -> str:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        raise BuildError(str(e)) from None
    if done.returncode:
        said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()
        first = next((line for line in said if "error" in line), said[0])
        raise BuildError(f"{Path(command[0]).name}: {first}")
    return done.stdout


def _gcc_frames(text: str) -> dict[str, int]:
    """Frames by function, of -fstack-usage: ``file:line:column:function<tab>bytes<tab>kind``.

    Copies of a function that differ in a number alone have one name there: the largest counts.
    """
    frames: dict[str, int] = {}
    for line in text.splitlines():
        where, size, kind = line.split("\t")
        if kind not in ("static", "dynamic,bounded"):
            raise BuildError(f"{where}: its stack has no bound")
        name = where.rsplit(":", 1)[1]
        frames[name] = max(int(size), frames.get(name, 0))
    return frames


def _object(elf: ELFFile, name: str, frames: Mapping[str, int]) -> _Object:
    """The allocated sections of an object file, with what they need."""
    from elftools.elf.relocation import RelocationSection
    from elftools.elf.sections import SymbolTableSection

    keys = {i: f"{name}:{i}" for i in range(elf.num_sections())}
    sections = {
        keys[i]: _Section(
            s["sh_size"], bool(s["sh_flags"] & _WRITE), bool(s["sh_flags"] & _EXECUTE)
        )
        for i, s in enumerate(elf.iter_sections())
        if s["sh_flags"] & _ALLOC
    }
    tables = [s for s in elf.iter_sections() if isinstance(s, SymbolTableSection)]
    symbols = [symbol for table in tables for symbol in table.iter_symbols()]
    defined = {}
    for symbol in symbols:
        at = keys.get(symbol["st_shndx"])
        if at not in sections:
            continue
        if symbol["st_info"]["bind"] != "STB_LOCAL":
            defined[symbol.name] = at
        if symbol["st_info"]["type"] == "STT_FUNC":
            sections[at].frame = frames.get(_COPY.sub("", symbol.name))
    for s in elf.iter_sections():
        if isinstance(s, RelocationSection) and (user := keys[s["sh_info"]]) in sections:
            for r in s.iter_relocations():
                symbol = symbols[r["r_info_sym"]]
                sections[user].needs.add(keys.get(symbol["st_shndx"], symbol.name))
        elif s.name == ".stack_sizes":
            sections[keys[s["sh_link"]]].frame = _clang_frame(s, elf.elfclass // 8)
    return _Object(sections, defined)


def _clang_frame(section: ElfSection, address_bytes: int) -> int:
    """The frame of the one function of a section: an address, then bytes as ULEB128."""
    data = section.data()[address_bytes:]
    return sum((byte & 127) << 7 * i for i, byte in enumerate(data))


def _measured(compiler: str, objects: Sequence[_Object], model: str) -> Built:
    sections = {key: s for o in objects for key, s in o.sections.items()}
    defined = {name: key for o in objects for name, key in o.defined.items()}
    edges = {
        key: [k for n in s.needs if (k := defined.get(n, n)) in sections]
        for key, s in sections.items()
    }
    roots = [key for end in _ROOTS if (key := defined.get(f"{model}{end}")) is not None]
    if not roots:
        raise BuildError(f"{model}.c defines none of {', '.join(_ROOTS)}")
    depth = _depths(roots, edges, sections)
    return Built(
        compiler,
        sum(-(-sections[k].bytes // 4) * 4 for k in depth if not sections[k].writable),
        sum(s.bytes for s in objects[-1].sections.values() if s.writable),
        max(depth[r] for r in roots),
    )


def _depths(
    roots: Sequence[str], edges: Mapping[str, Sequence[str]], sections: Mapping[str, _Section]
) -> dict[str, int]:
    """Stack bytes from each section on that the roots need, itself included."""
    depth: dict[str, int] = {}
    open_: dict[str, Iterator[str]] = {}
    for root in roots:
        open_[root] = iter(edges[root])
        while open_:
            at = next(reversed(open_))
            step = next((k for k in open_[at] if k not in depth), None)
            if step in open_:
                raise BuildError(f"{at} and {step} call each other: their stack has no bound")
            if step is not None:
                open_[step] = iter(edges[step])
                continue
            del open_[at]
            own = sections[at]
            if own.executable and own.frame is None:
                raise BuildError(f"{at}: the compiler tells no stack of its function")
            depth[at] = (own.frame or 0) + max((depth[k] for k in edges[at]), default=0)
    return depth
