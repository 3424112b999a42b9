"""AdamW for the student and the moving average for the teacher, in the order COSMOS needs.

`AdamWEma` is the one to use; engine.other_optimizers has others, to compare with, which read and write the same state.

One step: teacher <- average with the student's weights from before the step; gradient clipping; AdamW; scales clamped.
All of it is one pass over memory in `cosmos_fast.ops.adamw_ema_`, after one over the gradients for their norm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cosmos_fast.config import OptimizerConfig, TrainConfig
from cosmos_fast.ops.adamw_ema import MAX_LOG_SCALE, adamw_ema_, grad_norm
from cosmos_fast.utils.errors import UserError

_NO_DECAY_NAMES = ("bn", "ln", "bias", "logit_scale")


@dataclass(frozen=True)
class StepResult:
    """grad_norm: L2 norm over all gradients before clipping, without the loss scale. applied: False when NaN or Inf
    stopped the step. loss_finite: whether the loss was free of them."""

    grad_norm: float
    applied: bool
    loss_finite: bool = True


def has_weight_decay(name: str, parameter: Tensor) -> bool:
    """Matrices and embeddings decay; vectors, scalars, and anything named bn, ln, bias or logit_scale do not."""
    return parameter.ndim >= 2 and not any(part in name for part in _NO_DECAY_NAMES)


def build_optimizer(config: TrainConfig, student: nn.Module, teacher: nn.Module) -> AdamWEma:
    """The optimizer of `student` that also keeps `teacher`; both hold fp32 parameters of the same names."""
    if config.compute.optimizer != "fused":
        from cosmos_fast.engine.other_optimizers import OTHER_OPTIMIZERS

        return OTHER_OPTIMIZERS[config.compute.optimizer](config.optimizer, student, teacher)
    return AdamWEma(config.optimizer, student, teacher)


def is_log_scale(name: str) -> bool:
    """The logarithms of the losses' scales, which are clamped after every step."""
    return name.endswith("logit_scale")


class _Readout:
    """Values on their way from the device to the host: asked for at once, waited for when they are read."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._arrived = values, None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(values.device))

    def values(self) -> list[float]:
        """Waits until they are here, not for what the device was given to do since."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.tolist()


class AdamWEma:
    """Updates student and teacher in place. As in torch's AdamW, a parameter without a gradient is left alone and does
    not count a step; its teacher counterpart is averaged all the same."""

    def __init__(self, config: OptimizerConfig, student: nn.Module, teacher: nn.Module) -> None:
        self.config = config
        self._student = {name: p for name, p in student.named_parameters() if p.requires_grad}
        self._teacher = dict(teacher.named_parameters())
        if set(self._teacher) != {name for name, _ in student.named_parameters()}:
            raise ValueError("student and teacher have different parameter names")
        self._steps = dict.fromkeys(self._student, 0)
        self._exp_avg = {name: torch.zeros_like(p, memory_format=torch.preserve_format) for name, p in self._items()}
        self._exp_avg_sq = {name: torch.zeros_like(m) for name, m in self._exp_avg.items()}

    def _items(self) -> list[tuple[str, nn.Parameter]]:
        return list(self._student.items())

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for parameter in self._student.values():
            parameter.grad = None

    def gradient_norms(self) -> dict[str, float]:
        """L2 norm of each parameter's gradient, for a dump."""
        return {name: float(p.grad.norm()) for name, p in self._student.items() if p.grad is not None}

    @torch.no_grad()
    def step(self, *, lr: float, ema_decay: float, loss: Tensor | None = None, loss_scale: float = 1.0) -> StepResult:
        """Apply the gradients that backward() has left.

        loss: 0-dim, checked together with the gradients. With NaN or Inf in either, weights, teacher and optimizer
        state stay as they are. On a GPU the device decides that by itself, and the host, which waits for the norm
        alone, goes on to the next step while the update still runs. loss_scale: what the gradients are too large by.
        """
        names = [name for name, p in self._student.items() if p.grad is not None]
        norm = grad_norm([grad for name in names if (grad := self._student[name].grad) is not None])
        watched = [norm] if loss is None else [norm, loss.detach().to(norm)]
        readout = _Readout(torch.stack(watched))
        # 0 x loss is 0, or NaN where the loss is not finite: the norm then stops the step as well.
        watched_norm = sum(0.0 * one for one in watched[1:]) + norm
        self._update(names, watched_norm, lr=lr, ema_decay=ema_decay, grad_scale=1.0 / loss_scale)
        norm_value, *rest = readout.values()
        norm_value /= loss_scale
        loss_finite = all(map(math.isfinite, rest))
        if not (loss_finite and math.isfinite(norm_value)):
            return StepResult(grad_norm=norm_value, applied=False, loss_finite=loss_finite)
        for name in names:
            self._steps[name] += 1
        idle = [name for name, p in self._student.items() if p.grad is None]
        self._average(idle, ema_decay)
        self._clamp_scales(idle)
        return StepResult(grad_norm=norm_value, applied=True)

    def _update(self, names: list[str], norm: Tensor, *, lr: float, ema_decay: float, grad_scale: float) -> None:
        """The fused step over the parameters of those names; none of it where the norm is not finite."""
        adamw_ema_(
            [self._student[name].data for name in names],
            [grad for name in names if (grad := self._student[name].grad) is not None],
            [self._exp_avg[name] for name in names],
            [self._exp_avg_sq[name] for name in names],
            [self._teacher[name].data for name in names],
            step=[self._steps[name] + 1 for name in names],
            lr=lr,
            beta1=self.config.betas[0],
            beta2=self.config.betas[1],
            eps=self.config.eps,
            weight_decay=[self._weight_decay(name) for name in names],
            ema_decay=ema_decay,
            grad_scale=grad_scale,
            clip_norm=self.config.clip_norm,
            norm=norm,
            skip_nonfinite=True,
            log_scales=[i for i, name in enumerate(names) if is_log_scale(name)],
        )

    def _weight_decay(self, name: str) -> float:
        return self.config.weight_decay if has_weight_decay(name, self._student[name]) else 0.0

    def _average(self, names: list[str], ema_decay: float) -> None:
        """The teacher's parameters of those names, apart from the fused step."""
        if names:
            teachers = [self._teacher[name].data for name in names]
            torch._foreach_lerp_(teachers, [self._student[name].data for name in names], 1.0 - ema_decay)

    def _clamp_scales(self, names: list[str]) -> None:
        for name in filter(is_log_scale, names):
            self._student[name].data.clamp_(0.0, MAX_LOG_SCALE)
            self._teacher[name].data.clamp_(0.0, MAX_LOG_SCALE)

    def state_dict(self) -> dict[str, Tensor]:
        """`exp_avg/<name>`, `exp_avg_sq/<name>` like the parameters, `step/<name>` 0-dim int64."""
        tensors = {f"exp_avg/{name}": tensor for name, tensor in self._exp_avg.items()}
        tensors |= {f"exp_avg_sq/{name}": tensor for name, tensor in self._exp_avg_sq.items()}
        return tensors | {f"step/{name}": torch.tensor(step) for name, step in self._steps.items()}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Read what state_dict() gave; names and shapes must be those of this optimizer."""
        own = self.state_dict()
        different = sorted(set(own) ^ set(tensors)) or [n for n in own if own[n].shape != tensors[n].shape]
        if different:
            raise UserError(f"optimizer state does not fit the model at {different[0]!r}: resume with the same model")
        for name in self._student:
            self._exp_avg[name].copy_(tensors[f"exp_avg/{name}"])
            self._exp_avg_sq[name].copy_(tensors[f"exp_avg_sq/{name}"])
            self._steps[name] = int(tensors[f"step/{name}"])
