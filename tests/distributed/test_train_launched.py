"""`train` as a launcher starts it: two ranks read shards, train, stop and go on, on two ranks and on one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cosmos_fast.data.synthetic.scene import SceneSettings
from cosmos_fast.data.synthetic.writer import DatasetSettings, write_dataset
from cosmos_fast.engine.checkpoint import read_state
from cosmos_fast.engine.metrics import read_rows
from tests.tiny_run import TINY

pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.long]

ROOT = Path(__file__).parents[2]
TORCHRUN = ("torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m")
BATCH = 2


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_dataset(folder, DatasetSettings(train=24, heldout=4, shard_size=12, scene=SceneSettings()), 1)
    return folder


def train(folder: Path, shards: Path, launcher: tuple[str, ...], *arguments: str) -> subprocess.CompletedProcess[str]:
    """A run named "run" in `folder`; returns when it has ended, whatever its status."""
    settings = (*TINY, f"data.train={shards / 'train'}", f"run.out_dir={folder}", "name=run", f"run.batch_size={BATCH}")
    settings += ("model.text.vocab_size=49408", "model.text.context_length=77", "data.workers=1")
    settings += (f"evaluate.data={shards / 'heldout'}",)
    listed = [part for setting in settings for part in ("--set", setting)]
    command = [sys.executable, "-m", *launcher, "cosmos_fast.cli.train", "--recipe", "demo", *listed, *arguments]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=600)


def test_two_ranks_train_and_the_run_goes_on_with_two_and_with_one(shards: Path, tmp_path: Path) -> None:
    stage = "deepspeed.zero_optimization.stage"
    parts = [
        (TORCHRUN, ("--set", f"{stage}=2", "--set", "run.max_steps=2")),
        (TORCHRUN, ("--set", f"{stage}=3", "--set", "run.max_steps=4", "--resume")),
        ((), ("--set", "run.max_steps=5", "--resume")),
    ]
    for launcher, arguments in parts:
        done = train(tmp_path, shards, launcher, *arguments)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "run: finished at step" in done.stderr
        assert "is deprecated" not in done.stderr
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3, 4, 5]
    assert [row["samples_seen"] for row in rows if row["kind"] == "train"] == [4, 8, 12, 16, 18]
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [2, 4, 5]
    log = (tmp_path / "run" / "log.txt").read_text()
    assert [int(stage) for stage in re.findall(r"2 ranks on .*gloo, started by torchrun; .*stage (\d)", log)] == [2, 3]
    newest = sorted((tmp_path / "run" / "checkpoints").glob("step_*"))[-1]
    assert read_state(newest)[0].position == 18


def test_a_mistake_is_one_line_of_each_rank_and_writes_nothing(shards: Path, tmp_path: Path) -> None:
    done = train(tmp_path, shards, TORCHRUN, "--set", "run.max_steps=2", "--set", "compute.optimizer=torch")
    assert done.returncode != 0
    assert "under DeepSpeed set compute.optimizer=fused" in done.stderr
    assert not (tmp_path / "run").exists()
