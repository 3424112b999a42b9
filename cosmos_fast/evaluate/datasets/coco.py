"""COCO captions: val2017 with all its captions, as published, and the test split of Karpathy and Fei-Fei over val2014.

COCO 2017 has 5,000 images with 25,014 captions, Karpathy's split 5,000 with 25,010: most images have five, a few
six or seven. All of them are evaluated.
"""

from __future__ import annotations

from pathlib import Path

from cosmos_fast.evaluate.datasets import karpathy, wds
from cosmos_fast.evaluate.datasets.layout import read_json, required
from cosmos_fast.evaluate.datasets.pairs import file_pairs, first_twice, rows
from cosmos_fast.evaluate.datasets.sets import Reader, RetrievalSet
from cosmos_fast.utils.errors import UserError

_LAYOUT = """\
ROOT/annotations/captions_val2017.json   annotations_trainval2017.zip
ROOT/val2017/000000000139.jpg ...        val2017.zip (or ROOT/images/val2017)
CLIP-benchmark's wds_mscoco_captions2017 is read too: `cosmos-fast eval sets wds`.
"""
_KARPATHY_LAYOUT = """\
ROOT/dataset_coco.json                   caption_datasets.zip; its images of split "test"
ROOT/val2014/COCO_val2014_....jpg        val2014.zip (or ROOT/images/val2014)
CLIP-benchmark's wds_mscoco_captions is read too: `cosmos-fast eval sets wds`.
"""


def open_coco(root: Path) -> RetrievalSet:
    """COCO 2017 val. UserError: see `file_pairs`; an id given twice, a caption of an image that is not listed."""
    name = "coco"
    if wds.is_one(root):
        return wds.open_retrieval(root, name)
    path = required(name, root, "annotations/captions_val2017.json", "captions_val2017.json")
    folder = required(name, root, "val2017", "images/val2017")
    content = read_json(name, path)
    images = rows(name, path, content, "images", id=int, file_name=str)
    notes = rows(name, path, content, "annotations", id=int, image_id=int, caption=str)
    for kind, entries in (("image", images), ("annotation", notes)):
        twice = first_twice([entry["id"] for entry in entries])
        if twice is not None:
            raise UserError(f"{name}: {path}: two {kind}s have the id {twice}: give the annotations as published")
    captions: dict[int, list[str]] = {image["id"]: [] for image in images}
    for note in sorted(notes, key=lambda note: note["id"]):
        if note["image_id"] not in captions:
            raise UserError(
                f"{name}: {path}: annotation {note['id']} is of image {note['image_id']}, which is not listed: give "
                "the annotations as published"
            )
        captions[note["image_id"]].append(note["caption"])
    ordered = sorted(images, key=lambda image: image["id"])
    pairs = [(image["file_name"], captions[image["id"]]) for image in ordered]
    return file_pairs(name, "val2017", path, folder, pairs)


def open_karpathy(root: Path) -> RetrievalSet:
    """Karpathy's 5,000 test images, which lie in val2014. UserError as `karpathy.read`."""
    name = "coco_karpathy"
    if wds.is_one(root):
        return wds.open_retrieval(root, name)
    path = required(name, root, "dataset_coco.json", "annotations/dataset_coco.json", "dataset.json")
    folder = required(name, root, "val2014", "images/val2014").parent  # the JSON names val2014 itself
    return file_pairs(name, "test", path, folder, karpathy.read(name, path, "test"))


READERS = (
    Reader(name="coco", task="retrieval", title="COCO 2017 val, all captions", layout=_LAYOUT, open=open_coco),
    Reader(
        name="coco_karpathy",
        task="retrieval",
        title="COCO 2014, Karpathy's 5,000 test images, all captions",
        layout=_KARPATHY_LAYOUT,
        open=open_karpathy,
    ),
)
