"""Files of a published layout: what is missing or unreadable is told in one line that names the first such path."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from cosmos_fast.data import faults
from cosmos_fast.data.faults import SampleFault
from cosmos_fast.data.images import FORMATS, MAX_PIXELS, decode
from cosmos_fast.utils.errors import UserError


def required(name: str, root: Path, *choices: str) -> Path:
    """The first of some paths below a folder that is there. UserError names the first, and how to see the layout."""
    if not os.path.exists(root):  # which Path.exists() does not tell of every name
        raise UserError(f"{name}: {root} does not exist: give the folder of the unpacked data set")
    for choice in choices:
        if os.path.exists(root / choice):
            return root / choice
    raise UserError(
        f"{name}: {root / choices[0]} is missing: `cosmos-fast eval sets {name}` prints the layout that is read"
    )


def all_there(name: str, root: Path, relative: Sequence[str]) -> None:
    """UserError names the first of many paths below a folder that is missing, and how many are."""
    missing = [path for path in relative if not os.path.isfile(root / path)]
    if missing:
        raise UserError(
            f"{name}: {root / missing[0]} is missing ({len(missing)} of {len(relative)} files are): the copy is not "
            "whole, unpack it again"
        )


def visible(folder: Path, pattern: str) -> list[str]:
    """Paths below a folder that match, sorted; without hidden ones, such as the `._*` that a Mac leaves on disks of
    others and in archives."""
    return sorted(glob.glob(pattern, root_dir=folder))


def read_text(name: str, path: Path) -> str:
    """UTF-8. UserError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: {path} cannot be read ({error}): unpack the data set again") from None


def read_json(name: str, path: Path) -> Any:
    """UserError where it is no JSON."""
    try:
        return json.loads(read_text(name, path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name}: {path} is no JSON ({error}): unpack the data set again") from None


class FileImages:
    """Images of a folder by their paths below it, all of which were there when it was opened (see `datasets.sets`)."""

    def __init__(self, name: str, root: Path, relative: Sequence[str]) -> None:
        all_there(name, root, relative)
        self.name, self.root, self.relative = name, root, tuple(relative)

    def __len__(self) -> int:
        return len(self.relative)

    def key(self, number: int) -> str:
        return self.relative[number]

    def image(self, number: int) -> Image.Image:
        path = self.root / self.relative[number]
        try:
            return decode(path.read_bytes(), formats=(*FORMATS, "BMP"))  # SUN397 has some, called .jpg
        except (OSError, SampleFault) as error:
            refuse_too_large(self.name, path, error)
            raise UserError(f"{self.name}: {path} is broken ({error}): unpack the data set again") from None


def refuse_too_large(name: str, image: Path | str, error: Exception) -> None:
    """UserError where that is what is wrong with an image: another copy of it would not help."""
    if isinstance(error, SampleFault) and error.cause == faults.TOO_MANY_PIXELS:
        raise UserError(
            f"{name}: {image} is too large ({error.detail}): make it smaller, {MAX_PIXELS:,} pixels are read at most"
        ) from None
