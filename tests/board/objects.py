"""Compile and link; library files that are equal in many models are compiled once."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path

_INCLUDE = re.compile(r'^#include "(odtplan_\w+\.h)"', re.MULTILINE)
_NAME = re.compile(r"\w+")
Texts = tuple[tuple[str, str], ...]
#: Environment: the folder of objects that several processes share; else each has its own.
SHARED = "ODT_PLAN_TEST_OBJECTS"


class BuildError(Exception):
    """Compiler or linker refused; holds what it printed."""


def link(command: Sequence[str], sources: Sequence[Path], options: Sequence[str], to: Path) -> Path:
    """Compile sources and link them.

    Args:
        command: Compiler and flags of every file.
        sources: C files; files named ``odtplan_*.c`` must not depend on ``options``.
        options: What the other files need (macros, include folders) and the linker's options.
        to: The program.

    Raises:
        BuildError: The compiler or the linker refused.
    """
    inputs = [
        compiled(command, s) if s.name.startswith("odtplan_") else s
        for s in sources
    ]
    _run([*command, *map(str, inputs), *options, "-o", str(to)])
    return to


def compiled(command: Sequence[str], source: Path) -> Path:
    """The object of a library file; equal ones are made once.

    Macros of the command that neither the file nor its headers name are left out: they change
    nothing.

    Raises:
        BuildError: The compiler refused.
    """
    texts = _texts(source)
    named = set(_NAME.findall("".join(text for _, text in texts)))
    flags = (f for f in command if not f.startswith("-D") or f[2:].partition("=")[0] in named)
    return _object(tuple(flags), source.name, texts)


def _texts(source: Path) -> Texts:
    """A file and the headers that it includes, transitively, with their contents."""
    found: dict[str, str] = {}
    waiting = [source.name]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = (source.parent / name).read_text()
            waiting += _INCLUDE.findall(found[name])
    return tuple(sorted(found.items()))


@cache
def _object(command: tuple[str, ...], name: str, texts: Texts) -> Path:
    key = sha256(repr((command, name, texts)).encode()).hexdigest()
    target = _folder() / f"{key}.o"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=_folder()) as folder:
            for n, text in texts:
                Path(folder, n).write_text(text)
            made = Path(folder, target.name)
            _run([*command, "-c", str(Path(folder, name)), "-o", str(made)])
            made.replace(target)  # whole or not at all: another process may want it, too
    return target


@cache
def _folder() -> Path:
    shared = os.environ.get(SHARED)
    return Path(shared) if shared else Path(_scratch().name)


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    """Removed when the process ends."""
    return tempfile.TemporaryDirectory(ignore_cleanup_errors=True)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildError(done.stderr)
