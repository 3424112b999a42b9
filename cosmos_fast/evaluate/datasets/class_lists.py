"""Sets whose images lie in one folder, with their classes in a list: aircraft, pets, cars, flowers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cosmos_fast.evaluate.datasets.class_sets import class_set, index_of, inside, labelled_files, lines_of, reader
from cosmos_fast.evaluate.datasets.layout import required
from cosmos_fast.evaluate.datasets.matfile import read_mat
from cosmos_fast.evaluate.datasets.sets import ClassificationSet
from cosmos_fast.utils.errors import UserError

_AIRCRAFT = """\
ROOT/fgvc-aircraft-2013b/data/variants.txt, data/images_variant_test.txt   fgvc-aircraft-2013b.tar.gz
ROOT/fgvc-aircraft-2013b/data/images/1514522.jpg ...                       the 3,333 test images
ROOT may be fgvc-aircraft-2013b, or its folder data, itself.
"""
_PETS = """\
ROOT/oxford-iiit-pet/annotations/test.txt              annotations.tar.gz; the 3,669 test images
ROOT/oxford-iiit-pet/images/Abyssinian_201.jpg ...     images.tar.gz
ROOT may be oxford-iiit-pet itself.
"""
_CARS = """\
ROOT/stanford_cars/devkit/cars_meta.mat                car_devkit.tgz
ROOT/stanford_cars/cars_test_annos_withlabels.mat      (or in devkit/); the 8,041 test images
ROOT/stanford_cars/cars_test/00001.jpg ...             cars_test.tgz
ROOT may be stanford_cars itself.
"""
_FLOWERS = """\
ROOT/flowers-102/imagelabels.mat, setid.mat            the 6,149 test images (tstid)
ROOT/flowers-102/jpg/image_00001.jpg ...               102flowers.tgz
ROOT may be flowers-102 itself.
"""


def open_fgvc_aircraft(root: Path) -> ClassificationSet:
    """A variant is a class: "707-320"."""
    name = "fgvc_aircraft"
    folder = inside(inside(root, "fgvc-aircraft-2013b"), "data")
    variants = lines_of(name, required(name, folder, "variants.txt"), 100)
    places = {one: number for number, one in enumerate(variants)}
    listing = required(name, folder, "images_variant_test.txt")
    split = [line.partition(" ") for line in lines_of(name, listing)]
    labelled = [(f"{image}.jpg", index_of(name, listing, one.strip(), places)) for image, _, one in split]
    return labelled_files(name, "test", listing, required(name, folder, "images"), labelled, class_set(name, variants))


def open_oxford_pets(root: Path) -> ClassificationSet:
    """A line is an image, its class from 1, and two numbers more. The image is called after its class."""
    name = "oxford_pets"
    folder = inside(root, "oxford-iiit-pet")
    listing = required(name, folder, "annotations/test.txt")
    classes = class_set(name)
    places = {f"{one.replace(' ', '_').lower()} {number}": number - 1 for number, one in enumerate(classes.classes, 1)}
    labelled = []
    for line in lines_of(name, listing):
        image, label = (*line.split(), "", "")[:2]
        wanted = f"{image.rpartition('_')[0].lower()} {label}"
        labelled.append((f"{image}.jpg", index_of(name, listing, wanted, places)))
    return labelled_files(name, "test", listing, required(name, folder, "images"), labelled, classes)


def open_stanford_cars(root: Path) -> ClassificationSet:
    name = "stanford_cars"
    folder = inside(root, "stanford_cars")
    listing = required(name, folder, "devkit/cars_meta.mat", "cars_meta.mat")
    names = _variable(name, listing, "class_names", list)
    if len(names) != 196 or not all(isinstance(one, str) and one for one in names):
        raise UserError(f"{name}: {listing} names {len(names)} classes, not 196: unpack the data set again")
    listing = required(name, folder, "cars_test_annos_withlabels.mat", "devkit/cars_test_annos_withlabels.mat")
    labelled = []
    for row in _variable(name, listing, "annotations", list):
        file = row.get("fname") if isinstance(row, dict) else None
        if not isinstance(file, str) or "class" not in row:
            raise UserError(f"{name}: {listing} has an image without fname or class: take the annotations with labels")
        labelled.append((file, _class_of(name, listing, row["class"], 196)))
    return labelled_files(name, "test", listing, required(name, folder, "cars_test"), labelled, class_set(name, names))


def open_flowers102(root: Path) -> ClassificationSet:
    """Images are numbered from 1, and so are the classes."""
    name = "flowers102"
    folder = inside(root, "flowers-102")
    listing = required(name, folder, "imagelabels.mat")
    labels = _variable(name, listing, "labels", np.ndarray).ravel()
    chosen = required(name, folder, "setid.mat")
    labelled = []
    for image in _variable(name, chosen, "tstid", np.ndarray).ravel().tolist():
        if image != int(image) or not 1 <= image <= len(labels):
            raise UserError(
                f"{name}: {chosen} names the image {image}, not one of 1 to {len(labels)}: take another copy"
            )
        labelled.append((f"image_{int(image):05d}.jpg", _class_of(name, listing, labels[int(image) - 1], 102)))
    return labelled_files(name, "test", chosen, required(name, folder, "jpg"), labelled, class_set(name))


def _variable(name: str, path: Path, wanted: str, kind: type) -> Any:
    """A variable of a MATLAB file. UserError: not such a file, none of that name and kind."""
    try:
        found = read_mat(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: {path} cannot be read ({error}): unpack the data set again") from None
    if not isinstance(found.get(wanted), kind):
        raise UserError(f"{name}: {path} has no {wanted!r} of the published kind: unpack the data set again")
    return found[wanted]


def _class_of(name: str, path: Path, value: Any, count: int) -> int:
    """A class from 0 of a number from 1, alone or in an array. UserError."""
    number = np.asarray(value)
    if number.size != 1 or number.dtype.kind not in "iuf" or number.item() not in range(1, count + 1):
        raise UserError(f"{name}: {path} has a class that is not one of 1 to {count}: unpack the data set again")
    return int(number.item()) - 1


READERS = (
    reader(
        name="stanford_cars",
        title="Stanford Cars test, 196 classes",
        layout=_CARS,
        open=open_stanford_cars,
    ),
    reader(
        name="fgvc_aircraft",
        title="FGVC Aircraft test, 100 variants",
        layout=_AIRCRAFT,
        open=open_fgvc_aircraft,
    ),
    reader(
        name="oxford_pets",
        title="Oxford-IIIT Pet test, 37 breeds",
        layout=_PETS,
        open=open_oxford_pets,
    ),
    reader(
        name="flowers102",
        title="Oxford Flowers test, 102 classes",
        layout=_FLOWERS,
        open=open_flowers102,
    ),
)
