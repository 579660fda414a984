"""``--importance FILE``: scores of the user's own, as CSV or JSON.

CSV has the columns ``name,score`` and maybe ``ratio``; JSON is an object of names and scores, or a
list of objects with the keys of the columns. A row is the score of updating a part (``ratio``) of a
tensor; without ratio it is that of the whole one. Where only that is given, parts have the share
that the prior gives them, the root of the ratio.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from itertools import pairwise
from math import isfinite, sqrt
from pathlib import Path

from ..ir.candidates import param_slots, parts
from ..ir.errors import UsageError
from ..ir.graph import Graph
from .plan import ImportanceTable

_COLUMNS = ("name", "score", "ratio")


def load_table(path: Path, forward: Graph) -> ImportanceTable:
    """Read scores; tensors that the file does not name score 0.

    Args:
        path: The file.
        forward: The model that it is about.

    Raises:
        UsageError: It can't be read, a tensor is unknown (the nearest are told), given twice or
            without the score of the whole, or a number is none, negative or out of range.
    """
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as e:
        raise UsageError(f"{path}: can't be read: {e.strerror or e}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: is no text; give CSV or JSON with name, score, ratio") from None
    known = param_slots(forward)
    found: dict[str, dict[float, float]] = {}
    for where, name, score, ratio in _numbers(path, text):
        if name not in known:
            near = get_close_matches(name, known, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else f"it has {', '.join(known)}"
            raise UsageError(f"{where}: {forward.name} has no trainable tensor {name}; {hint}")
        if ratio in found.setdefault(name, {}):
            raise UsageError(f"{where}: {name} is given twice for the ratio {ratio:g}")
        found[name][ratio] = score
    if not any(score for points in found.values() for score in points.values()):
        raise UsageError(f"{path}: no tensor has a score above 0")
    gains = {}
    for name, points in found.items():
        if 1.0 not in points:
            raise UsageError(f"{path}: {name} has no score of the whole tensor (ratio 1)")
        rising = sorted(points.items())
        if any(b < a for (_, a), (_, b) in pairwise(rising)):
            raise UsageError(f"{path}: {name}: a larger part has a smaller score")
        if len(rising) == 1:
            whole = points[1.0]
            rising = [(r, whole * sqrt(r)) for r in parts(forward, name)] + rising
        gains[name] = tuple(rising)
    digest = hashlib.sha256(content).hexdigest()
    return ImportanceTable(method="table", file=path.name, sha256=digest, gains=gains)


def _numbers(path: Path, text: str) -> Iterator[tuple[str, str, float, float]]:
    """Place, name, score and ratio of each row."""
    rows = _json_rows(path, text) if text.lstrip()[:1] in ("{", "[") else _csv_rows(path, text)
    for where, row in rows:
        name = row.get("name")
        if unknown := [k for k in row if k not in _COLUMNS]:
            raise UsageError(f"{where}: unknown column {unknown[0]}; known: {', '.join(_COLUMNS)}")
        if not isinstance(name, str) or not name:
            raise UsageError(f"{where}: has no name")
        score = _number(row.get("score"), f"{where}: the score of {name}")
        given = row.get("ratio")
        ratio = 1.0 if given in (None, "") else _number(given, f"{where}: the ratio of {name}")
        if not 0 < ratio <= 1:
            raise UsageError(f"{where}: the ratio {ratio:g} of {name} is not in (0, 1]")
        yield where, name, score, ratio


def _number(given: object, what: str) -> float:
    try:
        number = float(given) if isinstance(given, str | int | float) else float("nan")
    except (ValueError, OverflowError):
        number = float("nan")
    if not isfinite(number) or isinstance(given, bool):
        raise UsageError(f"{what} is {given!r}, not a finite number")
    if number < 0:
        raise UsageError(f"{what} is {number:g}; scores are 0 or more")
    return number


def _csv_rows(path: Path, text: str) -> Iterator[tuple[str, Mapping[str, object]]]:
    reader = csv.DictReader(text.splitlines(), restkey="more columns than the header")
    if not {"name", "score"} <= set(reader.fieldnames or ()):
        raise UsageError(f"{path}: the first line must be name,score or name,score,ratio")
    try:
        for row in reader:
            yield f"{path}: line {reader.line_num}", row
    except csv.Error as e:
        raise UsageError(f"{path}: line {reader.line_num}: {e}") from None


def _json_rows(path: Path, text: str) -> Iterator[tuple[str, Mapping[str, object]]]:
    try:
        data = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as e:
        raise UsageError(f"{path}: is no JSON: {e}") from None
    if isinstance(data, dict):
        data = [{"name": name, "score": score} for name, score in data.items()]
    for i, row in enumerate(data, 1):
        if not isinstance(row, dict):
            raise UsageError(f"{path}: entry {i} is no object with name and score")
        yield f"{path}: entry {i}", row
