"""Training without any plan, as the oracle for everything that trains by one."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from odt_plan.ir.indices import random_indices
from odt_plan.ir.interpreter import run
from odt_plan.ir.targets import random_target, target_names
from odt_plan.ir.training import TrainingGraph
from odt_plan.planner.plan import Plan

Array = NDArray[Any]


def batch(t: TrainingGraph, rng: np.random.Generator) -> tuple[Any, Any]:
    """Random samples and targets of one micro-batch, the samples as the inputs store them.

    Of several inputs or outputs arrays by name.
    """
    samples: dict[str, Array] = {}
    for v in t.samples:
        x: Array = rng.standard_normal(v.type.shape).astype(np.float32)
        if v.type.dtype == "i32":
            x = random_indices(t.graph, v, len(x), rng)
        samples[v.name] = x if v.type.quant is None else v.type.quant.quantize(x)
    x = samples if len(samples) > 1 else samples[t.sample.name]
    y = {
        name: random_target(t.graph, v, rng)
        for name, v in zip(target_names(t), t.targets, strict=True)
    }
    return x, y if len(y) > 1 else y["y"]


class Unconstrained:
    """Training by the interpreter: every value in memory of its own, gradients never streamed."""

    def __init__(self, training: TrainingGraph) -> None:
        self.t = training
        self.state: dict[str, Array] = {}
        for u in self.t.updates:
            self.state[u.value.name] = self.t.graph.constants[u.value.name]
            for v in (*u.states, u.accumulator):
                if v is not None:
                    self.state[v.name] = np.zeros(v.type.shape, np.float32)
        self.micro = self.updates = 0
        self.bias = np.zeros(2, np.float32)

    def step(self, x: Any, y: Any, lr: float) -> float:
        """One micro-step; of several inputs or outputs ``x`` and ``y`` hold arrays by name."""
        t, spec = self.t, self.t.spec
        hyper = np.array([lr, 1.0, self.updates + 1], np.float32)
        if spec.optimizer == "adam":
            if self.micro == 0:  # 1 - beta^t, kept in f32 as the firmware does
                betas = np.array([spec.beta1, spec.beta2])
                self.bias = self.bias * betas.astype(np.float32) + (1 - betas).astype(np.float32)
            hyper[1] = 1 / np.sqrt(self.bias[1])
            hyper = np.append(hyper, hyper[0] / self.bias[0])
        samples = x if isinstance(x, dict) else {t.sample.name: x}
        given = y if isinstance(y, dict) else {"y": y}
        pairs = zip(target_names(t), t.targets, strict=True)
        targets = {v.name: given[name] for name, v in pairs}
        feeds = {**samples, **targets, t.hyper.name: hyper, **self.state}
        values = run(t.graph, feeds)
        self.micro += 1
        last = self.micro == spec.micro_batches
        for u in t.updates:
            if last:
                kept = (u.value, *u.states)
                for v, new in zip(kept, u.apply_node.outputs, strict=True):
                    self.state[v.name] = values[new.name]
            if u.accumulator is not None and u.accumulate_node is not None:
                total = values[u.accumulate_node.out.name]
                self.state[u.accumulator.name] = np.zeros_like(total) if last else total
        if last:
            self.micro = 0
            self.updates += 1
        return float(values[t.loss.name])

    def state_bytes(self, plan: Plan) -> bytes:
        """Laid out as the plan says."""
        ram = plan.claims.ram_bytes
        image = bytearray(ram.total - ram.arena)
        for b in plan.buffers:
            if b.space == "state":
                image[b.offset : b.offset + b.bytes] = self.state[b.value].tobytes()
        return bytes(image)
