"""The classes that a picture's pixels choose among."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cosmos_fast.evaluate.class_files import listed_classes, read_classes
from cosmos_fast.evaluate.datasets.class_sets import published
from cosmos_fast.evaluate.pictures.sources import Source
from cosmos_fast.evaluate.prompts import ClassSet, fill_templates
from cosmos_fast.evaluate.protocols import parse
from cosmos_fast.evaluate.segmentation import SegmentationProtocol
from cosmos_fast.utils.errors import UserError

MOST_CLASSES = 254  # numbers of a map of bytes, one left for pixels without a label


def chosen_classes(
    source: Source, named: Sequence[str], file: Path | None, changes: Sequence[str] = ()
) -> tuple[Source, ClassSet, SegmentationProtocol]:
    """The source (without its true maps where classes are named), the classes, and how to segment.

    named: a class each, its wordings with ";" between them; set into ImageNet's templates, as those of a file are that
    has none. file: other wordings of the source's classes, or a list where it brings none. changes: KEY=VALUE of the
    protocol, see `evaluate.protocols`.

    UserError: no classes at all, a name or file that is none, or too many; no such key or value.
    """
    if named and file:
        raise UserError("give --class or --classes, not both")
    templates = published()["imagenet"]["templates"]
    maps = source.segmentation
    protocol = replace(SegmentationProtocol() if maps is None or named else maps.protocol, **parse(changes))
    if named:
        source, classes = replace(source, segmentation=None), _named_classes(named, templates)
    elif maps is not None:
        classes = maps.classes if file is None else read_classes(file, maps.classes)
    elif file is not None:
        classes = listed_classes(file, templates)
    else:
        raise UserError(f"{source.name} brings no classes: name them with --class NAME (repeatable) or --classes FILE")
    if not 2 <= len(classes.classes) <= MOST_CLASSES:
        raise UserError(f"pixels choose among 2 to {MOST_CLASSES} classes, not {len(classes.classes)}: change the list")
    return source, classes, protocol


def _named_classes(named: Sequence[str], templates: Sequence[str]) -> ClassSet:
    wordings = [[part.strip() for part in line.split(";")] for line in named]
    names = [synonyms[0] for synonyms in wordings]
    if not all(part for synonyms in wordings for part in synonyms):
        raise UserError("--class: a name is missing before, between or after ';'")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"--class {twice[0]} is given twice: wordings of one class go into one, with ';' between them")
    return fill_templates("--class", dict(zip(names, wordings, strict=True)), templates)
