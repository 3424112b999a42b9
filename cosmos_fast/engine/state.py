"""Where a run stands: with the weights and the optimizer's state, all that is needed to go on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from cosmos_fast.utils.errors import UserError

# Older checkpoints start with the defaults.
_ADDED_LATER = {"loss_scale", "steps_at_scale", "overflows", "data", "step_samples", "loss_samples"}


@dataclass
class TrainState:
    """step: optimizer steps done, skipped ones included. position: global number of the next sample. epoch: passes over
    the data, a fraction. samples_seen: samples trained on, over all ranks. skipped: steps not applied because of NaN or
    Inf; nonfinite_in_a_row: those at the end. flops: floating-point operations that training needed so far, by the
    lengths of the captions it saw. loss_scale, steps_at_scale, overflows: of engine.loss_scale; None without it. data:
    which samples the position counts, as the loader names them. step_samples: samples of an optimizer step over all
    ranks; loss_samples: those of them that one loss holds against each other; None where the checkpoint does not
    tell."""

    step: int = 0
    position: int = 0
    epoch: float = 0.0
    samples_seen: int = 0
    skipped: int = 0
    nonfinite_in_a_row: int = 0
    flops: float = 0.0
    loss_scale: float | None = None
    steps_at_scale: int = 0
    overflows: int = 0
    data: str | None = None
    step_samples: int | None = None
    loss_samples: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainState:
        """The reverse of to_json()."""
        missing = {f.name for f in fields(cls)} - set(values) - _ADDED_LATER
        if missing:
            raise UserError(
                f"training state lacks {', '.join(sorted(missing))}: the checkpoint is from another program"
            )
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})
