"""Readers of the eight segmentation sets: every layout and form, and what is missing or broken named in one line."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cosmos_fast.evaluate.datasets import class_map_files
from cosmos_fast.evaluate.datasets.registry import READERS, open_set
from cosmos_fast.evaluate.datasets.sets import SegmentationSet
from tests.benchmark_folders.class_maps import LAYOUTS, Layout

NAMES = ("voc21", "context60", "coco_object", "voc20", "cityscapes", "context59", "ade20k", "coco_stuff")


def opened(name: str, root: Path) -> SegmentationSet:
    found = open_set(name, root)
    assert isinstance(found, SegmentationSet)
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_read_as_it_was_written(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    found = opened(name, layout.write(tmp_path))
    assert (found.name, len(found.images)) == (name, 3)
    assert len(found.classes.classes) == layout.classes
    assert found.classes.classes[0] == layout.first
    assert found.background == (layout.first == "background")
    assert {len(wordings) for wordings in found.classes.prompts} == {1}
    assert {len(prompts) for wordings in found.classes.prompts for prompts in wordings} == {80}
    for number, one in enumerate(layout.ids):
        assert found.images.key(number) in layout.images.format(one)
        assert np.array_equal(found.truth(number), layout.truth(number))
        assert found.images.image(number).size == found.truth(number).shape[::-1]


@pytest.mark.parametrize("name", ["coco_object", "cityscapes", "ade20k", "coco_stuff"])
def test_hidden_files_are_neither_images_nor_maps(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    for path in (layout.images, layout.maps):
        for one in layout.ids:
            real = layout.write(tmp_path) / path.format(one)
            real.with_name(f"._{real.name}").write_bytes(b"what a Mac leaves behind")
    found = opened(name, tmp_path)
    assert [found.images.key(number) for number in range(3)] == [
        (tmp_path / layout.images.format(one)).relative_to(found.images.root).as_posix()  # type: ignore[attr-defined]
        for one in layout.ids
    ]


def test_forms_of_a_set_are_the_same_questions_and_the_more_complete_one_is_taken(tmp_path: Path) -> None:
    for name, form in (("coco_stuff", "coco_stuff:ids"), ("context59", "context59:mat")):
        one, two = (opened(name, LAYOUTS[which].write(tmp_path / which)) for which in (name, form))
        assert one.sha256 == two.sha256
    both = LAYOUTS["coco_stuff"].write(tmp_path / "coco_stuff:ids")
    assert np.array_equal(opened("coco_stuff", both).truth(0), LAYOUTS["coco_stuff"].truth(0))
    (both / "annotations/val2017/000000000285.png").unlink()
    assert np.array_equal(opened("coco_stuff", both).truth(0), LAYOUTS["coco_stuff:ids"].truth(0))


@pytest.mark.parametrize(("name", "folder"), [("voc21", "VOCdevkit"), ("voc21", "VOCdevkit/VOC2012")])
def test_the_outer_folders_may_be_left_out(name: str, folder: str, tmp_path: Path) -> None:
    LAYOUTS[name].write(tmp_path)
    assert opened(name, tmp_path / folder).sha256 == opened(name, tmp_path).sha256


def test_names_are_those_of_the_lists_in_words() -> None:
    lists = class_map_files.published()["classes"]
    assert {name: (len(one), one[0], one[-1]) for name, one in lists.items()} == {
        "voc": (21, "background", "tvmonitor"),
        "context": (59, "aeroplane", "wood"),
        "coco_stuff": (171, "person", "wood"),
        "cityscapes": (19, "road", "bicycle"),
        "ade20k": (150, "wall", "flag"),
    }
    for one in lists.values():
        words = [class_map_files.wording(name) for name in one]
        assert len(set(words)) == len(one)
        assert all(word.replace(" ", "").isalpha() and word == word.strip() for word in words)
    assert list(map(class_map_files.wording, ("pottedplant", "sky-other", "desk-stuff", "floor-wood"))) == [
        "potted plant",
        "sky",
        "desk",
        "floor wood",
    ]


def test_all_eight_are_registered_with_their_layout() -> None:
    known = [reader.name for reader in READERS.values() if reader.task == "segmentation"]
    assert known == list(NAMES)
    for name in NAMES:
        assert LAYOUTS[name].maps.format("").rsplit("/", 1)[0].rsplit("/", 1)[-1] in READERS[name].layout


def spoiled(layout: Layout, root: Path, which: str) -> None:
    """Something is wrong with the second picture."""
    map_path = layout.write(root) / layout.maps.format(layout.ids[1])
    image = Image.open(map_path) if map_path.suffix == ".png" else None
    out = io.BytesIO()
    if which == "truncated":
        map_path.write_bytes(map_path.read_bytes()[:-40])
    elif image is not None:
        values = np.array(image)
        if which == "number":
            values[3, 4] = 200
        changed = {
            "colours": image.convert("RGB"),
            "size": image.resize((20, 20)),
            "16 bits": Image.fromarray(values.astype(np.uint16)),
            "number": Image.fromarray(values),
        }[which]
        changed.save(out, "PNG")
        map_path.write_bytes(out.getvalue())


BROKEN = {
    "colours": ("voc21", "mode RGB"),
    "16 bits": ("ade20k", "not grey or palette of 8 bits"),
    "size": ("cityscapes", "it is 20 x 20, its image 24 x 37"),
    "number": ("coco_stuff", "class number 200, not one of COCO-Stuff's"),
    "truncated": ("context60:mat", "cut off"),
}


@pytest.mark.parametrize("which", BROKEN)
def test_a_broken_map_is_named_in_one_line(which: str, tmp_path: Path) -> None:
    name, message = BROKEN[which]
    layout = LAYOUTS[name]
    spoiled(layout, tmp_path, which)
    found = opened(name, tmp_path)
    found.truth(0)
    with pytest.raises(ValueError, match=message) as caught:
        found.truth(1)
    assert layout.maps.format(layout.ids[1]) in str(caught.value)
    assert "\n" not in str(caught.value)


MISSING = {
    "no folder": ("voc21", "", "does not exist"),
    "no list": ("voc21", "VOCdevkit/VOC2012/ImageSets", "ImageSets/Segmentation/val.txt is missing"),
    "no maps": ("voc20", "VOCdevkit/VOC2012/SegmentationClass", "SegmentationClass is missing"),
    "a map": ("voc21", "VOCdevkit/VOC2012/SegmentationClass/2007_000042.png", "2007_000042.png is missing (1 of 3"),
    "an image": ("ade20k", "ADEChallengeData2016/images/validation/ADE_val_00000002.jpg", "00000002.jpg is missing (1"),
    "no maps of either form": ("context59", "SegmentationClassContext", "SegmentationClassContext is missing"),
    "a .mat": ("context60:mat", "trainval/2008_000003.mat", "2008_000003.mat is missing (1 of 3"),
    "images of COCO": ("coco_object", "images", "images/val2017 is missing"),
    "a city": ("cityscapes", "gtFine/val/munster", "munster_000000_000019_gtFine_labelIds.png is missing (1 of 3"),
}


@pytest.mark.parametrize("what", MISSING)
def test_the_first_missing_path_is_named(what: str, tmp_path: Path) -> None:
    name, path, message = MISSING[what]
    gone = LAYOUTS[name].write(tmp_path / "set") / path
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    with pytest.raises(ValueError, match=f"{name.partition(':')[0]}: ") as caught:
        open_set(name, tmp_path / "set")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lists_without_images_or_with_one_twice(tmp_path: Path) -> None:
    layout = LAYOUTS["voc21"]
    listing = layout.write(tmp_path) / layout.lists
    listing.write_text("")
    with pytest.raises(ValueError, match="holds no image"):
        open_set("voc21", tmp_path)
    listing.write_text("2007_000033\n2007_000042\n2007_000033\n")
    with pytest.raises(ValueError, match="2007_000033 is listed twice"):
        open_set("voc21", tmp_path)
