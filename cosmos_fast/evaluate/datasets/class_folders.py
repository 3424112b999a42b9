"""Sets whose images lie in a folder a class: Food-101, SUN397, DTD, Caltech-101."""

from __future__ import annotations

from pathlib import Path

from cosmos_fast.evaluate.datasets.class_sets import (
    asset,
    class_set,
    images_in,
    index_of,
    inside,
    labelled_files,
    lines_of,
    published,
    reader,
)
from cosmos_fast.evaluate.datasets.layout import required
from cosmos_fast.evaluate.datasets.sets import ClassificationSet
from cosmos_fast.utils.errors import UserError

_FOOD = """\
ROOT/food-101/meta/classes.txt, meta/test.txt   food-101.tar.gz; the 25,250 test images
ROOT/food-101/images/apple_pie/1011328.jpg ...
ROOT may be food-101 itself.
"""
_SUN = """\
ROOT/SUN397/ClassName.txt                       SUN397.tar.gz
ROOT/SUN397/a/abbey/sun_aaalbzqrimafwbiv.jpg ...
ROOT/Testing_01.txt                             Partitions.zip (or ROOT/SUN397/, ROOT/Partitions/); optional
With Testing_01.txt the 19,850 test images of the first published partition (split "Testing_01"); without it all
108,754 images, as CLIP-benchmark has them (split "all"). ROOT may be SUN397 itself.
"""
_DTD = """\
ROOT/dtd/labels/test1.txt                       dtd-r1.0.1.tar.gz; the 1,880 test images of the first split
ROOT/dtd/images/banded/banded_0002.jpg ...
ROOT may be dtd itself, or the one that holds dtd/dtd, as torchvision has it.
"""
_CALTECH = """\
ROOT/caltech101/101_ObjectCategories/accordion/image_0001.jpg ...   caltech-101.zip, 101_ObjectCategories.tar.gz
There is no published split: all 9,145 images, as CLIP-benchmark has them; without the folder BACKGROUND_Google, which
torchvision leaves out, 8,677 images of 101 classes. ROOT may be caltech101, caltech-101 or 101_ObjectCategories itself.
"""


def open_food101(root: Path) -> ClassificationSet:
    name = "food101"
    folder = inside(root, "food-101")
    spelled = lines_of(name, required(name, folder, "meta/classes.txt"), 101)
    listing = required(name, folder, "meta/test.txt")
    places = {one: number for number, one in enumerate(spelled)}
    labelled = [
        (f"{line}.jpg", index_of(name, listing, line.rpartition("/")[0], places)) for line in lines_of(name, listing)
    ]
    classes = class_set(name, [one.replace("_", " ") for one in spelled])
    return labelled_files(name, "test", listing, required(name, folder, "images"), labelled, classes)


def open_sun397(root: Path) -> ClassificationSet:
    """A class is a path of two or three parts, "apartment_building/outdoor" without its first letter."""
    name = "sun397"
    folder = inside(root, "SUN397")
    listing = required(name, folder, "ClassName.txt")
    paths = [line.lstrip("/") for line in lines_of(name, listing, 397)]
    places = {path: number for number, path in enumerate(paths)}
    partitions = [folder, root, root / "Partitions", folder / "Partitions"]
    tested = next((one / "Testing_01.txt" for one in partitions if (one / "Testing_01.txt").is_file()), None)
    if tested is not None:
        images = [line.lstrip("/") for line in lines_of(name, tested)]
        labelled = [(path, index_of(name, tested, path.rpartition("/")[0], places)) for path in images]
    else:
        labelled = [(f"{path}/{one}", places[path]) for path in paths for one in images_in(name, folder / path)]
    classes = class_set(name, [path.partition("/")[2].replace("_", " ").replace("/", " ") for path in paths])
    return labelled_files(name, "Testing_01" if tested else "all", tested or listing, folder, labelled, classes)


def open_dtd(root: Path) -> ClassificationSet:
    name = "dtd"
    folder = inside(inside(root, "dtd"), "dtd")
    listing = required(name, folder, "labels/test1.txt")
    images = lines_of(name, listing)
    spelled = sorted({path.rpartition("/")[0] for path in images})
    if len(spelled) != 47:
        raise UserError(f"{name}: {listing} names images of {len(spelled)} classes, not 47: unpack the data set again")
    labelled = [(path, spelled.index(path.rpartition("/")[0])) for path in images]
    classes = class_set(name, [one.replace("_", " ") for one in spelled])
    return labelled_files(name, "test1", listing, required(name, folder, "images"), labelled, classes)


def caltech_folders() -> tuple[str, ...]:
    """Names of the folders in the order of the published classes: sorted, capitals first, the background in front."""
    return tuple(asset("caltech101_folders.txt").split())


def open_caltech101(root: Path) -> ClassificationSet:
    name = "caltech101"
    folder = inside(inside(inside(root, "caltech101"), "caltech-101"), "101_ObjectCategories")
    folders, names = caltech_folders(), published()[name]["classes"]
    if not (folder / folders[-1]).is_dir():
        required(name, root, f"caltech101/101_ObjectCategories/{folders[-1]}")
    if not (folder / folders[0]).is_dir():
        folders, names = folders[1:], names[1:]
    labelled = [
        (f"{one}/{image}", label) for label, one in enumerate(folders) for image in images_in(name, folder / one)
    ]
    return labelled_files(name, "all", folder, folder, labelled, class_set(name, names))


READERS = (
    reader(
        name="food101",
        title="Food-101 test, 101 classes",
        layout=_FOOD,
        open=open_food101,
    ),
    reader(
        name="sun397",
        title="SUN397, 397 classes",
        layout=_SUN,
        open=open_sun397,
    ),
    reader(
        name="dtd",
        title="Describable Textures test, 47 classes",
        layout=_DTD,
        open=open_dtd,
    ),
    reader(
        name="caltech101",
        title="Caltech-101, 102 classes",
        layout=_CALTECH,
        open=open_caltech101,
    ),
)
