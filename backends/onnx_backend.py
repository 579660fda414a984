"""The importer and the NumPy kernels behind the interface that onnx defines for back ends.

``onnx.backend.base`` is what onnx's conformance cases drive. A model is imported when it is run,
because only then its shapes are known, and which inputs are data: operands that the importer needs
as constants (axes, weights of quantized layers) are often inputs of the model in such cases.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.backend.base import Backend, BackendRep, namedtupledict

from ..ir.errors import UnsupportedModelError, UsageError
from ..ir.graph import Array, Graph, Value
from ..ir.interpreter import run
from ..ir.onnx_file import model_file
from ..ir.onnx_import import graph_of
from .onnx_training import OptimizerRep, has_optimizers

#: What a file's uint8 is more than the i8 that stands for it.
SHIFT = 128


class OdtPlanRep(BackendRep):
    """A model, ready to run."""

    def __init__(self, model: ModelProto) -> None:
        """Of a model; it is not changed."""
        weights = {t.name for t in model.graph.initializer}
        self._model = model
        self._inputs = [v for v in model.graph.input if v.name not in weights]
        self._path = Path(model.graph.name or "model")

    def run(self, inputs: Sequence[Any], **kwargs: Any) -> tuple[Any, ...]:
        """Execute the model.

        Args:
            inputs: One array for each input that is no initializer, in the model's order.
            kwargs: None are known.

        Returns:
            The results by position, and by name where names are identifiers.

        Raises:
            UsageError: Too many or too few inputs, or a shape that the model rules out.
            UnsupportedModelError: What in the model can't be expressed.
        """
        if len(inputs) != len(self._inputs):
            raise UsageError(f"{self._path}: {len(inputs)} inputs; it has {len(self._inputs)}")
        arrays = (np.asarray(x) if isinstance(x, np.generic) else x for x in inputs)
        feeds = {v.name: x for v, x in zip(self._inputs, arrays, strict=True)}
        graph = self._imported(feeds)
        env = run(graph, {v.name: _stored(v, feeds[v.name]) for v in graph.inputs})
        files = self._model.graph.output
        results = [
            _as_in_file(graph, v, env[v.name], o.type.tensor_type.elem_type)
            for v, o in zip(graph.outputs, files, strict=True)
        ]
        named: tuple[Any, ...] = namedtupledict("Outputs", [o.name for o in files])(*results)
        return named

    def _imported(self, feeds: Mapping[str, Any]) -> Graph:
        """The graph, with as few inputs bound to their arrays as the importer gets along with."""
        error: UnsupportedModelError | None = None
        for bound in self._bindings(feeds):
            try:
                return graph_of(model_file(self._bound(feeds, bound), self._path, 1), self._path)
            except UnsupportedModelError as e:
                error = e
        assert error is not None
        raise error

    def _bindings(self, feeds: Mapping[str, Any]) -> Iterator[set[str]]:
        """Inputs to bind: none, those that are no real numbers, all but the first."""
        names = [v.name for v in self._inputs]
        tensors = {k for k in names if isinstance(feeds[k], np.ndarray)}
        numbers = {k for k in tensors if feeds[k].dtype == np.float32}
        yield set()
        if tensors - numbers and numbers:
            yield tensors - numbers
        if len(names) > 1 and tensors - {names[0]} != tensors - numbers:
            yield tensors - {names[0]}

    def _bound(self, feeds: Mapping[str, Any], bound: set[str]) -> ModelProto:
        """The model with the shapes of the arrays; those of ``bound`` become initializers."""
        proto = ModelProto()
        proto.CopyFrom(self._model)
        for v in list(proto.graph.input):
            x = feeds.get(v.name)
            if not isinstance(x, np.ndarray) or not v.type.HasField("tensor_type"):
                continue
            shape = v.type.tensor_type.shape
            wanted = [d.dim_value or d.dim_param or "?" for d in shape.dim]
            fits = len(wanted) == x.ndim and all(
                w == n or isinstance(w, str) for w, n in zip(wanted, x.shape, strict=True)
            )
            if v.type.tensor_type.HasField("shape") and not fits:
                sizes = ", ".join(map(str, wanted))
                raise UsageError(f"{self._path}: {v.name} is {[*x.shape]}, not [{sizes}]")
            del shape.dim[:]
            shape.dim.extend(type(shape).Dimension(dim_value=n) for n in x.shape)
            if not x.size and v.name not in bound:
                raise UnsupportedModelError(f"{self._path}: {v.name} (input): has no elements")
            if v.name in bound:
                proto.graph.initializer.append(numpy_helper.from_array(x, v.name))
        return proto


class OdtPlanBackend(Backend):
    """Back end for ``onnx.backend.test`` and everything else that drives ``Backend``."""

    @classmethod
    def prepare(cls, model: ModelProto, device: str = "CPU", **kwargs: Any) -> BackendRep:
        """A model, ready to run; it is judged when it runs, with the shapes of its inputs.

        Raises:
            UsageError: There is no such device.
        """
        if not cls.supports_device(device):
            raise UsageError(f"device {device}: only CPU is supported")
        return OptimizerRep(model) if has_optimizers(model) else OdtPlanRep(model)

    @classmethod
    def run_node(
        cls,
        node: NodeProto,
        inputs: Sequence[Any],
        device: str = "CPU",
        outputs_info: Sequence[tuple[np.dtype[Any], tuple[int, ...]]] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """Execute one node.

        Args:
            node: The node.
            inputs: One array for each operand that is present.
            device: ``CPU``.
            outputs_info: Not needed: types are inferred.
            kwargs: ``opset_version`` of the standard operators; the newest without it.
        """
        arrays = dict(zip(filter(None, node.input), map(np.asarray, inputs), strict=True))
        graph = helper.make_graph(
            [node],
            node.name or node.op_type,
            [
                helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
                for k, a in arrays.items()
            ],
            [helper.make_empty_tensor_value_info(o) for o in node.output if o],
        )
        opset = kwargs.get("opset_version")
        sets = [helper.make_opsetid("", opset)] if opset else None
        model = helper.make_model(graph, opset_imports=sets)
        return cls.prepare(model, device).run(list(arrays.values()))

    @classmethod
    def supports_device(cls, device: str) -> bool:
        """The kernels run on the CPU."""
        return device == "CPU"


def _stored(v: Value, array: Array) -> Array:
    """An input in the form that the graph reads: i8 for uint8, i32 for int64, 1 and 0 for bool."""
    if v.type.dtype == "i8" and array.dtype == np.uint8:
        return (array.astype(np.int16) - SHIFT).astype(np.int8)
    if array.dtype == np.bool_:
        return array.astype(np.float32)
    return array.astype(np.int32) if v.type.dtype == "i32" else array


def _as_in_file(graph: Graph, v: Value, array: Array, kind: int) -> Array:
    """A result in the file's element type: real numbers stand for integers and conditions."""
    if kind == TensorProto.BOOL and array.dtype == np.float32:
        return np.not_equal(array, 0)
    if kind in (TensorProto.INT32, TensorProto.INT64):  # computed ones are f32, and exact
        return array.astype(np.int32 if kind == TensorProto.INT32 else np.int64)
    if kind not in (TensorProto.INT8, TensorProto.UINT8) or array.dtype != np.float32:
        return array
    stored = graph.quantization[v.name].quantize(array)
    if kind == TensorProto.INT8:
        return stored
    return (stored.astype(np.int16) + SHIFT).astype(np.uint8)
