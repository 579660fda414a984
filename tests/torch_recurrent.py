"""Recurrent nodes of the IR by torch's own layers."""

from __future__ import annotations

import torch

from odt_plan.ir.graph import Node

#: Places of torch's gates among ONNX's.
GATES = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}


def torch_recurrent(
    node: Node,
    x: torch.Tensor,
    r: torch.Tensor,
    bias: torch.Tensor | None = None,
    bptt: int | None = None,
) -> torch.Tensor:
    """States of all steps, with zero initial states.

    The sums over inputs that ``x`` holds are the inputs of a layer whose input weights are 1.
    States are detached every ``bptt`` steps, counted from the last one.
    """
    size = r.shape[1]
    order = torch.cat([torch.arange(size) + g * size for g in GATES[node.op]])
    if node.op == "RNN":
        name = str(node.attrs["activation"]).lower()
        layer: torch.nn.Module = torch.nn.RNN(x.shape[2], size, nonlinearity=name)
    elif node.op == "GRU":
        assert node.int_attr("linear_before_reset"), "what torch computes"
        layer = torch.nn.GRU(x.shape[2], size)
    else:
        layer = torch.nn.LSTM(x.shape[2], size)
    zeros = torch.zeros(x.shape[2], dtype=x.dtype)
    parameters = {
        "weight_ih_l0": torch.eye(x.shape[2], dtype=x.dtype)[order],
        "weight_hh_l0": r[order],
        "bias_ih_l0": zeros,
        "bias_hh_l0": zeros if bias is None else torch.cat([zeros[: 2 * size], bias]),
    }
    reverse = bool(node.int_attr("reverse"))
    x = x.flip(0) if reverse else x
    parts, state = x.split(len(x)), None
    if bptt is not None:
        parts = tuple(p.flip(0) for p in reversed(x.flip(0).split(bptt)))
    results = []
    for part in parts:
        y, state = torch.func.functional_call(layer, parameters, (part, state))
        state = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
        results.append(y)
    y = torch.cat(results)
    return y.flip(0) if reverse else y
