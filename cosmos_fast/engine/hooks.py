"""What happens after a training step. The trainer calls every hook after every step, in order; each decides itself
whether to act."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from cosmos_fast.engine.metrics import to_json
from cosmos_fast.engine.plain_twin import PlainTwin
from cosmos_fast.engine.rng import rng_state, set_rng_state
from cosmos_fast.model import CosmosModel
from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.files import write_atomic
from cosmos_fast.utils.logging import get_logger

if TYPE_CHECKING:
    from cosmos_fast.engine.trainer import Trainer

_log = get_logger(__name__)

Validator = Callable[[int, nn.Module, nn.Module], Mapping[str, float | str]]
"""(step, student, teacher) -> named numbers, and in words how they were measured, written as one "eval" row."""


@dataclass(frozen=True)
class StepOutcome:
    """One optimizer step. Losses are 0-dim tensors on the device, means over the micro-batches; reading one waits for
    the GPU. overflow: the step was not applied because the loss scale was too large. samples, flops: over all
    ranks; keys: of this rank's samples."""

    loss: Tensor
    clip_loss: Tensor
    distill_loss: Tensor
    lr: float
    ema_decay: float
    grad_norm: float
    applied: bool
    overflow: bool
    samples: int
    flops: float
    data_ms: float
    step_ms: float
    keys: list[str]


class Hook(Protocol):
    """Acts after a step, or not."""

    def after_step(self, trainer: Trainer, outcome: StepOutcome) -> None:
        """Called with trainer.state already counting the step."""


class NonfiniteGuard:
    """Logs steps that were not applied, and stops the run after too many in a row; those that only taught the loss
    scale do not count."""

    def __init__(self, limit: int) -> None:
        self._limit = limit

    def after_step(self, trainer: Trainer, outcome: StepOutcome) -> None:
        """Dump and stop at the limit."""
        state = trainer.state
        if outcome.overflow:
            _log.info(
                "step %d: a gradient overflowed: not applied, loss scale now %g", state.step, trainer.scaler.scale
            )
        if outcome.applied or outcome.overflow:
            return
        _log.warning(
            "step %d: loss %s, gradient norm %s: step not applied (%d in a row, %d in all)",
            state.step,
            float(outcome.loss),
            outcome.grad_norm,
            state.nonfinite_in_a_row,
            state.skipped,
        )
        if state.nonfinite_in_a_row >= self._limit:
            path = trainer.plan.folder / f"nonfinite_step_{state.step:08d}.json"
            keys = trainer.ranks.gather(outcome.keys)
            if trainer.ranks.first:
                write_atomic(path, to_json(self._dump(trainer, outcome, keys)) + "\n")
            raise UserError(
                f"loss or gradient was not finite for {state.nonfinite_in_a_row} steps in a row (see {path}): "
                "lower optimizer.lr, set optimizer.clip_norm, or check the data, then continue with --resume"
            )

    def _dump(self, trainer: Trainer, outcome: StepOutcome, keys: list[list[str]]) -> dict[str, Any]:
        """keys: of the samples of each rank, by rank."""
        losses = {"loss": outcome.loss, "clip_loss": outcome.clip_loss, "distill_loss": outcome.distill_loss}
        return {
            "step": trainer.state.step,
            "keys": [key for own in keys for key in own],
            "ranks": [rank for rank, own in enumerate(keys) for _ in own],
            "lr": outcome.lr,
            "loss_scale": trainer.scaler.scale,
            "losses": {name: _spelled(float(value)) for name, value in losses.items()},
            "gradient_norm": _spelled(outcome.grad_norm),
            "gradient_norms": {name: _spelled(norm) for name, norm in trainer.optimizer.gradient_norms().items()},
        }


class Validation:
    """Runs the validators every so many steps and at the end, without leaving a trace in the training.

    Every rank runs its own, which are the same everywhere, or rank 0 has some and the others wait.
    """

    def __init__(self, validators: Sequence[Validator], every_steps: int) -> None:
        self._validators = validators
        self._every_steps = every_steps
        self._on_any_rank: bool | None = None
        self._twin: PlainTwin | None = None

    def after_step(self, trainer: Trainer, outcome: StepOutcome) -> None:
        """Write one "eval" row with the numbers of all validators."""
        step = trainer.state.step
        if not due(step, self._every_steps, trainer.finished):
            return
        if self._on_any_rank is None:
            self._on_any_rank = trainer.ranks.any(bool(self._validators))
        if not self._on_any_rank:
            return
        with trainer.whole_models(), trainer.ranks.together():
            self._validate(trainer, step)

    def _validate(self, trainer: Trainer, step: int) -> None:
        row: dict[str, Any] = {"step": step, "kind": "eval"}
        generators = rng_state()
        trainer.student.eval()
        with torch.no_grad(), self._plain(trainer) as student:
            for validator in self._validators:
                row.update(validator(step, student, trainer.teacher))
        trainer.student.train()
        set_rng_state(generators)
        if not trainer.ranks.first:
            return
        trainer.metrics.write(row)
        numbers = {key: value for key, value in row.items() if isinstance(value, float)}
        headline = {key: value for key, value in numbers.items() if key.endswith("_r1")} or numbers
        described = "  ".join(f"{key} {value:.4g}" for key, value in headline.items())
        _log.info("evaluated at step %d  %s", step, described)

    def _plain(self, trainer: Trainer) -> AbstractContextManager[CosmosModel]:
        """The student, whole already, with nothing in its modules that waits for other ranks."""
        if trainer.zero is None or trainer.zero.stage < 3 or not self._validators:
            return nullcontext(trainer.student)
        self._twin = self._twin or PlainTwin(trainer.config, trainer.device)
        return self._twin.of(trainer.student)


def due(step: int, every_steps: int, now: bool) -> bool:
    """Whether something that happens every so many steps, 0 for never, happens after this one."""
    return now or (every_steps > 0 and step % every_steps == 0)


def _spelled(value: float) -> float | str:
    """NaN and Inf by name: in a dump they are the point."""
    return value if math.isfinite(value) else str(value)
