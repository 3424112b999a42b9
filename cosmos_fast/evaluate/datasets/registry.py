"""The evaluation sets that have a reader, by the name that they have on the command line."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from cosmos_fast.evaluate.datasets import (
    captions,
    cifar,
    class_folders,
    class_lists,
    coco,
    flickr30k,
    imagenet,
    segmentation_folders,
    wds,
)
from cosmos_fast.evaluate.datasets.sets import EvalSet, Reader, part_of
from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.logging import get_logger
from cosmos_fast.utils.ranks import Ranks, place_of_environment

_log = get_logger(__name__)

# READERS of each module, in the order of tables.
_MODULES: tuple[tuple[Reader, ...], ...] = (
    coco.READERS,
    flickr30k.READERS,
    captions.READERS,
    imagenet.READERS,
    class_folders.READERS,
    cifar.READERS,
    class_lists.READERS,
    segmentation_folders.READERS,
    wds.READERS,
)
# How many images the published splits that are read have. Not of Caltech-101, of which several releases go round.
PUBLISHED_IMAGES: dict[str, tuple[int, ...]] = {
    **{"coco": (5_000,), "coco_karpathy": (5_000,), "flickr30k": (1_000,), "imagenet": (50_000,), "food101": (25_250,)},
    **{"sun397": (19_850, 108_754), "dtd": (1_880,), "cifar10": (10_000,), "cifar100": (10_000,)},
    **{"stanford_cars": (8_041,), "fgvc_aircraft": (3_333,), "oxford_pets": (3_669,), "flowers102": (6_149,)},
    **{"voc21": (1_449,), "voc20": (1_449,), "context60": (5_104, 5_105), "context59": (5_104, 5_105)},
    **{"coco_object": (5_000,), "coco_stuff": (5_000,), "cityscapes": (500,), "ade20k": (2_000,)},
}
READERS: dict[str, Reader] = {reader.name: reader for readers in _MODULES for reader in readers}


def reader_of(name: str) -> Reader:
    """UserError names the nearest set that there is."""
    if name not in READERS:
        near = difflib.get_close_matches(name, READERS, n=1, cutoff=0.0)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"no evaluation set is called {name!r}: {hint}`cosmos-fast eval sets` lists them")
    return READERS[name]


def open_set(name: str, root: Path) -> EvalSet:
    """The set that a folder holds, under the name given: a reader's ("wds"), or that with a word of one's own behind a
    colon ("wds:birds"), so that a reader can serve several folders.

    A folder may lack images that no list names: where there are not as many as published, the log says so.
    UserError: no such set, another layout.
    """
    reader = reader_of(name.partition(":")[0])
    found = reader.open(root)
    published = PUBLISHED_IMAGES.get(reader.name, ())
    if published and len(found.images) not in published and place_of_environment().first:
        numbers = " or ".join(f"{count:,}" for count in published)
        _log.warning(
            "%s: %s holds %s images, the published set has %s: figures of others do not compare with it",
            *(name, root, f"{len(found.images):,}", numbers),
        )
    return replace(found, name=name) if ":" in name else found


def open_sets(folders: Mapping[str, Path], max_images: int | None) -> dict[str, EvalSet]:
    """The set of each name, or so many of its images. UserError."""
    return {name: part_of(open_set(name, folder), max_images) for name, folder in folders.items()}


def require_same(sets: Mapping[str, EvalSet], folders: Mapping[str, Path], ranks: Ranks) -> None:
    """Collective. UserError, on every rank, where ranks do not hold the same: their parts would not be of one set."""
    for name, found in sets.items():
        if not ranks.all_equal(found.sha256):
            raise UserError(f"{name}: {folders[name]} does not hold the same on every rank: copy it again")
