"""fp16: the loss scale finds its size, is kept in checkpoints, and is not taken for a failure."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cosmos_fast.data.batch import Batch
from cosmos_fast.engine import loss_scale
from cosmos_fast.engine.loss_scale import LossScaler
from cosmos_fast.engine.optimizer import StepResult
from cosmos_fast.engine.precision import Precision
from cosmos_fast.engine.run_folder import plan_run
from cosmos_fast.engine.state import TrainState
from cosmos_fast.utils.errors import UserError
from tests.tiny_run import flat, losses_of, make_trainer, rows_of, tiny_config

APPLIED = StepResult(grad_norm=1.0, applied=True)
OVERFLOW = StepResult(grad_norm=math.inf, applied=False)
BAD_LOSS = StepResult(grad_norm=math.nan, applied=False, loss_finite=False)


def scaler(state: TrainState, precision: str = "fp16") -> LossScaler:
    return LossScaler(Precision(precision, "cpu"), state)


def test_halves_on_overflow_and_doubles_after_enough_good_steps(monkeypatch) -> None:
    monkeypatch.setattr(loss_scale, "GROWTH_STEPS", 3)
    state = TrainState()
    scale = scaler(state)
    assert scale.scale == 2.0**16
    assert scale.update(OVERFLOW)
    assert [scale.update(APPLIED) for _ in range(2)] == [False, False]
    assert (scale.scale, state.steps_at_scale, state.overflows) == (2.0**15, 2, 1)
    assert scale.update(OVERFLOW)  # the count starts anew
    for _ in range(3):
        scale.update(APPLIED)
    assert (scale.scale, state.steps_at_scale) == (2.0**15, 0)
    for _ in range(300):
        scale.update(APPLIED)
    assert scale.scale == loss_scale.LARGEST_SCALE
    assert scale.numbers() == {"loss_scale": 2.0**24, "overflows": 2}


def test_bad_loss_and_bad_gradient_at_the_least_scale_are_failures() -> None:
    state = TrainState()
    scale = scaler(state)
    assert not scale.update(BAD_LOSS)
    assert scale.scale == 2.0**16
    assert [scale.update(OVERFLOW) for _ in range(17)] == [True] * 16 + [False]
    assert (scale.scale, state.overflows) == (1.0, 16)


def test_other_precisions_scale_nothing() -> None:
    state = TrainState(loss_scale=4.0)  # continued from an fp16 run
    scale = scaler(state, "bf16")
    loss = torch.ones(())
    assert scale.scaled(loss) is loss
    assert not scale.update(OVERFLOW)
    assert (scale.scale, scale.numbers(), state.loss_scale) == (1.0, {}, None)


def test_fp16_stays_near_fp32_with_fp32_masters(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(loss_scale, "INITIAL_SCALE", 2.0**8)  # no overflow: this model's gradients are large
    found = {}
    for precision in ("fp32", "fp16"):
        trainer = make_trainer(tiny_config(tmp_path, f"run.precision={precision}", f"name={precision}"))
        trainer.fit()
        assert {p.dtype for p in (*trainer.student.parameters(), *trainer.teacher.parameters())} == {torch.float32}
        found[precision] = rows_of(trainer)
    for plain, scaled in zip(found["fp32"], found["fp16"], strict=True):
        assert scaled["loss"] == pytest.approx(plain["loss"], rel=3e-3)
        assert scaled["grad_norm"] == pytest.approx(plain["grad_norm"], rel=2e-2)
        assert (scaled["loss_scale"], scaled["overflows"]) == (2.0**8, 0)
        assert "loss_scale" not in plain


def test_overflow_is_skipped_but_no_failure_and_resumes_exactly(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(loss_scale, "INITIAL_SCALE", 2.0**40)  # many steps until the gradients fit
    settings = ("run.precision=fp16", "run.max_steps=26", "run.max_nonfinite_steps=2", "run.checkpoint_every_steps=5")
    config = tiny_config(tmp_path, *settings, "optimizer.clip_norm=0.5", "run.keep_checkpoints=9")
    whole = make_trainer(config)
    before = flat(whole.student).clone()
    with caplog.at_level("INFO", logger="cosmos_fast"):
        whole.fit()
    assert "a gradient overflowed: not applied, loss scale now" in caplog.text
    state = whole.state
    assert 3 <= state.overflows < 26
    assert (state.skipped, state.loss_scale) == (0, 2.0 ** (40 - state.overflows))
    assert not torch.equal(flat(whole.student), before)
    assert losses_of(whole)[0] == pytest.approx(losses_of(whole)[2], abs=1.0)  # other batches, the same weights
    for step in (5, 20):  # among the overflows, and after them
        branch = replace(config, name=f"from_{step}")
        plan = plan_run(branch, str(whole.plan.checkpoints / f"step_{step:08d}"))
        resumed = make_trainer(branch, plan=plan)
        resumed.fit()
        assert losses_of(resumed) == losses_of(whole)[step:]
        assert torch.equal(flat(resumed.student), flat(whole.student))
        assert resumed.state == state


def test_nan_in_the_data_is_a_failure_in_fp16_too(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(loss_scale, "INITIAL_SCALE", 2.0**8)

    def poison(batch: Batch) -> None:
        if batch.position >= 8:
            batch.images[0][1] = math.nan

    settings = ("run.precision=fp16", "run.max_nonfinite_steps=3", "run.max_steps=20")
    trainer = make_trainer(tiny_config(tmp_path, *settings), poison=poison)
    with pytest.raises(UserError, match="3 steps in a row"):
        trainer.fit()
    assert (trainer.state.step, trainer.state.skipped, trainer.state.overflows) == (5, 3, 0)
    assert trainer.state.loss_scale == 2.0**8


def test_gradients_are_scaled_under_accumulation_with_all_negatives(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(loss_scale, "INITIAL_SCALE", 2.0**8)
    norms = {}
    for precision in ("fp32", "fp16"):
        settings = (f"run.precision={precision}", f"name={precision}", "run.accumulate_steps=2", "run.negatives=all")
        trainer = make_trainer(tiny_config(tmp_path, *settings, "run.max_steps=1"))
        trainer.fit()
        norms[precision] = rows_of(trainer)[0]["grad_norm"]
    assert norms["fp16"] == pytest.approx(norms["fp32"], rel=1e-2)


def test_a_checkpoint_from_before_loss_scales_is_read() -> None:
    former = {key: value for key, value in TrainState(step=3).to_json().items() if "scale" not in key}
    assert TrainState.from_json(former) == TrainState(step=3)
    del former["position"]
    with pytest.raises(UserError, match="lacks position"):
        TrainState.from_json(former)
