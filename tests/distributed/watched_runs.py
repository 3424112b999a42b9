"""Trainings of two ranks that are watched: their metrics, their logs, and evaluation by all of them."""

from __future__ import annotations

import sys
from pathlib import Path

from cosmos_fast.engine.run_folder import plan_run
from cosmos_fast.engine.trainer import Trainer
from cosmos_fast.utils.logging import setup_logging
from cosmos_fast.utils.ranks import Ranks, joined_ranks
from tests.distributed.deepspeed_runs import BAD_STEP, RankLoader
from tests.tiny_run import tiny_config

STEPS, LOG_EVERY = 5, 2
COPIES = {1: "whole", 3: "parts"}
STAGES = tuple(COPIES)


def watched(ranks: Ranks, folder: Path, stage: int) -> None:
    """A short run in which the samples of the last rank are bad once."""
    settings = (f"name=stage{stage}", f"run.max_steps={STEPS}", f"run.log_every_steps={LOG_EVERY}")
    settings += (f"deepspeed.zero_optimization.stage={stage}", f"run.teacher_copy={COPIES[stage]}", "run.batch_size=4")
    config = tiny_config(folder, *settings)
    loader = RankLoader(config, ranks, 0, poisoned=ranks.world_size - 1)
    loader.stats = {"made up": 1 + ranks.rank}
    Trainer(config, loader, plan=plan_run(config), ranks=ranks).fit()


def run_all(folder: str) -> None:
    """What each rank says on stderr goes to <folder>/stderr<rank>."""
    with joined_ranks("cpu", always=True) as ranks, Path(folder, f"stderr{ranks.rank}").open("w") as sys.stderr:
        setup_logging(ranks.rank, ranks.world_size)
        for stage in STAGES:
            watched(ranks, Path(folder), stage)


assert BAD_STEP < STEPS
