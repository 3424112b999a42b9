"""Images as img2dataset leaves them: webdataset shards, or folders of files; each sample with its metadata."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmos_fast.config import DataConfig
from cosmos_fast.data import faults
from cosmos_fast.data.index import IMAGE_EXTENSIONS
from cosmos_fast.data.index_build import scan_samples, split_name
from cosmos_fast.data.prepare import parquet
from cosmos_fast.data.records import MAX_RECORD_BYTES
from cosmos_fast.data.sources import find_shards
from cosmos_fast.utils.errors import UserError

FOLDER_IMAGES = 10_000  # a shard made from a folder of files; what img2dataset puts into one too
_TEXT = "txt"
_JSON = "json"


@dataclass(frozen=True)
class Place:
    """Bytes of one member: a range of a file. descriptor: of the file where it is open already."""

    path: Path
    offset: int
    size: int
    descriptor: int | None = None

    def read(self) -> bytes:
        """All of it, or as much as the file has. Raises UserError where the disk refuses."""
        try:
            if self.descriptor is not None:
                return os.pread(self.descriptor, self.size, self.offset)
            return self.path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror or error}") from error


@dataclass(frozen=True)
class Unit:
    """What becomes one shard: a tar file, or images start..stop-1 of a folder. name: of the shard, without `.tar`."""

    name: str
    path: Path
    start: int = 0
    stop: int | None = None

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return self.path.parent if self.stop is None else self.path

    @property
    def source(self) -> str:
        """Its path, whatever the working directory."""
        return str(self.path.resolve())

    @property
    def stamp(self) -> list[int]:
        """Changes when the input does: size in bytes, time of the last change in ns."""
        stat = self.path.stat()
        return [stat.st_size, stat.st_mtime_ns]


@dataclass(frozen=True)
class Download:
    """One image of a unit. members: extension -> place; metadata: a row of the shard's parquet file, or nothing.

    passed: share of the unit that is passed with it.
    """

    key: str
    members: Mapping[str, Place]
    metadata: Mapping[str, Any]
    passed: float

    @property
    def image(self) -> tuple[str, Place] | None:
        """Extension and place of the image."""
        return next(((name, self.members[name]) for name in IMAGE_EXTENSIONS if name in self.members), None)

    def read_metadata(self) -> Mapping[str, Any]:
        """What the json member says, else the shard's parquet file. Raises faults.SampleFault."""
        place = self.members.get(_JSON)
        if place is None:
            return self.metadata
        if place.size > MAX_RECORD_BYTES:
            raise faults.SampleFault(faults.TOO_MANY_BYTES, f"json: {place.size} bytes")
        try:
            raw = json.loads(place.read())
        except (ValueError, RecursionError) as error:
            raise faults.SampleFault(faults.BAD_JSON, str(error)) from error
        if not isinstance(raw, dict):
            raise faults.SampleFault(faults.BAD_JSON, f"a {type(raw).__name__} instead of an object")
        return raw

    def read_image(self) -> tuple[str, bytes]:
        """Extension and bytes. Raises faults.SampleFault: no image, an empty one, or one over the byte cap."""
        if self.image is None:
            raise faults.SampleFault(faults.MISSING_IMAGE)
        extension, place = self.image
        cap = DataConfig().max_member_bytes
        if place.size > cap:
            raise faults.SampleFault(faults.TOO_MANY_BYTES, f"{extension}: {place.size} bytes, the cap is {cap}")
        if not (data := place.read()):
            raise faults.SampleFault(faults.EMPTY_MEMBER, extension)
        return extension, data

    def read_text(self) -> str:
        """The txt member, "" where there is none."""
        place = self.members.get(_TEXT)
        return place.read().decode("utf-8", "replace") if place and place.size <= MAX_RECORD_BYTES else ""


def find_units(path: str) -> list[Unit]:
    """The units a path names: tar shards as `data.train` names them, else folders of images. Raises UserError."""
    if "://" in path or path.startswith("pipe:"):
        raise UserError(f"{path!r}: images are prepared from local files; copy the download here first")
    where = Path(path).expanduser()
    if where.is_dir() and next(where.glob("*.tar"), None) is None and next(where.glob("*/*.tar"), None) is None:
        return _folder_units(where)
    shards = [shard for shard in find_shards(path) if isinstance(shard, Path)]
    names = [shard.stem for shard in shards]
    if len(set(names)) < len(names):  # shards of several folders
        base = Path(os.path.commonpath([shard.absolute().parent for shard in shards]))
        names = ["_".join(shard.absolute().relative_to(base).with_suffix("").parts) for shard in shards]
    return [Unit(name, shard) for name, shard in zip(names, shards, strict=True)]


def _folder_units(root: Path) -> list[Unit]:
    units = []
    for folder, _, files in sorted(os.walk(root)):
        images = sum(_image_key(name) is not None for name in files)
        name = "_".join(Path(folder).relative_to(root).parts) or root.absolute().name
        for part, start in enumerate(range(0, images, FOLDER_IMAGES)):
            own_name = name if images <= FOLDER_IMAGES else f"{name}_{part:04d}"
            units.append(Unit(own_name, Path(folder), start, min(start + FOLDER_IMAGES, images)))
    if not units:
        raise UserError(
            f"{root} holds neither .tar shards nor images; give the output folder of img2dataset "
            "(of the formats webdataset and files)"
        )
    return units


def downloads(unit: Unit, problems: Counter[str]) -> Iterator[Download]:
    """The samples of a unit in their order; shard faults are counted. Raises OSError, UserError."""
    if unit.stop is not None:
        yield from _folder_samples(unit)
        return
    samples, met = scan_samples(unit.path)
    problems.update(fault.cause for fault in met)
    rows: Mapping[str, Mapping[str, Any]] | None = None
    with unit.path.open("rb", buffering=0) as file:
        for number, (key, members) in enumerate(samples.items(), 1):
            if _JSON not in members and rows is None:
                rows = _sidecar(unit.path.with_suffix(".parquet"))
            places = {name: Place(unit.path, at.offset, at.size, file.fileno()) for name, at in members.items()}
            yield Download(key, places, (rows or {}).get(key, {}), number / len(samples))


def _folder_samples(unit: Unit) -> Iterator[Download]:
    samples: dict[str, dict[str, Path]] = {}
    for entry in sorted(unit.path.iterdir()):
        split = split_name(entry.name)
        if split is not None and entry.is_file():
            samples.setdefault(split[0], {})[split[1]] = entry
    keys = [key for key, members in samples.items() if any(name in members for name in IMAGE_EXTENSIONS)]
    mine = keys[unit.start : unit.stop]
    for number, key in enumerate(mine, 1):
        places = {extension: Place(path, 0, path.stat().st_size) for extension, path in samples[key].items()}
        yield Download(key, places, {}, number / len(mine))


def _sidecar(path: Path) -> dict[str, dict[str, Any]]:
    """key -> metadata from the parquet file that img2dataset writes beside a shard; empty if it cannot be read."""
    if not path.is_file():
        return {}
    try:
        columns = parquet.column_names(path)
        return {str(row.get("key")): row for _, row in parquet.read_rows(path, columns)}
    except UserError:  # pyarrow is optional, and a shard without json is told as such
        return {}


def _image_key(name: str) -> str | None:
    """The key of an image file, None for other files."""
    split = split_name(name)
    return split[0] if split is not None and split[1] in IMAGE_EXTENSIONS else None
