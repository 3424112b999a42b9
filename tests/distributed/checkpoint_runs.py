"""What two ranks do to their checkpoints, all of it in one launch; tests look at the folders that are left."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from cosmos_fast.config import TrainConfig
from cosmos_fast.engine import checkpoint
from cosmos_fast.engine.checkpoint import Part, Snapshot
from cosmos_fast.engine.run_folder import plan_run
from cosmos_fast.engine.trainer import Trainer
from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.ranks import Ranks, joined_ranks
from tests.distributed.deepspeed_runs import RankLoader
from tests.tiny_run import tiny_config

WAIT_S = 300.0
STAGES = (1, 3, 0, 2)  # in which a checkpoint of one process is taken and written again
STEPS, EVERY = 5, 2


def config_of(folder: Path, name: str, stage: int, *more: str) -> TrainConfig:
    """Four samples a step on two ranks."""
    settings = (f"name={name}", f"deepspeed.zero_optimization.stage={stage}", "run.batch_size=2", "run.threads=1")
    settings += (f"run.max_steps={STEPS}", f"run.checkpoint_every_steps={EVERY}", "run.keep_checkpoints=9")
    return tiny_config(folder, *settings, *more)


def trainer_of(config: TrainConfig, ranks: Ranks, resume: str | None = None) -> Trainer:
    """From the start, or from a checkpoint that the command would take."""
    plan = plan_run(config, resume)
    return Trainer(config, RankLoader(config, ranks, plan.state.position, None), plan=plan, ranks=ranks)


def at_step(trainer: Trainer, act: Callable[[int], None]) -> None:
    """Call `act` with the number of steps done, before each step."""
    step = trainer.train_step

    def acting(*arguments: Any) -> Any:
        act(trainer.state.step)
        return step(*arguments)

    trainer.train_step = acting  # type: ignore[method-assign]


@contextmanager
def writing(instead: Callable[[Path, Snapshot | Part], None]) -> Iterator[None]:
    """`instead` is called before a rank writes its files."""
    write = checkpoint.write

    def changed(aside: Path, content: Snapshot | Part) -> None:
        instead(aside, content)
        write(aside, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "write", changed)
        yield


def pass_on(folder: Path, ranks: Ranks) -> None:
    """The checkpoint of one process, read and written again by two ranks in stage after stage."""
    source = folder / "alone" / "checkpoints" / f"step_{STEPS:08d}"
    for stage in STAGES:
        config = config_of(folder, f"passed_{stage}", stage)
        trainer = trainer_of(config, ranks, str(source))
        trainer.checkpointer.save(trainer)
        source = trainer.plan.checkpoints / source.name


def save_behind_training(folder: Path, ranks: Ranks) -> None:
    """Rank 1 cannot write the save of step 2 before step 4 begins."""
    may_write = threading.Event()
    seen: dict[int, list[str]] = {}

    def hold(aside: Path, content: Snapshot | Part) -> None:
        if ranks.rank == 1:
            assert may_write.wait(WAIT_S)

    trainer = trainer_of(config_of(folder, "behind", 2, "run.checkpoint_async=on"), ranks)

    def look(step: int) -> None:
        seen[step] = [path.name for path in checkpoint.list_checkpoints(trainer.plan.checkpoints)]
        if step == 3:
            may_write.set()

    at_step(trainer, look)
    with writing(hold):
        trainer.fit()
    if ranks.first:
        (folder / "seen.json").write_text(json.dumps(seen))


def fill_the_disk(folder: Path, ranks: Ranks, mode: str) -> None:
    """Rank 1's disk is full at step 4; then there is room."""

    def fail(aside: Path, content: Snapshot | Part) -> None:
        if content.state.step == 4 and ranks.rank == 1:
            (aside / "half").write_bytes(bytes(100))
            raise UserError("checkpoint could not be written") from OSError(errno.ENOSPC, "No space left on device")

    config = config_of(folder, f"full_{mode}", 2, f"run.checkpoint_async={mode}")
    with writing(fail), pytest.raises(UserError) as raised:
        trainer_of(config, ranks).fit()
    left = sorted(path.name for path in (folder / config.name / "checkpoints").iterdir())
    (folder / f"full_{mode}_{ranks.rank}.json").write_text(json.dumps([str(raised.value), left]))
    ranks.barrier()
    trainer_of(config, ranks, "auto").fit()


def run_all(folder_name: str) -> None:
    """On each of two ranks."""
    folder = Path(folder_name)
    with joined_ranks("cpu", always=True) as ranks:
        trainer_of(config_of(folder, "plain", 2), ranks).fit()
        pass_on(folder, ranks)
        save_behind_training(folder, ranks)
        for mode in ("off", "on"):
            fill_the_disk(folder, ranks, mode)


def killed_while_writing(folder_name: str) -> None:
    """Rank 1 ends by SIGKILL when half of its part of step 4 is on the disk.

    That is what the parent is to see first, however late it looks: rank 0, which loses it, waits to be ended.
    """
    folder = Path(folder_name)
    real = checkpoint.save_file

    def save_file(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        real(tensors, path, metadata)
        if "step_00000004" in str(path) and path.name.startswith("part_00001"):
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    trainer: Trainer | None = None
    try:
        with joined_ranks("cpu", always=True) as ranks, pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint, "save_file", save_file)
            trainer = trainer_of(config_of(folder, "killed", 2, "run.checkpoint_async=on"), ranks)
            trainer.fit()
    except UserError:
        if trainer is None or not trainer.stop.requested:  # by the parent's SIGTERM, which ends what trains no more
            time.sleep(WAIT_S)
        raise
