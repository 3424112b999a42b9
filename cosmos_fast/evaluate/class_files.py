"""A list of classes and prompt templates of one's own, in place of those of a set.

Either text, a class a line, its wordings separated by semicolons; or JSON with "classes" (a list of names, or of lists
of wordings, or class -> wordings), "templates" (with `{}` where the name goes), or both. What is not given is the
set's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cosmos_fast.evaluate.datasets.layout import read_text
from cosmos_fast.evaluate.datasets.sets import ClassificationSet, EvalSet, SegmentationSet
from cosmos_fast.evaluate.prompts import ClassSet, fill_templates
from cosmos_fast.utils.errors import UserError

_PLAIN_TEMPLATE = ("a photo of a {}.",)
_FORMS = 'text with a class a line, or JSON {"classes": [...], "templates": [...]}'


def with_classes(found: EvalSet, path: Path) -> EvalSet:
    """The set with the classes of a file. UserError: a set without classes, another number of them, no such form."""
    if not isinstance(found, (ClassificationSet, SegmentationSet)):
        raise UserError(f"--classes {path}: {found.name} has no classes, leave it out or name another benchmark")
    return replace(found, classes=read_classes(path, found.classes))


def read_classes(path: Path, standard: ClassSet) -> ClassSet:
    """The classes of a file, in the order of `standard`, whose wordings and templates stand in for what it lacks."""
    wordings, templates = _parse(path, read_text("--classes", path))
    if wordings is None:
        wordings = standard.wordings or tuple((name,) for name in standard.classes)
    if len(wordings) != len(standard.classes):
        raise UserError(
            f"--classes {path} lists {len(wordings)} classes, {standard.name} has {len(standard.classes)} (the first "
            f"is {standard.classes[0]!r}, the last {standard.classes[-1]!r}): list one for each, in this order"
        )
    named = dict(zip(map(str, range(len(wordings))), wordings, strict=True))
    filled = fill_templates(path.name, named, templates or standard.templates or _PLAIN_TEMPLATE)
    return replace(filled, classes=tuple(synonyms[0] for synonyms in wordings))


def listed_classes(path: Path, templates: Sequence[str]) -> ClassSet:
    """The classes of a file, as many as it lists; `templates` where it has none. UserError: no list of classes."""
    wordings, own = _parse(path, read_text("--classes", path))
    if not wordings:
        raise UserError(f"--classes {path} lists no classes: give {_FORMS}")
    filled = fill_templates(
        path.name, dict(zip(map(str, range(len(wordings))), wordings, strict=True)), own or templates
    )
    return replace(filled, classes=tuple(synonyms[0] for synonyms in wordings))


def _parse(path: Path, text: str) -> tuple[tuple[tuple[str, ...], ...] | None, tuple[str, ...]]:
    """Wordings of the classes, None where the file has none; templates."""
    if path.suffix != ".json":
        lines = [line for line in text.splitlines() if line.strip()]
        return tuple(_wordings(path, [part.strip() for part in line.split(";")]) for line in lines), ()
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"--classes {path} is no JSON ({error}): give {_FORMS}") from None
    if isinstance(content, list):
        content = {"classes": content}
    if not isinstance(content, dict) or not content or not content.keys() <= {"classes", "templates"}:
        raise UserError(f"--classes {path} holds something else: give {_FORMS}")
    classes = content.get("classes")
    if isinstance(classes, dict):
        classes = list(classes.values())
    if classes is not None and not isinstance(classes, list):
        raise UserError(f"--classes {path}: its classes are no list: give {_FORMS}")
    templates = content.get("templates", [])
    if not isinstance(templates, list) or not all(isinstance(one, str) for one in templates):
        raise UserError(f"--classes {path}: its templates are no list of texts: give {_FORMS}")
    found = None if classes is None else tuple(_wordings(path, one) for one in classes)
    return found, tuple(templates)


def _wordings(path: Path, given: Any) -> tuple[str, ...]:
    """Of one class."""
    several = [given] if isinstance(given, str) else given
    if not isinstance(several, list) or not several or not all(isinstance(o, str) and o.strip() for o in several):
        raise UserError(f"--classes {path}: {given!r} is no name of a class: give {_FORMS}")
    return tuple(several)
