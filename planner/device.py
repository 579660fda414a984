"""Device specs: schema of specs/devices and specs/cores, and the budgets that they give."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

from ..ir.errors import UsageError
from ..ir.opdef import CostClass, Work
from .spec_file import bundled, bundled_ids, load_spec

#: Stands in for the device where only budgets are given.
GENERIC_DEVICE = "generic-cortex-m7"


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Quantity(_Spec):
    """A number with its origin."""

    value: NonNegativeFloat
    #: Datasheet, paper, linker map, ``measured`` or ``estimated: why``.
    source: str = Field(min_length=3)


class Size(_Spec):
    """Bytes, with their origin."""

    value: PositiveInt
    source: str = Field(min_length=3)


#: Cost classes of integer kernels; gradients are computed in f32.
I8_CLASSES: tuple[CostClass, ...] = (
    "pointwise",
    "conv",
    "depthwise",
    "gemm",
    "elementwise",
    "pool",
    "copy",
)


class Figures(_Spec):
    """Executed instructions of a kernel: ``value`` per unit of work.

    ``per_pass`` (loads and indices of an inner loop's body), ``per_loop`` (its start: addresses,
    borders) and ``per_output`` (bias, requantization, store) decide on small images, where inner
    loops run only a few times.
    """

    value: NonNegativeFloat
    per_pass: NonNegativeFloat = 0.0
    per_loop: NonNegativeFloat = 0.0
    per_output: NonNegativeFloat = 0.0


class Rate(Figures):
    """Figures with their origin."""

    source: str = Field(min_length=3)


class Measured(_Spec):
    """Figures of operators that were measured on their own, by operator and cost class."""

    source: str = Field(min_length=3)
    rates: dict[str, dict[str, Figures]]


class Core(_Spec):
    """A CPU core as our C kernels see it (specs/cores/<id>.yaml).

    ``instructions`` gives executed instructions by dtype and cost class, for operators that are not
    in ``operators``; ``call`` the instructions around one kernel call. ``gradient_tile`` is the
    most of a weight's gradient that an update computes at a time.
    """

    id: str
    name: str
    compiler: dict[str, str]  #: GCC flags (``gcc``) and zig's ``zig_target`` and ``zig_cpu``
    call: Quantity
    gradient_tile: Size
    instructions: dict[str, dict[str, Rate]]
    operators: Measured | None = None

    def rate(self, work: Work) -> Figures:
        """Instructions of a part of a node's work; it says which operator's."""
        own = self.operators.rates.get(work.operator, {}) if self.operators else {}
        return own.get(work.cost_class) or self.instructions[work.dtype][work.cost_class]

    @model_validator(mode="after")
    def _complete(self) -> Self:
        known = get_args(CostClass)
        needed = {"f32": known, "i8": I8_CLASSES}
        if absent := [d for d in needed if d not in self.instructions]:
            raise ValueError(f"instructions: {absent[0]} is missing")
        for dtype, classes in self.instructions.items():
            if dtype not in needed:
                raise ValueError(f"instructions.{dtype}: no dtype that kernels compute in")
            if missing := [c for c in needed[dtype] if c not in classes]:
                raise ValueError(f"instructions.{dtype}: {', '.join(missing)} missing")
            if unknown := [c for c in classes if c not in known]:
                raise ValueError(f"instructions.{dtype}: {unknown[0]} is no cost class")
        return self


class Region(_Spec):
    """A memory region. Adjacent RAM regions of one speed count as one (``RamRun``).

    ``code`` is RAM for instructions, which no plan uses. ``extra_cycles_per_byte`` is what a byte
    of RAM costs a kernel beyond ``cycles_per_instruction``, once for each operand, result and
    scratch buffer of a step, however often the kernel reads it.
    """

    name: str
    kind: Literal["ram", "code", "flash"]
    origin: NonNegativeInt
    bytes: PositiveInt
    extra_cycles_per_byte: Quantity | None = None
    sectors: tuple[tuple[PositiveInt, PositiveInt], ...] = ()  #: (count, bytes) in address order
    erase_cycles: Quantity | None = None  #: that each sector stands
    program_bytes: Size | None = None  #: that flash is programmed by, each once after an erase
    source: str = Field(min_length=3)

    @property
    def slowness(self) -> float:
        """Extra cycles per byte, 0 where none are given."""
        return 0.0 if self.extra_cycles_per_byte is None else self.extra_cycles_per_byte.value

    @model_validator(mode="after")
    def _sectors_fill_it(self) -> Self:
        total = sum(count * size for count, size in self.sectors)
        if self.sectors and total != self.bytes:
            raise ValueError(f"sectors: add up to {total:,} bytes, the region has {self.bytes:,}")
        if self.extra_cycles_per_byte is not None and self.kind != "ram":
            raise ValueError("extra_cycles_per_byte: plans place buffers in kind ram only")
        if self.erase_cycles is not None and not self.sectors:
            raise ValueError("erase_cycles: are those of sectors; add these")
        return self

    @model_validator(mode="after")
    def _units_fill_sectors(self) -> Self:
        if self.program_bytes is None:
            return self
        unit = self.program_bytes.value
        if self.kind != "flash":
            raise ValueError("program_bytes: are those of flash")
        if unit & (unit - 1):
            raise ValueError(f"program_bytes: must be a power of 2, not {unit:,}")
        for size in (self.bytes, *(size for _, size in self.sectors)):
            if size % unit:
                raise ValueError(f"program_bytes: {unit:,} bytes do not divide {size:,}")
        return self


class Fact(_Spec):
    """Yes or no, with its origin."""

    value: bool
    source: str = Field(min_length=3)


class Wear(_Spec):
    """How writing uses up a storage.

    Attributes:
        cycles: Erase cycles that every unit stands.
        unit_bytes: Bytes that are erased together; a page-out wears whole units.
        levelled: A controller spreads writes over the whole capacity. Without one, a tensor has
            units of its own, and wears these only.
        source: Of unit and levelling.
    """

    cycles: Quantity
    unit_bytes: PositiveInt
    levelled: bool
    source: str = Field(min_length=3)

    @model_validator(mode="after")
    def _lasts(self) -> Self:
        if self.cycles.value < 1:
            raise ValueError("cycles: must be 1 or more")
        if self.unit_bytes % 4:
            raise ValueError("unit_bytes: must be a multiple of 4")
        return self


class Storage(_Spec):
    """Storage that tensors can be paged to; times are per transfer.

    Attributes:
        dma: Transfers run beside the core, one at a time; None: the core waits for each.
        wear: None: it does not wear.
        region: The chip's flash region that it is a part of; None: it is external.
        allow_paging: Of a part of the chip's flash: tensors may be paged there in spite of its few
            erase cycles. None: they may not.
    """

    id: str
    name: str
    bytes: PositiveInt
    read_bytes_per_s: Quantity
    read_latency_s: Quantity
    write_bytes_per_s: Quantity
    write_latency_s: Quantity
    power_w: Quantity
    dma: Fact | None = None
    wear: Wear | None = None
    region: str | None = None
    allow_paging: Fact | None = None

    @property
    def overlaps(self) -> bool:
        """Transfers run beside the core."""
        return self.dma is not None and self.dma.value

    @property
    def pages(self) -> bool:
        """Tensors may be paged to it: it is external, or the spec allows it."""
        return self.region is None or (self.allow_paging is not None and self.allow_paging.value)

    @model_validator(mode="after")
    def _wears(self) -> Self:
        if self.region is not None and (self.wear is None or self.wear.levelled):
            raise ValueError("wear: a part of the chip's flash needs it, with levelled: false")
        if self.region is None and self.allow_paging is not None:
            raise ValueError("allow_paging: is for a part of the chip's flash; add its region")
        return self

    @model_validator(mode="after")
    def _moves(self) -> Self:
        for field in ("read_bytes_per_s", "write_bytes_per_s"):
            if not getattr(self, field).value:
                raise ValueError(f"{field}: must be above 0")
        if self.id == "none":
            raise ValueError("id: 'none' stands for no storage")
        return self


class Reserve(_Spec):
    """What the application, its stack and the C library keep for themselves.

    ``region`` is the RAM region of the stack, from whose run ``ram_bytes`` are taken; None: the
    largest run.
    """

    ram_bytes: NonNegativeInt
    flash_bytes: NonNegativeInt
    region: str | None = None
    source: str = Field(min_length=3)


@dataclass(frozen=True)
class RamRun:
    """Adjacent RAM regions of one speed.

    Attributes:
        name: Of its first region.
        origin: Address of its first byte.
        bytes: Size.
        extra_cycles_per_byte: See ``Region``.
        regions: Names of all its regions.
    """

    name: str
    origin: int
    bytes: int
    extra_cycles_per_byte: float
    regions: tuple[str, ...]


class Device(_Spec):
    """A board or chip (specs/devices/<id>.yaml)."""

    id: str
    name: str
    core: str
    core_source: str | None = Field(default=None, min_length=3)  #: origin of ``core``
    clock_hz: Quantity
    cycles_per_instruction: Quantity
    power_w: Quantity  #: while computing
    regions: tuple[Region, ...]
    storage: tuple[Storage, ...] = ()
    reserve: Reserve
    notes: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for field in ("clock_hz", "cycles_per_instruction"):
            if not getattr(self, field).value:
                raise ValueError(f"{field}: must be above 0")
        for kind in ("ram", "flash"):
            if not any(r.kind == kind for r in self.regions):
                raise ValueError(f"regions: none of kind {kind}")
        end, before = 0, ""
        for r in sorted(self.regions, key=lambda r: r.origin):
            if r.origin < end:
                raise ValueError(f"regions: {r.name} at {r.origin:#x} overlaps {before}")
            end, before = r.origin + r.bytes, r.name
        names = [r.name for r in self.regions]
        if again := {n for n in names if names.count(n) > 1}:
            raise ValueError(f"regions: {min(again)} occurs twice")
        ram = [r.name for r in self.regions if r.kind == "ram"]
        if self.reserve.region is not None and self.reserve.region not in ram:
            raise ValueError(
                f"reserve.region: {self.reserve.region!r} is none of the RAM regions"
                f" {', '.join(ram)}"
            )
        ids = [s.id for s in self.storage]
        if twice := {i for i in ids if ids.count(i) > 1}:
            raise ValueError(f"storage: id {min(twice)} occurs twice")
        own = {r.name: r.bytes for r in self.regions if r.kind == "flash"}
        for s in self.storage:
            if s.region is not None and s.bytes > own.get(s.region, 0):
                raise ValueError(f"storage: {s.id} is no part of a flash region {s.region}")
        if self.core not in bundled_ids("cores"):
            raise ValueError(f"core: {self.core!r} is not one of {', '.join(bundled_ids('cores'))}")
        return self

    @property
    def ram_runs(self) -> tuple[RamRun, ...]:
        """RAM that a plan may use, preferred first: fast before slow, then large before small."""
        runs: list[RamRun] = []
        for r in sorted((r for r in self.regions if r.kind == "ram"), key=lambda r: r.origin):
            run = RamRun(r.name, r.origin, r.bytes, r.slowness, (r.name,))
            before = runs[-1] if runs else run
            same_speed = before.extra_cycles_per_byte == r.slowness
            if before.origin + before.bytes == r.origin and same_speed:
                run = RamRun(
                    before.name, before.origin, before.bytes + r.bytes, r.slowness,
                    (*before.regions, r.name),
                )  # fmt: skip
                runs.pop()
            runs.append(run)
        return tuple(sorted(runs, key=lambda r: (r.extra_cycles_per_byte, -r.bytes, r.origin)))

    @property
    def main_run(self) -> RamRun:
        """The largest run; of several, the one at the lowest address."""
        return min(self.ram_runs, key=lambda r: (-r.bytes, r.origin))

    def ram_region(self) -> tuple[int, int]:
        """Origin and bytes of the largest run of adjacent RAM regions."""
        return self.main_run.origin, self.main_run.bytes

    @property
    def ram_budgets(self) -> tuple[tuple[RamRun, int], ...]:
        """Bytes of each run that a plan may use: its size, less the reserve where the stack is."""
        runs, kept = self.ram_runs, self.reserve
        stack = next((r for r in runs if kept.region in r.regions), self.main_run)
        return tuple((r, max(0, r.bytes - (kept.ram_bytes if r == stack else 0))) for r in runs)

    @property
    def flash_bytes(self) -> int:
        """Bytes of all flash regions."""
        return sum(r.bytes for r in self.regions if r.kind == "flash")

    @property
    def pageable(self) -> tuple[Storage, ...]:
        """Storages that tensors may be paged to."""
        return tuple(s for s in self.storage if s.pages)

    def find_storage(self, storage_id: str) -> Storage:
        """The storage of an id.

        Raises:
            UsageError: The device has none of that id, or its spec does not allow paging there.
        """
        known = ", ".join(["none", *(s.id for s in self.pageable)])
        for s in self.storage:
            if s.id == storage_id and s.pages:
                return s
            if s.id == storage_id:
                raise UsageError(
                    f"--storage: {storage_id} is flash of the chip itself, and the spec of"
                    f" {self.id} does not allow paging there (allow_paging); choose {known}"
                )
        raise UsageError(f"--storage: {self.id} has no storage {storage_id!r}; it knows {known}")


def device_ids() -> list[str]:
    """Ids of all bundled devices, sorted."""
    return bundled_ids("devices")


def load_device(name: str) -> Device:
    """A bundled device by its id, or a device file of the user.

    Args:
        name: An id, or a path that ends in .yaml or .yml or holds a separator.

    Raises:
        UsageError: Unknown id, or a file that is unreadable or wrong (file, line and field).
    """
    if name.endswith((".yaml", ".yml")) or "/" in name or "\\" in name:
        return load_spec(Path(name), Device)
    known = device_ids()
    if name not in known:
        near = [d for d in known if name and d.startswith(name)] or get_close_matches(name, known)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(
            f"device {name!r} is not known; {hint}`odt-plan devices` lists {len(known)},"
            " or give a .yaml file"
        )
    return _bundled_device(name)


@cache
def _bundled_device(device_id: str) -> Device:
    return load_spec(bundled("devices", device_id), Device)


@cache
def load_core(core_id: str) -> Core:
    """A bundled core by its id.

    Raises:
        UsageError: Unknown id, or a spec that is wrong.
    """
    if core_id not in bundled_ids("cores"):
        known = ", ".join(bundled_ids("cores"))
        raise UsageError(f"core {core_id!r} is not known; known are {known}")
    return load_spec(bundled("cores", core_id), Core)
