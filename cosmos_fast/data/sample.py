"""From a position to the sample that stands there: the map-style data set behind the loader, a pure function.

A sample that cannot be used is replaced by a substitute that depends on (seed, position, attempt) only, so batches keep
their size and every split over ranks and workers sees the same samples. Images are decoded and cut here, or, where
DALI does that, checked and handed on; either way the same numbers decide what is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from cosmos_fast.config import DataConfig
from cosmos_fast.data import encoded, faults, rng
from cosmos_fast.data.augment import ViewNumbers, draw_views
from cosmos_fast.data.captions import draw_captions
from cosmos_fast.data.encoded import EncodedImages
from cosmos_fast.data.faults import Fault, Repair, SampleFault
from cosmos_fast.data.image_check import checked_image
from cosmos_fast.data.images import crop_and_resize, decode, to_pixels
from cosmos_fast.data.index import RECORD_EXTENSION, Index, image_extension, is_used_in_training
from cosmos_fast.data.order import Place, SampleOrder
from cosmos_fast.data.recolor import ColorNumbers, color_numbers, recolor_
from cosmos_fast.data.records import parse_record
from cosmos_fast.data.tokenizer import tokenize

MAX_ATTEMPTS = 32  # for one position; past it the data is hopeless, not unlucky


@dataclass(frozen=True)
class Sample:
    """One sample, before batching: a uint8 [3, size, size] crop a view (not recoloured), its numbers, captions, key.

    file: the image where it is cut later; then there are no crops. repairs: what was mended on the way.
    """

    crops: list[torch.Tensor]
    views: list[ViewNumbers]
    captions: list[str]
    key: str
    file: bytes = b""
    repairs: Sequence[Repair] = ()


class CropStack(NamedTuple):
    """Crops of one size. pixels: uint8 [V, B, 3, S, S]. colors: V * B rows still to apply, None when that is done."""

    pixels: torch.Tensor
    colors: ColorNumbers | None


class RawBatch(NamedTuple):
    """What travels from a worker: crops as bytes, a quarter of what normalised ones would take, or undecoded images.

    stacks: global crops, then local crops if there are any; where images are left undecoded, the pixels are those of
    the other samples only. texts: int64 [V, B, L]. faults: what was met on the way. exhausted: a position for which no
    substitute was usable (then there are no tensors).
    """

    stacks: list[CropStack]
    texts: torch.Tensor
    keys: list[str]
    faults: list[Fault]
    exhausted: int | None = None
    encoded: EncodedImages | None = None


class SampleStream(Dataset[RawBatch]):
    """position -> sample. Reads `indexes`, one a source, in the order of `order`.

    recolor: apply the colour half of the augmentation here; without it the numbers travel with the crops.
    encoded_pixels: images of up to so many pixels are handed on undecoded.
    """

    def __init__(
        self,
        config: DataConfig,
        indexes: list[Index],
        order: SampleOrder,
        *,
        image_size: int,
        context_length: int,
        recolor: bool = True,
        encoded_pixels: int = 0,
    ) -> None:
        self.config = config
        self.indexes = indexes
        self.order = order
        self.context_length = context_length
        self.crops = config.views.crops(image_size)
        self.recolor = recolor
        self.encoded_pixels = encoded_pixels

    def __getitem__(self, position: int) -> RawBatch:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int]) -> RawBatch:
        """The samples at these positions, as one batch (the hook torch's loader calls with a batch's indices)."""
        self._fetch_ahead(positions)
        met: list[Fault] = []
        samples: list[Sample] = []
        origins: list[tuple[int, int]] = []
        for position in positions:
            found = self.find(position, met)
            if found is None:
                return RawBatch([], torch.zeros(0), [], met, exhausted=position)
            samples.append(found[0])
            origins.append((position, found[1]))
        keys = [sample.key for sample in samples]
        return RawBatch(self._stacks(samples), self.tokens(samples), keys, met, None, _encoded(samples, origins))

    def _fetch_ahead(self, positions: Sequence[int]) -> None:
        """Start to fetch what these positions, and those that follow in their pieces' wake, need of remote shards."""
        if not any(index.is_remote for index in self.indexes):
            return
        for position in (*positions, *map(self.order.ahead, positions)):
            place = self.order.locate(position)
            self.indexes[place.source].fetch_ahead(place.sample)

    def find(self, position: int, met: list[Fault], attempt: int = 0) -> tuple[Sample, int] | None:
        """The first usable sample for `position` from `attempt` on, and which attempt it was; faults go to `met`."""
        for number in range(attempt, MAX_ATTEMPTS):
            place = self.place(position, number)
            try:
                sample = self.make(place)
            except SampleFault as fault:
                met.append(Fault(fault.cause, self.name(place), fault.detail))
                if fault.cause == faults.UNREACHABLE_SHARD:
                    break
            else:
                met.extend(Fault(repair.cause, self.name(place), repair.detail) for repair in sample.repairs)
                return sample, number
        return None

    def place(self, position: int, attempt: int) -> Place:
        """Where the sample for `position` lies: attempt 0 is its own, later ones are substitutes."""
        return self.order.substitute(position, attempt) if attempt else self.order.locate(position)

    def name(self, place: Place) -> str:
        """`shard.tar:key`, for messages."""
        return self.indexes[place.source].name(place.sample)

    def make(self, place: Place) -> Sample:
        """Read, decode and cut one sample. Raises SampleFault."""
        config, index, seed = self.config, self.indexes[place.source], self.order.seed
        at = {"item": place.sample, "epoch": place.epoch, "source": place.source}
        members = index.read(place.sample, max_bytes=config.max_member_bytes, only=is_used_in_training)
        extension = image_extension(members)
        if extension is None:
            raise SampleFault(faults.MISSING_IMAGE)
        if RECORD_EXTENSION not in members:
            raise SampleFault(faults.MISSING_RECORD)
        record = parse_record(members[RECORD_EXTENSION], index.source.schema)
        captions = draw_captions(record.sentences, config.views, rng.generator(seed, rng.CAPTIONS, **at))
        data, key, numbers = members[extension], index.key(place.sample), rng.generator(seed, rng.CROPS, **at)
        if self.encoded_pixels:
            checked = checked_image(data, config.max_pixels)
            if encoded.fits(checked.data, checked.width, checked.height, self.encoded_pixels):
                views = draw_views(self.crops, checked.width, checked.height, numbers)
                return Sample([], views, captions, key, checked.data, checked.repairs)
        repairs: list[Repair] = []
        image = decode(data, config.max_pixels, repairs)
        views = draw_views(self.crops, image.width, image.height, numbers)
        pixels = to_pixels(image)
        return Sample([crop_and_resize(pixels, view) for view in views], views, captions, key, repairs=repairs)

    def tokens(self, samples: Sequence[Sample]) -> torch.Tensor:
        """int64 [V, B, L]"""
        count = len(samples[0].captions)
        texts = [sample.captions[view] for view in range(count) for sample in samples]
        return tokenize(texts, self.context_length).view(count, len(samples), self.context_length)

    def _stacks(self, samples: list[Sample]) -> list[CropStack]:
        """Crops of equal size side by side, view-major, recoloured in one go."""
        stacks = []
        split = self.config.views.global_crops
        cut = [sample.crops for sample in samples if not sample.file]
        for views in (range(split), range(split, len(self.crops))):
            if len(views) == 0:
                continue
            size = self.crops[views[0]].size
            crops = [crops[view] for view in views for crops in cut]
            pixels = torch.stack(crops) if crops else torch.empty(0, 3, size, size, dtype=torch.uint8)
            pixels = pixels.contiguous()  # resized crops come channels last, and stack() keeps that
            colors = color_numbers([sample.views[view] for view in views for sample in samples])
            if self.recolor:
                recolor_(pixels, colors)
            pixels = pixels.view(len(views), len(cut), *pixels.shape[1:])
            stacks.append(CropStack(pixels, None if self.recolor else colors))
        return stacks


def _encoded(samples: list[Sample], origins: list[tuple[int, int]]) -> EncodedImages | None:
    rows = [row for row, sample in enumerate(samples) if sample.file]
    if not rows:
        return None
    chosen = [samples[row] for row in rows]
    files, views = [sample.file for sample in chosen], [sample.views for sample in chosen]
    return encoded.pack(rows, files, views, [origins[row] for row in rows])
