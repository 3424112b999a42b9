"""The train command on real shards, ended from outside at any moment, goes on as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cosmos_fast.engine.checkpoint import list_checkpoints
from cosmos_fast.engine.metrics import read_rows
from tests.shards import write_shards
from tests.tiny_run import TINY

ROOT = Path(__file__).parents[2]
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


def start(out_dir: Path, shards: Path, name: str, *arguments: str) -> subprocess.Popen[str]:
    settings = [f"--set={setting}" for setting in (*SETTINGS, f"run.out_dir={out_dir}", f"data.train={shards}")]
    program = [sys.executable, "-m", "cosmos_fast.cli.train", "--recipe=demo", f"--set=name={name}", *settings]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    # A session of its own, so that a signal can go to trainer and loader workers alike, as a cluster sends it.
    return subprocess.Popen(
        [*program, *arguments], stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def rows(out_dir: Path, name: str) -> list[dict]:
    file = out_dir / name / "metrics.jsonl"
    return read_rows(file) if file.exists() else []


def wait_for_step(process: subprocess.Popen[str], out_dir: Path, name: str, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if any(row["step"] >= step for row in rows(out_dir, name)):
            return
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.02)
    raise AssertionError(f"step {step} did not come")


def timeless(found: list[dict]) -> list[dict]:
    return [{key: row[key] for key in TIMELESS} for row in found]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> list[dict]:
    out_dir = tmp_path_factory.mktemp("whole")
    process = start(out_dir, shards, "whole")
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    return timeless(rows(out_dir, "whole"))


@pytest.mark.slow
def test_sigkill_mid_epoch_then_resume_gives_the_same_losses(
    tmp_path: Path, shards: Path, uninterrupted: list[dict]
) -> None:
    process = start(tmp_path, shards, "cut")
    wait_for_step(process, tmp_path, "cut", 16)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert [folder.name for folder in list_checkpoints(tmp_path / "cut/checkpoints")][-1] == "step_00000014"
    resumed = start(tmp_path, shards, "cut", "--resume")
    _, errors = resumed.communicate(timeout=180)
    assert resumed.returncode == 0, errors
    assert "continuing from" in errors
    found = timeless(rows(tmp_path, "cut"))
    assert len(found) == 24
    assert found == uninterrupted


@pytest.mark.slow
def test_sigterm_to_the_whole_process_group_saves_exits_0_and_resumes(
    tmp_path: Path, shards: Path, uninterrupted: list[dict]
) -> None:
    process = start(tmp_path, shards, "stopped")
    wait_for_step(process, tmp_path, "stopped", 3)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "stopped by SIGTERM" in errors
    stopped_at = rows(tmp_path, "stopped")[-1]["step"]
    assert list_checkpoints(tmp_path / "stopped/checkpoints")[-1].name == f"step_{stopped_at:08d}"
    resumed = start(tmp_path, shards, "stopped", "--resume", "--set=data.workers=0")
    _, errors = resumed.communicate(timeout=180)
    assert resumed.returncode == 0, errors
    assert timeless(rows(tmp_path, "stopped")) == uninterrupted


@pytest.mark.long
def test_sigkill_at_random_moments_on_any_number_of_workers_gives_the_same_losses(
    tmp_path: Path, shards: Path, uninterrupted: list[dict]
) -> None:
    """Of the whole process group as of the trainer alone; in the middle of steps, of saves, and before the first."""
    chance = random.Random(0)
    done, kills = 0, 0
    while done < 20:
        settings = (f"--set=data.workers={kills % 3}", "--set=run.checkpoint_every_steps=2", "--resume")
        process = start(tmp_path, shards, "cut", *settings)
        wait_for_step(process, tmp_path, "cut", done + chance.randrange(5)) if kills else time.sleep(1)
        time.sleep(0.3 * chance.random())
        (os.killpg if kills % 2 else os.kill)(process.pid, signal.SIGKILL)
        process.communicate()
        kills += 1
        done = max((row["step"] for row in rows(tmp_path, "cut")), default=0)
    assert kills >= 5
    last = start(tmp_path, shards, "cut", "--resume")
    _, errors = last.communicate(timeout=180)
    assert last.returncode == 0, errors
    assert timeless(rows(tmp_path, "cut")) == uninterrupted
