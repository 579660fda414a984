"""Predicted cost of nodes, updates and page transfers, as integers.

Instructions = the core's executed instructions (specs/cores) per unit of work, per pass and start
of an inner loop and per result, times their counts, + one call; cycles = instructions x the
device's cycles per instruction, rounded up per step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil

from ..ir.graph import Node
from ..ir.opdef import get_op, works
from ..ir.training import TrainingGraph, Update
from .device import Core, Device, Storage
from .plan import CODE_BYTES_PER_KERNEL, CODE_BYTES_PER_STEP
from .tensors import aligned


@dataclass(frozen=True)
class CostModel:
    """Costs on one device.

    Attributes:
        device: Clock, cycles per instruction, power.
        core: Instructions per unit of work.
        storage: Where tensors are paged to, None for no paging.
    """

    device: Device
    core: Core
    storage: Storage | None

    @cached_property
    def _known(self) -> dict[tuple[object, ...], float]:
        return {}

    def _instructions(self, node: Node, tile_rows: int | None = None) -> float:
        """Of one node; alike ones, which every plan of a model has again, are counted once."""
        op = get_op(node.op)
        if op.view:
            return 0.0
        types = tuple(v and v.type for v in (*node.inputs, *node.outputs))
        alike = (node.op, types, tuple(node.attrs.items()), tile_rows)
        if alike not in self._known:
            self._known[alike] = self._counted(node, tile_rows)
        return self._known[alike]

    def _counted(self, node: Node, tile_rows: int | None) -> float:
        result = 0.0
        for work in works(node, tile_rows):
            rate = self.core.rate(work)
            assert work.outputs is not None, work
            result += work.amount * rate.value + work.passes * rate.per_pass
            result += work.loops * rate.per_loop + work.outputs * rate.per_output
        return result

    def node_cycles(self, node: Node) -> int:
        """Cycles of one compute step."""
        if get_op(node.op).view:
            return 0
        return self._cycles(self._instructions(node) + self.core.call.value)

    def update_cycles(self, update: Update) -> int:
        """Cycles of the step that computes the gradient and applies or accumulates it."""
        consumer = update.accumulate_node or update.apply_node
        if update.grad_node is None:
            return self.node_cycles(consumer)
        rows = update.value.type.shape[0] if update.value.type.shape else 1
        calls = 2 * ceil(rows / update.tile_rows)
        return self._cycles(
            self._instructions(update.grad_node, update.tile_rows)
            + self._instructions(consumer)
            + calls * self.core.call.value
        )

    def write_cycles(self, n_bytes: int) -> int:
        """Cycles that one page-out takes."""
        s = self._paged()
        return self._transfer(n_bytes, s.write_latency_s.value, s.write_bytes_per_s.value)

    def read_cycles(self, n_bytes: int) -> int:
        """Cycles that one page-in takes."""
        s = self._paged()
        return self._transfer(n_bytes, s.read_latency_s.value, s.read_bytes_per_s.value)

    @property
    def overlaps(self) -> bool:
        """Page transfers run beside the core."""
        return self.storage is not None and self.storage.overlaps

    @property
    def steps_per_transfer(self) -> int:
        """A transfer beside the core is started by one step and waited for by another."""
        return 2 if self.overlaps else 1

    def stored_bytes(self, n_bytes: int) -> int:
        """Bytes of storage that a tensor takes: whole erase units where nothing levels wear."""
        wear = self._paged().wear
        return n_bytes if wear is None or wear.levelled else _units(n_bytes, wear.unit_bytes)

    def worn_bytes(self, n_bytes: int) -> int:
        """Bytes that one page-out wears; 0 where the storage does not wear."""
        wear = self._paged().wear
        return 0 if wear is None else _units(n_bytes, wear.unit_bytes)

    def most_worn(self, steps: int, micro_batches: int) -> int | None:
        """Bytes that a training step may wear for the storage to last so many; None: any."""
        s = self._paged()
        if s.wear is None:
            return None
        if s.wear.levelled:
            return int(s.bytes * s.wear.cycles.value // steps)
        return None if steps * micro_batches <= s.wear.cycles.value else 0

    def life_steps(self, worn_bytes: int, times: int) -> int | None:
        """Training steps until the storage is worn out.

        Args:
            worn_bytes: In one training step; 0: it lasts forever, None is returned.
            times: How often a tensor is paged out in it, at most.
        """
        if worn_bytes == 0:
            return None
        s = self._paged()
        assert s.wear is not None
        if s.wear.levelled:
            return int(s.bytes * s.wear.cycles.value // worn_bytes)
        return int(s.wear.cycles.value // times)

    def latency_s(self, cycles: int) -> float:
        """Seconds of a number of cycles."""
        return cycles / self.device.clock_hz.value

    def energy_j(self, cycles: int, transfer_cycles: int) -> float:
        """Energy of a step: the chip all the time, the storage while it transfers."""
        energy = self.device.power_w.value * self.latency_s(cycles)
        if transfer_cycles:
            energy += self._paged().power_w.value * self.latency_s(transfer_cycles)
        return energy

    def _paged(self) -> Storage:
        assert self.storage is not None, "no storage was chosen"
        return self.storage

    def _transfer(self, n_bytes: int, latency_s: float, bytes_per_s: float) -> int:
        return ceil((latency_s + n_bytes / bytes_per_s) * self.device.clock_hz.value)

    def _cycles(self, instructions: float) -> int:
        # A millionth is the rounding of sums in another order, not a cycle.
        return ceil(round(instructions * self.device.cycles_per_instruction.value, 6))


def _units(n_bytes: int, unit_bytes: int) -> int:
    return -(-n_bytes // unit_bytes) * unit_bytes


def flash_weights_bytes(training: TrainingGraph) -> int:
    """Flash of all constants, the initial images of updated weights included."""
    values = training.graph.values
    return sum(aligned(values[name].type.nbytes) for name in training.graph.constants)


def code_bytes(nodes: list[Node], steps: int) -> int:
    """Estimated flash of the kernels used and of the generated schedule."""
    symbols = {c.symbol for n in nodes if (c := get_op(n.op).c) is not None}
    return CODE_BYTES_PER_KERNEL * len(symbols) + CODE_BYTES_PER_STEP * steps
