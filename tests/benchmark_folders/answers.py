"""What a reader of a miniature classification set should find, and the pictures and lists that its writer needs."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image

from tests.shards import picture

PICTURES = 12
LABELS = (4, 0, 36, 4, 17)  # of the sets that a list names images of


@dataclass(frozen=True)
class Answers:
    """What a reader should find. pictures: number of the picture that each image shows; image: what it looks like."""

    pictures: tuple[int, ...]
    labels: tuple[int, ...]
    names: tuple[str, ...]
    split: str = "test"
    image: Callable[[int], Image.Image] = lambda number: photo(number)


@cache
def jpeg(number: int) -> bytes:
    return picture(number, 24 + 2 * number, 32)


@cache
def photo(number: int) -> Image.Image:
    return Image.open(io.BytesIO(jpeg(number))).convert("RGB")


def write_photos(folder: Path, names: Sequence[str]) -> tuple[int, ...]:
    """Pictures by turns under these names; their numbers."""
    numbers = tuple(place % PICTURES for place in range(len(names)))
    for name, number in zip(names, numbers, strict=True):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))
    return numbers


def write_lines(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
