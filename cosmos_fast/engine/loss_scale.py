"""Loss scaling, which fp16 needs: its smallest number is 6e-8, and many gradients are smaller.

The loss is multiplied by a power of two before the backward pass, and the optimizer divides the gradients by it again.
Where that makes a gradient overflow (65504), the step is not applied and the factor halves; after 2000 steps without an
overflow it doubles. Powers of two change no digit.
"""

from __future__ import annotations

from torch import Tensor

from cosmos_fast.engine.optimizer import StepResult
from cosmos_fast.engine.precision import Precision
from cosmos_fast.engine.state import TrainState

INITIAL_SCALE = 2.0**16
LEAST_SCALE, LARGEST_SCALE = 1.0, 2.0**24
GROWTH_STEPS = 2000


class LossScaler:
    """Keeps its factor in the run's state, and so in its checkpoints. Other precisions than fp16 have the factor 1."""

    def __init__(self, precision: Precision, state: TrainState) -> None:
        self._state = state
        if precision.name != "fp16":
            state.loss_scale = None
        elif state.loss_scale is None:
            state.loss_scale, state.steps_at_scale = INITIAL_SCALE, 0

    @property
    def scale(self) -> float:
        """What the gradients are too large by."""
        return self._state.loss_scale or 1.0

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to call backward() on."""
        return loss if self._state.loss_scale is None else loss * self.scale

    def update(self, result: StepResult) -> bool:
        """Learn from a step; True where it was not applied because of the factor, which then is smaller.

        A loss that is not finite is no fault of the factor, nor is a gradient that is not at the least one.
        """
        state = self._state
        if state.loss_scale is None:
            return False
        if result.applied:
            state.steps_at_scale += 1
            if state.steps_at_scale >= GROWTH_STEPS:
                state.loss_scale, state.steps_at_scale = min(2.0 * state.loss_scale, LARGEST_SCALE), 0
            return False
        if not result.loss_finite or state.loss_scale <= LEAST_SCALE:
            return False
        state.loss_scale, state.steps_at_scale = max(0.5 * state.loss_scale, LEAST_SCALE), 0
        state.overflows += 1
        return True

    def numbers(self) -> dict[str, float]:
        """For a row of metrics; empty where nothing is scaled."""
        return {} if self._state.loss_scale is None else {"loss_scale": self.scale, "overflows": self._state.overflows}
