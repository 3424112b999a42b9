"""Miniatures of the classification sets, in exactly their published layouts, and the answers that are right for them.

Lists name a few images, and where the folders are the list, each class has one. Published lists of classes are written
in full, since readers count them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from cosmos_fast.evaluate.datasets.class_folders import caltech_folders
from cosmos_fast.evaluate.datasets.class_sets import published
from tests.benchmark_folders.answers import LABELS, Answers, write_lines, write_photos
from tests.benchmark_folders.cifar_archives import (
    write_cifar10,
    write_cifar10_binary,
    write_cifar100,
    write_cifar100_binary,
    write_cifar100_of_today,
)
from tests.benchmark_folders.matlab import write_mat

Labels = tuple[int, ...]


def write_food101(root: Path, labels: Labels = LABELS) -> Answers:
    spelled = [f"dish_{number:03}" for number in range(101)]
    images = [f"{spelled[label]}/{1000 + number}" for number, label in enumerate(labels)]
    write_lines(root / "food-101/meta/classes.txt", spelled)
    write_lines(root / "food-101/meta/test.txt", images)
    write_lines(root / "food-101/meta/train.txt", ["dish_000/1"])
    numbers = write_photos(root / "food-101/images", [f"{image}.jpg" for image in images])
    return Answers(numbers, labels, tuple(f"dish {number:03}" for number in range(101)))


def sun_classes() -> tuple[list[str], tuple[str, ...]]:
    """Paths, of which two go deeper, and names."""
    deep = ["/a/apartment_building/outdoor", "/a/apse/indoor"]
    paths = ["/a/abbey", *deep, *(f"/b/big_place_{number}" for number in range(394))]
    return paths, ("abbey", "apartment building outdoor", "apse indoor", *(f"big place {n}" for n in range(394)))


def write_sun397(root: Path, labels: Labels = LABELS) -> Answers:
    """The first partition."""
    paths, names = sun_classes()
    images = [f"{paths[label]}/sun_a{number}.jpg" for number, label in enumerate((*labels, 1, 2))]
    write_lines(root / "SUN397/ClassName.txt", paths)
    write_lines(root / "Testing_01.txt", images)
    numbers = write_photos(root / "SUN397", [image.lstrip("/") for image in images])
    return Answers(numbers, (*labels, 1, 2), names, "Testing_01")


def write_sun397_whole(root: Path) -> Answers:
    """Without the partition: an image a class, in SUN397 itself."""
    paths, names = sun_classes()
    write_lines(root / "ClassName.txt", paths)
    numbers = write_photos(root, [f"{path.lstrip('/')}/sun_x.jpg" for path in paths])
    return Answers(numbers, tuple(range(397)), names, "all")


def write_dtd(root: Path) -> Answers:
    spelled = [f"kind-{number:02}" for number in range(47)]
    labels = (*reversed(range(47)), 3)
    images = [f"{spelled[label]}/{spelled[label]}_{number:04}.jpg" for number, label in enumerate(labels)]
    write_lines(root / "dtd/labels/test1.txt", images)
    write_lines(root / "dtd/labels/test2.txt", images[:1])
    return Answers(write_photos(root / "dtd/images", images), labels, tuple(spelled), "test1")


def write_caltech101(root: Path) -> Answers:
    names = tuple(published()["caltech101"]["classes"])
    images = [f"{folder}/image_0001.jpg" for folder in caltech_folders()]
    numbers = write_photos(root / "caltech101/101_ObjectCategories", images)
    (root / "caltech101/101_ObjectCategories/ant/._image_0001.jpg").write_bytes(b"of a Mac")
    return Answers(numbers, tuple(range(102)), names, "all")


def write_caltech101_without_background(root: Path) -> Answers:
    names = tuple(published()["caltech101"]["classes"][1:])
    images = [f"{folder}/image_0001.jpg" for folder in caltech_folders()[1:]]
    return Answers(write_photos(root / "101_ObjectCategories", images), tuple(range(101)), names, "all")


def write_aircraft(root: Path, labels: Labels = LABELS) -> Answers:
    variants = tuple(f"{700 + number}-A {number}" for number in range(100))
    data = root / "fgvc-aircraft-2013b/data"
    write_lines(data / "variants.txt", variants)
    images = [f"{1514520 + number}" for number in range(len(labels))]
    lines = [f"{image} {variants[label]}" for image, label in zip(images, labels, strict=True)]
    write_lines(data / "images_variant_test.txt", lines)
    return Answers(write_photos(data / "images", [f"{image}.jpg" for image in images]), labels, variants)


def write_pets(root: Path, labels: Labels = LABELS) -> Answers:
    names = tuple(published()["oxford_pets"]["classes"])
    images, lines = [], []
    for number, label in enumerate(labels):
        breed = names[label].replace(" ", "_")
        images.append(f"{breed if label % 3 == 0 else breed.lower()}_{number + 1}")
        lines.append(f"{images[-1]} {label + 1} 2 {number}")
    write_lines(root / "oxford-iiit-pet/annotations/test.txt", lines)
    numbers = write_photos(root / "oxford-iiit-pet/images", [f"{image}.jpg" for image in images])
    return Answers(numbers, labels, names)


def write_cars(root: Path, labels: Labels = LABELS) -> Answers:
    names = tuple(f"Make {number} Coupé 2012" for number in range(196))
    folder = root / "stanford_cars"
    images = [f"{number + 1:05}.jpg" for number in range(len(labels))]
    corners = {"bbox_x1": 39.0, "bbox_y1": 116.0, "bbox_x2": 569.0, "bbox_y2": 375.0}
    rows = [corners | {"class": float(label + 1), "fname": image} for image, label in zip(images, labels, strict=True)]
    write_mat(folder / "devkit/cars_meta.mat", class_names=list(names))
    write_mat(folder / "cars_test_annos_withlabels.mat", annotations=rows)
    return Answers(write_photos(folder / "cars_test", images), labels, names)


def write_flowers(root: Path, labels: Labels = LABELS) -> Answers:
    shown = (3, 1, 8, 5, 6)
    table = np.full((1, 8), 90.0)
    table[0, [image - 1 for image in shown]] = [label + 1 for label in labels]
    write_mat(root / "flowers-102/imagelabels.mat", labels=table)
    ids = {"trnid": np.array([[2.0]]), "valid": np.array([[4.0]]), "tstid": np.array([shown], dtype=np.float64)}
    write_mat(root / "flowers-102/setid.mat", **ids)
    numbers = write_photos(root / "flowers-102/jpg", [f"image_{image:05}.jpg" for image in shown])
    return Answers(numbers, labels, tuple(published()["flowers102"]["classes"]))


def imagenet() -> tuple[list[str], tuple[str, ...]]:
    return published()["imagenet"]["synsets"], tuple(published()["imagenet"]["classes"])


def write_imagenet(root: Path) -> Answers:
    """Class folders, an image each and in the last two."""
    synsets, names = imagenet()
    images = [f"{one}/ILSVRC2012_val_{number:08}.JPEG" for number, one in enumerate(synsets)]
    images.append(f"{synsets[-1]}/ILSVRC2012_val_00009999.JPEG")
    return Answers(write_photos(root / "val", images), (*range(1000), 999), names, "val")


def write_imagenet_of_kaggle(root: Path, labels: Labels = LABELS) -> Answers:
    synsets, names = imagenet()
    images = [f"ILSVRC2012_val_{number + 1:08}" for number in range(len(labels))]
    rows = [f"{one},{synsets[label]} 1 2 3 4 {synsets[0]} 5 6 7 8" for one, label in zip(images, labels, strict=True)]
    write_lines(root / "LOC_val_solution.csv", ["ImageId,PredictionString", *rows[::-1]])
    numbers = write_photos(root / "ILSVRC/Data/CLS-LOC/val", [f"{one}.JPEG" for one in images])
    return Answers(numbers, labels, names, "val")


def write_imagenet_with_devkit(root: Path, labels: Labels = LABELS) -> Answers:
    """The devkit numbers classes in an order of its own."""
    synsets, names = imagenet()
    data = root / "ILSVRC2012_devkit_t12/data"
    own = [*synsets[::-1], "n00001740"]  # the last is not a class but one above them
    rows = [
        {"ILSVRC2012_ID": float(number), "WNID": one, "words": one, "children": np.zeros((0, 0))}
        for number, one in enumerate(own, 1)
    ]
    write_mat(data / "meta.mat", synsets=rows)
    write_lines(data / "ILSVRC2012_validation_ground_truth.txt", [f"{1000 - label}" for label in labels])
    images = [f"ILSVRC2012_val_{number + 1:08}.JPEG" for number in range(len(labels))]
    return Answers(write_photos(root / "val", images), labels, names, "val")


# Layout -> the set's name, and who writes it; where a list names the images, their labels can be chosen.
LAYOUTS: dict[str, tuple[str, Callable[..., Answers]]] = {
    "food101": ("food101", write_food101),
    "cifar10 python": ("cifar10", write_cifar10),
    "cifar10 binary": ("cifar10", write_cifar10_binary),
    "cifar100 python": ("cifar100", write_cifar100),
    "cifar100 binary": ("cifar100", write_cifar100_binary),
    "cifar100 of today": ("cifar100", write_cifar100_of_today),
    "sun397": ("sun397", write_sun397),
    "sun397 without a partition": ("sun397", write_sun397_whole),
    "stanford_cars": ("stanford_cars", write_cars),
    "fgvc_aircraft": ("fgvc_aircraft", write_aircraft),
    "dtd": ("dtd", write_dtd),
    "dtd of torchvision": ("dtd", lambda root: write_dtd(root / "dtd")),
    "oxford_pets": ("oxford_pets", write_pets),
    "flowers102": ("flowers102", write_flowers),
    "caltech101": ("caltech101", write_caltech101),
    "caltech101 without a background": ("caltech101", write_caltech101_without_background),
    "imagenet of Kaggle": ("imagenet", write_imagenet_of_kaggle),
    "imagenet with the devkit": ("imagenet", write_imagenet_with_devkit),
    "imagenet": ("imagenet", write_imagenet),
}
