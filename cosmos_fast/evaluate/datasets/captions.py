"""Any folder of images with captions: a list of them, texts beside the images, or webdataset shards."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from cosmos_fast.data.index import IMAGE_EXTENSIONS
from cosmos_fast.evaluate.datasets import wds
from cosmos_fast.evaluate.datasets.caption_lists import Pairs, read_table
from cosmos_fast.evaluate.datasets.layout import read_text, visible
from cosmos_fast.evaluate.datasets.pairs import file_pairs
from cosmos_fast.evaluate.datasets.sets import Reader, RetrievalSet
from cosmos_fast.utils.errors import UserError

_NAME = "captions"
_ABOUT = ("readme", "license", "licence")
_LISTS = tuple(f"{stem}.{kind}" for stem in ("captions", "metadata") for kind in ("json", "jsonl", "csv", "tsv"))
_LAYOUT = """\
ROOT/captions.json      {"a/1.jpg": ["a caption", ...], ...} or [{"image": "a/1.jpg", "captions": [...]}, ...]
  or captions.jsonl     {"image": "a/1.jpg", "caption": "a caption"} a line
  or captions.csv, .tsv image,caption in the head, a caption a row (or metadata.* with file_name and text)
  or ROOT/a/1.txt       beside ROOT/a/1.jpg, a caption a line; in any folder below ROOT
  or ROOT/*.tar         webdataset shards: 1.jpg and 1.txt, a caption a line (or the 1.json of training data)
Images are .jpg, .jpeg, .png or .webp; paths in lists are below ROOT. The first list that is there is read; shards
beside images with texts are refused. ROOT/README*.txt and ROOT/LICENSE*.txt are no captions.
"""


def open_captions(root: Path) -> RetrievalSet:
    """UserError: see `file_pairs`; an image without a text, a text without an image, shards beside both."""
    if not root.is_dir():
        raise UserError(f"{_NAME}: {root} is no folder: give the folder that holds the images and their captions")
    listing = next((root / choice for choice in _LISTS if (root / choice).is_file()), None)
    if listing is not None:
        return file_pairs(_NAME, listing.name, listing, root, read_table(_NAME, listing))
    images, texts = _by_stem(root)
    if wds.is_one(root) or visible(root, "*.tar"):
        both = min(images.keys() & texts.keys(), default=None)
        if both is not None:
            raise UserError(
                f"{_NAME}: {root} holds shards, and {images[both]} with its {texts[both]}: take one of the two away"
            )
        return wds.open_retrieval(root, _NAME)
    return file_pairs(_NAME, "folder", root, root, _beside(root, images, texts))


def _by_stem(root: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Images and texts below a folder: path without extension -> path. UserError: two of one kind and name."""
    images: dict[str, str] = {}
    texts: dict[str, str] = {}
    for path in _files(root):
        stem, extension = os.path.splitext(path)
        is_text = extension.lower() == ".txt"
        if not is_text and extension.lower().removeprefix(".") not in IMAGE_EXTENSIONS:
            continue
        kind = texts if is_text else images
        if stem in kind:
            raise UserError(f"{_NAME}: {root}: {kind[stem]} and {path} are of one name: rename one of them")
        kind[stem] = path
    for stem in texts.keys() - images.keys():
        if stem.lower().startswith(_ABOUT) and "/" not in stem:
            del texts[stem]
    return images, texts


def _beside(root: Path, images: Mapping[str, str], texts: Mapping[str, str]) -> Pairs:
    """Every image with the lines of the text of the same name, by path. UserError: one without the other."""
    if not images:
        raise UserError(
            f"{_NAME}: {root / 'captions.json'} is missing, and there is no image in {root}: `cosmos-fast eval sets "
            f"{_NAME}` prints the layouts that are read"
        )
    stray = min(texts.keys() - images.keys(), default=None)
    if stray is not None:
        raise UserError(f"{_NAME}: {root / texts[stray]} has no image beside it: add the image, or take the text away")
    bare = min(images.keys() - texts.keys(), default=None)
    if bare is not None:
        raise UserError(
            f"{_NAME}: {root / images[bare]} has no caption: {root / bare}.txt is missing "
            f"({len(images.keys() - texts.keys())} of {len(images)} are)"
        )
    return [(images[stem], _lines(root / texts[stem])) for stem in sorted(images)]


def _files(root: Path) -> Iterator[str]:
    """Paths of the files below a folder, links followed, hidden ones left out. UserError: links that go in circles."""
    seen: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        place = os.path.realpath(folder)
        if place in seen:
            raise UserError(f"{_NAME}: {folder} is reached a second time through links: take the link away")
        seen.add(place)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in files:
            if not file.startswith("."):
                yield Path(folder, file).relative_to(root).as_posix()


def _lines(path: Path) -> list[str]:
    return [line for line in read_text(_NAME, path).splitlines() if line.strip()]


READERS = (
    Reader(
        name=_NAME,
        task="retrieval",
        title="any folder of images with captions",
        layout=_LAYOUT,
        open=open_captions,
    ),
)
