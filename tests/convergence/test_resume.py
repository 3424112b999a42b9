"""The train command on real shards, ended from outside at any moment, goes on as if nothing had happened."""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cosmos_fast.cli.main import run
from cosmos_fast.cli.train import command
from cosmos_fast.engine.checkpoint import list_checkpoints
from cosmos_fast.engine.metrics import read_rows
from cosmos_fast.engine.trainer import Trainer
from tests.ranks import PRELOADED
from tests.shards import write_shards
from tests.tiny_run import TINY

FORKSERVER = multiprocessing.get_context("forkserver")
# 37 samples, 4 a step: 9.25 steps an epoch, so that steps 14 to 17 lie inside the second epoch.
SETTINGS = (
    *TINY,
    "model.text={context_length: 77, vocab_size: 49408, width: 16, heads: 2, layers: 2}",
    "run.max_steps=24",
    "run.checkpoint_every_steps=7",
    "run.threads=1",
    "data.workers=2",
)
TIMELESS = ("step", "epoch", "samples_seen", "loss", "clip_loss", "distill_loss", "lr", "grad_norm", "logit_scale")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), counts=(20, 17))


class Life:
    """A run of the command in a process of its own, a fork of one that has imported everything already.

    hold: the step after which it stops itself (SIGSTOP) for good, so that what comes from outside comes neither too
    early nor too late. It leads a session of its own, so that a signal can go to trainer and loader workers alike, as
    a cluster sends it.
    """

    def __init__(self, out_dir: Path, shards: Path, name: str, *arguments: str, hold: int | None = None) -> None:
        settings = [f"--set={setting}" for setting in (*SETTINGS, f"run.out_dir={out_dir}", f"data.train={shards}")]
        self.rows_file = out_dir / name / "metrics.jsonl"
        self.log = out_dir / f"{name}.log"
        self.log.unlink(missing_ok=True)
        line = ["--recipe=demo", f"--set=name={name}", *settings, *arguments]
        FORKSERVER.set_forkserver_preload(PRELOADED)
        self.process = FORKSERVER.Process(target=_train, args=(line, self.log, hold))
        self.process.start()
        self.pid = self.process.pid or 0
        self.wait_until(self.log.exists)

    def wait_until(self, event: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 600
        while True:
            is_alive = self.process.is_alive()
            if event():
                return
            assert is_alive, self.log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: any(row["step"] >= step for row in rows(self.rows_file.parent)))

    def wait_for_hold(self) -> None:
        self.wait_until(lambda: Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")

    def end(self) -> str:
        """What it said; it must end by itself, and well."""
        self.process.join(600)
        said = self.log.read_text()
        assert self.process.exitcode == 0, said
        return said


def _train(arguments: list[str], log: Path, hold: int | None) -> None:
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # of loader workers, as where the command runs by itself
    sys.stdout = sys.stderr = log.open("x", buffering=1)
    logging.getLogger("cosmos_fast").handlers.clear()  # of this process's former tests
    train_step = Trainer.train_step

    def stop_or_train(trainer: Trainer, *arguments: Any) -> Any:
        if trainer.state.step == hold:
            os.kill(os.getpid(), signal.SIGSTOP)
        return train_step(trainer, *arguments)

    Trainer.train_step = stop_or_train  # type: ignore[method-assign]
    sys.exit(run(command, arguments, name="cosmos-fast train"))


def rows(folder: Path) -> list[dict]:
    file = folder / "metrics.jsonl"
    return read_rows(file) if file.exists() else []


def timeless(found: list[dict]) -> list[dict]:
    return [{key: row[key] for key in TIMELESS} for row in found]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> list[dict]:
    out_dir = tmp_path_factory.mktemp("whole")
    Life(out_dir, shards, "whole").end()
    return timeless(rows(out_dir / "whole"))


@pytest.mark.slow
def test_sigkill_mid_epoch_then_resume_gives_the_same_losses(
    tmp_path: Path, shards: Path, uninterrupted: list[dict]
) -> None:
    life = Life(tmp_path, shards, "cut", hold=16)
    life.wait_for_hold()
    os.kill(life.pid, signal.SIGKILL)
    life.process.join()
    assert rows(tmp_path / "cut")[-1]["step"] == 16
    assert [folder.name for folder in list_checkpoints(tmp_path / "cut/checkpoints")][-1] == "step_00000014"
    assert "continuing from" in Life(tmp_path, shards, "cut", "--resume").end()
    found = timeless(rows(tmp_path / "cut"))
    assert len(found) == 24
    assert found == uninterrupted


@pytest.mark.slow
def test_sigterm_to_the_whole_process_group_saves_exits_0_and_resumes(
    tmp_path: Path, shards: Path, uninterrupted: list[dict]
) -> None:
    life = Life(tmp_path, shards, "stopped", hold=3)
    life.wait_for_hold()
    os.killpg(life.pid, signal.SIGTERM)
    os.kill(life.pid, signal.SIGCONT)
    assert "stopped by SIGTERM" in life.end()
    assert rows(tmp_path / "stopped")[-1]["step"] == 4
    assert list_checkpoints(tmp_path / "stopped/checkpoints")[-1].name == "step_00000004"
    Life(tmp_path, shards, "stopped", "--resume", "--set=data.workers=0").end()
    assert timeless(rows(tmp_path / "stopped")) == uninterrupted


@pytest.mark.long
def test_sigkill_at_random_moments_on_any_number_of_workers_gives_the_same_losses(
    tmp_path: Path, shards: Path, uninterrupted: list[dict]
) -> None:
    """Of the whole process group as of the trainer alone; in the middle of steps, of saves, and before the first."""
    chance = random.Random(0)
    done, kills = 0, 0
    while done < 20:
        settings = (f"--set=data.workers={kills % 3}", "--set=run.checkpoint_every_steps=2", "--resume")
        target = done + chance.randrange(4)
        life = Life(tmp_path, shards, "cut", *settings, hold=target + 1)  # no further, however late the kill
        if kills:
            life.wait_for_step(target)
        time.sleep(0.3 * chance.random())
        (os.killpg if kills % 2 else os.kill)(life.pid, signal.SIGKILL)
        life.process.join()
        kills += 1
        done = max((row["step"] for row in rows(tmp_path / "cut")), default=0)
    assert kills >= 5
    Life(tmp_path, shards, "cut", "--resume").end()
    assert timeless(rows(tmp_path / "cut")) == uninterrupted
