"""From a position to the sample that stands there: the map-style data set behind the loader, a pure function.

A sample that cannot be used is replaced by a substitute that depends on (seed, position, attempt) only, so batches keep
their size and every split over ranks and workers sees the same samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from cosmos_fast.config import DataConfig
from cosmos_fast.data import faults, rng
from cosmos_fast.data.augment import ViewNumbers, draw_views
from cosmos_fast.data.captions import draw_captions
from cosmos_fast.data.faults import Fault, SampleFault
from cosmos_fast.data.images import crop_and_resize, decode, to_pixels
from cosmos_fast.data.index import RECORD_EXTENSION, Index, image_extension, is_used_in_training
from cosmos_fast.data.order import Place, SampleOrder
from cosmos_fast.data.recolor import ColorNumbers, color_numbers, recolor_
from cosmos_fast.data.records import parse_record
from cosmos_fast.data.tokenizer import tokenize

MAX_ATTEMPTS = 32  # for one position; past it the data is hopeless, not unlucky


@dataclass(frozen=True)
class Sample:
    """One sample, before batching: a uint8 [3, size, size] crop a view (not recoloured), its numbers, captions, key."""

    crops: list[torch.Tensor]
    views: list[ViewNumbers]
    captions: list[str]
    key: str


class CropStack(NamedTuple):
    """Crops of one size. pixels: uint8 [V, B, 3, S, S]. colors: V * B rows still to apply, None when that is done."""

    pixels: torch.Tensor
    colors: ColorNumbers | None


class RawBatch(NamedTuple):
    """What travels from a worker: crops as bytes, a quarter of what normalised ones would take.

    stacks: global crops, then local crops if there are any. texts: int64 [V, B, L]. faults: what was met on the way.
    exhausted: a position for which no substitute was usable (then there are no tensors).
    """

    stacks: list[CropStack]
    texts: torch.Tensor
    keys: list[str]
    faults: list[Fault]
    exhausted: int | None = None


class SampleStream(Dataset[RawBatch]):
    """position -> sample. Reads `indexes`, one a source, in the order of `order`.

    recolor: apply the colour half of the augmentation here; without it the numbers travel with the crops, for a GPU.
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
    ) -> None:
        self.config = config
        self.indexes = indexes
        self.order = order
        self.context_length = context_length
        self.crops = config.views.crops(image_size)
        self.recolor = recolor

    def __getitem__(self, position: int) -> RawBatch:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int]) -> RawBatch:
        """The samples at these positions, as one batch (the hook torch's loader calls with a batch's indices)."""
        met: list[Fault] = []
        samples: list[Sample] = []
        for position in positions:
            sample = self._find(position, met)
            if sample is None:
                return RawBatch([], torch.zeros(0), [], met, exhausted=position)
            samples.append(sample)
        return RawBatch(self._stacks(samples), self._tokens(samples), [sample.key for sample in samples], met)

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
        image = decode(members[extension], config.max_pixels)
        views = draw_views(self.crops, image.width, image.height, rng.generator(seed, rng.CROPS, **at))
        pixels = to_pixels(image)
        return Sample([crop_and_resize(pixels, view) for view in views], views, captions, index.key(place.sample))

    def _find(self, position: int, met: list[Fault]) -> Sample | None:
        for attempt in range(MAX_ATTEMPTS):
            place = self.order.substitute(position, attempt) if attempt else self.order.locate(position)
            try:
                return self.make(place)
            except SampleFault as fault:
                met.append(Fault(fault.cause, self.indexes[place.source].name(place.sample), fault.detail))
        return None

    def _stacks(self, samples: list[Sample]) -> list[CropStack]:
        """Crops of equal size side by side, view-major, recoloured in one go."""
        stacks = []
        split = self.config.views.global_crops
        for views in (range(split), range(split, len(self.crops))):
            if len(views) == 0:
                continue
            pixels = torch.stack([sample.crops[view] for view in views for sample in samples])
            pixels = pixels.contiguous()  # resized crops come channels last, and stack() keeps that
            colors = color_numbers([sample.views[view] for view in views for sample in samples])
            if self.recolor:
                recolor_(pixels, colors)
            pixels = pixels.view(len(views), len(samples), *pixels.shape[1:])
            stacks.append(CropStack(pixels, None if self.recolor else colors))
        return stacks

    def _tokens(self, samples: list[Sample]) -> torch.Tensor:
        """int64 [V, B, L]"""
        count = len(samples[0].captions)
        texts = [sample.captions[view] for view in range(count) for sample in samples]
        return tokenize(texts, self.context_length).view(count, len(samples), self.context_length)
