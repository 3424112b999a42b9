"""AdamW and the teacher's average on whatever part of the parameters this rank has.

DeepSpeed hands over fp32 masters, whole ones (stage 0) or flat parts of them (stages 1 to 3), with gradients that are
averaged over the ranks already. The teacher is one more state of the optimizer: it lies where the moments lie, divided
as they are, and is updated in the same pass from the masters before the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cosmos_fast.config import OptimizerConfig
from cosmos_fast.engine.optimizer import StepResult, has_weight_decay, is_log_scale
from cosmos_fast.ops.adamw_ema import adamw_ema_, grad_norm

STATES = ("exp_avg", "exp_avg_sq")


class ZeroAdamWEma(torch.optim.Optimizer):
    """Groups: with weight decay, without, and the scales of the losses, which are clamped.

    norm_of: the norm over the gradients of all ranks, where those at hand are a part only. steps: applied so far.
    """

    def __init__(self, config: OptimizerConfig, student: nn.Module) -> None:
        decayed: list[Tensor] = []
        plain: list[Tensor] = []
        scales: list[Tensor] = []
        for name, parameter in student.named_parameters():
            group = scales if is_log_scale(name) else decayed if has_weight_decay(name, parameter) else plain
            group.append(parameter)
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": plain, "weight_decay": 0.0},
            {"params": scales, "weight_decay": 0.0, "clamped": True},
        ]
        super().__init__([g for g in groups if g["params"]], {"lr": config.lr, "weight_decay": 0.0, "clamped": False})
        self.config = config
        self.norm_of: Callable[[], float | Tensor] | None = None
        self.steps = 0
        self.result: StepResult | None = None
        self._lr, self._ema_decay, self._grad_scale, self._loss_finite = config.lr, 1.0, 1.0, True

    def prepare(self, *, lr: float, ema_decay: float, loss_scale: float, loss_finite: bool) -> None:
        """What the next step is to be, before DeepSpeed calls step(), perhaps once for every group."""
        self._lr, self._ema_decay, self._grad_scale = lr, ema_decay, 1.0 / loss_scale
        self._loss_finite, self.result = loss_finite, None

    def start_state(self, master: Tensor, teacher: Tensor, moments: dict[str, Tensor] | None = None) -> None:
        """Give a master its teacher, kept by reference, and its moments: those of a checkpoint, or zeros."""
        for name in STATES:
            self.state[master][name] = torch.zeros_like(master) if moments is None else moments[name]
        self.state[master]["teacher"] = teacher

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Apply the gradients; nothing changes where the norm or the loss is not finite, on any rank."""
        assert closure is None
        given = [
            (parameter, group)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        if not given:
            return
        if self.result is None:
            whole = self.norm_of() if self.norm_of is not None else grad_norm([p.grad for p, _ in given])
            norm_value = float(whole) * self._grad_scale
            applied = math.isfinite(norm_value) and self._loss_finite
            self.result = StepResult(norm_value, applied, self._loss_finite)
            self.steps += applied
        if self.result.applied:
            self._update([p for p, _ in given], [group for _, group in given])

    def _update(self, masters: list[Tensor], groups: list[dict[str, Any]]) -> None:
        assert self.result is not None
        states = [self.state[master] for master in masters]
        adamw_ema_(
            [master.data for master in masters],
            [grad for master in masters if (grad := master.grad) is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["teacher"] for state in states],
            step=self.steps,
            lr=self._lr,
            beta1=self.config.betas[0],
            beta2=self.config.betas[1],
            eps=self.config.eps,
            weight_decay=[group["weight_decay"] for group in groups],
            ema_decay=self._ema_decay,
            grad_scale=self._grad_scale,
            clip_norm=self.config.clip_norm,
            norm=torch.tensor(self.result.grad_norm / self._grad_scale, dtype=torch.float32, device=masters[0].device),
            log_scales=[i for i, group in enumerate(groups) if group["clamped"]],
        )
