"""The JSON files in which Karpathy and Fei-Fei published their splits of COCO, Flickr30k and Flickr8k."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cosmos_fast.evaluate.datasets.layout import read_json
from cosmos_fast.evaluate.datasets.pairs import rows
from cosmos_fast.utils.errors import UserError


def read(name: str, path: Path, split: str) -> list[tuple[str, list[str]]]:
    """(path of the image, its raw captions) of one split, in the order of the file.

    The path is `filepath/filename` where the file names a folder, as it does for COCO. UserError: not such a file.
    """
    content = read_json(name, path)
    images = rows(name, path, content, "images", filename=str, split=str, sentences=list)
    pairs: list[tuple[str, list[str]]] = []
    for image in images:
        if image["split"] != split:
            continue
        folder: Any = image.get("filepath", "")
        raw: list[Any] = [
            sentence.get("raw") if isinstance(sentence, dict) else None for sentence in image["sentences"]
        ]
        if not isinstance(folder, str) or not all(isinstance(text, str) for text in raw):
            raise UserError(
                f"{name}: {path}: image {image['filename']} has a sentence without 'raw', or a 'filepath' that is no "
                "text: give the file as it was published"
            )
        pairs.append((f"{folder}/{image['filename']}" if folder else image["filename"], raw))
    return pairs
