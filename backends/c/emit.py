"""C99 back end: a plan becomes a library of readable C with the schedule as straight-line calls."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from importlib import resources
from pathlib import Path
from string import Template

from ...ir.errors import GraphError, OdtPlanError
from ...ir.training import TrainingGraph
from ...planner.plan import ALIGNMENT_BYTES, Buffer, Plan
from ...planner.store import UNIT_BYTES, stored_bytes
from .ctext import array, block, c_type, comment, identifier, symbol
from .ecosystems import ECOSYSTEMS, Library, packaged
from .emit_call import float_literal
from .example import example_values
from .golden import SEED, golden_table, golden_values, run_golden
from .head import head_values, heads_of
from .parts import Part, Parts
from .replay import replay_sizes, replay_values
from .sample import inputs_of
from .saved import plan_id
from .schedule import clips, decays, emit_schedule
from .session import host_values, session_values, takes_samples

_INCLUDE = re.compile(r'^#include "(odtplan_\w+)\.h"', re.MULTILINE)

#: Of every library, behind its name.
_FILES = (
    *(".h", ".c", "_weights.h", "_selftest.c"),
    *("_store.h", "_store.c", "_delta.h", "_delta.c"),
)
#: Files that are no part of the library as such.
_PROGRAMS = ("_selftest.c", "_host.c")
_OVERLAP_FIELDS = """\
    /* Pages are started and waited for later; the two above serve a replay cache, save and load. */
    odtplan_start_write_t page_start_write;
    odtplan_start_read_t page_start_read;
    odtplan_wait_t page_wait;
"""


def emit_c(
    plan: Plan,
    training: TrainingGraph,
    folder: Path,
    *,
    name: str | None = None,
    host: bool = False,
    ecosystems: Collection[str] = (),
    program_bytes: int = UNIT_BYTES,
) -> list[Path]:
    """Write the C library of a plan.

    Files appear whole or not at all; equal input gives equal bytes.

    Args:
        plan: A checked plan.
        training: The training graph that it executes.
        folder: Target folder; made if missing.
        name: Model name that prefixes all symbols; default: the plan's.
        host: Also write ``<model>_host.c``, a program that trains from a file on this machine.
        ecosystems: Of ``arduino``, ``platformio``, ``zephyr`` and ``espidf``: the library goes to
            ``src/``, with metadata around it that make the folder a package of these.
        program_bytes: What the device's flash is programmed by, a power of 2: the store's unit,
            unless the build gives another one.

    Returns:
        The files of the library: ``<model>.h``, ``<model>.c``, ``<model>_weights.h``,
        ``<model>_weights.c``, ``<model>_selftest.c``, ``<model>_train.h``, ``<model>_train.c``
        (not where samples and targets have no common first axis), ``CMakeLists.txt`` and the
        kernels used. ``examples/main.c`` and the metadata are written besides.

    Raises:
        GraphError: The plan holds something that C can't express (names it).
        OdtPlanError: The folder can't be written.
        ValueError: An ecosystem is not known, or a host program would be compiled into a package.
    """
    if unknown := set(ecosystems) - set(ECOSYSTEMS):
        raise ValueError(f"ecosystems: {min(unknown)!r} is not one of {', '.join(ECOSYSTEMS)}")
    if host and ecosystems:
        raise ValueError("host: a package holds no program; emit it into another folder")
    library = _Library(plan, training, identifier(name or plan.model.name), program_bytes)
    files = library.files(host=host)
    write_files(folder, packaged(library.told(files), ecosystems))
    return [(folder / "src" if ecosystems else folder) / n for n in files]


def write_files(folder: Path, files: dict[str, str]) -> list[Path]:
    """Write text files under temporary names, then rename them all.

    Raises:
        OdtPlanError: The folder can't be made or written; no temporary file stays.
    """
    temporary = {n: folder / f".{n.replace('/', '+')}.{os.getpid()}.tmp" for n in files}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for n, text in files.items():
            temporary[n].write_text(text, encoding="ascii", newline="\n")
        for n, path in temporary.items():
            (folder / n).parent.mkdir(parents=True, exist_ok=True)
            path.replace(folder / n)
    except OSError as e:
        reason = e.strerror or str(e)
        message = f"{folder}: can't write the C files: {reason}; choose another folder with -o"
        raise OdtPlanError(message) from None
    finally:
        for path in temporary.values():
            _discard(path)
    return [folder / n for n in files]


def _discard(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:  # the folder itself is out of reach; nothing was written there
        return


class _Library:
    """The texts of one model's library."""

    def __init__(
        self, plan: Plan, training: TrainingGraph, model: str, program_bytes: int
    ) -> None:
        self.plan, self.training, self.model, self.macro = plan, training, model, model.upper()
        self.program_bytes = program_bytes
        self.inputs = inputs_of(plan, training, model)
        self.heads = heads_of(training, model)
        constants = training.graph.constants
        # The capital keeps weights apart from whatever a model named ``<model>_...`` defines.
        self.weights = {n: symbol(f"{model}_W", i, n) for i, n in enumerate(constants)}
        self.state = _state_tensors(plan)
        self.parts = Parts(plan)
        self._stored = stored_bytes(plan, training)
        self.schedule = emit_schedule(plan, training, self.weights, self.parts, self.heads)

    def files(self, *, host: bool) -> dict[str, str]:
        """All files by name, the library sources of the kernels included."""
        values = self._values()
        values |= replay_values(self.plan, self.parts, self.schedule.front, values)
        files = {
            f"{self.model}{suffix}": Template(_template(f"model{suffix}")).substitute(values)
            for suffix in _FILES
        }
        files |= self._session(values, host=host)
        files[f"{self.model}_weights.c"] = self._weights()
        kernels = kernel_files(["odtplan_runtime", *self._kernel_sources()], files.values())
        sources = [n for n in files if n.endswith(".c") and not n.endswith(_PROGRAMS)]
        sources += [n for n in kernels if n.endswith(".c")]
        values["sources"] = "\n".join(f"  {s}" for s in sources)
        files["CMakeLists.txt"] = Template(_template("CMakeLists.txt")).substitute(values)
        return files | kernels

    def told(self, files: dict[str, str]) -> Library:
        """What a package tells of these files."""
        overlaps = bool(self.schedule.under_way)
        return Library(
            model=self.model,
            title=self._title(),
            summary=self._summary(),
            files=files,
            placements=list(self.parts.placements(self.macro).values()),
            example=example_values(self.plan, self.inputs, self.heads, overlaps=overlaps),
        )

    def _title(self) -> str:
        return comment(f"{self.plan.model.name} on {self.plan.device.id}")

    def _session(self, values: dict[str, str | int], *, host: bool) -> dict[str, str]:
        """The training session; none where samples can't be taken one by one."""
        if not takes_samples(self.plan, self.training):
            if host:
                raise GraphError(
                    f"{self.plan.model.name}: samples or targets have no common first axis, so"
                    " there is no session that takes them one by one; emit c without host"
                )
            return {}
        session = session_values(
            self.plan, self.training, self.inputs, self.heads, self.parts, self.state, values
        )
        session = host_values(self.plan, self.training, self.inputs, self.heads, session)
        return {
            f"{self.model}{suffix}": Template(_template(f"model{suffix}")).substitute(session)
            for suffix in ("_train.h", "_train.c", *["_host.c"] * host)
        }

    def _kernel_sources(self) -> list[str]:
        """Kernel files of the schedule and of the function that makes samples."""
        used = {*self.schedule.sources, *(s for i in self.inputs for s in i.sources())}
        return sorted(used)

    def _values(self) -> dict[str, str | int]:
        plan, schedule, training = self.plan, self.schedule, self.training
        micro = plan.training.micro_batches
        low, high = plan_id(plan)
        golden = run_golden(plan, training)
        return {
            "model": self.model,
            "MODEL": self.macro,
            "title": self._title(),
            "summary": self._summary(),
            "sizes": self._sizes(),
            **self._samples(),
            **self._memory(),
            **head_values(self.heads, self.parts.pointer(schedule.prediction)),
            "micro_note": "" if micro == 1 else f" of {micro} micro-steps",
            "includes": "".join(f'#include "{s}.h"\n' for s in self._kernel_sources()),
            "plan_low": f"0x{low:08x}u",
            "plan_high": f"0x{high:08x}u",
            "decays": int(decays(plan, training)),
            "clips": int(clips(plan, training)),
            "bias_decay": self._bias_decay(),
            "params": "\n".join(schedule.params),
            "body": "\n".join(f"    {line}" for line in schedule.body),
            "no_callback": " || ".join(f"net->{c} == NULL" for c in schedule.callbacks),
            "overlap_fields": _OVERLAP_FIELDS if schedule.under_way else "",
            "infer_pages": int(schedule.infer_pages),
            "evaluate_pages": int(schedule.evaluate_pages),
            "train_pages": int(schedule.train_pages),
            "initial": self._initial(),
            "stored": self._stored_state(),
            "declarations": self._declarations(),
            "program_bytes": self.program_bytes,
            "seed": SEED,
            "lr": float_literal(golden.lr),
            **self._delta(),
            **golden_values(golden, self.inputs, self.heads),
            "table": golden_table(golden, self.state),
        }

    def _samples(self) -> dict[str, str]:
        """What the templates say of the data inputs."""
        inputs, macro = self.inputs, self.macro
        usage = [f"x: {macro}_SAMPLE_SIZE of {inputs[0].element}"]
        if len(inputs) > 1:
            usage = [f"{i.param}: {i.macro('SAMPLE_SIZE')} of {i.element}" for i in inputs]
        at = [f"(({i.element} *)(void *)((net)->{self.parts.pointer(i.buffer)}))" for i in inputs]
        copies = [
            f"    if ({i.param} != {i.macro('SAMPLE')}(net)) {{\n"
            f"        memcpy({self.parts.pointer(i.buffer)}, {i.param}, {i.buffer.bytes});\n"
            "    }"
            for i in inputs
        ]
        held = [(i.buffer.offset, i.buffer.offset + i.buffer.bytes) for i in inputs]
        return {
            "sample_params": ", ".join(i.declaration for i in inputs),
            "sample_args": ", ".join(i.param for i in inputs),
            "sample_usage": f"\n *{'':47}".join(usage),
            "sample_missing": " || ".join(f"{i.param} == NULL" for i in inputs),
            "sample_macros": "\n".join(
                f"#define {i.macro('SAMPLE')}(net) {place}"
                for i, place in zip(inputs, at, strict=True)
            ),
            "sample_declaration": "".join(i.quantize_declaration() for i in inputs),
            "sample_definition": "".join(i.quantize_definition() for i in inputs),
            "sample_copies": "\n".join(copies),
            "not_sample": self._dead(held, 4),
            "index_check": "".join(i.check() for i in inputs),
        }

    def _stored_state(self) -> str:
        """The state in storage, for save and load; they go through the arena."""
        if not self._stored:
            return "    const odtplan_stored_t stored = {NULL, NULL, NULL, 0u, NULL, 0u};\n"
        arena, callbacks = self.parts.arena[0], "net->page_write, net->page_read, net->user"
        fields = f"{callbacks}, {self._stored}u, net->{arena.name}, {self.macro}_{arena.macro}"
        lines = block(
            "if (net->page_write == NULL || net->page_read == NULL) {",
            ["return ODTPLAN_ERROR_CALLBACK;"],
        )
        lines.append(f"const odtplan_stored_t stored = {{{fields}}};")
        return "".join(f"    {line}\n" for line in lines)

    def _memory(self) -> dict[str, str]:
        """What the templates say of arena and state."""
        parts = self.parts
        return {
            "fields": "".join(parts.fields(self.macro)),
            "owned": parts.owned(),
            "state_parts": parts.state_parts(self.macro),
            "statics": "".join(parts.statics(self.model, self.macro)),
            "defaults": "".join(parts.defaults(self.model)),
            "unusable": parts.unusable(),
            "locals": _locals(parts.all),
            "arena_locals": _locals(parts.arena),
            "voids": _lines(f"(void){p.name};" for p in parts.all),
            "arena_voids": _lines(f"(void){p.name};" for p in parts.arena),
            "all_dead": self._dead([], 4),
            "all_live": _lines(
                f"LIVE({piece});" for piece in parts.cut(0, self.plan.claims.ram_bytes.arena)
            ),
            "zero_state": _lines(
                f"memset(net->{p.name}, 0, {self.macro}_{p.macro});" for p in parts.state
            ),
        }

    def _dead(self, held: Iterable[tuple[int, int]], indent: int) -> str:
        """The arena is dead but for some ranges."""
        edges = [0, *(at for piece in sorted(held) for at in piece)]
        ranges = zip(edges[::2], [*edges[1::2], self.plan.claims.ram_bytes.arena], strict=True)
        return _lines(
            (f"DEAD({piece});" for a, b in ranges for piece in self.parts.cut(a, b)), indent
        )

    def _summary(self) -> str:
        c, kept = self.plan.claims, self.plan.replay_bytes("ram")
        state = c.ram_bytes.total - c.ram_bytes.arena - kept
        replay = f" + replay {kept:,}" if kept else ""
        return (
            f"RAM {c.ram_bytes.total:,} B = arena {c.ram_bytes.arena:,} + state {state:,}{replay};"
            f" flash {c.flash_bytes.total:,} B (code estimated)."
        )

    def _sizes(self) -> str:
        plan, training = self.plan, self.training
        batch = training.sample.type.shape[0]
        state = _space_end([b for b in plan.buffers if b.space == "state"])
        stored = plan.claims.storage_bytes + plan.replay_bytes("storage")
        more = stored > plan.claims.storage_bytes
        sizes: dict[str, tuple[str, str]] = {
            "ARENA_BYTES": (f"{plan.claims.ram_bytes.arena}u", "scratch RAM"),
            "STATE_BYTES": (f"{state}u", "RAM that training changes"),
            "WEIGHTS_BYTES": (f"{plan.claims.flash_bytes.weights}u", "constants in flash"),
            "STORAGE_BYTES": (f"{stored}u", "external storage for paging" + " and replay" * more),
            "SAVED_BYTES": (f"ODTPLAN_SAVED_BYTES({state + self._stored}u)", "what save writes"),
            "BATCH": (f"{batch}", "samples per call"),
            **{k: v for i in self.inputs for k, v in i.sizes().items()},
            **{k: v for h in self.heads for k, v in h.sizes().items()},
            "MICRO_BATCHES": (f"{plan.training.micro_batches}", "training calls per update"),
        }
        sizes |= replay_sizes(plan)
        if self.schedule.under_way:
            note = "transfers at most that are started and not waited for"
            sizes["TRANSFERS"] = (f"{self.schedule.under_way}", note)
        sizes |= self.parts.sizes()
        sizes |= {k: v for h in self.heads for k, v in h.classes().items()}
        lines = (f"{self.macro}_{k} {v} /* {note} */" for k, (v, note) in sizes.items())
        return "".join(f"#define {line}\n" for line in lines)

    def _bias_decay(self) -> str:
        t = self.plan.training
        adam = t.optimizer == "adam"
        b1, b2 = (t.beta1, t.beta2) if adam else (0.0, 0.0)
        return ", ".join(float_literal(x) for x in (b1, 1.0 - b1, b2, 1.0 - b2))

    def _initial(self) -> str:
        """Copies of the initial weights into the state."""
        constants = self.training.graph.constants
        return "\n".join(
            f"    memcpy(net->{self.parts.pointer(b)}, {self.weights[b.value]}, {b.bytes});"
            for b in self.state
            if b.value in constants
        )

    def _delta(self) -> dict[str, str | int]:
        """The updated tensors, as they are and as they were."""
        names, changes, numbers = [], [], 0
        held = {b.value: b for b in self.state}
        for u in self.training.updates:
            t, steps = u.value.type, "NULL"
            rows = t.shape[0] if t.shape else 1
            if t.dtype != "f32":
                scale = u.apply_node.inputs[-1]
                assert scale is not None, u.value.name
                steps = self.weights[scale.name]
            place = f"net->{self.parts.pointer(held[u.value.name])}"
            size = f"{rows}u, {t.size // rows}u, {t.nbytes // t.size}u"
            changes.append(f"{{{place}, {self.weights[u.value.name]}, {steps}, {size}}}")
            names.append(f" * {comment(u.candidate.param)}: {t.shape}")
            numbers += t.size
        return {
            "delta_changes": "".join(f"        {c},\n" for c in changes),
            "delta_tensors": "\n".join(names),
            "delta_numbers": numbers,
        }

    def _declarations(self) -> str:
        values = self.training.graph.values
        return "".join(
            f"extern const {c_type(values[n].type.dtype, n)} {s}[{data.size}];\n"
            for (n, s), data in zip(
                self.weights.items(), self.training.graph.constants.values(), strict=True
            )
        )

    def _weights(self) -> str:
        values = self.training.graph.values
        parts = [
            f"/* {comment(self.plan.model.name)}: constants in flash."
            " Generated by odt-plan; don't edit. */\n"
            f'#include "{self.model}_weights.h"\n'
        ]
        for name, data in self.training.graph.constants.items():
            note = f"{name}: {values[name].type}"
            parts.append(array(self.weights[name], data, values[name].type.dtype, note=note))
        return "\n".join(parts)


def _locals(parts: Iterable[Part]) -> str:
    return _lines(f"uint8_t *const {p.name} = net->{p.name};" for p in parts)


def _lines(statements: Iterable[str], indent: int = 4) -> str:
    return "\n".join(" " * indent + s for s in statements)


def _state_tensors(plan: Plan) -> list[Buffer]:
    """State buffers by offset; a later version of a tensor at the same place is left out."""
    state: dict[int, Buffer] = {}
    for b in plan.buffers:
        if b.space == "state":
            state.setdefault(b.offset, b)
    return [state[offset] for offset in sorted(state)]


def _space_end(buffers: list[Buffer]) -> int:
    ends = (b.offset + -(-b.bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for b in buffers)
    return max(ends, default=0)


def _template(name: str) -> str:
    return (resources.files(__package__) / "templates" / name).read_text(encoding="utf-8")


def kernel_files(stems: list[str], users: Iterable[str] = ()) -> dict[str, str]:
    """Library files that the given sources need, found through their includes.

    Args:
        stems: Sources of the library.
        users: Texts of other files that include some.
    """
    folder = resources.files(__package__) / "kernels"
    result: dict[str, str] = {}
    waiting = [*stems, *(stem for text in users for stem in _INCLUDE.findall(text))]
    while waiting:
        stem = waiting.pop()
        for name in (f"{stem}.h", f"{stem}.c"):
            path = folder / name
            if name not in result and path.is_file():
                result[name] = path.read_text(encoding="utf-8")
                waiting += _INCLUDE.findall(result[name])
    return dict(sorted(result.items()))
