"""A wrong or partial copy of a caption set is told in one line that says where."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from cosmos_fast.evaluate.datasets import wds
from cosmos_fast.utils.errors import UserError
from tests.benchmark_folders.caption_layouts import LAYOUTS, Open
from tests.benchmark_folders.captions import write_pictures, write_wds
from tests.shards import picture, write_tar


def edit(path: str, change: Callable[[dict], object]) -> Callable[[Path], object]:
    """Change a JSON file of a layout."""

    def breaks(root: Path) -> None:
        content = json.loads((root / path).read_text())
        change(content)
        (root / path).write_text(json.dumps(content))

    return breaks


def text(path: str, content: str) -> Callable[[Path], object]:
    return lambda root: (root / path).write_text(content)


def without(path: str) -> Callable[[Path], object]:
    return lambda root: (root / path).unlink()


def cut(path: str, size: int) -> Callable[[Path], object]:
    """The first bytes of a file are left, or all but so many where size is negative."""
    return lambda root: (root / path).write_bytes((root / path).read_bytes()[:size])


def shard(members: dict[str, bytes]) -> Callable[[Path], object]:
    return lambda root: write_tar(root / "test/1.tar", members)


def moved(path: str, to: str) -> Callable[[Path], object]:
    return lambda root: (root / path).rename(root / to)


NOTES = "annotations/captions_val2017.json"
COCO, FLICKR, LIST, TABLE = "coco", "flickr30k by Karpathy's JSON", "flickr30k by CLIP-benchmark's list", "captions.csv"
HUB, BESIDE, MAP, ROWS, WDS = (
    "flickr30k by the hub's table",
    "texts beside images",
    "captions.json",
    "metadata.jsonl",
    "webdataset",
)
GOOD = {"k.jpg": picture(1), "k.txt": b"one"}


def too_large() -> bytes:
    stream = io.BytesIO()
    Image.new("1", (8000, 7000)).save(stream, "PNG")
    return stream.getvalue()


MISTAKES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no annotations": (COCO, without(NOTES), f"{{root}}/{NOTES} is missing"),
    "no folder of images": (COCO, moved("val2017", "train2017"), "{root}/val2017 is missing"),
    "an image that is not there": (COCO, without("val2017/000000000103.jpg"), "000000000103.jpg is missing (1 of 6"),
    "annotations cut off": (COCO, cut(NOTES, 500), "captions_val2017.json is no JSON"),
    "annotations nested without end": (COCO, text(NOTES, "[" * 200_000), "captions_val2017.json is no JSON"),
    "annotations in another encoding": (
        COCO,
        lambda root: (root / NOTES).write_bytes(b'{"a": "\xff"}'),
        "cannot be read",
    ),
    "instances instead of captions": (
        COCO,
        edit(NOTES, lambda c: c["annotations"][2].pop("caption")),
        "annotations[2] has no 'caption' that is text",
    ),
    "a list instead of an object": (COCO, text(NOTES, "[1]"), "has no list 'images'"),
    "an image without a caption": (
        COCO,
        edit(NOTES, lambda c: c.update(annotations=[n for n in c["annotations"] if n["image_id"] != 102])),
        "image 000000000102.jpg has no caption",
    ),
    "an empty caption": (
        COCO,
        edit(NOTES, lambda c: c["annotations"][0].update(caption=" \n")),
        "has an empty caption",
    ),
    "a caption of an unknown image": (
        COCO,
        edit(NOTES, lambda c: c["annotations"][0].update(image_id=7)),
        "is of image 7, which is not listed",
    ),
    "an image id twice": (COCO, edit(NOTES, lambda c: c["images"][1].update(id=105)), "two images have the id 105"),
    "an annotation id twice": (
        COCO,
        edit(NOTES, lambda c: c["annotations"].append(c["annotations"][3])),
        "two annotations have the id",
    ),
    "one file of two ids": (
        COCO,
        edit(NOTES, lambda c: c["images"][1].update(file_name="000000000105.jpg")),
        "000000000105.jpg twice",
    ),
    "a path out of the folder": (
        COCO,
        edit(NOTES, lambda c: c["images"][0].update(file_name="../val2017/000000000105.jpg")),
        "give paths below",
    ),
    "an absolute path": (
        COCO,
        edit(NOTES, lambda c: c["images"][0].update(file_name="/etc/passwd")),
        "give paths below",
    ),
    "a path that no disk has": (
        COCO,
        edit(NOTES, lambda c: c["images"][0].update(file_name="a" * 300)),
        "a" * 300 + " is missing (1 of 6",
    ),
    "a path of two lines": (COCO, edit(NOTES, lambda c: c["images"][0].update(file_name="1\n2.jpg")), "'1\\n2.jpg'"),
    "half a surrogate pair": (
        COCO,
        edit(NOTES, lambda c: c["annotations"][0].update(caption="a \ud800 b")),
        "or a caption of it is no Unicode text",
    ),
    "no image at all": (COCO, text(NOTES, '{"images": [], "annotations": []}'), "holds no image of val2017"),
    "no such folder": (FLICKR, lambda root: root.rename(root.parent / "away"), "{root} does not exist"),
    "no split": (FLICKR, without("dataset_flickr30k.json"), "{root}/dataset_flickr30k.json is missing"),
    "no images": (FLICKR, moved("flickr30k-images", "pictures"), "{root}/flickr30k-images is missing"),
    "nothing in the split": (
        FLICKR,
        edit("dataset_flickr30k.json", lambda c: [i.update(split="val") for i in c["images"]]),
        "holds no image of test",
    ),
    "a sentence without text": (
        FLICKR,
        edit("dataset_flickr30k.json", lambda c: c["images"][1]["sentences"][0].pop("raw")),
        "without 'raw'",
    ),
    "no comma": (
        LIST,
        text("flickr30k_test_karpathy.txt", "image,caption\n1007129816.jpg\n"),
        "line 2 is not image,caption",
    ),
    "a raw that is no list": (
        HUB,
        text("flickr_annotations_30k.csv", "raw,split,filename\na cat,test,1.jpg\n"),
        "line 2 has not the columns raw",
    ),
    "a row that is too long": (
        TABLE,
        text("captions.csv", "image,caption\na/0.jpg,one,two\n"),
        "line 2 has not the 2 columns",
    ),
    "columns of other names": (TABLE, text("captions.csv", "picture,words\na/0.jpg,one\n"), "line 2 has not one image"),
    "an open quote": (TABLE, text("captions.csv", 'image,caption\na/0.jpg,"one\n'), "is no row of a table"),
    "a number as a caption": (MAP, text("captions.json", '{"a/0.jpg": 3}'), "entry 'a/0.jpg' has not one image"),
    "a list without a caption": (MAP, text("captions.json", '{"a/0.jpg": []}'), "image a/0.jpg has no caption"),
    "a caption of a missing image": (MAP, text("captions.json", '{"a/9.jpg": "nine"}'), "{root}/a/9.jpg is missing"),
    "a line that is no JSON": (
        ROWS,
        text("metadata.jsonl", '{"file_name": "a/0.jpg", "text": "t"}\n{"fi\n'),
        "line 2 is no JSON",
    ),
    "a broken image": (BESIDE, cut("a/0.jpg", 300), "{root}/a/0.jpg is broken (not an image: "),
    "an image over the cap": (
        BESIDE,
        lambda root: (root / "a/1.png").write_bytes(too_large()),
        "{root}/a/1.png is too large (8000 x 7000, the cap is 50000000): make it smaller",
    ),
    "shards beside texts": (
        BESIDE,
        lambda root: write_tar(root / "0.tar", GOOD),
        "{root} holds shards, and a/0.jpg with its a/0.txt: take one",
    ),
    "an image without a text": (BESIDE, without("b/c/3.txt"), "{root}/b/c/3.txt is missing"),
    "a text without lines": (BESIDE, text("d.txt", "\n \n"), "image d.JPG has no caption"),
    "a text without an image": (BESIDE, text("b/README.txt", "hello"), "{root}/b/README.txt has no image beside it"),
    "two images and one text": (BESIDE, lambda root: write_pictures(root, ["a/0.png"]), "are of one name"),
    "links that go in circles": (
        BESIDE,
        lambda root: (root / "b/up").symlink_to(root),
        "b/up is reached a second time",
    ),
    "a folder without images": (
        BESIDE,
        lambda root: [p.unlink() for p in root.rglob("*.*")],
        "{root}/captions.json is missing",
    ),
    "a shard that is not there": (WDS, without("test/1.tar"), "{root}/test/1.tar is missing"),
    "a shard cut off": (WDS, cut("test/1.tar", 2000), "truncated shard: 1.tar"),
    "a shard without its end": (WDS, cut("test/1.tar", -9000), "truncated shard: 1.tar"),
    "one shard too many": (
        WDS,
        lambda root: write_tar(root / "test/2.tar", GOOD),
        "holds 3 shards, nshards.txt says 2",
    ),
    "no number of shards": (WDS, text("test/nshards.txt", "two"), "holds 'two', not the number of shards"),
    "a huge number of shards": (WDS, text("test/nshards.txt", "9" * 5000), "not the number of shards"),
    "a sample without a text": (WDS, shard({"k.jpg": picture(1)}), "1.tar:k has no .txt"),
    "a sample without an image": (WDS, shard({"k.txt": b"one"}), "1.tar:k has no image"),
    "a sample with an empty text": (WDS, shard({"k.jpg": picture(1), "k.txt": b"\n"}), "image 1.tar:k has no caption"),
    "a record without captions": (WDS, shard({"k.jpg": picture(1), "k.json": b"{}"}), "1.tar:k.json: missing or empty"),
    "a member given twice": (WDS, shard({**GOOD, "./k.txt": b"two"}), "duplicate member: 1.tar:k"),
    "a text in another encoding": (WDS, shard({"k.jpg": picture(1), "k.txt": b"\xff"}), "1.tar:k.txt cannot be read"),
    "a broken image in a shard": (
        WDS,
        shard({"k.jpg": picture(1)[:200], "k.txt": b"one"}),
        "wds: 1.tar:k: not an image: ",
    ),
    "an image over the cap in a shard": (
        WDS,
        shard({"k.png": too_large(), "k.txt": b"one"}),
        "wds: 1.tar:k is too large (8000 x 7000, ",
    ),
    "multilabel shards": (WDS, text("dataset_type.txt", "multilabel"), "says 'multilabel'"),
    "classes in the place of captions": (
        "flickr30k as webdataset",
        text("dataset_type.txt", "classification"),
        "flickr30k",
    ),
}


def read_all(open_it: Open, root: Path) -> None:
    found = open_it(root)
    for number in range(len(found.images)):
        found.images.image(number)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_or_partial_copy_is_told_in_one_line(tmp_path: Path, mistake: str) -> None:
    layout, breaks, message = MISTAKES[mistake]
    write, open_it, _ = LAYOUTS[layout]
    root = write(tmp_path / "set")
    breaks(root)
    with pytest.raises(UserError) as error:
        read_all(open_it, root)
    assert message.format(root=root) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 800


CLASS_MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no names": (without("classnames.txt"), "{root}/classnames.txt is missing"),
    "no templates": (
        without("zeroshot_classification_templates.txt"),
        "zeroshot_classification_templates.txt is missing",
    ),
    "a template without a place": (
        text("zeroshot_classification_templates.txt", "a {c}\na photo\n"),
        "'a photo' has no {{c}}",
    ),
    "too few names": (text("classnames.txt", "tench\nshark\n"), "0.tar:s0000002 is of class '2', not one of 0 to 1"),
    "no names in the file": (text("classnames.txt", "\n"), "need a line each at least"),
    "a label that is a name": (shard({"k.jpg": picture(1), "k.cls": b"tench"}), "1.tar:k is of class 'tench'"),
    "a label below zero": (shard({"k.jpg": picture(1), "k.cls": b"-1"}), "1.tar:k is of class '-1'"),
    "a label of many digits": (shard({"k.jpg": picture(1), "k.cls": b"1" * 5000}), "1.tar:k is of class '1111"),
    "captions": (text("dataset_type.txt", "retrieval"), "0.tar:s0000000 has no .txt"),
}


@pytest.mark.parametrize("mistake", CLASS_MISTAKES)
def test_wrong_classes_of_a_webdataset_are_told_in_one_line(tmp_path: Path, mistake: str) -> None:
    breaks, message = CLASS_MISTAKES[mistake]
    root = write_wds(tmp_path / "set", "classification")
    (root / "dataset_type.txt").write_text("classification")
    breaks(root)
    with pytest.raises(UserError) as error:
        wds.open_wds(root)
    assert message.format(root=root) in str(error.value)
    assert "\n" not in str(error.value)
