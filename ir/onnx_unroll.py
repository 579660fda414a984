"""Nodes that stand for graphs are written out: control flow, and operators defined by others.

An If with a constant condition becomes the branch that is taken, a Loop with a constant trip count
and a condition that follows from constants its iterations, and so does a Scan. What all iterations
compute alike is computed once. Values keep their names where these are free.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import onnx
from onnx import (
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    TypeProto,
    ValueInfoProto,
    helper,
    inliner,
    numpy_helper,
)

from .graph import Array, TensorType, unique_name
from .onnx_read import node_name
from .onnx_scopes import STANDARD_DOMAINS, all_nodes, reads, rename_reads, subgraphs, value_names

CONTROL_FLOW = ("If", "Loop", "Scan")
#: Operators without a rule, which onnx defines by others: they are read by that definition.
DEFINED = (
    *("AffineGrid", "Attention", "CausalConvWithState", "CenterCropPad", "LinearAttention"),
    *("RotaryEmbedding", "SwiGLU"),
)
#: Nodes that all loops of a model together may be written out as: more fit no device.
MAX_WRITTEN = 2**12
#: Domain of such definitions while they are written out.
_DEFINITIONS = "odt_plan.definitions"
#: Element types of values that can be operands of a node that is written out.
_ELEMENTS = {
    "f32": TensorProto.FLOAT,
    "i32": TensorProto.INT32,
    "i64": TensorProto.INT64,
    "bits": TensorProto.BOOL,
}
#: Results of a node that depends on constants alone: of those that are given, and those known.
Evaluate = Callable[[NodeProto, Mapping[str, Array]], Mapping[str, Array] | None]


class KeptError(Exception):
    """The subgraphs of a node can't be written out; the text is the reason."""


@dataclass(eq=False)
class Unroller:
    """Writes out the nodes of one model that stand for graphs.

    Attributes:
        proto: The model; its nodes are replaced in place.
        opset: Version of the standard operator set.
        kept: Such a node that stays -> why.
    """

    proto: ModelProto
    opset: int
    kept: dict[str, str] = field(default_factory=dict)
    _room: int = MAX_WRITTEN
    _values: Counter[str] = field(default_factory=Counter)
    _nodes: Counter[str] = field(default_factory=Counter)
    _read: set[str] = field(default_factory=set)

    def sweep(
        self,
        constants: Mapping[str, Array],
        types: Mapping[str, TensorType],
        evaluate: Evaluate,
    ) -> bool:
        """Write out what can be by what is known now; what is inside them is left as it is.

        Args:
            constants: Data of values that are constant.
            types: Static types by value name.
            evaluate: How conditions of loops are computed.

        Returns:
            Whether anything has changed. Else ``kept`` says why not.
        """
        self.kept = {}
        graph = self.proto.graph
        if not any(_flows(n) for n in graph.node):
            return False
        self._values = Counter(value_names(graph))
        self._nodes = Counter(n.name for n in graph.node)
        self._read = {i for n in graph.node for i in reads(n)} | {v.name for v in graph.output}
        rest: list[NodeProto] = []
        changed = False
        for node in graph.node:
            if not _flows(node):
                rest.append(node)
                continue
            try:
                if node.op_type == "If":
                    written = self._branch(node, constants)
                elif node.op_type == "Loop":
                    written = self._loop(node, constants, evaluate)
                elif node.op_type == "Scan":
                    written = self._scan(node, types)
                else:
                    written = self._definition(node, types, constants)
            except KeptError as e:
                self.kept[node.name] = str(e)
                rest.append(node)
                continue
            rest += written
            changed = True
        if changed:
            del graph.node[:]
            graph.node.extend(rest)
        return changed

    # -- the three operators -----------------------------------------------------------------------

    def _branch(self, node: NodeProto, constants: Mapping[str, Array]) -> list[NodeProto]:
        condition = _flag(node.input[0] if node.input else "", constants)
        body = _subgraph(node, "then_branch" if condition else "else_branch")
        if len(body.output) != len(node.output):
            raise KeptError(f"a branch has {len(body.output)} results, not {len(node.output)}")
        for inner in subgraphs(node):  # so that the values of the branch keep their names
            self._values -= Counter(value_names(inner))
        for inner in chain.from_iterable(map(subgraphs, body.node)):
            self._values += Counter(value_names(inner))
        steps = _Iterations(self, body, node.name)
        steps.write({})
        return [*steps.nodes, *steps.hand_on(steps.results(), node.output)]

    def _loop(
        self, node: NodeProto, constants: Mapping[str, Array], evaluate: Evaluate
    ) -> list[NodeProto]:
        body = _subgraph(node, "body")
        operands: list[str] = list(node.input) + [""] * (2 - len(node.input))
        trip, condition, *carried = operands
        trips = None if not trip else _trips(trip, constants)
        listed = len(body.output) - 1 - len(carried)
        results = max(len(node.output), len(carried))
        _check_body(body, 2 + len(carried), max(len(body.output), 1 + results))
        known = dict(constants)
        steps = _Iterations(self, body, node.name)
        leading = steps.leading_to_condition()
        lists: list[list[str]] = [[] for _ in range(listed)]
        while trips is None or steps.count < trips:
            if condition and not _flag(condition, known):
                break
            number, flag = steps.constant("number", np.array(steps.count)), condition
            known[number] = np.array(steps.count)
            if not flag:
                flag = steps.constant("goes_on", np.array(True))
                known[flag] = np.array(True)
            given = dict(zip((v.name for v in body.input), (number, flag, *carried), strict=True))
            for part in steps.write(given):
                if leading.intersection(part.made_as):
                    known |= evaluate(part.node, known) or {}
            condition, *made = steps.results()
            carried, rows = made[: len(carried)], made[len(carried) :]
            for row, value in zip(lists, rows, strict=True):
                row.append(value)
        return [
            *steps.nodes,
            *steps.hand_on(carried, node.output),
            *self._stacked(node, lists, node.output[len(carried) :], [0] * listed),
        ]

    def _scan(self, node: NodeProto, types: Mapping[str, TensorType]) -> list[NodeProto]:
        if self.opset < 9:
            raise KeptError("a Scan of opset 8 runs over batches; export with opset 9 or newer")
        body, attrs = _subgraph(node, "body"), {a.name: a for a in node.attribute}
        count = attrs["num_scan_inputs"].i if "num_scan_inputs" in attrs else 0
        states = len(node.input) - count
        if count < 1 or states < 0:
            raise KeptError(f"num_scan_inputs is {count}, but it has {len(node.input)} inputs")
        _check_body(body, len(node.input), len(node.output))
        listed = len(node.output) - states

        def per(key: str, length: int) -> list[int]:
            given = list(attrs[key].ints) if key in attrs else [0] * length
            if len(given) != length:
                raise KeptError(f"{key} has {len(given)} entries, not {length}")
            return given

        axes, backwards = per("scan_input_axes", count), per("scan_input_directions", count)
        sequences = node.input[states:]
        lengths = {_length(n, a, types) for n, a in zip(sequences, axes, strict=True)}
        if len(lengths) != 1:
            raise KeptError(f"its inputs are of different lengths {sorted(lengths)}")
        (length,) = lengths
        steps = _Iterations(self, body, node.name)
        lists: list[list[str]] = [[] for _ in range(listed)]
        carried = list(node.input[:states])
        while steps.count < length:
            slices = []
            for name, axis, back in zip(sequences, axes, backwards, strict=True):
                at = length - 1 - steps.count if back else steps.count
                place = steps.constant("at", np.array(at))
                part = steps.fresh(f"{node.name}/{steps.count}/{name}")
                steps.add(helper.make_node("Gather", [name, place], [part], axis=axis))
                slices.append(part)
            names = [v.name for v in body.input]
            steps.write(dict(zip(names, (*carried, *slices), strict=True)))
            results = steps.results()
            carried = results[:states]
            for row, value in zip(lists, results[states:], strict=True):
                row.append(value)
        reverse = per("scan_output_directions", listed)
        lists = [row[::-1] if back else row for row, back in zip(lists, reverse, strict=True)]
        return [
            *steps.nodes,
            *steps.hand_on(carried, node.output),
            *self._stacked(node, lists, node.output[states:], per("scan_output_axes", listed)),
        ]

    def _definition(
        self, node: NodeProto, types: Mapping[str, TensorType], constants: Mapping[str, Array]
    ) -> list[NodeProto]:
        infos: list[ValueInfoProto] = []
        for name in node.input:
            data, known = constants.get(name), types.get(name)
            if data is not None:
                kind = helper.np_dtype_to_tensor_dtype(data.dtype)
                infos.append(helper.make_tensor_value_info(name, kind, data.shape))
            elif known is not None:
                kind = _ELEMENTS.get(known.dtype, TensorProto.FLOAT)
                infos.append(helper.make_tensor_value_info(name, kind, known.shape))
            elif name:
                raise KeptError(f"the type of its operand {name} is not known")
            else:
                infos.append(ValueInfoProto())  # an optional operand that is absent
        call = NodeProto()
        call.CopyFrom(node)
        call.domain = _DEFINITIONS
        definition = _definition_of(node, self.opset, [v.type for v in infos])
        for what, names, most in (
            ("operands", node.input, definition.input),
            ("results", node.output, definition.output),
        ):
            if len(names) > len(most):
                raise KeptError(f"has {len(names)} {what}; at most {len(most)} are defined")
        operands = {v.name: v for v in infos if v.name}
        graph = helper.make_graph(
            [call],
            "definition",
            list(operands.values()),
            [helper.make_empty_tensor_value_info(o) for o in node.output if o],
        )
        sets = [*definition.opset_import, helper.make_opsetid(_DEFINITIONS, 1)]
        model = helper.make_model(graph, functions=[definition], opset_imports=sets)
        whole = inliner.inline_local_functions(model)
        steps = _Iterations(self, whole.graph, node.name)
        steps.write({name: name for name in operands})
        return [*steps.nodes, *steps.hand_on(steps.results(), [o for o in node.output if o])]

    def _stacked(
        self,
        node: NodeProto,
        lists: Sequence[Sequence[str]],
        results: Sequence[str],
        axes: Sequence[int],
    ) -> Iterator[NodeProto]:
        """The values of all iterations beside each other, along a new axis."""
        for values, result, axis in zip(lists, results, axes, strict=False):
            if result not in self._read:
                continue
            if not values:
                raise KeptError(f"it runs no iteration, so that {result} would have no elements")
            rows = [self._fresh(f"{result}/{i}", self._values) for i in range(len(values))]
            for value, row in zip(values, rows, strict=True):
                yield from self._unsqueeze(f"{node.name}/{row}", value, row, axis)
            name = self._fresh(f"{node.name}/{result}", self._nodes)
            yield helper.make_node("Concat", rows, [result], name=name, axis=axis)

    def _unsqueeze(self, name: str, x: str, y: str, axis: int) -> Iterator[NodeProto]:
        name = self._fresh(name, self._nodes)
        if self.opset < 13:
            yield helper.make_node("Unsqueeze", [x], [y], name=name, axes=[axis])
            return
        axes = self._fresh(f"{y}/axes", self._values)
        yield _constant(self._fresh(axes, self._nodes), axes, np.array([axis], np.int64))
        yield helper.make_node("Unsqueeze", [x, axes], [y], name=name)

    def _fresh(self, name: str, taken: Counter[str]) -> str:
        name = unique_name(name, taken)
        taken[name] += 1
        return name


@dataclass(eq=False)
class _Part:
    """A node of a body as it is written out, and what its results are called in the body."""

    node: NodeProto
    made_as: set[str]


class _Iterations:
    """A body written out, once or more often."""

    def __init__(self, unroller: Unroller, body: GraphProto, prefix: str) -> None:
        self.count = 0
        self.nodes: list[NodeProto] = []
        self._unroller, self._body, self._prefix = unroller, body, prefix
        self._names: dict[str, str] = {}
        self._size = max(1, sum(1 for _ in all_nodes(body)))
        self._varying = {v.name for v in body.input}
        for node in body.node:
            if self._varying.intersection(reads(node)):
                self._varying.update(node.output)

    def write(self, given: Mapping[str, str]) -> list[_Part]:
        """Write the body out once more.

        Args:
            given: Input of the body -> the value that it is.

        Returns:
            The nodes that are new.

        Raises:
            KeptError: It has been too often, or is no sound graph.
        """
        unroller = self._unroller
        unroller._room -= self._size
        if unroller._room < 0:
            raise KeptError(
                f"written out, it would be more than {MAX_WRITTEN} nodes; only shorter loops are"
                " supported"
            )
        self._names |= given
        made: set[str] = set()
        parts = []
        for i, node in enumerate(self._body.node):
            if self.count and not self._varying.intersection(node.output):
                continue  # the first iteration has it
            copy = NodeProto()
            copy.CopyFrom(node)
            rename_reads(copy, self._names)
            if twice := made.intersection(node.output) - {""}:
                raise KeptError(f"its subgraph computes {min(twice)} twice")
            made.update(node.output)
            for j, o in enumerate(node.output):
                if o:
                    self._names[o] = copy.output[j] = self.fresh(self._labelled(o))
            copy.name = self._labelled(node_name(node, i))
            self.add(copy)
            parts.append(_Part(copy, set(node.output)))
        self.count += 1
        return parts

    def _labelled(self, name: str) -> str:
        """A name of the body: with the number of the iteration in a loop."""
        is_loop = bool(self._body.input)
        return f"{self._prefix}/{self.count}/{name}" if is_loop else name

    def results(self) -> list[str]:
        """Values that are the results of the body written out last."""
        return [self._names.get(v.name, v.name) for v in self._body.output]

    def hand_on(self, values: Sequence[str], results: Sequence[str]) -> Iterator[NodeProto]:
        """The first results of the node are these values."""
        for value, result in zip(values, results, strict=False):
            if result:
                name = self._unroller._fresh(f"{self._prefix}/{result}", self._unroller._nodes)
                yield helper.make_node("Identity", [value], [result], name=name)

    def leading_to_condition(self) -> set[str]:
        """Values of the body that its condition depends on, also by way of other iterations."""
        found = {v.name for v in self._body.output[:1]}
        size = 0
        while size < len(found):
            size = len(found)
            for node in reversed(self._body.node):
                if found.intersection(node.output):
                    found.update(reads(node))
            for x, y in zip(self._body.input[1:], self._body.output, strict=False):
                if x.name in found:
                    found.add(y.name)
        return found

    def constant(self, what: str, data: Array) -> str:
        """A number of this iteration."""
        name = self.fresh(f"{self._prefix}/{self.count}/{what}")
        self.add(_constant(name, name, data))
        return name

    def add(self, node: NodeProto) -> None:
        """One more node, under a name that is free."""
        taken = self._unroller._nodes
        node.name = self._unroller._fresh(node.name or node.output[0], taken)
        self.nodes.append(node)

    def fresh(self, name: str) -> str:
        """A name for one more value."""
        return self._unroller._fresh(name, self._unroller._values)


# -- what is known ---------------------------------------------------------------------------------


def _flows(node: NodeProto) -> bool:
    return node.domain in STANDARD_DOMAINS and node.op_type in (*CONTROL_FLOW, *DEFINED)


def _definition_of(node: NodeProto, opset: int, types: Sequence[TypeProto]) -> FunctionProto:
    """An operator as a function of other operators, in the domain ``_DEFINITIONS``.

    Args:
        node: A node of it.
        opset: Version of the standard operator set.
        types: Of all operands; empty where one is absent.

    Raises:
        KeptError: The installed onnx has none that fits.
    """
    definition = FunctionProto()
    try:
        schema: Any = onnx.defs.get_schema(node.op_type, opset)  # its stubs lack some of it
        if schema.has_context_dependent_function:
            texts = [t.SerializeToString() for t in types]
            body = schema.get_context_dependent_function(node.SerializeToString(), texts)
            definition.ParseFromString(body)
        else:
            definition.CopyFrom(schema.function_body)
    except Exception as e:  # SchemaError, ValueError and RuntimeError, by what is wrong
        raise KeptError(f"onnx {onnx.__version__} does not define it by others: {e}") from None
    if not definition.node:
        raise KeptError(f"onnx {onnx.__version__} does not define it by others")
    versions = [o.version for o in definition.opset_import if o.domain in STANDARD_DOMAINS]
    if any(v > opset for v in versions):
        raise KeptError(f"it is defined by operators of opset {max(versions)}, not {opset}")
    definition.domain, definition.name = _DEFINITIONS, node.op_type
    return definition


def _subgraph(node: NodeProto, attribute: str) -> GraphProto:
    for a in node.attribute:
        if a.name == attribute:
            for inner in subgraphs(NodeProto(attribute=[a])):
                return inner
    raise KeptError(f"attribute {attribute} is missing")


def _flag(name: str, constants: Mapping[str, Array]) -> bool:
    """A condition that is known.

    Raises:
        KeptError: It is not, or is no condition.
    """
    data = _known(name, "condition", constants)
    if data.dtype != np.bool_:
        raise KeptError(f"its condition {name} is {data.dtype}, not boolean")
    return bool(data.reshape(()))


def _trips(name: str, constants: Mapping[str, Array]) -> int:
    data = _known(name, "trip count", constants)
    if data.dtype.kind not in "iu":
        raise KeptError(f"its trip count {name} is {data.dtype}, not an integer")
    return int(data.reshape(()))


def _known(name: str, what: str, constants: Mapping[str, Array]) -> Array:
    if not name:
        raise KeptError(f"its {what} is missing")
    data = constants.get(name)
    if data is None:
        raise KeptError(
            f"its {what} {name} depends on the data of a sample; only one that"
            " follows from constants and shapes is supported"
        )
    if data.size != 1:
        raise KeptError(f"its {what} {name} has {data.size} elements, not one")
    return data


def _length(name: str, axis: int, types: Mapping[str, TensorType]) -> int:
    """Entries of a value along an axis."""
    if name not in types:
        raise KeptError(f"the length of its input {name} is not known")
    shape = types[name].shape
    if not -len(shape) <= axis < len(shape):
        raise KeptError(f"axis {axis} does not exist in {types[name]}")
    return shape[axis]


def _check_body(body: GraphProto, inputs: int, outputs: int) -> None:
    counts = (len(body.input), len(body.output))
    if counts != (inputs, outputs):
        raise KeptError(
            f"its body has {counts[0]} inputs and {counts[1]} results, not {inputs} and {outputs}"
        )
    names = [v.name for v in body.input]
    if len(set(names)) < len(names):
        raise KeptError("an input of its body is declared twice")


def _constant(name: str, output: str, data: Array) -> NodeProto:
    value = numpy_helper.from_array(data)
    return helper.make_node("Constant", [], [output], name=name, value=value)
