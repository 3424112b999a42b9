"""The evaluation sets that have a reader, by the name that they have on the command line."""

from __future__ import annotations

import difflib
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
from cosmos_fast.evaluate.datasets.sets import EvalSet, Reader
from cosmos_fast.utils.errors import UserError

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
    colon ("wds:birds"), so that a reader can serve several folders. UserError: no such set, another layout."""
    found = reader_of(name.partition(":")[0]).open(root)
    return replace(found, name=name) if ":" in name else found
