"""Images of a set for a model: threads read, decode and cut them ahead of it.

Axis legend: B images of a batch, N of a block, D embed, S side of an image.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import chain, islice
from typing import TypeVar

import torch
from torch import Tensor

from cosmos_fast.data.images import eval_crop, normalize, to_pixels
from cosmos_fast.evaluate.datasets.sets import Images
from cosmos_fast.evaluate.encoder import Encoder

MAX_THREADS = 16
# A batch is read while the model works on another; one more evens out slow files.
BATCHES_AHEAD = 2
Item = TypeVar("Item")


def reader_threads(processes_here: int = 1) -> int:
    """How many threads a process reads with; processes_here: of this evaluation on this host."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MAX_THREADS, cores // max(1, processes_here)))


def central_square(images: Images, number: int, size: int) -> Tensor:
    """uint8 [3, S, S]: short side to S pixels (bicubic), then the middle. UserError where the image is broken."""
    return to_pixels(eval_crop(images.image(number), size))


def ahead(read: Callable[[int], Item], numbers: Iterable[int], threads: int, waiting: int) -> Generator[Item]:
    """read(number) of each number, in order; at most so many of them wait for the taker."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="evaluation")
    queue: deque[Future[Item]] = deque()
    try:
        for number in numbers:
            queue.append(pool.submit(read, number))
            if len(queue) > waiting:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def batches_ahead(
    images: Images, blocks: Sequence[Sequence[int]], size: int, threads: int | None = None
) -> Generator[Tensor]:
    """uint8 [B, 3, S, S] of each block of numbers, in order; as many images as BATCHES_AHEAD of the largest hold wait
    for the taker at most.

    UserError where an image is broken.
    """
    read = partial(central_square, images, size=size)
    waiting = BATCHES_AHEAD * max(map(len, blocks), default=0)
    with closing(ahead(read, chain.from_iterable(blocks), threads or reader_threads(), waiting)) as squares:
        for numbers in blocks:
            yield torch.stack(list(islice(squares, len(numbers))))


@torch.no_grad()
def encode_blocks(
    model: Encoder,
    images: Images,
    blocks: Sequence[Sequence[int]],
    size: int,
    threads: int | None = None,
    on_image: Callable[[], object] = lambda: None,
) -> list[Tensor]:
    """Normalised features float32 [N, D] of each block of numbers, on the model's device; a block is one batch.

    On a GPU the host does not wait for the model, and the pixels go there as bytes. on_image: called once an image.
    """
    device = next(model.parameters()).device
    found = []
    for pixels_B3SS in batches_ahead(images, blocks, size, threads):
        if device.type == "cuda":
            pixels_B3SS = pixels_B3SS.pin_memory().to(device, non_blocking=True)
        found.append(model.encode_image(normalize(pixels_B3SS), normalize=True).float())
        for _ in range(len(pixels_B3SS)):
            on_image()
    return found
