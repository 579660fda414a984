"""YAML specs with errors that name the file, the line and the field."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ..ir.errors import UsageError

Spec = TypeVar("Spec", bound=BaseModel)
#: A spec is a page of text; anything larger is another kind of file.
LARGEST_SPEC_BYTES = 1 << 20
#: The parser in C, where PyYAML has it, reads a core in a fifth of the time.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def bundled_ids(kind: str) -> list[str]:
    """Ids of the bundled specs of a kind (``devices`` or ``cores``), sorted."""
    names = [p.name for p in _bundle(kind).iterdir()]
    return sorted(n.removesuffix(".yaml") for n in names if n.endswith(".yaml"))


def bundled(kind: str, spec_id: str) -> Traversable:
    """The bundled file of an id."""
    return _bundle(kind) / f"{spec_id}.yaml"


def load_spec(file: Path | Traversable, schema: type[Spec]) -> Spec:
    """Read one YAML file into its schema.

    Raises:
        UsageError: Unreadable, not YAML, an alias, a key given twice, or a field that is missing,
            unknown or wrong; names file, line and field.
    """
    data, tree = load_mapping(file, schema.__name__.lower())
    try:
        return schema.model_validate(data)
    except ValidationError as e:
        raise _located(file, tree, schema, e.errors()[0]) from None


def load_mapping(file: Path | Traversable, what: str) -> tuple[object, yaml.MappingNode]:
    """What a YAML file holds, and its nodes, which know their lines.

    Args:
        file: The file.
        what: What it describes, for messages.

    Raises:
        UsageError: Unreadable, not YAML, no mapping, an alias, or a key given twice.
    """
    text = _read(file)
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            if isinstance(event, yaml.AliasEvent):  # may be endless, or grow without bounds
                line = f":{event.start_mark.line + 1}" if event.start_mark else ""
                raise UsageError(f"{file}{line}: alias *{event.anchor}; write the value itself")
        tree = yaml.compose(text, Loader=_LOADER)
        data = yaml.load(text, Loader=_LOADER)
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise UsageError(f"{file}{line}: broken YAML: {e.problem or e.context}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise UsageError(f"{file}: broken YAML: {reason}") from None
    if not isinstance(tree, yaml.MappingNode):
        raise UsageError(f"{file}:1: a {what} is a mapping of fields")
    _reject_duplicates(file, tree)
    return data, tree


def _located(
    file: Path | Traversable, tree: yaml.Node, schema: type[BaseModel], error: ErrorDetails
) -> UsageError:
    """The first finding of pydantic with its line; ``field: message`` of our own rules is split."""
    kind = schema.__name__.lower()
    loc = [p for p in error["loc"] if p != "[key]"]
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        message = "is missing"
    elif error["type"] == "extra_forbidden":
        message = f"is no field of a {kind}"
    elif error["type"] == "value_error" and ": " in message:
        inner, message = message.split(": ", 1)
        loc += inner.split(".")
    field = ".".join(map(str, loc)) or kind
    return UsageError(f"{file}:{_line(tree, loc)}: {field}: {message}")


def _bundle(kind: str) -> Traversable:
    return resources.files("odt_plan.specs") / kind


def _read(file: Path | Traversable) -> str:
    try:
        if isinstance(file, Path) and file.exists() and not file.is_file():  # may never end
            raise UsageError(f"{file}: can't read the file: it is a folder or a device")
        raw = file.read_bytes()
        if len(raw) > LARGEST_SPEC_BYTES:
            raise UsageError(f"{file}: {len(raw):,} bytes is no spec; it is YAML of about a page")
        return raw.decode("utf-8")
    except OSError as e:
        raise UsageError(f"{file}: can't read the file: {e.strerror or e}") from None
    except UnicodeDecodeError as e:
        raise UsageError(f"{file}: not UTF-8 text at byte {e.start}") from None


def _reject_duplicates(file: Path | Traversable, node: yaml.Node) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in seen:
                raise UsageError(
                    f"{file}:{line}: {key.value}: given twice (first in line {seen[key.value]})"
                )
            seen[key.value] = line
            _reject_duplicates(file, value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _reject_duplicates(file, value)


def _line(tree: yaml.Node, loc: Sequence[int | str]) -> int:
    """Line (from 1) of the field, or of what stands nearest above it."""
    node, line = tree, tree.start_mark.line
    for part in loc:
        found: yaml.Node | None = None
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == str(part):
                    found, line = value, key.start_mark.line
        elif isinstance(node, yaml.SequenceNode) and part in range(len(node.value)):
            found = node.value[int(part)]
            line = found.start_mark.line
        if found is None:
            break
        node = found
    return int(line) + 1
