"""What a reader of a published layout gives, whatever its files look like: images, and the answers to compare with.

Axis legend: N images, H, W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from cosmos_fast.evaluate.prompts import ClassSet
from cosmos_fast.evaluate.segmentation import SegmentationProtocol


class Images(Protocol):
    """Images by number, 0 to len - 1, which may be read from several threads at once."""

    def __len__(self) -> int: ...

    def key(self, number: int) -> str:
        """The name that messages and pictures give it: its path below the set's folder, or its key in a shard."""

    def image(self, number: int) -> Image.Image:
        """RGB, of full size. UserError where it is missing or broken: a set without it would be another set."""


@dataclass(frozen=True, kw_only=True)
class EvalSet:
    """name: as on the command line ("coco"). split: as its publisher calls it ("val2017"). sha256: of keys and answers,
    in order (`digest`), so that two results can be told to be of the same questions."""

    name: str
    split: str
    images: Images
    sha256: str


@dataclass(frozen=True, kw_only=True)
class RetrievalSet(EvalSet):
    """captions: of every image, at least one."""

    captions: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class ClassificationSet(EvalSet):
    """labels: of every image, a number into classes.classes."""

    labels: tuple[int, ...]
    classes: ClassSet


@dataclass(frozen=True, kw_only=True)
class SegmentationSet(EvalSet):
    """truth: number of an image -> uint8 [H, W] of its size (UserError where broken): numbers into classes.classes, or
    IGNORE. background: whether class 0 is what is not looked for, to which thresholds of the protocol give pixels."""

    truth: Callable[[int], np.ndarray]
    classes: ClassSet
    protocol: SegmentationProtocol
    background: bool = False


def task_of(found: EvalSet) -> str:
    """Which of tasks.TASKS its questions are."""
    kinds = {RetrievalSet: "retrieval", ClassificationSet: "classification", SegmentationSet: "segmentation"}
    return kinds[type(found)]


@dataclass(frozen=True, kw_only=True)
class Reader:
    """How a set is known on the command line.

    task: one of tasks.TASKS. title: what it is, in a line. layout: the tree below ROOT that `open` asks for, as text.
    open: the folder (or archive, where the layout says so) -> the set; UserError names the first path that is missing.
    It reads lists and annotations, and looks whether the images are there, but decodes none.
    """

    name: str
    task: str
    title: str
    layout: str
    open: Callable[[Path], EvalSet]


def digest(keys: Iterable[str], answers: Iterable[str]) -> str:
    """SHA-256 over keys and answers: captions, or a class, or the key of a map of classes."""
    total = hashlib.sha256()
    for key, answer in zip(keys, answers, strict=True):
        for text in (key, answer):
            data = text.encode()
            total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()


@dataclass(frozen=True)
class SomeImages:
    """Some of a set's images, by their numbers there."""

    images: Images
    numbers: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.numbers)

    def key(self, number: int) -> str:
        return self.images.key(self.numbers[number])

    def image(self, number: int) -> Image.Image:
        return self.images.image(self.numbers[number])


def part_of(found: EvalSet, count: int | None) -> EvalSet:
    """So many of a set's images with their answers, evenly spread (sets are often sorted by class); another digest.

    None, or as many as there are: the set itself.
    """
    whole = len(found.images)
    if count is None or count >= whole:
        return found
    numbers = tuple(place * whole // count for place in range(count))
    changed: dict[str, Any] = {
        "images": SomeImages(found.images, numbers),
        "sha256": hashlib.sha256(f"{found.sha256} {count}".encode()).hexdigest(),
    }
    if isinstance(found, RetrievalSet):
        changed["captions"] = tuple(found.captions[number] for number in numbers)
    elif isinstance(found, ClassificationSet):
        changed["labels"] = tuple(found.labels[number] for number in numbers)
    elif isinstance(found, SegmentationSet):
        truth = found.truth
        changed["truth"] = lambda number: truth(numbers[number])
    return replace(found, **changed)
