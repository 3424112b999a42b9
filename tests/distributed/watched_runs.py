"""Trainings of two ranks that are watched: their metrics, their logs, and evaluation by all of them."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from cosmos_fast.cli import profiling
from cosmos_fast.data.random_batch import random_batch
from cosmos_fast.engine import profiler
from cosmos_fast.engine.run_folder import RunPlan, plan_run
from cosmos_fast.engine.trainer import Trainer
from cosmos_fast.utils.logging import setup_logging
from cosmos_fast.utils.peak_rates import PeakRate
from cosmos_fast.utils.phases import PhaseTimer
from cosmos_fast.utils.ranks import Ranks, joined_ranks
from tests.distributed.deepspeed_runs import BAD_STEP, RankLoader
from tests.tiny_run import tiny_config

STEPS, LOG_EVERY, PROFILED_STEPS = 5, 2, 3
TRAINED = "that were the trainings"
COPIES = {1: "whole", 3: "parts"}
STAGES = tuple(COPIES)


def watched(ranks: Ranks, folder: Path, stage: int) -> None:
    """A short run in which the samples of the last rank are bad once."""
    settings = (f"name=stage{stage}", f"run.max_steps={STEPS}", f"run.log_every_steps={LOG_EVERY}")
    settings += ("run.evaluate_every_steps=2",)
    settings += (f"deepspeed.zero_optimization.stage={stage}", f"run.teacher_copy={COPIES[stage]}", "run.batch_size=4")
    config = tiny_config(folder, *settings)
    loader = RankLoader(config, ranks, 0, poisoned=ranks.world_size - 1)
    loader.stats = {"made up": 1 + ranks.rank}
    look = partial(uneven_passes, ranks, random_batch(config, 0).images[:1])
    Trainer(config, loader, [look], plan=plan_run(config), ranks=ranks).fit()


def uneven_passes(
    ranks: Ranks, images: list[Tensor], step: int, student: nn.Module, teacher: nn.Module
) -> dict[str, float]:
    """A validator in which each rank makes another number of passes, as where their numbers of batches differ."""
    found: dict[str, float] = {}
    for name, model in (("student", student), ("teacher", teacher)):
        for _ in range(3 * ranks.rank + 1):
            found[name] = float(model.encode_image(images[0], normalize=False).square().sum())  # type: ignore[operator]
    assert all(low == high for low, high in ranks.spread(found).values()), "ranks evaluate other weights"
    return found


def profiled(ranks: Ranks, folder: Path) -> None:
    """What --profile finds; each rank's answer goes to <folder>/profile<rank>.json."""
    profiler.WARMUP_STEPS = profiler.TRACE_STEPS = 1
    profiler.measured_rate = lambda device, precision: PeakRate(1e11, "made up")
    config = tiny_config(folder, "name=profiled", "run.batch_size=4")
    plan, timer = RunPlan(folder / "profiled"), PhaseTimer(torch.device("cpu"))
    trainer = Trainer(config, RankLoader(config, ranks, 0, None), plan=plan, ranks=ranks, clock=timer)
    found = profiler.profile_run(trainer, timer, PROFILED_STEPS, plan.folder / "profile")
    (folder / f"profile{ranks.rank}.json").write_text(json.dumps(found.to_json()))
    if ranks.first:
        with Path(folder, "profile.txt").open("w") as file:
            profiling.show(found, plan.folder / "profile", Console(file=file, width=140))


def run_all(folder: str) -> None:
    """What each rank says on stderr goes to <folder>/stderr<rank>."""
    with joined_ranks("cpu", always=True) as ranks, Path(folder, f"stderr{ranks.rank}").open("w") as sys.stderr:
        setup_logging(ranks.rank, ranks.world_size)
        for stage in STAGES:
            watched(ranks, Path(folder), stage)
        print(TRAINED, file=sys.stderr)
        profiled(ranks, Path(folder))


assert BAD_STEP < STEPS
