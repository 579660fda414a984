"""The plan: a straight-line program over a fixed arena, as versioned JSON.

One micro-step executes ``steps`` in order. Steps marked ``last_micro`` run only in the last
micro-step of an update (gradient accumulation). Every back end executes exactly these steps; the
checker replays them. All byte counts are integers.

Spaces of a buffer:
    ``arena``    transient RAM, dead between steps; ``offset`` counts from the arena's start.
    ``state``    RAM that survives: updated weights, optimizer tensors, accumulators.
                 Where the plan has several RAM ``regions``, arena and state each consist of a part
                 per region, one after the other; no buffer crosses from one part into the next.
    ``flash``    constants; offset is 0, the back end places them.
    ``storage``  storage (SD card, PSRAM) that tensors are paged to. Optimizer tensors that live
                 there survive, too; their buffers are there from the first step to the last.
    ``io``       run-time inputs that the caller owns (labels or targets, ``hyper``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Annotated, ClassVar, Final, Literal, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from ..ir.errors import UsageError
from ..ir.import_options import ImportOptions, Lite, Lora
from ..ir.precision import Precision
from ..ir.training import LossName, OptimizerName, RoundingName, Saved, StateForm

SCHEMA_VERSION: Final = 1
#: Samples per micro-batch; more fit no microcontroller.
LARGEST_BATCH = 1024
#: No plan of a model that fits a microcontroller comes near to it.
LARGEST_FILE_BYTES = 1 << 28
#: Every buffer starts at a multiple of this and occupies a multiple of it.
ALIGNMENT_BYTES = 4
#: Estimated flash of one kernel and of one call in the generated schedule (gcc -O2, Cortex-M).
CODE_BYTES_PER_KERNEL = 1536
CODE_BYTES_PER_STEP = 48

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
#: Of a parameter that is updated, and a score of it.
_Part = Annotated[float, Field(gt=0.0, le=1.0)]
_Score = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Space = Literal["arena", "state", "flash", "storage", "io"]
#: keep: computed once, stays until its last reader; recompute: computed again; page: via storage.
Action = Literal["keep", "recompute", "page"]
ObjectiveName = Literal["learn", "latency", "energy", "ram", "flash"]
StageName = Literal["learn", "latency", "energy", "ram", "flash", "weighted"]
#: Why a run ended before everything was proven.
Stopped = Literal["interrupted", "time limit"]
StepKind = Literal["compute", "convert", "page_out", "page_in", "page_wait", "update"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Lean(_Record):
    """Fields that say nothing are left out of the file, as in files that don't know them."""

    left_out: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _without_what_is_absent(self, plain: SerializerFunctionWrapHandler) -> dict[str, object]:
        record: dict[str, object] = plain(self)
        for name in self.left_out:
            if getattr(self, name) == type(self).model_fields[name].default:
                record.pop(name, None)
        return record


class ModelInfo(_Lean):
    """The model file; ``file`` is relative to the plan's folder.

    ``head`` is the number of classes that its last layer was replaced for, if it was; ``dims`` are
    the values of open dimensions beside the batch; ``outputs`` those that were kept, if not all;
    ``lora`` is what adapters beside its layers were made by, ``lite_residual`` modules beside its
    blocks. ``channels`` are those that the plan has in another order than the file, because parts
    of weights are updated by them: ``VALUE:AXIS`` of the first result that runs over them -> the
    file's index of each.
    """

    name: str
    file: str
    sha256: Sha256
    batch: PositiveInt = Field(le=LARGEST_BATCH)
    fold_batchnorm: bool
    head: PositiveInt | None = None
    dims: dict[str, PositiveInt] = {}
    outputs: tuple[str, ...] = ()
    lora: Lora | None = None
    lite_residual: Lite | None = None
    channels: dict[str, tuple[NonNegativeInt, ...]] = {}
    left_out: ClassVar[tuple[str, ...]] = (
        *("head", "dims", "outputs", "lora", "lite_residual", "channels"),
    )

    @property
    def importing(self) -> ImportOptions:
        """How the file was imported."""
        dims = tuple(self.dims.items())
        more = self.lora, self.lite_residual
        return ImportOptions(
            self.batch, self.fold_batchnorm, self.head, dims, self.outputs, *more
        )


class Training(_Lean):
    """What a training step is; see ``ir.training.TrainingSpec``."""

    loss: LossName
    optimizer: OptimizerName
    micro_batches: PositiveInt
    momentum: float
    beta1: float
    beta2: float
    epsilon: float
    qas: bool = True
    rounding: RoundingName = "stochastic"
    delta: PositiveFloat = 1.0
    margin: PositiveFloat = 1.0
    tile_bytes: PositiveInt = 512
    bptt: PositiveInt | None = None
    losses: dict[str, LossName] = {}
    loss_weights: dict[str, PositiveFloat] = {}
    left_out: ClassVar[tuple[str, ...]] = (
        *("delta", "margin", "tile_bytes", "bptt", "losses", "loss_weights"),
    )


class Budget(_Record):
    """The limits that the plan keeps: what is left after the application's reserve."""

    ram_bytes: NonNegativeInt
    flash_bytes: NonNegativeInt
    latency_s: NonNegativeFloat | None = None
    energy_j: NonNegativeFloat | None = None
    storage_bytes: NonNegativeInt = 0
    min_steps: PositiveInt | None = None  #: training steps that the storage has to last


class DeviceInfo(_Record):
    """The device and the storage that the plan was made for."""

    id: str
    storage: str | None
    budget: Budget


class Term(_Record):
    """One figure of a weighted objective; see ``planner.objective.Weighted``.

    Attributes:
        name: The figure.
        weight: Its weight.
        reference: The figure with plain training, which it is divided by.
    """

    name: ObjectiveName
    weight: PositiveFloat
    reference: PositiveFloat


class Objective(_Record):
    """One stage of the lexicographic objective.

    Attributes:
        name: What is optimized; learn is maximized, all others minimized.
        value: What the plan reaches: summed importance, cycles of a training step, joules, live
            bytes at the peak plus state, bytes of flash, or the weighted sum of ``terms``.
        bound: Proven for all plans within the budget that run operators in this plan's order.
        gap: Relative, |bound - value| / |value|.
        terms: Of a weighted objective.
    """

    name: StageName
    value: float
    bound: float
    gap: NonNegativeFloat
    terms: tuple[Term, ...] = ()


class RamClaim(_Record):
    """RAM in bytes.

    ``total = arena + weights + optimizer + accumulators``, and a replay cache that lies in RAM.
    """

    total: NonNegativeInt
    arena: NonNegativeInt
    weights: NonNegativeInt
    optimizer: NonNegativeInt
    accumulators: NonNegativeInt
    live_peak: NonNegativeInt  #: largest sum of live aligned arena bytes over all steps
    peak_step: NonNegativeInt  #: first step where the live bytes are largest


class RegionClaim(_Record):
    """What a plan takes of one RAM region; its budget is what it may take."""

    name: str = Field(min_length=1)
    budget: NonNegativeInt
    arena: NonNegativeInt
    state: NonNegativeInt


class Part(NamedTuple):
    """The bytes of a space that lie in one RAM region.

    Attributes:
        region: Its name; empty where the plan names none.
        begin: First byte in the space.
        end: Byte after the last.
    """

    region: str
    begin: int
    end: int


def part_of(parts: Sequence[Part], begin: int, end: int) -> int:
    """Index of the part that holds the bytes ``begin`` to ``end`` of the space.

    Raises:
        ValueError: No single part does.
    """
    for i, part in enumerate(parts):
        if part.begin <= begin and end <= part.end:
            return i
    raise ValueError(f"bytes {begin} to {end} lie in no one RAM region")


class FlashClaim(_Record):
    """Flash in bytes. ``total = weights + code``; code is estimated from the kernels used."""

    total: NonNegativeInt
    weights: NonNegativeInt
    code: NonNegativeInt


class Claims(_Record):
    """What the plan promises, predicted, code estimated; the checker recomputes all figures.

    ``life_steps`` is None where nothing wears.
    """

    ram_bytes: RamClaim
    flash_bytes: FlashClaim
    storage_bytes: NonNegativeInt
    cycles: NonNegativeInt
    latency_s: NonNegativeFloat
    energy_j: NonNegativeFloat
    worn_bytes: NonNegativeInt = 0  #: of storage, written in whole erase units per training step
    life_steps: NonNegativeInt | None = None  #: training steps that wear the storage out


class Replay(_Record):
    """A cache of what the frozen front of the network makes of the samples.

    The first ``front`` steps, the *front*, depend on nothing that training changes. They run once
    per micro-batch; its boundary, one arena buffer, is all that the other steps need of them. A
    cached step copies it back and runs only those. The cache has an entry of ``entry_bytes``,
    padded to the alignment, for each micro-batch.

    Attributes:
        samples: Samples that are kept.
        epochs: How often a training step uses each of them.
        place: ``ram``, or the id of a storage: behind the bytes that the plan pages.
        region: RAM region of the cache, where the plan names any.
        front: Number of leading steps that run once per micro-batch.
        value: Tensor that is kept.
        buffer: Its buffer when the front has run.
        entry_bytes: Bytes of one micro-batch.
        cache_bytes: Bytes of all entries.
        capture_cycles: Front and copies to the cache, for the samples of one training step.
        cached_cycles: A training step from the cache.
        average_cycles: A training step, with its share of the capture: ``cached_cycles +
            capture_cycles / epochs``, rounded up.
        bound: Proven for any cache, place and schedule with these updates, precisions and streamed
            blocks, in cycles.
        latency_s: Average of a training step.
        energy_j: Average of a training step.
    """

    samples: PositiveInt
    epochs: int = Field(ge=2)
    place: str = Field(min_length=1)
    region: str = ""
    front: PositiveInt
    value: str
    buffer: str
    entry_bytes: PositiveInt
    cache_bytes: PositiveInt
    capture_cycles: NonNegativeInt
    cached_cycles: NonNegativeInt
    average_cycles: NonNegativeInt
    bound: NonNegativeFloat
    latency_s: NonNegativeFloat
    energy_j: NonNegativeFloat

    @property
    def stride(self) -> int:
        """Bytes from one entry to the next."""
        return -(-self.entry_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES

    @property
    def entries(self) -> int:
        """Micro-batches that the cache holds."""
        return self.cache_bytes // self.stride


class UpdateDecision(_Record):
    """Update of one parameter.

    Attributes:
        param: Initializer name in the model file.
        node: Forward node that uses it.
        role: weight, bias or scale.
        ratio: Updated part of the tensor, 0 to 1; 0 = frozen.
        channels: Updated leading input channels; None: all.
        saved: How the input of a float layer is kept for the gradient of its weight.
        state: Where its optimizer tensors are; ``sgd``: it has none.
        importance: Score of this choice.
    """

    param: str
    node: str
    role: Literal["weight", "bias", "scale", "statistic"]
    ratio: float
    channels: PositiveInt | None
    saved: Saved = "f32"
    state: StateForm = "keep"
    importance: NonNegativeFloat


class ActivationDecision(_Record):
    """What happens to a forward tensor that backward reads."""

    value: str
    bytes: PositiveInt
    action: Action


class TriedSet(_Record):
    """An update set that was tried, trained by its plan.

    Attributes:
        names: The scores and usual sets that lead to it.
        updated: Number of updated tensors.
        ram_bytes: Of its plan.
        lr: Step size that did best.
        loss: Mean over all samples, each judged while it was held out; None: not finite.
        more: Mean of ``loss`` less that of the first set, over pairs; None: not finite.
        error: Standard error of ``more``, by groups of samples; 0 for the first set.
    """

    names: tuple[str, ...] = Field(min_length=1)
    updated: PositiveInt
    ram_bytes: NonNegativeInt
    lr: PositiveFloat
    loss: float | None
    more: float | None
    error: NonNegativeFloat | None


class Trial(_Record):
    """Measured: what update sets learned in short trainings, on samples that were held out.

    Attributes:
        file: Of the samples.
        sha256: Of that file.
        samples: Number of samples.
        folds: Parts of the samples; each is held out once, while the others are trained on.
        epochs: Passes over the samples in each training.
        seed: Of the folds and of the order of the samples, the same for all sets.
        before: Mean loss without any training.
        chosen: The set of this plan, one of the names of ``tried``: the first one, or of those
            whose loss is less by more than three times its ``error`` that with the least.
        tried: All sets, that of the measured default first.
    """

    file: str
    sha256: Sha256
    samples: PositiveInt
    folds: int = Field(ge=2)
    epochs: PositiveInt
    seed: NonNegativeInt
    before: float | None
    chosen: str
    tried: tuple[TriedSet, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _knows_chosen(self) -> Trial:
        if not any(self.chosen in t.names for t in self.tried):
            raise ValueError(f"{self.chosen} is none of the sets that were tried")
        return self


class Decisions(_Lean):
    """The decisions.

    Attributes:
        importance_source: Tells measured scores from the documented prior.
        updates: Every trainable parameter.
        activations: Forward tensors that backward reads.
        precision: Forward node or run-time input -> precision.
        streamed: Blocks of layers that run by rows.
        noise_avoided: Score of the quantization noise that mixed layers avoid.
        trial: What chose the update set by measurement; None: nothing did.
    """

    importance_source: str
    updates: tuple[UpdateDecision, ...]
    activations: tuple[ActivationDecision, ...]
    precision: dict[str, Precision]
    streamed: tuple[str, ...] = ()
    noise_avoided: NonNegativeFloat = 0.0
    trial: Trial | None = None
    left_out: ClassVar[tuple[str, ...]] = ("trial",)


class Buffer(_Record):
    """One stay of one tensor in one space.

    A tensor that is computed again or paged back gets another buffer. An in-place result or a view
    is a buffer of its own at the same offset. ``first``/``last`` are the steps (inclusive) between
    which the bytes must not be disturbed; constants, state and io buffers live from the first step
    to the last.
    """

    id: str
    value: str  #: in the training graph; ``tile:<node>`` or ``workspace:<node>`` for scratch
    space: Space
    dtype: str
    shape: tuple[PositiveInt, ...]
    bytes: NonNegativeInt
    offset: NonNegativeInt
    first: NonNegativeInt
    last: NonNegativeInt


class Step(_Record):
    """One step.

    compute   ``nodes = [n]``; ``reads`` are n's operands (None = absent), ``writes`` its results.
    update    ``nodes = [apply]`` or, with a streamed gradient, ``[grad, apply]``; or
              ``[grad, accumulate]``. ``reads`` are grad's operands followed by apply's operands
              without the gradient itself; ``tile`` is the scratch buffer that holds ``tile_rows``
              rows of the gradient. ``writes`` are the updated state buffers (in place). After an
              apply that reads an accumulator, the accumulator is zero.
    page_out  ``reads = [arena buffer]``, ``writes = [storage buffer]``; page_in the reverse. An
              ``overlapped`` one only starts the transfer: both buffers belong to it until its
    page_wait ``reads = [source, target]``, which returns when it has ended. Transfers run one at a
              time, in the order of their starts. Transfers of optimizer tensors are marked
              ``last_micro`` as their update is.

    ``cycles`` are those of the core: none for an overlapped start; what is left of the transfer for
    a wait, in the last micro-step.
    """

    kind: StepKind
    nodes: tuple[str, ...] = ()
    reads: tuple[str | None, ...] = ()
    writes: tuple[str, ...] = ()
    workspace: str | None = None
    tile: str | None = None
    tile_rows: NonNegativeInt = 0
    last_micro: bool = False
    recompute: bool = False  #: the node has run before in this micro-step
    overlapped: bool = False
    cycles: NonNegativeInt = 0


class QuantizationRecord(_Record):
    """How a value of the imported graph may be stored as i8; see ``ir.quantization``."""

    scale: tuple[float, ...] = Field(min_length=1)
    zero_point: int = Field(ge=-128, le=127)
    axis: NonNegativeInt | None = None


class ImportanceTable(_Lean):
    """Scores of updates, and where they come from.

    A plan holds them, so that it can be verified and explained without the samples.

    Attributes:
        method: How they were measured; ``table``: given by the user.
        file: Of the samples, or of the table.
        sha256: Of that file.
        samples: Number of samples that were measured.
        gains: Parameter -> (updated part of it, score), the part rising to at most 1. Scores of
            different parameters are comparable; their unit is that of the method.
        channels: Axes whose channels stand in another order than in the file, by falling score; see
            ``ModelInfo``. Parts are of the leading ones in this order.
    """

    method: str
    file: str
    sha256: Sha256
    samples: NonNegativeInt = 0
    gains: dict[str, tuple[tuple[_Part, _Score], ...]]
    channels: dict[str, tuple[NonNegativeInt, ...]] = {}
    left_out: ClassVar[tuple[str, ...]] = ("channels",)

    @field_validator("gains")
    @classmethod
    def _rising(cls, gains: dict[str, tuple[tuple[float, float], ...]]) -> object:
        for param, points in gains.items():
            parts = [part for part, _ in points]
            if parts != sorted(set(parts)):
                raise ValueError(f"parts of {param} must rise, not {parts}")
        return gains

    @property
    def source(self) -> str:
        """One line: method and origin."""
        origin = f"{self.file} (SHA-256 {self.sha256[:12]}…)"
        if self.method == "table":
            return f"given by {origin}"
        return f"{self.method}, measured on {self.samples:,} samples of {origin}"


class Asked(_Lean):
    """What was given and what was left to choose, so that a choice can be explained.

    Attributes:
        train: Items of ``--train``; ``auto`` left the update set to the solver.
        precision: Pins of ``--precision``.
        state: Items of ``--state``.
        freeze_before: Nodes of ``--freeze-before``: nothing that they depend on is updated.
        noise: Layer -> squared error of its i8 weights relative to its result's square, where
            calibration measured it.
        importance: Scores of updates; None: the prior.
    """

    train: tuple[str, ...]
    precision: tuple[str, ...] = ()
    state: tuple[str, ...] = ("keep",)
    freeze_before: tuple[str, ...] = ()
    noise: dict[str, NonNegativeFloat] = {}
    importance: ImportanceTable | None = None
    left_out: ClassVar[tuple[str, ...]] = ("freeze_before", "importance")


class SolverInfo(_Record):
    """Provenance of the decisions.

    Attributes:
        name: Solver, or ``auto``.
        version: Of ortools.
        seed: Random seed.
        time_s: Solve time.
        stopped: Why the run ended before everything was proven.
    """

    name: str
    version: str
    seed: int
    time_s: NonNegativeFloat
    stopped: Stopped | None = None


class Plan(_Lean):
    """A checked training plan.

    ``regions`` are the RAM regions that the plan may use; it is left out of the file where it is
    empty, which stands for the device's largest one. So is ``replay`` where nothing is replayed;
    all other figures are those of a training step without it. ``quantization`` holds the scales
    that calibration found, by value of the imported graph; it is empty where the model file brings
    its own, or has none. ``asked`` is null in plans that were not made by the planner.
    ``reordered`` says that operators run in another order than that of the training graph; it is
    left out of the file where they don't.
    """

    schema_version: Literal[1]
    odt_plan_version: str
    model: ModelInfo
    training: Training
    device: DeviceInfo
    status: Literal["optimal", "feasible"]
    objective: tuple[Objective, ...] = Field(min_length=1)
    claims: Claims
    regions: tuple[RegionClaim, ...] = ()
    replay: Replay | None = None
    reordered: bool = False
    left_out: ClassVar[tuple[str, ...]] = ("regions", "replay", "reordered")
    decisions: Decisions
    quantization: dict[str, QuantizationRecord] = {}
    asked: Asked | None = None
    buffers: tuple[Buffer, ...]
    steps: tuple[Step, ...]
    solver: SolverInfo

    def parts(self, space: Literal["arena", "state"]) -> tuple[Part, ...]:
        """The parts of a space, one per region, in the order of their bytes."""
        ram = self.claims.ram_bytes
        if not self.regions:
            state = ram.weights + ram.optimizer + ram.accumulators
            return (Part("", 0, ram.arena if space == "arena" else state),)
        sizes = [r.arena if space == "arena" else r.state for r in self.regions]
        ends = list(accumulate(sizes))
        return tuple(
            Part(r.name, end - size, end)
            for r, size, end in zip(self.regions, sizes, ends, strict=True)
        )

    def replay_bytes(self, kind: Literal["ram", "storage"]) -> int:
        """Bytes of the replay cache in RAM or in a storage."""
        r = self.replay
        return r.cache_bytes if r is not None and (r.place == "ram") == (kind == "ram") else 0

    def without_replay(self) -> Plan:
        """The plan as it would be if nothing were kept."""
        ram = self.claims.ram_bytes
        total = ram.total - self.replay_bytes("ram")
        claims = self.claims.model_copy(
            update={"ram_bytes": ram.model_copy(update={"total": total})}
        )
        return self.model_copy(update={"replay": None, "claims": claims})

    def content_digest(self) -> bytes:
        """SHA-256 of what a saved state belongs to: model, training, layout and steps."""
        content = self.model_dump(mode="json", include={"model", "training", "buffers", "steps"})
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).digest()


def load_plan(path: Path) -> Plan:
    """Read and validate a plan file.

    Raises:
        UsageError: Unreadable, not JSON, another schema version, or a field that is wrong (named).
    """
    try:
        if path.exists() and not path.is_file():  # a device may never end
            raise UsageError(f"{path}: is a folder or a device; give a plan.json")
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise UsageError(f"{path}: {path.stat().st_size:,} bytes is no plan")
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        raise UsageError(f"{path}: can't read the plan: {e.strerror or e}") from None
    except UnicodeDecodeError as e:
        raise UsageError(f"{path}: no plan: not UTF-8 text at byte {e.start}") from None
    try:
        return Plan.model_validate_json(text)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"])) or "file"
        if where == "schema_version":
            missing = first["type"] == "missing"
            found = "is missing" if missing else f"{first['input']!r:.40} is not {SCHEMA_VERSION}"
            raise UsageError(
                f"{path}: schema_version {found};"
                " plan the model again with this version of odt-plan"
            ) from None
        raise UsageError(f"{path}: {where}: {first['msg']}; plan the model again") from None
