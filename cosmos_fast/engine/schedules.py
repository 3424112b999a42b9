"""Learning rate and teacher decay as pure functions of the step (0 is the first optimizer step)."""

from __future__ import annotations

import math

from cosmos_fast.config import TrainConfig


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """`lr * (step + 1) / warmup` during warm-up, then half a cosine that would reach 0 at `total_steps`."""
    base, warmup = config.optimizer.lr, config.schedule.warmup_steps
    if step < warmup:
        return base * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    return 0.5 * base * (1.0 + math.cos(math.pi * progress))


def ema_decay(config: TrainConfig, step: int, total_steps: int) -> float:
    """The share of the old teacher that stays: constant, or a half cosine from ema.decay up to 1."""
    base = config.ema.decay
    if config.ema.schedule == "constant":
        return base
    progress = min(1.0, step / max(1, total_steps))
    return 1.0 - 0.5 * (1.0 - base) * (1.0 + math.cos(math.pi * progress))


def total_steps(config: TrainConfig, samples_per_epoch: int, world_size: int) -> int:
    """Optimizer steps of the run: run.max_steps, or run.epochs times the whole steps' worth of samples; at least 1."""
    if config.run.max_steps is not None:
        return config.run.max_steps
    assert config.run.epochs is not None
    samples_a_step = config.run.batch_size * config.run.accumulate_steps * world_size
    return max(1, int(config.run.epochs * samples_per_epoch) // samples_a_step)
