"""Bare cost graphs: nodes with costs and bytes, as planners exchange them, in JSON."""

from __future__ import annotations

import json
from fractions import Fraction
from functools import cached_property
from math import fsum, isfinite
from pathlib import Path
from typing import Annotated, Literal, Self

import networkx as nx
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..ir.errors import UsageError

Quantity = Literal["energy", "time"]
#: Integers up to here are exact in JSON of every language.
LARGEST_EXACT = 1 << 53
#: Larger files are something else.
LARGEST_FILE_BYTES = 256 << 20

_Cost = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class CostNode(BaseModel):
    """One node.

    Attributes:
        id: Its number.
        name: For messages.
        cost_cpu_s: Time of computing it once.
        mem_bytes: Size of its result.
        energy_J: Energy of computing it once; None: not known.
        pagein_J: Energy of reading its result from storage.
        pageout_J: Energy of writing it.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    id: int
    name: str = ""
    cost_cpu_s: _Cost
    mem_bytes: Annotated[int, Field(ge=0, le=LARGEST_EXACT)]
    energy_J: _Cost | None = None  # noqa: N815 (the format's name)
    pagein_J: _Cost | None = None  # noqa: N815
    pageout_J: _Cost | None = None  # noqa: N815

    @property
    def label(self) -> str:
        """Its name and number, for messages."""
        return f"{self.name!r} (node {self.id})" if self.name else f"node {self.id}"

    def cost(self, quantity: Quantity) -> float:
        """Cost of computing it once: joules or seconds."""
        return self.cost_cpu_s if quantity == "time" else self.energy_J or 0.0


class CostGraph(BaseModel):
    """A graph of nodes in the order in which each is computed for the first time.

    Attributes:
        name: For reports.
        nodes: In any order.
        edges: (operand, reader) by id.
        order: Ids in a topological order; left out: the order of ``nodes``.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    name: str = ""
    nodes: Annotated[list[CostNode], Field(min_length=1)]
    edges: list[tuple[int, int]]
    order: list[int] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        ids = [n.id for n in self.nodes]
        known = set(ids)
        if len(known) < len(ids):
            twice = next(i for i in ids if ids.count(i) > 1)
            raise ValueError(f"nodes: id {twice} is given twice")
        for a, b in self.edges:
            if missing := {a, b} - known:
                raise ValueError(f"edges: [{a}, {b}] names {min(missing)}, which is no node")
        graph = nx.DiGraph(self.edges)
        if not nx.is_directed_acyclic_graph(graph):
            cycle = [a for a, _ in nx.find_cycle(graph)]
            raise ValueError(f"edges: a cycle: {' -> '.join(map(str, [*cycle, cycle[0]]))}")
        order = ids if self.order is None else self.order
        if sorted(order) != sorted(ids):
            odd = next((i for i in order if i not in known or order.count(i) > 1), None)
            why = "leaves nodes out" if odd is None else f"names {odd} twice or no such node"
            raise ValueError(f"order: {why}; it lists every node once")
        place = {v: i for i, v in enumerate(order)}
        for a, b in self.edges:
            if place[a] > place[b]:
                raise ValueError(f"order: {b} stands before its operand {a}")
        if sum(n.mem_bytes for n in self.nodes) > LARGEST_EXACT:
            raise ValueError("nodes: all mem_bytes together exceed 2^53")
        if not isfinite(fsum(n.cost_cpu_s + (n.energy_J or 0.0) for n in self.nodes)):
            raise ValueError("nodes: all costs together are no finite number")
        return self

    @cached_property
    def sequence(self) -> tuple[CostNode, ...]:
        """Nodes in the order of first computations."""
        by_id = {n.id: n for n in self.nodes}
        return tuple(self.nodes if self.order is None else (by_id[i] for i in self.order))

    @cached_property
    def operands(self) -> dict[int, tuple[int, ...]]:
        """Id -> ids that it reads, ascending, each once."""
        found: dict[int, set[int]] = {n.id: set() for n in self.nodes}
        for a, b in self.edges:
            found[b].add(a)
        return {v: tuple(sorted(p)) for v, p in found.items()}

    @property
    def has_energy(self) -> bool:
        """Every node has an energy."""
        return all(n.energy_J is not None for n in self.nodes)

    @property
    def has_paging(self) -> bool:
        """Every node has the energies of paging."""
        return all(n.pagein_J is not None and n.pageout_J is not None for n in self.nodes)


def load_cost_graph(path: Path) -> CostGraph:
    """Read and validate a cost graph.

    Raises:
        UsageError: Unreadable, not JSON, a field that is wrong, a cycle, or an order that is none.
    """
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"{path}: is a folder or a device; give a cost graph in JSON")
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise UsageError(f"{path}: {path.stat().st_size:,} bytes is no cost graph")
        data = json.loads(path.read_text(encoding="utf-8"))
        # pydantic's strict mode takes a JSON array for a tuple in its JSON mode only
        return CostGraph.model_validate_json(json.dumps(data))
    except OSError as e:
        raise UsageError(f"{path}: can't read the cost graph: {e.strerror or e}") from None
    except UnicodeDecodeError as e:
        raise UsageError(f"{path}: no cost graph: not UTF-8 text at byte {e.start}") from None
    except json.JSONDecodeError as e:
        raise UsageError(f"{path}:{e.lineno}: broken JSON: {e.msg}") from None
    except (RecursionError, ValueError) as e:
        raise UsageError(f"{path}: {_finding(e)}") from None


def _finding(error: Exception) -> str:
    """The first finding of pydantic, in one line."""
    if not isinstance(error, ValidationError):
        return f"broken JSON: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if first["type"] == "value_error":
        return message
    where = ".".join(map(str, first["loc"])) or "file"
    if first["type"] == "missing":
        return f"{where}: is missing"
    return f"{where}: {first['input']!r:.40} should be {message[0].lower()}{message[1:]}"


def costs_exactly(values: list[float], total: float, bits: int = 40) -> tuple[list[int], Fraction]:
    """Costs as integers, and the cost of one unit.

    Whole numbers are divided by their greatest common divisor and are exact. Others are counted in
    units of ``2^-bits`` of the total, a power of two, and rounded down: an integer lower bound
    times the unit is then a lower bound on the true cost, and 500 steps are short by 500 units at
    most, 5e-10 of the total.

    Args:
        values: Costs >= 0.
        total: What computing every node once costs.
        bits: Resolution.
    """
    exact = [Fraction(v) for v in values]
    unit = Fraction(1)
    if all(v.denominator == 1 for v in exact):
        from math import gcd

        unit = Fraction(gcd(*(v.numerator for v in exact)) or 1)
    if unit == 1 and (total >= 1 << 50 or any(v.denominator != 1 for v in exact)):
        largest = Fraction(total or max(values))
        power = largest.numerator.bit_length() - largest.denominator.bit_length() - bits
        unit = Fraction(2) ** power
    return [int(v / unit) for v in exact], unit
