"""The input as the original makes it: PIL, one operation after the other, view by view; the baseline of `bench loader`.

Written from a description: each of the eight views is cut from the decoded picture, resized, flipped, jittered, made
grey, blurred, solarised, turned into a float tensor and normalised; each caption goes through the tokenizer by itself;
a batch is stacked as float32. Members, captions and augmentation numbers are drawn as the product draws them, so that
both make the same samples. Do not make it faster.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.plain_tokenizer import PlainTokenizer
from cosmos_fast.config import DataConfig
from cosmos_fast.data import rng
from cosmos_fast.data.augment import ViewNumbers, draw_views
from cosmos_fast.data.captions import draw_captions
from cosmos_fast.data.images import MEAN, STD
from cosmos_fast.data.index import RECORD_EXTENSION, image_extension, is_used_in_training
from cosmos_fast.data.mixture import open_mixture
from cosmos_fast.data.order import Place
from cosmos_fast.data.records import parse_record

ENHANCE = {"brightness": ImageEnhance.Brightness, "contrast": ImageEnhance.Contrast, "saturation": ImageEnhance.Color}


class OriginalBatch(NamedTuple):
    """images: V tensors float32 [B, 3, H, W]. texts: int64 [V, B, L]."""

    images: list[Tensor]
    texts: Tensor
    keys: list[str]


def decode(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def cut(image: Image.Image, view: ViewNumbers) -> Image.Image:
    """Random resized crop."""
    return image.crop(view.box).resize((view.size, view.size), Image.Resampling.BICUBIC)


def shift_hue(image: Image.Image, turns: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    shifted = np.asarray(hue) + np.array(int(turns * 255) % 256, dtype=np.uint8)  # wraps around, as hues do
    return Image.merge("HSV", (Image.fromarray(shifted), saturation, value)).convert("RGB")


def jitter(image: Image.Image, operation: str, amount: float) -> Image.Image:
    return shift_hue(image, amount) if operation == "hue" else ENHANCE[operation](image).enhance(amount)


def recolor(image: Image.Image, view: ViewNumbers) -> Image.Image:
    """Flip, jitter, grey, blur, solarise: what the numbers of a view ask for after cutting."""
    if view.flip:
        image = ImageOps.mirror(image)
    for operation, amount in view.jitter:
        image = jitter(image, operation, amount)
    if view.gray:
        image = image.convert("L").convert("RGB")
    if view.blur_radius:
        image = image.filter(ImageFilter.GaussianBlur(view.blur_radius))
    if view.solarize_threshold is not None:
        image = ImageOps.solarize(image, view.solarize_threshold)
    return image


def to_tensor(image: Image.Image) -> Tensor:
    """float32 [3, H, W] between 0 and 1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)


def normalize(pixels: Tensor) -> Tensor:
    mean, std = torch.tensor([MEAN, STD]).view(2, 3, 1, 1)
    return pixels.sub(mean).div(std)


class OriginalInput(Dataset[tuple[list[Tensor], list[Tensor], str]]):
    """position -> one sample: normalised views, ids of each caption, key."""

    def __init__(self, config: DataConfig, *, image_size: int, context_length: int, seed: int) -> None:
        self.config = config
        self.indexes, self.order = open_mixture(config, seed)
        self.crops = config.views.crops(image_size)
        self.context_length = context_length
        self.tokenizer = PlainTokenizer()

    def read(self, place: Place) -> tuple[bytes, bytes, str]:
        """Image and record of a sample, and its key."""
        index = self.indexes[place.source]
        members = index.read(place.sample, only=is_used_in_training)
        extension = image_extension(members)
        assert extension is not None
        return members[extension], members[RECORD_EXTENSION], index.key(place.sample)

    def captions(self, record: bytes, place: Place) -> list[str]:
        numbers = rng.generator(self.order.seed, rng.CAPTIONS, **at(place))
        return draw_captions(parse_record(record).sentences, self.config.views, numbers)

    def numbers(self, image: Image.Image, place: Place) -> list[ViewNumbers]:
        numbers = rng.generator(self.order.seed, rng.CROPS, **at(place))
        return draw_views(self.crops, image.width, image.height, numbers)

    def __getitem__(self, position: int) -> tuple[list[Tensor], list[Tensor], str]:
        place = self.order.locate(position)
        data, record, key = self.read(place)
        image = decode(data)
        views = [normalize(to_tensor(recolor(cut(image, view), view))) for view in self.numbers(image, place)]
        texts = [self.tokenizer([caption], self.context_length)[0] for caption in self.captions(record, place)]
        return views, texts, key

    def batches(self, batch_size: int, workers: int = 0) -> Iterator[OriginalBatch]:
        """Batches without end, from position 0."""
        positions = _Positions(batch_size)
        yield from DataLoader(self, batch_sampler=positions, collate_fn=collate, num_workers=workers)


def at(place: Place) -> dict[str, int]:
    """A sample as the random numbers name it."""
    return {"item": place.sample, "epoch": place.epoch, "source": place.source}


def collate(samples: Sequence[tuple[list[Tensor], list[Tensor], str]]) -> OriginalBatch:
    images, texts, keys = zip(*samples, strict=True)
    stacked = [torch.stack(views) for views in zip(*images, strict=True)]
    return OriginalBatch(stacked, torch.stack([torch.stack(view) for view in zip(*texts, strict=True)]), list(keys))


class _Positions:
    """Batch sampler: consecutive positions, for ever."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[Any]]:
        start = 0
        while True:
            yield list(range(start, start + self.batch_size))
            start += self.batch_size
