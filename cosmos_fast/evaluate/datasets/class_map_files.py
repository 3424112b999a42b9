"""What the readers of segmentation sets share: maps of classes in files, names of classes, and the set of both.

A map is a PNG of 8 bits a pixel, grey or with a palette (the numbers count, colours do not), or a matrix of MATLAB's.
Names are those of MMSegmentation (assets/NOTICE.md), words set apart; templates are ImageNet's 80.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cosmos_fast.data.images import MAX_PIXELS
from cosmos_fast.evaluate.datasets.class_sets import published as published_classes
from cosmos_fast.evaluate.datasets.layout import FileImages, all_there
from cosmos_fast.evaluate.datasets.matfile import read_mat
from cosmos_fast.evaluate.datasets.sets import SegmentationSet, digest
from cosmos_fast.evaluate.prompts import ClassSet, fill_templates
from cosmos_fast.evaluate.segmentation import IGNORE, SegmentationProtocol
from cosmos_fast.utils.errors import UserError

_UNKNOWN = -1
# How a list's names are worded for the model, where that is not the name with blanks for hyphens.
_WORDS = {"diningtable": "dining table", "pottedplant": "potted plant", "tvmonitor": "tv monitor"}


@cache
def published() -> Mapping[str, Any]:
    """The asset: "classes" (list -> names), "context_labels", "coco_stuff_labels" (original numbers, in order)."""
    asset = files("cosmos_fast.evaluate.datasets") / "assets" / "segmentation.json"
    content: dict[str, Any] = json.loads(asset.read_text(encoding="utf-8"))
    return content


def wording(name: str) -> str:
    """How a class is called in a prompt: "pottedplant" -> "potted plant", "sky-other" -> "sky"."""
    return _WORDS.get(name, name.removesuffix("-other").removesuffix("-stuff").replace("-", " "))


def class_set(name: str, classes: Sequence[str]) -> ClassSet:
    """Classes with one wording each."""
    return fill_templates(name, {one: [wording(one)] for one in classes}, published_classes()["imagenet"]["templates"])


@dataclass(frozen=True)
class Numbers:
    """What the numbers of a map mean: classes[value], IGNORE included; -1 for what a map must not hold.

    called: those that it may hold, in words.
    """

    classes: np.ndarray
    called: str

    @classmethod
    def of(cls, meaning: Mapping[int, int], called: str, size: int = 256, other: int = _UNKNOWN) -> Numbers:
        table = np.full(size, other, dtype=np.int16)
        table[list(meaning)] = list(meaning.values())
        return cls(table, called)

    def translated(self, values_HW: np.ndarray) -> np.ndarray:
        """uint8 [H, W]. ValueError names the first value that has no meaning."""
        inside = (values_HW >= 0) & (values_HW < len(self.classes))
        found_HW = self.classes[np.where(inside, values_HW, 0)]
        wrong = ~inside | (found_HW == _UNKNOWN)
        if wrong.any():
            raise ValueError(f"it holds the class number {values_HW[wrong][0]}, not one of {self.called}")
        return found_HW.astype(np.uint8)


def read_png_map(path: Path) -> np.ndarray:
    """The numbers of a map, uint8 [H, W]. OSError, ValueError."""
    data = path.read_bytes()
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.mode not in ("L", "P"):
                raise ValueError(
                    f"it is of mode {image.mode}, not grey or palette of 8 bits: a picture, no map of classes"
                )
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"it has {image.width} x {image.height} pixels, the cap is {MAX_PIXELS}")
            return np.array(image)
    except (SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from None


def read_label_map(path: Path) -> np.ndarray:
    """The matrix `LabelMap` of Pascal Context's .mat, [H, W] of whole numbers. OSError, ValueError."""
    found = read_mat(path).get("LabelMap")
    if not isinstance(found, np.ndarray) or found.ndim != 2 or found.dtype.kind not in "iu":
        raise ValueError("it has no LabelMap of whole numbers")
    return found


@dataclass(frozen=True)
class Maps:
    """A form that the maps of a set come in. path: of the map of an image, below the folder, by the image's id."""

    folder: Path
    path: Callable[[str], str]
    numbers: Numbers
    read: Callable[[Path], np.ndarray] = read_png_map

    def present(self, ids: Iterable[str]) -> int:
        return sum((self.folder / self.path(one)).is_file() for one in ids)


def most_whole(ids: Sequence[str], *forms: Maps) -> Maps:
    """Of the forms that lie side by side the one that most images have; the first of those that are alike."""
    return max(forms, key=lambda form: form.present(ids))


def segmentation_set(
    name: str,
    split: str,
    folder: Path,
    image_path: Callable[[str], str],
    ids: Sequence[str],
    maps: Maps,
    classes: Sequence[str],
    protocol: SegmentationProtocol,
) -> SegmentationSet:
    """The images of some ids, each with its map. UserError: an image or a map is missing, there is none, one twice."""
    if not ids:
        raise UserError(
            f"{name}: {folder} holds no image of the split: `cosmos-fast eval sets {name}` prints the layout"
        )
    if len(set(ids)) < len(ids):
        twice = next(one for place, one in enumerate(ids) if one in ids[:place])
        raise UserError(f"{name}: {twice} is listed twice: take the list of images as published")
    images = FileImages(name, folder, [image_path(one) for one in ids])
    all_there(name, maps.folder, [maps.path(one) for one in ids])

    def truth(number: int) -> np.ndarray:
        path, picture = maps.folder / maps.path(ids[number]), folder / image_path(ids[number])
        try:
            found_HW = maps.numbers.translated(maps.read(path))
            with Image.open(picture) as image:
                width, height = image.size  # without decoding it
            if found_HW.shape != (height, width):
                raise ValueError(f"it is {found_HW.shape[1]} x {found_HW.shape[0]}, its image {width} x {height}")
            return found_HW
        except (OSError, ValueError) as error:
            raise UserError(f"{name}: {path} is no map of classes ({error}): convert or unpack it again") from None

    return SegmentationSet(
        name=name,
        split=split,
        images=images,
        sha256=digest(ids, [name] * len(ids)),
        truth=truth,
        classes=class_set(name, classes),
        protocol=protocol,
        background=classes[0] == "background",
    )


def identity(classes: int, ignored: Iterable[int] = (IGNORE,)) -> dict[int, int]:
    """0 to classes - 1 as they are."""
    return {number: number for number in range(classes)} | dict.fromkeys(ignored, IGNORE)


def shifted(classes: int) -> dict[int, int]:
    """1 to classes become 0 to classes - 1; 0 is not counted."""
    return {number + 1: number for number in range(classes)} | {0: IGNORE, IGNORE: IGNORE}
