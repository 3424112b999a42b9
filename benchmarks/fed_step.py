"""A training step fed by a loader, against the same step on batches that are there already.

On a CPU the small model of `bench step` on 64 and 32 px crops and one thread, on a GPU the published model on 224 and
96 px crops. Before the clock starts, what the loader has made ahead is taken away: it must keep up, not live on stores.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from benchmarks.harness import Timing, time_ms
from benchmarks.loader_setting import Setting, open_loader
from benchmarks.rows import Row
from benchmarks.shapes import StepShape, mini_step, vit_b_16_step
from benchmarks.sides import resting_cpu_seconds
from benchmarks.step_setting import Setting as StepSetting
from benchmarks.step_setting import Trainer, make_product

LEARNING_RATE = 1e-4
STEPS = 5  # of a lap
WARMUP = 1
STALL_PCT, REAL_INPUT = 5.0, 1 / 0.95  # asked of DALI on a GPU
DALI_THREADS = 4  # on the host of a GPU


def step_shape(device: str, batch: int) -> StepShape:
    """The step that is fed."""
    return vit_b_16_step(batch) if device == "cuda" else mini_step(batch=batch)


class Fed:
    """Steps on a loader's batches as they come, and on some that were kept; counts the seconds spent waiting."""

    def __init__(self, trainer: Trainer, batches: Iterator[Any]) -> None:
        self.trainer = trainer
        self.batches = batches
        self.kept: Sequence[Any] = list(islice(batches, STEPS))
        self.waited_s = 0.0

    def on_kept(self, _: None) -> None:
        for batch in self.kept:
            self.trainer.step(batch.images, batch.texts, lr=LEARNING_RATE)

    def on_fresh(self, _: None) -> None:
        for _step in range(STEPS):
            asked_s = time.perf_counter()
            batch = next(self.batches)
            self.waited_s += time.perf_counter() - asked_s
            self.trainer.step(batch.images, batch.texts, lr=LEARNING_RATE)

    def take_stores(self, batches: int) -> None:
        for _ in range(batches):
            next(self.batches)


def alternate(fed: Fed, device: str, stored: int, repeats: int) -> Timing:
    """Laps of both kinds in turns. In laps on kept batches the loader rests; its stores are empty before the others."""
    timing = Timing([], [])
    for repetition in range(WARMUP + repeats):
        for fresh in (False, True) if repetition % 2 == 0 else (True, False):
            if fresh:
                fed.take_stores(stored)
            else:
                resting_cpu_seconds(os.getpid(), "the loader", itself=False)
            lap_ms = time_ms(fed.on_fresh if fresh else fed.on_kept, None, device)
            if repetition >= WARMUP:
                (timing.candidate_ms if fresh else timing.baseline_ms).append(lap_ms)
        if repetition < WARMUP:
            fed.waited_s = 0.0
    return timing


def measure(setting: Setting, loader: str, workers: int, repeats: int) -> Iterator[Row]:
    """Milliseconds of a fed step against one on kept batches, and the share of its time that it waits."""
    device = setting.device
    on_gpu = device == "cuda"
    step = StepSetting("loader", step_shape(device, setting.batch), device, "bf16" if on_gpu else "fp32")
    workers = max(1, workers - 1)  # the step needs a core too
    sized = replace(setting, image_px=step.shape.model.image_size, local_px=step.shape.local_px)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if on_gpu else 1)
    opened = open_loader(replace(sized, threads=DALI_THREADS if on_gpu else 1), loader, workers)
    try:
        config = opened.stream.config
        stored = config.prefetch * workers + config.dali.ahead + 1
        fed = Fed(make_product(step), iter(opened))
        timing = alternate(fed, device, stored, repeats)
    finally:
        opened.close()
        torch.set_num_threads(threads)
    stall_pct = 100 * 1e3 * fed.waited_s / sum(timing.candidate_ms)
    more: dict[str, Any] = {"shapes": {**step.shape.describe(), "processes": workers}}
    asked = on_gpu and loader == "dali"
    yield sized.row(f"kept_step_ms/{loader}", timing.baseline_median_ms / STEPS, "ms", **more)
    against: dict[str, Any] = {"baseline": "batches kept", "ratio": timing.ratio, "bar": REAL_INPUT if asked else None}
    yield sized.row(f"fed_step_ms/{loader}", timing.candidate_median_ms / STEPS, "ms", **against, **more)
    against = {"baseline": f"{STALL_PCT:g} %", "ratio": stall_pct / STALL_PCT, "bar": 1.0} if asked else {}
    yield sized.row(f"stall_pct/{loader}", stall_pct, "%", **against, **more)
