"""What `bench loader` measures on a GPU: samples that arrive there a second, and what bounds them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.loader_setting import Setting, open_loader
from benchmarks.rows import Row

SAMPLES_PER_S = 4000  # decoded, with eight augmented crops
BATCHES = 12
THREADS = 4  # of DALI on the host: JPEGs that the engine does not take, resizing is the GPU's


def measure(setting: Setting, loaders: list[str], workers: int) -> Iterator[Row]:
    """Samples a second, decoded, cut, recoloured and normalised."""
    for name in loaders:
        opened = open_loader(replace(setting, threads=THREADS), name, workers)
        try:
            seconds = seconds_a_call(partial(next, iter(opened)), setting.device, 2 * workers + 2)
        finally:
            opened.close()
        rate = setting.batch / seconds
        more: dict[str, Any] = {"shapes": {"processes": workers}}
        if name == "dali":
            more |= {"baseline": f"{SAMPLES_PER_S} samples/s", "ratio": SAMPLES_PER_S / rate, "bar": 1.0}
        yield setting.row(f"samples_per_s/{name}", rate, "1/s", **more)


def measure_parts(setting: Setting) -> Iterator[Row]:
    """What may bound the DALI loader, each alone: one worker, decoding and cutting, recolouring and normalising."""
    opened = open_loader(replace(setting, threads=THREADS), "dali", 0)
    try:
        stream = opened.stream
        start = time.perf_counter()
        raw = stream.__getitems__(range(setting.batch))
        rate = setting.batch / (time.perf_counter() - start)
        yield setting.row("worker_samples_per_s/dali", rate, "1/s")
        call = _decoding(setting, stream.crops, raw.encoded)
        yield setting.row(
            "decode_cut_samples_per_s/dali", setting.batch / seconds_a_call(call, setting.device, 4), "1/s"
        )
        call = _recolouring(setting, [stack.colors for stack in raw.stacks], stream.crops)
        yield setting.row("recolour_samples_per_s", setting.batch / seconds_a_call(call, setting.device, 2), "1/s")
    finally:
        opened.close()


def _decoding(setting: Setting, crops: Any, images: Any) -> Callable[[], object]:
    """Decodes and cuts the same files again and again, two batches at work."""
    from cosmos_fast.data.dali_pipeline import DaliPipeline

    device = torch.device(setting.device)
    pipeline = DaliPipeline(crops, setting.batch, device, threads=THREADS, depth=2)
    pipeline.submit(images)

    def call() -> None:
        pipeline.submit(images)
        pipeline.collect()

    return call


def _recolouring(setting: Setting, colors: Any, crops: Any) -> Callable[[], object]:
    from cosmos_fast.data.images import normalize
    from cosmos_fast.data.recolor import recolor_

    sizes = {crop.size: sum(other.size == crop.size for other in crops) for crop in crops}
    shapes = [(views * setting.batch, 3, size, size) for size, views in sizes.items()]
    pixels = [torch.randint(0, 256, shape, dtype=torch.uint8, device=setting.device) for shape in shapes]

    def call() -> None:
        for part, numbers in zip(pixels, colors, strict=True):
            normalize(recolor_(part, numbers))

    return call


def seconds_a_call(call: Callable[[], object], device: str, warmup: int) -> float:
    """Mean of several calls, the GPU's work included."""
    for _ in range(warmup):
        call()
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(BATCHES):
        call()
    wait()
    return (time.perf_counter() - start) / BATCHES
