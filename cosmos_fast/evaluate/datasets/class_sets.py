"""What the readers of classes share: published names and templates, and a checked set of image files with their class.

Names and templates are those of clip-benchmark and OpenCLIP (assets/NOTICE.md). Sets whose archives name their classes
are read with those names, underscores made blanks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Any

from cosmos_fast.evaluate.datasets import wds
from cosmos_fast.evaluate.datasets.layout import FileImages, read_text, visible
from cosmos_fast.evaluate.datasets.sets import ClassificationSet, EvalSet, Images, Reader, digest
from cosmos_fast.evaluate.prompts import ClassSet
from cosmos_fast.utils.errors import UserError

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


def reader(*, name: str, title: str, layout: str, open: Callable[[Path], EvalSet]) -> Reader:
    """A reader of classes, which takes shards of CLIP-benchmark too: these bring their own names and templates, whose
    order may be another."""

    def open_either(root: Path) -> EvalSet:
        return wds.open_classification(root, name) if wds.is_one(root) else open(root)

    layout += "Shards of CLIP-benchmark are read too: `cosmos-fast eval sets wds`.\n"
    return Reader(name=name, task="classification", title=title, layout=layout, open=open_either)


@cache
def published() -> Mapping[str, Mapping[str, Any]]:
    """Set -> "templates" with {} for the name, and where its archive names no classes, "classes" in label order."""
    content: dict[str, dict[str, Any]] = json.loads(asset("classification.json"))
    return content


def asset(file: str) -> str:
    """Text of a file that is shipped with the readers."""
    return (files("cosmos_fast.evaluate.datasets") / "assets" / file).read_text(encoding="utf-8")


def class_set(name: str, classes: Sequence[str] | None = None) -> ClassSet:
    """The classes given, or the published ones, in the published templates. A name may stand twice (in ImageNet's
    two do)."""
    names = tuple(published()[name]["classes"] if classes is None else classes)
    templates = tuple(published()[name]["templates"])
    prompts = tuple((tuple(template.replace("{}", one) for template in templates),) for one in names)
    return ClassSet(name, names, prompts, tuple((one,) for one in names), templates)


def inside(root: Path, folder: str) -> Path:
    """The folder that an archive unpacks to, whether it was given itself or the one that holds it."""
    return root / folder if (root / folder).is_dir() else root


def lines_of(name: str, path: Path, count: int | None = None) -> list[str]:
    """Lines of a text file without blanks around them, empty ones left out. UserError: none, or not `count`."""
    found = [line.strip() for line in read_text(name, path).splitlines() if line.strip()]
    if not found or (count is not None and len(found) != count):
        wanted = f"not {count}" if count is not None else "one at least is needed"
        raise UserError(f"{name}: {path} holds {len(found)} lines, {wanted}: unpack the data set again")
    return found


def index_of(name: str, path: Path, value: str, places: Mapping[str, int]) -> int:
    """The number of a class by its published spelling. UserError where a file uses one that is not listed."""
    if value not in places:
        raise UserError(f"{name}: {path} uses the class {value[:60]!r}, which is not listed: unpack the data set again")
    return places[value]


def images_in(name: str, folder: Path) -> list[str]:
    """Names of the image files of a folder, sorted, without hidden ones. UserError: no such folder, or none in it."""
    if not folder.is_dir():
        raise UserError(f"{name}: {folder} is missing: `cosmos-fast eval sets {name}` prints the layout that is read")
    found = [one for one in visible(folder, "*") if one.lower().endswith(_SUFFIXES)]
    if not found:
        raise UserError(f"{name}: {folder} holds no image: the copy is not whole, unpack it again")
    return found


def labelled_files(
    name: str, split: str, listing: Path, folder: Path, labelled: Iterable[tuple[str, int]], classes: ClassSet
) -> ClassificationSet:
    """The set of (path of an image below a folder, its class) pairs.

    listing: the file or folder that named them, for messages. UserError: none at all, one named twice, a path that
    leads out of the folder, an image that is missing.
    """
    pairs = list(labelled)
    seen: set[str] = set()
    for path, _ in pairs:
        pure = PurePosixPath(path)
        if pure.is_absolute() or ".." in pure.parts or not pure.parts:
            raise UserError(f"{name}: {listing} names the image {path!r}: give paths below {folder}")
        if path in seen:
            raise UserError(f"{name}: {listing} names the image {path} twice: unpack the data set again")
        seen.add(path)
    if not pairs:
        raise UserError(f"{name}: {listing} names no image: unpack the data set again")
    images = FileImages(name, folder, [path for path, _ in pairs])
    return classification_set(name, split, images, [label for _, label in pairs], classes)


def classification_set(
    name: str, split: str, images: Images, labels: Sequence[int], classes: ClassSet
) -> ClassificationSet:
    """The set, its digest over the images' keys and the names of their classes."""
    keys = (images.key(number) for number in range(len(images)))
    answers = (classes.classes[label] for label in labels)
    return ClassificationSet(
        name=name, split=split, images=images, sha256=digest(keys, answers), labels=tuple(labels), classes=classes
    )
