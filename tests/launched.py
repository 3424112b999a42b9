"""`train` as launchers start it: its options for a tiny run over shards, and what its processes find."""

from __future__ import annotations

import os
from pathlib import Path

from cosmos_fast.data.synthetic.scene import SceneSettings
from cosmos_fast.data.synthetic.writer import DatasetSettings, write_dataset
from tests.tiny_run import TINY

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
TIMEOUT_S = 600.0  # of a command: a failure, never a measure of speed
TRAIN = "cosmos_fast.cli.train"


def make_shards(folder: Path) -> Path:
    """Two shards to train on, `train/`, and a few pairs held out, `heldout/`."""
    write_dataset(folder, DatasetSettings(train=24, heldout=4, shard_size=12, scene=SceneSettings()), 1)
    return folder


def options(folder: Path, shards: Path, *more: str) -> list[str]:
    """Of `train`, for a run named "run" in `folder`; more: settings."""
    settings = (*TINY, f"data.train={shards / 'train'}", f"run.out_dir={folder}", "name=run", "data.workers=1")
    settings += ("model.text.vocab_size=49408", "model.text.context_length=77", "run.precision=fp32", *more)
    return ["--recipe", "demo", *(part for setting in settings for part in ("--set", setting))]
