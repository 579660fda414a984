"""The operator record and its registry: one ``OpDef`` holds everything known about an operator.

Importer, autodiff, cost model, both back ends, the support table and the tests read this registry
and nothing else. Adding an operator is one record in ``ir/ops/<family>.py`` and one C function in
``backends/c/kernels/odtplan_<family>.c``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Literal

from .errors import GraphError
from .graph import Array, Attr, Node, TensorType, Value

if TYPE_CHECKING:
    from .autodiff import GradBuilder
    from .axes import Split, Tie

#: Cost classes: inner loops of the C kernels, forward and backward; specs/cores/*.yaml gives
#: executed instructions for each. ``pointwise``, ``conv*``, ``depthwise*`` and ``gemm*`` count
#: MACs, ``elementwise``, ``transcendental`` and ``pool`` count element operations, ``copy`` counts
#: bytes, ``setup`` counts searches for the place where loops start and end.
CostClass = Literal[
    "pointwise",
    "conv",
    "conv_grad_weight",
    "depthwise",
    "depthwise_grad_weight",
    "gemm",
    "gemm_grad_weight",
    "elementwise",
    "transcendental",
    "pool",
    "copy",
    "setup",
]


@dataclass(frozen=True)
class Work:
    """Amount of work of a node.

    Attributes:
        cost_class: What the units are.
        amount: Units, those that are computed twice or for nothing included.
        loops: Starts of inner loops. Short loops (small images) make a unit dearer. 0 where one
            loop covers everything.
        dtype: Arithmetic that the units are done in.
        outputs: Results, or blocks of results, that are begun and stored; None: the elements of the
            node's result.
        passes: Runs through the bodies of inner loops, if a body does more or less than one unit.
        operator: The operator whose C kernel does it; empty: that of the node.
    """

    cost_class: CostClass
    amount: int
    loops: int = 0
    dtype: Literal["f32", "i8"] = "f32"
    outputs: int | None = None
    passes: int = 0
    operator: str = ""


Infer = Callable[[Node], Sequence[TensorType]]
#: ``kernel(node, inputs) -> outputs``. ``inputs`` are NumPy arrays in storage form (``bits`` packed
#: as u1), None for absent operands. Must accept f32 and, for gradient checks, f64 arrays, and keep
#: the dtype. In f32 the accumulation order is the C kernel's, so results are equal bit for bit.
Kernel = Callable[[Node, Sequence[Array | None]], Sequence[Array]]
#: ``rows_kernel(node, inputs, begin, end) -> rows begin..end of axis 0 of the (only) output``.
RowsKernel = Callable[[Node, Sequence[Array | None], int, int], Array]
#: ``run_kernel(node, inputs, first_row) -> outputs`` for a run of rows of an update: every operand
#: but ``hyper`` holds the rows ``first_row..`` of axis 0 only, and so do the results.
RunKernel = Callable[[Node, Sequence[Array | None], int], Sequence[Array]]
#: ``vjp(builder, node, dy, need) -> gradient per input or None``. ``need[i]`` tells whether the
#: gradient of input i is wanted; a rule builds nothing for inputs that are not. Only the gradient
#: of output 0 exists.
Vjp = Callable[["GradBuilder", Node, Value, Sequence[bool]], Sequence[Value | None]]


@dataclass(frozen=True)
class CKernel:
    """How the C back end calls the kernel.

    The C function is ``void symbol(const struct *p, inputs..., outputs...[, void *workspace])``;
    row-streamed gradients get ``int32_t row_begin, int32_t row_end`` appended at the end and write
    rows ``row_begin..row_end`` to the START of their output pointer. Updates with a ``run_kernel``
    get ``int32_t first_row`` appended. Absent operands are NULL. An operator with a ``workspace``
    rule always has the workspace argument (NULL where it needs none).

    Attributes:
        symbol: C function.
        struct: C struct type of its parameters, declared in ``<source>.h``.
        source: Stem of the .c and .h file in backends/c/kernels.
        params: Node -> struct fields in declaration order; tuples become arrays. Integers are
            int32_t, floats are float.
        operands: Input pointers of the function; None: as many as the node has or the operator's
            ``ParamSlot`` indices reach. Optional operands in no slot that a node may leave out at
            the end need it.
        variadic: The inputs are passed as one array of pointers, ``const float *const *inputs``.
        variants: Result dtype -> C function for results of other dtypes than f32.
    """

    symbol: str
    struct: str
    source: str
    params: Callable[[Node], dict[str, Attr]]
    operands: int | None = None
    variadic: bool = False
    variants: Mapping[str, str] = field(default_factory=dict)

    def function(self, node: Node) -> str:
        """The C function that runs a node."""
        return self.variants.get(node.out.type.dtype, self.symbol)


@dataclass(frozen=True)
class Sample:
    """One small concrete case of an operator that enrols it in every generic test.

    Attributes:
        types: Operand types, None for an absent optional operand.
        attrs: Attributes.
        differentiable: Indices of operands whose gradient the generic test checks; None: all f32.
        low: Lower bound of the random operand values.
        high: Upper bound.
        gap: Operand values keep at least this distance from each other and from the kinks in
            ``kinks`` (finite differences must not cross a kink).
        kinks: Points where the operator is not differentiable.
        ranges: Operand index -> smallest and largest random integer of an i8 or i32 operand;
            default: all of i8, or a position on the last axis of operand 0 (a label).
    """

    types: tuple[TensorType | None, ...]
    attrs: dict[str, Attr] = field(default_factory=dict)
    differentiable: tuple[int, ...] | None = None
    low: float = -1.0
    high: float = 1.0
    gap: float = 0.0
    kinks: tuple[float, ...] = ()
    ranges: dict[int, tuple[int, int]] = field(default_factory=dict)


Role = Literal["weight", "bias", "scale", "statistic"]


@dataclass(frozen=True)
class ParamSlot:
    """An operand position that may hold a trainable parameter.

    Attributes:
        index: Operand index.
        role: ``weight`` tensors are updated by a ratio of their input channels, ``bias`` and
            ``scale`` tensors whole or not at all. A ``statistic`` has no gradient: its update is a
            running average (attribute ``momentum`` of the node) of what is ``observed``.
        channel_axis: For weights: the axis of the weight that runs over input channels (None: only
            whole updates).
        cold_index: For weights: operand index that takes the frozen remainder of a partly updated
            weight (channels ``k..`` along ``channel_axis``); None: only whole updates.
        observed: For statistics: the operator that finds them in operand 0.
        compressible: For weights: the gradient takes operand 0 in half precision or i8 as well
            (``GradBuilder.kept_input``).
        single: A constant of one element is a parameter, too. Not so where files write numbers of
            the architecture (1/2, the square root of 2, an attention's scale) in the same place.
    """

    index: int
    role: Role
    channel_axis: Callable[[Node], int | None] = lambda _: None
    cold_index: int | None = None
    compressible: bool = False
    observed: str = ""
    single: bool = True


@dataclass(frozen=True)
class OpDef:
    """Everything known about an operator.

    Attributes:
        name: Registry key; the name in ONNX where the operator is one of ONNX.
        infer: Types of the results; raises GraphError with the reason when operands do not fit.
        kernel: The operator's meaning in NumPy.
        work: Cost of a node, in several parts where it works in several ways; ``works`` reads it.
        c: C kernel; None only for views.
        samples: Small concrete cases for the generic tests.
        vjp: Gradient rule; None: not differentiable.
        inplace: Operand indices that output 0 may share its buffer with where both have one shape
            and dtype (the kernel reads each element before it writes it). The NumPy and C kernels
            both allow it. ``inplace_operands`` reads it.
        can_be_inplace: Which nodes can work in place, where not all can.
        view: Output 0 is the same bytes as operand 0; no code runs.
        workspace: Bytes of scratch the C kernel needs.
        rows_kernel: Row-streamed form of a parameter gradient; makes the gradient streamable.
        tiled_work: Work of a streamed gradient by rows of axis 0 per tile, where that matters.
        run_kernel: For updates whose results depend on the place of an element in the tensor; the
            kernel is that of the run which begins at row 0.
        params: Operands that can be trainable parameters.
        stateful: Must run exactly once per step (batch statistics, random draws).
        axes: Axes that can run in another order, and which of them together, see ``ir.axes``; of
            nodes in imported graphs. None: all keep their order.
    """

    name: str
    infer: Infer
    kernel: Kernel
    work: Callable[[Node], Work | tuple[Work, ...]]
    c: CKernel | None
    samples: Callable[[], Iterator[Sample]]
    vjp: Vjp | None = None
    inplace: tuple[int, ...] = ()
    can_be_inplace: Callable[[Node], bool] = lambda _: True
    view: bool = False
    workspace: Callable[[Node], int] = lambda _: 0
    rows_kernel: RowsKernel | None = None
    tiled_work: Callable[[Node, int], tuple[Work, ...]] | None = None
    run_kernel: RunKernel | None = None
    params: tuple[ParamSlot, ...] = ()
    stateful: bool = False
    axes: Callable[[Node], Iterable[Tie | Split]] | None = None


OPS: dict[str, OpDef] = {}


def register(definition: OpDef) -> OpDef:
    """Enter an operator into the registry.

    Raises:
        ValueError: The name is taken.
    """
    if definition.name in OPS:
        raise ValueError(f"operator {definition.name} is registered twice")
    OPS[definition.name] = definition
    return definition


def get_op(name: str) -> OpDef:
    """Look an operator up; the families register themselves on first use.

    Raises:
        GraphError: Unknown operator.
    """
    _load_families()
    try:
        return OPS[name]
    except KeyError:
        raise GraphError(f"operator {name} is not known") from None


def all_ops() -> dict[str, OpDef]:
    """The whole registry, families loaded."""
    _load_families()
    return OPS


@cache
def _load_families() -> None:
    from . import ops  # noqa: F401  (importing the package registers every family)


def inplace_operands(node: Node) -> tuple[int, ...]:
    """Operands that result 0 of a node may overwrite, shape and dtype permitting."""
    op = get_op(node.op)
    return op.inplace if op.inplace and op.can_be_inplace(node) else ()


def parameter_slots(node: Node) -> list[ParamSlot]:
    """The slots of a node whose operand is there, and of a size to be a parameter."""
    held = ((s, node.inputs[s.index]) for s in get_op(node.op).params if s.index < len(node.inputs))
    return [s for s, v in held if v is not None and (s.single or v.type.size > 1)]


def works(node: Node, tile_rows: int | None = None) -> tuple[Work, ...]:
    """The parts of a node's work, operator and outputs filled in.

    Args:
        node: Node.
        tile_rows: Rows of axis 0 per tile, for a streamed gradient.
    """
    op = get_op(node.op)
    tiled = tile_rows is not None and op.tiled_work is not None
    work = op.tiled_work(node, tile_rows) if tiled else op.work(node)  # type: ignore[misc,arg-type]
    return tuple(
        replace(
            w,
            operator=w.operator or node.op,
            outputs=node.out.type.size if w.outputs is None else w.outputs,
        )
        for w in (work if isinstance(work, tuple) else (work,))
    )


def operand(node: Node, index: int) -> TensorType:
    """Type of a required operand.

    Raises:
        GraphError: The operand is missing.
    """
    if index >= len(node.inputs):
        raise GraphError(f"operand {index} is missing")
    value = node.inputs[index]
    if value is None:
        raise GraphError(f"operand {index} is missing")
    return value.type


def f32_operand(node: Node, index: int) -> TensorType:
    """Type of a required fp32 operand.

    Raises:
        GraphError: The operand is missing or has another dtype.
    """
    t = operand(node, index)
    if t.dtype != "f32":
        raise GraphError(f"operand {index} is {t}; only f32 is supported here")
    return t


def array(inputs: Sequence[Array | None], index: int) -> Array:
    """The data of a required operand of a kernel."""
    data = inputs[index]
    assert data is not None, index
    return data
