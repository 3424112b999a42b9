"""Miniatures of the eight segmentation sets, in exactly their layouts, and what their maps mean.

What a number of a file means is written here by hand, so that the readers have no part in what is expected.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tests.shards import picture

SIZES = ((40, 32), (24, 37), (33, 33))  # width, height of the pictures


@dataclass(frozen=True, kw_only=True)
class Layout:
    """images, maps: paths by id. lists: files with the ids. meaning: number in a file -> class, 255 is not counted."""

    ids: tuple[str, ...]
    images: str
    maps: str
    meaning: Mapping[int, int]
    lists: str = ""
    classes: int
    first: str

    def write(self, root: Path) -> Path:
        for number, one in enumerate(self.ids):
            width, height = SIZES[number]
            form = "PNG" if self.images.endswith(".png") else "JPEG"
            put(root / self.images.format(one), picture(number, width, height, form))
            values = self.values(number)
            put(root / self.maps.format(one), mat(values) if self.maps.endswith(".mat") else png(values))
        if self.lists:
            put(root / self.lists, "".join(f"{one}\n" for one in self.ids).encode())
        return root

    def values(self, number: int) -> np.ndarray:
        """The numbers in the file of a picture: squares of all that have a meaning."""
        width, height = SIZES[number]
        y, x = np.mgrid[0:height, 0:width]
        return np.array(list(self.meaning))[(x // 6 + 3 * (y // 5) + number) % len(self.meaning)]

    def truth(self, number: int) -> np.ndarray:
        found = self.values(number)
        return np.vectorize(self.meaning.__getitem__)(found).astype(np.uint8)


def put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def png(values: np.ndarray, palette: bool = True) -> bytes:
    image = Image.fromarray(values.astype(np.uint8))
    if palette:
        image.putpalette([(7 * n + c) % 256 for n in range(256) for c in (0, 90, 180)])
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def mat(values: np.ndarray, name: bytes = b"LabelMap") -> bytes:
    """A MATLAB 5 file with one compressed uint16 matrix."""

    def element(kind: int, data: bytes) -> bytes:
        return struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)

    numbers = values.astype("<u2").tobytes(order="F")
    parts = [(6, struct.pack("<II", 11, 0)), (5, struct.pack("<ii", *values.shape)), (1, name), (4, numbers)]
    packed = zlib.compress(element(14, b"".join(element(kind, data) for kind, data in parts)))
    header = b"MATLAB 5.0 MAT-file, Platform: GLNXA64".ljust(124) + struct.pack("<H", 0x0100) + b"IM"
    return header + struct.pack("<II", 15, len(packed)) + packed


_VOC = {
    "ids": ("2007_000033", "2007_000042", "2007_000061"),
    "images": "VOCdevkit/VOC2012/JPEGImages/{}.jpg",
    "maps": "VOCdevkit/VOC2012/SegmentationClass/{}.png",
    "lists": "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt",
}
_CONTEXT_PNG = {
    "ids": ("2008_000002", "2008_000003", "2008_000007"),
    "images": "JPEGImages/{}.jpg",
    "maps": "SegmentationClassContext/{}.png",
    "lists": "ImageSets/SegmentationContext/val.txt",
}
_CONTEXT_MAT = {
    "ids": _CONTEXT_PNG["ids"],
    "images": "VOCdevkit/VOC2010/JPEGImages/{}.jpg",
    "maps": "trainval/{}.mat",
    "lists": "VOCdevkit/VOC2010/ImageSets/Main/val.txt",
}
_COCO = {
    "ids": ("000000000139", "000000000285", "000000000632"),
    "images": "images/val2017/{}.jpg",
    "maps": "annotations/val2017/{}.png",
}
_CITIES = {
    "ids": ("frankfurt/frankfurt_000000_000294", "frankfurt/frankfurt_000001_000538", "munster/munster_000000_000019"),
    "images": "leftImg8bit/val/{}_leftImg8bit.png",
    "classes": 19,
    "first": "road",
}
_OBJECTS = {"classes": 81, "first": "background"}
_STUFF = {"classes": 171, "first": "person"}
_ALL = {"classes": 60, "first": "background"}
_COUNTED = {"classes": 59, "first": "aeroplane"}

# The set and the form that it comes in, as the command line names it.
LAYOUTS: Mapping[str, Layout] = {
    "voc21": Layout(**_VOC, meaning={0: 0, 255: 255, 20: 20, 1: 1, 12: 12}, classes=21, first="background"),
    "context60": Layout(**_CONTEXT_PNG, meaning={0: 0, 1: 1, 59: 59, 40: 40}, **_ALL),
    # Published numbers: 2 aeroplane, 9 bag, 25 bird, 458 wood; 1, 3 and 459 are no class of the 59.
    "context60:mat": Layout(**_CONTEXT_MAT, meaning={0: 0, 2: 1, 458: 59, 9: 2, 25: 7, 1: 0, 3: 0, 459: 0}, **_ALL),
    "coco_object": Layout(
        **{**_COCO, "maps": "annotations/val2017/{}_instanceTrainIds.png"}, meaning={0: 0, 1: 1, 80: 80}, **_OBJECTS
    ),
    # 9 traffic light, 10 fire hydrant, 12 stop sign, 89 toothbrush, then stuff: 91 banner, 181 wood.
    "coco_object:stuff": Layout(**_COCO, meaning={0: 1, 10: 11, 12: 12, 89: 80, 91: 0, 181: 0, 255: 0}, **_OBJECTS),
    "voc20": Layout(**_VOC, meaning={0: 255, 255: 255, 20: 19, 1: 0, 12: 11}, classes=20, first="aeroplane"),
    "cityscapes": Layout(
        **_CITIES,
        maps="gtFine/val/{}_gtFine_labelIds.png",
        meaning={7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 33: 18, 0: 255, 9: 255, 29: 255, 255: 255},
    ),
    "cityscapes:ids": Layout(
        **_CITIES, maps="gtFine/val/{}_gtFine_labelTrainIds.png", meaning={0: 0, 5: 5, 18: 18, 255: 255}
    ),
    "context59": Layout(**_CONTEXT_PNG, meaning={0: 255, 1: 0, 59: 58, 40: 39}, **_COUNTED),
    "context59:mat": Layout(**_CONTEXT_MAT, meaning={0: 255, 2: 0, 458: 58, 9: 1, 1: 255, 459: 255}, **_COUNTED),
    "ade20k": Layout(
        ids=("ADE_val_00000001", "ADE_val_00000002", "ADE_val_00000003"),
        images="ADEChallengeData2016/images/validation/{}.jpg",
        maps="ADEChallengeData2016/annotations/validation/{}.png",
        meaning={0: 255, 1: 0, 150: 149, 77: 76},
        classes=150,
        first="wall",
    ),
    "coco_stuff": Layout(**_COCO, meaning={0: 0, 10: 10, 12: 11, 89: 79, 91: 80, 181: 170, 255: 255}, **_STUFF),
    "coco_stuff:ids": Layout(
        **{**_COCO, "maps": "annotations/val2017/{}_labelTrainIds.png"},
        meaning={0: 0, 80: 80, 170: 170, 255: 255},
        **_STUFF,
    ),
}
