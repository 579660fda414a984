"""Target descriptions of probe-rs (YAML): chips with the memory maps that a debugger needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from .chips import choose, data_ram
from .facts import Facts, Memory, MemoryKind, Told, unreadable

#: By architecture, which is all that the file tells of a core.
_CORES: dict[str, tuple[str, ...]] = {
    "armv6m": ("cortex-m0plus", "cortex-m0", "cortex-m1"),
    "armv7m": ("cortex-m3",),
    "armv7em": ("cortex-m4", "cortex-m7"),
    "armv8m": ("cortex-m33", "cortex-m23", "cortex-m35p", "cortex-m55", "cortex-m85"),
    "armv7a": ("cortex-a",),
    "armv8a": ("cortex-a",),
    "riscv": ("riscv",),
    "xtensa": ("xtensa-lx6", "xtensa-lx7"),
}


#: Reads a tag as a field: ``!Ram {name: X}`` becomes ``{"Ram": {"name": "X"}}``.
_Loader: Any = type("_Loader", (getattr(yaml, "CSafeLoader", yaml.SafeLoader),), {})


def _tagged(loader: Any, tag: str, node: yaml.Node) -> dict[str, object]:
    if isinstance(node, yaml.MappingNode):
        return {tag: loader.construct_mapping(node, deep=True)}
    if isinstance(node, yaml.SequenceNode):
        return {tag: loader.construct_sequence(node, deep=True)}
    return {tag: loader.construct_scalar(node)}


_Loader.add_multi_constructor("!", _tagged)


def read_probe_rs(file: str, text: str, chip: str | None) -> Facts:
    """What a target description tells of one of its variants.

    Raises:
        UsageError: It is broken, or has several variants of which none is chosen.
    """
    try:
        if any(isinstance(e, yaml.AliasEvent) for e in yaml.parse(text, Loader=_Loader)):
            raise unreadable(file, "holds an alias (*name); write the values themselves")
        data = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as e:
        mark = getattr(e, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        reason = getattr(e, "problem", None) or type(e).__name__
        raise unreadable(f"{file}{line}", f"broken YAML: {reason}") from None
    understood: list[object] = []
    try:
        variants = {str(v["name"]): v for v in data["variants"]}
        names = {n: [*map(str, v.get("package_variants") or ())] for n, v in variants.items()}
        name = choose(file, names, chip)
        understood.append(name)
        variant = variants[name]
        memories = _memories(file, name, variant["memory_map"])
        understood += memories
        types = {str(c["type"]) for c in variant["cores"]}
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        why = f"no target description of probe-rs: {type(e).__name__} at {e}"
        raise unreadable(file, why, understood) from None
    cores = tuple(c for t in sorted(types) for c in _CORES.get(t, (t,)))
    told = Told(cores, f"{file}: {name}, {', '.join(sorted(types))}")
    return Facts("probe", file, name=name, cores=told, memories=tuple(memories))


def _memories(file: str, name: str, entries: Sequence[dict[str, Any]]) -> list[Memory]:
    """RAM, and the flash that the chip boots from: no OTP, no settings, nothing twice."""
    flash: list[Memory] = []
    ram: list[Memory] = []
    again: list[Memory] = []  # memory that has another address, too
    for number, entry in enumerate(entries):
        ((tag, fields),) = entry.items()
        if tag not in ("Ram", "Nvm"):
            continue
        begin, end = int(fields["range"]["start"]), int(fields["range"]["end"])
        label = str(fields.get("name") or f"{tag.upper()}{number}")
        if not 0 <= begin < end:
            raise ValueError(f"{label}: range from {begin:#x} to {end:#x}")
        kind: MemoryKind = data_ram(begin) if tag == "Ram" else "flash"
        if tag == "Ram" and "instruction" in label.lower():  # the data bus has it, too
            kind = "code"
        memory = Memory(label, kind, begin, end - begin, f"{file}: {name}, {tag} {label}")
        if fields.get("is_alias"):
            again.append(memory)
        elif tag == "Ram":
            ram.append(memory)
        elif tag == "Nvm" and (fields.get("access") or {}).get("boot"):
            flash.append(memory)
    # RAM whose first address is on the bus of instructions counts by its address for data
    data = {m.bytes: m for m in again if m.kind == "ram"}
    return [*flash, *(data.get(m.bytes, m) if m.kind == "code" else m for m in ram)]
