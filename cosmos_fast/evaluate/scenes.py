"""Held-out shards as an evaluation set: images with captions; objects and masks too where the shards are synthetic.

Retrieval needs images and `raw_caption` only and works on any DreamLIP shards. Classification and segmentation need the
`scene` of each record, its `mask.png`, and a `meta.json` beside the shards or one folder up.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cosmos_fast.config.data import SourceConfig
from cosmos_fast.data import storage
from cosmos_fast.data.faults import (
    BAD_JSON,
    BROKEN_IMAGE,
    MISSING_IMAGE,
    MISSING_RECORD,
    Fault,
    FaultAccount,
    SampleFault,
    stop_where_out_of_reach,
)
from cosmos_fast.data.images import decode
from cosmos_fast.data.index import Index, image_extension, open_source
from cosmos_fast.data.records import parse_record, raw_captions
from cosmos_fast.data.storage import Storage
from cosmos_fast.data.transport import shown
from cosmos_fast.evaluate.prompts import ClassSet, fill_templates
from cosmos_fast.utils.errors import UserError

MAX_MEMBER_BYTES = 64 * 1024 * 1024
BLOCK = 64
# Decoded scenes are kept for the next model up to this many bytes of pixels.
CACHE_BYTES = 512 * 1024 * 1024


@dataclass(frozen=True)
class SceneObject:
    """One object: class names, box (x0, y0, x1, y1) in pixels, and its value in the mask."""

    shape: str
    colour: str
    box: tuple[float, float, float, float]
    instance: int


@dataclass(frozen=True)
class Scene:
    """One sample. `captions` are its raw captions, `sentences` all its captions. Without a mask, objects are empty."""

    key: str
    image: Image.Image
    captions: tuple[str, ...]
    sentences: tuple[str, ...]
    objects: tuple[SceneObject, ...]
    mask_HW: np.ndarray | None
    long_sentences: tuple[str, ...] = ()


@dataclass(frozen=True)
class Meta:
    """The vocabulary of a synthetic data set, as class sets."""

    shapes: ClassSet
    colours: ClassSet
    pairs: ClassSet
    background: ClassSet  # one class, with the phrases of all backgrounds as its wordings


class SceneSet:
    """Usable samples of some shards, in shard order and in blocks; broken ones are counted in `faults`, not evaluated.

    storage: how remote shards are read. block_size: samples of a block, broken ones included; None is BLOCK.
    """

    def __init__(
        self,
        sources: tuple[SourceConfig, ...],
        max_samples: int | None = None,
        storage: Storage | None = None,
        block_size: int | None = None,
    ) -> None:
        self.sources = sources
        self.indexes = [open_source(source, storage=storage) for source in sources]
        self.block_size = block_size or BLOCK
        self._start([(index, i) for index in self.indexes for i in range(len(index))][:max_samples])

    def _start(self, places: list[tuple[Index, int]]) -> None:
        self._places = places
        self.faults = FaultAccount(max_bad_share=1.0)
        self._looked_at: set[int] = set()  # blocks whose faults are counted
        self._kept: dict[int, list[Scene]] = {}
        self._kept_bytes = 0

    def first(self, count: int) -> SceneSet:
        """The first `count` samples as a set of their own."""
        part = copy(self)
        part._start(self._places[:count])
        return part

    def __len__(self) -> int:
        """Samples in the shards; as many as iteration yields if none is broken."""
        return len(self._places)

    @property
    def blocks(self) -> int:
        """How many there are; the last may be a short one."""
        return -(-len(self._places) // self.block_size)

    def samples_in(self, blocks: Iterable[int]) -> int:
        """Samples of these blocks, broken ones included."""
        return sum(len(self._places[self._span(number)]) for number in blocks)

    def __iter__(self) -> Iterator[Scene]:
        """Every usable scene. UserError: none is usable, a remote shard is away."""
        usable = 0
        for number in range(self.blocks):
            for scene in self.block(number):
                usable += 1
                yield scene
        self.check_usable(usable)

    def block(self, number: int) -> Iterator[Scene]:
        """The usable scenes of a block; decoded once if they fit the cache. UserError: a remote shard is away."""
        if number in self._kept:
            yield from self._kept[number]
            return
        kept: list[Scene] = []
        faults: list[Fault] = []
        for index, i in self._places[self._span(number)]:
            try:
                scene = read_scene(index, i)
            except SampleFault as fault:
                stop_where_out_of_reach(fault, index.name(i))
                faults.append(Fault(fault.cause, index.name(i), fault.detail))
                continue
            size = 4 * scene.image.width * scene.image.height
            if self._kept_bytes + size <= CACHE_BYTES:
                self._kept_bytes += size
                kept.append(scene)
            yield scene
        if number not in self._looked_at:
            self._looked_at.add(number)
            self.faults.note(faults)
        if len(kept) + len(faults) == len(self._places[self._span(number)]):
            self._kept[number] = kept
        else:
            self._kept_bytes = CACHE_BYTES  # full: of what does not fit whole, nothing is kept

    def check_usable(self, usable: int) -> None:
        """UserError where no sample is, on any rank."""
        if not usable:
            raise UserError(f"evaluation data {self.name}: no usable sample ({self.faults.summary()})")

    def _span(self, number: int) -> slice:
        return slice(number * self.block_size, (number + 1) * self.block_size)

    @property
    def name(self) -> str:
        return ", ".join(repr(shown(source.path)) for source in self.sources)

    def meta(self) -> Meta | None:
        """The data set's vocabulary; None where no source has a meta.json."""
        for index in self.indexes:
            beside = storage.folder(index.shards[0])
            for folder in (beside, beside.parent) if beside else ():
                if (folder / "meta.json").is_file():
                    return read_meta(folder / "meta.json")
        return None

    def require_meta(self, task: str) -> Meta:
        meta = self.meta()
        if meta is None:
            raise UserError(
                f"{task} needs meta.json beside the shards of {self.name} or one folder up: make the data with "
                "`cosmos-fast data synth`, or leave this task out of --tasks"
            )
        return meta

    def sha256(self) -> str:
        """Digest of the shard files, in order; of a remote one, of its name and version."""
        total = hashlib.sha256()
        for index in self.indexes:
            for shard in index.shards:
                total.update(bytes.fromhex(storage.digest(shard)))
        return total.hexdigest()


def read_scene(index: Index, i: int) -> Scene:
    """Decode one sample. Raises SampleFault."""
    members = index.read(i, max_bytes=MAX_MEMBER_BYTES)
    extension = image_extension(members)
    if extension is None:
        raise SampleFault(MISSING_IMAGE)
    if "json" not in members:
        raise SampleFault(MISSING_RECORD)
    record = parse_record(members["json"], index.source.schema)
    image = decode(members[extension])
    mask = _decode_mask(members["mask.png"]) if "mask.png" in members else None
    if mask is not None and mask.shape != (image.height, image.width):
        raise SampleFault(BROKEN_IMAGE, f"mask is {mask.shape[1]}x{mask.shape[0]}, image {image.width}x{image.height}")
    return Scene(
        key=index.key(i),
        image=image,
        captions=raw_captions(record),
        sentences=tuple(record.sentences),
        objects=_objects(record.raw) if mask is not None else (),
        mask_HW=mask,
        long_sentences=tuple(record.raw.get("longIB_captions") or ()),
    )


def _decode_mask(data: bytes) -> np.ndarray:
    """uint8 [h, w] of an 8-bit grey PNG."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.mode not in ("L", "P"):
                raise SampleFault(BROKEN_IMAGE, f"mask of mode {image.mode}, not 8-bit grey")
            return np.array(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SampleFault(BROKEN_IMAGE, f"mask: {error}") from error


def _objects(raw: Mapping[str, Any]) -> tuple[SceneObject, ...]:
    scene = raw.get("scene")
    if scene is None:
        return ()
    try:
        found = []
        for thing in scene["objects"]:
            x0, y0, x1, y1 = map(float, thing["box"])
            box = (x0, y0, x1, y1)
            found.append(SceneObject(str(thing["shape"]), str(thing["colour"]), box, int(thing["instance"])))
        return tuple(found)
    except (KeyError, TypeError, ValueError) as error:
        raise SampleFault(BAD_JSON, f"scene: {error!r}") from error


def read_meta(path: Path) -> Meta:
    """Class sets from a meta.json.

    Shapes and colours use all their synonyms; colour + shape pairs use the plain names only (with synonyms there would
    be thousands of prompts).
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        names = {kind: [str(name) for name in raw[kind]] for kind in ("shapes", "colours", "backgrounds")}
        nouns = [str(template) for template in raw["templates"]]
        adjectives = [str(template) for template in raw.get("colour_templates", nouns)]
        backdrops = [str(template) for template in raw.get("background_templates", nouns)]
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no data-set description ({error!r}): make the data again with `data synth`"
        ) from None

    def wordings(kind: str) -> dict[str, list[str]]:
        synonyms = raw.get("synonyms", {}).get(kind, {})
        return {
            name: list(dict.fromkeys([*synonyms.get(name, ()), *([] if name in synonyms else [name])]))
            for name in names[kind]
        }

    pairs = {f"{colour} {shape}": [f"{colour} {shape}"] for colour in names["colours"] for shape in names["shapes"]}
    phrases = [phrase for synonyms in wordings("backgrounds").values() for phrase in synonyms]
    return Meta(
        shapes=fill_templates("shapes", wordings("shapes"), nouns),
        colours=fill_templates("colours", wordings("colours"), adjectives),
        pairs=fill_templates("colour + shape", pairs, nouns),
        background=fill_templates("background", {"background": phrases}, backdrops),
    )
