"""Learning rate, teacher decay and length of a run."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from cosmos_fast.config import EmaConfig, OptimizerConfig, RunConfig, ScheduleConfig, TrainConfig
from cosmos_fast.engine.schedules import ema_decay, learning_rate, total_steps

CONFIG = TrainConfig(name="x", optimizer=OptimizerConfig(lr=1.0), schedule=ScheduleConfig(warmup_steps=4))


def test_warm_up_is_linear_and_starts_above_zero() -> None:
    assert [learning_rate(CONFIG, step, 20) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_cosine_starts_at_the_peak_halves_midway_and_ends_near_zero() -> None:
    assert learning_rate(CONFIG, 4, 20) == 1.0
    assert learning_rate(CONFIG, 12, 20) == pytest.approx(0.5)
    assert learning_rate(CONFIG, 19, 20) == pytest.approx(0.5 * (1 + math.cos(math.pi * 15 / 16)))
    assert learning_rate(CONFIG, 25, 20) == 0.0  # past the end it does not rise again


@pytest.mark.parametrize("warmup", [0, 20, 100])
def test_degenerate_lengths_stay_finite(warmup: int) -> None:
    config = replace(CONFIG, schedule=ScheduleConfig(warmup_steps=warmup))
    assert all(0.0 <= learning_rate(config, step, 20) <= 1.0 for step in range(21))


def test_ema_constant_and_cosine() -> None:
    constant = replace(CONFIG, ema=EmaConfig(decay=0.9))
    cosine = replace(CONFIG, ema=EmaConfig(decay=0.9, schedule="cosine"))
    assert {ema_decay(constant, step, 10) for step in range(10)} == {0.9}
    values = [ema_decay(cosine, step, 10) for step in range(11)]
    assert values == sorted(values)
    assert (values[0], values[5], values[10]) == (pytest.approx(0.9), pytest.approx(0.95), 1.0)


def test_total_steps() -> None:
    run = RunConfig(epochs=1.5, batch_size=8, accumulate_steps=2)
    config = replace(CONFIG, run=run)
    assert total_steps(config, 1000, world_size=4) == 1500 // 64
    assert total_steps(config, 10, world_size=4) == 1
    assert total_steps(replace(config, run=replace(run, max_steps=7)), 1000, world_size=4) == 7
