"""Result files side by side: the same questions or none, and what was asked in another way."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmos_fast.evaluate import record
from cosmos_fast.utils.errors import UserError

Groups = dict[str, tuple[str, dict[str, dict[str, float]]]]
_TASK = {"metrics": dict, "protocol": dict}
_SET = {"task": str, "split": str, "sha256": str, **_TASK}


@dataclass(frozen=True)
class Comparison:
    """groups: heading -> task, and column -> metrics. notes: a line each, on what differs besides the numbers."""

    groups: Groups
    notes: tuple[str, ...]


def compare(files: Sequence[Path], anyway: bool = False) -> Comparison:
    """UserError: a file that is no result or is given twice, nothing in common, a set of two tasks, or one with other
    questions, if not `anyway`."""
    if len(files) < 2:
        raise UserError("eval compare needs two result files or more")
    twice = next((file for file in files if files.count(file) > 1), None)
    if twice is not None:
        raise UserError(f"{twice} is given twice: give each result file once")
    contents = {file: _read(file) for file in files}
    columns = _columns(contents)
    names = list(dict.fromkeys(name for sets in columns.values() for name in sets))
    groups: Groups = {}
    notes: list[str] = []
    for name in names:
        found = {column: sets[name] for column, sets in columns.items() if name in sets}
        if len(found) < 2:
            notes.append(f"{name}: in {next(iter(found))} only")
            continue
        _check_task(name, found)
        _check_questions(name, found, anyway, notes)
        one = next(iter(found.values()))
        heading = f"{name}, {one['split']}" if one["split"] else name
        groups[heading] = (one["task"], {column: each["metrics"] for column, each in found.items()})
        notes += _differences(f"{name}: ", {column: each["protocol"] for column, each in found.items()})
    if not groups:
        raise UserError(f"{', '.join(map(str, files))} have no evaluation set in common")
    notes += _differences("version of ", {str(file): one["versions"] for file, one in contents.items()})
    return Comparison(groups, tuple(notes))


def _read(file: Path) -> dict[str, Any]:
    """A result file. UserError."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not str(content["format"]).startswith("cosmos-fast-eval/"):
            raise ValueError(f"its format is {content['format']!r}")
        for model in record.models_in(content).values():
            for key, kinds in (("benchmarks", _SET), ("tasks", _TASK)):
                for name, one in model.get(key, {}).items():
                    _check_entry(name, one, kinds)
        _check_kinds("the file", content, {"versions": dict})
        _check_kinds("data", content.get("data", {"sha256": ""}), {"sha256": str})
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror or error})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is no result of `eval run --out` ({error!r})") from None
    return dict(content)


def _check_entry(name: str, one: Mapping[str, Any], kinds: Mapping[str, type]) -> None:
    """ValueError where the record of a set or task lacks something, or has a metric that is no number."""
    _check_kinds(name, one, kinds)
    for key, value in one["metrics"].items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{name}: its {key} is no number")


def _check_kinds(name: str, one: Mapping[str, Any], kinds: Mapping[str, type]) -> None:
    words: dict[type, str] = {dict: "object", str: "text"}
    for key, kind in kinds.items():
        if not isinstance(one.get(key), kind):
            raise ValueError(f"{name}: its {key} is missing or no {words[kind]}")


def _columns(contents: Mapping[Path, dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Column -> set -> its record. A column is a file by its name, by its path where names repeat, and a model."""
    stems = [file.stem for file in contents]
    columns: dict[str, dict[str, dict[str, Any]]] = {}
    for file, content in contents.items():
        called = file.stem if stems.count(file.stem) == 1 else str(file)
        for weights, model in record.models_in(content).items():
            sets = dict(model.get("benchmarks", {}))
            for task, one in model.get("tasks", {}).items():
                digest = content.get("data", {}).get("sha256", "")
                sets[f"--data, {task}"] = {**one, "task": task, "split": "", "sha256": digest}
            columns[f"{called} {weights}"] = sets
    return columns


def _check_task(name: str, found: Mapping[str, Mapping[str, Any]]) -> None:
    """All columns are of one task: numbers of two have no lines in common, with --anyway neither."""
    if len({one["task"] for one in found.values()}) > 1:
        shown = ", ".join(f"{one['task']} in {column}" for column, one in found.items())
        raise UserError(f"{name} stands for different tasks ({shown}): leave one file out")


def _check_questions(name: str, found: Mapping[str, Mapping[str, Any]], anyway: bool, notes: list[str]) -> None:
    """The split hashes agree."""
    digests = {column: str(one["sha256"]) for column, one in found.items()}
    if len(set(digests.values())) == 1:
        return
    shown = ", ".join(f"{digest[:12]} in {column}" for column, digest in digests.items())
    if not anyway:
        raise UserError(
            f"{name}: images or answers differ (split hash {shown}): evaluate on one copy, or give --anyway"
        )
    notes.append(f"{name}: DIFFERENT QUESTIONS, split hash {shown}")


def _differences(prefix: str, found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for every key that has not the same value everywhere."""
    keys = dict.fromkeys(key for one in found.values() for key in one)
    lines = []
    for key in keys:
        values = {column: _short(one.get(key)) for column, one in found.items()}
        if len({json.dumps(one.get(key), sort_keys=True) for one in found.values()}) > 1:
            lines.append(f"{prefix}{key} is " + ", ".join(f"{value} in {column}" for column, value in values.items()))
    return lines


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
