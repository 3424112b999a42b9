"""Readers of caption sets, on miniatures of the published layouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cosmos_fast.data.images import decode
from cosmos_fast.evaluate.datasets import captions, coco, flickr30k, wds
from cosmos_fast.evaluate.datasets.sets import ClassificationSet, RetrievalSet
from tests import shards
from tests.benchmark_folders.caption_layouts import LAYOUTS
from tests.benchmark_folders.captions import (
    CAPTIONS,
    coco_json,
    expected,
    write_captions,
    write_coco,
    write_flickr30k,
    write_pictures,
    write_shards,
    write_wds,
)
from tests.shards import picture


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_its_images_with_all_their_captions(tmp_path: Path, layout: str) -> None:
    write, open_it, split = LAYOUTS[layout]
    found = open_it(write(tmp_path))
    assert isinstance(found, RetrievalSet)
    assert found.split == split
    assert found.captions == tuple(expected())
    assert len(found.images) == len(CAPTIONS)
    assert len({found.images.key(number) for number in range(len(CAPTIONS))}) == len(CAPTIONS)
    for number in range(len(CAPTIONS)):
        image = found.images.image(number)
        assert image.mode == "RGB"
        assert image.size == (24 + 8 * number, 40)
    first = found.images.image(0)
    assert first.tobytes() == decode(picture(0, 24, 40)).tobytes()


def test_the_digest_is_of_the_questions_and_not_of_the_file_that_asks_them(tmp_path: Path) -> None:
    of_flickr = []
    for form in ("json", "txt", "csv"):
        of_flickr.append(flickr30k.open_flickr30k(write_flickr30k(tmp_path / form, form)).sha256)
    assert len(set(of_flickr)) == 1
    root = write_coco(tmp_path / "coco")
    path = root / "annotations/captions_val2017.json"
    before = coco.open_coco(root).sha256
    content = coco_json()
    content["annotations"].reverse()
    path.write_text(json.dumps(content))
    assert coco.open_coco(root).sha256 == before
    content["annotations"][0]["caption"] += " indeed"
    path.write_text(json.dumps(content))
    assert coco.open_coco(root).sha256 != before


def test_captions_with_commas_are_read_with_quotes_and_without(tmp_path: Path) -> None:
    write_pictures(tmp_path / "flickr30k-images", ["1.jpg"])
    lines = ["image,caption", '1.jpg,"One, two"', "1.jpg,three, four", '1.jpg,"five ""six"""', ""]
    (tmp_path / "flickr30k_test_karpathy.txt").write_text("\r\n".join(lines))
    assert flickr30k.open_flickr30k(tmp_path).captions == (("One, two", "three, four", 'five "six"'),)


def test_a_list_may_repeat_an_image_and_call_its_columns_otherwise(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["x/1.jpg", "2.png"])
    (tmp_path / "captions.csv").write_text("filepath\ttitle\n2.png\ttwo\nx/1.jpg\tone, 1\n2.png\tzwei\n")
    found = captions.open_captions(tmp_path)
    assert [found.images.key(number) for number in range(2)] == ["2.png", "x/1.jpg"]
    assert found.captions == (("two", "zwei"), ("one, 1",))


def test_texts_beside_images_through_links_and_past_hidden_files(tmp_path: Path) -> None:
    root = write_captions(tmp_path / "set")
    (root / "d.txt").rename(root / "d.TXT")
    (root / "b").rename(tmp_path / "elsewhere")
    (root / "b").symlink_to(tmp_path / "elsewhere")
    write_pictures(root, [".trash/9.jpg"])
    (root / "a/._0.jpg").write_bytes(b"what a Mac leaves behind")
    (root / "checksums.md5").write_text("")
    assert captions.open_captions(root).captions == tuple(expected())


def test_texts_about_the_set_are_no_captions(tmp_path: Path) -> None:
    root = write_captions(tmp_path)
    for name in ("README.txt", "LICENSE.txt", "readme_v2.TXT"):
        (root / name).write_text("about")
    assert captions.open_captions(root).captions == tuple(expected())
    write_pictures(root, ["README.jpg"])
    assert captions.open_captions(root).captions == (("about",), *expected())


@pytest.mark.parametrize("layout", ["webdataset", "shards of one's own", "texts beside images"])
def test_hidden_files_are_no_shards(tmp_path: Path, layout: str) -> None:
    write, open_it, _ = LAYOUTS[layout]
    write(tmp_path)
    for place in (tmp_path, tmp_path / "test"):
        if place.is_dir():
            (place / "._0.tar").write_bytes(b"what a Mac leaves behind")
    found = open_it(tmp_path)
    assert isinstance(found, RetrievalSet)
    assert found.captions == tuple(expected())


def test_webdataset_classes_keep_their_numbers_where_names_repeat(tmp_path: Path) -> None:
    found = wds.open_wds(write_wds(tmp_path, "classification"))
    assert isinstance(found, ClassificationSet)
    assert found.labels == (0, 1, 2, 0, 1, 2)
    assert found.classes.classes == ("tench", "great white shark", "tench")
    assert found.classes.prompts[1] == (("a photo of a great white shark.", "the great white shark"),)
    assert found.images.image(5).size == (64, 40)
    before = found.sha256
    assert wds.open_classification(tmp_path, "wds", found.classes).sha256 == before
    write_shards(tmp_path / "test", "cls", list("012011"), "webp")
    assert wds.open_wds(tmp_path).sha256 != before


def test_shards_for_training_give_their_raw_captions(tmp_path: Path) -> None:
    found = captions.open_captions(shards.write_shards(tmp_path))
    assert found.captions == tuple((f"raw {number}",) for number in range(9))
    mixed = {"a.jpg": picture(1), "a.json": shards.record(1), "a.txt": b"one\ntwo"}
    shards.write_tar(tmp_path / "00001.tar", mixed)
    assert captions.open_captions(tmp_path).captions[5:] == (("one", "two"),)
