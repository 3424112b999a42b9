"""Which checkpoints stay: the newest, every so many steps, and the best evaluated one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cosmos_fast.config import load_config
from cosmos_fast.engine import checkpoint
from cosmos_fast.engine.retention import Retention
from cosmos_fast.recipes import get_recipe
from cosmos_fast.utils.errors import UserError
from tests.tiny_run import make_trainer, tiny_config

RECALL = {2: 10.0, 4: 40.0, 6: 40.0, 8: 30.0, 10: None}  # step 7 has a checkpoint and no evaluation


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (2, 4, 6, 7, 8, 10):
        (tmp_path / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    rows = [{"step": step, "kind": "eval", "teacher_t2i_r1": value} for step, value in RECALL.items()]
    rows += [{"step": 7, "kind": "train", "teacher_t2i_r1": 99.0}, {"step": 5, "kind": "eval", "teacher_t2i_r1": 99.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize(
    ("retention", "left"),
    [
        (Retention(2), [8, 10]),
        (Retention(1, every_steps=4), [4, 8, 10]),
        (Retention(1, best="teacher_t2i_r1"), [6, 10]),
        (Retention(1, best="-teacher_t2i_r1"), [2, 10]),
        (Retention(2, every_steps=7, best="teacher_t2i_r1"), [6, 7, 8, 10]),
        (Retention(9), [2, 4, 6, 7, 8, 10]),
    ],
)
def test_what_stays(retention: Retention, left: list[int], run: Path) -> None:
    for _ in range(2):  # what was kept as the best stays so
        retention.apply(run / "checkpoints", run / "metrics.jsonl")
        assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(run / "checkpoints")] == left


def test_a_number_that_no_evaluation_has_is_told_once(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    retention = Retention(1, best="teacher_i2t_r1")
    with caplog.at_level("WARNING", logger="cosmos_fast"):
        retention.apply(run / "checkpoints", run / "metrics.jsonl")
        retention.apply(run / "checkpoints", run / "metrics.jsonl")
    assert caplog.text.count("run.keep_best=teacher_i2t_r1 keeps nothing: the evaluations have teacher_t2i_r1") == 1
    retention.apply(run / "checkpoints", run / "nowhere.jsonl")


def test_a_run_keeps_its_best(tmp_path: Path) -> None:
    settings = ("run.evaluate_every_steps=1", "run.checkpoint_every_steps=1", "run.keep_checkpoints=1")
    config = tiny_config(tmp_path, *settings, "run.keep_best=quality", "run.checkpoint_async=on")
    trainer = make_trainer(config, (lambda step, student, teacher: {"quality": float(-abs(step - 3))},))
    trainer.fit()
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(trainer.plan.checkpoints)] == [3, 6]


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("on", True), ("off", False), ("true", True)])
def test_when_to_save_behind_training(text: str, value: object) -> None:
    assert load_config(get_recipe("demo"), (f"run.checkpoint_async={text}",)).run.checkpoint_async == value


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("run.checkpoint_async=maybe", "run.checkpoint_async is 'maybe': use one of auto, on, off"),
        ("run.keep_every_steps=-1", "run.keep_every_steps is -1: set it to 0 or above"),
        ("run.keep_best=", None),
        ("run.keep_best=''", "run.keep_best is empty"),
    ],
)
def test_mistakes(setting: str, message: str | None) -> None:
    if message is None:
        assert load_config(get_recipe("demo"), (setting,)).run.keep_best is None
        return
    with pytest.raises(UserError, match=message):
        load_config(get_recipe("demo"), (setting,))
