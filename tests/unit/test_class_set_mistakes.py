"""A wrong or partial copy of a classification set is told in one line that says where."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from cosmos_fast.evaluate.datasets.registry import open_set
from cosmos_fast.utils.errors import UserError
from tests.benchmark_folders.answers import write_lines
from tests.benchmark_folders.breaks import Break, cut, data, moved, replaced, text, without
from tests.benchmark_folders.cifar_archives import old_array, old_list, old_pickle
from tests.benchmark_folders.classes import LAYOUTS
from tests.benchmark_folders.matlab import write_mat


class Harmful:
    """A pickle of it makes a folder when it is loaded."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("harm",)


def mat(path: str, **variables: object) -> Break:
    return lambda root: write_mat(root / path, **variables)


def batch(labels: bytes, pixels: np.ndarray, **more: bytes) -> Break:
    content = old_pickle(labels=labels, data=old_array(pixels), **more)
    return data("cifar-10-batches-py/test_batch", content)


FOOD, CARS, PETS = "food-101", "stanford_cars", "oxford-iiit-pet"
VAL = "val/ILSVRC2012_val_00000003.JPEG"
FOUR = np.zeros((4, 3072), np.uint8)
# What is spoilt: the layout, how, and what the message says.
MISTAKES: dict[str, tuple[str, Break, str]] = {
    "food101: no list": ("food101", without(f"{FOOD}/meta/test.txt"), "{root}/food-101/meta/test.txt is missing"),
    "food101: no names": (
        "food101",
        without(f"{FOOD}/meta/classes.txt"),
        "{root}/food-101/meta/classes.txt is missing",
    ),
    "food101: an image is missing": (
        "food101",
        without(f"{FOOD}/images/dish_000/1001.jpg"),
        "{root}/food-101/images/dish_000/1001.jpg is missing (1 of 5 files are)",
    ),
    "food101: an image is cut off": ("food101", cut(f"{FOOD}/images/dish_000/1001.jpg", 300), "1001.jpg is broken"),
    "food101: an image is none": ("food101", text(f"{FOOD}/images/dish_000/1001.jpg", "x"), "1001.jpg is broken"),
    "food101: a class short": (
        "food101",
        replaced(f"{FOOD}/meta/classes.txt", "dish_050\n", ""),
        "classes.txt holds 100 lines, not 101",
    ),
    "food101: a class that is not listed": (
        "food101",
        replaced(f"{FOOD}/meta/classes.txt", "dish_036", "dish"),
        "test.txt uses the class 'dish_036', which is not listed",
    ),
    "food101: a list of nothing": ("food101", text(f"{FOOD}/meta/test.txt", "\n"), "holds 0 lines"),
    "food101: no text": ("food101", data(f"{FOOD}/meta/test.txt", b"\xff\xfe\x00"), "test.txt cannot be read"),
    "food101: twice": (
        "food101",
        text(f"{FOOD}/meta/test.txt", "dish_000/1001\n" * 2),
        "names the image dish_000/1001.jpg twice",
    ),
    "food101: outside": (
        "food101",
        lambda root: (
            write_lines(root / f"{FOOD}/meta/classes.txt", ["../../x", *(f"a{n}" for n in range(100))]),
            write_lines(root / f"{FOOD}/meta/test.txt", ["../../x/1"]),
        ),
        "names the image '../../x/1.jpg': give paths below",
    ),
    "sun397: no names": ("sun397", without("SUN397/ClassName.txt"), "{root}/SUN397/ClassName.txt is missing"),
    "sun397: another partition": ("sun397", text("Testing_01.txt", "/a/road/sun_1.jpg\n"), "uses the class 'a/road'"),
    "sun397: a folder is missing": (
        "sun397 without a partition",
        moved("b/big_place_7", "b/other"),
        "{root}/b/big_place_7 is missing",
    ),
    "sun397: a folder is empty": (
        "sun397 without a partition",
        without("b/big_place_7/sun_x.jpg"),
        "{root}/b/big_place_7 holds no image",
    ),
    "dtd: no list": ("dtd", without("dtd/labels/test1.txt"), "{root}/dtd/labels/test1.txt is missing"),
    "dtd: a class short": (
        "dtd",
        replaced("dtd/labels/test1.txt", "kind-05/kind-05_0041.jpg\n", ""),
        "names images of 46 classes, not 47",
    ),
    "caltech101: another folder": (
        "caltech101",
        moved("caltech101/101_ObjectCategories", "caltech101/images"),
        "{root}/caltech101/101_ObjectCategories/yin_yang is missing",
    ),
    "caltech101: a folder is missing": (
        "caltech101",
        moved("caltech101/101_ObjectCategories/emu", "emu"),
        "{root}/caltech101/101_ObjectCategories/emu is missing",
    ),
    "aircraft: no variants": (
        "fgvc_aircraft",
        without("fgvc-aircraft-2013b/data/variants.txt"),
        "{root}/fgvc-aircraft-2013b/data/variants.txt is missing",
    ),
    "aircraft: no variant behind an image": (
        "fgvc_aircraft",
        text("fgvc-aircraft-2013b/data/images_variant_test.txt", "1514520\n"),
        "images_variant_test.txt uses the class ''",
    ),
    "pets: no list": (
        "oxford_pets",
        without(f"{PETS}/annotations/test.txt"),
        "{root}/oxford-iiit-pet/annotations/test.txt is missing",
    ),
    "pets: an image of another class": (
        "oxford_pets",
        replaced(f"{PETS}/annotations/test.txt", "beagle_1 5", "beagle_1 6"),
        "uses the class 'beagle 6'",
    ),
    "pets: no number": ("oxford_pets", text(f"{PETS}/annotations/test.txt", "beagle_1\n"), "uses the class 'beagle '"),
    "cars: no names": (
        "stanford_cars",
        without(f"{CARS}/devkit/cars_meta.mat"),
        "{root}/stanford_cars/devkit/cars_meta.mat",
    ),
    "cars: a name short": (
        "stanford_cars",
        mat(f"{CARS}/devkit/cars_meta.mat", class_names=["A"] * 195),
        "cars_meta.mat names 195 classes, not 196",
    ),
    "cars: cut off": ("stanford_cars", cut(f"{CARS}/devkit/cars_meta.mat", -9), "cars_meta.mat cannot be read (it is"),
    "cars: no MATLAB file": ("stanford_cars", text(f"{CARS}/devkit/cars_meta.mat", "x"), "it is no MATLAB file"),
    "cars: the names of something else": (
        "stanford_cars",
        mat(f"{CARS}/devkit/cars_meta.mat", names=["A"] * 196),
        "cars_meta.mat has no 'class_names'",
    ),
    "cars: without labels": (
        "stanford_cars",
        mat(f"{CARS}/cars_test_annos_withlabels.mat", annotations=[{"fname": "00001.jpg"}]),
        "has an image without fname or class",
    ),
    "cars: no class of that number": (
        "stanford_cars",
        mat(f"{CARS}/cars_test_annos_withlabels.mat", annotations=[{"class": 197.0, "fname": "00001.jpg"}]),
        "has a class that is not one of 1 to 196",
    ),
    "flowers: no split": ("flowers102", without("flowers-102/setid.mat"), "{root}/flowers-102/setid.mat is missing"),
    "flowers: an image of no number": (
        "flowers102",
        mat("flowers-102/setid.mat", tstid=np.array([[9.0]])),
        "names the image 9, not one of 1 to 8",
    ),
    "flowers: class 0": (
        "flowers102",
        mat("flowers-102/imagelabels.mat", labels=np.zeros((1, 8))),
        "has a class that is not one of 1 to 102",
    ),
    "cifar: neither archive": (
        "cifar10 binary",
        moved("cifar-10-batches-bin", "cifar"),
        "{root}/cifar-10-batches-py/test_batch is missing",
    ),
    "cifar: no images": (
        "cifar100 binary",
        without("cifar-100-binary/test.bin"),
        "{root}/cifar-100-binary/test.bin is missing",
    ),
    "cifar: cut off": ("cifar10 binary", cut("cifar-10-batches-bin/test_batch.bin", -1), "is cut off (12291 bytes)"),
    "cifar: nothing": ("cifar10 binary", cut("cifar-10-batches-bin/test_batch.bin", 0), "is cut off (0 bytes)"),
    "cifar: a label too high": (
        "cifar10 binary",
        data("cifar-10-batches-bin/test_batch.bin", bytes([10]) + bytes(3072)),
        "holds a label outside 0 to 9",
    ),
    "cifar: names of the other": (
        "cifar10 binary",
        text("cifar-10-batches-bin/batches.meta.txt", "a\nb\n"),
        "names 2 classes, not 10",
    ),
    "cifar: a cut pickle": ("cifar10 python", cut("cifar-10-batches-py/test_batch", -1), "cannot be read"),
    "cifar: a pickle that runs code": (
        "cifar10 python",
        data("cifar-10-batches-py/test_batch", pickle.dumps({"labels": [1], "data": Harmful()})),
        "it wants to run posix.mkdir, which is never done",
    ),
    "cifar: a pickle of something else": (
        "cifar10 python",
        data("cifar-10-batches-py/test_batch", pickle.dumps([1])),
        "test_batch has no 'labels'",
    ),
    "cifar: a label too few": ("cifar10 python", batch(old_list([1, 2, 3]), FOUR), "(4, 3072) numbers for 3 labels"),
    "cifar: pixels of another size": (
        "cifar10 python",
        batch(old_list([1]), FOUR[:1, :9]),
        "(1, 9) numbers for 1 labels",
    ),
    "cifar: labels that are names": ("cifar10 python", batch(old_list([b"a"]), FOUR[:1]), "labels of another kind"),
    "cifar: no list of labels": ("cifar10 python", batch(b"K\x01", FOUR), "no array with a list of labels"),
    "imagenet: nothing": ("imagenet of Kaggle", moved("ILSVRC", "x"), "{root}/val is missing"),
    "imagenet: no list": (
        "imagenet of Kaggle",
        without("LOC_val_solution.csv"),
        "{root}/ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt is missing",
    ),
    "imagenet: another list": (
        "imagenet of Kaggle",
        replaced("LOC_val_solution.csv", "ImageId", "Image"),
        "has no columns ImageId and PredictionString",
    ),
    "imagenet: no class": (
        "imagenet of Kaggle",
        replaced("LOC_val_solution.csv", ",n01440764", ",n99999999"),
        "uses the class 'n99999999'",
    ),
    "imagenet: an image is missing": (
        "imagenet with the devkit",
        without(VAL),
        "{root}/" + VAL + " is missing (1 of 5",
    ),
    "imagenet: no table": (
        "imagenet with the devkit",
        without("ILSVRC2012_devkit_t12/data/meta.mat"),
        "meta.mat cannot be read",
    ),
    "imagenet: a number of no class": (
        "imagenet with the devkit",
        text("ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", "1001\n"),
        "uses the class 'n00001740'",
    ),
    "imagenet: a number of nothing": (
        "imagenet with the devkit",
        text("ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", "2000\n"),
        "uses the class 'of number 2000'",
    ),
}


def read_all(name: str, root: Path) -> None:
    found = open_set(name, root)
    for number in range(len(found.images)):
        found.images.image(number)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_or_partial_copy_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    layout, breaks, message = MISTAKES[mistake]
    name, write = LAYOUTS[layout]
    root = tmp_path / "set"
    write(root)
    breaks(root)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        read_all(name, root)
    assert message.format(root=root) in str(error.value)
    assert str(error.value).startswith(f"{name}: ")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("name", sorted({name for name, _ in LAYOUTS.values()}))
def test_a_folder_that_is_not_there_or_holds_something_else_is_told_with_a_hint(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="does not exist: give the folder of the unpacked data set"):
        open_set(name, tmp_path / "none")
    with pytest.raises(UserError, match=rf"{tmp_path}/.* is missing: `cosmos-fast eval sets {name}` prints"):
        open_set(name, tmp_path)


def test_a_class_of_imagenet_without_a_folder_or_an_image_is_named(tmp_path: Path) -> None:
    LAYOUTS["imagenet"][1](tmp_path)
    folder = tmp_path / "val/n02123045"
    (image,) = folder.iterdir()
    image.unlink()
    with pytest.raises(UserError, match="val/n02123045 holds no image"):
        open_set("imagenet", tmp_path)
    folder.rmdir()
    with pytest.raises(UserError, match="val/n02123045 is missing"):
        open_set("imagenet", tmp_path)
