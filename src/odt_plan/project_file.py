"""The project file: options of ``odt-plan plan`` by their names, in YAML."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin

import typer

from .ir.errors import UsageError

if TYPE_CHECKING:
    import yaml

#: Read where ``plan`` gets no model.
PROJECT_FILE = "odt-plan.yaml"
#: Where the context of a command keeps the places of what the project file says.
_PLACES = "odt_plan.project"


@dataclass(frozen=True)
class Key:
    """A key of the file: an option, or the model.

    Attributes:
        parameter: The command's parameter.
        flag: It is yes or no.
        several: It may be a list.
        file: A value may be a file: any that is not one of ``words``, or only one that looks like
            a path.
        words: Values that are no files.
        always_file: Every other value is one.
    """

    parameter: str
    flag: bool
    several: bool
    file: bool
    words: tuple[str, ...]
    always_file: bool

    def placed(self, text: str, folder: Path) -> str:
        """A value, as a path from here if it is a file."""
        looks = any(sign in text for sign in "./\\")
        if not self.file or text in self.words or not (self.always_file or looks):
            return text
        return str(folder / text)


def project_keys(command: Any) -> dict[str, Key]:
    """The keys that a project file may have, from the parameters of the command alone.

    Args:
        command: As Typer made it.
    """
    signature = inspect.signature(command.callback).parameters
    keys: dict[str, Key] = {}
    for parameter in command.params:
        if parameter.name not in signature or parameter.name == "project":
            continue
        kind = get_args(signature[parameter.name].annotation)[0]
        kinds = {kind, *get_args(kind)}
        metavar = parameter.metavar or ""
        keys[max(parameter.opts, key=len).lstrip("-")] = Key(
            parameter=parameter.name,
            flag=bool in kinds,
            several=any(get_origin(k) is list for k in kinds),
            file=Path in kinds or "FILE" in metavar,
            words=tuple(w for w in metavar.split("|") if w.islower()),
            always_file=Path in kinds,
        )
    return keys


def read_project(context: typer.Context, value: Path | None) -> Path | None:
    """Take the options of a project file as the defaults of the command.

    Raises:
        UsageError: The file is broken; names file, line and key.
    """
    if value is not None:
        values, places = load_project(value, project_keys(context.command))
        context.default_map = {**(context.default_map or {}), **values}
        context.meta[_PLACES] = places
    return value


def model_of_project(context: typer.Context, value: Path | None) -> Path:
    """The model; where none is given, with all options of the project file in this folder.

    Raises:
        UsageError: There is no model; or that project file is broken, or names none.
    """
    if value is not None:
        return value
    if _PLACES in context.meta:
        raise UsageError("--project: the file names no model; add `model: MODEL.onnx`, or give one")
    if not Path(PROJECT_FILE).is_file():
        raise UsageError(
            f"Missing argument 'MODEL.onnx', and there is no {PROJECT_FILE} here; give a model, or"
            " let `odt-plan init` write that file"
        )
    read_project(context, Path(PROJECT_FILE))
    found = (context.default_map or {}).get("model")
    if found is None:
        raise UsageError(f"{PROJECT_FILE}: names no model; add `model: MODEL.onnx`, or give one")
    return Path(found)


def place_in_project(error: Any) -> str:
    """``FILE:LINE: `` if an error of the command line is about a value of the project file."""
    context, parameter = getattr(error, "ctx", None), getattr(error, "param", None)
    if context is None or parameter is None:
        return ""
    source = context.get_parameter_source(parameter.name)
    place = context.meta.get(_PLACES, {}).get(parameter.name)
    return f"{place}: " if place and source is not None and source.name == "DEFAULT_MAP" else ""


def load_project(
    file: Path, keys: Mapping[str, Key]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of a project file, by parameter, and where each stands.

    Values are the texts that would stand on the command line, or yes and no for flags. Paths are
    relative to the file.

    Raises:
        UsageError: It can't be read, or a key or a value is none; names file, line and key.
    """
    from .planner.spec_file import load_mapping

    data, tree = load_mapping(file, "project")
    assert isinstance(data, dict)
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    for node, value in tree.value:
        key = str(node.value)
        place = f"{file}:{node.start_mark.line + 1}"
        if key not in keys:
            near = get_close_matches(key, keys, n=1)
            hint = f"did you mean {near[0]}?" if near else "`odt-plan plan --help` lists them all"
            raise UsageError(f"{place}: {key}: is no option of plan; {hint}")
        known = keys[key]
        values[known.parameter] = _value(place, key, known, value, file.parent)
        places[known.parameter] = place
    return values, places


def _value(place: str, key: str, known: Key, node: yaml.Node, folder: Path) -> object:
    import yaml

    if known.flag:
        if node.tag != "tag:yaml.org,2002:bool":
            raise UsageError(f"{place}: {key}: is true or false")
        return yaml.SafeLoader.bool_values[node.value.lower()]
    items = node.value if isinstance(node, yaml.SequenceNode) else [node]
    if isinstance(node, yaml.SequenceNode) and not known.several:
        raise UsageError(f"{place}: {key}: takes one value, not a list")
    for item in items:
        if not isinstance(item, yaml.ScalarNode) or item.tag == "tag:yaml.org,2002:null":
            wanted = "a value, or a list of values" if known.several else "a value"
            raise UsageError(f"{place}: {key}: takes {wanted}, as on the command line")
    texts = [known.placed(item.value, folder) for item in items]
    return texts if known.several else texts[0]

