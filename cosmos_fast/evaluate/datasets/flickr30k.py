"""Flickr30k: the 1,000 test images of Karpathy and Fei-Fei's split, five captions each.

The images come as flickr30k-images.tar.gz from the publisher on request. The split is told by one of three files: the
authors' own JSON; the list that CLIP-benchmark takes; the table that copies on the Hugging Face hub carry.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

from cosmos_fast.evaluate.datasets import karpathy, wds
from cosmos_fast.evaluate.datasets.caption_lists import Pairs, csv_rows
from cosmos_fast.evaluate.datasets.layout import read_text, required
from cosmos_fast.evaluate.datasets.pairs import file_pairs
from cosmos_fast.evaluate.datasets.sets import Reader, RetrievalSet
from cosmos_fast.utils.errors import UserError

_NAME = "flickr30k"
_LAYOUT = """\
ROOT/dataset_flickr30k.json              caption_datasets.zip (or flickr30k.zip: dataset.json); its split "test"
  or ROOT/flickr30k_test_karpathy.txt    the test split as CLIP-benchmark has it: image,caption
  or ROOT/flickr_annotations_30k.csv     columns raw, split, filename
ROOT/flickr30k-images/1007129816.jpg ... flickr30k-images.tar.gz (or ROOT/flickr30k_images, ROOT/images, ROOT/Images)
CLIP-benchmark's wds_flickr30k is read too: `cosmos-fast eval sets wds`.
"""
_FOLDERS = ("flickr30k-images", "flickr30k_images/flickr30k_images", "flickr30k_images", "images", "Images")


def open_flickr30k(root: Path) -> RetrievalSet:
    """The test split. UserError: see `file_pairs`, and another form of the list."""
    if wds.is_one(root):
        return wds.open_retrieval(root, _NAME)
    path = required(
        _NAME, root, "dataset_flickr30k.json", "dataset.json", "flickr30k_test_karpathy.txt",
        "flickr_annotations_30k.csv",
    )  # fmt: skip
    folder = required(_NAME, root, *_FOLDERS)
    if path.suffix == ".json":
        pairs = karpathy.read(_NAME, path, "test")
    else:
        pairs = _test_list(path) if path.suffix == ".txt" else _hub_table(path)
    return file_pairs(_NAME, "test", path, folder, pairs)


def _test_list(path: Path) -> Pairs:
    """`image,caption` lines below a head; a caption with commas may stand in double quotes or not."""
    pairs: dict[str, list[str]] = {}
    for number, line in enumerate(read_text(_NAME, path).split("\n")[1:], start=2):
        if not line.strip():
            continue
        image, comma, rest = line.strip().partition(",")
        if not comma:
            raise UserError(f"{_NAME}: {path}: line {number} is not image,caption: give the list as it was published")
        try:
            fields = next(csv.reader([rest]), [""])
        except csv.Error:
            fields = []
        pairs.setdefault(image, []).append(fields[0] if len(fields) == 1 else rest)
    return list(pairs.items())


def _hub_table(path: Path) -> Pairs:
    pairs = []
    for where, row in csv_rows(_NAME, path, read_text(_NAME, path)):
        try:
            raw, split, image = json.loads(row["raw"]), row["split"], row["filename"]
            good = isinstance(raw, list) and all(isinstance(text, str) for text in raw)
        except (KeyError, ValueError):
            good = False
        if not good:
            raise UserError(
                f"{_NAME}: {path}: {where} has not the columns raw (a JSON list of texts), split and filename: give "
                "the table as it was published"
            )
        if split == "test":
            pairs.append((image, raw))
    return pairs


READERS = (
    Reader(
        name=_NAME,
        task="retrieval",
        title="Flickr30k, Karpathy's 1,000 test images, five captions each",
        layout=_LAYOUT,
        open=open_flickr30k,
    ),
)
