"""What the readers of captions share: lists of a JSON file, and a checked set of image files with their captions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from cosmos_fast.evaluate.datasets.layout import FileImages
from cosmos_fast.evaluate.datasets.sets import Images, RetrievalSet, digest
from cosmos_fast.utils.errors import UserError


def rows(name: str, path: Path, content: Any, field: str, **types: type) -> list[dict[str, Any]]:
    """The list of objects that a JSON object holds under `field`. UserError: no such list, or the first object in it
    that has not the named fields of these types."""
    found = content.get(field) if isinstance(content, dict) else None
    if not isinstance(found, list):
        raise UserError(f"{name}: {path} has no list {field!r}: give the annotations as they were published")
    for number, row in enumerate(found):
        for key, wanted in types.items():
            value = row.get(key) if isinstance(row, dict) else None
            if not isinstance(value, wanted) or isinstance(value, bool):
                raise UserError(
                    f"{name}: {path}: {field}[{number}] has no {key!r} that is {_called(wanted)}: give the annotations "
                    "as they were published"
                )
    return found


def _called(wanted: type) -> str:
    return {int: "a whole number", str: "text", list: "a list"}[wanted]


def _is_broken(text: str) -> bool:
    """Whether it has half a surrogate pair, which JSON and names of files can carry."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def first_twice(values: Sequence[Any]) -> Any:
    """The first value that was there before; None where all differ."""
    seen: set[Any] = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return None


def file_pairs(
    name: str, split: str, listing: Path, folder: Path, pairs: Sequence[tuple[str, Sequence[str]]]
) -> RetrievalSet:
    """The set of (path of an image below a folder, its captions) pairs.

    listing: the file or folder that named them, for messages. UserError: none at all, one named twice, a path that
    leads out of the folder, an image that is missing, and what `retrieval_set` refuses.
    """
    paths = [path for path, _ in pairs]
    twice = first_twice(paths)
    if twice is not None:
        raise UserError(f"{name}: {listing} names the image {twice} twice: keep one of the two")
    for path in paths:
        pure = PurePosixPath(path)
        outside = pure.is_absolute() or ".." in pure.parts or not pure.parts
        if outside or any(letter < " " for letter in path):
            raise UserError(f"{name}: {listing} names the image {path!r}: give paths below {folder}")
    return retrieval_set(name, split, listing, FileImages(name, folder, paths), [texts for _, texts in pairs])


def retrieval_set(
    name: str, split: str, listing: Path, images: Images, captions: Sequence[Sequence[str]]
) -> RetrievalSet:
    """The set, its captions without the blanks around them. UserError: no image, or one without a caption, or with one
    that is empty or no text."""
    if not len(images):
        raise UserError(f"{name}: {listing} holds no image of {split}: give a data set with at least one")
    keys = [images.key(number) for number in range(len(images))]
    stripped = tuple(tuple(text.strip() for text in texts) for texts in captions)
    for key, texts in zip(keys, stripped, strict=True):
        if not texts:
            raise UserError(f"{name}: {listing}: image {key} has no caption: add one, or take the image out")
        if not all(texts):
            raise UserError(f"{name}: {listing}: image {key} has an empty caption: fill it, or take it out")
        if any(_is_broken(text) for text in (key, *texts)):
            raise UserError(f"{name}: {listing}: {key!a} or a caption of it is no Unicode text: mend it")
    answers = (json.dumps(texts, ensure_ascii=False) for texts in stripped)
    return RetrievalSet(name=name, split=split, images=images, sha256=digest(keys, answers), captions=stripped)
