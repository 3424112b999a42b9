"""The line a person watches, and the same numbers as a metrics row."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cosmos_fast.engine.hooks import StepOutcome
from cosmos_fast.engine.rank_report import RankReport, RankTimes, described
from cosmos_fast.utils.logging import get_logger
from cosmos_fast.utils.memory import peak_bytes
from cosmos_fast.utils.timing import format_duration

if TYPE_CHECKING:
    from cosmos_fast.engine.trainer import Trainer

_log = get_logger(__name__)


class Progress:
    """Every log_every_steps, at the first and at the last step: one line and one "train" row. Times are means since the
    last one, over all ranks; losses are those of the step. Only here is a loss read from the device."""

    def __init__(self, every_steps: int) -> None:
        self._every_steps = every_steps
        self._forget()

    def after_step(self, trainer: Trainer, outcome: StepOutcome) -> None:
        """Count the step; report when it is time."""
        self._steps += 1
        self._samples += outcome.samples
        self._flops += outcome.flops
        self._data_ms += outcome.data_ms
        self._step_ms += outcome.step_ms
        step = trainer.state.step
        if step % self._every_steps and step != 1 and not trainer.finished:
            return
        row = self._row(trainer, outcome)
        trainer.metrics.write(row)
        _log.info("%s", self._line(trainer, row))
        self._forget()

    def _forget(self) -> None:
        self._steps, self._samples, self._flops, self._data_ms, self._step_ms = 0, 0, 0.0, 0.0, 0.0

    def _row(self, trainer: Trainer, outcome: StepOutcome) -> dict[str, Any]:
        state = trainer.state
        own = RankTimes(
            samples=self._samples // trainer.world_size,
            data_ms=self._data_ms,
            step_ms=self._step_ms,
            communication_ms=trainer.clock.take_ms(),
            peak_bytes=peak_bytes(trainer.device),
            flops=self._flops / trainer.world_size,
            flops_done=state.flops / trainer.world_size,
            bad_samples=sum(trainer.loader.stats.values()),
        )
        ranks = RankReport([RankTimes(**each) for each in trainer.ranks.gather(asdict(own))], self._steps)
        return {
            "step": state.step,
            "kind": "train",
            "epoch": state.epoch,
            "samples_seen": state.samples_seen,
            "loss": float(outcome.loss),
            "clip_loss": float(outcome.clip_loss),
            "distill_loss": float(outcome.distill_loss),
            "lr": outcome.lr,
            "ema_decay": outcome.ema_decay,
            **trainer.scales(),
            **trainer.scaler.numbers(),
            "grad_norm": outcome.grad_norm,
            **ranks.numbers(None if trainer.peak_rate is None else trainer.peak_rate.flops_per_s),
            "skipped": state.skipped,
        }

    def _line(self, trainer: Trainer, row: dict[str, Any]) -> str:
        seconds_a_step = (row["step_ms"] + row["data_ms"]) / 1e3
        eta = format_duration((trainer.total_steps - row["step"]) * seconds_a_step)
        loss = f"loss {row['loss']:.4f}"
        if trainer.config.objective == "cosmos":
            loss += f" (clip {row['clip_loss']:.4f} + distill {row['distill_loss']:.4f})"
        mfu = f"MFU {row['mfu_pct']:.1f} %  " if "mfu_pct" in row else ""
        return (
            f"step {row['step']}/{trainer.total_steps}  {loss}  lr {row['lr']:.2e}  "
            f"{row['samples_per_s']:.1f} samples/s  {mfu}data stall {row['data_stall_pct']:.0f} %  {described(row)}"
            f"peak {row['peak_memory_mib'] / 1024:.1f} GiB  ETA {eta}"
        )
