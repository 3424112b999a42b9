"""Every layout that captions are read from: who writes its miniature, who reads it, and what its split is called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cosmos_fast.evaluate.datasets import captions, coco, flickr30k, wds
from cosmos_fast.evaluate.datasets.sets import EvalSet
from tests.benchmark_folders.captions import (
    write_captions,
    write_coco,
    write_coco_karpathy,
    write_flickr30k,
    write_wds,
)

Write = Callable[[Path], Path]
Open = Callable[[Path], EvalSet]


def of_form(write: Callable[[Path, str], Path], form: str) -> Write:
    return lambda root: write(root, form)


LAYOUTS: dict[str, tuple[Write, Open, str]] = {
    "coco": (write_coco, coco.open_coco, "val2017"),
    "coco as webdataset": (write_wds, coco.open_coco, "test"),
    "coco in Karpathy's split": (write_coco_karpathy, coco.open_karpathy, "test"),
    "flickr30k by Karpathy's JSON": (write_flickr30k, flickr30k.open_flickr30k, "test"),
    "flickr30k by CLIP-benchmark's list": (of_form(write_flickr30k, "txt"), flickr30k.open_flickr30k, "test"),
    "flickr30k by the hub's table": (of_form(write_flickr30k, "csv"), flickr30k.open_flickr30k, "test"),
    "flickr30k as webdataset": (write_wds, flickr30k.open_flickr30k, "test"),
    "texts beside images": (write_captions, captions.open_captions, "folder"),
    "captions.json": (of_form(write_captions, "captions.json"), captions.open_captions, "captions.json"),
    "metadata.jsonl": (of_form(write_captions, "metadata.jsonl"), captions.open_captions, "metadata.jsonl"),
    "captions.csv": (of_form(write_captions, "captions.csv"), captions.open_captions, "captions.csv"),
    "captions.tsv": (of_form(write_captions, "captions.tsv"), captions.open_captions, "captions.tsv"),
    "shards of one's own": (of_form(write_captions, "tar"), captions.open_captions, "test"),
    "webdataset": (write_wds, wds.open_wds, "test"),
}
