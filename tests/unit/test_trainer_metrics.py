"""Rows of numbers, and where they go."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cosmos_fast.config import load_config
from cosmos_fast.engine.metrics import drop_rows_after, read_rows
from cosmos_fast.engine.run_folder import plan_run
from cosmos_fast.model import load_checkpoint
from cosmos_fast.model.flops import sample_flops
from cosmos_fast.utils.errors import UserError
from tests.tiny_run import flat, losses_of, make_batch, make_trainer, rows_of, tiny_config


@pytest.mark.parametrize("recipe", ["demo", "demo_clip"])
def test_rows_say_what_happened(recipe: str, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "run.log_every_steps=3", "run.max_steps=7", recipe=recipe)
    trainer = make_trainer(config)
    trainer.fit()
    rows = rows_of(trainer)
    assert [row["step"] for row in rows] == [1, 3, 6, 7]
    row = rows[-1]
    assert (row["samples_seen"], row["epoch"], row["skipped"]) == (28, 0.7, 0)
    full_captions = sample_flops(config.model, config.data.views, global_batch=config.run.batch_size)
    assert row["flops"] == pytest.approx(28 * full_captions.training)
    assert row["loss"] == pytest.approx(row["clip_loss"] + row["distill_loss"], rel=1e-6)
    assert row["samples_per_s"] == pytest.approx(4e3 / (row["step_ms"] + row["data_ms"]), rel=1e-6)
    assert row["lr"] == pytest.approx(1e-3 * 0.5 * (1 + math.cos(math.pi * 4 / 5)))
    assert 0 <= row["data_stall_pct"] <= 100
    assert ("distill_logit_scale" in row) == (recipe == "demo")
    assert trainer.state.position == 28
    stored = load_checkpoint(trainer.plan.folder, "teacher")
    assert torch.equal(flat(stored), flat(trainer.teacher))
    assert load_config(trainer.plan.folder / "config.yaml") == config
    log = (trainer.plan.folder / "log.txt").read_text()
    assert "step 7/7  loss" in log
    assert "saved" in log


def test_tensorboard_gets_the_rows(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(tiny_config(tmp_path, "run.tensorboard=true"))
    trainer.fit()
    events = EventAccumulator(str(trainer.plan.folder / "tensorboard")).Reload()
    written = [event.value for event in events.Scalars("train/loss")]
    assert written == pytest.approx(losses_of(trainer), rel=1e-6)


def test_wandb_run_is_continued_by_a_resumed_one(tmp_path: Path, monkeypatch) -> None:
    started: list[dict] = []
    logged: list[tuple[int, dict]] = []

    class Run:
        def log(self, numbers: dict, step: int) -> None:
            logged.append((step, numbers))

        def finish(self) -> None:
            logged.append((-1, {}))

    def init(**settings: object) -> Run:
        started.append(settings)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    config = tiny_config(tmp_path, "run.wandb=true", "run.max_steps=2")
    trainer = make_trainer(config)
    trainer.fit()
    assert [step for step, _ in logged] == [1, 2, -1]
    assert logged[1][1]["train/loss"] == losses_of(trainer)[1]
    make_trainer(config, plan=plan_run(config, "auto")).fit()
    assert started[0]["id"] == started[1]["id"]
    assert started[1]["resume"] == "allow"


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_missing_tracker_is_one_line(package: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=f"pip install {package}"):
        make_trainer(tiny_config(tmp_path, f"run.{package}=true")).fit()


def test_metrics_survive_a_line_cut_short(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": null}\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo')
    assert read_rows(file) == [{"step": 1, "loss": None}, {"step": 2, "loss": 1.5}]
    drop_rows_after(file, 1)
    assert file.read_text() == '{"step": 1, "loss": null}\n'


def test_flops_follow_the_lengths_of_the_captions(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    trainer = make_trainer(config)
    batch = make_batch(config, 0)
    short = (5.0,) * config.data.views.text_views
    trainer.train_step([replace(batch, caption_tokens=short)])
    counted = sample_flops(config.model, config.data.views, caption_tokens=short, global_batch=len(batch.keys))
    assert trainer.state.flops == pytest.approx(len(batch.keys) * counted.training)
    full = sample_flops(config.model, config.data.views, global_batch=len(batch.keys))
    assert counted.training < full.training
