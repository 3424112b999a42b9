"""Tiny webdataset shards for the data tests, written with tarfile so that they do not lean on the code under test."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

Members = Mapping[str, bytes]  # member name -> bytes


def picture(number: int, width: int = 40, height: int = 32, file_format: str = "JPEG", mode: str = "RGB") -> bytes:
    """A smooth picture whose colours depend on `number`."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [(x * (3 + number % 5) + y * 2 + 37 * number + 60 * c) % 256 for c in range(3)]
    image = Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8)).convert(mode)
    out = io.BytesIO()
    image.save(out, file_format)
    return out.getvalue()


def record(number: int) -> bytes:
    """A DreamLIP record with nine sentences."""
    return json.dumps(
        {
            "raw_caption": [f"raw {number}"],
            "shortIB_captions": [f"short ib {number}"],
            "shortSV_captions": [f"short sv {number}"],
            "shortLLA_captions": [f"short lla {number}"],
            "longIB_captions": [f"long ib {number} a", f"long ib {number} b"],
            "longSV_captions": [f"long sv {number} a"],
            "longLLA_captions": [f"long lla {number} a", f"long lla {number} b"],
        }
    ).encode()


def sample(number: int, key: str | None = None) -> dict[str, bytes]:
    """Members of one good sample."""
    key = key or f"{number:06d}"
    return {f"{key}.jpg": picture(number), f"{key}.json": record(number)}


def write_tar(path: Path, members: Members, tar_format: int = tarfile.USTAR_FORMAT) -> Path:
    """Write the members in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def write_shards(folder: Path, counts: Sequence[int] = (5, 4), first: int = 0) -> Path:
    """One good shard for each count; keys run on over the shards."""
    for shard, count in enumerate(counts):
        members: dict[str, bytes] = {}
        for number in range(first, first + count):
            members.update(sample(number))
        write_tar(folder / f"{shard:05d}.tar", members)
        first += count
    return folder
