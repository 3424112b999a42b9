"""Batches of noise in the shapes of a run: what a step costs does not depend on what the pictures show."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from cosmos_fast.config import TrainConfig
from cosmos_fast.data.batch import Batch


def random_batch(
    config: TrainConfig,
    position: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """Crops of noise and captions that fill the context; the same ones for the same position."""
    generator = torch.Generator().manual_seed(position)
    size, views, text = config.run.batch_size, config.data.views, config.model.text
    crops = views.crops(config.model.vision.image_size)
    texts = torch.randint(1, text.vocab_size - 1, (views.text_views, size, text.context_length), generator=generator)
    texts[:, :, -1] = text.vocab_size - 1
    return Batch(
        images=[torch.randn(size, 3, crop.size, crop.size, generator=generator).to(device, dtype) for crop in crops],
        texts=texts,
        keys=[f"sample{position + i}" for i in range(size)],
        position=position,
        next_position=position + size,
    )


class RandomLoader:
    """Stands in for data.Loader: `random_batch` after `random_batch`, without end."""

    def __init__(
        self,
        config: TrainConfig,
        start: int = 0,
        device: torch.device | str = "cpu",
        image_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config = config
        self.position = start
        self.device = device
        self.image_dtype = image_dtype
        self.samples_per_epoch = config.data.samples_per_epoch or config.run.batch_size
        self.stats: dict[str, int] = {}
        self.identity = "random"

    def __iter__(self) -> Iterator[Batch]:
        while True:
            batch = random_batch(self.config, self.position, self.device, self.image_dtype)
            self.position = batch.next_position
            yield batch
