"""The RAM of a plan as C arrays: arena and state, or a part of each per RAM region, and replay."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from ...ir.errors import GraphError
from ...planner.plan import Buffer, Plan
from .ctext import comment


@dataclass(frozen=True)
class Part:
    """Bytes of a space that are one array.

    Attributes:
        name: Field of the context and variable of ``run``: ``arena``, ``state_axi``.
        macro: Of its size, without the model's name: ``ARENA_BYTES``, ``STATE_AXI_BYTES``.
        region: RAM region; empty where the plan names none.
        begin: First byte in the space.
        end: Byte after the last.
    """

    name: str
    macro: str
    region: str
    begin: int
    end: int

    @property
    def bytes(self) -> int:
        """Size."""
        return self.end - self.begin


class Parts:
    """The arrays of one plan.

    Attributes:
        arena: Those of the arena, in the order of their bytes.
        state: Those of the state.
        replay: That of a replay cache in RAM.
    """

    def __init__(self, plan: Plan) -> None:
        """Name the parts that hold anything."""
        self._suffix = _suffixes([r.name for r in plan.regions])
        self.arena = self._named(plan, "arena")
        self.state = self._named(plan, "state")
        self.replay: list[Part] = []
        if size := plan.replay_bytes("ram"):
            assert plan.replay is not None
            self.replay = [Part("replay", "REPLAY_BYTES", plan.replay.region, 0, size)]

    def _named(self, plan: Plan, space: Literal["arena", "state"]) -> list[Part]:
        if not plan.regions:
            return [Part(space, f"{space.upper()}_BYTES", *p) for p in plan.parts(space)]
        return [
            Part(
                f"{space}_{self._suffix[p.region]}",
                f"{space.upper()}_{self._suffix[p.region].upper()}_BYTES",
                *p,
            )
            for p in plan.parts(space)
            if p.end > p.begin
        ]

    @property
    def all(self) -> list[Part]:
        """Arena, then state, then replay."""
        return [*self.arena, *self.state, *self.replay]

    def pointer(self, b: Buffer) -> str:
        """C expression of where a buffer of arena or state begins."""
        part, at = self.place(b)
        return _at(part.name, at)

    def place(self, b: Buffer) -> tuple[Part, int]:
        """The part that holds a buffer, and its offset there.

        Raises:
            GraphError: None does.
        """
        parts = self.arena if b.space == "arena" else self.state
        for p in parts:
            if p.begin <= b.offset and b.offset + b.bytes <= p.end:
                return p, b.offset - p.begin
        raise GraphError(f"buffer {b.id} ({b.value}) lies in no one RAM region")

    def cut(self, begin: int, end: int) -> Iterator[str]:
        """C arguments of the pieces of a range of the arena: pointer, bytes."""
        for p in self.arena:
            low, high = max(begin, p.begin), min(end, p.end)
            if low < high:
                yield f"{_at(p.name, low - p.begin)}, {high - low}"

    # -- C text -----------------------------------------------------------------------------------

    def sizes(self) -> dict[str, tuple[str, str]]:
        """Size macros of parts of regions: value and note."""
        notes = {"arena": "scratch RAM", "state": "RAM that training changes"}
        return {
            p.macro: (f"{p.bytes}u", f"{notes[p.name[:5]]} in {comment(p.region)}")
            for p in (*self.arena, *self.state)
            if p.region
        }

    def fields(self, macro: str) -> Iterator[str]:
        """Members of the context."""
        for p in self.all:
            where = f" in {comment(p.region)}" if p.region else ""
            what = f"of scratch{where}; dead between calls"
            if p in self.state:
                what = f"that training changes{where}: weights, optimizer tensors"
            if p in self.replay:
                what = f"that {macro.lower()}_capture fills{where}"
            yield f"    uint8_t *{p.name}; /* {macro}_{p.macro} {what} */\n"

    def owned(self) -> str:
        """The pointers that the caller may set."""
        names = [f"net.{p.name}" for p in self.all]
        return f"{', '.join(names[:-1])} and {names[-1]}"

    def state_parts(self, macro: str) -> str:
        """Initializer of ``odtplan_memory_t[]``."""
        return ", \\\n     ".join(f"{{(net)->{p.name}, {macro}_{p.macro}}}" for p in self.state)

    def placements(self, macro: str) -> dict[str, str]:
        """Region -> macro that puts the arrays there."""
        used = dict.fromkeys(p.region for p in self.all if p.region)
        return {region: f"{macro}_IN_{self._suffix[region].upper()}" for region in used}

    def statics(self, model: str, macro: str) -> Iterator[str]:
        """Definitions of the arrays; those of a region lie in a section of its own."""
        placements = self.placements(macro)
        for region, name in placements.items():
            section = f".odt_plan_{self._suffix[region]}"
            yield f"#ifndef {name} /* where the linker puts the arrays in {comment(region)} */\n"
            yield "#if defined(__ELF__)\n"
            yield f'#define {name} __attribute__((section("{section}")))\n'
            yield f"#else\n#define {name}\n#endif\n#endif\n"
        for p in self.all:
            where = f"{placements[p.region]} " if p.region else ""
            yield f"{where}ALIGNED static uint8_t {model}_{p.name}[{macro}_{p.macro}];\n"

    def defaults(self, model: str) -> Iterator[str]:
        """Pointers that the caller left out."""
        for p in self.all:
            yield f"    if (net->{p.name} == NULL) {{\n"
            yield f"        net->{p.name} = {model}_{p.name};\n    }}\n"

    def unusable(self) -> str:
        """Condition: a pointer is missing or not aligned."""
        tests = [f"net->{p.name} == NULL" for p in self.all]
        tests += [f"((uintptr_t)net->{p.name} & 7u) != 0u" for p in self.all]
        return " ||\n        ".join(tests)


def _at(pointer: str, offset: int) -> str:
    return f"{pointer} + {offset}" if offset else pointer


def _suffixes(regions: Iterable[str]) -> dict[str, str]:
    """Region -> part of a C identifier, each another one."""
    result: dict[str, str] = {}
    for i, region in enumerate(regions):
        plain = re.sub(r"[^a-z0-9]", "_", region.lower())
        result[region] = f"{plain}_{i}" if plain in result.values() else plain
    return result
