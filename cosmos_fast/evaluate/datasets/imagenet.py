"""ILSVRC 2012 (ImageNet-1k) validation: 50,000 images, sorted into class folders or flat as they were published."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np

from cosmos_fast.evaluate.datasets.class_sets import (
    class_set,
    images_in,
    index_of,
    labelled_files,
    lines_of,
    published,
    reader,
)
from cosmos_fast.evaluate.datasets.layout import read_text, required
from cosmos_fast.evaluate.datasets.matfile import read_mat
from cosmos_fast.evaluate.datasets.sets import ClassificationSet
from cosmos_fast.utils.errors import UserError

NAME = "imagenet"
_SOLUTION = "LOC_val_solution.csv"
_DEVKIT = "ILSVRC2012_devkit_t12/data"
_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_LAYOUT = f"""\
ROOT/val/n01440764/ILSVRC2012_val_00000293.JPEG ...   a folder for each of the 1,000 classes (or right in ROOT)
or, with the images as published, in one folder:
ROOT/val/ILSVRC2012_val_00000001.JPEG ...             ILSVRC2012_img_val.tar
ROOT/{_DEVKIT}/meta.mat, {_TRUTH}
or Kaggle's, which is found from either folder:
ROOT/ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000001.JPEG ...
ROOT/{_SOLUTION}
"""


def open_imagenet(root: Path) -> ClassificationSet:
    """Classes are numbered by their synsets in order. UserError: a class without a folder or an image, and as usual."""
    synsets: list[str] = published()[NAME]["synsets"]
    places = {one: number for number, one in enumerate(synsets)}
    if any((root / one).is_dir() for one in synsets):
        folder = root
    else:
        folder = required(NAME, root, "val", "ILSVRC/Data/CLS-LOC/val", "Data/CLS-LOC/val")
    if any((folder / one).is_dir() for one in synsets):
        labelled = [(f"{one}/{image}", places[one]) for one in synsets for image in images_in(NAME, folder / one)]
        return labelled_files(NAME, "val", folder, folder, labelled, class_set(NAME))
    listing = next((one / _SOLUTION for one in (root, root.parent) if (one / _SOLUTION).is_file()), None)
    if listing is not None:
        labelled = _of_solution(listing, places)
    else:
        # Neither lists nor class folders: the devkit's is what the message asks for.
        listing = required(NAME, root, f"{_DEVKIT}/{_TRUTH}", _TRUTH)
        labelled = _of_devkit(listing, places)
    return labelled_files(NAME, "val", listing, folder, labelled, class_set(NAME))


def _of_solution(path: Path, places: dict[str, int]) -> list[tuple[str, int]]:
    """Kaggle's list: "ILSVRC2012_val_00048981,n03995372 85 1 499 272", the synset of the first box being the class."""
    rows = csv.DictReader(io.StringIO(read_text(NAME, path)))
    if not {"ImageId", "PredictionString"} <= set(rows.fieldnames or ()):
        raise UserError(f"{NAME}: {path} has no columns ImageId and PredictionString: take another copy")
    found = []
    for row in rows:
        synset = ((row["PredictionString"] or "").split() or [""])[0]
        found.append((f"{row['ImageId']}.JPEG", index_of(NAME, path, synset, places)))
    return sorted(found)


def _of_devkit(path: Path, places: dict[str, int]) -> list[tuple[str, int]]:
    """The devkit's: a number a line, which meta.mat gives the synset of."""
    meta = path.parent / "meta.mat"
    try:
        rows = read_mat(meta).get("synsets")
    except (OSError, ValueError) as error:
        raise UserError(f"{NAME}: {meta} cannot be read ({error}): unpack the devkit again") from None
    numbered = {_number(row): str(row.get("WNID")) for row in rows or [] if isinstance(row, dict)}
    found = []
    for image, line in enumerate(lines_of(NAME, path), 1):
        synset = numbered.get(line, f"of number {line}")
        found.append((f"ILSVRC2012_val_{image:08d}.JPEG", index_of(NAME, path, synset, places)))
    return found


def _number(row: dict[str, Any]) -> str:
    value = np.asarray(row.get("ILSVRC2012_ID"))
    return str(int(value.item())) if value.size == 1 and value.dtype.kind in "iuf" else ""


READERS = (
    reader(
        name=NAME,
        title="ImageNet-1k (ILSVRC 2012) validation, 1,000 classes",
        layout=_LAYOUT,
        open=open_imagenet,
    ),
)
